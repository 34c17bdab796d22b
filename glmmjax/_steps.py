"""The steps of a fit, each usable alone; `glmer` and `lmer` are their composition.

    setup = glmer_setup(formula, data, family)     # or lmer_setup: formula and table -> arrays and settings
    deviance = deviance_function(setup)            # -> a function of the parameters, with exact derivatives
    estimates = optimise(deviance)                 # -> its minimum, or one of your own optimiser's
    model = make_model(deviance, estimates)        # -> everything a fitted model answers

They are lme4's modular functions: lFormula and glFormula, mkLmerDevfun and mkGlmerDevfun, optimizeLmer and
optimizeGlmer, mkMerMod. Source: Bates et al. 2015, J. Stat. Softw. 67(1), section 1.3 and table 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ._arguments import array, checked, mapping
from ._errors import ConvergenceWarning, DataError, NotSupportedError, warn
from .compiling.devices import on, several
from .compiling.entry import entry
from .families import Family
from .fit.control import unknown_argument
from .fit.glmm import GeneralisedProblem
from .fit.lmm import LinearProblem
from .fit.problem import Estimates, Problem, Start, estimate, estimate_at
from .formula.frame import refuse_constant
from .formula.parse import update as update_formula
from .inference.simulate import as_response
from .model.design import Design
from .results import MixedModel, ModelSpec, theta_names

if TYPE_CHECKING:
    from .fit.control import Control
    from .formula.model_data import ModelData


@dataclass(frozen=True, repr=False, eq=False)
class ModelSetup:
    """A model that is not fitted yet, as returned by `glmmjax.lmer_setup` and `glmmjax.glmer_setup`.

    Attributes:
        spec: what was asked for (formula, family, nAGQ, control, ...).
        data: the model frame: rows kept, names, levels, contrasts.
        design: the arrays (n rows, p fixed effects, terms in lme4's order), for the pure functions too:
            ``gj.laplace_deviance(theta, beta, setup.design, setup.family)``. Another `Design` of the same rows and
            terms may take its place with ``dataclasses.replace``.
    """

    spec: ModelSpec
    data: ModelData
    design: Design

    @property
    def formula(self) -> str:
        """The model formula."""
        return self.spec.formula

    @property
    def family(self) -> Family:
        """Family object, with its link."""
        return self.spec.family

    @property
    def x_names(self) -> list[str]:
        """Columns of X, named as R's model.matrix."""
        return list(self.data.x_names)

    @property
    def theta_names(self) -> list[str]:
        """lme4's names of theta."""
        return theta_names(self.design, self.data)

    def __str__(self) -> str:
        if self.spec.REML is None:
            kind = f"{self.family.name} ({self.family.link.name}), nAGQ = {self.spec.nAGQ}"
        else:
            kind = f"linear, by {'REML' if self.spec.REML else 'maximum likelihood'}"
        d = self.design
        return f"{self.formula}: {kind}; {d.n} rows, {d.n_theta} covariance parameters, {d.p} fixed effects"

    def __repr__(self) -> str:
        return f"<ModelSetup {self}>"


@checked()
@dataclass(frozen=True, repr=False, eq=False)
class DevianceFunction:
    """What a fit minimises, as a function of a vector x of the parameters; see `deviance_function`.

    x is theta for a linear model (beta and sigma are profiled out), (theta, log phi) for nAGQ = 0 (beta is found with
    the random effects), else (theta, beta, log phi): P numbers in the order of `names`, in the user's units. theta has
    no bounds: the deviance is even in each column of a term's factor, and 0 is an interior point.

    The value depends on x alone: the search for the conditional modes always starts from the same place.
    """

    setup: ModelSetup
    problem: Problem

    @property
    def names(self) -> list[str]:
        """(P,) names of the parameters: lme4's of theta, the columns of X, ``log(...)`` of dispersions."""
        setup = self.setup
        return self.problem.layout.names(setup.theta_names, setup.x_names, setup.family.phi_names)

    @property
    @entry
    def start(self) -> np.ndarray:
        """(P,) where `optimise` starts."""
        return self.problem.scaling.outer(np.asarray(self._begin.x))

    def pack(self, theta: Any, beta: Any = None, phi: Any = None) -> np.ndarray:
        """x (P,) from theta (n_theta,), beta (p,) where it is a parameter, and positive phi (n_phi,) if any."""
        given = {name: v for name, v in {"theta": theta, "beta": beta, "phi": phi}.items() if v is not None}
        wanted = list(self.unpack(np.zeros(self.problem.layout.size)))
        if sorted(given) != sorted(wanted):
            raise ValueError(
                f"a point of this deviance function is made of {' and '.join(wanted)}, got {' and '.join(given)}"
            )
        point = checked_start(given, self)
        return np.concatenate([np.log(point[name]) if name == "phi" else point[name] for name in wanted])

    def unpack(self, x: Any) -> dict[str, np.ndarray]:
        """x (P,) as a dict of theta, beta and phi, those that it has."""
        parts = self.problem.layout.unpack(self._point(x))
        out = {"theta": parts.theta.copy(), "beta": parts.beta.copy(), "phi": np.exp(parts.log_phi)}
        return {name: part for name, part in out.items() if part.size}

    def __call__(self, x: Any) -> float:
        """Minus twice the log-likelihood, or the REML criterion, all constants included; inf where PIRLS fails."""
        return self.value_and_grad(x)[0]

    def gradient(self, x: Any) -> np.ndarray:
        """(P,) exact gradient."""
        return self.value_and_grad(x)[1]

    @entry
    def value_and_grad(self, x: Any) -> tuple[float, np.ndarray]:
        """Value and exact gradient (P,) from one evaluation: ``scipy.optimize.minimize(..., jac=True)``'s function."""
        f, g, _, _ = self.problem.evaluate(*self._internal(x))
        return float(f), self.problem.scaling.jacobian.T @ np.asarray(g)

    @entry
    def hessian(self, x: Any) -> np.ndarray:
        """(P, P) by automatic differentiation, a program of its own: it compiles for seconds when first called."""
        H, J = np.asarray(self.problem.exact_hessian(*self._internal(x))), self.problem.scaling.jacobian
        return J.T @ H @ J

    def __repr__(self) -> str:
        return f"<DevianceFunction of {', '.join(self.names)}: {self.setup}>"

    @cached_property
    @entry
    def _begin(self) -> Start:
        """Where searches for the modes start."""
        return self.problem.start({})

    def _internal(self, x: Any) -> tuple[Any, Any, Any]:
        """A point in internal units, and what else an evaluation takes."""
        return self.problem.scaling.inner(self._point(x)), self._begin.carry, self._begin.constant

    def _point(self, x: Any) -> np.ndarray:
        point, size = np.asarray(x, float), self.problem.layout.size
        if point.shape != (size,):
            names = ", ".join(self.names)
            raise ValueError(f"a point of this deviance function has {size} numbers ({names}), got shape {point.shape}")
        return point


@checked()
@entry
def deviance_function(setup: ModelSetup, device: Any = None) -> DevianceFunction:
    """The deviance of a model as a function of its parameters (lme4's mkLmerDevfun and mkGlmerDevfun).

    Args:
        setup: from `lmer_setup` or `glmer_setup`.
        device: as `glmmjax.glmer`.

    Returns:
        `DevianceFunction`: call it at a point (P,), or ask for its gradient, hessian, names and start. To trace or
        differentiate in the data as well, use `laplace_deviance`, `agq_deviance` or `lmm_deviance` with
        ``setup.design``.
    """
    spec, devices = setup.spec, several(device)
    if devices:
        from .fit.shards import ShardedLinearProblem, ShardedProblem

        exact = spec.control.exact
        if spec.REML is not None:
            return DevianceFunction(setup, ShardedLinearProblem(setup.design, spec.REML, exact, devices))
        names = [term.group for term in setup.data.terms]
        args = setup.design, spec.family, spec.nAGQ, spec.hessian, exact
        return DevianceFunction(setup, ShardedProblem(*args, names, devices))
    if spec.REML is not None:
        return DevianceFunction(setup, LinearProblem(setup.design, spec.REML, spec.control.exact))
    problem = GeneralisedProblem(setup.design, spec.family, spec.nAGQ, spec.hessian, spec.control.exact)
    return DevianceFunction(setup, problem)


@checked()
@entry
def optimise(deviance: DevianceFunction, start: Any = None, verbose: Any = False) -> Estimates:
    """Minimise a deviance function as `glmer` and `lmer` do (lme4's optimizeGlmer and optimizeLmer).

    Args:
        deviance: see `deviance_function`; the search has the settings of its setup's control.
        start: dict with any of "theta" (n_theta,), "beta" (p,), "phi" (n_phi,), or a point (P,).
        verbose: True prints evaluations; a callable receives (evaluation, deviance, parameters).

    Returns:
        `Estimates`: theta, beta, phi, sigma, objective, gradient, hessian, converged, stats. A search that does not
        converge says so there; `make_model` warns.
    """
    if start is not None and not isinstance(start, dict):
        start = deviance.unpack(start)
    begin, control = checked_start(start, deviance), deviance.setup.spec.control
    return estimate(deviance.problem, begin, control.tol, control.max_evaluations, control.optimizer, verbose)


@checked("at")
@entry
def make_model(deviance: DevianceFunction, at: Any) -> MixedModel:
    """A fitted model from the parameters, wherever they come from (lme4's mkMerMod).

    Args:
        deviance: see `deviance_function`.
        at: `Estimates` of `optimise`, or a point (P,), such as ``scipy.optimize.minimize(...).x``, or a dict of
            all its parts, as `DevianceFunction.pack` takes them. A point is taken as it is, but that columns of theta
            change sign to have a diagonal >= 0: nothing is searched, no variance set to 0.

    Returns:
        `MixedModel`, whose beta and sigma, where they are profiled out, and random effects are those at the point. It
        counts as converged if the Hessian there is positive semi-definite and (1/2) g'H^-1 g, the expected further
        decrease of the deviance, below 1e-7; else summary and a `ConvergenceWarning` say what is wrong (an error if
        the control says ``check_grad="error"``).

    Raises:
        ValueError: a point of another size, or where the deviance is not finite.
    """
    if not isinstance(at, Estimates):
        x = deviance.pack(**mapping(at, "at")) if isinstance(at, dict) else deviance._point(array(at, "at"))
        at = estimate_at(deviance.problem, x)
    setup = deviance.setup
    model = MixedModel(setup.spec, setup.data, deviance.problem, at)
    _speak(model, setup.spec.control)
    return model


@entry
def fit(setup: ModelSetup, start: Any = None, verbose: Any = False, device: Any = None) -> MixedModel:
    """`deviance_function`, `optimise`, then `make_model`."""
    if device is not None:  # for `update`
        setup = replace(setup, spec=replace(setup.spec, arguments={**setup.spec.arguments, "device": device}))
    with on(device):
        deviance = deviance_function(setup, device)
        return make_model(deviance, optimise(deviance, start, verbose))


def fit_problem(spec: ModelSpec, data: ModelData, problem: Problem, start: dict[str, np.ndarray] | None) -> MixedModel:
    """`fit` of a problem that is there already: for refits, which compile nothing."""
    deviance = DevianceFunction(ModelSetup(spec, data, problem.original), problem)
    return make_model(deviance, optimise(deviance, start))


def new_response(model: MixedModel, newresp: Any) -> np.ndarray:
    """Another response (n,) of a model, as `MixedModel.refit` takes it.

    Raises:
        DataError: missing or infinite values, a constant.
    """
    frame = model._data
    y = np.ascontiguousarray(as_response(model, newresp), float)
    if not np.isfinite(y).all():
        raise DataError("the new response has missing or infinite values; refit needs one value per row of the fit")
    refuse_constant(y, frame.response_kind, frame.response_name, frame.response_levels)
    return y


def updated(
    model: MixedModel, formula: str | None, changes: dict[str, Any], entry: Callable[..., Any]
) -> dict[str, Any]:
    """Arguments of `entry` for `MixedModel.update`."""
    for term in model._data.terms:
        if not isinstance(term.structure, str):
            raise NotSupportedError(
                f"the covariance {term.structure} of ({' + '.join(term.names)} | {term.group}) is in the design and "
                "not in the formula, which is what update changes: make the new model with lmer_setup or glmer_setup"
            )
    spec = model._spec
    known = [*inspect.signature(entry).parameters]
    for name in changes:
        if name not in known:
            raise unknown_argument(name, known, "update")
    new = spec.formula if formula is None else str(update_formula(spec.formula, formula))
    return {"formula": new, "control": spec.control, **spec.arguments, **changes}


def checked_start(start: dict[str, Any] | None, deviance: DevianceFunction) -> dict[str, np.ndarray]:
    """Starting values as arrays of the sizes the model needs."""
    design, linear = deviance.setup.design, deviance.setup.spec.REML is not None
    sizes = {"theta": design.n_theta}
    if not linear:  # nAGQ = 0 takes a start of beta, too
        sizes.update(beta=design.p, phi=len(deviance.setup.family.phi_names))
    out = {}
    for name, value in (start or {}).items():
        key = "beta" if name == "fixef" else name
        if key not in sizes:
            raise unknown_argument(name, [*sizes] if linear else [*sizes, "fixef"], "start")
        array = np.asarray(value, float).reshape(-1)
        if array.size != sizes[key]:
            raise ValueError(f"start[{name!r}] has {array.size} values, the model needs {sizes[key]}")
        infinite = np.isinf(array) & (key == "phi")  # as estimates may be: where the search begins is left to it
        if not (np.isfinite(array) | infinite).all() or (key == "phi" and (array <= 0).any()):
            raise ValueError(f"start[{name!r}] must be finite{' and positive' if key == 'phi' else ''}")
        out[key] = array
    return out


def _speak(model: MixedModel, control: Control) -> None:
    """Say what should be said about the fit."""
    from .inference.messages import convergence_problems, limit_sentence, singular_sentence

    problems = convergence_problems(model)
    if problems and control.check_grad != "ignore":
        if control.check_grad == "error":
            raise RuntimeError(problems[0])
        for text in problems:
            warn(text, ConvergenceWarning)
    for text in (singular_sentence(model), limit_sentence(model)):  # on a boundary of the parameters
        if text and control.check_singular != "ignore":
            if control.check_singular == "error":
                raise RuntimeError(text)
            warn(text, ConvergenceWarning)
