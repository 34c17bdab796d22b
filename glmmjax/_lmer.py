"""`lmer`: linear mixed models from a formula and a table."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import checked
from ._steps import ModelSetup, fit, fit_problem, new_response, updated
from .compiling.entry import entry
from .families import Gaussian
from .fit.control import Control, as_control, unknown_argument
from .formula.frame import build
from .model.frames import make_linear_design, rank_message, refuse_exact, split_message
from .results import Entry, MixedModel, ModelSpec

if TYPE_CHECKING:
    from .formula.parse import Formula


@checked()
def lmer(
    formula: str | Formula,
    data: Any,
    REML: bool = True,
    weights: Any = None,
    offset: Any = None,
    start: dict[str, Any] | None = None,
    control: Control | dict[str, Any] | None = None,
    contrasts: dict[str, Any] | None = None,
    subset: Any = None,
    na: str = "drop",
    verbose: Any = False,
    device: Any = None,
    **unknown: Any,
) -> MixedModel:
    """Fit a linear mixed model by REML or maximum likelihood.

    Args:
        formula: R's, with lme4's bars: ``"y ~ x + (x | g)"``, ``"y ~ 1 + (1 | a/b) + (1 | c)"``.
        data: pandas DataFrame, anything with ``to_pandas()``, dict of arrays, or structured array.
        REML: the REML criterion instead of the likelihood; compare models with different fixed effects
            by likelihood (`MixedModel.refit_ml`).
        weights: column name, array or Series of precision weights: Var(y_i) = sigma^2 / w_i. Rows of
            weight 0 are dropped.
        offset: column name, array or Series, subtracted from the response.
        start: "theta" (n_theta,), relative to sigma.
        control, contrasts, subset, na, verbose: as `glmmjax.glmer`.
        device: as `glmmjax.glmer`; any design can be divided.

    Returns:
        `MixedModel`.

    Raises:
        FormulaError, DataError: bad input, one sentence with the remedy. TypeError: unknown arguments.

    Source: Bates, Maechler, Bolker & Walker 2015, J. Stat. Softw. 67(1).
    """
    for name in unknown:
        if name == "family":
            raise TypeError("lmer has no argument 'family': its responses are gaussian; use glmer for other families")
        known = [p for p in inspect.signature(lmer).parameters if p != "unknown"]
        raise unknown_argument(name, known, "lmer")
    setup = lmer_setup(formula, data, REML, weights, offset, control, contrasts, subset, na)
    return fit(setup, start, verbose, device)


@checked()
def lmer_setup(
    formula: str | Formula,
    data: Any,
    REML: bool = True,
    weights: Any = None,
    offset: Any = None,
    control: Control | dict[str, Any] | None = None,
    contrasts: dict[str, Any] | None = None,
    subset: Any = None,
    na: str = "drop",
) -> ModelSetup:
    """A linear mixed model that is not fitted yet (lme4's lFormula); arguments as `lmer`.

    Returns:
        `ModelSetup`: the model frame, its arrays, and the settings. `deviance_function` is the next step.
    """
    if not isinstance(REML, (bool, np.bool_)):
        raise ValueError(f"REML must be True or False, got {REML!r}")
    control = as_control(control)
    arguments = {
        "weights": weights,
        "offset": offset,
        "contrasts": contrasts,
        "subset": subset,
        "na": na,
        "data": data,
    }
    frame = build(formula, data, weights=weights, offset=offset, contrasts=contrasts, subset=subset, na=na)
    made = make_linear_design(frame)
    rank_message(frame, control.check_rank)
    split_message(frame)
    spec = ModelSpec(
        str(frame.formula),
        Gaussian(),
        1,
        "expected",
        control,
        weights if isinstance(weights, str) else None,
        offset if isinstance(offset, str) else None,
        arguments,
        ENTRY,
        bool(REML),
    )
    return ModelSetup(spec, frame, made)


@entry
def _refit(model: MixedModel, newresp: Any) -> MixedModel:
    """See `MixedModel.refit`."""
    y = new_response(model, newresp)
    refuse_exact(model._design, y, model._data)
    return fit_problem(model._spec, replace(model._data, y=y), model._problem.with_rows("y", y), None)


def _update(model: MixedModel, formula: str | None, changes: dict[str, Any]) -> MixedModel:
    """See `MixedModel.update`."""
    return lmer(**{"REML": model._spec.REML, **updated(model, formula, changes, lmer)})


ENTRY = Entry(_refit, _update, fit_problem)
