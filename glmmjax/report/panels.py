"""Panels of a picture: axes, their labels, names beside points and down the side, a smooth curve."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from .pyplot import given_axes, pyplot

#: Most levels that get a line of text each; more are drawn without names.
MAX_NAMED_LEVELS = 60
POINT, LINE, REFERENCE = "#2f5d8a", "#c8502d", "0.6"
COLOURS = ("#2f5d8a", "#c8502d", "#4f8f4f", "#8a5fa8", "#b58a1b", "#3b9aa8")


def panels(ax: Any, count: int, panel: tuple[float, float], columns: int = 3) -> np.ndarray:
    """`count` axes: the user's, or those of a new figure with `panel` inches each."""
    plt = pyplot()
    if ax is not None:
        return given_axes(ax, count)
    columns = min(columns, count)
    rows = -(-count // columns)
    _, grid = plt.subplots(
        rows, columns, figsize=(panel[0] * columns, panel[1] * rows), squeeze=False, layout="constrained"
    )
    for spare in grid.flat[count:]:
        spare.remove()
    return np.asarray(list(grid.flat[:count]), object)


def name_axes(panel: Any, x: str, y: str, title: str) -> None:
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.set_title(title, fontsize=10)
    panel.tick_params(labelsize=8)


def plotting_positions(n: int) -> np.ndarray:
    """Normal quantiles (n,) at which ordered values are drawn (R's ppoints)."""
    a = 0.375 if n <= 10 else 0.5
    p = (np.arange(1, n + 1) - a) / (n + 1.0 - 2.0 * a)
    inverse = NormalDist().inv_cdf
    return np.array([inverse(x) for x in p])


def smooth(x: np.ndarray, y: np.ndarray, span: float = 0.67) -> np.ndarray:
    """Local straight lines through the nearest `span` of the points, tricube weights (Cleveland 1979), at x (n,)."""
    reach = min(x.size, max(3, int(np.ceil(span * x.size))))
    at = np.unique(np.quantile(x, np.linspace(0.0, 1.0, 60)))
    scale = max(float(np.ptp(x)), np.finfo(float).tiny)
    out = np.empty(at.size)
    for i, centre in enumerate(at):
        away = np.abs(x - centre)
        width = max(float(np.partition(away, reach - 1)[reach - 1]), 1e-3 * scale) * 1.001
        w = np.clip(1.0 - (away / width) ** 3, 0.0, None) ** 3
        middle = (w @ x) / w.sum()
        spread = w @ (x - middle) ** 2
        level = (w @ y) / w.sum()
        # a spread of nothing: all near points share one x, and the line is their mean
        slope = (w @ ((x - middle) * y)) / spread if spread > 1e-9 * w.sum() * scale**2 else 0.0
        out[i] = level + slope * (centre - middle)
    return np.asarray(np.interp(x, at, out))


def name_largest(panel: Any, data: pd.DataFrame, x: str, y: str, by: np.ndarray, n: int, beside: bool = True) -> None:
    """Write the row labels of the n largest |by| beside their points, or above and below them, without overlaps."""
    which = np.argsort(-np.abs(by), kind="stable")[:n]
    data["labelled"] = np.isin(np.arange(len(data)), which)
    panel.margins(x=0.09 if beside else 0.05, y=0.09 if beside else 0.14)
    panel.autoscale_view()  # otherwise the limits are those of an empty panel until it is drawn
    points = panel.transData.transform(data[[x, y]].iloc[which].to_numpy(float)) * 72.0 / panel.figure.dpi
    middle = 0.5 * (data[x].min() + data[x].max())
    taken: list[tuple[float, float]] = []
    for i, (across, up) in zip(which, points, strict=True):
        sign = 1.0 if by[i] >= 0.0 else -1.0
        right = data[x].iloc[i] >= middle  # outwards, where fewer points are
        offset = np.array([4.0 if right else -4.0, 0.0] if beside else [0.0, 8.0 * sign])
        place = np.array([across + (14.0 if right else -14.0) * beside, up]) + offset * (not beside)
        while any(abs(place[0] - a) < 26.0 and abs(place[1] - b) < 8.0 for a, b in taken):
            offset[1] += 8.0 * (-sign if beside else sign)  # towards the middle, or away from the line
            place[1] += 8.0 * (-sign if beside else sign)
        taken.append((float(place[0]), float(place[1])))
        panel.annotate(
            str(data["row"].iloc[i]),
            (data[x].iloc[i], data[y].iloc[i]),
            xytext=tuple(offset),
            textcoords="offset points",
            ha="center" if not beside else "left" if right else "right",
            va="center",
            fontsize=7,
            color="0.25",
        )


def name_levels(panel: Any, names: Sequence[Any], group: str) -> None:
    """Level names down the side, one line each, or their number where there are too many to read."""
    m = len(names)
    if m <= MAX_NAMED_LEVELS:
        panel.set_yticks(np.arange(m), [str(n) for n in names])
        panel.tick_params(axis="y", labelsize=8 if m <= 30 else 7, length=0)
        panel.set_ylabel(group, fontsize=9)
    else:
        panel.set_yticks([])
        panel.set_ylabel(f"{m:,} levels of {group}", fontsize=9)
    panel.set_ylim(-0.8, m - 0.2)


def height(levels: int) -> float:
    """Inches for a panel with a line per level."""
    if levels > MAX_NAMED_LEVELS:
        return 7.0
    per_level = 0.17 if levels <= 30 else 0.145
    return float(np.clip(1.2 + per_level * levels, 2.6, 10.0))
