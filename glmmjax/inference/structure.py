"""Inspection: where A = Lambda'Z'WZ Lambda + I and its Cholesky factor L have non-zeros, as numbers and as a picture.

For people who learn or teach the method; no fit needs it. Patterns are kept per level: the k columns of a
level behave alike, so that two levels that share a row give a full k x k' block. Counts are of entries of
the lower triangle, the diagonal included.

Sources: Bates et al. 2015, J. Stat. Softw. 67(1), section 3 (the matrix and why its order matters); George &
Liu 1981, Computer Solution of Large Sparse Positive Definite Systems (elimination as unions of columns).
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .._arguments import checked, numeric
from .._errors import DataError
from ..algebra.linalg import in_matrix
from ..model.design import Design
from ..report.pyplot import given_axes, pyplot
from ..report.table import Column, Shown, Table

if TYPE_CHECKING:
    import pandas as pd

#: Most rows of a crossed design for which the fill-reducing permutation is sought (InstEval, 4,114 rows: 2.3 s).
MAX_PERMUTED_ROWS = 5_000
#: Most rows of a dense L.
MAX_DENSE_ROWS = 5_000
#: Most cells along the side of a drawn panel; larger matrices are drawn as densities.
_CELLS = 150
_OWN, _FILL = (0.12, 0.30, 0.47), (0.89, 0.34, 0.16)


@dataclass(frozen=True)
class Block:
    """One grouping factor: its levels, its random-effects columns per level, and how it is eliminated."""

    name: str
    levels: int
    columns: int
    #: level by level, one small matrix each; otherwise the factor is part of the dense remainder
    by_level: bool


@dataclass(frozen=True)
class _Pattern:
    """Levels of all factors, numbered through in elimination order, that share a row of the data."""

    low: np.ndarray  # (P,) the earlier level of each pair
    high: np.ndarray  # (P,)
    width: np.ndarray  # (M,) columns of each level

    def eliminate(self, order: np.ndarray) -> Iterator[tuple[int, int]]:
        """Per position in `order` (M,): rows below the diagonal of A's and of L's column, as bits of an integer.

        A column of L is the union of A's and of those columns of L whose first row it is; an integer of M
        bits makes such a union one machine operation per 64 levels.
        """
        m = order.size
        position = np.argsort(order)
        i, j = position[self.low], position[self.high]
        column, row = np.minimum(i, j), np.maximum(i, j)
        by_column = np.argsort(column)
        row = row[by_column]
        ends = np.searchsorted(column[by_column], np.arange(m + 1))
        children: dict[int, int] = {}
        for j in range(m):
            bits = np.zeros(m, bool)
            bits[row[ends[j] : ends[j + 1]]] = True
            own = _to_integer(bits)
            full = own | children.pop(j, 0)
            full &= ~(1 << j)  # the children have it as their first row
            if full:
                parent = (full & -full).bit_length() - 1
                children[parent] = children.get(parent, 0) | full
            yield own, full

    def count(self, order: np.ndarray) -> tuple[int, int]:
        """Non-zeros of A and of L in this order of the levels."""
        width = self.width[order]
        sets = [(int(k), _to_integer(width == k)) for k in np.unique(width)]
        own = full = 0
        for k, (a, b) in zip(width.tolist(), self.eliminate(order), strict=True):
            own += k * (k + 1) // 2 + k * sum(w * (a & s).bit_count() for w, s in sets)
            full += k * (k + 1) // 2 + k * sum(w * (b & s).bit_count() for w, s in sets)
        return own, full

    def minimum_degree(self, order: np.ndarray) -> np.ndarray:
        """Fill-reducing order of the levels (M,), starting from `order`.

        Always eliminates next the variable with fewest neighbours, on the quotient graph: an eliminated
        variable becomes an element, the set of its neighbours. Variables with equal neighbours are merged and
        their degree is external, without themselves; degrees are Amestoy's upper bounds; among ties the
        variable updated last comes first. CHOLMOD's AMD does the same but may break ties differently.
        Merging can cost a little: the six samples of Penicillin, merged, have external degree 6, as the last
        six plates do; going first they leave 204 non-zeros, where the plain degree (11 each) would keep 189.

        Sources: George & Liu 1989, SIAM Review 31(1); Amestoy, Davis & Duff 1996, SIAM J. Matrix Anal. Appl.
        17(4), algorithm 1.
        """
        m = order.size
        position = np.argsort(order)
        size = self.width[order].tolist()
        variables: list[set[int]] = [set() for _ in range(m)]  # neighbours not yet eliminated
        elements: list[set[int]] = [set() for _ in range(m)]  # pivots whose front holds the variable
        for i, j in zip(position[self.low].tolist(), position[self.high].tolist(), strict=True):
            variables[i].add(j)
            variables[j].add(i)
        members = [[i] for i in range(m)]
        fronts: dict[int, set[int]] = {}
        front_size: dict[int, int] = {}
        degree = [sum(size[j] for j in variables[i]) for i in range(m)]
        queue: defaultdict[int, dict[int, None]] = defaultdict(dict)  # a dictionary pops what came last
        for i in range(m):
            queue[degree[i]][i] = None
        left, lowest = sum(size), 0
        out: list[int] = []
        while left:
            while not queue[lowest]:
                lowest += 1
            pivot = queue[lowest].popitem()[0]
            front = variables[pivot].union(*(fronts[e] for e in elements[pivot]))
            front.discard(pivot)
            total = sum(size[i] for i in front)
            outside: dict[int, int] = {}  # rows of an element that are not in this front
            for i in front:
                del queue[degree[i]][i]
                for e in elements[i]:
                    outside[e] = outside.get(e, front_size[e]) - size[i]
            # an element inside this front adds nothing to it; those of the pivot are
            absorbed = elements[pivot] | {e for e, rest in outside.items() if rest == 0}
            for e in absorbed:
                del fronts[e]
            left -= size[pivot]
            covered = front | {pivot}
            alike: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
            for i in sorted(front):
                variables[i] = variables[i] - covered
                elements[i] = elements[i] - absorbed
                if not variables[i] and not elements[i]:  # no neighbour but the front: part of the pivot's clique
                    members[pivot] += members[i]
                    left -= size[i]
                    total -= size[i]
                    front.discard(i)
                    continue
                near = sum(map(size.__getitem__, variables[i])) + sum(map(outside.__getitem__, elements[i]))
                degree[i] = min(degree[i], near)  # the front is added once its size is known
                key = (len(variables[i]), len(elements[i]), sum(variables[i]), sum(elements[i]))
                for j in alike[key]:
                    if variables[i] == variables[j] and elements[i] == elements[j]:
                        members[j] += members[i]
                        size[j] += size[i]
                        front.discard(i)
                        for other in variables[i]:
                            variables[other].discard(i)
                        for e in elements[i]:
                            fronts[e].discard(i)
                        break
                else:
                    alike[key].append(i)
            for i in sorted(front):
                degree[i] = min(left - size[i], degree[i] + total - size[i])
                elements[i].add(pivot)
                queue[degree[i]][i] = None
                lowest = min(lowest, degree[i])
            fronts[pivot], front_size[pivot] = front, total
            out += sorted(members[pivot])
        return order[np.array(out)]


def _to_integer(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _to_bits(integer: int, m: int) -> np.ndarray:
    data = np.frombuffer(integer.to_bytes((m + 7) // 8, "little"), np.uint8)
    return np.unpackbits(data, count=m, bitorder="little").astype(bool)


@checked(weights=numeric, theta=numeric)
@dataclass(frozen=True, eq=False)
class Structure(Shown):
    """Non-zeros of A = Lambda'Z'WZ Lambda + I and of its Cholesky factor; made by `structure`.

    All counts are of entries of lower triangles, the diagonal included, from the pattern alone.

    Attributes:
        blocks: grouping factors in the chosen elimination order, most levels first.
        q: rows of A, dim u.
        nnz_A: non-zeros of A, whatever the order.
        nnz_L: of L in the chosen order.
        nnz_reversed: of L with the order of the factors reversed.
        nnz_permuted: of L when a general fill-reducing permutation is applied to that reversed order, as
            a sparse Cholesky does; None where it was not sought (crossed, above `MAX_PERMUTED_ROWS` rows).
        nnz_held: entries that this package stores: one k x k matrix per level eliminated by level, its
            couplings, and the dense remainder as a full square.
    """

    blocks: tuple[Block, ...]
    q: int
    nnz_A: int
    nnz_L: int
    nnz_reversed: int
    nnz_permuted: int | None
    nnz_held: int
    _design: Design = field(repr=False)
    _pattern: _Pattern = field(repr=False)
    #: chosen, reversed, permuted order of the levels
    _orders: tuple[np.ndarray, np.ndarray, np.ndarray | None] = field(repr=False)

    @property
    def fill_in(self) -> int:
        """Entries that are zero in A and not in L, in the chosen order."""
        return self.nnz_L - self.nnz_A

    def L_at(self, theta: Any, weights: Any = None) -> np.ndarray:
        """Dense lower Cholesky factor (q, q) of A at theta; columns by factor in the chosen order, then by level.

        Args:
            theta: (n_theta,) covariance parameters in lme4's order.
            weights: (n,) diagonal of W. Default: the prior weights, which is W of a linear mixed model;
                of a generalised one, pass the working weights at the modes.

        Raises:
            DataError: more than `MAX_DENSE_ROWS` rows, or theta or weights of another length.
        """
        d = self._design
        if self.q > MAX_DENSE_ROWS:
            raise DataError(f"L has {self.q:,} rows; as a dense matrix it is made up to {MAX_DENSE_ROWS:,}")
        theta = np.asarray(theta, np.float64)
        if theta.shape != (d.n_theta,):
            raise DataError(f"theta has shape {theta.shape}, this design has {d.n_theta} covariance parameters")
        w = np.asarray(d.weights if weights is None else weights, np.float64)
        if w.shape != (d.n,):
            raise DataError(f"weights have shape {w.shape}, this design has {d.n} rows")
        scaled, start = [], [0]
        for g, (z, m) in enumerate(zip(d.z, d.n_levels, strict=True)):
            T = np.zeros((z.shape[1], z.shape[1]))
            for t in d.terms:
                if t.block == g:
                    T[t.columns, t.columns] = t.structure.host_factor(theta[t.theta])
            scaled.append(np.asarray(z, np.float64) @ T)
            start.append(start[-1] + m * z.shape[1])
        A = np.eye(self.q)
        for g, left in enumerate(scaled):
            for h, right in enumerate(scaled[: g + 1]):
                shape = d.n_levels[g], d.n_levels[h]
                cell = np.asarray(d.level[g], np.int64) * shape[1] + np.asarray(d.level[h])
                corner = A[start[g] : start[g + 1], start[h] : start[h + 1]]
                for i, j in np.ndindex(left.shape[1], right.shape[1]):
                    sums = np.bincount(cell, w * left[:, i] * right[:, j], shape[0] * shape[1])
                    corner[i :: left.shape[1], j :: right.shape[1]] += sums.reshape(shape)
        return np.linalg.cholesky(A)

    def to_frame(self) -> pd.DataFrame:
        """One row per order: ordering, nnz_L, fill_in (missing where the permutation was not sought)."""
        import pandas as pd

        names = ["chosen", "factors reversed", "reversed, then permuted"]
        counts = [self.nnz_L, self.nnz_reversed, self.nnz_permuted]
        fill = [None if n is None else n - self.nnz_A for n in counts]
        numbers = {"nnz_L": pd.array(counts, "Int64"), "fill_in": pd.array(fill, "Int64")}
        return pd.DataFrame({"ordering": names, **numbers})

    def _factors(self) -> Table:
        how = ["level by level" if b.by_level else "in the dense remainder" for b in self.blocks]
        levels, columns = [f"{b.levels:,}" for b in self.blocks], [str(b.columns) for b in self.blocks]
        names = Column("factor", [b.name for b in self.blocks])
        return Table([names, Column("levels", levels), Column("columns", columns), Column("eliminated", how)])

    def _orderings(self) -> Table:
        def write(value: Any) -> str:
            return value if isinstance(value, str) else "-" if value is None else f"{value:,}"

        frame = self.to_frame()
        frame = frame.astype(object).where(frame.notna(), None)
        return Table([Column(str(name), [write(v) for v in frame[name]]) for name in frame])

    def _notes(self) -> tuple[str, str]:
        title = f"Lambda'Z'WZ Lambda + I: {self.q:,} rows, {self.nnz_A:,} non-zeros in its lower triangle"
        note = (
            "nnz_L counts the non-zeros of the Cholesky factor L; fill_in counts those that are zero in the matrix "
            "itself, each an entry to store and to compute at every evaluation. "
        )
        if self.nnz_L == self.nnz_A:
            note += "In the chosen order there is none. "
        if self.nnz_permuted is None:
            note += f"A permutation is not sought for crossed factors above {MAX_PERMUTED_ROWS:,} rows. "
        return title, note + f"This package stores {self.nnz_held:,} entries."

    def _report(self, page: bool) -> Sequence[str | Table]:
        title, note = self._notes()
        return [title, "", self._factors(), "", self._orderings(), "", note if page else textwrap.fill(note, 100)]

    def plot(self, theta: Any = None, ax: Any = None, weights: Any = None) -> Any:
        """Four panels: A, then L in the chosen order, in the reversed one and after the permutation.

        Entries of L that are zero in A (fill-in) have a colour of their own; thin lines separate the factors.
        A matrix with more rows than a panel has cells is drawn as a density.

        Args:
            theta: (n_theta,) colours L in the chosen order by |value| at theta, as `L_at` gives it.
            ax: four matplotlib axes; None makes a figure.
            weights: for `L_at`, with theta.

        Returns:
            The matplotlib figure.
        """
        if theta is None and weights is not None:
            raise ValueError("weights belong to theta, by which L is coloured; give both or neither")
        plt = pyplot()
        from matplotlib.colors import PowerNorm
        from matplotlib.patches import Patch

        if ax is None:
            _, ax = plt.subplots(1, 4, figsize=(14, 4), layout="constrained")
        axes = given_axes(ax, 4)
        step = -(-self.q // _CELLS)
        chosen, reverse, permuted = self._orders
        panels = [
            ("Matrix A", chosen, self.nnz_A, True),
            ("L, chosen order", chosen, self.nnz_L, True),
            ("L, factors reversed", reverse, self.nnz_reversed, True),
            ("L, reversed, then permuted", permuted, self.nnz_permuted, False),
        ]
        for panel, (title, order, count, lines) in zip(axes, panels, strict=True):
            panel.set(xticks=[], yticks=[], aspect="equal", xlim=(0, self.q), ylim=(self.q, 0))
            if order is None or count is None:
                panel.set_title(title, fontsize=10)
                text = f"not sought above\n{MAX_PERMUTED_ROWS:,} rows with\ncrossed factors"
                panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center")
                continue
            fill = count - self.nnz_A
            panel.set_title(f"{title}\n{count:,} non-zeros" + (f" ({fill:,} fill-in)" if fill else ""), fontsize=10)
            own, filled = self._raster(order, step)
            side = own.shape[0] * step
            place = {"extent": (0, side, side, 0), "aspect": "equal"}
            if panel is axes[1] and theta is not None:
                value = np.zeros((side, side))
                value[: self.q, : self.q] = np.abs(self.L_at(theta, weights))
                value = value.reshape(side // step, step, -1, step).max(axis=(1, 3))
                shown, norm = np.ma.masked_equal(value, 0), PowerNorm(0.5, vmin=0)
                drawn = panel.imshow(shown, norm=norm, cmap="viridis_r", **place)
                panel.figure.colorbar(drawn, ax=panel, shrink=0.7).ax.set_title("|L|", fontsize=9)
            else:
                panel.imshow(_blend(own, 0 * filled if panel is axes[0] else filled, step), **place)
            panel.set(xlim=(0, self.q), ylim=(self.q, 0))
            if lines:
                self._draw_factors(panel, self.blocks if order is chosen else self.blocks[::-1])
        keys = [Patch(color=_OWN, label="non-zero in A"), Patch(color=_FILL, label="fill-in")]
        axes[2].legend(handles=keys, loc="upper right", frameon=False)
        return axes[0].figure

    def _raster(self, order: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Non-zeros of A, and those that only L has, per cell of step x step entries."""
        width = self._pattern.width[order]
        start = np.cumsum(width) - width
        cells = -(-self.q // step)
        counts = np.zeros((2, cells, cells))
        for j, (own, full) in enumerate(self._pattern.eliminate(order)):
            below = [np.flatnonzero(np.repeat(_to_bits(x, order.size), width)) for x in (own, full ^ own)]
            for column in range(start[j], start[j] + width[j]):
                corner = np.arange(column, start[j] + width[j])
                for count, rows in zip(counts, (np.append(corner, below[0]), below[1]), strict=True):
                    count[:, column // step] += np.bincount(rows // step, minlength=cells)
        return counts[0], counts[1]

    def _draw_factors(self, panel: Any, blocks: Sequence[Block]) -> None:
        at = 0
        ticks = []
        for b in blocks:
            rows = b.levels * b.columns
            if at:
                panel.axhline(at, color="0.5", linewidth=0.6)
                panel.axvline(at, color="0.5", linewidth=0.6)
            if rows > 0.03 * len(b.name) * self.q:  # otherwise there is no room for the name
                ticks.append((at + rows / 2, b.name))
            at += rows
        panel.set_yticks([t for t, _ in ticks], [n for _, n in ticks], rotation=90, va="center")
        panel.tick_params(length=0)


def _blend(own: np.ndarray, fill: np.ndarray, step: int) -> np.ndarray:
    """Colours (cells, cells, 3): white where nothing is, the two hues in proportion, deeper where denser."""
    total = own + fill
    share = (fill / np.maximum(total, 1))[..., None]
    # the lightest shade is still seen on white: one entry in a large cell must not vanish
    depth = np.where(total > 0, 0.5 + 0.5 * np.sqrt(np.minimum(total / step**2, 1)), 0.0)[..., None]
    return 1 - depth * (1 - ((1 - share) * np.array(_OWN) + share * np.array(_FILL)))


@checked()
def structure(model_or_design: Any, names: Sequence[str] | None = None) -> Structure:
    """Symbolic structure of Lambda'Z'WZ Lambda + I and of its Cholesky factor.

    Args:
        model_or_design: a fitted model, or a `Design`.
        names: grouping factor of each random-effects term, in lme4's order. Default: those of the model;
            "1", "2", ... in elimination order for a design, which carries no labels.

    Returns:
        `Structure`; print it, or call its `plot`.

    Raises:
        TypeError: the argument is neither.
        DataError: `names` does not fit the terms.
    """
    design = model_or_design if isinstance(model_or_design, Design) else getattr(model_or_design, "_design", None)
    if not isinstance(design, Design):
        raise TypeError(f"structure needs a fitted model or a Design, got {type(model_or_design).__name__}")
    if names is None and design is not model_or_design:
        names = [term.group for term in model_or_design._data.terms]
    labels = [str(g + 1) for g in range(len(design.z))]
    if names is not None:
        if len(names) != len(design.terms):
            raise DataError(f"names has {len(names)} entries, this design has {len(design.terms)} random-effects terms")
        for name, term in zip(names, design.terms, strict=True):
            labels[term.block] = name
    plan, m = design.plan, design.n_levels
    k = [z.shape[1] for z in design.z]
    blocks = tuple(Block(labels[g], m[g], k[g], g < plan.n_eliminated) for g in range(len(m)))
    pattern = _pattern(design)
    number = np.split(np.arange(sum(m)), np.cumsum(m)[:-1])
    chosen, reverse = np.concatenate(number), np.concatenate(number[::-1])
    nnz_A, nnz_L = pattern.count(chosen)
    permuted = None
    if plan.n_eliminated == len(m) or design.q <= MAX_PERMUTED_ROWS:
        permuted = pattern.minimum_degree(reverse)
    held = plan.size**2 + sum(m[g] * k[g] ** 2 for g in range(plan.n_eliminated))
    for c in plan.couplings:
        if c.first < plan.n_eliminated and not in_matrix(plan, c):
            held += len(c.a) * k[c.first] * k[c.second]
    held += sum(m[g] * k[g] * plan.size for g in range(plan.n_eliminated) if plan.dense[g])
    return Structure(
        blocks,
        design.q,
        nnz_A,
        nnz_L,
        pattern.count(reverse)[1],
        None if permuted is None else pattern.count(permuted)[1],
        held,
        design,
        pattern,
        (chosen, reverse, permuted),
    )


def _pattern(design: Design) -> _Pattern:
    first = np.concatenate([[0], np.cumsum(design.n_levels)]).astype(np.int64)
    low, high = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for h in range(len(design.z)):
        for g in range(h):
            key = np.asarray(design.level[g], np.int64) * design.n_levels[h] + np.asarray(design.level[h])
            unique = np.unique(key)
            low.append(first[g] + unique // design.n_levels[h])
            high.append(first[h] + unique % design.n_levels[h])
    width = np.repeat([z.shape[1] for z in design.z], design.n_levels)
    return _Pattern(np.concatenate(low), np.concatenate(high), width)
