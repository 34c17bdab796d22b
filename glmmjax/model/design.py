"""The design of a mixed model as a pytree of arrays, and the packing of its parameters.

Data enter the pure functions through `Design` only; labels stay on the host. Terms are in lme4's order
(theta, VarCorr, ranef); the grouping factors behind them are merged into *blocks* in elimination order,
which never shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .._arguments import checked, numeric, shown
from .._errors import DataError, check_scale
from ..algebra.linalg import take
from ..algebra.symbolic import Plan, make_plan, order_blocks
from ..compiling.memory import copied, release, zeros
from ..formula.columns import by_row, common_index
from .covariance import Structure, Unstructured

Leaf = Any  # NumPy on the host, jax.Array once traced

#: Numbers in a plan's lists of products from which what they were made from is given back: that takes milliseconds.
RELEASE_FROM = 1_000_000
#: Searches start from no column of T below the first; the second is near what most searches find: from 0.01 they take
#: two to four times as many evaluations.
STATIONARY, RAISED = 1e-2, 0.3


@dataclass(frozen=True)
class Term:
    """Where one random-effects term lives: columns `first : first + structure.k` of block `block`."""

    block: int
    first: int
    structure: Structure
    theta_start: int

    @property
    def theta(self) -> slice:
        return slice(self.theta_start, self.theta_start + self.structure.n_theta)

    @property
    def columns(self) -> slice:
        return slice(self.first, self.first + self.structure.k)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Design:
    """Everything the objective needs of the data; build it with `design` or `design_arrays`.

    Attributes:
        y: (n,) response; proportions for the binomial.
        X: (n, p) fixed-effects columns.
        weights: (n,) trials (binomial) or prior weights.
        offset: (n,) added to the linear predictor.
        z: per block (n, k) columns of its terms side by side.
        level: per block (n,) int32 level of each row.
        plan: elimination index arrays.
        terms: the random-effects terms in lme4's order (static).
        n_levels: levels per block (static).
        axis: mesh axis over whose devices the rows are divided, where these are one device's (static).
    """

    y: Leaf
    X: Leaf
    weights: Leaf
    offset: Leaf
    z: tuple[Leaf, ...]
    level: tuple[Leaf, ...]
    plan: Plan
    terms: tuple[Term, ...] = field(metadata={"static": True})
    n_levels: tuple[int, ...] = field(metadata={"static": True})
    axis: str | None = field(default=None, metadata={"static": True})

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.y.shape[0])

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        return int(self.X.shape[-1])

    @property
    def q(self) -> int:
        """Number of random effects, dim u."""
        return sum(m * z.shape[1] for m, z in zip(self.n_levels, self.z, strict=True))

    @property
    def n_theta(self) -> int:
        """Number of covariance parameters."""
        return sum(t.structure.n_theta for t in self.terms)

    @property
    def theta_start(self) -> np.ndarray:
        """(n_theta,) theta of identity factors."""
        return np.concatenate([t.structure.start() for t in self.terms])


def off_ridge(theta: Any, terms: Sequence[Term], below: float = STATIONARY, to: float = RAISED) -> Any:
    """theta (n_theta,) in internal units, with columns of T near 0 moved away from it.

    The deviance is even in each column of T: where one is 0 its gradient vanishes, whatever the data say, and a search
    that starts there stays there.
    """
    parts = [term.structure.raised(theta[term.theta], below, to) for term in terms]
    return (jnp if isinstance(theta, Array) else np).concatenate(parts)


def factors(theta: Array, design: Design) -> tuple[Array, ...]:
    """Relative factor T (k, k) of every block, block diagonal over the block's terms."""
    return factors_of(theta, design.terms, [z.shape[1] for z in design.z])


def factors_of(theta: Array, terms: tuple[Term, ...], widths: Sequence[int]) -> tuple[Array, ...]:
    """`factors` from the terms and the number of columns of each block."""
    out = []
    for g, k in enumerate(widths):
        mine = [t for t in terms if t.block == g]
        if len(mine) == 1:
            out.append(mine[0].structure.factor(theta[mine[0].theta]))
            continue
        T = jnp.zeros((k, k), theta.dtype)
        for t in mine:
            T = T.at[t.columns, t.columns].set(t.structure.factor(theta[t.theta]))
        out.append(T)
    return tuple(out)


def u_to_blocks(u: Array, design: Design) -> tuple[Array, ...]:
    """(q,) in the order of Z's columns (terms in lme4's order, level by level) -> per block (m, k)."""
    parts: dict[int, list[tuple[int, Array]]] = {}
    start = 0
    for t in design.terms:
        m, k = design.n_levels[t.block], t.structure.k
        parts.setdefault(t.block, []).append((t.first, u[start : start + m * k].reshape(m, k)))
        start += m * k
    return tuple(
        jnp.concatenate([part for _, part in sorted(parts[g], key=lambda x: x[0])], axis=1)
        for g in range(len(design.z))
    )


def u_from_blocks(blocks: Sequence[Any], design: Design) -> Array:
    """Inverse of `u_to_blocks`."""
    return jnp.concatenate([blocks[t.block][:, t.columns].reshape(-1) for t in design.terms])


def over_devices(values: Any, design: Design) -> Any:
    """Sums over the devices that the rows are divided over."""
    return values if design.axis is None else jax.lax.psum(values, design.axis)


def fixed_part(beta: Array, design: Design) -> Array:
    """(n,) offset + X beta."""
    return jnp.asarray(design.offset) + jnp.asarray(design.X) @ beta


def add_random_part(eta: Array, b: Sequence[Array], design: Design) -> Array:
    """eta (n,) plus the sum of z'b over blocks; b holds per block (m, k) on the original scale."""
    for z, level, effects in zip(design.z, design.level, b, strict=True):
        # column by column: a reduction over k short rows does not vectorise
        for k in range(z.shape[1]):
            eta = eta + z[:, k] * take(effects[:, k], level)
    return eta


def linear_predictor(b: Sequence[Array], beta: Array, design: Design) -> Array:
    """eta = offset + X beta + sum of z'b over blocks; b holds per block (m, k) on the original scale."""
    return add_random_part(fixed_part(beta, design), b, design)


@checked()
def design_arrays(
    y: Any,
    X: Any,
    terms: Sequence[tuple[Any, ...]],
    weights: Any = None,
    offset: Any = None,
    names: Sequence[str] | None = None,
) -> Design:
    """Design from arrays, without a formula.

    Args:
        y: (n,) response (proportion for the binomial, then `weights` are trials).
        X: (n, p) fixed-effects columns, the intercept included if wanted.
        terms: per random-effects term ``(z, level)`` or ``(z, level, structure)``: z (n, k) or (n,)
            columns, level (n,) integers 0 .. m - 1. Terms are kept in the order given. Terms whose
            level arrays are equal share a grouping factor.
        weights, offset: (n,) or None.
        names: grouping factors, for messages.

    Returns:
        `Design` with NumPy float64 leaves.

    Raises:
        DataError: shapes do not fit, values are not finite, or levels are out of range.
    """
    pairs = isinstance(terms, Sequence) and not isinstance(terms, str)
    if not pairs or not all(isinstance(term, (tuple, list)) and len(term) in (2, 3) for term in terms):
        raise TypeError("terms must be a list of (z, level) or (z, level, structure), one for each random-effects term")
    terms = list(terms)
    if names is not None and (isinstance(names, str) or len(names) != len(terms)):
        raise ValueError(f"names must be a list with a name for each of the {len(terms)} terms")
    index = common_index([y, X, *(part for term in terms for part in term[:2]), weights, offset])
    if index is not None:  # pandas objects go by their index, others by position
        y, X = by_row(y, index, "y"), by_row(X, index, "X")
        weights, offset = by_row(weights, index, "weights"), by_row(offset, index, "offset")
        parts = [[by_row(part, index, f"term {i + 1}") for part in term[:2]] for i, term in enumerate(terms)]
        terms = [(*own, *term[2:]) for own, term in zip(parts, terms, strict=True)]
    y = np.ascontiguousarray(numeric(y, "y", finite=False))
    if y.ndim != 1:
        raise DataError(f"y must be one-dimensional, got shape {y.shape}")
    n = y.shape[0]
    X = np.ascontiguousarray(numeric(X, "X", finite=False))
    if X.ndim == 1:
        X = X[:, None]
    if not terms:
        raise DataError("at least one random-effects term (z, level) is needed")
    columns = {"y": y, "X": X}
    for label, value in (("weights", weights), ("offset", offset)):
        if value is not None:
            columns[label] = np.ascontiguousarray(numeric(value, label, finite=False))
    zs: list[np.ndarray] = []
    levels: list[np.ndarray] = []
    for i, term in enumerate(terms):
        z = np.ascontiguousarray(numeric(term[0], f"z of term {i + 1}", finite=False))
        zs.append(z[:, None] if z.ndim == 1 else z)
        raw = np.asarray(term[1])
        if raw.ndim != 1 or not np.issubdtype(raw.dtype, np.integer):
            raise DataError(f"level of term {i + 1} must be a one-dimensional array of integers")
        if raw.size and raw.min() < 0:
            raise DataError(f"level of term {i + 1} has negative values; levels are 0 .. m - 1")
        levels.append(np.ascontiguousarray(raw, np.int32))
        columns[f"z of term {i + 1}"] = zs[-1]
    for label, value in columns.items():
        if value.shape[0] != n:
            raise DataError(f"{label} has {value.shape[0]} rows, y has {n}")
        if not np.isfinite(value).all():
            raise DataError(f"{label} has missing or infinite values; remove those rows")
        check_scale(value, label)
    for i, level in enumerate(levels):
        if level.shape[0] != n:
            raise DataError(f"level of term {i + 1} has {level.shape[0]} rows, y has {n}")

    # merge terms on one grouping factor
    factor_of: list[int] = []
    unique: list[np.ndarray] = []
    for level in levels:
        for g, other in enumerate(unique):
            if other is level or np.array_equal(other, level):
                factor_of.append(g)
                break
        else:
            factor_of.append(len(unique))
            unique.append(level)
    counts = [int(level.max(initial=-1)) + 1 for level in unique]
    order = order_blocks(counts)
    position = {g: i for i, g in enumerate(order)}
    widths = [0] * len(order)
    layout: list[Term] = []
    theta_start = 0
    for i, (z, term) in enumerate(zip(zs, terms, strict=True)):
        block = position[factor_of[i]]
        structure: Any = term[2] if len(term) > 2 else Unstructured(z.shape[1])
        if not isinstance(structure, Structure):
            wanted = f"such as Unstructured({z.shape[1]}) or Diagonal({z.shape[1]})"
            raise TypeError(f"the covariance structure of term {i + 1} must be one {wanted}, got {shown(structure)}")
        if structure.k != z.shape[1]:
            raise DataError(f"term {i + 1} has {z.shape[1]} columns but its covariance structure has {structure.k}")
        layout.append(Term(block, widths[block], structure, theta_start))
        widths[block] += z.shape[1]
        theta_start += structure.n_theta
    block_z = [_beside([z for z, t in zip(zs, layout, strict=True) if t.block == g]) for g in range(len(order))]
    block_level = [unique[g] for g in order]
    block_count = [counts[g] for g in order]
    labels = [str(g + 1) for g in range(len(unique))]
    if names is not None:
        for name, g in zip(names, factor_of, strict=True):
            labels[g] = name
    plan = make_plan(block_level, block_count, widths, [labels[g] for g in order])
    if sum(np.size(leaf) for leaf in jax.tree.leaves(plan.products)) > RELEASE_FROM:  # made from larger arrays
        release()
    return Design(
        y,
        X,
        columns.get("weights") if weights is not None else copied(np.broadcast_to(1.0, n)),
        columns.get("offset") if offset is not None else zeros(n),
        tuple(block_z),
        tuple(block_level),
        plan,
        tuple(layout),
        tuple(block_count),
    )


def _beside(columns: list[np.ndarray]) -> np.ndarray:
    return columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
