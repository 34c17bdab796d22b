"""`glmer`: from a formula and a table to a fitted model; `design`, the same without the fit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import checked
from ._steps import ModelSetup, fit, fit_problem, new_response, updated
from .compiling.entry import entry
from .families import Family
from .families import get as get_family
from .fit.control import Control, as_control, unknown_argument
from .formula.frame import build
from .formula.model_data import ModelData
from .model.design import Design
from .model.frames import check_response, frame_design, make_design, rank_message, split_message
from .objective.laplace import resolve_hessian
from .objective.quadrature import check_nodes
from .results import Entry, MixedModel, ModelSpec

if TYPE_CHECKING:
    from .formula.parse import Formula


@checked()
def glmer(
    formula: str | Formula,
    data: Any,
    family: str | Family = "binomial",
    nAGQ: int = 1,
    weights: Any = None,
    offset: Any = None,
    hessian: str | None = None,
    start: dict[str, Any] | None = None,
    control: Control | dict[str, Any] | None = None,
    contrasts: dict[str, Any] | None = None,
    subset: Any = None,
    na: str = "drop",
    verbose: Any = False,
    device: Any = None,
    **unknown: Any,
) -> MixedModel:
    """Fit a generalised linear mixed model by maximum likelihood.

    Args:
        formula: R's, with lme4's bars: ``"cbind(s, f) ~ x + (1 | g)"``, ``"y ~ x + (x | a) + (1 | b/c)"``.
        data: pandas DataFrame, anything with ``to_pandas()``, dict of arrays, or structured array.
        family: as R writes it ("binomial", "binomial(probit)", "poisson(sqrt)", "negative.binomial(2)",
            "nbinom2") or an object from `glmmjax.families`.
        nAGQ: 1 for the Laplace approximation; 0 finds beta inside PIRLS (faster, rougher); k from 2 to 100
            for adaptive Gauss-Hermite quadrature with k points per random effect, for models with one
            grouping factor and up to 4 random effects d per level, k^d at most 100,000.
        weights: column name, array or Series; trials for binomial proportions, else prior weights that
            multiply the log density. Rows of weight 0 are dropped. A pandas object here, in `offset` and in `subset`
            goes by its index, everything else by position.
        offset: column name, array or Series, added to the linear predictor (and to ``offset()`` terms).
        hessian: "expected" (lme4's Laplace), "observed" (glmmTMB's), or None for the family's default.
        start: any of "theta" (n_theta,), "beta" or "fixef" (p,), "phi" (n_phi,).
        control: `Control` or dict of its settings.
        contrasts: column -> "treatment", "sum", "helmert", "poly", "sas", or a matrix.
        subset: boolean array or a condition such as ``"period != '4'"``.
        na: "drop" rows with missing values (counted in the summary), or "error".
        verbose: True prints evaluations; a callable receives (evaluation, deviance, parameters).
        device: "cpu", "gpu", a JAX device, or a list of them; None for JAX's default. Over several, also those of other
            processes (``jax.distributed``, ``device=jax.devices()``), the rows are divided, whole groups on each, which
            takes one grouping factor or nested ones.

    Returns:
        `MixedModel`.

    Raises:
        FormulaError, DataError: bad input, one sentence with the remedy. TypeError: unknown arguments.

    Source: Bates, Maechler, Bolker & Walker 2015, J. Stat. Softw. 67(1); derivatives by the implicit
    function theorem.
    """
    _refuse(unknown)
    setup = glmer_setup(formula, data, family, nAGQ, weights, offset, hessian, control, contrasts, subset, na)
    return fit(setup, start, verbose, device)


@checked()
def glmer_setup(
    formula: str | Formula,
    data: Any,
    family: str | Family = "binomial",
    nAGQ: int = 1,
    weights: Any = None,
    offset: Any = None,
    hessian: str | None = None,
    control: Control | dict[str, Any] | None = None,
    contrasts: dict[str, Any] | None = None,
    subset: Any = None,
    na: str = "drop",
) -> ModelSetup:
    """A generalised linear mixed model that is not fitted yet (lme4's glFormula); arguments as `glmer`.

    Returns:
        `ModelSetup`: the model frame, its arrays, and the settings. `deviance_function` is the next step; a gaussian
        family gives the set-up of a linear model by maximum likelihood.
    """
    control = as_control(control)
    family = get_family(family)
    if family.linear:
        from ._lmer import lmer_setup

        _check_nAGQ(nAGQ)
        resolve_hessian(hessian, family)
        return lmer_setup(formula, data, False, weights, offset, control, contrasts, subset, na)
    nAGQ = _check_nAGQ(nAGQ)
    kind = resolve_hessian(hessian, family)
    arguments = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "subset": subset,
        "na": na,
        "hessian": hessian,
        "data": data,
    }
    frame = build(formula, data, weights=weights, offset=offset, contrasts=contrasts, subset=subset, na=na)
    if nAGQ > 1:
        check_quadrature(frame, nAGQ)
    made, notes = make_design(frame, family)
    rank_message(frame, control.check_rank)
    split_message(frame)
    spec = ModelSpec(
        str(frame.formula),
        family,
        nAGQ,
        kind,
        control,
        weights if isinstance(weights, str) else None,
        offset if isinstance(offset, str) else None,
        arguments,
        ENTRY,
    )
    if notes:
        frame = replace(frame, notes=(*frame.notes, *notes))
    return ModelSetup(spec, frame, made)


_LATER = {
    "REML": "glmer fits by maximum likelihood; lmer has it",
    "nagq": "write nAGQ=",
    "ziformula": "zero-inflation is not available yet",
    "dispformula": "dispersion formulas are not available yet",
}


def _refuse(unknown: dict[str, Any]) -> None:
    for name in unknown:
        if name in _LATER:
            raise TypeError(f"glmer has no argument {name!r}: {_LATER[name]}")
        known = [p for p in inspect.signature(glmer).parameters if p != "unknown"]
        raise unknown_argument(name, known, "glmer")


def _check_nAGQ(nAGQ: int) -> int:
    if isinstance(nAGQ, bool) or not isinstance(nAGQ, (int, np.integer)) or nAGQ < 0:
        raise ValueError(f"nAGQ must be a non-negative integer, got {nAGQ!r}")
    return int(nAGQ)


def check_quadrature(frame: ModelData, nAGQ: int) -> None:
    """Raise ValueError unless the terms can be integrated with nAGQ points, naming the one that prevents it."""
    first = frame.terms[0]
    for term in frame.terms[1:]:
        if not np.array_equal(term.level, first.level):
            raise ValueError(
                f"nAGQ = {nAGQ} needs all random effects on one grouping factor: ({' + '.join(term.names)} | "
                f"{term.group}) is on {term.group!r}, but ({' + '.join(first.names)} | {first.group}) on "
                f"{first.group!r}; use nAGQ = 1 (Laplace) or 0, or leave one of them out"
            )
    check_nodes(nAGQ, [sum(len(term.names) for term in frame.terms)])


@entry
def _refit(model: MixedModel, newresp: Any) -> MixedModel:
    """See `MixedModel.refit`."""
    spec, frame, made, y = model._spec, model._data, model._design, new_response(model, newresp)
    stale = check_response(frame, made, spec.family)
    frame = replace(frame, y=y, notes=tuple(note for note in frame.notes if note not in stale))
    frame = replace(frame, notes=(*frame.notes, *check_response(frame, replace(made, y=y), spec.family)))
    return fit_problem(spec, frame, model._problem.with_rows("y", y), None)


def _update(model: MixedModel, formula: str | None, changes: dict[str, Any]) -> MixedModel:
    """See `MixedModel.update`."""
    spec = model._spec
    settings = {"family": spec.family, "nAGQ": spec.nAGQ, **updated(model, formula, changes, glmer)}
    if "family" in changes and "hessian" not in changes:
        settings["hessian"] = None
    return glmer(**settings)


ENTRY = Entry(_refit, _update, fit_problem)


@checked()
def design(
    formula: str | Formula,
    data: Any,
    weights: Any = None,
    offset: Any = None,
    contrasts: dict[str, Any] | None = None,
    subset: Any = None,
    na: str = "drop",
) -> Design:
    """The arrays of a model, for the pure functions.

    Arguments as `glmer`. Returns a `Design` with NumPy float64 leaves; binomial proportions are in y
    and trials in weights.
    """
    frame = build(formula, data, weights=weights, offset=offset, contrasts=contrasts, subset=subset, na=na)
    return frame_design(frame)
