"""How good the approximation of a fit's integrals is: by level, in total, and as pictures of the integrands.

Everything is at the estimates of the fit and compares Laplace's approximation with adaptive Gauss-Hermite quadrature
at k and at 2k - 1 points, the second of which measures the error of the first.

Sources: as `quadrature`; the pictures are those of Bates 2010, "Computational methods for mixed models", section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from .._errors import NotSupportedError
from ..algebra.linalg import segment_sum
from ..compiling import programs
from ..compiling.entry import entry
from ..families import Family
from ..fit.glmm import GeneralisedProblem
from ..fit.problem import safe_inverse
from ..model.buckets import bucket_of
from ..model.design import Design
from ..model.parameters import Parameters
from ..objective.laplace import products_at
from ..objective.quadrature import (
    CHUNK,
    MAX_DIMENSIONS,
    MAX_POINTS,
    Local,
    check_nodes,
    gauss_hermite,
    local,
    log_t,
    most_points,
    product_nodes,
)
from ..report.pyplot import pyplot
from ..report.table import Block, Column, Heading, Shown, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..results import MixedModel

#: Numbers of points tried for an automatic k; each but the first is 2k - 1 of the one before.
LADDER = (3, 5, 9, 17, 33, 65)
#: Deviance units by which an approximation may be off before a summary says so.
NOTABLE = 1.0
#: Rows times nodes that a summary spends on finding out.
SUMMARY_EFFORT = 2e7


# -------------------- per level
def _local(params: Parameters, u: Array, design: Design, family: Family, hessian: str) -> Local:
    """`Local` at given modes u (m, d)."""
    blocks, T = products_at(params, (u,), design, family, hessian)
    return local(u, T[0], blocks.diagonal[0], params, design, family)


@programs.persistent_jit("family", "hessian")
def _by_level(
    params: Parameters, u: Array, design: Design, k: Array, z: Array, log_w: Array, family: Family, hessian: str
) -> tuple[Array, Array]:
    """-2 log of each level's integral by Laplace, constants included, and log of quadrature's ratio to it; (m,) each.

    k, the number of points, is traced: one program serves all; z and log_w are padded to `MAX_POINTS`.
    """
    here = _local(params, u, design, family, hessian)
    d = design.z[0].shape[1]
    rows = here.kernel + family.constant(jnp.asarray(design.y), jnp.asarray(design.weights))
    laplace = -2.0 * segment_sum(rows, design.level[0], design.n_levels[0]) + jnp.square(u).sum(1)
    laplace = laplace - 2.0 * jnp.log(jnp.diagonal(here.R, axis1=1, axis2=2)).sum(1)
    width = max(1, min(CHUNK // design.n, 1024))

    def chunk(i: Array, total: Array) -> Array:
        zeta, weight = product_nodes(i * width + jnp.arange(width, dtype=np.int32), z, log_w, k, d)
        own = log_t(zeta, here, params, design, family) + weight
        return jnp.logaddexp(total, jax.scipy.special.logsumexp(own, axis=1))

    empty = jnp.full(design.n_levels[0], -jnp.inf, u.dtype)
    return laplace, jax.lax.fori_loop(0, (k**d + width - 1) // width, chunk, empty)


@partial(jax.jit, static_argnames=("family", "hessian"))
def _log_t(params: Parameters, u: Array, design: Design, zeta: Array, family: Family, hessian: str) -> Array:
    return log_t(zeta, _local(params, u, design, family, hessian), params, design, family)


class Levels(NamedTuple):
    """Contributions of the levels to -2 log likelihood."""

    laplace: np.ndarray  # (m,)
    quadrature: np.ndarray  # (m,)


def _arguments(model: MixedModel) -> tuple[Parameters, np.ndarray, Design]:
    e = model._estimates
    return Parameters(e.theta, e.beta, e.phi), np.asarray(e.u[0]), model._design


@entry
def levels_at(model: MixedModel, k: int) -> Levels:
    """Each level's part of -2 log likelihood at the estimates, by Laplace and with k points."""
    rule = gauss_hermite(k)
    z, log_w = np.zeros(MAX_POINTS), np.zeros(MAX_POINTS)
    z[:k], log_w[:k] = rule.z, np.log(rule.w)
    params, u, design = _arguments(model)
    m, bucket = u.shape[0], bucket_of(design)
    (u,), design = bucket.pad_levels((u,)), bucket.pad(design)
    settings = {"family": model.family, "hessian": model._spec.hessian}
    found = _by_level(params, u, design, np.int32(k), z, log_w, **settings)
    laplace, ratio = (np.asarray(x)[:m] for x in found)
    return Levels(laplace, laplace - 2.0 * ratio)


def prevented(model: MixedModel) -> str:
    """Why the integrals of this model cannot be done by quadrature; empty if they can."""
    if model.is_linear:
        return "a linear mixed model needs no approximation: its integrals are exact"
    terms = model._data.terms
    widths = [z.shape[1] for z in model._design.z]
    if len(widths) > 1:
        own = model._design.terms[0].block
        other = next(t for t, place in zip(terms, model._design.terms, strict=True) if place.block != own)
        return (
            f"quadrature needs all random effects on one grouping factor: ({' + '.join(other.names)} | {other.group}) "
            f"is on another than {terms[0].group!r}"
        )
    if widths[0] > MAX_DIMENSIONS:
        return f"quadrature takes at most {MAX_DIMENSIONS} random effects per level, the model has {widths[0]}"
    return ""


# -------------------- errors
@dataclass(frozen=True, repr=False)
class QuadratureError(Shown):
    """How far an approximation of the likelihood is off, as returned by `MixedModel.quadrature_error`.

    Attributes:
        nAGQ: of the fit. k: points compared, with 2k - 1 as the measure of their own error.
        frame: by level: rows; -2 log of its integral by "laplace", with the fit's points ("fit"), with "k" and with
            "2k-1" points; "error" of the fit, its column minus the last one.
        totals: sums over the levels, deviance units.
        tol: wanted accuracy of k. settled: whether k has it: |k - (2k-1)| <= tol.
        shift: one Newton step of the k-point deviance from the estimates, by parameter: estimate, shift, std_error,
            and shift in standard errors ("relative"); None if not asked for.
    """

    nAGQ: int
    k: int
    group: str
    frame: pd.DataFrame
    tol: float
    settled: bool
    shift: pd.DataFrame | None = field(default=None)

    @property
    def totals(self) -> pd.Series:
        return self.frame[["laplace", "fit", "k", "2k-1", "error"]].sum()

    @property
    def error(self) -> float:
        """Deviance units by which the fit's objective is off at its estimates."""
        return float(self.totals["error"])

    def to_frame(self) -> pd.DataFrame:
        """By level, with the level as a column."""
        return self.frame.rename_axis("level").reset_index()

    def sentence(self) -> str:
        """What a summary says if the error is notable."""
        name = "the Laplace approximation" if self.nAGQ <= 1 else f"quadrature with nAGQ = {self.nAGQ}"
        use = f"nAGQ = {self.k}" if self.settled else f"more points than {self.k}"
        return (
            f"{name} is off by {abs(self.error):.2g} deviance units at these estimates (more than {NOTABLE:g} is "
            f"notable): fit with {use}"
        )

    def _totals(self) -> Table:
        totals, best = self.totals, self.totals["2k-1"]
        name = {0: "Laplace (nAGQ = 0)", 1: "Laplace (nAGQ = 1)"}.get(self.nAGQ, f"the fit (nAGQ = {self.nAGQ})")
        values = {"Laplace": totals["laplace"]} if self.nAGQ > 1 else {}
        values |= {name: totals["fit"], f"{self.k} points": totals["k"], f"{2 * self.k - 1} points": best}
        errors = [f"{v - best:.2g}" if v != best else "0" for v in values.values()]
        numbers = [f"{v:.6f}" for v in values.values()]
        return Table([Column("", list(values), right=False), Column("-2*log(L)", numbers), Column("error", errors)])

    def _worst(self) -> str:
        errors = self.frame["error"].to_numpy()
        worst = int(np.argmax(np.abs(errors)))
        return f"Largest error of a level: {errors[worst]:.2g} ({self.group} {self.frame.index[worst]})."

    def _verdict(self) -> str:
        return f"{self.k} points are {'' if self.settled else 'NOT '}within {self.tol:g} of {2 * self.k - 1}."

    def _report(self, page: bool) -> Sequence[Block]:
        what = f"Approximation of {len(self.frame)} integrals, one per level of {self.group}, at the estimates"
        out: list[Block] = [Heading(what), self._totals(), self._verdict(), self._worst()]
        if self.shift is None:
            return out
        columns = [
            Column("", [str(name) for name in self.shift.index], right=False),
            Column("estimate", [f"{v:.5g}" for v in self.shift["estimate"]]),
            Column("would move by", [f"{v:.2g}" for v in self.shift["shift"]]),
            Column("in std. errors", [f"{v:.2g}" for v in self.shift["relative"]]),
        ]
        return [*out, "", Heading(f"One Newton step with {self.k} points:"), Table(columns)]


def quadrature_error(model: MixedModel, k: int | None = None, tol: float = 1e-3, shift: bool = True) -> QuadratureError:
    """How far the approximation of the likelihood is off at the estimates, by level and in total.

    Args:
        k: quadrature points per random effect to compare with; None takes the first of 3, 5, 9, 17, 33, 65
            that agrees with 2k - 1 points within `tol`.
        tol: deviance units.
        shift: also estimate how far the parameters would move with k points, by one Newton step.

    Returns:
        `QuadratureError`: text, HTML, `frame` by level, `totals`, `error`, `k`, `shift`.

    Raises:
        NotSupportedError: several grouping factors, more than 4 random effects per level, or a linear model.
    """
    return error_within(model, k, tol, shift)


def error_within(
    model: MixedModel, k: int | None = None, tol: float = 1e-3, shift: bool = True, effort: float = np.inf
) -> QuadratureError:
    """`quadrature_error`, `effort` limiting rows times nodes of the search for k."""
    reason = prevented(model)
    if reason:
        raise NotSupportedError(reason)
    if not tol > 0.0:
        raise ValueError(f"tol must be positive, got {tol!r}")
    d, n = model._design.z[0].shape[1], model.nobs
    if k is not None:
        gauss_hermite(k)
        check_nodes(2 * k - 1, [d])
        finer = levels_at(model, 2 * k - 1)
        coarse = levels_at(model, k)
    else:
        k, coarse = LADDER[0], levels_at(model, LADDER[0])
        while True:
            finer = levels_at(model, 2 * k - 1)
            nodes = (4 * k - 3) ** d
            if abs(finer.quadrature.sum() - coarse.quadrature.sum()) <= tol:
                break
            if 4 * k - 3 > most_points(d) or n * nodes > effort:
                break
            k, coarse = 2 * k - 1, finer
    own = finer.laplace if model.nAGQ <= 1 else levels_at(model, model.nAGQ).quadrature
    term = model._data.terms[0]
    frame = pd.DataFrame(
        {
            "rows": np.bincount(term.level, minlength=len(term.levels)),
            "laplace": finer.laplace,
            "fit": own,
            "k": coarse.quadrature,
            "2k-1": finer.quadrature,
            "error": own - finer.quadrature,
        },
        index=pd.Index(list(term.levels), name=term.group),
    )
    settled = bool(abs(frame["k"].sum() - frame["2k-1"].sum()) <= tol)
    moves = _shift(model, k) if shift else None
    return QuadratureError(model.nAGQ, k, term.group, frame, tol, settled, moves)


@entry
def _shift(model: MixedModel, k: int) -> pd.DataFrame:
    """-H^-1 g of the k-point deviance at the estimates, H by central differences of its exact gradient."""
    e = model._estimates
    problem = GeneralisedProblem(model._design, model.family, k, model._spec.hessian)
    x = problem.layout.of(e.theta, e.beta, e.sigma, e.phi)
    J, inner = problem.scaling.jacobian, problem.scaling.inner(x)
    carry = problem.carry_at(e.u, inner[problem.layout.at.beta])

    def gradient(at: np.ndarray) -> np.ndarray:
        return np.asarray(problem.evaluate(jnp.asarray(at), carry, 0.0)[1])

    g = gradient(inner)
    H, h = np.empty((x.size, x.size)), 1e-4
    for i, e_i in enumerate(np.eye(x.size) * h):
        H[i] = (gradient(inner + e_i) - gradient(inner - e_i)) / (2.0 * h)
    inverse = np.linalg.solve(J, np.linalg.solve(J, safe_inverse(H)).T)
    move = -inverse @ (J.T @ g)
    se = np.sqrt(2.0 * np.diag(inverse))
    names = model._names_in(problem.layout)
    columns = {"estimate": x, "shift": move, "std_error": se, "relative": move / se}
    return pd.DataFrame(columns, index=pd.Index(names, name="parameter"))


def affordable(model: MixedModel) -> bool:
    """Whether a summary looks at the quality of the approximation."""
    d = model._design.z[0].shape[1]
    return not prevented(model) and model.nobs * LADDER[1] ** d <= SUMMARY_EFFORT


def notable(model: MixedModel) -> str:
    """One sentence if the likelihood at the estimates is off by more than `NOTABLE`; else empty."""
    if not affordable(model):
        return ""
    found = error_within(model, tol=0.1 * NOTABLE, shift=False, effort=SUMMARY_EFFORT)
    return found.sentence() if not abs(found.error) <= NOTABLE else ""


# -------------------- pictures
@entry
def integrands(model: MixedModel, axis: int = 0, z: Any = None) -> pd.DataFrame:
    """The conditional density of each level's random effects along a standardised axis.

    Args:
        axis: random effect of the level, in the order of the terms; axes are L_j^-T's columns, the others at 0.
        z: points, standardised by each level's mode and curvature; default 81 from -4 to 4.

    Returns:
        Columns level, z, density (scaled to the standard normal's at z = 0), normal (that density),
        ratio (t(z), their quotient; 1 everywhere where Laplace's approximation is exact).
    """
    reason = prevented(model)
    if reason:
        raise NotSupportedError(reason)
    d = model._design.z[0].shape[1]
    if not isinstance(axis, (int, np.integer)) or not 0 <= axis < d:
        raise ValueError(f"axis must be from 0 to {d - 1}, got {axis!r}")
    grid = np.linspace(-4.0, 4.0, 81) if z is None else np.asarray(z, float).reshape(-1)
    zeta = np.zeros((grid.size, d))
    zeta[:, axis] = grid
    log_ratio = np.asarray(_log_t(*_arguments(model), zeta, model.family, model._spec.hessian))
    term = model._data.terms[0]
    m = len(term.levels)
    normal = np.exp(-0.5 * grid**2) / np.sqrt(2.0 * np.pi)
    ratio = np.exp(log_ratio)
    return pd.DataFrame(
        {
            "level": np.repeat(np.asarray(list(term.levels), dtype=object), grid.size),
            "z": np.tile(grid, m),
            "density": (normal * ratio).reshape(-1),
            "normal": np.tile(normal, m),
            "ratio": ratio.reshape(-1),
        }
    )


def plot_integrands(
    model: MixedModel, kind: str = "density", axis: int = 0, levels: Sequence[Any] | None = None, z: Any = None
) -> tuple[Figure, pd.DataFrame]:
    """A panel per level: its conditional density against the standard normal, or their ratio.

    Args:
        kind: "density" or "ratio".
        axis, z: as `integrands`.
        levels: to show; None takes all, or the 30 with the largest error.

    Returns:
        Figure, and the data in it.
    """
    if kind not in ("density", "ratio"):
        raise ValueError(f"kind must be 'density' or 'ratio', got {kind!r}")
    frame = integrands(model, axis, z)
    names = list(model._data.terms[0].levels)
    group = model._data.terms[0].group
    if levels is not None:
        wanted = [str(level) for level in levels]
        missing = [level for level in wanted if level not in map(str, names)]
        if missing:
            raise ValueError(f"{group} has no level {', '.join(missing)}")
        names = [level for level in names if str(level) in wanted]
    elif len(names) > _PANELS:
        worst = quadrature_error(model, k=5, shift=False).frame["error"].abs().to_numpy()
        keep = np.sort(np.argsort(-worst, kind="stable")[:_PANELS])
        names = [names[i] for i in keep]
    frame = frame[frame["level"].isin(names)]
    return _panels(frame, names, kind, group, axis, model), frame.reset_index(drop=True)


_PANELS = 30


def _panels(frame: pd.DataFrame, names: list[Any], kind: str, group: str, axis: int, model: MixedModel) -> Figure:
    plt = pyplot()
    columns = min(5, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows,
        columns,
        sharex=True,
        sharey=True,
        figsize=(1.9 * columns + 0.8, 1.5 * rows + 1.1),
        squeeze=False,
        layout="constrained",
    )
    by_level = dict(iter(frame.groupby("level", sort=False)))
    for panel, name in zip(axes.flat, names, strict=False):
        own = by_level[name]
        if kind == "density":
            panel.plot(own["z"], own["normal"], color="C1", linewidth=1.2, linestyle="--")
            panel.plot(own["z"], own["density"], color="C0", linewidth=1.3)
        else:
            panel.axhline(1.0, color="0.6", linewidth=1.0, linestyle="--")
            panel.plot(own["z"], own["ratio"], color="C0", linewidth=1.3)
        panel.set_title(str(name), fontsize="small", pad=3)
        panel.tick_params(labelsize="x-small")
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    if kind == "ratio":  # far out the ratio may run off where the density has nothing left
        middle = frame.loc[frame["z"].abs() <= 3.0, "ratio"]
        top = min(float(middle.max()), 3.0)
        axes.flat[0].set_ylim(0.0, max(1.05 * top, 1.5))
    term_names = [n for t in model._data.terms for n in t.names]
    which = "" if len(term_names) == 1 else f" (axis {axis}, {term_names[axis]})"
    figure.supxlabel(f"z, standardised random effect{which}", fontsize="medium")
    figure.supylabel("density" if kind == "density" else "t(z), density over the normal's", fontsize="medium")
    what = "Conditional density (solid) and standard normal (dashed)" if kind == "density" else "Ratio to the normal"
    figure.suptitle(f"{what} by {group}", fontsize="medium")
    return figure
