"""Minimisation of a smooth deviance with exact gradients, as one compiled loop.

One state machine serves three ends, so that the objective appears in the program once: BFGS with a
backtracking line search, the Hessian at the optimum by central differences of the exact gradient, and
a Newton polish when that Hessian shows that more can be gained. Each turn of the loop is one
evaluation of objective and gradient.

Convergence is judged by the decrement (1/2) g'H^-1 g, the expected further decrease of the deviance,
which does not depend on the scale of any parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..algebra.linalg import one_inverse
from ..compiling.precision import by_precision

#: status codes
CONVERGED, EVALUATION_LIMIT, LINE_SEARCH, NON_FINITE, NOT_MINIMUM = 0, 1, 2, 3, 4
#: no search ends with these: what it ended at cannot be an estimate (5 is taken in `_fit_design`)
EXACT, IMPOSSIBLE, COARSE = 6, 7, 8
MESSAGES = {
    CONVERGED: "converged",
    EVALUATION_LIMIT: "stopped at the limit on evaluations; raise Control(max_evaluations=...)",
    LINE_SEARCH: "the line search could not reduce the deviance further",
    NON_FINITE: "the deviance is not finite at the starting values",
    NOT_MINIMUM: "stopped at a point that is not a minimum",
    EXACT: "the response is fitted exactly by the fixed and random effects: no residual variance is left to estimate",
    COARSE: "random effects are so large beside the residuals that digits are missing: fit it alone, by lmer",
    IMPOSSIBLE: "a discrete log-likelihood above 0: the density overflowed on the way",
}

ARMIJO = 1e-4
MAX_BACKTRACKS = 25
#: central-difference step in standard errors (measured error 3e-8 relative in the Hessian)
DIFFERENCE_STEP = 1e-3
#: part of the curvature that may change within half a difference, about 1 in 1,000 of it for most; the error of the
#: whole one is of the order of its square. Beyond, shorter steps are taken, down to the second factor.
CHANGE, SHORTEST = 1e-2, 1e-3
#: times that they are shortened
SHORTENINGS = 2
#: curvature, in units of 1 / SE^2, below which a direction is noise and its change says nothing
NOISE = 1e-3
#: relative rounding error granted to the deviance
ROUNDING = 2e-13
#: the same two in single precision
SINGLE_STEP, SINGLE_ROUNDING = 3e-2, 2e-6

_SEARCH, _DIFFERENCE, _DONE = 0, 1, 2


class State(NamedTuple):
    """State of the minimiser; P parameters."""

    x: Array  # (P,) best accepted point
    f: Array
    g: Array  # (P,)
    inverse: Array  # (P, P) inverse Hessian approximation
    direction: Array  # (P,)
    step: Array
    slope: Array  # g'direction
    trial: Array  # (P,) next point to evaluate
    carry: Any  # what the objective carries from the accepted point
    hint: Any  # what the next evaluation starts from
    evaluations: Array
    search_evaluations: Array  # those not spent on the Hessian
    inner: Array  # PIRLS iterations in all
    backtracks: Array
    resets: Array
    polish: Array  # Newton polish steps taken
    phase: Array
    column: Array  # of the Hessian differences, 0 .. 2 P - 1
    spacing: Array  # (P,) difference steps
    shorter: Array  # times that they were shortened
    gradients: Array  # (2 P, P)
    hessian: Array  # (P, P), NaN until computed
    decrement: Array
    status: Array
    path: Array  # (limit, P + 2): evaluation's point, deviance, decrement


class Guide(NamedTuple):
    """What an objective that knows its own curvature adds to an evaluation; it takes the place of BFGS's updates."""

    hessian: Array  # (P, P) as reported at the end
    inverse: Array  # (P, P) positive definite: the metric of the next step
    jumping: Array  # whether to go to `jump` next and forget this point
    jump: Array  # (P,)


#: (x (P,), carry) -> (value, gradient (P,), carry, inner iterations, Guide or None)
Objective = Callable[[Array, Any], tuple[Array, Array, Any, Array, Guide | None]]


#: (x (P,), change (P,), evaluations so far) -> the point of a search after a step
Move = Callable[[Array, Array, Array], Array]


def straight(x: Array, change: Array, count: Array) -> Array:
    """The usual one."""
    return x + change


class Limits(NamedTuple):
    """Tolerance and limits, dynamic so that changing them compiles nothing."""

    tol: Array | np.ndarray | float
    max_evaluations: Array | np.ndarray | int
    hessian: Array | np.ndarray | bool


def as_arrays(limits: Limits, dtype: Any = float) -> Limits:
    """Limits of fixed types, as compiled programs take them."""
    tol, most, hessian = limits
    return Limits(np.asarray(tol, dtype), np.asarray(most, np.int32), np.asarray(hessian, bool))


def initial_state(x0: Array, inverse0: Array, carry0: Any, path_length: int) -> State:
    """State before the first evaluation, which is at x0."""
    P = x0.shape[0]
    zero, count = jnp.zeros((), x0.dtype), jnp.zeros((), jnp.int32)
    return State(
        x=x0,
        f=zero + jnp.inf,
        g=jnp.zeros_like(x0),
        inverse=inverse0,
        direction=jnp.zeros_like(x0),
        step=zero + 1.0,
        slope=zero,
        trial=x0,
        carry=carry0,
        hint=carry0,
        evaluations=count,
        search_evaluations=count,
        inner=count,
        backtracks=count,
        resets=count,
        polish=count,
        phase=count + _SEARCH,
        column=count,
        spacing=jnp.ones_like(x0),
        shorter=count,
        gradients=jnp.zeros((2 * P, P), x0.dtype),
        hessian=jnp.full((P, P), jnp.nan, x0.dtype),
        decrement=zero + jnp.inf,
        status=count + EVALUATION_LIMIT,
        path=jnp.full((path_length, P + 2), jnp.nan, x0.dtype),
    )


def advance(objective: Objective, s: State, inverse0: Array, limits: Limits, move: Move = straight) -> State:
    """One evaluation, and what follows from it."""
    f, g, carry, inner, guide = jax.lax.optimization_barrier(objective(s.trial, s.hint))
    finite = jnp.isfinite(f) & jnp.isfinite(g).all()
    s = s._replace(evaluations=s.evaluations + 1, inner=s.inner + inner)

    def search() -> State:
        after = _search(s, f, g, carry, finite, inverse0, limits, guide, move)
        if guide is None:
            return after
        row = jnp.concatenate([s.trial, jnp.stack([f, jnp.full_like(f, jnp.inf)])])
        jumped = s._replace(
            trial=guide.jump,
            carry=carry,
            hint=carry,
            search_evaluations=s.search_evaluations + 1,
            path=s.path.at[s.search_evaluations].set(row, mode="drop"),
        )
        return jax.tree.map(lambda a, b: jnp.where(guide.jumping & finite, a, b), jumped, after)

    if guide is not None:  # it brings its own Hessian: no differences
        return search()
    return jax.lax.cond(s.phase == _SEARCH, search, lambda: _difference(s, g, carry, finite, limits))


def _search(
    s: State,
    f: Array,
    g: Array,
    carry: Any,
    finite: Array,
    inverse0: Array,
    limits: Limits,
    guide: Guide | None,
    move: Move,
) -> State:
    first = ~jnp.isfinite(s.f)
    slack = by_precision(ROUNDING, SINGLE_ROUNDING, s.x.dtype) * (1.0 + jnp.abs(s.f))
    moved = s.trial - s.x
    armijo = f <= s.f + ARMIJO * s.step * s.slope
    # near the optimum the deviance is flat to rounding: then the slope must have shrunk (Hager & Zhang 2005)
    flat = (f <= s.f + slack) & (jnp.abs(g @ s.direction) <= 0.9 * jnp.abs(s.slope))
    accept = finite & (first | armijo | flat)

    # accepted: new metric, new direction
    if guide is None:
        updated, usable = _bfgs(s.inverse, moved, g - s.g)
        usable &= ~first
    else:
        updated, usable = guide.inverse, jnp.isfinite(guide.inverse).all()
    inverse = jnp.where(accept & usable, updated, s.inverse)
    direction = -inverse @ g
    slope = g @ direction
    decrement = -0.5 * slope
    converged = decrement < limits.tol

    # rejected: shorter step by quadratic interpolation, or a fresh metric
    interpolated = -0.5 * s.slope * s.step**2 / (f - s.f - s.slope * s.step)
    shorter = jnp.where(
        finite & jnp.isfinite(interpolated), jnp.clip(interpolated, 0.1 * s.step, 0.5 * s.step), 0.2 * s.step
    )
    exhausted = s.backtracks + 1 >= MAX_BACKTRACKS
    reset = exhausted & (s.resets < 1) & ~first
    direction0 = -inverse0 @ s.g

    new_f, new_g = jnp.where(accept, f, s.f), jnp.where(accept, g, s.g)
    x = jnp.where(accept, s.trial, s.x)
    direction = jnp.where(accept, direction, jnp.where(reset, direction0, s.direction))
    slope = jnp.where(accept, slope, jnp.where(reset, s.g @ direction0, s.slope))
    step = jnp.where(accept | reset, 1.0, shorter)
    inverse = jnp.where(reset, inverse0, inverse)
    decrement = jnp.where(accept, decrement, s.decrement)
    # a line search that fails where next to nothing can be gained has converged to rounding
    stuck = ~accept & ((exhausted & ~reset) | first)
    at_rounding = stuck & (s.decrement < slack)
    done_search = (accept & converged) | at_rounding
    count = s.search_evaluations + 1
    out_of_time = count >= limits.max_evaluations
    status = jnp.where(
        done_search,
        CONVERGED,
        jnp.where(stuck, jnp.where(first, NON_FINITE, LINE_SEARCH), EVALUATION_LIMIT),
    )
    stop = done_search | stuck | out_of_time
    to_difference = stop & limits.hessian & jnp.isfinite(new_f) if guide is None else jnp.zeros((), bool)
    phase = jnp.where(stop, jnp.where(to_difference, _DIFFERENCE, _DONE), _SEARCH)

    step_size = by_precision(DIFFERENCE_STEP, SINGLE_STEP, s.x.dtype)
    spacing = step_size * jnp.sqrt(2.0 * jnp.maximum(jnp.diagonal(inverse), 1e-12))
    trial = jnp.where(to_difference, x.at[0].add(spacing[0]), move(x, step * direction, count))
    row = jnp.concatenate([s.trial, jnp.stack([f, jnp.where(accept, decrement, jnp.inf)])])
    kept = jax.tree.map(lambda new, old: jnp.where(accept, new, old), carry, s.carry)
    return s._replace(
        x=x,
        f=new_f,
        g=new_g,
        inverse=inverse,
        hessian=s.hessian if guide is None else jnp.where(accept, guide.hessian, s.hessian),
        direction=direction,
        step=step,
        slope=slope,
        trial=trial,
        carry=kept,
        hint=kept,
        search_evaluations=count,
        backtracks=jnp.where(accept | reset, 0, s.backtracks + 1).astype(jnp.int32),
        resets=s.resets + reset,
        phase=phase.astype(jnp.int32),
        column=jnp.zeros_like(s.column),
        spacing=jnp.where(to_difference, spacing, s.spacing),
        decrement=decrement,
        status=status.astype(jnp.int32),
        path=s.path.at[s.search_evaluations].set(row, mode="drop"),
    )


def _bfgs(inverse: Array, moved: Array, change: Array) -> tuple[Array, Array]:
    """Updated inverse Hessian, and whether the step showed positive curvature (Nocedal & Wright 2006, eq. 6.17)."""
    curvature = moved @ change
    usable = curvature > 1e-12 * jnp.sqrt((moved @ moved) * (change @ change))
    rho = 1.0 / jnp.where(usable, curvature, 1.0)
    Hy = inverse @ change
    updated = (
        inverse
        + ((1.0 + rho * (change @ Hy)) * rho) * jnp.outer(moved, moved)
        - rho * (jnp.outer(Hy, moved) + jnp.outer(moved, Hy))
    )
    return updated, usable


def _difference(s: State, g: Array, carry: Any, finite: Array, limits: Limits) -> State:
    P = s.x.shape[0]
    column = s.column + 1
    # after x + h the modes at x - h are known by reflection to second order in h
    reflect = (column % 2 == 1) & finite
    hint = jax.tree.map(lambda at, plus: jnp.where(reflect, 2 * at - plus, at), s.carry, carry)
    j = jnp.minimum(column // 2, P - 1)
    sign = jnp.where(column % 2 == 0, 1.0, -1.0)
    s = s._replace(
        gradients=s.gradients.at[s.column].set(jnp.where(finite, g, jnp.nan)),
        column=column,
        hint=hint,
        trial=s.x + sign * s.spacing * (jnp.arange(P) == j),
    )
    return jax.lax.cond(column >= 2 * P, lambda: _judge(s, limits), lambda: s)


def _judge(s: State, limits: Limits) -> State:
    """The Hessian is complete: done, or again with shorter steps, or one more Newton step."""
    H = (s.gradients[0::2] - s.gradients[1::2]) / (2.0 * s.spacing[:, None])
    H = 0.5 * (H + H.T)
    change = jnp.zeros_like(s.x)  # in single precision it is rounding
    if s.x.dtype != jnp.float32:
        relative = DIFFERENCE_STEP / s.spacing
        change = change_of_curvature(s.gradients[0::2], s.g, s.gradients[1::2], H, s.spacing, relative)
    shorten = (change > CHANGE).any() & (s.shorter < SHORTENINGS)
    shortened = s.spacing * shortening(change)
    scale = jnp.sqrt(jnp.maximum(jnp.abs(jnp.diagonal(H)), 1e-300))
    units = scale[:, None] * scale[None, :]
    inverse = one_inverse(H / units)[0] / units
    positive = jnp.isfinite(inverse).all()
    direction = -inverse @ s.g
    slope = s.g @ direction
    decrement = jnp.where(positive, -0.5 * slope, s.decrement)
    # the true Hessian may promise a gain that BFGS's approximation did not see
    in_time = (s.status != EVALUATION_LIMIT) & (s.search_evaluations < limits.max_evaluations)
    polish = positive & (decrement > limits.tol) & (s.polish < 3) & in_time & ~shorten
    enough = positive & (decrement <= limits.tol) & (s.status != EVALUATION_LIMIT)
    return s._replace(
        trial=jnp.where(shorten, s.x.at[0].add(shortened[0]), jnp.where(polish, s.x + direction, s.trial)),
        hint=jax.tree.map(lambda at, now: jnp.where(shorten, at, now), s.carry, s.hint),
        spacing=jnp.where(shorten, shortened, s.spacing),
        shorter=s.shorter + shorten,
        column=jnp.where(shorten, 0, s.column).astype(jnp.int32),
        hessian=H,
        inverse=jnp.where(positive, inverse, s.inverse),
        direction=jnp.where(polish, direction, s.direction),
        slope=jnp.where(polish, slope, s.slope),
        step=jnp.where(polish, 1.0, s.step),
        backtracks=jnp.where(polish, 0, s.backtracks).astype(jnp.int32),
        polish=s.polish + polish,
        decrement=decrement,
        phase=jnp.where(shorten, _DIFFERENCE, jnp.where(polish, _SEARCH, _DONE)).astype(jnp.int32),
        status=jnp.where(enough, CONVERGED, s.status).astype(jnp.int32),
    )


def change_of_curvature(after: Any, at: Any, before: Any, H: Any, spacing: Any, relative: Any) -> Any:
    """(P,) change of the curvature from one half of each central difference to the other, as a part of it.

    Args:
        after, before: (P, P) gradients at x +- spacing, a row for each coordinate. at: (P,) that at x. H: (P, P) their
            differences. spacing: (P,). relative: (P,) `DIFFERENCE_STEP` of a standard error over spacing, in what are
            the coordinates' units.
    """
    lib = jnp if isinstance(H, Array) else np
    bend = (after - 2.0 * at + before) / spacing[:, None]
    size = lib.sqrt(lib.maximum(lib.abs(lib.diagonal(H)), 2.0 * NOISE * relative**2))
    return (lib.abs(bend) / (2.0 * size[:, None] * size)).max(axis=1)


def shortening(change: Any) -> Any:
    """(P,) factors of the differences' steps after a change of the curvature within them, 1 where it is small."""
    lib = jnp if isinstance(change, Array) else np
    return lib.where(change > CHANGE, lib.clip(0.1 * CHANGE / lib.maximum(change, CHANGE), SHORTEST, 1.0), 1.0)


def minimise(
    objective: Objective,
    x0: Array,
    inverse0: Array,
    carry0: Any,
    limits: Limits,
    path_length: int = 0,
    move: Move = straight,
) -> State:
    """Minimise from x0 with starting metric inverse0, in one `lax.while_loop`.

    Args:
        objective: see `Objective`.
        x0: (P,). inverse0: (P, P) positive definite guess of the inverse Hessian.
        carry0: pytree handed to the first evaluation; later ones get that of the accepted point.
        limits: tolerance on the decrement, limit on search evaluations, whether to end with the Hessian.
        path_length: rows of the recorded path.
        move: where a step leads.
    """
    start = initial_state(x0, inverse0, carry0, path_length)
    return jax.lax.while_loop(running, lambda s: advance(objective, s, inverse0, limits, move), start)


def running(s: State) -> Array:
    """Whether the search goes on."""
    return s.phase != _DONE


class Found(NamedTuple):
    """End of a search."""

    x: Any  # (P,)
    g: Any  # (P,)
    inverse: Any  # (P, P)
    hessian: Any  # (P, P)
    carry: Any
    path: Any
    numbers: Any  # f, decrement, status, evaluations, search evaluations, inner iterations

    @property
    def f(self) -> float:
        """Deviance."""
        return float(self.numbers[0])

    @property
    def decrement(self) -> float:
        """Expected further decrease of the deviance."""
        return float(self.numbers[1])

    @property
    def status(self) -> int:
        """Status code."""
        return int(self.numbers[2])

    @property
    def evaluations(self) -> int:
        """Of the objective, in all."""
        return int(self.numbers[3])

    @property
    def search_evaluations(self) -> int:
        """Those not spent on the Hessian."""
        return int(self.numbers[4])

    @property
    def inner(self) -> int:
        """PIRLS iterations in all evaluations."""
        return int(self.numbers[5])


def found(s: State) -> Found:
    """What the host needs of a final state."""
    numbers = (s.f, s.decrement, s.status, s.evaluations, s.search_evaluations, s.inner)
    packed = jnp.stack([jnp.asarray(v, s.x.dtype) for v in numbers])
    return Found(s.x, s.g, s.inverse, s.hessian, s.carry, s.path, packed)


def pack(out: Found) -> Array:
    """Everything the host needs as one array: each separate transfer costs as much as a small fit's evaluation."""
    return jnp.concatenate([jnp.ravel(leaf).astype(out.x.dtype) for leaf in jax.tree.leaves(out)])


def unpack(packed: np.ndarray, P: int, path_length: int, carry: Any) -> Found:
    """Inverse of `pack`; `carry` has the structure, shapes and types of the carry."""
    leaves, tree = jax.tree.flatten(carry)
    shapes = [(P,), (P,), (P, P), (P, P), *[leaf.shape for leaf in leaves], (path_length, P + 2), (6,)]
    parts, at = [], 0
    for shape in shapes:
        size = prod(shape)
        parts.append(packed[at : at + size].reshape(shape))
        at += size
    x, gradient, hessian, metric, *packed_carry, path, counts = parts
    typed = [part.astype(leaf.dtype, copy=False) for part, leaf in zip(packed_carry, leaves, strict=True)]
    return Found(x, gradient, hessian, metric, jax.tree.unflatten(tree, typed), path, counts)


def is_running(s: State) -> bool:
    """For a driver that calls `advance` from the host."""
    return bool(running(s))
