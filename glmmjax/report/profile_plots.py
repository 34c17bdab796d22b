"""Pictures of profiles: signed roots, densities, and contours of pairs.

Sources: Bates & Watts 1988, Nonlinear Regression Analysis, section 6.1 and appendix 6 (contours from profile traces);
Bates et al. 2015, J. Stat. Softw. 67(1), section 5.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .pyplot import pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..inference.profile import Profile

#: Levels of the intervals marked in a picture of signed roots, and of the contours of a pair.
MARKED = (0.5, 0.8, 0.9, 0.95, 0.99)
CONTOURS = (0.5, 0.8, 0.9, 0.95)


def plot(made: Profile, kind: str = "zeta", which: str | Sequence[str] | None = None) -> tuple[Figure, pd.DataFrame]:
    """See `Profile.plot`."""
    draw = {"zeta": _zeta, "density": _density, "pairs": _pairs}
    if kind not in draw:
        raise ValueError(f"kind must be one of {', '.join(map(repr, draw))}, got {kind!r}")
    names = list(made._splines) if which is None else [which] if isinstance(which, str) else list(which)
    for name in names:
        if name not in made._splines:
            raise ValueError(f"no profile of {name!r}; there are: {', '.join(made._splines)}")
    if kind == "pairs" and len(names) < 2:
        raise ValueError("pairs need at least two profiled quantities")
    return draw[kind](made, names)


def _curve(made: Profile, name: str) -> tuple[np.ndarray, np.ndarray]:
    own = made.frame.loc[made.frame[".par"] == name, ".focal"].to_numpy()
    value = np.linspace(own.min(), own.max(), 201)
    return value, made.zeta(name, value)


def _grid(count: int, width: float = 2.4, height: float = 2.2) -> tuple[Figure, np.ndarray]:
    plt = pyplot()
    columns = min(3, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns + 0.8, height * rows + 0.6), squeeze=False, layout="constrained"
    )
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, axes


def _label(panel: Any, name: str) -> None:
    panel.set_title(name, fontsize="small", pad=4)
    panel.tick_params(labelsize="x-small")
    panel.locator_params(axis="x", nbins=5)


def _zeta(made: Profile, names: list[str]) -> tuple[Figure, pd.DataFrame]:
    figure, axes = _grid(len(names))
    data = []
    for panel, name in zip(axes.flat, names, strict=False):
        value, zeta = _curve(made, name)
        panel.axhline(0.0, color="0.8", linewidth=0.8)
        panel.plot(value, zeta, color="C0", linewidth=1.3)
        own = made.frame[made.frame[".par"] == name]
        panel.plot(own[".focal"], own[".zeta"], "o", color="C0", markersize=2.5)
        for level in MARKED:
            t = NormalDist().inv_cdf(0.5 + 0.5 * level)
            ends = made.value(name, [-t, t])
            panel.vlines(ends, 0.0, [-t, t], color="0.55", linewidth=0.7)
        _label(panel, name)
        data.append(pd.DataFrame({"parameter": name, "value": value, "zeta": zeta}))
    figure.supylabel("signed root of the deviance's rise", fontsize="medium")
    figure.suptitle("Profile zeta; 50, 80, 90, 95, 99 % intervals", fontsize="medium")
    return figure, pd.concat(data, ignore_index=True)


def _density(made: Profile, names: list[str]) -> tuple[Figure, pd.DataFrame]:
    figure, axes = _grid(len(names))
    data = []
    for panel, name in zip(axes.flat, names, strict=False):
        value, zeta = _curve(made, name)
        slope = made._splines[name][0].derivative()(value)
        density = np.exp(-0.5 * zeta**2) / np.sqrt(2.0 * np.pi) * slope
        panel.fill_between(value, 0.0, density, color="C0", alpha=0.15, linewidth=0)
        panel.plot(value, density, color="C0", linewidth=1.3)
        panel.set_ylim(bottom=0.0)
        _label(panel, name)
        data.append(pd.DataFrame({"parameter": name, "value": value, "density": density}))
    figure.supylabel("density", fontsize="medium")
    figure.suptitle("Profile densities: normal on the scale of zeta", fontsize="medium")
    return figure, pd.concat(data, ignore_index=True)


def _trace(made: Profile, along: str, other: str) -> Any:
    """zeta of `other` on the profile of `along`, as a function of the latter's zeta."""
    from scipy.interpolate import PchipInterpolator

    own = made.frame[made.frame[".par"] == along].drop_duplicates(".zeta")
    zeta = made.zeta(other, own[other])
    zeta = np.where(own[".zeta"] == 0.0, 0.0, zeta)
    keep = np.isfinite(zeta)
    return PchipInterpolator(own[".zeta"].to_numpy()[keep], zeta[keep], extrapolate=True)


def contour(made: Profile, a: str, b: str, level: float) -> pd.DataFrame:
    """The joint region of two quantities: columns named for them, one row per point of its boundary.

    Where it touches its box the other quantity is on its profile trace; between, the phase difference of the two
    signed roots is interpolated (Bates & Watts 1988, appendix 6).
    """
    from scipy.interpolate import CubicSpline

    c = float(np.sqrt(-2.0 * np.log(1.0 - level)))  # root of chi2_2's quantile
    on_a, on_b = _trace(made, a, b), _trace(made, b, a)
    angles, phases = [], []
    for end in (c, -c):
        other = float(np.clip(on_a(end) / c, -1.0, 1.0))
        first = 0.0 if end > 0 else np.pi
        second = np.arccos(other) if end > 0 else 2.0 * np.pi - np.arccos(other)
        angles.append(0.5 * (first + second))
        phases.append(first - second)
        other = float(np.clip(on_b(end) / c, -1.0, 1.0))
        second = 0.0 if end > 0 else np.pi
        first = -np.arccos(other) if end > 0 else np.arccos(other)
        angles.append(0.5 * (first + second))
        phases.append(first - second)
    angle, phase = np.array(angles), np.array(phases)
    order = np.argsort(np.mod(angle, 2.0 * np.pi))
    angle, phase = np.mod(angle, 2.0 * np.pi)[order], phase[order]
    if (np.diff(angle) < 1e-9).any():
        return pd.DataFrame({a: [np.nan], b: [np.nan]})
    spline = CubicSpline(np.append(angle, angle[0] + 2.0 * np.pi), np.append(phase, phase[0]), bc_type="periodic")
    around = np.linspace(0.0, 2.0 * np.pi, 181)
    difference = spline(around)
    za, zb = c * np.cos(around + 0.5 * difference), c * np.cos(around - 0.5 * difference)
    return pd.DataFrame({a: made.value(a, za), b: made.value(b, zb)})


def _pairs(made: Profile, names: list[str]) -> tuple[Figure, pd.DataFrame]:
    plt = pyplot()
    k = len(names)
    figure, axes = plt.subplots(k, k, figsize=(1.7 * k + 0.8, 1.7 * k + 0.6), squeeze=False, layout="constrained")
    data = []
    for i, below in enumerate(names):
        for j, across in enumerate(names):
            panel = axes[i, j]
            panel.tick_params(labelsize="x-small")
            panel.locator_params(nbins=4)
            if i < j:
                panel.set_visible(False)
                continue
            if i == j:
                value, zeta = _curve(made, below)
                panel.plot(value, zeta, color="C0", linewidth=1.2)
                panel.axhline(0.0, color="0.8", linewidth=0.8)
                panel.set_title(below, fontsize="x-small", pad=3)
                panel.yaxis.tick_right()
                continue
            for level in CONTOURS:
                line = contour(made, across, below, level)
                panel.plot(line[across], line[below], color="C0", linewidth=0.9)
                data.append(
                    pd.DataFrame(
                        {"x": across, "y": below, "level": level, "x_value": line[across], "y_value": line[below]}
                    )
                )
            for along in (across, below):
                own = made.frame[made.frame[".par"] == along]
                panel.plot(
                    own[across], own[below], color="0.55", linewidth=0.8, linestyle="-" if along == across else "--"
                )
            panel.plot(made.estimates[across], made.estimates[below], "+", color="black", markersize=5)
            if j > 0:
                panel.set_yticklabels([])
            if i < k - 1:
                panel.set_xticklabels([])
    figure.suptitle("Profile pairs: 50, 80, 90, 95 % regions, profile traces, zeta on the diagonal", fontsize="medium")
    return figure, pd.concat(data, ignore_index=True)
