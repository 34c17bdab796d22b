"""Pictures of fitted models: residuals, random effects, shrinkage, coefficients, calibration.

Every function returns the matplotlib Figure and the DataFrame of what is drawn in it. `ax` takes axes of your own:
one, or as many as there are panels; None makes a figure.

    figure, data = gj.plots.diagnostics(m)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from ._arguments import checked, is_model, models_by_name, text
from ._errors import NotSupportedError
from .inference.unpooled import unpooled
from .report.panels import (
    COLOURS,
    LINE,
    MAX_NAMED_LEVELS,
    POINT,
    REFERENCE,
    height,
    name_axes,
    name_largest,
    name_levels,
    panels,
    plotting_positions,
    smooth,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .results import MixedModel

Picture = tuple["Figure", pd.DataFrame]


def _normal_quantile(level: float) -> float:
    return NormalDist().inv_cdf(0.5 + 0.5 * level)


def _position(model: MixedModel) -> tuple[np.ndarray, str]:
    """What residuals are drawn against: fitted values, or for generalised models the linear predictor."""
    if model.is_linear:
        return model.fitted.to_numpy(), "fitted value"
    return model.linear_predictor, "linear predictor"


def _residuals(model: MixedModel, type: str) -> tuple[pd.Series, str]:
    scaled = model.is_linear and type in ("pearson", "deviance")
    kind = "Pearson" if type == "pearson" else type
    return model.residuals(type, scaled=scaled), f"{kind} residual" + (" / sigma" if scaled else "")


def _flist(model: MixedModel, group: Any) -> pd.Series:
    """Labels (n,) of a grouping factor; None is the one with most levels that has several rows per level."""
    if group is not None and not isinstance(group, str):
        own = np.asarray(model._data.on_rows(group, "group"))
        return pd.Series(own.astype(str), name=getattr(group, "name", None) or "group")
    name = _group(model, group)
    return pd.Series(model.getME("flist")[name].astype(str).to_numpy(), name=name)


def _group(model: MixedModel, group: str | None) -> str:
    """Name of a grouping factor; None is the one with most levels that has several rows per level."""
    if group is not None:
        if group not in model.ngrps:
            raise ValueError(f"the model has no grouping factor {group!r}; it has {', '.join(model.ngrps)}")
        return group
    repeated = {g: m for g, m in model.ngrps.items() if m < model.nobs} or model.ngrps
    return max(repeated, key=lambda g: repeated[g])


# ---- residuals -------------------------------------------------------------------------------------
@checked()
def residuals_fitted(model: MixedModel, type: str = "pearson", n_labels: int = 3, ax: Any = None) -> Picture:
    """Residuals against fitted values (linear predictors of a generalised model), with a smooth curve.

    Args:
        model: fitted model.
        type: of residual, as `MixedModel.residuals`; Pearson and deviance residuals of a linear model are
            divided by sigma.
        n_labels: how many of the largest residuals get their row label.
        ax: one matplotlib axes.

    Returns:
        Figure, and a row per observation: row (label), fitted (the horizontal axis), residual, smooth
        (local linear fit), labelled.
    """
    panel = panels(ax, 1, (5.4, 4.0))[0]
    x, x_label = _position(model)
    values, y_label = _residuals(model, type)
    data = pd.DataFrame({"row": values.index, "fitted": x, "residual": values.to_numpy()})
    data["smooth"] = smooth(x, data["residual"].to_numpy())
    panel.axhline(0.0, color=REFERENCE, linewidth=0.8, linestyle="--")
    panel.scatter(data["fitted"], data["residual"], s=12, color=POINT, alpha=0.6, linewidth=0)
    line = data.sort_values("fitted")
    panel.plot(line["fitted"], line["smooth"], color=LINE, linewidth=1.5)
    name_largest(panel, data, "fitted", "residual", data["residual"].to_numpy(), n_labels)
    name_axes(panel, x_label, y_label, f"Residuals against {x_label}s")
    return panel.figure, data


@checked()
def scale_location(model: MixedModel, type: str = "pearson", n_labels: int = 3, ax: Any = None) -> Picture:
    """Square root of |residual| against fitted values: a trend in the smooth curve is a variance misjudged.

    Arguments as `residuals_fitted`.

    Returns:
        Figure, and a row per observation: row, fitted, root_abs_residual, smooth, labelled.
    """
    panel = panels(ax, 1, (5.4, 4.0))[0]
    x, x_label = _position(model)
    values, y_label = _residuals(model, type)
    root = np.sqrt(np.abs(values.to_numpy()))
    data = pd.DataFrame({"row": values.index, "fitted": x, "root_abs_residual": root, "smooth": smooth(x, root)})
    panel.scatter(data["fitted"], root, s=12, color=POINT, alpha=0.6, linewidth=0)
    line = data.sort_values("fitted")
    panel.plot(line["fitted"], line["smooth"], color=LINE, linewidth=1.5)
    panel.axhline(0.0, color="none")  # keeps zero in sight
    name_largest(panel, data, "fitted", "root_abs_residual", root, n_labels)
    name_axes(panel, x_label, f"sqrt |{y_label}|", "Scale and location")
    return panel.figure, data


@checked()
def residuals_by_group(
    model: MixedModel, group: Any = None, type: str = "pearson", max_levels: int = MAX_NAMED_LEVELS, ax: Any = None
) -> Picture:
    """A horizontal box of residuals per level, ordered by their medians.

    Args:
        model: fitted model.
        group: a grouping factor, or (n,) values to group by; None takes the factor with most levels among
            those with several rows per level.
        type: of residual, as `residuals_fitted`.
        max_levels: where there are more, those with the largest |median| are drawn.
        ax: one matplotlib axes.

    Returns:
        Figure, and a row per level drawn, from below: level, n, low and high (the whiskers: last residuals
        within 1.5 box lengths), q1, median, q3, outside (number of residuals beyond them).
    """
    labels = _flist(model, group)
    values, x_label = _residuals(model, type)
    rows, far = [], []
    for level, own in values.groupby(labels.to_numpy(), sort=False):
        r = own.to_numpy()
        q1, median, q3 = np.quantile(r, [0.25, 0.5, 0.75])
        inside = r[(r >= q1 - 1.5 * (q3 - q1)) & (r <= q3 + 1.5 * (q3 - q1))]
        far.append(np.setdiff1d(r, inside))
        rows.append((level, r.size, inside.min(), q1, median, q3, inside.max(), r.size - inside.size))
    data = pd.DataFrame(rows, columns=["level", "n", "low", "q1", "median", "q3", "high", "outside"])
    total = len(data)
    keep = data["median"].abs().sort_values(ascending=False, kind="stable").index[:max_levels]
    data = data.loc[keep].sort_values("median", kind="stable")
    beyond = [far[i] for i in data.index]
    data = data.reset_index(drop=True)
    panel = panels(ax, 1, (5.4, height(len(data))))[0]
    y = np.arange(len(data))
    panel.axvline(0.0, color=REFERENCE, linewidth=0.8, linestyle="--")
    panel.hlines(y, data["low"], data["high"], color=POINT, linewidth=0.8)
    box = {"facecolor": "#c7d6e6", "edgecolor": POINT, "linewidth": 0.8, "height": 0.7}
    panel.use_sticky_edges = False  # a box may be the outermost thing and needs its margin
    panel.barh(y, data["q3"] - data["q1"], left=data["q1"], zorder=2, **box)
    panel.vlines(data["median"], y - 0.35, y + 0.35, color=LINE, linewidth=1.6, zorder=3)
    for at, r in zip(y, beyond, strict=True):
        panel.plot(r, np.full(r.size, at), ".", color=POINT, markersize=3)
    name = str(labels.name)
    title = f"Residuals by {name}"
    if len(data) < total:
        title += f"\n{len(data)} of {total:,} levels, those with the largest |median|"
    name_axes(panel, x_label, name, title)
    name_levels(panel, data["level"].tolist(), name)
    return panel.figure, data


@checked()
def residuals_qq(
    model: MixedModel, type: str | None = None, level: float = 0.95, n_labels: int = 3, seed: int = 0, ax: Any = None
) -> Picture:
    """Ordered residuals against normal quantiles, with the line through the quartiles and a pointwise band.

    Args:
        model: fitted model.
        type: of residual; None takes Pearson residuals of a linear model, else randomised quantile residuals,
            which are normal under the model whatever the family, and the response's for a user's family.
        level: of the band, the distribution of each normal order statistic around the line.
        n_labels: how many of the residuals farthest from the line get their row label.
        seed: of quantile residuals.
        ax: one matplotlib axes.

    Returns:
        Figure, and a row per observation in increasing order: row, theoretical, residual, line, lower, upper,
        labelled.
    """
    from scipy.special import betaincinv, ndtri

    if type is None:
        type = "pearson" if model.is_linear else "response" if model.family.discrete is None else "quantile"
    if type == "quantile":
        values, y_label = model.residuals(type, seed=seed), "quantile residual"
    else:
        values, y_label = _residuals(model, type)
    values = values.sort_values(kind="stable")
    panel = panels(ax, 1, (5.4, 4.0))[0]
    n = len(values)
    z, r = plotting_positions(n), values.to_numpy()
    quartile = NormalDist().inv_cdf(0.75)
    low, high = np.quantile(r, [0.25, 0.75])
    slope, middle = (high - low) / (2.0 * quartile), 0.5 * (low + high)
    order = np.arange(1, n + 1)
    band = [ndtri(betaincinv(order, n + 1.0 - order, p)) for p in (0.5 - 0.5 * level, 0.5 + 0.5 * level)]
    data = pd.DataFrame({"row": values.index, "theoretical": z, "residual": r, "line": middle + slope * z})
    data["lower"], data["upper"] = middle + slope * band[0], middle + slope * band[1]
    panel.fill_between(z, data["lower"], data["upper"], color="0.9", linewidth=0)
    panel.plot(z, data["line"], color=LINE, linewidth=1.2)
    panel.scatter(z, r, s=12, color=POINT, alpha=0.7, linewidth=0, zorder=3)
    name_largest(panel, data, "theoretical", "residual", (data["residual"] - data["line"]).to_numpy(), n_labels, False)
    name_axes(panel, "normal quantile", y_label, "Normal Q-Q plot of residuals")
    return panel.figure, data


@checked()
def diagnostics(model: MixedModel, type: str = "pearson", group: Any = None, ax: Any = None) -> Picture:
    """Four panels: `residuals_fitted`, `residuals_qq`, `scale_location` and `residuals_by_group`.

    Args:
        model: fitted model.
        type: of residual in all panels but the Q-Q plot, which chooses its own ("response" holds for all).
        group: for the boxes, of which the 25 with the largest |median| are drawn.
        ax: four matplotlib axes.

    Returns:
        Figure, and the four tables below each other, with the function's name as outer index.
    """
    axes = panels(ax, 4, (5.2, 4.0), columns=2)
    own = type if type == "response" else None
    parts = {
        "residuals_fitted": residuals_fitted(model, type, ax=axes[0]),
        "residuals_qq": residuals_qq(model, own, ax=axes[1]),
        "scale_location": scale_location(model, type, ax=axes[2]),
        "residuals_by_group": residuals_by_group(model, group, type, max_levels=25, ax=axes[3]),
    }
    data = pd.concat({name: frame for name, (_, frame) in parts.items()}, names=["panel", None])
    return axes[0].figure, data


# ---- random effects --------------------------------------------------------------------------------
def _columns(model: MixedModel, term: str | None) -> tuple[str, list[int]]:
    """Grouping factor and which of its columns: those of one term, as the formula writes it, or all."""
    if term is None or term in model.ngrps:
        group = _group(model, term)
        return group, list(range(sum(len(model._data.terms[i].names) for i in model._by_group()[group])))
    wanted = "".join(term.split()).strip("()")
    for group, indices in model._by_group().items():
        at = 0
        found: list[int] = []
        for i in indices:
            k = len(model._data.terms[i].names)
            if "".join(model._data.formula_bars[i].split()).strip("()") == wanted:
                found += range(at, at + k)
            at += k
        if found:
            return group, found
    have = ", ".join([*model.ngrps, *dict.fromkeys(model._data.formula_bars)])
    raise ValueError(f"the model has no grouping factor or term {term!r}; it has {have}")


def _modes(model: MixedModel, groups: Iterable[tuple[str, list[int]]], level: float) -> list[pd.DataFrame]:
    """Per column, a table of its modes: group, column, level, mode, sd, lower, upper."""
    half = _normal_quantile(level)
    effects = model.ranef(condVar=True)
    out = []
    for group, which in groups:
        frame = effects[group]
        sd = np.sqrt(np.einsum("mkk->mk", frame.attrs["condVar"]))
        for j in which:
            mode = frame.iloc[:, j].to_numpy()
            out.append(
                pd.DataFrame(
                    {
                        "group": group,
                        "column": frame.columns[j],
                        "level": frame.index.astype(str),
                        "mode": mode,
                        "sd": sd[:, j],
                        "lower": mode - half * sd[:, j],
                        "upper": mode + half * sd[:, j],
                    }
                )
            )
    return out


@checked()
def caterpillar(
    model: MixedModel, term: str | None = None, level: float = 0.95, sort: str | None = None, ax: Any = None
) -> Picture:
    """Conditional modes of one grouping factor in increasing order, with intervals; a panel per column.

    Args:
        model: fitted model.
        term: a grouping factor, or one of its terms as the formula writes it, ``"(1 | g)"``; None takes the
            factor with most levels among those with several rows per level.
        level: of the intervals, mode +- z conditional standard deviations.
        sort: a column, by which all panels are ordered; None orders each panel by itself.
        ax: matplotlib axes, one per column.

    Returns:
        Figure, and per panel a row per level from below: group, column, level, mode, sd, lower, upper.
    """
    group, which = _columns(model, term)
    tables = _modes(model, [(group, which)], level)
    names = [str(t["column"].iloc[0]) for t in tables]
    if sort is not None and sort not in names:
        raise ValueError(f"sort must be one of the columns {', '.join(names)}; got {sort!r}")
    order = None if sort is None else np.argsort(tables[names.index(sort)]["mode"].to_numpy(), kind="stable")
    m = len(tables[0])
    axes = panels(ax, len(tables), (4.2, height(m)))
    drawn = []
    for panel, name, table in zip(axes, names, tables, strict=True):
        own = np.argsort(table["mode"].to_numpy(), kind="stable") if order is None else order
        table = table.iloc[own].reset_index(drop=True)
        y = np.arange(m)
        apart = np.where((table["lower"] > 0.0) | (table["upper"] < 0.0), LINE, POINT)
        panel.axvline(0.0, color=REFERENCE, linewidth=0.8, linestyle="--")
        lines = {"linewidth": 1.0} if m <= MAX_NAMED_LEVELS else {"linewidth": 0.6, "alpha": 0.5 if m <= 300 else 0.15}
        panel.hlines(y, table["lower"], table["upper"], color=apart, **lines)
        panel.scatter(table["mode"], y, s=12 if m <= MAX_NAMED_LEVELS else 5, color=apart, zorder=3)
        name_axes(panel, f"conditional mode, {100.0 * level:g} % interval", group, name)
        name_levels(panel, table["level"].tolist(), group)
        drawn.append(table)
    return axes[0].figure, pd.concat(drawn, ignore_index=True)


@checked()
def ranef_qq(model: MixedModel, term: str | None = None, level: float = 0.95, ax: Any = None) -> Picture:
    """Conditional modes against normal quantiles, with their intervals and a least-squares line; a panel per column.

    Args:
        model: fitted model.
        term: a grouping factor or a term, as `caterpillar`; None takes all of them.
        level: of the intervals.
        ax: matplotlib axes, one per column.

    Returns:
        Figure, and per panel a row per level in increasing order: group, column, level, mode, sd, lower, upper,
        theoretical, line.
    """
    chosen = [_columns(model, g) for g in model.ngrps] if term is None else [_columns(model, term)]
    tables = _modes(model, chosen, level)
    axes = panels(ax, len(tables), (4.0, 3.6))
    drawn = []
    for panel, table in zip(axes, tables, strict=True):
        table = table.sort_values("mode", kind="stable", ignore_index=True)
        z = plotting_positions(len(table))
        mode = table["mode"].to_numpy()
        table["theoretical"] = z
        table["line"] = mode.mean() + (z @ mode) / max(float(z @ z), np.finfo(float).tiny) * z  # z has mean 0
        panel.vlines(z, table["lower"], table["upper"], color="#9db6cf", linewidth=0.8 if len(z) <= 100 else 0.4)
        panel.plot(z, table["line"], color=LINE, linewidth=1.2)
        panel.scatter(z, mode, s=12 if len(z) <= 100 else 5, color=POINT, zorder=3)
        title = f"{table['group'].iloc[0]}: {table['column'].iloc[0]}"
        name_axes(panel, "normal quantile", f"conditional mode, {100.0 * level:g} % interval", title)
        drawn.append(table)
    return axes[0].figure, pd.concat(drawn, ignore_index=True)


# ---- shrinkage -------------------------------------------------------------------------------------
@checked(group=text)
def shrinkage(model: MixedModel, group: str | None = None, ax: Any = None) -> Picture:
    """What partial pooling does: per level, the estimate from its own rows alone and the conditional mode.

    "Its own rows alone" holds everything else in the model fixed at the estimates: least squares for a linear
    model, maximum likelihood for a generalised one, over the level's random-effects columns. Both are drawn
    with the fixed effect of the same name added. Two columns give arrows in their plane, from the separate
    estimate to the mode; one column, or more than two, a panel each with a line per level.

    Args:
        model: fitted model.
        group: a grouping factor; None takes the one with most levels among those with several rows per level.
        ax: matplotlib axes: one, or one per column if these are more than two.

    Returns:
        Figure, and a row per level and column: group, column, level, n (rows), no_pooling (NaN where the
        level's rows do not determine it: columns that do not vary, or all responses equal), mode, fixed.
    """
    group = _group(model, group)
    effects = model.ranef()[group]
    separate = unpooled(model, group)
    labels = model._data.terms[model._by_group()[group][0]]
    n = np.bincount(labels.level, minlength=len(labels.levels))
    fixed = model.fixef.reindex(list(effects.columns)).fillna(0.0).to_numpy()
    tables = []
    for j, column in enumerate(effects.columns):
        tables.append(
            pd.DataFrame(
                {
                    "group": group,
                    "column": column,
                    "level": effects.index.astype(str),
                    "n": n,
                    "no_pooling": fixed[j] + separate[:, j],
                    "mode": fixed[j] + effects.iloc[:, j].to_numpy(),
                    "fixed": fixed[j],
                }
            )
        )
    missing = int(np.isnan(separate).any(axis=1).sum())
    title = f"Shrinkage by {group}"
    if missing:
        title += f"\n{missing} of {len(effects):,} levels have no estimate of their own"
    if len(tables) == 2:
        axes = panels(ax, 1, (6.0, 5.2))
        _shrinkage_plane(axes[0], tables, title)
    else:
        axes = panels(ax, len(tables), (4.6, height(len(effects))))
        for panel, table in zip(axes, tables, strict=True):
            _shrinkage_lines(panel, table, group, title, legend=panel is axes[0])
    return axes[0].figure, pd.concat(tables, ignore_index=True)


def _shrinkage_plane(panel: Any, tables: list[pd.DataFrame], title: str) -> None:
    x, y = tables
    start = np.column_stack([x["no_pooling"], y["no_pooling"]])
    end = np.column_stack([x["mode"], y["mode"]])
    moved = ~np.isnan(start).any(axis=1)
    way = (end - start)[moved]
    if moved.any():
        arrow = {"width": 0.003, "headwidth": 7, "headlength": 8, "color": "0.55"}
        panel.quiver(*start[moved].T, *way.T, angles="xy", scale_units="xy", scale=1.0, **arrow)
    panel.scatter(*start[moved].T, s=22, facecolor="white", edgecolor=POINT, zorder=3, label="own rows alone")
    panel.scatter(*end.T, s=10, color=POINT, zorder=4, label="conditional mode")
    panel.scatter(
        x["fixed"].iloc[:1], y["fixed"].iloc[:1], s=110, marker="+", color=LINE, zorder=5, label="fixed effect"
    )
    if len(x) <= 30:
        for name, (a, b), ok in zip(x["level"], np.where(moved[:, None], start, end), moved, strict=True):
            panel.annotate(
                name, (a, b), xytext=(4, 3), textcoords="offset points", fontsize=7, color="0.35" if ok else "0.6"
            )
    panel.margins(0.09)
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    name_axes(panel, str(x["column"].iloc[0]), str(y["column"].iloc[0]), title)


def _shrinkage_lines(panel: Any, table: pd.DataFrame, group: str, title: str, legend: bool) -> None:
    table = table.sort_values("mode", kind="stable")
    y = np.arange(len(table))
    few = len(table) <= MAX_NAMED_LEVELS
    panel.axvline(table["fixed"].iloc[0], color=LINE, linewidth=1.0, label="fixed effect")
    panel.hlines(y, table["no_pooling"], table["mode"], color="0.75", linewidth=1.0)
    size = 20 if few else 8
    panel.scatter(
        table["no_pooling"], y, s=size, facecolor="white", edgecolor=POINT, linewidth=0.9, label="own rows alone"
    )
    panel.scatter(table["mode"], y, s=size, color=POINT, zorder=3, label="conditional mode")
    if legend:
        panel.legend(fontsize=8, frameon=False, loc="lower right")  # rows ascend: the corner is empty
    name_axes(panel, str(table["column"].iloc[0]), group, title)
    name_levels(panel, table["level"].tolist(), group)


# ---- coefficients ----------------------------------------------------------------------------------
@checked(models=models_by_name)
def coefficients(
    models: MixedModel | Mapping[str, MixedModel] | None = None,
    level: float = 0.95,
    intervals: Mapping[str, pd.DataFrame] | None = None,
    intercept: bool = True,
    ax: Any = None,
) -> Picture:
    """Intervals of the fixed effects, of several models or by several methods, side by side.

    Args:
        models: a fitted model, or name -> fitted model; their Wald intervals are drawn.
        level: of the Wald intervals.
        intervals: label -> table with two columns, lower and upper, indexed by coefficient (as `confint` gives
            them; a third column named "estimate" is used). With models, rows that are none of their fixed
            effects are left out, and of one model the estimates serve where the table has none.
        intercept: whether "(Intercept)" is drawn.
        ax: one matplotlib axes.

    Returns:
        Figure, and a row per interval from above: coefficient, label, estimate (NaN if not known), lower, upper.
    """
    fitted: dict[str, Any] = {"Wald": models} if is_model(models) else dict(cast("Any", models) or {})
    tables: dict[str, pd.DataFrame] = {}
    for label, model in fitted.items():
        table = model.confint(level=level).set_axis(["lower", "upper"], axis=1)
        tables[label] = table.assign(estimate=model.fixef)
    known = {name for table in tables.values() for name in table.index}
    only = next(iter(fitted.values())).fixef if len(fitted) == 1 else None
    for label, given in (intervals or {}).items():
        if label in tables:
            raise ValueError(f"two sets of intervals are labelled {label!r}")
        tables[label] = _interval_table(label, given, known, only)
    if not tables:
        raise ValueError("nothing to draw: give a fitted model, name -> model, or intervals")
    names = list(dict.fromkeys(n for t in tables.values() for n in t.index if intercept or n != "(Intercept)"))
    if not names:
        raise ValueError("nothing to draw: there is no coefficient but the intercept")
    count = len(tables)
    panel = panels(ax, 1, (6.0, float(np.clip(1.4 + (0.16 + 0.14 * count) * len(names), 2.4, 12.0))))[0]
    panel.axvline(0.0, color=REFERENCE, linewidth=0.8, linestyle="--")
    shift = (np.arange(count) - 0.5 * (count - 1)) * min(0.7 / count, 0.22)
    for i, (label, table) in enumerate(tables.items()):
        colour = COLOURS[i % len(COLOURS)]
        y = np.arange(len(names)) + shift[i]
        own = table.reindex(names).set_index(y)
        own = own[own["lower"].notna()]
        panel.hlines(own.index, own["lower"], own["upper"], color=colour, linewidth=1.5, label=label)
        panel.plot(own["estimate"], own.index, "os^Dv<"[i % 6], color=colour, markersize=4)
    panel.set_yticks(np.arange(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    if count > 1:
        panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    what = f"{100.0 * level:g} % interval" if not intervals else "interval"  # given ones may have another level
    name_axes(panel, f"estimate and {what}", "", "Fixed effects")
    rows = [t.loc[[n]].assign(coefficient=n, label=s) for n in names for s, t in tables.items() if n in t.index]
    data = pd.concat(rows, ignore_index=True)
    return panel.figure, data[["coefficient", "label", "estimate", "lower", "upper"]]


def _interval_table(label: str, given: pd.DataFrame, known: set[str], estimates: pd.Series | None) -> pd.DataFrame:
    bounds = [c for c in given.columns if c != "estimate"]
    if len(bounds) != 2:
        raise ValueError(f"intervals {label!r} must have two columns, lower and upper; it has {len(bounds)}")
    table = given[bounds].astype(float).set_axis(["lower", "upper"], axis=1)
    if "estimate" in given.columns:
        table["estimate"] = given["estimate"].astype(float)
    else:
        table["estimate"] = np.nan if estimates is None else estimates.reindex(table.index)
    if known:
        table = table[table.index.isin(known)]
        if table.empty:
            raise ValueError(f"intervals {label!r} has none of the models' fixed effects in its index")
    return table


# ---- calibration -----------------------------------------------------------------------------------
@checked()
def observed_fitted(model: MixedModel, bins: int = 10, level: float = 0.95, ax: Any = None) -> Picture:
    """Means of the response in bins of the fitted values, against the means fitted there.

    Args:
        model: fitted model.
        bins: of equal numbers of rows, as far as fitted values are distinct.
        level: of the intervals, fitted mean +- z standard deviations of a bin's mean under the model.
        ax: one matplotlib axes.

    Returns:
        Figure, and a row per bin: n (rows), weight (trials of the binomial), fitted, observed, lower, upper
        (what the model expects of `observed`; NaN for a family without variance function).
    """
    half = _normal_quantile(level)
    mu, _, variance, _ = model._moments
    y, weights = np.asarray(model._design.y), np.asarray(model._design.weights)
    edges = np.unique(np.quantile(mu, np.linspace(0.0, 1.0, bins + 1)[1:-1]))
    which = np.searchsorted(edges, mu, side="left")
    count = edges.size + 1
    n, weight = np.bincount(which, minlength=count), np.bincount(which, weights, count)
    fitted = np.bincount(which, weights * mu, count) / np.maximum(weight, np.finfo(float).tiny)
    observed = np.bincount(which, weights * y, count) / np.maximum(weight, np.finfo(float).tiny)
    spread = model.sigma * np.sqrt(np.bincount(which, weights * variance, count)) / np.maximum(weight, 1e-300)
    data = pd.DataFrame({"n": n, "weight": weight, "fitted": fitted, "observed": observed})
    data["lower"], data["upper"] = fitted - half * spread, fitted + half * spread
    data = data[data["n"] > 0].reset_index(drop=True)
    data[["lower", "upper"]] = data[["lower", "upper"]].clip(*model.family.support)
    panel = panels(ax, 1, (5.2, 4.4))[0]
    ends = [min(data["fitted"].min(), data["observed"].min()), max(data["fitted"].max(), data["observed"].max())]
    panel.plot(ends, ends, color=REFERENCE, linewidth=0.8, linestyle="--")
    panel.vlines(data["fitted"], data["lower"], data["upper"], color="#9db6cf", linewidth=3.0)
    panel.plot(data["fitted"], data["observed"], "o", color=LINE, markersize=4)
    for x, top, rows in zip(data["fitted"], data[["observed", "upper"]].max(axis=1), data["n"], strict=True):
        panel.annotate(
            f"{rows:,}", (x, top), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=7, color="0.35"
        )
    panel.margins(y=0.08)
    note = ""
    if _counts(model):  # a linear axis would crowd most bins near zero
        scale = (lambda v: np.sign(v) * np.sqrt(np.abs(v)), lambda v: np.sign(v) * np.square(v))
        panel.set_xscale("function", functions=scale)
        panel.set_yscale("function", functions=scale)
        note = " (square-root axis)"
    name_axes(panel, f"mean of fitted values{note}", f"mean of observations{note}", "Calibration, with rows per bin")
    return panel.figure, data


def _counts(model: MixedModel) -> bool:
    return bool(model.family.discrete) and not model.family.trials


@checked()
def rootogram(model: MixedModel, max_count: int | None = None, ax: Any = None) -> Picture:
    """Hanging rootogram of counts: bars of sqrt(observed) hang from the curve of sqrt(expected).

    Expected frequencies are sums over the rows of the Poisson or negative binomial probabilities at the fitted
    means. A bar that ends above zero is a count seen more rarely than expected, below zero more often.

    Args:
        model: a Poisson or negative binomial fit.
        max_count: largest count drawn; None takes the largest observed.
        ax: one matplotlib axes.

    Returns:
        Figure, and a row per count: count, observed, expected (frequencies).

    Raises:
        NotSupportedError: another family, or weighted counts.

    Source: Kleiber & Zeileis 2016, Am. Stat. 70(3).
    """
    if not _counts(model):
        also = "; observed_fitted() draws proportions" if model.family.trials else ""
        raise NotSupportedError(f"a rootogram is of Poisson or negative binomial counts, not {model.family}{also}")
    from .inference.summaries import distribution

    given = distribution(model)
    y = np.rint(np.asarray(model._design.y)).astype(int)
    top = int(y.max()) if max_count is None else max_count
    counts = np.arange(top + 1)
    expected = np.array([given.pmf(k).sum() for k in counts])
    observed = np.bincount(y[y <= top], minlength=top + 1)
    data = pd.DataFrame({"count": counts, "observed": observed, "expected": expected})
    panel = panels(ax, 1, (6.0, 4.0))[0]
    root = np.sqrt(expected)
    style = {"color": "#9db6cf", "edgecolor": POINT, "linewidth": 0.5 if top < 50 else 0.0, "width": 0.9}
    panel.use_sticky_edges = False
    panel.bar(counts, -np.sqrt(observed), bottom=root, label="observed, hanging", **style)
    panel.plot(counts, root, "-o", color=LINE, markersize=3 if top < 50 else 1.5, linewidth=1.2, label="expected")
    panel.axhline(0.0, color="0.3", linewidth=0.8)
    panel.legend(fontsize=8, frameon=False)
    name_axes(panel, model._data.response_name, "square root of frequency", "Hanging rootogram")
    return panel.figure, data
