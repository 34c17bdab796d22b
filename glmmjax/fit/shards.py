"""One large fit with its rows divided over several devices, here or in other processes of ``jax.distributed``.

With one grouping factor, or nested ones, the random effects of groups on different devices are independent given the
parameters: each device has whole groups of the coarsest factor and searches their modes by itself, and what devices
tell each other in an evaluation are the deviance, its gradient, and in joint searches the sums over X. A linear model
needs its rows once, for cross-products, and takes any design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._errors import DataError
from ..algebra.symbolic import plan_of_pairs, possible_pairs
from ..families import Family
from ..model.buckets import Bucket
from ..model.design import Design
from ..objective.pls import CrossProducts, cross_products
from . import optimise as opt
from .glmm import Carry, GeneralisedProblem, make_objective, starting_values, tighter
from .lanes import _shard_map
from .lmm import LinearProblem, search
from .problem import PATH_LENGTH, Start, unpacked
from .separation import Separation

AXIS = "rows"


class Shards(NamedTuple):
    """A design on several devices.

    Attributes:
        design: rows of all devices, D parts of equal length; the last of a part may be copies of weight 0.
        own: per block (D m,) level of the whole design that each device's level is, -1 for none.
        place: per block (levels,) where each level is among the devices'.
    """

    design: Design
    own: tuple[Any, ...]
    place: tuple[Any, ...]


def specs(shards: Shards) -> Shards:
    """How `Shards` are divided."""
    mine, everyone = PartitionSpec(AXIS), PartitionSpec()
    return Shards(
        jax.tree.map(lambda _: mine, shards.design),
        tuple(mine for _ in shards.own),
        tuple(everyone for _ in shards.place),
    )


def _ends(weights: np.ndarray, parts: int) -> np.ndarray:
    """(parts + 1,) ends of consecutive parts of about equal total weight, none of them empty."""
    total = np.cumsum(weights)
    ends = np.searchsorted(total, total[-1] * np.arange(1, parts) / parts) + 1
    least = np.arange(1, parts)
    ends = np.maximum.accumulate(np.clip(ends, least, weights.size - parts + least))
    return np.concatenate([[0], np.maximum(ends, least), [weights.size]])


def _placed(values: Sequence[np.ndarray], mesh: Mesh) -> Array:
    """One array of equal parts, each on its device; parts are made where they are needed only."""
    size = values[0].shape[0]
    shape = (size * len(values), *values[0].shape[1:])
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))

    def part(index: Any) -> np.ndarray:
        return values[(index[0].start or 0) // size]

    return jax.make_array_from_callback(shape, sharding, part)


class _Rows(Sequence[np.ndarray]):
    """Rows of an array by device, taken when asked for."""

    def __init__(self, values: Any, rows: list[np.ndarray], convert: Callable[[np.ndarray, int], np.ndarray]) -> None:
        self._values, self._rows, self._convert = np.asarray(values), rows, convert

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, device: Any) -> Any:
        return self._convert(self._values[self._rows[device]], device)


def _padded(rows: list[np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """Row numbers by device, filled up to equal numbers with a row of the same device, and how many are its own."""
    counts = [part.size for part in rows]
    return [np.concatenate([part, np.full(max(counts) - part.size, part[0])]) for part in rows], counts


def by_rows(values: Any, rows: list[np.ndarray], mesh: Mesh) -> Array:
    """An array's rows, divided."""
    return _placed(_Rows(values, rows, lambda part, _: part), mesh)


def _weights(design: Design, rows: list[np.ndarray], counts: list[int], mesh: Mesh) -> Array:
    def there(part: np.ndarray, device: int) -> np.ndarray:
        part[counts[device] :] = 0.0
        return part

    return _placed(_Rows(design.weights, rows, there), mesh)


def by_groups(design: Design, names: Sequence[str], mesh: Mesh) -> Shards:
    """A design of one grouping factor or nested ones, whole groups of the coarsest on each device.

    Raises:
        DataError: factors are crossed, or there are fewer groups than devices.
    """
    D = mesh.devices.size
    if design.plan.size:
        raise DataError(
            f"grouping factors {' and '.join(repr(n) for n in dict.fromkeys(names))} are crossed: their groups cannot "
            "be divided over several devices; give one device"
        )
    coarsest, m = np.asarray(design.level[-1]), design.n_levels[-1]
    if m < D:
        raise DataError(f"{m} groups cannot be divided over {D} devices; give at most {m}")
    ends = _ends(np.bincount(coarsest, minlength=m), D)
    of_group = np.repeat(np.arange(D), np.diff(ends))
    of_row = of_group[coarsest]
    rows, counts = _padded([np.flatnonzero(of_row == d) for d in range(D)])
    # levels counted within their devices
    own, place, within, sizes = [], [], [], []
    for level, levels in zip(design.level, design.n_levels, strict=True):
        of_level = np.zeros(levels, np.int64)
        of_level[level] = of_row
        number = np.bincount(of_level, minlength=D)
        order = np.argsort(of_level, kind="stable")
        inside = np.empty(levels, np.int32)
        inside[order] = np.arange(levels) - np.repeat(np.cumsum(number) - number, number)
        size = int(number.max())
        there = np.full(D * size, -1, np.int32)
        there[of_level * size + inside] = np.arange(levels)
        own.append(_placed(np.split(there, D), mesh))
        place.append((of_level * size + inside).astype(np.int32))
        within.append(inside)
        sizes.append(size)
    levels_of = [[inside[np.asarray(v)[part]] for v, inside in zip(design.level, within, strict=True)] for part in rows]
    nested = {(g, h): True for g in range(len(sizes)) for h in range(g + 1, len(sizes))}
    widths = [z.shape[1] for z in design.z]
    plans = [plan_of_pairs(possible_pairs(mine, sizes, nested), sizes, widths, list(names)) for mine in levels_of]
    local = replace(
        design,
        y=by_rows(design.y, rows, mesh),
        X=by_rows(design.X, rows, mesh),
        weights=_weights(design, rows, counts, mesh),
        offset=by_rows(design.offset, rows, mesh),
        z=tuple(by_rows(z, rows, mesh) for z in design.z),
        level=tuple(_placed([mine[g] for mine in levels_of], mesh) for g in range(len(sizes))),
        plan=jax.tree.map(lambda *parts: _placed([np.asarray(p) for p in parts], mesh), *plans),
        n_levels=tuple(sizes),
        axis=AXIS,
    )
    return Shards(local, tuple(own), tuple(place))


def any_rows(design: Design, mesh: Mesh) -> tuple[Design, Design]:
    """A design with its rows divided in their order and all levels on every device, and how its leaves are divided."""
    D, n = mesh.devices.size, design.n
    if n < D:
        raise DataError(f"{n} rows cannot be divided over {D} devices; give at most {n}")
    rows, counts = _padded(np.array_split(np.arange(n), D))
    mine, everyone = PartitionSpec(AXIS), PartitionSpec()

    def divided(design: Design, rowwise: Callable[[Any], Any], weights: Any, whole: Callable[[Any], Any]) -> Design:
        couplings = tuple(
            replace(c, a=whole(c.a), b=whole(c.b), row_pair=None if c.row_pair is None else rowwise(c.row_pair))
            for c in design.plan.couplings
        )
        products = jax.tree.map(whole, design.plan.products)
        return replace(
            design,
            y=rowwise(design.y),
            X=rowwise(design.X),
            weights=weights,
            offset=rowwise(design.offset),
            z=tuple(rowwise(z) for z in design.z),
            level=tuple(rowwise(level) for level in design.level),
            plan=replace(design.plan, couplings=couplings, products=products),
            axis=AXIS,
        )

    local = divided(design, lambda v: by_rows(v, rows, mesh), _weights(design, rows, counts, mesh), lambda v: v)
    return local, divided(design, lambda _: mine, mine, lambda _: everyone)


# -------------------- programs
def _to_devices(tree: Any, shards: Shards) -> Any:
    """Every carry with the modes of this device's levels."""

    def local(carry: Carry) -> Carry:
        u = (jnp.where(own[:, None] >= 0, u[own], 0.0) for u, own in zip(carry.u, shards.own, strict=True))
        return carry._replace(u=tuple(u))

    return _map_carries(local, tree)


def _from_devices(tree: Any, shards: Shards) -> Any:
    """Every carry with the modes of all levels, in the order of the whole design."""

    def whole(carry: Carry) -> Carry:
        u = (jax.lax.all_gather(u, AXIS, tiled=True)[place] for u, place in zip(carry.u, shards.place, strict=True))
        return carry._replace(u=tuple(u))

    return _map_carries(whole, tree)


def _map_carries(function: Callable[[Carry], Carry], tree: Any) -> Any:
    def is_carry(x: Any) -> bool:
        return isinstance(x, Carry)

    return jax.tree.map(lambda x: function(x) if is_carry(x) else x, tree, is_leaf=is_carry)


@dataclass(frozen=True)
class _Task:
    """What devices do together: its name, and what is static in it. Arguments and results hold whole carries."""

    name: str
    family: Family
    hessian: str
    nAGQ: int

    def __call__(self, args: tuple[Any, ...], shards: Shards) -> Any:
        design = shards.design
        static = self.family, self.hessian, self.nAGQ
        if self.name == "start":
            theta, phi, fixed = args
            return _from_devices(Start(*starting_values(theta, phi, fixed, design, self.family, self.nAGQ)), shards)
        *args, constant = _to_devices(args, shards)
        objective = make_objective(design, *static, constant)
        if self.name == "minimise":
            x, inverse, carry, limits = args
            found = opt.found(opt.minimise(objective, x, inverse, carry, limits, PATH_LENGTH))
            return opt.pack(_from_devices(found, shards))
        if self.name == "advance":
            state, inverse, limits = args
            return _from_devices(opt.advance(objective, state, inverse, limits), shards)
        x, carry = args
        if self.name == "hessian":
            return jax.jacfwd(lambda v: objective(v, carry)[1])(x)
        return _from_devices(objective(x, carry)[:4], shards)


@partial(jax.jit, static_argnames=("task", "mesh"))
def _everywhere(args: Any, shards: Shards, task: _Task, mesh: Mesh) -> Any:
    everyone = PartitionSpec()
    return _shard_map(task, mesh, (everyone, specs(shards)), everyone)(args, shards)


def _host(tree: Any) -> Any:
    return jax.tree.map(np.asarray, tree)


class ShardedProblem(GeneralisedProblem):
    """A GLMM whose searches run on several devices; what else is asked of it is computed on one."""

    def __init__(
        self,
        design: Design,
        family: Family,
        nAGQ: int,
        hessian: str,
        exact: bool,
        names: Sequence[str],
        devices: Sequence[Any],
    ) -> None:
        super().__init__(design, family, nAGQ, hessian, exact)
        self._bucket, self._padded = Bucket(0, 0, design.n_levels), self.design  # programs here see the rows as shards
        self._names, self._mesh = names, Mesh(np.array(devices), (AXIS,))
        self._shards = by_groups(self.design, names, self._mesh)

    def _together(self, name: str, *args: Any) -> Any:
        # from the host: what is on one process's device cannot enter a program of several
        return _host(_everywhere(_host(args), self._shards, _Task(name, *self._static), self._mesh))

    def settled(self, separation: Separation) -> Self:
        other = super().settled(separation)
        other._shards = by_groups(other.design, self._names, self._mesh)
        return other

    def with_rows(self, name: str, values: np.ndarray) -> Self:
        other = super().with_rows(name, values)
        other._shards = by_groups(other.design, self._names, self._mesh)
        return other

    def _begin(self, start: dict[str, np.ndarray]) -> Start:
        begin: Start = self._together("start", *self._start_from(start))
        return begin

    def minimise(self, begin: Start, limits: opt.Limits, metric: str) -> opt.Found:
        x, inverse, carry, constant = begin
        return unpacked(self._together("minimise", x, inverse, carry, tighter(limits), constant), begin)

    def advance(self, state: opt.State, begin: Start, limits: opt.Limits, metric: str) -> opt.State:
        out: opt.State = self._together("advance", state, begin.inverse, tighter(limits), begin.constant)
        return out

    def evaluate(self, x: Array, carry: Any, constant: Any) -> Any:
        return self._together("evaluate", x, carry, constant)

    def exact_hessian(self, x: Array, carry: Any, constant: Any) -> Any:
        return self._together("hessian", x, carry, constant)


@partial(jax.jit, static_argnames=("mesh", "leaves", "tree"))
def _cross_everywhere(design: Design, mesh: Mesh, leaves: tuple[Any, ...], tree: Any) -> CrossProducts:
    return _shard_map(cross_products, mesh, (jax.tree.unflatten(tree, leaves),), PartitionSpec())(design)


class ShardedLinearProblem(LinearProblem):
    """An LMM whose cross-products are formed on several devices; the search, which sees no rows, runs on each."""

    def __init__(self, design: Design, REML: bool, exact: bool, devices: Sequence[Any]) -> None:
        super().__init__(design, REML, exact)
        self._mesh = Mesh(np.array(devices), (AXIS,))

    def minimise(self, begin: Start, limits: opt.Limits, metric: str) -> opt.Found:
        if self.by_rows:  # the cross-products lack digits, and the rows are here
            return super().minimise(begin, limits, metric)
        limits = self._limits(limits, metric)
        packed = search(begin.x, begin.inverse, begin.carry, limits, *self._arguments, metric, PATH_LENGTH)
        return unpacked(packed, begin)

    def _make_cross(self) -> CrossProducts:
        local, divided = any_rows(self._scaled, self._mesh)
        leaves, tree = jax.tree.flatten(divided)
        made: CrossProducts = _host(_cross_everywhere(local, self._mesh, tuple(leaves), tree))
        return made
