"""Estimated marginal means: predictions on a grid of the factors, averaged with equal weights, and their differences.

Sources: Searle, Speed & Milliken 1980, The American Statistician 34(4) (population marginal means); Lenth 2016, J.
Stat. Softw. 69(1) (reference grids); Tukey's method for all pairwise differences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import DataError, NotSupportedError
from ..compiling.entry import entry
from ..formula.syntax import Call, Name, Node, base_name, names_in, strip_parens, walk
from ..many.multiple import adjusted
from ..report.table import Block, Shown, of_frame

if TYPE_CHECKING:
    from ..results import MixedModel

#: Functions whose values are levels for a column of numbers.
TO_FACTOR = ("factor", "as.factor", "ordered", "as.ordered", "as.character")
ADJUSTMENTS = ("tukey", "holm", "bonferroni", "none")


@checked()
@dataclass(frozen=True, repr=False)
class MarginalMeans(Shown):
    """Means by level, as returned by `MixedModel.marginal_means`.

    Attributes:
        by: the variables whose levels the rows are. type: "link" or "response".
        frame: the levels, then estimate, std_error, df, conf_low, conf_high.
        grid: the reference grid they were averaged over.
        L: (r, p) the means as contrasts of the fixed effects.
    """

    by: tuple[str, ...]
    type: str
    frame: pd.DataFrame
    grid: pd.DataFrame
    L: np.ndarray
    _model: MixedModel
    _shift: np.ndarray
    _ddf: str | None

    def pairs(self, adjust: str = "tukey") -> pd.DataFrame:
        """All differences of the means on the link scale, with p-values adjusted for their number.

        Args:
            adjust: "tukey", "holm", "bonferroni" or "none".
        """
        if adjust not in ADJUSTMENTS:
            raise ValueError(f"adjust must be one of {', '.join(map(repr, ADJUSTMENTS))}, got {adjust!r}")
        labels = [" ".join(str(v) for v in row) for row in self.frame[list(self.by)].to_numpy()]
        both = list(combinations(range(len(labels)), 2))
        if not both:
            raise ValueError("one mean has no differences")
        L = np.stack([self.L[i] - self.L[j] for i, j in both])
        shift = np.array([self._shift[i] - self._shift[j] for i, j in both])
        estimate, error, df = _estimates(self._model, L, shift, self._ddf)
        ratio = estimate / error
        p = _p_values(ratio, df, len(labels), adjust)
        names = [f"{labels[i]} - {labels[j]}" for i, j in both]
        columns = {"estimate": estimate, "std_error": error, "df": df, "statistic": ratio, "p_value": p}
        return pd.DataFrame(columns, index=pd.Index(names, name="difference"))

    def _report(self, page: bool) -> Sequence[Block]:
        scale = f"{self.type} scale" if not self._model.is_linear else "scale of the response"
        title = f"Marginal means by {', '.join(self.by)} ({scale}), averaged over {len(self.grid)} points of the grid"
        return [title, of_frame(self.frame, ".5g", index=False)]


@entry
def marginal_means(
    model: MixedModel,
    by: str | Sequence[str],
    at: Mapping[str, Any] | None = None,
    type: str = "link",
    level: float = 0.95,
    ddf: str | None = None,
) -> MarginalMeans:
    """Means of the linear predictor by levels of variables, averaged over the other factors (emmeans).

    Args:
        by: variables of the fixed effects.
        at: values for variables instead of all levels of a factor or the mean of a number.
        type: "response" transforms the means and their intervals back.
        level: of the intervals. ddf: degrees of freedom of linear models, as in `coefficients`.

    Returns:
        `MarginalMeans`: `frame`, and `pairs(adjust)` for all differences.
    """
    if type not in ("link", "response"):
        raise ValueError(f"type must be 'link' or 'response', got {type!r}")
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    names = [by] if isinstance(by, str) else list(by)
    values = _values(model, dict(at or {}))
    if not values:
        raise ValueError("marginal_means needs variables among the fixed effects, and the model has none there")
    for name in names:
        if name not in values:
            raise ValueError(f"{name!r} is not a variable of the fixed effects; these are: {', '.join(values)}")
    grid = pd.DataFrame(list(product(*values.values())), columns=list(values))
    try:
        X, offset = model._data.matrix_for(grid, _no_offset(model, len(grid)))
    except DataError as refused:  # at the mean of a number that a function makes a factor of
        raise DataError(f"{refused}: give the values to average over by at={{...}}") from None
    shift = np.zeros(len(grid)) if offset is None else np.asarray(offset)
    groups = grid.groupby(names, sort=False, observed=True).indices
    keys = list(groups)
    L = np.stack([X[groups[k]].mean(axis=0) for k in keys])
    moved = np.array([shift[groups[k]].mean() for k in keys])
    estimate, error, df = _estimates(model, L, moved, ddf)
    half = _quantile(df, 0.5 + 0.5 * level) * error
    low, high = estimate - half, estimate + half
    if type == "response":
        link = model.family.link
        estimate_mu, low, high = (np.asarray(link.inverse(jnp.asarray(v))) for v in (estimate, low, high))
        error = np.where(np.isinf(error), error, error * np.abs(np.asarray(link.mu_eta(jnp.asarray(estimate)))))
        estimate, low, high = estimate_mu, np.minimum(low, high), np.maximum(low, high)
    frame = pd.DataFrame([k if isinstance(k, tuple) else (k,) for k in keys], columns=names)
    frame = frame.assign(estimate=estimate, std_error=error, df=df, conf_low=low, conf_high=high)
    return MarginalMeans(tuple(names), type, frame, grid, L, model, moved, ddf)


def _no_offset(model: MixedModel, n: int) -> np.ndarray | None:
    """The mean of an offset argument, for all points of the grid; offset() terms are evaluated there."""
    if model._spec.arguments.get("offset") is None:
        return None
    return np.full(n, float(np.mean(model._design.offset)))


def _values(model: MixedModel, at: dict[str, Any]) -> dict[str, list[Any]]:
    """Values on the grid of each column that the fixed effects or offsets use: levels, or the mean of numbers."""
    data = model._data
    nodes = [*data._fixed.terms.variables, *data.formula.offsets]
    factors = {name for node in nodes for name in _made_factors(node)}
    table = model._spec.arguments["data"]
    out: dict[str, list[Any]] = {}
    for node in nodes:
        for name in names_in(node):
            if name in out:
                continue
            try:
                column = pd.Series(np.asarray(table[name]))
                dtype = getattr(table[name], "dtype", None)
            except (KeyError, IndexError, ValueError, TypeError):
                raise DataError(f"column {name!r} is not in the data of the fit any more; fit again") from None
            rows = column[data.keep]
            if name in at:
                out[name] = list(np.atleast_1d(np.asarray(at[name], dtype=object)))
            elif isinstance(dtype, pd.CategoricalDtype):
                present = set(rows)
                out[name] = [v for v in dtype.categories if v in present]
            elif name in factors:
                out[name] = sorted(set(rows))
            elif pd.api.types.is_numeric_dtype(rows.infer_objects()) and not pd.api.types.is_bool_dtype(rows):
                out[name] = [float(pd.to_numeric(rows).mean())]
            else:
                out[name] = sorted(set(rows))
    unknown = [name for name in at if name not in out]
    if unknown:
        raise ValueError(f"at names {unknown[0]!r}, which is not a variable of the fixed effects: {', '.join(out)}")
    return out


def _made_factors(node: Node) -> set[str]:
    """Columns that an expression makes factors of, as ``factor(year)`` does."""
    calls = (part for part in walk(node) if isinstance(part, Call) and base_name(part.func) in TO_FACTOR)
    inner = (strip_parens(arg) for call in calls for label, arg in call.args if label in (None, "", "x"))
    return {arg.name for arg in inner if isinstance(arg, Name)}


def _estimates(
    model: MixedModel, L: np.ndarray, shift: np.ndarray, ddf: str | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates, standard errors and degrees of freedom (inf without `ddf`) of rows of L."""
    if ddf is not None:
        from .ddf import contrast_test

        if not model.is_linear:
            raise NotSupportedError("ddf is for linear mixed models; a generalised one has normal intervals")
        tests = [contrast_test(model, row, ddf) for row in L]
        error = np.array([t.std_error for t in tests])
        return L @ model.beta + shift, error, np.array([t.den_df for t in tests])
    return L @ model.beta + shift, np.sqrt(model._variances_of(L)), np.full(len(L), np.inf)


def _quantile(df: np.ndarray, p: float) -> np.ndarray:
    from scipy.stats import norm, t

    return np.where(np.isfinite(df), t.ppf(p, np.where(np.isfinite(df), df, 1.0)), norm.ppf(p))


def _p_values(ratio: np.ndarray, df: np.ndarray, means: int, adjust: str) -> np.ndarray:
    from scipy.stats import norm, studentized_range, t

    size = np.abs(ratio)
    if adjust == "tukey":
        large = np.where(np.isfinite(df), df, 1e6)  # the normal limit
        return np.asarray(np.clip(studentized_range.sf(np.sqrt(2.0) * size, means, large), 0.0, 1.0))
    finite = np.isfinite(df)
    p = np.where(finite, 2.0 * t.sf(size, np.where(finite, df, 1.0)), 2.0 * norm.sf(size))
    return adjusted(p, adjust)


@entry
def marginal_coefficients(model: MixedModel) -> pd.DataFrame:
    """Population-averaged fixed effects: the marginal mean response, on the link scale, regressed on X.

    Returns:
        estimate, std_error (delta method, theta's uncertainty included), statistic, and the "conditional" ones.

    Source: Hedeker, du Toit, Demirtas & Gibbons 2018, Biometrics 74 (GLMMadaptive's marginal_coefs).
    """
    from .predict import Part, averages, spread

    design = model._design
    X, offset, n = np.asarray(design.X), np.asarray(design.offset), design.n
    eta = X @ model.beta + offset
    link = model.family.link
    parts = [Part(i, t.z, t.level) for i, t in enumerate(model._data.terms)]
    v, dv = spread(model, parts, n)
    mean, in_eta, in_v = (np.asarray(a) for a in averages(eta, v, link))
    target = np.asarray(link.eta_of(jnp.asarray(mean)))
    slope = 1.0 / np.asarray(link.mu_eta(jnp.asarray(target)))
    separation = model._estimates.separation
    if separation is None:
        onto = np.linalg.pinv(X)
        beta = onto @ (target - offset)
    else:  # of the rows that are not separated; what runs off does here, too
        rest, basis = ~separation.rows, separation.basis
        onto = np.zeros(X.T.shape)
        onto[:, rest] = basis @ np.linalg.pinv(X[rest] @ basis)
        target = np.where(rest, target, offset)
        slope = np.where(rest, slope, 0.0)
        beta = np.where(separation.columns, model.beta, onto @ (target - offset))
    known = slice(model._layout.at.beta.stop)
    joint = model._joint_covariance[known, known]
    J = onto @ np.concatenate([(slope * in_v)[:, None] * dv, (slope * in_eta)[:, None] * X], axis=1)
    error = np.sqrt(np.einsum("ij,jk,ik->i", J, joint, J))
    if separation is not None:
        error[separation.columns] = np.inf
    columns = {"estimate": beta, "std_error": error, "statistic": beta / error, "conditional": model.beta}
    return pd.DataFrame(columns, index=list(model._data.x_names))
