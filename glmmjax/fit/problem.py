"""From a design to estimates: minimisation, its judgement, and the form estimates are reported in.

Works on arrays; knows no formulas and no labels. `Problem` is what a kind of model supplies: `glmm` and
`lmm` have one each, with the programs that are compiled once per structure and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..families import LOG_PHI_MAX, Family, reported
from ..model.basis import cancelling_start
from ..model.design import Design, off_ridge
from ..model.parameters import Layout, Parameters, Scaling
from . import optimise as opt
from .separation import Separation

#: theta columns below this norm are tried at exactly zero (DESIGN: singular fits)
NEAR_ZERO = 1e-3
ZERO_COST = 1e-8
#: Eigenvalues of a Hessian, each parameter in units of its own curvature: below FLAT a direction is undetermined by the
#: data, below CONCAVE (the error of differences) the point is no minimum. Curvatures below LEAST_CURVATURE deviance
#: units per squared unit, or that part of the largest one, are nothing and may be noise.
FLAT, CONCAVE = 1e-8, -1e-5
LEAST_CURVATURE, LEAST_PART = 1e-3, 1e-10
#: A parameter that moves by this part of itself along undetermined directions is undetermined.
UNDETERMINED = 0.3
#: Where the curvature of the deviance in the log of a dispersion is below this, the limit at infinity is tried: with
#: a larger one the limit is worse, by about half of it in units of the deviance.
BARELY_DISPERSED = 1.0
#: Times the largest response: a dispersion so near infinity that the deviance is linear in its inverse from there on.
FAR = 1e8
#: A column of T at 0 is raised to this to see the curvature there (squared, it is the error relative to it).
BESIDE = 3e-4
#: A minimum is another one if it is lower by this.
ANOTHER = 1e-6
#: times that a singular fit is settled, as it may turn out to be no minimum
SETTLINGS = 3
#: evaluations whose point and deviance are kept
PATH_LENGTH = 64


@dataclass(frozen=True)
class FitStats:
    """How a fit went.

    Attributes:
        evaluations: of deviance and gradient together, in the search.
        hessian_evaluations: further ones spent on the Hessian.
        pirls_iterations: in all evaluations.
        decrement: (1/2) g'H^-1 g at the estimates, deviance units.
        status: code; `message` is what it means.
        restarts: from points that were not minima.
        path: (evaluations, P + 2) array: theta, beta, log phi evaluated, deviance, decrement.
    """

    evaluations: int
    hessian_evaluations: int
    pirls_iterations: int
    decrement: float
    status: int
    message: str
    restarts: int
    path: np.ndarray = field(repr=False)


@dataclass(frozen=True)
class Estimates:
    """Estimates of a design, NumPy throughout.

    `hessian` is that of the deviance over (theta, beta, log phi), without beta for nAGQ = 0; `covariance` is
    twice its inverse without the directions undetermined by the data, and `ridge` has the positions of the
    parameters that these move. Both are judged in internal units. Where rows are separated (`separation`), estimates
    are those at infinity, but that beta is only so far out that these rows have likelihoods of 1 but for rounding;
    `covariance` is then that of what the other rows determine, and `separation` knows which functions of beta they do.
    A linear mixed model has sigma and RX (p, p), upper triangular with sigma^2 (RX'RX)^-1 the covariance of beta; its
    `hessian` is the average information of theta.
    """

    theta: np.ndarray
    beta: np.ndarray
    phi: np.ndarray
    u: tuple[np.ndarray, ...]
    objective: float
    gradient: np.ndarray
    hessian: np.ndarray
    covariance: np.ndarray
    converged: bool
    ridge: tuple[int, ...]
    stats: FitStats
    sigma: float = 1.0
    RX: np.ndarray | None = None
    separation: Separation | None = None


class Start(NamedTuple):
    """Where a search starts, in internal units."""

    x: Any  # (P,)
    inverse: Any  # (P, P) guess of the inverse Hessian
    carry: Any
    constant: Any  # part of the deviance that no parameter enters


class Problem:
    """One design in internal units on the device, ready to be minimised from any start.

    Attributes:
        original: the design in the user's units.
        scaling: between these and the internal ones, of the parameters of the search.
        exact: whether the search ends with an exact Hessian instead of one by differences.
    """

    original: Design
    scaling: Scaling
    family: Family
    exact: bool
    #: whether a search with its own metric reports that as the Hessian
    metric_is_hessian: bool = False
    #: called in another thread while programs are compiled, if they have to be
    while_compiling: Callable[[], None] | None = None

    @property
    def layout(self) -> Layout:
        """Of the parameters of the search."""
        return self.scaling.layout

    def with_rows(self, name: str, values: np.ndarray) -> Self:
        """The same design with another "y" or other "weights" (n,), where rows of weight 0 count as absent.

        Nothing else is copied or scaled again.
        """
        raise NotImplementedError

    def start(self, start: dict[str, np.ndarray]) -> Start:
        """Point, inverse metric, carry and constant to start from; `start` as for `estimate`."""
        raise NotImplementedError

    def minimise(self, begin: Start, limits: opt.Limits, metric: str) -> opt.Found:
        """The whole search as one compiled program. metric: "own" or "bfgs"."""
        raise NotImplementedError

    def advance(self, state: opt.State, begin: Start, limits: opt.Limits, metric: str) -> opt.State:
        """One evaluation of the same search, for a driver on the host."""
        raise NotImplementedError

    def evaluate(self, x: Array, carry: Any, constant: Any) -> tuple[Array, Array, Any, Array]:
        """Deviance, gradient, carry and inner iterations at x."""
        raise NotImplementedError

    def deviance(self, x: Array, carry: Any, constant: Any) -> Array:
        """The deviance at x as a differentiable function."""
        raise NotImplementedError

    def exact_hessian(self, x: Array, carry: Any, constant: Any) -> Array:
        """(P, P) by automatic differentiation."""
        raise NotImplementedError

    def separation(self, begin: Start) -> Separation | None:
        """What of the response is separated. A search for estimates at infinity ends anywhere, the other parameters
        with it: instead `settled` is fitted, and `unsettled` has its estimates as those of this problem."""
        return None

    def settled(self, separation: Separation) -> Problem:
        """The problem without the separated rows, of the same shape; see `separation.settled`."""
        raise NotImplementedError

    def unsettled(self, estimates: Estimates, separation: Separation) -> Estimates:
        """Estimates of `settled`, in the limit those of this problem."""
        raise NotImplementedError

    def complete(self, estimates: Estimates, carry: Any) -> Estimates:
        """Add what only this kind of model estimates."""
        return estimates

    def sigma(self, carry: Any) -> float:
        """Residual standard deviation at the end of a search."""
        return 1.0

    def natural(self, x: np.ndarray, carry: Any) -> Parameters:
        """theta, beta and phi in the user's units at the end of a search."""
        theta, beta, log_phi, _ = self.layout.unpack(self.scaling.outer(x))
        if not self.layout.has_beta:
            beta = self.scaling.beta(np.asarray(carry.beta))
        return Parameters(theta, beta, reported(log_phi))

    def run(self, begin: Start, limits: opt.Limits, metric: str, verbose: Any = False) -> opt.Found:
        """Search from a start; the result is on the host."""
        out = self._search(begin, limits, metric, verbose)
        if not self.exact:
            return out
        for _ in range(3):
            H = self.exact_hessian(out.x, out.carry, begin.constant)
            out = out._replace(hessian=np.asarray(H))
            inverse = safe_inverse(out.hessian)
            move = -inverse @ out.g
            if -0.5 * out.g @ move <= limits.tol or out.status != opt.CONVERGED:
                break
            # the exact Hessian promises a gain that the search's own metric did not see
            before = out.numbers
            out = self._search(Start(out.x + move, inverse, out.carry, begin.constant), limits, metric, verbose)
            out = out._replace(numbers=np.concatenate([out.numbers[:3], out.numbers[3:] + before[3:]]))
        return out

    def _search(self, begin: Start, limits: opt.Limits, metric: str, verbose: Any) -> opt.Found:
        if not verbose:
            return self.minimise(begin, limits, metric)
        report = verbose if callable(verbose) else _print_progress
        state = opt.initial_state(jnp.asarray(begin.x), jnp.asarray(begin.inverse), begin.carry, PATH_LENGTH)
        while opt.is_running(state):
            state = self.advance(state, begin, limits, metric)
            best = float(state.f)
            if not np.isfinite(best):  # nothing accepted yet: what was evaluated
                best = float(state.path[0, -2])
            report(int(state.evaluations), best, self.scaling.outer(np.asarray(state.x)))
        out: opt.Found = jax.device_get(self.finish(opt.found(state)))
        return out

    def finer(self, found: opt.Found) -> Problem | None:
        """The same problem computed with more digits, where a search has ended at a point that needs them."""
        return None

    def objection(self, found: opt.Found) -> int | None:
        """Status of an end that cannot be an estimate, however it was found; None if there is nothing to object."""
        return None

    def finish(self, found: opt.Found) -> opt.Found:
        """What `minimise` does to the end of its search."""
        return found


def unpacked(packed: Any, begin: Start) -> opt.Found:
    """On the host, the end of a search that `optimise.pack` has packed."""
    return opt.unpack(np.asarray(packed), begin.x.size, PATH_LENGTH, begin.carry)


def safe_inverse(H: np.ndarray) -> np.ndarray:
    """Inverse of a symmetric matrix with its eigenvalues held away from 0."""
    values, vectors = np.linalg.eigh(0.5 * (H + H.T))
    floor = max(1e-8 * float(values.max(initial=0.0)), 1e-8)
    out: np.ndarray = (vectors / np.maximum(values, floor)) @ vectors.T
    return out


def _print_progress(evaluation: int, deviance: float, parameters: np.ndarray) -> None:
    shown = " ".join(f"{v:.5g}" for v in parameters[:8])
    print(f"{evaluation:4d}  {deviance:.8f}  {shown}{' ...' if parameters.size > 8 else ''}")


def estimate(
    problem: Problem,
    start: dict[str, np.ndarray] | None = None,
    tol: float = 1e-10,
    max_evaluations: int = 500,
    optimizer: Any = "auto",
    verbose: Any = False,
) -> Estimates:
    """Minimise the deviance of a design.

    Args:
        start: any of "theta" (n_theta,), "beta" (p,), "phi" (n_phi,).
        verbose: False, True, or a callable (evaluation, deviance, parameters).
    """
    begin = problem.start(start or {})
    separation = problem.separation(begin)
    if separation is not None:
        given = {k: separation.known(v) if k == "beta" else v for k, v in (start or {}).items()}
        rest = estimate(problem.settled(separation), given, tol, max_evaluations, optimizer, verbose)
        return problem.unsettled(rest, separation)
    limits = opt.Limits(tol, max_evaluations, not problem.exact)
    whole, metric, extra = limits, "bfgs" if optimizer == "bfgs" else "own", 0
    outside = optimizer not in ("auto", "bfgs")
    if outside:
        from .other_optimisers import search

        begin, extra = search(problem, optimizer, begin, tol, max_evaluations)
        limits = limits._replace(max_evaluations=1)
    state = problem.run(begin, limits, metric, verbose)
    far = None if outside or "theta" in (start or {}) else cancelling_start(problem.original)
    if far is not None:
        given = {**(start or {}), "theta": problem.scaling.basis.outer(far)}
        other = problem.run(problem.start(given), limits, metric, verbose)
        state, worse = (other, state) if other.f < state.f else (state, other)
        extra += worse.search_evaluations
    finer = problem.finer(state)
    if finer is not None:
        problem, metric, limits, extra = finer, "bfgs", whole, extra + state.search_evaluations
        begin = Start(state.x, safe_inverse(state.hessian), state.carry, begin.constant)
        state = problem.run(begin, limits, metric)
        if state.status != opt.CONVERGED:  # rounding may have led the first search far astray
            other = problem.run(problem.start(start or {}), limits, metric)
            state, worse = (other, state) if other.f < state.f else (state, other)
            extra += worse.search_evaluations
    state, spent = _settle_dispersion(problem, begin, state, whole)
    extra += spent
    state, restarts, spent = _settle(problem, begin, state, limits, metric, verbose)
    extra += spent
    if not outside and "theta" not in (start or {}):
        other, spent = _other_signs(problem, begin, state, limits, metric, verbose)
        extra += spent
        if other is not state:
            state, restarts, spent = _settle(problem, begin, other, limits, metric, verbose)
            extra += spent
    return _report(problem, state, restarts, extra, limits, outside)


def searched(
    problem: Problem, start: dict[str, np.ndarray], limits: opt.Limits
) -> tuple[Problem, opt.Found, Separation | None]:
    """The end of one search, columns of 0 at 0, the problem that was searched, and what was separated and left out."""
    begin = problem.start(start)
    separation = problem.separation(begin)
    if separation is not None:
        problem = problem.settled(separation)
        begin = problem.start({k: separation.known(v) if k == "beta" else v for k, v in start.items()})
    found, _ = _settle_singular(problem, begin, problem.run(begin, limits, "own"), limits, "own")
    return problem, found, separation


def estimate_at(problem: Problem, x: np.ndarray, enough: float = 1e-7) -> Estimates:
    """What `estimate` reports, at a point that was found elsewhere; nothing is searched.

    Args:
        x: (P,) theta, beta, log phi (theta, log phi for nAGQ = 0, theta for a linear model).

    Raises:
        ValueError: the deviance is not finite there.
    """
    at = problem.layout.at
    begin = problem.start({"theta": x[at.theta]})
    limits = opt.Limits(0.1 * enough, 1, not problem.exact)
    state = problem._search(begin._replace(x=problem.scaling.inner(x)), limits, "own", False)
    if not np.isfinite(state.f):
        raise ValueError("the deviance is not finite at this point")
    # a search's own metric says nothing about a point that is no minimum
    if problem.metric_is_hessian or problem.exact:
        state = state._replace(hessian=np.asarray(problem.exact_hessian(state.x, state.carry, begin.constant)))
    numbers = state.numbers.copy()
    numbers[2] = opt.NOT_MINIMUM  # unless the report finds that it is one
    found = _report(problem, state._replace(numbers=numbers), 0, 0, limits, True)
    separation = problem.separation(begin)
    if separation is None:
        return found
    known = np.array(x)
    if problem.layout.has_beta:
        known[at.beta] = separation.known(x[at.beta])
    rest = problem.unsettled(estimate_at(problem.settled(separation), known, enough), separation)
    near = rest.converged and found.objective - rest.objective < enough
    stats = rest.stats if near else replace(rest.stats, status=opt.NOT_MINIMUM, message=opt.MESSAGES[opt.NOT_MINIMUM])
    return replace(rest, beta=found.beta, u=found.u, objective=found.objective, converged=near, stats=stats)


class Curvature(NamedTuple):
    """Eigen-decomposition of the Hessian with each parameter in units of its own curvature.

    In these units 1 is a parameter determined by itself, 0 a direction the data say nothing about.
    """

    values: np.ndarray  # (P,), NaN if the Hessian is not finite
    vectors: np.ndarray  # (P, P)
    units: np.ndarray  # (P,) internal units of each parameter

    @property
    def flat(self) -> np.ndarray:
        """(P,) directions that the data do not determine."""
        return self.values < FLAT

    @property
    def minimum(self) -> bool:
        """No direction of negative curvature beyond the error of the differences."""
        return bool(np.isfinite(self.values).all() and self.values.min(initial=0.0) > CONCAVE)


def at_limit(family: Family, layout: Layout, x: np.ndarray) -> np.ndarray:
    """(..., P) which of the parameters are dispersions at infinity."""
    out = np.zeros(x.shape, bool)
    if family.limit:
        out[..., layout.at.log_phi] = x[..., layout.at.log_phi] >= LOG_PHI_MAX
    return out


def curvature(H: np.ndarray) -> Curvature:
    """See `Curvature`."""
    P = H.shape[0]
    if not np.isfinite(H).all():
        return Curvature(np.full(P, np.nan), np.eye(P), np.ones(P))
    diagonal = np.abs(np.diag(H))
    units = 1.0 / np.sqrt(np.maximum(diagonal, max(LEAST_CURVATURE, LEAST_PART * diagonal.max(initial=0.0))))
    values, vectors = np.linalg.eigh(H * np.outer(units, units))
    return Curvature(values, vectors, units)


def _positive_definite(H: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(H)
    except np.linalg.LinAlgError:
        return False
    return bool(np.isfinite(H).all())


def _settle(
    problem: Problem, begin: Start, state: opt.Found, limits: opt.Limits, metric: str, verbose: Any
) -> tuple[opt.Found, int, int]:
    """A minimum in canonical form from the end of a search; restarts and further evaluations."""
    restarts, extra = 0, 0
    for _ in range(SETTLINGS):
        state, left, more = _leave_saddles(problem, begin, state, limits, metric, verbose)
        state, further = _settle_singular(problem, begin, state, limits, metric)
        restarts, extra = restarts + left, extra + more + further
        if not further or curvature(state.hessian).minimum:
            break
    return state, restarts, extra


def _other_signs(
    problem: Problem, begin: Start, state: opt.Found, limits: opt.Limits, metric: str, verbose: Any
) -> tuple[opt.Found, int]:
    """The best of searches from correlations of the other sign, where the estimates say little about them.

    With few levels the deviance may have a minimum on either side of an independence, often on the boundary.
    """
    extra = 0
    for term in filter(lambda term: term.structure.has_mirror, problem.layout.terms):
        x, H = np.array(state.x), state.hessian
        theta = x[problem.layout.at.theta]  # a view
        if state.status != opt.CONVERGED or not np.isfinite(H).all():
            break
        variance = 2.0 * np.diag(safe_inverse(H))[problem.layout.at.theta]
        if not term.structure.undecided(theta[term.theta], variance[term.theta]):
            continue
        theta[term.theta] = term.structure.mirrored(theta[term.theta])
        found = problem.run(begin._replace(x=x, carry=state.carry), limits, metric, verbose)
        state, worse = (found, state) if found.f < state.f - ANOTHER else (state, found)
        extra += worse.search_evaluations
    return state, extra


def _leave_saddles(
    problem: Problem, begin: Start, state: opt.Found, limits: opt.Limits, metric: str, verbose: Any
) -> tuple[opt.Found, int, int]:
    """Restart along a direction of negative curvature: a column of T at 0 is always stationary."""
    restarts, extra = 0, 0
    while restarts < 4:
        if _positive_definite(state.hessian):
            break
        shape = curvature(state.hessian)
        if shape.minimum or not np.isfinite(shape.values).all():
            break
        direction = shape.units * shape.vectors[:, int(np.argmin(shape.values))]
        # as far as a random effect's sd may be, not as the curvature at the saddle says
        trial = state.x + 0.3 * direction / np.abs(direction).max()
        restarted = problem.run(begin._replace(x=trial, carry=state.carry), limits, metric, verbose)
        extra += state.search_evaluations
        restarts += 1
        if not restarted.f < state.f - 1e-9:
            break
        state = restarted
    return state, restarts, extra


def _settle_dispersion(problem: Problem, begin: Start, state: opt.Found, limits: opt.Limits) -> tuple[opt.Found, int]:
    """The fit at the family's limit, its dispersion infinite, where that costs nothing.

    There the deviance is flat in the log of the dispersion, which no search moves, and the rest is the limit's own fit.
    """
    there = problem.layout.at.log_phi
    if not problem.family.limit or not problem.layout.n_phi or not np.isfinite(state.f):
        return state, 0
    if not barely_dispersed(np.asarray(state.hessian), problem.layout):
        return state, 0

    def at(log_phi: float, near: opt.Found, limits: opt.Limits) -> opt.Found:
        x = np.array(near.x)
        x[there] = log_phi
        return problem.run(Start(x, begin.inverse, near.carry, begin.constant), limits, "bfgs")

    found = at(LOG_PHI_MAX, state, limits)
    if not found.f <= state.f + ZERO_COST:
        return state, found.search_evaluations
    spent = state.search_evaluations
    # a search that began far out may have stayed there: the deviance must rise on the way in
    far = float(np.log(FAR * max(1.0, float(problem.original.y.max()))))
    spent += 1
    if at(far, found, limits._replace(max_evaluations=1, hessian=False)).g[there] > 0.0:
        inner = at(float(np.log(problem.family.phi_start()[-1])), found, limits)
        if inner.f < found.f - ZERO_COST:
            return inner, spent + found.search_evaluations
        spent += inner.search_evaluations
    return found, spent


def barely_dispersed(H: np.ndarray, layout: Layout) -> bool:
    """Whether the deviance with Hessian H (P, P) is nearly flat in the dispersion, the others minimised over."""
    if not _positive_definite(H):
        return True
    return bool(np.diag(np.linalg.inv(H))[layout.at.log_phi] * BARELY_DISPERSED > 1.0)


def _settle_singular(
    problem: Problem, begin: Start, state: opt.Found, limits: opt.Limits, metric: str
) -> tuple[opt.Found, int]:
    """Report singular factors in canonical form: columns near 0 at exactly 0, rank-deficient T re-factored."""
    extra = 0
    terms, at = problem.layout.terms, problem.layout.at.theta
    x = np.asarray(state.x)
    theta = x[at]
    proposal = theta.copy()
    for term in terms:
        proposal[term.theta] = term.structure.settled(theta[term.theta], NEAR_ZERO)
    if np.array_equal(proposal, theta):
        return state, extra
    x0 = x.copy()
    x0[at] = proposal
    once = limits._replace(max_evaluations=1)
    settled = problem.run(Start(x0, state.inverse, state.carry, begin.constant), once, metric)
    extra += settled.search_evaluations
    if settled.f <= state.f + ZERO_COST:
        # the search is still the first one; only the point and what was computed there change
        numbers = settled.numbers.copy()
        numbers[2], numbers[4] = state.numbers[2], state.numbers[4]
        numbers[3] += state.numbers[3] - settled.numbers[4]
        numbers[5] += state.numbers[5]
        settled = settled._replace(numbers=numbers, path=state.path)
        if problem.metric_is_hessian and metric == "own" and limits.hessian:
            # at an exact zero the curvature cannot be read off the gradient
            x0[at] = off_ridge(x0[at], terms, BESIDE, BESIDE)
            beside = problem.run(Start(x0, state.inverse, state.carry, begin.constant), once, metric)
            extra += beside.search_evaluations
            settled = settled._replace(hessian=beside.hessian)
        return settled, extra
    return state, extra


def _report(
    problem: Problem,
    state: opt.Found,
    restarts: int,
    extra: int,
    limits: opt.Limits,
    external_search: bool,
) -> Estimates:
    design, scaling, layout = problem.original, problem.scaling, problem.layout
    x, g, H = state.x, state.g, state.hessian
    theta, beta, phi = problem.natural(x, state.carry)
    signs = np.ones(layout.size)
    of_theta = signs[layout.at.theta]  # a view
    u = [np.array(block[:m]) for block, m in zip(state.carry.u, design.n_levels, strict=True)]
    for term in design.terms:
        of_theta[term.theta], turn = term.structure.flip(theta[term.theta])
        if (of_theta[term.theta] < 0).any():
            u[term.block][:, term.columns] = u[term.block][:, term.columns] @ turn
    theta = theta * of_theta + 0.0
    infinite = at_limit(problem.family, layout, x)
    # the deviance does not depend on an infinite dispersion: nothing else is moved by it
    shape = curvature(H + np.diag(infinite.astype(float)))
    along = shape.vectors.T @ (shape.units * g)
    decrement = 0.5 * float(np.sum(np.where(shape.flat, 0.0, along**2 / np.where(shape.flat, 1.0, shape.values))))
    if not np.isfinite(decrement):
        decrement = state.decrement
    minimum = shape.minimum
    status = state.status
    # BFGS and Newton certify their own tolerance; other searches stop by rules of theirs
    enough = 1e-7 if external_search else 10.0 * float(limits.tol)
    converged = minimum and np.isfinite(state.f) and decrement < enough
    if external_search and converged:
        status = opt.CONVERGED
    elif converged and status in (opt.LINE_SEARCH, opt.EVALUATION_LIMIT):
        status = opt.CONVERGED
    elif not minimum and status == opt.CONVERGED:
        status, converged = opt.NOT_MINIMUM, False
    objection = problem.objection(state)
    status = status if objection is None else objection
    converged = converged and status == opt.CONVERGED
    J = scaling.jacobian
    outer = J.T @ H @ J
    outer = outer * np.outer(signs, signs)
    root = signs[:, None] * scaling.outer(shape.units[:, None] * shape.vectors)
    covariance = 2.0 * (root / np.where(shape.flat, np.inf, shape.values)) @ root.T
    moved = (np.abs(root) > UNDETERMINED * np.linalg.norm(root, axis=1, keepdims=True))[:, shape.flat].any(axis=1)
    ridge = tuple(int(i) for i in np.flatnonzero(moved))
    # a coefficient that runs off has no finite variance; theta's ridges are rotations of a singular T
    moved[layout.at.theta] = False
    covariance[moved, moved] = np.inf
    covariance[infinite, infinite] = np.inf
    searched = state.search_evaluations
    path = np.asarray(state.path)[:searched]
    if path.size:
        path = np.concatenate([scaling.outer(path[:, :-2].T).T, path[:, -2:]], axis=1)
    stats = FitStats(
        evaluations=searched + extra,
        hessian_evaluations=state.evaluations - searched,
        pirls_iterations=state.inner,
        decrement=decrement,
        status=status,
        message=opt.MESSAGES[status],
        restarts=restarts,
        path=path,
    )
    gradient = (J.T @ g) * signs
    found = Estimates(theta, beta, phi, tuple(u), state.f, gradient, outer, covariance, converged, ridge, stats)
    return problem.complete(found, state.carry)
