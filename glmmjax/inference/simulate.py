"""Responses drawn from a fitted model, or from a formula and parameters; simulated responses made ready to refit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import DataError, NotSupportedError
from ..compiling.entry import entry
from ..families import Family
from ..families import get as get_family
from ..fit.control import unknown_argument
from ..formula.columns import Table, label_of, plain
from ..formula.frame import build
from ..formula.model_data import ModelData
from ..formula.parse import parse
from ..formula.syntax import Call, base_name, names_in
from ..formula.variables import response_of
from ..model.covariance import by_term, structure_of
from .predict import Part, random_part, selection

if TYPE_CHECKING:
    from ..formula.parse import Formula
    from ..results import MixedModel


class _Random(NamedTuple):
    """A term to draw: z (n, k), level (n,), number of levels, factor (k, k) of its covariance."""

    z: np.ndarray
    level: np.ndarray
    m: int
    T: np.ndarray


@entry
def _draw(
    family: Family,
    fixed: np.ndarray,
    terms: Sequence[_Random],
    weights: np.ndarray,
    phi: np.ndarray,
    sigma: float,
    nsim: int,
    seed: Any,
) -> np.ndarray:
    """(n, nsim) responses: random effects first, term by term, then the rows."""
    if isinstance(nsim, bool) or not isinstance(nsim, (int, np.integer)) or nsim < 1:
        raise ValueError(f"nsim must be a positive integer, got {nsim!r}")
    rng = np.random.default_rng(seed)
    eta = np.repeat(fixed[:, None], nsim, axis=1)
    for z, level, m, T in terms:
        b = np.einsum("mks,jk->mjs", rng.standard_normal((m, T.shape[0], nsim)), T)
        for k in range(z.shape[1]):
            eta += z[:, k, None] * b[level, k]
    try:
        return family.simulate(rng, eta, weights, phi, sigma)
    except NotImplementedError as error:
        raise NotSupportedError(f"simulate: {error}") from None


def _frame_of(values: np.ndarray, index: pd.Index) -> pd.DataFrame:
    return pd.DataFrame(values, index=index, columns=[f"sim_{j + 1}" for j in range(values.shape[1])])


# ---- from a fit ------------------------------------------------------------------------------------
def simulate_model(
    model: MixedModel,
    nsim: int = 1,
    seed: Any = 0,
    re_form: str | None = None,
    use_u: bool = False,
    labels: bool = False,
) -> pd.DataFrame:
    """New responses drawn from the fitted model, for the rows of the fit.

    Args:
        nsim: number of responses.
        seed: integer, or a NumPy generator, which is advanced. Equal seeds give equal draws.
        re_form: None and "NA" draw all random effects anew (lme4's default); "~(1 | g)" conditions on the modes
            of the terms named and draws the others.
        use_u: condition on the modes of all terms.
        labels: for a response that was a factor, its labels instead of 0 and 1.

    Returns:
        DataFrame (n, nsim), columns sim_1, sim_2, ..., in the units of the response. Binomial responses are
        numbers of successes, as integers: 0 or 1 for binary data, at most the trials for cbind() and for
        proportions. `refit` takes every column as it is.

    Raises:
        NotSupportedError: a custom family without sampler; prior weights that are not trials or precisions.
    """
    data, design = model._data, model._design
    if use_u and re_form is not None:
        raise ValueError("use_u=True conditions on all random effects; leave re_form out, or name the terms there")
    if labels and data.response_levels is None:
        raise ValueError(f"labels=True is for a response that was a factor; {data.response_name} was not")
    chosen = selection(model, None if use_u else re_form or "NA")
    for i, mask in chosen.items():
        if not mask.all():
            raise ValueError(
                f"re_form names some columns of the term {data.formula_bars[i]}: name all of it, so that its other "
                "columns need not be drawn given these"
            )
    kept = [Part(i, data.terms[i].z, data.terms[i].level) for i in chosen]
    fixed = design.offset + np.asarray(design.X) @ model._estimates.beta + random_part(kept, model._b, design.n)
    drawn = [
        _Random(t.z, t.level, len(t.levels), model.sigma * model._T[i])
        for i, t in enumerate(data.terms)
        if i not in chosen
    ]
    weights, phi = np.asarray(design.weights), model._estimates.phi
    out = _frame_of(_draw(model.family, fixed, drawn, weights, phi, model.sigma, nsim, seed), data.row_index)
    if not labels:
        return out
    assert data.response_levels is not None
    names = np.array(data.response_levels, dtype=object)
    return pd.DataFrame({c: pd.Categorical(names[out[c].to_numpy()], list(names)) for c in out}, index=out.index)


def as_response(model: MixedModel, newresp: Any) -> np.ndarray:
    """A new response on the scale of the design's y; the rule of `MixedModel.refit`."""
    data, design = model._data, model._design
    values = plain(data.on_rows(newresp, "the new response"), "the new response")
    binomial = bool(model.family.trials) or data.response_kind == "cbind"
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape != (data.nobs,) and not (binomial and values.shape == (data.nobs, 2)):
        two = f" or of successes and failures, ({data.nobs}, 2)" if binomial else ""
        found = f"{values.size} values" if values.ndim == 1 else f"shape {values.shape}"
        raise DataError(
            f"the new response has {found}, the fit has {data.nobs} rows: give one column, ({data.nobs},){two}"
        )
    if data.response_levels is None or not binomial:
        values = _as_numbers(values)
    if not binomial:
        return values
    trials = np.asarray(design.weights)
    if values.ndim == 2:
        successes, failures = np.asarray(values, float).T
        if not np.allclose(successes + failures, trials, rtol=1e-9, atol=0.0):
            raise DataError(
                "successes and failures do not add up to the fit's trials; refit keeps these (update(data=...) "
                "changes them)"
            )
        return np.asarray(successes / trials)
    if data.response_levels is not None and values.dtype.kind in "OUST":
        codes: dict[str | None, float] = {label: float(j) for j, label in enumerate(data.response_levels)}
        names = [None if gone else str(label_of(v)) for v, gone in zip(values, pd.isna(values), strict=True)]
        unknown = [name for name in names if name is not None and name not in codes]
        if not unknown:
            return np.array([codes.get(name, np.nan) for name in names])
        try:  # numbers held as objects
            return values.astype(float)
        except (TypeError, ValueError):
            raise DataError(
                f"the new response has the value {unknown[0]!r}; the response {data.response_name} of the fit has the "
                f"levels {', '.join(repr(v) for v in data.response_levels)}"
            ) from None
    if values.dtype.kind in "iu":
        if (values > trials + 1e-9).any():
            at = int(np.flatnonzero(values > trials + 1e-9)[0])
            raise DataError(
                f"the new response has {values[at]} successes in {trials[at]:g} trials (row {data.row_index[at]}): "
                "integers are numbers of successes, floats are proportions"
            )
        return np.asarray(values / trials)
    if values.dtype.kind == "f" and (values > 1.0).any():
        at = int(np.flatnonzero(values > 1.0)[0])
        raise DataError(
            f"the new response has {values[at]:g} (row {data.row_index[at]}), outside [0, 1]: floats are proportions, "
            "numbers of successes are integers; use astype(int) if it has these"
        )
    return values


def _as_numbers(values: np.ndarray) -> np.ndarray:
    """Integers or floats from what may be held as objects or booleans; a missing value is NaN."""
    if values.dtype.kind == "O":
        flat = pd.Series(values.reshape(-1)).infer_objects()
        if flat.dtype == object:
            gone = flat.isna()
            there = flat[~gone].infer_objects()
            flat = there.astype(float).reindex(flat.index) if there.dtype.kind in "iufb" else flat
        values = flat.to_numpy().reshape(values.shape)
    if values.dtype.kind not in "iufb":
        odd = next((v for v in values.reshape(-1).tolist() if isinstance(v, str)), values.reshape(-1)[0])
        raise DataError(
            f"the new response is not numeric: it has {odd!r}; give numbers, in units of the fit's response"
        )
    return values.astype(np.int64) if values.dtype.kind == "b" else values


# ---- from a formula --------------------------------------------------------------------------------
@checked("params")
def simulate(
    formula: str | Formula,
    newdata: Any,
    params: Mapping[str, Any],
    family: str | Family = "gaussian",
    nsim: int = 1,
    seed: Any = 0,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, Any] | None = None,
) -> pd.DataFrame:
    """Draw responses of a model that was never fitted.

    Args:
        formula: as `glmmjax.glmer`; the response may be left out, and need not be in `newdata`.
        newdata: table with the variables of the right-hand side; missing values are an error.
        params: "beta" (p,) fixed effects on the link scale; "theta" (n_theta,) relative covariance parameters in
            lme4's order; "sigma" residual standard deviation of the gaussian family (default 1), to which theta is
            relative; "phi" (n_phi,) dispersions of families that have any. Vectors, or dicts and Series by name.
        family: as `glmmjax.glmer`, "gaussian" included.
        nsim: number of responses. seed: integer, or a NumPy generator, which is advanced.
        weights: trials of the binomial (default 1, or the row totals of a cbind() response that newdata has), or
            precision weights of the gaussian family: column name, array or Series.
        offset, contrasts: as `glmmjax.glmer`.

    Returns:
        DataFrame (n, nsim), columns sim_1, sim_2, ...; binomial responses are numbers of successes.

    Raises:
        ValueError: missing or wrongly sized parameters, with the names that the model has. DataError: bad data.
        NotSupportedError: the family has no sampler.
    """
    family = get_family(family)
    table = Table(newdata, "newdata")
    parsed = parse(formula).resolve(table.columns)
    response = parsed.response
    frame = build(
        replace(parsed, response=None),
        newdata,
        weights=weights,
        offset=offset,
        contrasts=contrasts,
        na="error",
        require_response=False,
    )
    n = frame.nobs
    w = np.ones(n) if frame.weights is None else frame.weights
    if isinstance(response, Call) and base_name(response.func) == "cbind" and family.trials:
        if all(name in table for name in names_in(response)):
            parts = response_of(frame._evaluator(table), response)
            assert parts.other is not None
            w = w * (parts.y + parts.other)[frame.keep]
        elif weights is None:
            raise DataError("the columns of cbind() are not in newdata: give the numbers of trials by weights=")
    values = _parameters(params, frame, family)
    structures = [structure_of(t.label) for t in frame.terms]
    terms = []
    for t, structure, theta in zip(frame.terms, structures, by_term(values["theta"], structures), strict=True):
        terms.append(_Random(t.z, t.level, len(t.levels), values["sigma"][0] * structure.host_factor(theta)))
    fixed = frame.X @ values["beta"] + (0.0 if frame.offset is None else frame.offset)
    sigma = float(values["sigma"][0])
    return _frame_of(_draw(family, fixed, terms, w, values["phi"], sigma, nsim, seed), frame.row_index)


@checked()
def parameter_template(
    formula: str | Formula, newdata: Any, family: str | Family = "gaussian", contrasts: dict[str, Any] | None = None
) -> dict[str, pd.Series]:
    """The parameters that `simulate` needs, by name: beta of 0, identity factors theta, sigma and phi of 1.

    Args:
        formula, newdata, family, contrasts: as `simulate`.
    """
    family = get_family(family)
    bare = replace(parse(formula).resolve(Table(newdata, "newdata").columns), response=None)
    frame = build(bare, newdata, contrasts=contrasts, na="error", require_response=False)
    names = _names(frame, family)
    start = {"beta": np.zeros(len(names["beta"]))}
    start["theta"] = np.concatenate([structure_of(t.label).start() for t in frame.terms])
    return {key: pd.Series(start.get(key, np.ones(len(own))), own) for key, own in names.items()}


def _names(frame: ModelData, family: Family) -> dict[str, list[str]]:
    """Names of the parameters of each kind."""
    theta_names: list[str] = []
    for t in frame.terms:
        theta_names += structure_of(t.label).theta_names(t.group, t.names)
    needed = {"beta": list(frame.x_names), "theta": theta_names}
    if family.linear:
        needed["sigma"] = ["sigma"]
    if family.phi_names:
        needed["phi"] = list(family.phi_names)
    return needed


def _parameters(params: Mapping[str, Any], frame: ModelData, family: Family) -> dict[str, np.ndarray]:
    """Every parameter as a vector of the size that the model needs."""
    needed = _names(frame, family)
    if not isinstance(params, Mapping):
        raise TypeError(f"params must be a dict with {', '.join(needed)}, not {type(params).__name__}")
    for name in params:
        if name not in needed:
            raise unknown_argument(str(name), list(needed), "params")
    out = {"sigma": np.ones(1), "phi": np.zeros(0)}
    for key, names in needed.items():
        listed, count = ", ".join(names), f"{len(names)} value{'' if len(names) == 1 else 's'}"
        if key not in params:
            if key == "sigma":
                continue
            raise ValueError(f"params has no {key!r}: the model needs {count}: {listed}")
        given = params[key]
        if isinstance(given, (Mapping, pd.Series)) and key != "sigma":
            by_name = {str(k): v for k, v in given.items()}
            if set(by_name) != set(names) or len(by_name) != len(given):
                raise ValueError(f"params[{key!r}] has the names {', '.join(by_name)}; the model needs {listed}")
            given = [by_name[name] for name in names]
        value = np.asarray(given, float).reshape(-1)
        if value.size != len(names):
            raise ValueError(
                f"params[{key!r}] has {value.size} value{'' if value.size == 1 else 's'}, the model needs {count}: "
                f"{listed}"
            )
        limit = np.isinf(value) & (key == "phi" and bool(family.limit))
        if not (np.isfinite(value) | limit).all() or (key in ("sigma", "phi") and (value <= 0.0).any()):
            raise ValueError(f"params[{key!r}] must be finite{' and positive' if key in ('sigma', 'phi') else ''}")
        out[key] = value
    return out
