"""Many datasets as stacks of equal shape: a model frame each, a layout of rows, and padding that changes nothing.

Rows that are not there have weight 0, zeros in X and z, and an offset at which the family is well inside its range;
levels without rows have u = 0 and add nothing. Rows of a dataset lie in a grid, one column per level of the factor with
most levels, where that wastes little: sums over a level's rows then need no indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from .._errors import DataError, FormulaError
from ..algebra.linalg import Grid
from ..algebra.symbolic import Plan, make_plan, plan_of_pairs, possible_pairs
from ..compiling.digest import digest
from ..families import Family
from ..formula.columns import Factor, Table, check_ids, missing_column, plain, rows_of
from ..formula.frame import build
from ..formula.matrix import independent_columns
from ..formula.model_data import ModelData
from ..formula.parse import parse
from ..formula.syntax import Binary, Call, Name, Node, Num, Paren, Unary, base_name, children, names_in
from ..model.buckets import sized
from ..model.covariance import structure_of
from ..model.design import Design, Term
from ..model.frames import make_design, make_linear_design

#: A grid may have this many times the cells that the rows need.
MAX_WASTE = 1.6
#: Padded cells that are worth another shape, which takes seconds to compile.
CELLS_PER_SHAPE = 4_000_000
MAX_SHAPES = 6
ROWWISE = {"I", "log", "log2", "log10", "log1p", "exp", "expm1", "sqrt", "abs", "offset", "sin", "cos", "tan"}


@dataclass(frozen=True)
class Labels:
    """Names of what a dataset's estimates are of."""

    x: tuple[str, ...]
    terms: tuple[tuple[Any, ...], ...]  # of the random-effects terms, as `ReTermData.label`


@dataclass(frozen=True)
class Group:
    """Datasets with the same columns, rows one dataset after the other.

    Attributes:
        ids: (B,) numbers of the datasets. rows: (B,) how many rows each has. levels: (B, G) levels of each block.
        y, weights, offset: (R,) over all rows; None stands for ones and zeros. X: (R, p).
        z: per term (R, k). level: per block (R,), counted within the dataset. block: of each term.
    """

    labels: Labels
    ids: np.ndarray
    rows: np.ndarray
    levels: np.ndarray
    y: np.ndarray
    X: np.ndarray
    weights: np.ndarray | None
    offset: np.ndarray | None
    z: tuple[np.ndarray, ...]
    level: tuple[np.ndarray, ...]
    block: tuple[int, ...]


# -------------------- from tables to groups
def rowwise(node: Node) -> bool:
    """Whether an expression's value in a row depends on nothing but that row."""
    own = isinstance(node, (Name, Num, Paren, Unary))
    own = own or (isinstance(node, Binary) and node.op in "+-*/^")
    own = own or (isinstance(node, Call) and base_name(node.func) in ROWWISE)
    return own and all(map(rowwise, children(node)))


def make_group(frames: Sequence[ModelData], ids: Sequence[int]) -> Group:
    """Datasets from model frames with the same columns."""
    first = frames[0]
    blocks: list[int] = []
    block: list[int] = []
    for i, term in enumerate(first.terms):
        same = [b for b in blocks if first.terms[b].group == term.group]
        if not same:
            blocks.append(i)
        block.append(blocks.index(same[0]) if same else len(blocks) - 1)

    def optional(values: list[np.ndarray | None], otherwise: float) -> np.ndarray | None:
        if all(v is None for v in values):
            return None
        filled = zip(values, frames, strict=True)
        return np.concatenate([np.full(f.nobs, otherwise) if v is None else v for v, f in filled])

    def trials(frame: ModelData) -> np.ndarray | None:
        if frame.trials is None:
            return frame.weights
        return frame.trials if frame.weights is None else frame.weights * frame.trials

    return Group(
        Labels(first.x_names, tuple(t.label for t in first.terms)),
        np.asarray(ids),
        np.array([f.nobs for f in frames]),
        np.array([[len(f.terms[b].levels) for b in blocks] for f in frames]),
        np.concatenate([f.y for f in frames]),
        np.concatenate([f.X for f in frames]),
        optional([trials(f) for f in frames], 1.0),
        optional([f.offset for f in frames], 0.0),
        tuple(np.concatenate([f.terms[i].z for f in frames]) for i in range(len(first.terms))),
        tuple(np.concatenate([f.terms[b].level for f in frames]) for b in blocks),
        tuple(block),
    )


def check(frame: ModelData, family: Family) -> None:
    """Raise what `glmer` or `lmer` would raise of a dataset's model frame."""
    if family.linear:
        make_linear_design(frame)
    else:
        make_design(frame, family)


@dataclass
class Split:
    """A table's datasets, ready to be stacked, and what prevents the others from being fitted."""

    names: list[Any]  # of the datasets
    groups: list[Group] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)


class Splitter:
    """Model frames of a table's datasets: from one frame of the whole table where that gives the same, else each by
    itself."""

    def __init__(self, formula: Any, data: pd.DataFrame, by: str, family: Family, arguments: dict[str, Any]) -> None:
        if not isinstance(by, str):
            raise TypeError(f"by must be the name of a column, not {type(by).__name__}")
        if by not in data.columns:
            raise DataError(missing_column(by, list(map(str, data))))
        if list(data.columns).count(by) > 1:
            raise DataError(f"the data have several columns named '{by}'; rename them")
        if data[by].dtype.kind == "f":
            check_ids(data[by].to_numpy(float, na_value=np.nan), f"column '{by}'")
        arguments = {k: v if order_free(v) else plain(rows_of(v, data.index, k), k) for k, v in arguments.items()}
        self.formula, self.family = formula, family
        codes, names = pd.factorize(data[by], use_na_sentinel=True)
        if (codes < 0).any():
            raise DataError(f"column {by!r} has missing values; name every row's dataset or drop those rows")
        order = np.argsort(codes, kind="stable")
        if not (order[1:] > order[:-1]).all():
            data, codes = data.iloc[order], codes[order]
        self.data, self.codes, self.names = data, codes, list(names)
        self.ends = np.searchsorted(codes, np.arange(len(self.names) + 1))
        self.arguments: dict[str, Any] = {k: v if order_free(v) else v[order] for k, v in arguments.items()}

    def part(self, i: int) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Rows and arguments of one dataset."""
        a, b = self.ends[i], self.ends[i + 1]
        return self.data.iloc[a:b], {k: v if order_free(v) else v[a:b] for k, v in self.arguments.items()}

    def frame(self, i: int) -> ModelData:
        """Model frame of one dataset, checked."""
        data, own = self.part(i)
        made: ModelData = build(self.formula, data, **own)
        check(made, self.family)
        return made

    def split(self, progress: Any) -> Split:
        """All datasets."""
        out = Split(self.names)
        rows = self._finite()
        whole, alone = self._whole(rows), np.arange(len(self.names))
        if whole is not None:
            group, alone = self._fast(whole, np.flatnonzero(rows)[whole.keep])
            if group.ids.size:
                out.groups.append(group)
        frames: dict[Any, list[tuple[int, ModelData]]] = {}
        first: Exception | None = None
        for i in progress(alone.tolist(), "model frames"):
            try:
                made = self.frame(i)
            except (DataError, FormulaError) as error:
                out.errors[i] = str(error)
                first = first or error
                continue
            key = (made.x_names, tuple(t.label for t in made.terms))
            frames.setdefault(key, []).append((i, made))
        if first is not None and len(out.errors) == len(self.names):
            raise first
        for members in frames.values():
            out.groups.append(make_group([m for _, m in members], [i for i, _ in members]))
        return out

    def _finite(self) -> np.ndarray:
        """Rows of datasets without infinite values: one of those would spoil the frame of all."""
        bad = np.zeros(len(self.names), bool)
        for name in parse(self.formula).names:
            if name in self.data and self.data[name].dtype.kind == "f":
                bad[self.codes[np.isinf(self.data[name].to_numpy())]] = True
        return np.asarray(~bad[self.codes])

    def _whole(self, rows: np.ndarray) -> ModelData | None:
        """The frame of these rows, unless a dataset's own frame could differ from its part of it."""
        parsed = parse(self.formula).resolve(list(map(str, self.data)))
        nodes = [*parsed.fixed_terms.variables, *parsed.offsets]
        for bar in parsed.bars:
            nodes.extend(bar.terms.variables)
        if parsed.response is not None:
            nodes.append(parsed.response)
        if self.arguments.get("contrasts") or not rows.any():
            return None
        plain = [n for n in nodes if not (isinstance(n, Call) and base_name(n.func) == "cbind")]
        if not all(rowwise(n) for n in plain):
            return None
        arguments: dict[str, Any] = {k: v if order_free(v) else v[rows] for k, v in self.arguments.items()}
        try:
            return build(self.formula, self.data if rows.all() else self.data[rows], **arguments)
        except DataError:  # of one dataset, perhaps: each says so itself
            return None

    def _fast(self, whole: ModelData, kept: np.ndarray) -> tuple[Group, np.ndarray]:
        """Datasets whose part of the whole frame is their own frame, and the numbers of the others.

        kept: rows of the table that the frame has.
        """
        codes = self.codes[kept]
        B, n = len(self.names), codes.size
        rows = np.bincount(codes, minlength=B)
        ends = np.concatenate([[0], np.cumsum(rows)])
        odd = rows == 0
        assert whole.y is not None
        table = Table(self.data)
        parts = [whole.formula.fixed_terms, *(bar.terms for bar in whole.formula.bars)]
        nodes = [v for terms in parts for term in terms.terms for v in term.variables]
        response = [] if whole.formula.response is None else [whole.formula.response]
        used = (name for node in [*nodes, *response, *whole.formula.offsets] for name in names_in(node))
        for name in dict.fromkeys(name for name in used if name in table):
            column = table.column(name)
            grouping = any(name in term.group.split(":") for term in whole.terms)
            if isinstance(column, Factor) and not grouping:
                odd |= _lacks_a_level(column.codes[kept], codes, B)
        start = np.minimum(ends[:-1], n - 1)
        changes = np.concatenate([[False], (whole.y[1:] != whole.y[:-1])])
        changes[start] = False
        odd |= np.bincount(codes, changes, B) == 0  # a constant response
        within: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # by factor: levels, and how many
        for term in whole.terms:
            if term.group not in within:
                within[term.group] = _within(term.level, codes, B)
            m = within[term.group][1]
            odd |= (m < 2) | (m * len(term.names) >= rows)
            odd |= ~np.stack([np.bincount(codes, c != 0.0, B) > 0 for c in term.z.T]).all(axis=0)
        odd |= self._deficient(whole.X, rows, ends)
        weights = whole.weights if whole.trials is None else whole.trials
        for i in np.flatnonzero(~odd):
            part = slice(ends[i], ends[i + 1])
            try:
                mine = None if weights is None else weights[part]
                self.family.check_response(whole.y[part], mine, whole.response_name, whole.row_index[part])
            except DataError:  # which it says itself
                odd[i] = True
        group = make_group([whole], [0])
        level, counts = zip(*within.values(), strict=True)
        group = replace(group, ids=np.arange(B), rows=rows, levels=np.stack(counts, axis=1), level=level)
        return _chosen(group, ~odd), np.flatnonzero(odd)

    def _deficient(self, X: np.ndarray, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Datasets whose columns of X depend on each other, or are all their rows can tell."""
        p = X.shape[1]
        if not p:
            return np.zeros(rows.size, bool)
        products = np.einsum("ri,rj->rij", X, X).reshape(X.shape[0], -1) if p <= 8 else None
        if products is not None and rows.all():
            gram = np.add.reduceat(products, ends[:-1], axis=0).reshape(-1, p, p)
        else:
            gram = np.stack([X[a:b].T @ X[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)])
        size = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
        zero = (size == 0.0).any(axis=1)
        size = np.where(size > 0.0, size, 1.0)
        least = np.linalg.eigvalsh(gram / size[:, :, None] / size[:, None, :])[:, 0]
        out = zero | (rows <= p)
        for i in np.flatnonzero(~out & (least < 1e-6)):
            out[i] = not independent_columns(X[ends[i] : ends[i + 1]]).all()
        return np.asarray(out)


def order_free(value: Any) -> bool:
    """Whether an argument is the same for every subset of rows."""
    return value is None or isinstance(value, (str, dict))


def _lacks_a_level(level: np.ndarray, codes: np.ndarray, B: int) -> np.ndarray:
    m = int(level.max(initial=-1)) + 1
    there = np.zeros((B, m), bool)
    there[codes, level] = True
    return np.asarray(~there.all(axis=1))


def _within(level: np.ndarray, codes: np.ndarray, B: int) -> tuple[np.ndarray, np.ndarray]:
    """Levels counted within each dataset, in the order of the whole table's, and their numbers."""
    m = int(level.max(initial=-1)) + 1
    key = codes.astype(np.int64) * m + level
    unique, inverse = np.unique(key, return_inverse=True)
    counts = np.bincount(unique // m, minlength=B)
    first = np.concatenate([[0], np.cumsum(counts)])[:-1]
    return (inverse - first[codes]).astype(np.int32), counts


def _chosen(group: Group, keep: np.ndarray) -> Group:
    """Some datasets of a group."""
    if keep.all():
        return group
    rows = np.repeat(keep, group.rows)

    def part(values: np.ndarray | None) -> Any:
        return None if values is None else values[rows]

    by_dataset = {name: getattr(group, name)[keep] for name in ("ids", "rows", "levels")}
    by_row = {name: part(getattr(group, name)) for name in ("y", "X", "weights", "offset")}
    return replace(group, **by_dataset, **by_row, z=tuple(map(part, group.z)), level=tuple(map(part, group.level)))


# -------------------- from groups to stacks
class Stack:
    """Datasets padded to one shape; `block` makes the arrays of some of them.

    Attributes:
        ids: (B,) numbers of the datasets. template: design of one dataset, shared leaves filled in.
        own: flags of the leaves that every dataset has of its own.
    """

    def __init__(self, group: Group, levels: Sequence[int], family: Family) -> None:
        self.group, self.ids = group, group.ids
        self.labels = group.labels
        order = sorted(range(len(levels)), key=lambda g: -levels[g])
        self._order = order
        B, first = group.ids.size, order[0]
        self.ends = np.concatenate([[0], np.cumsum(group.rows)])
        which = np.repeat(np.arange(B), group.rows)
        inside = np.arange(which.size) - self.ends[which]
        m = levels[first]
        repeats = int(_occurrence(group.level[first], which).max(initial=0)) + 1
        self._grid = m * sized(repeats) <= MAX_WASTE * sized(int(group.rows.max()))
        if self._grid:
            repeats = sized(repeats)
            self.n = m * repeats
            self.position = _occurrence(group.level[first], which) * m + group.level[first]
        else:
            self.n = sized(int(group.rows.max()))
            self.position = inside
        self._which, self.levels = which, tuple(levels)
        self._repeats = repeats
        self._set_up(family)

    def _set_up(self, family: Family) -> None:
        group, n, B = self.group, self.n, self.ids.size
        full = bool((group.rows == n).all())
        alike = full and bool((self.position.reshape(B, n) == self.position[:n]).all())
        #: rows in the order of the layout, where it is the same for all datasets
        self._rows = np.argsort(self.position[:n]) if alike else None
        self.y_empty, self.offset_empty = 1.0, 0.0 if full else safe_eta(family)
        widths = [0] * len(self.levels)
        for z, b in zip(group.z, group.block, strict=True):
            widths[b] += z.shape[1]
        order = self._order
        self._nested = {
            (i, j): _nested(group.level[order[i]], group.level[order[j]], self._which, self.levels[order[i]])
            for i in range(len(order))
            for j in range(i + 1, len(order))
        }
        self._names = [group.labels.terms[group.block.index(g)][0] for g in order]
        self._widths = [widths[g] for g in order]
        self._plan, self._own_plan = self._make_plan(slice(0, 1))
        self.template, self.own = self._design(np.arange(1), flags=True)

    def _make_plan(self, members: slice) -> tuple[Plan, bool]:
        """Plan of one dataset, and whether plans differ between datasets."""
        order = self._order
        m = [self.levels[g] for g in order]
        if len(order) == 1:
            return make_plan([np.zeros(1, np.int32)], m, self._widths, self._names), False
        a, b = self.ends[members.start], self.ends[members.stop]
        level = [self.group.level[g][a:b] for g in order]
        pairs = possible_pairs(level, m, self._nested)
        return plan_of_pairs(pairs, m, self._widths, self._names), any(self._nested.values())

    def _stacked(self, values: np.ndarray, members: np.ndarray, fill: float) -> np.ndarray:
        """(b, n, ...) rows of some datasets in the layout."""
        rest = values.shape[1:]
        if self._rows is not None:
            whole = values.reshape(values.shape[0] // self.n, self.n, *rest)
            if members.size and members[-1] - members[0] == members.size - 1:
                part = whole[members[0] : members[-1] + 1]
            else:
                part = whole[members]
            trivial = bool((self._rows == np.arange(self.n)).all())
            return np.ascontiguousarray(part if trivial else part[:, self._rows])
        out = np.full((members.size, self.n, *rest), fill, values.dtype)
        for j, i in enumerate(members):
            a, b = self.ends[i], self.ends[i + 1]
            out[j, self.position[a:b]] = values[a:b]
        return out

    def digests(self) -> list[str]:
        """Of each dataset's rows: response, columns, levels, weights and offset."""
        group, out = self.group, []
        arrays = [a for a in (group.y, group.X, *group.z, *group.level, group.weights, group.offset) if a is not None]
        same = (group.labels, group.block, group.weights is None, group.offset is None)
        for a, b in zip(self.ends, self.ends[1:], strict=False):
            out.append(str(digest((same, *(values[a:b] for values in arrays)))))
        return out

    def block(self, members: np.ndarray) -> Design:
        """Arrays of some datasets, by their positions in `ids`."""
        return self._design(members)[0]

    def _design(self, members: np.ndarray, flags: bool = False) -> tuple[Design, Any]:
        group, n, order = self.group, self.n, self._order
        whole = self._rows is not None
        one = np.ones(n)
        y = self._stacked(group.y, members, self.y_empty)
        X = self._stacked(group.X, members, 0.0)
        values = np.ones(group.y.size) if group.weights is None and not whole else group.weights
        weights = one if values is None else self._stacked(values, members, 0.0)
        values = np.zeros(group.y.size) if group.offset is None and not whole else group.offset
        offset = 0.0 * one if values is None else self._stacked(values, members, self.offset_empty)
        zs = []
        for g in order:
            columns = [z for z, b in zip(group.z, group.block, strict=True) if b == g]
            beside = columns[0] if len(columns) == 1 else np.concatenate(columns, axis=1)
            shared = whole and bool((beside == 1.0).all())
            zs.append(np.ones((n, beside.shape[1])) if shared else self._stacked(beside, members, 0.0))
        level: list[Any] = []
        for i, g in enumerate(order):
            if self._grid and i == 0:
                level.append(Grid(self._repeats))
            else:
                level.append(self._stacked(group.level[g], members, 0))
        plan = self._plan
        if self._own_plan:
            made = [self._make_plan(slice(i, i + 1))[0] for i in members]
            plan = jax.tree.map(lambda *leaves: np.stack(leaves), *made)
        plan = self._with_row_pairs(plan, level, members)
        if not flags:
            design = replace(
                self.template, y=y, X=X, weights=weights, offset=offset, z=tuple(zs), level=tuple(level), plan=plan
            )
            return design, None
        layout, at, first = [], 0, [0] * len(order)
        for label, b in zip(group.labels.terms, group.block, strict=True):
            g, structure = order.index(b), structure_of(label)
            layout.append(Term(g, first[g], structure, at))
            first[g] += structure.k
            at += structure.n_theta
        m = tuple(self.levels[g] for g in order)
        template = Design(y, X, weights, offset, tuple(zs), tuple(level), plan, tuple(layout), m)
        own = replace(
            template,
            y=True,
            X=True,
            weights=weights.ndim == 2,
            offset=offset.ndim == 2,
            z=tuple(z.ndim == 3 for z in zs),
            level=tuple(v if isinstance(v, Grid) else True for v in level),
            plan=self._plan_flags(plan),
        )
        return template, own

    def _with_row_pairs(self, plan: Plan, level: list[Any], members: np.ndarray) -> Plan:
        """The plan with each row's pair of levels, for factors that are crossed."""
        couplings = []
        for c in plan.couplings:
            if c.row_pair is None:
                couplings.append(c)
                continue
            g = level[c.first]
            if isinstance(g, Grid):
                g = np.tile(np.arange(self.levels[self._order[c.first]], dtype=np.int32), self._repeats)
            pair = g * np.int32(self.levels[self._order[c.second]]) + level[c.second]
            couplings.append(replace(c, row_pair=pair.astype(np.int32)))
        return replace(plan, couplings=tuple(couplings))

    def _plan_flags(self, plan: Plan) -> Plan:
        flags = jax.tree.map(lambda _: self._own_plan, plan)
        couplings = tuple(c if c.row_pair is None else replace(c, row_pair=True) for c in flags.couplings)
        return replace(flags, couplings=couplings)


@lru_cache(maxsize=64)
def safe_eta(family: Family) -> float:
    """A linear predictor well inside the family's range, for rows that are not there and have y = 1."""
    one = jnp.ones(1)
    eta = float(jax.jit(lambda: family.link.eta_of(family.mustart(one, one)))()[0])
    return eta if np.isfinite(eta) else 0.0


def _occurrence(level: np.ndarray, which: np.ndarray) -> np.ndarray:
    """How many rows of the same dataset and level come before each row."""
    key = which.astype(np.int64) * (int(level.max(initial=0)) + 1) + level
    order = np.argsort(key, kind="stable")
    ordered = key[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    start = np.maximum.accumulate(np.where(new, np.arange(key.size), 0))
    out = np.empty(key.size, np.int64)
    out[order] = np.arange(key.size) - start
    return out


def _nested(a: np.ndarray, b: np.ndarray, which: np.ndarray, m: int) -> bool:
    """Whether in every dataset each level of `a` meets one level of `b`."""
    key = which.astype(np.int64) * m + a
    parent = np.zeros(int(key.max(initial=0)) + 1, np.int64)
    parent[key] = b
    return bool((parent[key] == b).all())


def stacks(group: Group, family: Family) -> list[Stack]:
    """The datasets of a group in few shapes."""
    B, G = group.levels.shape
    which = np.repeat(np.arange(B), group.rows)
    pivot = np.argmax(group.levels.max(axis=0))
    repeats = np.zeros(B, int)
    np.maximum.at(repeats, which, _occurrence(group.level[pivot], which) + 1)
    size = np.column_stack([group.levels, np.maximum(repeats, -(-group.rows // group.levels[:, pivot]))])

    def cells(members: np.ndarray) -> int:
        top = size[members].max(axis=0)
        flat = int(group.rows[members].max())
        return members.size * min(int(top[pivot] * top[-1]), 2 * flat)

    parts = [np.arange(B)]
    while len(parts) < MAX_SHAPES:
        best: tuple[int, int, np.ndarray, np.ndarray] | None = None
        for k, members in enumerate(parts):
            before = cells(members)
            for j in range(size.shape[1]):
                values = np.sort(size[members, j])
                for cut in np.unique(
                    values[[values.size // 4, values.size // 2, 3 * values.size // 4, -2 % values.size]]
                ):
                    low, high = members[size[members, j] <= cut], members[size[members, j] > cut]
                    if not low.size or not high.size:
                        continue
                    saved = before - cells(low) - cells(high)
                    if saved > CELLS_PER_SHAPE and (best is None or saved > best[0]):
                        best = saved, k, low, high
        if best is None:
            break
        _, k, low, high = best
        parts[k : k + 1] = [low, high]
    out = []
    for members in parts:
        keep = np.zeros(B, bool)
        keep[members] = True
        chosen = _chosen(group, keep)
        top = [sized(int(v)) for v in chosen.levels.max(axis=0)]
        out.append(Stack(chosen, top, family))
    return out
