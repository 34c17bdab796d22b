"""Predictions of a fitted model, their standard errors, and random effects of levels that came later.

With b~ the conditional modes, H the penalised observed information at them and eta = X beta + Z Lambda u, the
variance of a prediction error has two parts (Kass & Steffey 1989, J. Am. Stat. Assoc. 84; glmmTMB's `se.fit`):

    Z Lambda H^-1 Lambda'Z' sigma^2  +  D Cov D',      D = d eta / d(theta, beta, log phi), through u~ as well.

Where beta is found together with u (linear models, nAGQ = 0), Cov follows from that of theta by beta~(theta): it is
the inverse Hessian over all parameters again, because sigma is orthogonal to beta and does not move the modes. For
REML the same holds with beta integrated out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from .._errors import DataError, NotSupportedError, warn
from ..algebra.bordered import selected_inverse
from ..algebra.linalg import eliminate, factorise, penalised, solve
from ..compiling.entry import entry
from ..families import Family
from ..fit.glmm import layout_of
from ..fit.lmm import LinearProblem
from ..fit.problem import curvature
from ..formula.columns import Factor, Table, as_factor
from ..formula.matrix import MatrixSpec
from ..formula.model_data import ModelData
from ..formula.parse import Bar, leaves, parse
from ..formula.syntax import deparse
from ..formula.variables import given_column, response_of
from ..links import Link
from ..model.design import Design, design_arrays, factors
from ..model.parameters import Parameters
from ..objective.laplace import products_at
from ..objective.pirls import CONVERGED, MESSAGES, Blocked, conditional_mode, unspool

if TYPE_CHECKING:
    from ..results import MixedModel

#: The trapezoidal rule for the standard normal: its error falls like exp(-2 pi d / h), d the distance of the mean's
#: nearest singularity. With random effects of sd 8 it has 13 digits for a logit link, Gauss-Hermite's 100 points 3.
_Z = np.linspace(-9.0, 9.0, 401)
_W = np.exp(-0.5 * _Z**2) / np.exp(-0.5 * _Z**2).sum()
#: Numbers held at a time where rows are taken in chunks.
_CHUNK = 2**22


# ---- which terms -----------------------------------------------------------------------------------
def selection(model: MixedModel, re_form: str | None) -> dict[int, np.ndarray]:
    """Terms that `re_form` names -> which of their columns (k,); a column is named by any bar that has it."""
    data = model._data
    if re_form is None:
        return {i: np.ones(len(t.names), bool) for i, t in enumerate(data.terms)}
    if re_form in ("NA", "~0", "~ 0"):
        return {}
    chosen: dict[int, np.ndarray] = {}

    def choose(i: int, columns: Any) -> None:
        chosen.setdefault(i, np.zeros(len(data.terms[i].names), bool))[columns] = True

    for bar in parse(re_form if re_form.lstrip().startswith("~") else "~" + re_form).bars:
        match = [i for i, own in enumerate(data.formula_bars) if own == str(bar)]
        for i in match:
            choose(i, slice(None))
        if match:
            continue
        where = {
            name: (i, j)
            for i, t in reversed(list(enumerate(data.terms)))
            if t.group == bar.group_name
            for j, name in enumerate(t.names)
        }
        names = _column_names(data, bar)
        if names is None or not set(names) <= set(where):
            have = ", ".join(data.formula_bars)
            raise ValueError(f"re_form term {bar} is not in the model; it has {have}")
        for name in names:
            choose(*where[name])
    return {i: chosen[i] for i in sorted(chosen)}


def _column_names(data: ModelData, bar: Bar) -> tuple[str, ...] | None:
    """Names of a bar's columns with the codings of the fit; None if it has a variable that no term of the fit has."""
    known = {c.label: c for spec in data._bars for c in spec.matrix.coded.values()}
    labels = {i: deparse(bar.terms.variables[i]) for i in bar.terms.active}
    if not set(labels.values()) <= set(known):
        return None
    matrix = MatrixSpec.fit(bar.terms, {i: known[label] for i, label in labels.items()})
    if bar.whole is None:
        return matrix.names
    return tuple(name for name, part in zip(matrix.names, matrix.assign, strict=True) if part == bar.part)


# ---- rows ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """A random-effects term on the rows to predict: z (n, k), columns not wanted at 0; level (n,), -1 for a new one."""

    term: int
    z: np.ndarray
    level: np.ndarray


@dataclass(frozen=True)
class Rows:
    """What predictions are made from."""

    X: np.ndarray  # (n, p)
    offset: np.ndarray  # (n,)
    parts: tuple[Part, ...]
    others: tuple[Part, ...]  # terms (or columns of terms) that re_form leaves out, to be averaged over
    index: pd.Index


@dataclass(frozen=True)
class Later:
    """Levels that were not in the fit but have data of their own.

    Attributes:
        numbers: per term, label -> row of `effects`.
        effects: per term (m_new, k), original scale; terms without new levels have m_new = 0.
        design, params, u: the problem they were found from.
    """

    numbers: list[dict[str, int]]
    effects: list[np.ndarray]
    design: Design
    params: Parameters
    u: Blocked


def _rows(
    model: MixedModel,
    newdata: Any,
    chosen: dict[int, np.ndarray],
    average: bool,
    allow_new_levels: bool,
    offset: Any,
    later: Later | None,
) -> Rows:
    data = model._data
    left = {i: ~chosen.get(i, np.zeros(len(t.names), bool)) for i, t in enumerate(data.terms)} if average else {}
    left = {i: mask for i, mask in left.items() if mask.any()}
    if newdata is None:
        if offset is not None:
            raise DataError("offset= is for new data: the rows of the fit have theirs; give newdata as well")
        parts = [Part(i, np.where(mask, data.terms[i].z, 0.0), data.terms[i].level) for i, mask in chosen.items()]
        others = [Part(i, np.where(mask, data.terms[i].z, 0.0), data.terms[i].level) for i, mask in left.items()]
        X, extra = np.asarray(model._design.X), np.asarray(model._design.offset)
        return Rows(X, extra, tuple(parts), tuple(others), data.row_index)
    table = Table(newdata, "newdata")
    X, given_offset = data.matrix_for(table, offset)
    extra = np.zeros(table.n) if given_offset is None else given_offset
    used = sorted({*chosen, *left})
    new = dict(zip(used, replace(data, _bars=tuple(data._bars[i] for i in used)).terms_for(table), strict=True))
    parts, others = [], []
    for i, mask in left.items():
        others.append(Part(i, np.where(mask, new[i].z, 0.0), new[i].level))
    for i, mask in chosen.items():
        level, unknown = np.asarray(new[i].level), new[i].unknown
        if later is not None and later.numbers[i]:
            numbers = later.numbers[i]
            m = len(data.terms[i].levels)
            rows, labels = unknown_rows(data, i, table)
            level = level.copy()
            level[rows] = [m + numbers[v] if v in numbers else -1 for v in labels]
            unknown = tuple(v for v in unknown if v not in numbers)
        if len(unknown) and not allow_new_levels:
            shown = ", ".join(repr(str(v)) for v in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
            raise DataError(
                f"newdata has levels of {data.terms[i].group!r} that were not in the fit: {shown}; "
                "say allow_new_levels=True to predict them with random effects of 0"
            )
        parts.append(Part(i, np.where(mask, new[i].z, 0.0), level))
    return Rows(X, extra, tuple(parts), tuple(others), table.index)


def unknown_rows(data: ModelData, i: int, table: Table) -> tuple[np.ndarray, list[str]]:
    """Rows whose level of term i was not in the fit, and their labels."""
    codes, labels = data._bars[i].group.codes(data._evaluator(table))
    rows = np.flatnonzero(codes < 0)
    return rows, labels(rows)


def random_part(parts: Sequence[Part], effects: Sequence[np.ndarray], n: int) -> np.ndarray:
    """Sum of z'b, (n,), from b per term (m, k); 0 for levels of -1."""
    total = np.zeros(n)
    for part in parts:
        b = effects[part.term][np.maximum(part.level, 0)]
        total += np.einsum("nk,nk->n", part.z, np.where((part.level >= 0)[:, None], b, 0.0))
    return total


# ---- predictions -----------------------------------------------------------------------------------
@entry
def predict(
    model: MixedModel,
    newdata: Any = None,
    re_form: str | None = None,
    type: str = "link",
    allow_new_levels: bool = False,
    offset: Any = None,
    se: bool | str = False,
    level: float | None = None,
    given: Any = None,
    interval: str = "confidence",
) -> Any:
    """Predictions for the data of the fit or for new rows.

    Args:
        newdata: table with the model's columns (the response is not needed); None for the fit's rows. Columns
            that offset() or an offset by name use are looked up here; poly(), scale(), bs() are those of the fit.
        re_form: None uses all random effects, "NA" none, "~(1 | g)" those of the terms or columns named.
        type: "link"; "response" (conditional means, at the modes); or "marginal": means averaged over the random
            effects, over all of them unless re_form names some, which are then kept at their modes. The integral
            is exact for the log link, else numerical with an error below 1e-10 for standard deviations up to 8.
        allow_new_levels: predict unseen levels of a grouping factor with random effects 0.
        offset: (n_new,) in place of an offset array of the fit.
        se: True adds standard errors of the prediction as one of the unknown linear predictor (or mean): from
            the conditional variance of the random effects and the joint covariance of theta, beta and dispersions
            (glmmTMB's; observed information at the modes). "conditional" takes theta as known (lme4's definition).
            A new level adds the variance of its random effects.
        level: of intervals, such as 0.95; implies se=True.
        given: table with rows, responses included, of levels that were not in the fit: their random effects are
            found from these rows at the parameters of the fit. `newdata` then may have these levels. Standard
            errors need a single grouping factor.
        interval: of level: "confidence", of the linear predictor or mean; or "prediction", of a new observation of
            a linear model, whose residual variance it adds (with the weights of the fit's rows, for new rows 1).

    Returns:
        (n,) or (n_new,). With `se` or `level`, a DataFrame with fit, se (on the scale of fit, by the delta method
        where that is a mean), and with `level` lower and upper: normal on the link scale, transformed back.

    Raises:
        DataError: a column is missing, or new levels (named) without allow_new_levels; an offset array of the fit
            has no counterpart in newdata (give offset=).
    """
    if type not in ("link", "response", "marginal"):
        raise ValueError(f"predict type must be 'link' or 'response' or 'marginal', got {type!r}")
    if se not in (True, False, "conditional"):
        raise ValueError(f"se must be True, False or 'conditional', got {se!r}")
    if level is not None and not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, got {level!r}")
    _check_interval(model, interval, level, type)
    average = type == "marginal"
    chosen = {} if average and re_form is None else selection(model, re_form)
    if given is not None and newdata is None:
        raise ValueError("given= has the data of new levels: it needs newdata with rows to predict")
    plain = se is False and level is None
    later = None if given is None else new_effects(model, given)
    rows = _rows(model, newdata, chosen, average, allow_new_levels, offset, later)
    effects = model._b
    if later is not None:
        effects = [np.concatenate([b, new]) for b, new in zip(model._b, later.effects, strict=True)]
    n = rows.X.shape[0]
    eta = rows.offset + rows.X @ model._estimates.beta + random_part(rows.parts, effects, n)
    link = model.family.link
    if average:
        wide = spread(model, rows.others, n)
        fit, slope, bend = (np.asarray(a) for a in averages(eta, wide[0], link))
    elif type == "response":
        fit, slope = np.asarray(link.inverse(jnp.asarray(eta))), np.ones(n)
    else:
        fit, slope = eta, np.ones(n)
    beyond = int((np.isinf(fit) & np.isfinite(eta)).sum())
    if beyond:
        warn(
            f"{beyond} prediction{'s are' if beyond > 1 else ' is'} larger than any floating point number and "
            f"given as inf (linear predictors reach {np.abs(eta).max():.4g}); type='link' has them",
            UserWarning,
        )
    if plain:
        return np.asarray(fit)
    extra = bend[:, None] * wide[1] if average else None
    with np.errstate(invalid="ignore", over="ignore"):  # where a mean is beyond the largest number
        errors = np.sqrt(_variances(model, rows, later, se == "conditional", slope, extra))
    noise = np.zeros(n)
    if interval == "prediction":
        noise += model.sigma**2 / (np.asarray(model._design.weights) if newdata is None else 1.0)
    return _table(fit, eta, errors, noise, type, link, level, rows.index)


def _check_interval(model: MixedModel, interval: str, level: float | None, type: str) -> None:
    if interval == "confidence":
        return
    if interval != "prediction":
        raise ValueError(f"interval must be 'confidence' or 'prediction', got {interval!r}")
    if level is None:
        raise ValueError("interval='prediction' needs a level, such as level=0.95")
    if not model.is_linear or type == "marginal":
        what = "type='marginal'" if model.is_linear else "a generalised model"
        raise NotSupportedError(
            f"interval='prediction' is for new observations of a linear model, not for {what}; take quantiles of "
            "simulate() instead"
        )


def _table(
    fit: np.ndarray,
    eta: np.ndarray,
    errors: np.ndarray,
    noise: np.ndarray,
    type: str,
    link: Link,
    level: float | None,
    index: pd.Index,
) -> pd.DataFrame:
    """fit, se and the interval; `errors` on the scale of eta, for "marginal" on that of the mean.

    `noise` (n,) is a variance that the interval has in addition, on the scale of eta.
    """
    centre, half = jnp.asarray(eta), errors
    if type == "marginal":
        centre = link.eta_of(jnp.asarray(fit))
        half = np.where(np.isinf(errors), errors, errors / np.abs(np.asarray(link.mu_eta(centre))))
    elif type == "response":
        errors = np.where(np.isinf(errors), errors, errors * np.abs(np.asarray(link.mu_eta(centre))))
    out = {"fit": fit, "se": np.where(np.isinf(fit), np.inf, errors)}
    if level is not None:
        half = NormalDist().inv_cdf(0.5 + 0.5 * level) * np.sqrt(half**2 + noise)
        ends = [np.asarray(centre) - half, np.asarray(centre) + half]
        if type != "link":
            ends = [np.asarray(link.inverse(jnp.asarray(e))) for e in ends]
        out["lower"], out["upper"] = np.minimum(*ends), np.maximum(*ends)
    return pd.DataFrame(out, index=index)


@partial(jax.jit, static_argnames=("link",))
def averages(eta: Any, v: Any, link: Link) -> tuple[Array, Array, Array]:
    """E g^-1(eta + sqrt(v) Z), Z standard normal, and its derivatives in eta and v; each (n,)."""
    eta, v = jnp.asarray(eta), jnp.asarray(v)
    if link.name == "log":
        mean = jnp.exp(eta + 0.5 * v)
        return mean, mean, 0.5 * mean
    ones, root = jnp.ones_like(eta), jnp.sqrt(v)

    def slope(e: Array) -> Array:
        return jax.jvp(link.inverse, (e,), (ones,))[1]

    def add(total: tuple[Array, Array, Array], node: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], None]:
        z, w = node
        at = eta + root * z
        d1, d2 = jax.jvp(slope, (at,), (ones,))
        values = link.inverse(at), d1, 0.5 * d2  # d/dv is half the second derivative: no division by sqrt(v)
        return tuple(a + w * b for a, b in zip(total, values, strict=True)), None  # type: ignore[return-value]

    zero = jnp.zeros_like(eta)
    nodes = jnp.asarray(_Z, eta.dtype), jnp.asarray(_W, eta.dtype)
    out, _ = jax.lax.scan(add, (zero, zero, zero), nodes)
    return out


def spread(model: MixedModel, parts: Sequence[Part], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Variance z'TT'z sigma^2 of the random part, (n,), and its derivative in theta, (n, n_theta)."""
    design, sigma2 = model._design, model.sigma**2
    v, dv = np.zeros(n), np.zeros((n, design.n_theta))
    for part in parts:
        term = design.terms[part.term]
        half = part.z @ model._T[part.term]
        v += sigma2 * (half**2).sum(1)
        dT = np.asarray(jax.jacfwd(term.structure.factor)(jnp.asarray(model._estimates.theta[term.theta])))
        dv[:, term.theta] = 2.0 * sigma2 * np.einsum("nj,ni,ijt->nt", half, part.z, dT, optimize=True)
    return v, dv


# ---- standard errors -------------------------------------------------------------------------------
@partial(jax.jit, static_argnames=("family",))
def _sensitivities(params: Parameters, u: Blocked, design: Design, family: Family) -> Blocked:
    """Total derivative of the modes b in (theta, beta, log phi), (m, k, P) per block."""
    layout = layout_of(design, family)

    def modes(x: Array) -> Blocked:
        at = layout.parameters(x)
        return unspool(conditional_mode(at, design, u, family, False).u, factors(at.theta, design))

    x = layout.pack(jnp.asarray(params.theta), jnp.asarray(params.beta), jnp.log(jnp.asarray(params.phi)))
    out: Blocked = jax.jacfwd(modes)(x)
    return out


@partial(jax.jit, static_argnames=("family",))
def _profile_slope(params: Parameters, u: Blocked, design: Design, family: Family) -> Array:
    """d beta~ / d theta of the joint mode, (p, n_theta)."""

    def fixed(theta: Array) -> Array:
        return conditional_mode(params._replace(theta=theta), design, u, family, True).beta

    out: Array = jax.jacfwd(fixed)(jnp.asarray(params.theta))
    return out


@partial(jax.jit, static_argnames=("family",))
def _known_covariances(
    params: Parameters, u: Blocked, design: Design, family: Family
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """Lambda H^-1 Lambda' of every level (m, k, k), and of the pairs of levels of every coupling (P, k, k')."""
    blocks, T = products_at(params, u, design, family, "observed")
    H = penalised(blocks, T, design.plan)
    inverse = selected_inverse(eliminate(H, design.plan), H, design.plan)
    diagonal = tuple(jnp.einsum("ij,mjk,lk->mil", t, v, t) for t, v in zip(T, inverse.diagonal, strict=True))
    couplings = zip(design.plan.couplings, inverse.pairs, strict=True)
    return diagonal, tuple(jnp.einsum("ij,mjk,lk->mil", T[c.first], v, T[c.second]) for c, v in couplings)


@partial(jax.jit, static_argnames=("family",))
def _row_variances(
    params: Parameters, u: Blocked, design: Design, family: Family, rows: dict[int, tuple[Any, Any]]
) -> Array:
    """z'Lambda H^-1 Lambda'z for chunks of rows: `rows` has per term z (chunks, r, k) and levels (chunks, r)."""
    blocks, T = products_at(params, u, design, family, "observed")
    factor = factorise(blocks, T, design.plan)

    def chunk(rows: dict[int, tuple[Array, Array]]) -> Array:
        r = next(iter(rows.values()))[1].shape[0]
        right = [jnp.zeros((m, z.shape[1], r)) for m, z in zip(design.n_levels, design.z, strict=True)]
        for i, (z, level) in rows.items():
            term = design.terms[i]
            for k in range(z.shape[1]):
                right[term.block] = right[term.block].at[level, term.first + k, jnp.arange(r)].add(z[:, k])
        scaled = tuple(jnp.einsum("ij,mir->mjr", t, b) for t, b in zip(T, right, strict=True))
        solved = solve(factor, scaled, design.plan)
        return sum(((a * b).sum((0, 1)) for a, b in zip(scaled, solved, strict=True)), start=jnp.zeros(r))

    out: Array = jax.lax.map(chunk, rows)
    return out


def parameter_covariance(model: MixedModel, known_theta: bool = False) -> np.ndarray:
    """Covariance of (theta, beta, log phi) at the estimates, (P, P).

    Directions of theta that the data do not determine have variance 0, and those along which coefficients run off
    (`Separation.touches` tells).
    With `known_theta` only beta varies, given theta (lme4's definition).
    """
    design, estimates = model._design, model._estimates
    layout = layout_of(design, model.family)
    outside = model.nAGQ > 0 and not model.is_linear
    if outside and not known_theta:
        return estimates.covariance
    out = np.zeros((layout.size, layout.size))
    out[layout.at.beta, layout.at.beta] = model._fixed_covariance("rx")
    if known_theta:
        return out
    V = _theta_covariance(model)
    B = np.asarray(_profile_slope(*model._device, design, model.family))
    full = np.concatenate([np.eye(len(V)), B, np.zeros((layout.n_phi, len(V)))])
    return np.asarray(out + full @ V @ full.T)


def _theta_covariance(model: MixedModel) -> np.ndarray:
    """Twice the inverse Hessian of the profiled criterion in theta, (t, t)."""
    problem = model._problem
    if not isinstance(problem, LinearProblem):
        return model._estimates.covariance
    basis = problem.scaling.basis
    at = jnp.asarray(basis.inner(model._estimates.theta))
    shape = curvature(np.asarray(problem.exact_hessian(at, None, None)))
    root = basis.outer(shape.units[:, None] * shape.vectors)
    return np.asarray(2.0 * (root / np.where(shape.flat, np.inf, shape.values)) @ root.T)


def _variances(
    model: MixedModel,
    rows: Rows,
    later: Later | None,
    known_theta: bool,
    slope: np.ndarray,
    extra: np.ndarray | None,
) -> np.ndarray:
    """(n,) prediction variances: of slope * eta, and of what depends on theta with derivative `extra` (n, t)."""
    design, params, u = model._design, *model._device
    n, at_x = rows.X.shape[0], layout_of(design, model.family).at
    if later is not None and rows.parts and len({labels.group for labels in model._data.terms}) > 1:
        raise NotSupportedError(
            "standard errors with given= are for models with one grouping factor: with several the new levels share "
            "information with the old ones"
        )
    covariance = parameter_covariance(model, known_theta)
    size = covariance.shape[0]
    finite = np.isfinite(np.diag(covariance))
    covariance = np.where(finite[:, None] & finite, covariance, 0.0)

    tables: dict[int, np.ndarray] = {}
    if rows.parts:
        derivatives = [np.asarray(d) for d in _sensitivities(params, u, design, model.family)]
        if later is not None:
            more = _sensitivities(later.params, later.u, later.design, model.family)
            derivatives = [np.concatenate([derivatives[0], np.asarray(more[0])])]
        tables = {part.term: derivatives[design.terms[part.term].block] for part in rows.parts}
    variance = model.sigma**2 * _conditional(model, rows, later) * slope**2
    width = max([1, *(part.z.shape[1] for part in rows.parts)]) * size
    for start in range(0, n, max(1, _CHUNK // width)):
        at = slice(start, start + max(1, _CHUNK // width))
        D = np.zeros((rows.X[at].shape[0], size))
        D[:, at_x.beta] = rows.X[at]
        for part in rows.parts:
            level = part.level[at]
            moved = tables[part.term][np.maximum(level, 0)][:, design.terms[part.term].columns]
            moved = np.where((level >= 0)[:, None, None], moved, 0.0)
            D += np.einsum("nk,nkP->nP", part.z[at], moved)
        D *= slope[at][:, None]
        if extra is not None:
            D[:, at_x.theta] += extra[at]
        variance[at] += ((D @ covariance) * D).sum(1)
        variance[at][(D[:, ~finite] != 0.0).any(axis=1)] = np.inf
    separation = model._estimates.separation
    if separation is not None:
        variance[separation.touches(rows.X)] = np.inf
    return np.maximum(variance, 0.0)


def _conditional(model: MixedModel, rows: Rows, later: Later | None) -> np.ndarray:
    """(n,) variance of the random part given the parameters, relative to sigma^2; a new level has its prior's."""
    design, params, u, family = model._design, *model._device, model.family
    out = np.zeros(rows.X.shape[0])
    known = []
    for part in rows.parts:
        new = part.level < 0
        out[new] += ((part.z[new] @ model._T[part.term]) ** 2).sum(1)
        known.append(Part(part.term, np.where(new[:, None], 0.0, part.z), np.maximum(part.level, 0)))
    if not known:
        return out
    by_block: dict[int, list[Part]] = {}
    for part in known:
        by_block.setdefault(design.terms[part.term].block, []).append(part)
    z: dict[int, np.ndarray] = {}
    level: dict[int, np.ndarray] = {}
    for g, mine in by_block.items():
        level[g] = mine[0].level
        z[g] = np.zeros((out.size, design.z[g].shape[1]))
        for part in mine:
            z[g][:, design.terms[part.term].columns] += part.z
    # terms merged into one block may be on different factors, which agree in the fit but not here
    rest = np.any([part.level != p[0].level for p in by_block.values() for part in p], axis=0)
    diagonal, pairs = _known_covariances(params, u, design, family)
    own = {g: np.asarray(diagonal[g]) for g in z}
    if later is not None:
        more, _ = _known_covariances(later.params, later.u, later.design, family)
        own = {0: np.concatenate([own[0], np.asarray(more[0])])}
    known_part = np.zeros(out.size)
    for g in z:
        known_part += np.einsum("nk,nkl,nl->n", z[g], own[g][level[g]], z[g], optimize=True)
    for g in z:
        for h in z:
            if g < h:
                found, cross = _pair_covariances(design, pairs, g, h, level[g], level[h])
                rest |= ~found & z[g].any(axis=1) & z[h].any(axis=1)
                known_part += 2.0 * np.einsum("nk,nkl,nl->n", z[g], cross, z[h], optimize=True)
    out[~rest] += known_part[~rest]
    if rest.any():
        some = [Part(part.term, part.z[rest], part.level[rest]) for part in known]
        out[rest] += _by_solving(model, some)
    return out


def _pair_covariances(
    design: Design, pairs: Sequence[Array], g: int, h: int, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows have a pair of levels of blocks g < h that the elimination holds, and its covariance, else 0."""
    found = np.zeros(first.size, bool)
    cross = np.zeros((first.size, design.z[g].shape[1], design.z[h].shape[1]))
    for c, values in zip(design.plan.couplings, pairs, strict=True):
        if (c.first, c.second) != (g, h):
            continue
        keys = np.asarray(c.a).astype(np.int64) * design.n_levels[h] + np.asarray(c.b)
        order = np.argsort(keys)
        wanted = first.astype(np.int64) * design.n_levels[h] + second
        at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), keys.size - 1)]
        match = keys[at] == wanted
        cross[match] = np.asarray(values)[at[match]]
        found |= match
    return found, cross


def _by_solving(model: MixedModel, parts: Sequence[Part]) -> np.ndarray:
    """`_conditional` of rows whose pairs of levels never met in the fit: one system per row."""
    design, n = model._design, parts[0].level.size
    r = max(1, min(n, 256, _CHUNK // design.q))
    chunks = -(-n // r)
    padded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for part in parts:
        z, level = np.zeros((chunks * r, part.z.shape[1])), np.zeros(chunks * r, np.int32)
        z[:n], level[:n] = part.z, part.level
        padded[part.term] = z.reshape(chunks, r, -1), level.reshape(chunks, r)
    params, u = model._device
    return np.asarray(_row_variances(params, u, design, model.family, padded)).reshape(-1)[:n]


# ---- levels with data of their own -----------------------------------------------------------------
@partial(jax.jit, static_argnames=("family",))
def _find(params: Parameters, design: Design, family: Family) -> tuple[Blocked, Blocked, Array]:
    u0 = tuple(jnp.zeros((m, z.shape[1])) for m, z in zip(design.n_levels, design.z, strict=True))
    mode = conditional_mode(params, design, u0, family, False)
    return mode.u, unspool(mode.u, factors(params.theta, design)), mode.status


def new_effects(model: MixedModel, given: Any) -> Later:
    """Random effects of the levels of `given` that were not in the fit, from their rows, at the parameters of the fit.

    Levels of the fit keep their modes, also where they meet new ones.
    """
    data, design = model._data, model._design
    table = Table(given, "given")
    numbers: list[dict[str, int]] = []
    codes: list[np.ndarray] = []
    for i in range(len(data.terms)):
        evaluator = data._evaluator(table)
        if any((evaluator.group(leaf).codes < 0).any() for leaf in leaves(data._bars[i].group.node)):
            raise DataError(f"given has rows without a level of {data.terms[i].group!r}; remove them")
        rows, labels = unknown_rows(data, i, table)
        number = {label: j for j, label in enumerate(dict.fromkeys(labels))}
        code = np.full(table.n, -1)
        code[rows] = [number[v] for v in labels]
        numbers.append(number)
        codes.append(code)
    use = np.any([code >= 0 for code in codes], axis=0)
    if not use.any():
        raise DataError("given has no level that was not in the fit; it is for the rows of new levels")
    terms = data.terms_for(table)
    X, extra = data.matrix_for(table)
    y, weights = _given_response(model, table)
    known = [Part(i, new.z, np.asarray(new.level)) for i, new in enumerate(terms)]
    offset = (0.0 if extra is None else extra) + random_part(known, model._b, table.n)
    for what, values in {"the response": y, "the weights": weights, "the predictors": X, "the offset": offset}.items():
        bad = use & ~np.isfinite(values if values.ndim == 1 else values.sum(1))
        if bad.any():
            where = table.index[int(np.flatnonzero(bad)[0])]
            raise DataError(f"given has missing or infinite values in {what} (first in row {where}); remove those rows")
    use &= weights > 0.0
    arrays, active = [], []
    for i, (new, code) in enumerate(zip(terms, codes, strict=True)):
        if not numbers[i]:
            continue
        z = np.where((code >= 0)[:, None], new.z, 0.0)
        arrays.append((z[use], np.maximum(code, 0)[use], design.terms[i].structure))
        active.append(i)
    for i in active:
        if not np.isin(np.arange(len(numbers[i])), codes[i][use]).all():
            raise DataError(f"given has levels of {data.terms[i].group!r} with no row of positive weight; remove them")
    model.family.check_response(y[use], weights[use], data.response_name, table.index[use])
    made = design_arrays(y[use], X[use], arrays, weights=weights[use], offset=offset[use])
    theta = np.concatenate([model._estimates.theta[design.terms[i].theta] for i in active])
    params = Parameters(theta, model._estimates.beta, model._estimates.phi)
    u, b, status = _find(params, made, model.family)
    if int(status) != CONVERGED:
        raise DataError(f"the random effects of the new levels were not found: {MESSAGES[int(status)]}")
    effects = [np.zeros((0, len(t.names))) for t in data.terms]
    for i, term in zip(active, made.terms, strict=True):
        effects[i] = np.asarray(b[term.block])[: len(numbers[i]), term.columns]
    return Later(numbers, effects, made, params, tuple(np.asarray(x) for x in u))


def _given_response(model: MixedModel, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Response on the scale of the design's y and weights (trials included), (n,) each; rows without trials weigh 0."""
    data, node = model._data, model._data.formula.response
    assert node is not None
    evaluator = data._evaluator(table)
    response = response_of(evaluator, node)
    weights = np.ones(table.n)
    argument = model._spec.arguments["weights"]
    if isinstance(argument, str):
        weights = np.array(given_column(argument, "weights", evaluator)[0])
    elif argument is not None:
        raise DataError(
            "the model was fitted with a weights array, so the rows of given have none; fit it with weights= naming a "
            "column, and have that column in given"
        )
    if response.other is not None:
        trials = response.y + response.other
        return np.divide(response.y, trials, out=np.zeros(table.n), where=trials != 0), weights * trials
    y = response.y
    if data.response_levels is not None:
        y = as_factor(y)
        codes = np.array([data.response_levels.index(v) if v in data.response_levels else -2 for v in y.levels] + [-1])
        found = codes[y.codes]
        if (found == -2).any():
            fail = y.levels[int(y.codes[np.flatnonzero(found == -2)[0]])]
            raise DataError(f"the response {data.response_name} has the level '{fail}', which was not in the fit")
        return np.where(found < 0, np.nan, found), weights
    if isinstance(y, Factor):
        raise DataError(f"the response {data.response_name} was numeric in the fit but is a factor in given")
    return np.asarray(y, float), weights
