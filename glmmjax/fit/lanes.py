"""Many searches as one compiled program: lanes that take the next dataset as soon as theirs is done.

Under `vmap` every lane of a loop waits for the slowest. Here the loop is outside: each turn is one evaluation of every
lane, and a lane whose search has ended writes its result and goes on with the next dataset. A program works on one
block of datasets; blocks are what progress, interruption and memory are counted in. Where there are several devices,
each of them runs the program on its own share of the block, without communication.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..compiling import programs
from ..compiling.precision import LANE_OPTIONS, compile_with
from ..families import Family
from ..model.design import Design, Term
from ..model.parameters import Layout
from ..objective.laplace import pieces
from ..objective.pirls import zero_u
from ..objective.pls import cross_products, moving_covariance
from . import optimise as opt
from .glmm import Carry as Modes
from .glmm import layout_of, make_objective, starting_values, tighter
from .lmm import TIGHTER, begin, in_units_of_X, make_move
from .lmm import make_objective as make_linear_objective
from .problem import Start

#: Numbers per row array in all lanes together: on a CPU its caches hold some ten of these arrays, and more lanes only
#: wait for each other; other devices want many.
CPU_NUMBERS, CPU_LANES = 8192, 64
DEVICE_NUMBERS, DEVICE_LANES = 2**21, 4096
#: Datasets per block and device, in lanes.
BLOCK_TURNS = 32
#: Part of the lanes that wait for new datasets before any gets one: filling lanes copies the data of all.
REFILL = 0.25
AXIS = "datasets"

#: programs compiled so far, for tests
compilations = 0


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Kind(Protocol):
    """A kind of model as the engine sees it: hashable, with pure functions of one dataset."""

    def layout(self, design: Design) -> Layout:
        """Of the parameters of the search."""

    def begin(self, design: Design, theta: Array, phi: Array, fixed: Array) -> tuple[Any, Start]:
        """What the search needs beside the design, and where it starts."""

    def data(self, design: Any, extra: Any) -> Any:
        """The part of a design and `extra` (or of anything shaped like them) that the search reads."""

    def objective(self, data: Any, constant: Array) -> opt.Objective:
        """See `optimise.Objective`."""

    @property
    def move(self) -> opt.Move:
        """See `optimise.Move`."""

    def tail(self, state: opt.State, data: Any) -> Array:
        """What is reported of a finished search beside its point, gradient, Hessian and numbers, (c,)."""

    def limits(self, limits: opt.Limits) -> opt.Limits:
        """Limits of the search from the user's."""

    @property
    def has_more(self) -> bool:
        """Whether `more` is wanted."""

    @property
    def exact(self) -> bool:
        """Whether `more` is the Hessian (P, P), which the search then leaves out."""

    def more(self, x: Array, data: Any) -> Array:
        """What is computed at the end of the whole fit, once, (c,)."""


@dataclass(frozen=True)
class Generalised:
    """GLMMs; the tail is beta (p,) and, for nAGQ = 0, R_X'R_X (p, p), of Xs.

    With `exact` the Hessian comes from automatic differentiation: a third program, which takes seconds to compile and
    saves 2 P of a fit's evaluations.
    """

    family: Family
    curvature: str
    nAGQ: int
    exact: bool = False

    def layout(self, design: Design) -> Layout:
        return layout_of(design, self.family, self.nAGQ)

    def begin(self, design: Design, theta: Array, phi: Array, fixed: Array) -> tuple[Any, Start]:
        return (), Start(*starting_values(theta, phi, fixed, design, self.family, self.nAGQ))

    def data(self, design: Any, extra: Any) -> Any:
        return design

    def objective(self, data: Any, constant: Array) -> opt.Objective:
        return make_objective(data, self.family, self.curvature, self.nAGQ, constant)

    @property
    def move(self) -> opt.Move:
        return opt.straight

    def tail(self, state: opt.State, data: Any) -> Array:
        beta: Array = state.carry.beta
        layout = self.layout(data)
        if layout.has_beta:
            return beta
        params = layout.parameters(state.x, beta)
        return jnp.concatenate([beta, pieces(params, state.carry.u, data, self.family, self.curvature)[1].reshape(-1)])

    def limits(self, limits: opt.Limits) -> opt.Limits:
        return tighter(limits._replace(hessian=False) if self.exact else limits)

    @property
    def has_more(self) -> bool:
        return self.exact

    def more(self, x: Array, data: Any) -> Array:
        count = jnp.zeros((), jnp.int32)
        at = Modes(zero_u(data, x.dtype), jnp.zeros(data.p, x.dtype), count)
        objective = self.objective(data, jnp.zeros((), x.dtype))
        return jax.jacfwd(lambda v: objective(v, at)[1])(x).reshape(-1)


@dataclass(frozen=True)
class Linear:
    """LMMs; the tail is r^2, beta (p,) and R_X (p, p), in units of X.

    With `ddf` there is more: what Satterthwaite's degrees of freedom need, as `unpack_moving` takes it.
    """

    REML: bool
    terms: tuple[Term, ...]
    ddf: bool

    exact = False

    def layout(self, design: Design) -> Layout:
        return Layout(design.terms, design.p, has_beta=False)

    def begin(self, design: Design, theta: Array, phi: Array, fixed: Array) -> tuple[Any, Start]:
        return cross_products(design), begin(theta, 1.0 - fixed.astype(theta.dtype), design)

    def data(self, design: Any, extra: Any) -> Any:
        return extra, design.plan

    def objective(self, data: Any, constant: Array) -> opt.Objective:
        cross, plan = data
        return make_linear_objective(cross, jnp.asarray(float(self.REML), cross.n.dtype), plan, self.terms, "own")

    @property
    def move(self) -> opt.Move:
        return make_move(self.terms, "own")

    def tail(self, state: opt.State, data: Any) -> Array:
        end = in_units_of_X(state.carry, data[0])
        return jnp.concatenate([end.r2[None], end.beta, end.schur.reshape(-1)])

    def limits(self, limits: opt.Limits) -> opt.Limits:
        return limits._replace(tol=TIGHTER * limits.tol, hessian=False)

    @property
    def has_more(self) -> bool:
        return self.ddf

    def more(self, x: Array, data: Any) -> Array:
        cross, plan = data
        reml = jnp.asarray(float(self.REML), x.dtype)
        (H, slopes), covariance = moving_covariance(x, cross, reml, plan, self.terms)
        return jnp.concatenate([a.reshape(-1) for a in (H, slopes, covariance, cross.A)])


class Ends(NamedTuple):
    """Ends of searches in internal units, one row each."""

    x: np.ndarray  # (B, P)
    g: np.ndarray  # (B, P)
    hessian: np.ndarray  # (B, P, P)
    numbers: np.ndarray  # (B, 6) as in `optimise.Found`
    tail: np.ndarray  # (B, c) as `Kind.tail`
    more: np.ndarray  # (B, c) as `Kind.more`; c is 0 before the end


def _row(state: opt.State, tail: Array) -> Array:
    out = opt.found(state)
    return jnp.concatenate([out.x, out.g, out.hessian.reshape(-1), out.numbers, tail])


def _unpack(rows: np.ndarray, P: int) -> Ends:
    parts = np.split(rows, np.cumsum([P, P, P * P, 6]), axis=1)
    return Ends(parts[0], parts[1], parts[2].reshape(-1, P, P), parts[3], parts[4], rows[:, :0])


class _Split:
    """A pytree split into leaves that every dataset has its own of, and shared ones."""

    def __init__(self, tree: Any, own: Any) -> None:
        self.leaves, self.treedef = jax.tree.flatten(tree)
        self.flags = tuple(jax.tree.leaves(own))

    @property
    def parts(self) -> tuple[list[Any], list[Any]]:
        own = [leaf for leaf, flag in zip(self.leaves, self.flags, strict=True) if flag]
        return own, [leaf for leaf, flag in zip(self.leaves, self.flags, strict=True) if not flag]

    @property
    def key(self) -> tuple[Any, tuple[bool, ...]]:
        return self.treedef, self.flags


def _join(own: Sequence[Any], shared: Sequence[Any], key: tuple[Any, tuple[bool, ...]]) -> Any:
    mine, others = iter(own), iter(shared)
    return jax.tree.unflatten(key[0], [next(mine) if flag else next(others) for flag in key[1]])


def _in_lanes(one: Any, tree: Any, lanes: int) -> Any:
    """`one` of every dataset of a block, so many at a time (`jax.lax.map` of batches, which refuses empty arrays)."""

    def split(a: Array) -> Array:
        return a.reshape(a.shape[0] // lanes, lanes, *a.shape[1:])

    out = jax.lax.map(jax.vmap(one), jax.tree.map(split, tree))
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * lanes, *a.shape[2:]), out)


def _begin(
    own: list[Array], shared: list[Array], theta: Array, phi: Array, fixed: Array, *, kind: Kind, key: Any, lanes: int
) -> tuple[Any, Start]:
    """Starts of all datasets of a block."""

    def one(own: list[Array]) -> tuple[Any, Start]:
        extra, start = kind.begin(_join(own, shared, key), theta, phi, fixed)
        return extra, jax.tree.map(jnp.asarray, start)

    return _in_lanes(one, own, lanes)


class _Slots(NamedTuple):
    """State of the lanes."""

    task: Array  # (L,) position in `order`; n or more where there is nothing left to do
    next: Array  # the next position that no lane has
    own: list[Array]  # each lane's data
    inverse0: Array  # (L, P, P)
    constant: Array  # (L,)
    state: opt.State
    out: Array  # (N + 1, width), the last row for nobody


def _search(
    own: list[Array],
    shared: list[Array],
    starts: Start,
    order: Array,
    count: Array,
    limits: opt.Limits,
    *,
    kind: Kind,
    key: Any,
    lanes: int,
) -> Array:
    """Ends (N, width) of the searches of datasets order[0], ..., order[count - 1], in this order."""
    N, n = order.shape[0], count[0]

    def take(task: Array) -> tuple[list[Array], Array, Array, opt.State]:
        which = order[jnp.minimum(task, N - 1)]
        mine = jax.tree.map(lambda a: a[which], starts)
        state = jax.vmap(lambda x, inverse, carry: opt.initial_state(x, inverse, carry, 1))(
            mine.x, mine.inverse, mine.carry
        )
        return [a[which] for a in own], mine.inverse, mine.constant, state

    def advance(own: list[Array], inverse0: Array, constant: Array, state: opt.State) -> opt.State:
        return opt.advance(kind.objective(_join(own, shared, key), constant), state, inverse0, limits, kind.move)

    def report(own: list[Array], state: opt.State) -> Array:
        return _row(state, kind.tail(state, _join(own, shared, key)))

    def turn(slots: _Slots) -> _Slots:
        state = jax.vmap(advance)(slots.own, slots.inverse0, slots.constant, slots.state)
        was = opt.running(slots.state)  # those that wait for others keep what they have

        def keep(new: Array, old: Array) -> Array:
            return jnp.where(was.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        state = jax.tree.map(keep, state, slots.state)
        done = ~opt.running(state) & (slots.task < n)

        def refill() -> _Slots:
            rows = jax.vmap(report)(slots.own, state)
            out = slots.out.at[jnp.where(done, slots.task, N)].set(rows)
            rank = jnp.cumsum(done.astype(jnp.int32))
            task = jnp.where(done, slots.next + rank - 1, slots.task)
            mine, inverse0, constant, began = take(task)

            def choose(new: Array, old: Array) -> Array:
                return jnp.where(done.reshape(-1, *[1] * (new.ndim - 1)), new, old)

            return _Slots(
                task, slots.next + rank[-1], mine, inverse0, constant, jax.tree.map(choose, began, state), out
            )

        idle = slots.task >= n
        enough = (done.sum() >= max(1, int(lanes * REFILL))) | (done | idle).all()
        return jax.lax.cond(enough, refill, lambda: slots._replace(state=state))

    task = jnp.arange(lanes, dtype=jnp.int32)
    first = take(task)
    width = jax.eval_shape(lambda: jax.vmap(report)(first[0], first[3])).shape[1]
    slots = _Slots(task, jnp.asarray(lanes, jnp.int32), *first, jnp.zeros((N + 1, width), starts.x.dtype))
    return jax.lax.while_loop(lambda s: (s.task < n).any(), turn, slots).out[:N]


def _more(own: list[Array], shared: list[Array], x: Array, *, kind: Kind, key: Any, lanes: int) -> Array:
    """`Kind.more` of all datasets of a block, at x (N, P)."""
    return _in_lanes(lambda both: kind.more(both[1], _join(both[0], shared, key)), (own, x), lanes)


class _Programs(NamedTuple):
    begin: Any
    search: Any
    more: Any  # None where the kind has no more


class Engine:
    """Fits blocks of datasets of one shape.

    Args:
        kind: of model.
        numbers: per dataset in an array over its rows, which decides how many lanes run at a time.
        total: datasets in all.
        devices: where to run; each has its own share of every block.
        workers: threads that run blocks at the same time.
    """

    def __init__(self, kind: Kind, numbers: int, total: int, devices: Sequence[Any], workers: int = 1) -> None:
        self.kind, self.devices = kind, tuple(devices)
        on_cpu = self.devices[0].platform == "cpu"
        most, lanes = (CPU_NUMBERS, CPU_LANES) if on_cpu else (DEVICE_NUMBERS, DEVICE_LANES)
        share = -(-total // (len(self.devices) * workers))
        lanes = max(1, min(lanes, most // max(numbers, 1)))
        lanes = 2 ** (lanes.bit_length() - 1)
        # few sizes, as each is compiled anew; idle lanes of few datasets cost less than that
        self.lanes = max(1, lanes // 4) if share <= lanes // 4 else lanes
        turns = [t for t in (1, 4, 16) if t * self.lanes >= share and t < BLOCK_TURNS]
        #: datasets per block and device
        self.size = self.lanes * (turns[0] if turns else BLOCK_TURNS)
        self._mesh = Mesh(np.array(self.devices), (AXIS,)) if len(self.devices) > 1 else None

    @property
    def block(self) -> int:
        """Datasets in a block."""
        return self.size * len(self.devices)

    # -- programs

    def _jit(self, function: Any, specs: Sequence[Any], out: Any) -> Any:
        """Compiled later; over the mesh if there is one, with shardings by argument."""
        mesh = self._mesh
        if mesh is None:
            return jax.jit(function)
        mapped = _shard_map(function, mesh, tuple(specs), out)
        shardings = tuple(NamedSharding(mesh, spec) for spec in specs)
        return jax.jit(mapped, in_shardings=shardings)

    def _programs(self, design: _Split, arguments: tuple[Any, ...], limits: opt.Limits) -> _Programs:
        shapes = tuple(
            (np.shape(a), np.asarray(a).dtype.str if np.isscalar(a) else str(a.dtype)) for a in design.leaves
        )
        sizes = (shapes, self.lanes, self.size, str(arguments[0].dtype))
        make = partial(self._compile, design, *design.parts, arguments, limits)
        made = programs.of_structure((self.kind, *design.key), sizes, self.devices, make)
        return _Programs(made[0], made[1], made[2] if len(made) > 2 else None)

    def _compile(
        self, design: _Split, own: list[Any], shared: list[Any], arguments: tuple[Any, ...], limits: opt.Limits
    ) -> list[Any]:
        """The programs, the first compiled while the second is traced."""
        global compilations
        mine, everyone = PartitionSpec(AXIS), PartitionSpec()
        options = LANE_OPTIONS if self.devices[0].platform == "cpu" else None
        statics = {"kind": self.kind, "lanes": self.lanes}
        programs.count_trace()
        first = self._jit(
            partial(_begin, key=design.key, **statics), [mine, everyone, everyone, everyone, everyone], mine
        )
        with jax.default_device(self.devices[0]), ThreadPoolExecutor(2) as pool:
            lowered = first.lower(own, shared, *arguments)
            begin = pool.submit(compile_with, lowered, options)
            extra, starts = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), lowered.out_info)
            data = self._data(design, jax.tree.unflatten(design.treedef, design.leaves), extra)
            order = jax.ShapeDtypeStruct((self.block,), jnp.int32)
            count = jax.ShapeDtypeStruct((len(self.devices),), jnp.int32)
            statics["key"] = data.key
            second = self._jit(partial(_search, **statics), [mine, everyone, mine, mine, mine, everyone], mine)
            lowered = second.lower(*data.parts, starts, order, count, limits)
            search = pool.submit(compile_with, lowered, options)
            more = []
            if self.kind.has_more:
                third = self._jit(partial(_more, **statics), [mine, everyone, mine], mine)
                more = [compile_with(third.lower(*data.parts, starts.x), options)]
            compilations += 2 + self.kind.has_more
            return [begin.result(), search.result(), *more]

    def _data(self, design: _Split, tree: Any, extra: Any) -> _Split:
        """What the search reads, of `tree` with the structure of the design."""
        flags = jax.tree.unflatten(design.treedef, design.flags)
        return _Split(self.kind.data(tree, extra), self.kind.data(flags, jax.tree.map(lambda _: True, extra)))

    # -- one block

    def run(
        self,
        design: Design,
        own: Any,
        count: int,
        theta: np.ndarray,
        phi: np.ndarray,
        fixed: bool,
        limits: opt.Limits,
        revise: Any = None,
    ) -> Ends:
        """Ends of the searches of a block's first `count` datasets.

        Args:
            design: in internal units; leaves flagged in `own` have a leading axis of `block` datasets.
            theta, phi: (n_theta,) and (n_phi,) where the searches start; `fixed` keeps theta there.
            revise: called with (ends, repeat), where repeat(which, x, inverse, limits) repeats the searches of datasets
                `which` from x (b, P) with metrics inverse (b, P, P); returns the ends to report.
        """
        D, N = len(self.devices), self.size
        wanted = bool(limits.hessian)
        limits = opt.as_arrays(self.kind.limits(limits), theta.dtype)
        split = _Split(design, own)
        arguments = (theta, phi, np.asarray(fixed))
        compiled = self._programs(split, arguments, limits)
        mine, shared = split.parts
        with jax.default_device(self.devices[0]):
            if self._mesh is None:
                mine, shared = jax.device_put((mine, shared), self.devices[0])
            extra, starts = compiled.begin(mine, shared, *arguments)
            parts = self._data(split, _join(mine, shared, split.key), extra).parts
            P = starts.x.shape[1]

            def more(x: np.ndarray) -> np.ndarray:
                """`Kind.more` of the first datasets, at x (b, P)."""
                padded = np.concatenate([x, np.repeat(x[-1:], self.block - x.shape[0], axis=0)])
                return np.asarray(compiled.more(*parts, padded))[: x.shape[0]]

            def search(which: np.ndarray, starts: Start, limits: opt.Limits) -> Ends:
                """By device: datasets N d, ..., N d + N - 1 are on device d."""
                shares = [which[which // N == d] % N for d in range(D)]
                order = np.zeros((D, N), np.int32)
                for d, share in enumerate(shares):
                    order[d, : share.size] = share
                counts = np.array([s.size for s in shares], np.int32)
                rows = np.asarray(compiled.search(*parts, starts, order.reshape(-1), counts, limits))
                rows = rows.reshape(D, N, -1)
                ends = _unpack(np.concatenate([rows[d, : counts[d]] for d in range(D)]), P)
                if not (self.kind.exact and wanted):
                    return ends
                x = np.repeat(ends.x[:1], count, axis=0)
                x[which] = ends.x
                return ends._replace(hessian=more(x)[which].reshape(-1, P, P))

            def repeat(which: np.ndarray, x: np.ndarray, inverse: np.ndarray, limit: int | None = None) -> Ends:
                moved = Start(np.array(starts.x), np.array(starts.inverse), starts.carry, starts.constant)
                moved.x[which], moved.inverse[which] = x, inverse
                own_limits = limits if limit is None else limits._replace(max_evaluations=np.asarray(limit, np.int32))
                if self._mesh is not None:
                    sharding = NamedSharding(self._mesh, PartitionSpec(AXIS))
                    moved = moved._replace(**jax.device_put({"x": moved.x, "inverse": moved.inverse}, sharding))
                return search(which, moved, own_limits)

            ends = search(np.arange(count), starts, limits)
            ends = ends if revise is None else revise(ends, repeat)
            if compiled.more is None or self.kind.exact:
                return ends
            return ends._replace(more=more(ends.x))


def _shard_map(function: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """`jax.shard_map` without its check of replication, which loops with data-dependent ends do not pass."""
    if hasattr(jax, "shard_map"):
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    from jax.experimental.shard_map import shard_map  # older JAX

    return shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_rep=False)
