"""Profile likelihoods of a model's parameters and of any function of them, by path following with exact gradients.

The profile of a function g at a signed root zeta is the point where g is smallest (zeta < 0) or largest (zeta > 0)
among all points whose deviance is zeta^2 above its minimum. So a point solves

    grad D(x) = rho grad g(x),    D(x) = D(estimates) + zeta^2,

by Newton's method from the last point of its path; its residual is known, so an end of an interval is one to rounding,
and none comes from interpolation. Where that deviance is not reached before a boundary (a variance of 0, a
correlation of 1), the rest of the path solves for given values of g instead, up to the boundary.

Sources: Bates & Watts 1988, Nonlinear Regression Analysis, section 6.1; Bates et al. 2015, J. Stat. Softw. 67(1),
section 5.1 (signed root, scales of the random effects); Venzon & Moolgavkar 1988, Appl. Stat. 37(1) (the equations).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from .._arguments import array, checked, text, texts
from .._errors import NotSupportedError
from ..compiling.entry import entry
from ..fit.glmm import GeneralisedProblem
from ..fit.problem import estimate
from ..fit.separation import TOUCHES
from ..model.covariance import numbered
from ..model.design import Term
from ..model.parameters import Layout, Point
from ..report.table import Block, Shown, of_frame
from .likelihood import LANES, Likelihood

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..results import MixedModel

#: zeta of the first point on either side, and between points.
STEP = 0.5
#: Corrections of one point, and after how many of them its Hessian is computed again.
MAX_CORRECTIONS, RENEW = 16, 4
#: A point is good where the deviance is this near to wanted, relative to 1 + |deviance| / 1e4, and the expected
#: further move of the other parameters costs this little.
TOLERANCE = 1e-9
#: Longest move of one correction, in standard errors.
LONGEST = 1.5
#: Values of g at which the rest of a path to a boundary is computed, as parts of the way.
TO_BOUNDARY = (0.25, 0.5, 0.75, 0.9, 1.0)
#: A rise of the deviance that is as good as any larger one, or one without end.
FAR_ABOVE = 1e6


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Focal:
    """One profiled quantity: g(parameters) as it is followed, and how it is shown. Hashable: it names a program."""

    name: str
    g: Callable[[Point], Array]
    shown: Callable[[Any], Any] = _same
    #: boundaries of g: below, above
    lower: float = -np.inf
    upper: float = np.inf


@dataclass(frozen=True)
class _Sd:
    term: Term
    a: int

    def __call__(self, q: Point) -> Array:
        return q.sigma * self.term.structure.followed_sd(q.theta[self.term.theta], self.a)


@dataclass(frozen=True)
class _Correlation:
    term: Term
    a: int
    b: int

    def __call__(self, q: Point) -> Array:
        return self.term.structure.followed_correlation(q.theta[self.term.theta], self.a, self.b)


@dataclass(frozen=True)
class _Scale:
    """log sigma, or the log of dispersion j."""

    j: int | None = None

    def __call__(self, q: Point) -> Array:
        return jnp.log(q.sigma if self.j is None else q.phi[self.j])


@dataclass(frozen=True)
class _Beta:
    j: int

    def __call__(self, q: Point) -> Array:
        return q.beta[self.j]


def standard_focals(model: MixedModel) -> list[Focal]:
    """lme4's parameters: standard deviations and correlations term by term, sigma, dispersions, fixed effects."""
    out: list[Focal] = []
    groups = numbered(labels.group for labels in model._data.terms)
    for term, labels, group in zip(model._design.terms, model._data.terms, groups, strict=True):
        structure = term.structure
        for (a, b), name in zip(structure.entries(), structure.natural_names(group, labels.names), strict=True):
            if a == b:
                out.append(Focal(name, _Sd(term, a), np.abs, 0.0))
            else:
                out.append(Focal(name, _Correlation(term, a, b), *structure.shown_correlation()))
    if model.is_linear:
        out.append(Focal("sigma", _Scale(), np.exp))
    out += [Focal(name, _Scale(j), np.exp) for j, name in enumerate(model.family.phi_names)]
    out += [Focal(name, _Beta(j)) for j, name in enumerate(model._data.x_names)]
    return out


@partial(jax.jit, static_argnames=("functions", "layout"))
def _evaluate(x: Array, functions: tuple[Callable[[Point], Array], ...], layout: Layout) -> tuple[Array, Array, Array]:
    """Values (L, F), gradients (L, F, P), Hessians (L, F, P, P) at x (L, P)."""

    def values(v: Array) -> Array:
        point = layout.natural(v)
        return jnp.stack([jnp.asarray(g(point), v.dtype).reshape(()) for g in functions])

    def all_three(v: Array) -> tuple[Array, Array, Array]:
        return values(v), jax.jacfwd(values)(v), jax.jacfwd(jax.jacfwd(values))(v)

    return jax.vmap(all_three)(x)


class _Functions:
    """The focal quantities at many points, by one program."""

    def __init__(self, likelihood: Likelihood, focals: Sequence[Focal]) -> None:
        self._functions, self._layout = tuple(f.g for f in focals), likelihood.layout

    @entry
    def all(self, x: np.ndarray) -> list[np.ndarray]:
        """What `_evaluate` returns, for any number of points."""
        parts = []
        for start in range(0, len(x), LANES):
            own = x[start : start + LANES]
            filled = np.concatenate([own, np.repeat(own[-1:], LANES - len(own), axis=0)])
            found = _evaluate(filled, self._functions, self._layout)
            parts.append([np.asarray(a)[: len(own)] for a in found])
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def __call__(self, x: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """g (L,), gradients (L, P), Hessians (L, P, P) of function which[l] at x[l]."""
        g, dg, d2g = self.all(x)
        lanes = np.arange(len(x))
        return g[lanes, which], dg[lanes, which], d2g[lanes, which]


@dataclass
class _Lanes:
    """Paths in progress; coordinates z with x = estimates + root z, in which D is about |z|^2 above its minimum."""

    which: np.ndarray  # (L,) focal quantity
    side: np.ndarray  # (L,) -1 or 1
    z: np.ndarray  # (L, P) the last good points
    zeta: np.ndarray  # (L,) theirs
    before: np.ndarray  # (L, P) the points before those
    zeta_before: np.ndarray
    alive: np.ndarray  # (L,)


class Tracer:
    """Solves for points of profiles, many at a time."""

    def __init__(self, model: MixedModel, focals: Sequence[Focal]) -> None:
        self.likelihood = Likelihood(model)
        self.focals = focals
        self.x = self.likelihood.x
        self.functions = _Functions(self.likelihood, focals)
        H = self.likelihood.hessian(self.x[None])[0]
        values, vectors = np.linalg.eigh(H)
        self.root = (
            np.sqrt(2.0) * self.likelihood.root @ vectors / np.sqrt(np.maximum(values, 1e-4 * max(values[-1], 1e-300)))
        )
        # the estimates to rounding, so that zeta^2 has no linear part
        for _ in range(3):
            f, g = self.likelihood(self.x[None])
            self.x = self.x - 0.5 * self.root @ (self.root.T @ g[0])
        self.minimum = float(self.likelihood(self.x[None])[0][0])
        self.P = self.x.size
        self.tolerance = TOLERANCE * (1.0 + abs(self.minimum) / 1e4)

    def at(self, z: np.ndarray) -> np.ndarray:
        return np.asarray(self.x + z @ self.root.T)

    def start(self) -> _Lanes:
        F = len(self.focals)
        which, side = np.repeat(np.arange(F), 2), np.tile([-1.0, 1.0], F)
        zero = np.zeros((2 * F, self.P))
        g, dg, _ = self.functions(self.at(zero), which)
        direction = dg @ self.root
        size = np.linalg.norm(direction, axis=1)
        alive = np.isfinite(g) & np.isfinite(size) & (size > 1e-12)
        direction = side[:, None] * direction / np.where(size > 0, size, 1.0)[:, None]
        # a first point "before" the estimates makes the first prediction the quadratic one
        return _Lanes(which, side, zero, np.zeros(2 * F), -direction, -np.ones(2 * F), alive)

    def solve(
        self, z: np.ndarray, which: np.ndarray, target: np.ndarray, by_value: bool = False
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points z (L, P) moved to D = minimum + target^2, or to g = target if `by_value`; which are good; D there."""
        z, L = z.copy(), len(z)
        good, last = np.zeros(L, bool), np.full(L, np.nan)
        open_ = np.arange(L)
        H = np.zeros((L, self.P, self.P))
        for iteration in range(MAX_CORRECTIONS):
            if not open_.size:
                break
            if iteration % RENEW == 0:
                H[open_] = self.likelihood.hessian(self.at(z[open_]), self.root)
            f, gradient = self.likelihood(self.at(z[open_]))
            g, dg, d2g = self.functions(self.at(z[open_]), which[open_])
            gradient, dg = gradient @ self.root, dg @ self.root
            d2g = self.root.T @ d2g @ self.root
            stay = []
            for row, lane in enumerate(open_):
                wanted = (target[lane] - g[row]) if by_value else (self.minimum + target[lane] ** 2 - f[row])
                along = dg[row] if by_value else gradient[row]
                move, cost = _correction(gradient[row], H[lane], dg[row], d2g[row], along, wanted)
                close = abs(wanted) < (1e-9 * (1.0 + abs(target[lane])) if by_value else self.tolerance)
                last[lane] = f[row]
                if close and cost < self.tolerance:
                    good[lane] = True
                elif np.isfinite(move).all():
                    length = float(np.linalg.norm(move))
                    z[lane] += move * min(1.0, LONGEST / max(length, 1e-300))
                    stay.append(lane)
            open_ = np.array(stay, int)
        return z, good, last


def _correction(
    gradient: np.ndarray, H: np.ndarray, dg: np.ndarray, d2g: np.ndarray, along: np.ndarray, wanted: float
) -> tuple[np.ndarray, float]:
    """Newton's move for grad D = rho grad g and along'move = wanted, and the deviance that its tangential part gains.

    The Hessian of the Lagrangian is made positive definite across grad g: minima, not saddles.
    """
    nothing = np.full_like(gradient, np.nan), np.inf
    size = np.linalg.norm(dg)
    if not (np.isfinite(gradient).all() and np.isfinite(H).all() and size > 1e-12 and np.isfinite(d2g).all()):
        return nothing
    n = dg / size
    rho = float(gradient @ n) / size
    B = H - rho * d2g
    across = np.linalg.svd(n[None])[2][1:].T  # (P, P - 1)
    values, vectors = np.linalg.eigh(across.T @ B @ across)
    values = np.maximum(np.abs(values), 1e-3)
    basis = across @ vectors
    residual = basis.T @ gradient  # that of grad D - rho grad g: grad g is along n
    first = -basis @ (residual / values)
    second = -basis @ ((basis.T @ (B @ n)) / values)
    slope = float(along @ (n + second))
    if abs(slope) < 1e-12:
        return nothing
    a = (wanted - float(along @ first)) / slope
    return first + a * (n + second), float(0.5 * residual @ (residual / values))


@checked(name=text, zeta=array, value=array, which=texts)
@dataclass(frozen=True, repr=False)
class Profile(Shown):
    """Profiles as returned by `MixedModel.profile`.

    Attributes:
        frame: tidy points: ".par" the profiled quantity, ".zeta" the signed root of the deviance's rise, ".focal" its
            value, ".deviance", and the value of every profiled quantity at the point.
        names: of the profiled quantities. estimates: by name.
        limit: largest |zeta|. evaluations: of deviance and gradient.
    """

    frame: pd.DataFrame
    names: tuple[str, ...]
    estimates: pd.Series
    limit: float
    evaluations: int
    _tracer: Tracer = field(compare=False)
    _points: dict[str, np.ndarray] = field(compare=False)
    _boundary: dict[str, list[float]] = field(compare=False)

    def confint(self, level: float = 0.95) -> pd.DataFrame:
        """Profile intervals by quantity, columns as R's; at an end the deviance has risen by chi2_1's quantile.

        An end that the deviance does not exclude is the boundary (a standard deviation of 0, a correlation of +-1),
        infinite for a coefficient that runs off (`MixedModel.separated`), or NaN where the path could not be followed.
        """
        t = NormalDist().inv_cdf(0.5 + 0.5 * level)
        if t > self.limit + 1e-9:
            raise ValueError(f"the profile reaches {self.limit:.3g} standard errors, level {level} needs {t:.3g}")
        return _ends(self, t, level)

    @cached_property
    def _splines(self) -> dict[str, tuple[Any, Any]]:
        from scipy.interpolate import PchipInterpolator

        out = {}
        for name in self.names:
            own = self.frame[self.frame[".par"] == name]
            zeta, focal = own[".zeta"].to_numpy(), own[".focal"].to_numpy()
            order = np.argsort(focal)
            focal, zeta = focal[order], np.maximum.accumulate(zeta[order])
            keep = np.concatenate([[True], (np.diff(focal) > 0) & (np.diff(zeta) > 0)])
            if keep.sum() > 1:
                out[name] = PchipInterpolator(focal[keep], zeta[keep]), PchipInterpolator(zeta[keep], focal[keep])
        return out

    def zeta(self, name: str, value: Any) -> np.ndarray:
        """Signed root at values of a quantity, by a monotone spline; NaN outside the profile."""
        return self._spline(name, 0, value)

    def value(self, name: str, zeta: Any) -> np.ndarray:
        """The inverse of `zeta`."""
        return self._spline(name, 1, zeta)

    def _spline(self, name: str, which: int, at: Any) -> np.ndarray:
        if name not in self._splines:
            raise ValueError(f"no profile of {name!r}; there are: {', '.join(self._splines)}")
        return np.asarray(self._splines[name][which](np.asarray(at, float), extrapolate=False))

    def plot(self, kind: str = "zeta", which: str | Sequence[str] | None = None) -> tuple[Figure, pd.DataFrame]:
        """Pictures of the profiles.

        Args:
            kind: "zeta", signed roots with intervals marked: a straight line is a quadratic deviance; "density", the
                densities they imply; "pairs", joint regions of all pairs with profile traces.
            which: names to show.

        Returns:
            Figure, and the data in it.
        """
        from ..report.profile_plots import plot

        return plot(self, kind, which)

    def _report(self, page: bool) -> Sequence[Block]:
        title = (
            f"Profiles of {len(self.names)} quantities to |zeta| = {self.limit:.3g} ({len(self.frame)} points, "
            f"{self.evaluations} evaluations)"
        )
        return [title, "95 % intervals:", of_frame(self.confint(), ".5g")]


def profile(
    model: MixedModel,
    which: str | Sequence[str] | Mapping[str, Callable[[Point], Array]] | None = None,
    limit: float | None = None,
) -> Profile:
    """Profile likelihood of parameters, or of any scalar functions of them.

    Args:
        which: names (as in the rows of the result: ``sd_(Intercept)|herd``, ``cor_b.a|g``, ``sigma``, fixed
            effects), "theta_" or "beta_" for all of a kind, None for all; or name -> function, which
            receives theta, beta, sigma, phi and cov (per term) as JAX arrays and returns a scalar:
            ``{"icc": lambda q: q.cov[0][0, 0] / (q.cov[0][0, 0] + q.sigma**2)}``.
        limit: signed root of the deviance's rise to follow each path to; default 3.

    Returns:
        `Profile`: tidy `frame`, `confint(level)`, splines both ways. A REML fit is profiled by ML.

    Source: Bates et al. 2015, J. Stat. Softw. 67(1), section 5.1.
    """
    return traced(model, which, limit)


def traced(
    model: MixedModel,
    which: str | Sequence[str] | Mapping[str, Callable[[Point], Array]] | None = None,
    limit: float | None = None,
    step: float = STEP,
) -> Profile:
    """`profile` with points `step` apart in zeta."""
    if not model.is_linear and model.nAGQ == 0:
        raise NotSupportedError("nAGQ = 0 has no likelihood in (theta, beta) to profile; fit with nAGQ = 1")
    if model.at_limit:
        raise NotSupportedError(
            f"{', '.join(model.phi.index)} is infinite, on the edge of the model, where no path starts; profile the "
            f"fit with family={model.at_limit!r}, which has the same estimates"
        )
    model = model.refit_ml()
    standard = standard_focals(model)
    if isinstance(which, Mapping):
        chosen = [Focal(str(name), g) for name, g in which.items()]
    elif which is None:
        chosen = standard
    else:
        wanted = [which] if isinstance(which, str) else list(which)
        by_name = {f.name: f for f in standard}
        random = sum(len(term.structure.entries()) for term in model._design.terms)
        groups = {"theta_": standard[: random + model.is_linear]}
        groups["beta_"] = [by_name[n] for n in model._data.x_names]
        for name in wanted:
            if name not in by_name and name not in groups:
                raise ValueError(f"no parameter {name!r} to profile; there are: {', '.join([*by_name, *groups])}")
        chosen = [f for name in wanted for f in groups.get(name, [by_name.get(name)]) if f is not None]
    limit = 3.0 if limit is None else float(limit)
    if not 0.0 < limit <= 10.0:
        raise ValueError(f"limit must be positive and at most 10, got {limit!r}")
    tracer = Tracer(model, chosen)
    return _trace(tracer, limit, step)


_Found = list[tuple[int, float, np.ndarray, float]]  # focal quantity, zeta, z, deviance


def _trace(tracer: Tracer, limit: float, step: float) -> Profile:
    """Follow all paths out to the limit, then those that a boundary stopped up to it."""
    lanes = tracer.start()
    found: _Found = [(i, 0.0, np.zeros(tracer.P), tracer.minimum) for i in range(len(tracer.focals))]
    steps = max(1, int(np.ceil(limit / step - 1e-9)))
    for k in range(1, steps + 1):
        _advance(tracer, lanes, limit * k / steps, found)
    boundary = {f.name: [np.nan, np.nan] for f in tracer.focals}
    for lane in np.flatnonzero(~lanes.alive):
        i, side = int(lanes.which[lane]), float(lanes.side[lane])
        focal = tracer.focals[i]
        edge = focal.lower if side < 0 else focal.upper
        if np.isfinite(edge) and _to_boundary(tracer, lanes, int(lane), edge, found):
            boundary[focal.name][int(side > 0)] = float(focal.shown(edge))
    return _collect(tracer, limit, found, boundary)


def _advance(tracer: Tracer, lanes: _Lanes, t: float, found: _Found) -> None:
    """All living paths to zeta = t; one that cannot take the step in one takes it by halves."""
    open_ = np.flatnonzero(lanes.alive)
    for attempt in range(3):
        if not open_.size:
            return
        here = lanes.zeta[open_]
        goals = here + (t - here) * (0.5 if attempt else 1.0)
        stretch = (goals - here) / (here - lanes.zeta_before[open_])
        z = lanes.z[open_] + stretch[:, None] * (lanes.z[open_] - lanes.before[open_])
        z, good, deviance = tracer.solve(z, lanes.which[open_], goals)
        for row in np.flatnonzero(good & _moved_on(tracer, lanes, open_, z)):
            lane = open_[row]
            lanes.before[lane], lanes.zeta_before[lane] = lanes.z[lane], lanes.zeta[lane]
            lanes.z[lane], lanes.zeta[lane] = z[row], goals[row]
            found.append((int(lanes.which[lane]), lanes.side[lane] * goals[row], z[row], float(deviance[row])))
        open_ = open_[lanes.zeta[open_] < t - 1e-12]
    lanes.alive[open_] = False


def _to_boundary(tracer: Tracer, lanes: _Lanes, lane: int, edge: float, found: _Found) -> bool:
    """Points between the end of a path and its boundary; whether that was reached."""
    z, i = lanes.z[lane], np.array([lanes.which[lane]])
    start = float(tracer.functions(tracer.at(z[None]), i)[0][0])
    for part in TO_BOUNDARY:
        value = np.array([start + part * (edge - start)])
        moved, good, deviance = tracer.solve(z[None], i, value, by_value=True)
        if not good[0]:
            return False
        z = moved[0]
        rise = float(np.sqrt(np.maximum(deviance[0] - tracer.minimum, 0.0)))
        if rise > lanes.zeta[lane] + 1e-8:
            found.append((int(i[0]), lanes.side[lane] * rise, z, float(deviance[0])))
    return True


def _moved_on(tracer: Tracer, lanes: _Lanes, open_: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Whether the solutions lie further along their paths, on this side of the boundary."""
    which = lanes.which[open_]
    new = tracer.functions(tracer.at(z), which)[0]
    old = tracer.functions(tracer.at(lanes.z[open_]), which)[0]
    lower = np.array([tracer.focals[i].lower for i in which])
    upper = np.array([tracer.focals[i].upper for i in which])
    with np.errstate(invalid="ignore"):
        return np.asarray((lanes.side[open_] * (new - old) > 0.0) & (new > lower) & (new < upper))


def _collect(
    tracer: Tracer,
    limit: float,
    found: _Found,
    boundary: dict[str, list[float]],
) -> Profile:
    names = tuple(f.name for f in tracer.focals)
    z = np.stack([p[2] for p in found])
    which = np.array([p[0] for p in found])
    values = tracer.functions.all(tracer.at(z))[0]
    shown = np.stack([np.asarray(f.shown(values[:, i])) for i, f in enumerate(tracer.focals)], axis=1)
    frame = pd.DataFrame(
        {
            ".par": np.array(names, dtype=object)[which],
            ".zeta": [p[1] for p in found],
            ".focal": shown[np.arange(len(found)), which],
            ".deviance": [p[3] for p in found],
            **{name: shown[:, i] for i, name in enumerate(names)},
        }
    )
    order = np.lexsort([frame[".zeta"].to_numpy(), which])
    frame, z = frame.iloc[order].reset_index(drop=True), z[order]
    points = {name: z[(frame[".par"] == name).to_numpy()] for name in names}
    estimates = frame[frame[".zeta"] == 0.0].set_index(".par")[".focal"].reindex(names).rename("estimate")
    return Profile(frame, names, estimates, limit, tracer.likelihood.evaluations, tracer, points, boundary)


@entry
def _ends_of_run_off(model: MixedModel, j: int, t: float) -> list[float]:
    """Where the deviance of a separated response has risen by t^2 above its limit, by fits with coefficient j held.

    The way on which the limit is approached is open. On the other the coefficient is bounded by what the separated rows
    say, or not at all, if other coefficients can run off in its place.
    """
    from scipy.optimize import brentq

    e, problem = model._estimates, model._problem
    assert isinstance(problem, GeneralisedProblem) and e.separation is not None
    design, x = model._design, np.asarray(model._design.X)[:, j]
    changes: dict[str, Any] = {"X": np.delete(np.asarray(design.X), j, axis=1)}
    rest = GeneralisedProblem(replace(design, **changes), problem.family, problem.nAGQ, problem.hessian)
    start = {"theta": e.theta, "phi": e.phi}
    spent: dict[float, float] = {}

    def above(value: float) -> float:
        if value not in spent:
            held = estimate(rest.with_rows("offset", np.asarray(design.offset) + value * x), start)
            rise = held.objective - e.objective - t**2
            spent[value] = rise if np.isfinite(rise) else FAR_ABOVE
        return min(spent[value], FAR_ABOVE)

    towards, unit, centre = np.linalg.solve(e.separation.A, e.separation.direction), 1.0 / np.abs(x).max(), e.beta[j]
    out = []
    for side in (-1.0, 1.0):
        near, way = centre, unit
        if side * towards[j] <= TOUCHES * np.abs(towards).max():
            while way < 4.0 * abs(centre) + 1e3 * unit and above(centre + side * way) < 0.0:
                near, way = centre + side * way, 2.0 * way
            if above(centre + side * way) >= 0.0:
                out.append(float(brentq(above, near, centre + side * way, xtol=1e-9 * unit, rtol=1e-9)))
                continue
        out.append(side * np.inf)
    return out


def _ends(made: Profile, t: float, level: float) -> pd.DataFrame:
    """Both ends of all intervals: from the nearest points of the profile, solved for exactly."""
    tracer = made._tracer
    starts, which, keys = [], [], []
    out = {name: [np.nan, np.nan] for name in made.names}
    for i, name in enumerate(made.names):
        own = made.frame[made.frame[".par"] == name]
        zeta, z = own[".zeta"].to_numpy(), made._points[name]
        for s, side in enumerate((-1.0, 1.0)):
            reached = side * zeta >= t - 1e-9
            if not reached.any():
                out[name][s] = made._boundary[name][s]
                continue
            j = int(np.argmin(np.where(reached, side * zeta, np.inf)))
            inner = np.where(side * zeta < t, side * zeta, -np.inf)
            a = int(np.argmax(inner))
            part = (t - side * zeta[a]) / (side * zeta[j] - side * zeta[a])
            starts.append(z[a] + part * (z[j] - z[a]))
            which.append(i)
            keys.append((name, s))
    for i, name in enumerate(made.names):
        g, model = tracer.focals[i].g, tracer.likelihood.model
        if isinstance(g, _Beta) and model._data.x_names[g.j] in model.separated:
            out[name] = _ends_of_run_off(model, g.j, t)
    if starts:
        index = np.array(which)
        z, good, _ = tracer.solve(np.stack(starts), index, np.full(index.size, t))
        values = tracer.functions(tracer.at(z), index)[0]
        for (name, s), i, ok, value in zip(keys, index, good, values, strict=True):
            if ok:
                out[name][s] = float(tracer.focals[i].shown(value))
    tail = 50.0 * (1.0 - level)
    columns = [f"{tail:g} %", f"{100.0 - tail:g} %"]
    frame = pd.DataFrame([sorted(v) if not np.isnan(v).any() else v for v in out.values()], made.names, columns)
    return frame
