"""`lmer`: linear mixed models from a formula and a table."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import checked
from ._errors import DataError
from ._glmer import frame_design, rank_message, split_message
from ._steps import ModelSetup, fit, fit_problem
from .compiling.entry import entry
from .compiling.memory import triangle
from .families import Gaussian
from .fit.control import Control, as_control, unknown_argument
from .fit.lmm import LinearProblem
from .formula.frame import build
from .formula.model_data import ModelData
from .model.design import Design
from .results import MixedModel, ModelSpec

if TYPE_CHECKING:
    from .formula.parse import Formula

#: What the fixed effects leave of a response that they fit exactly, relative to it.
EXACT = 1e-13


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
    made = checked_design(frame)
    rank_message(frame, control)
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
        bool(REML),
    )
    return ModelSetup(spec, frame, made)


def checked_design(frame: ModelData) -> Design:
    """Design of a model frame whose residual variance can be told from the random effects."""
    if frame.response_kind in ("binary", "cbind"):
        what = "a two-level factor" if frame.response_kind == "binary" else "cbind(successes, failures)"
        raise DataError(f"response {frame.response_name} is {what}: use glmer with family='binomial'")
    made = frame_design(frame)
    n, p = made.n, made.p
    for term in frame.terms:
        m, k = len(term.levels), len(term.names)
        if m >= n:
            raise DataError(
                f"grouping factor {term.group!r} has {m} levels for {n} rows: its variance cannot be told from the "
                "residual variance; drop the term or use a factor with fewer levels"
            )
        if m * k >= n:
            raise DataError(
                f"the term ({' + '.join(term.names)} | {term.group}) has {m * k} random effects for {n} rows: its "
                "covariance cannot be told from the residual variance; drop columns from it or use a factor with "
                "fewer levels"
            )
    if n <= p:
        raise DataError(f"{p} fixed effects for {n} rows: nothing is left to estimate variances from; drop some")
    _refuse_exact(made, np.asarray(made.y), frame)
    return made


def _refuse_exact(made: Design, y: np.ndarray, frame: ModelData) -> None:
    """Raise DataError if the fixed effects leave nothing of a response (n,)."""
    X, offset, weights = (np.asarray(v) for v in (made.X, made.offset, made.weights))

    def weighted(rows: slice) -> np.ndarray:
        return np.sqrt(weights[rows, None]) * np.column_stack([X[rows], y[rows] - offset[rows]])

    last = np.abs(triangle(made.n, weighted)[:, -1])  # of y: along the columns of X, and what is left
    if last[-1] <= EXACT * np.linalg.norm(last):
        raise DataError(
            f"response {frame.response_name} is fitted exactly by the fixed effects (a constant response is): no "
            "variance is left to estimate"
        )


def check_response(model: MixedModel, y: np.ndarray) -> None:
    """Raise DataError if the fixed effects fit another response (n,) of the same model exactly."""
    _refuse_exact(model._design, y, model._data)


@entry
def refit_ml(model: MixedModel) -> MixedModel:
    """See `MixedModel.refit_ml`."""
    spec = model._spec
    if not spec.REML:
        return model
    problem = model._problem
    assert isinstance(problem, LinearProblem)
    return fit_problem(replace(spec, REML=False), model._data, problem.with_criterion(False), None)
