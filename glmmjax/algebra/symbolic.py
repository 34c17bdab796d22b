"""Symbolic elimination: which blocks of Lambda'Z'WZ Lambda + I meet, done once per design on the host.

Blocks are the grouping factors, ordered by decreasing number of levels. A block is *eliminated* level
by level (one small matrix each) as long as its diagonal stays block diagonal: always for the first
one, and for the next one if every level eliminated before meets only one of its levels (nesting).
What remains is the dense remainder. All index arrays are int32 and are gathered and
scatter-added on the device by `linalg`.

This is block Gaussian elimination on the structure lme4 leaves to a sparse Cholesky (Bates et al.
2015, section 3); nested designs have no fill-in at all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from .._errors import DataError
from ..compiling.memory import aligned

#: Largest dense remainder, in bytes of one matrix; four of them may be alive at once.
MAX_DENSE_BYTES = 4 * 1024**3
#: Largest list of Schur products, in entries of 12 bytes.
MAX_PRODUCTS = 200_000_000

Index = Any  # int32: NumPy on the host, jax.Array once traced


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Coupling:
    """Pairs of levels of two blocks that meet in a row (or by fill-in)."""

    a: Index  # (P,) level in the first block
    b: Index  # (P,) level in the second block
    row_pair: Index | None  # (n,) pair of each row; None if the pair index is the first block's level
    first: int = field(metadata={"static": True})
    second: int = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Product:
    """Schur update C_eh' D_e^-1 C_ej of one eliminated block, as lists of pair products."""

    p: Index | None  # (N,) pair in coupling (e, h); None: all pairs in order
    q: Index | None  # (N,) pair in coupling (e, j)
    target: Index  # (N,) level of h, pair of (h, j), or position of the block's corner in the remainder
    left: int = field(metadata={"static": True})  # coupling index of (e, h)
    right: int = field(metadata={"static": True})  # coupling index of (e, j)
    kind: str = field(metadata={"static": True})  # "diagonal" | "pair" | "dense"
    into: int = field(metadata={"static": True})  # block h, or coupling index of (h, j)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Plan:
    """Elimination plan of a design.

    Blocks 0 .. n_eliminated - 1 are eliminated in order, the others form the dense remainder.
    """

    couplings: tuple[Coupling, ...]
    products: tuple[tuple[Product, ...], ...]  # per eliminated block
    n_eliminated: int = field(metadata={"static": True})
    offsets: tuple[int, ...] = field(metadata={"static": True})  # first row of each remainder block
    size: int = field(metadata={"static": True})  # rows of the dense remainder
    dense: tuple[bool, ...] = field(metadata={"static": True})  # per eliminated block: Schur by one matmul


def order_blocks(n_levels: list[int]) -> list[int]:
    """Elimination order: decreasing number of levels, ties in the order given."""
    return sorted(range(len(n_levels)), key=lambda g: -n_levels[g])


class _Pairs:
    """Unique pairs (a, b) of two blocks, sorted by a then b, with each row's pair (None: the level a itself)."""

    def __init__(self, a: np.ndarray, b: np.ndarray, row_pair: np.ndarray | None, nested: bool) -> None:
        self.a, self.b, self.row_pair, self.nested = a, b, row_pair, nested


def _observed_pairs(level_a: np.ndarray, level_b: np.ndarray, m_a: int, m_b: int) -> _Pairs:
    parent = np.zeros(m_a, np.int32)
    parent[level_a] = level_b
    if np.array_equal(parent[level_a], level_b):  # nested: one pair per level of a
        return _Pairs(np.arange(m_a, dtype=np.int32), parent, None, True)
    key = level_a.astype(np.int64) * m_b + level_b
    if m_a * m_b <= 8 * key.size:
        table = np.zeros(m_a * m_b, bool)
        table[key] = True
        unique = np.flatnonzero(table)
        number = np.cumsum(table, dtype=np.int32) - 1
        row_pair = number[key]
    else:
        unique, row_pair = np.unique(key, return_inverse=True)
    return _Pairs((unique // m_b).astype(np.int32), (unique % m_b).astype(np.int32), row_pair.astype(np.int32), False)


def _join(left: _Pairs, right: _Pairs, m: int) -> tuple[np.ndarray, np.ndarray]:
    """All (p, q) with the same first level."""
    count_left = np.bincount(left.a, minlength=m)
    count_right = np.bincount(right.a, minlength=m)
    total = int((count_left.astype(np.int64) * count_right).sum())
    if total > MAX_PRODUCTS:
        raise DataError(
            f"crossed grouping factors: eliminating the largest one needs {total:,} products of level pairs "
            f"(limit {MAX_PRODUCTS:,}); drop a crossed factor or aggregate its levels"
        )
    # 32 bits throughout: these are the largest arrays of a plan
    first_right = np.cumsum(count_right, dtype=np.int32) - count_right.astype(np.int32)
    repeats = count_right[left.a]
    p = np.repeat(np.arange(left.a.size, dtype=np.int32), repeats)
    before = np.cumsum(repeats, dtype=np.int32) - repeats.astype(np.int32)
    q = np.arange(total, dtype=np.int32)
    q += np.repeat(first_right[left.a] - before, repeats)
    return p, q


def make_plan(levels: list[np.ndarray], n_levels: list[int], widths: list[int], names: list[str]) -> Plan:
    """Plan the elimination of blocks that are already in elimination order.

    Args:
        levels: per block (n,) int32 level of each row.
        n_levels: per block its number of levels m.
        widths: per block its number of columns k.
        names: grouping factors, for messages.

    Raises:
        DataError: the dense remainder or the product lists would be too large; names the factor.
    """
    G = len(levels)
    pairs = {
        (g, h): _observed_pairs(levels[g], levels[h], n_levels[g], n_levels[h])
        for g in range(G)
        for h in range(g + 1, G)
    }
    return plan_of_pairs(pairs, n_levels, widths, names)


def possible_pairs(
    levels: list[np.ndarray], n_levels: list[int], nested: dict[tuple[int, int], bool]
) -> dict[tuple[int, int], _Pairs]:
    """Pairs of two blocks that may meet, whatever the rows: of nested ones level and parent, else all there are.

    Plans of designs with equal numbers of levels then have equal shapes. Rows' pairs are left to the caller.
    """
    out = {}
    for (g, h), inside in nested.items():
        m, k = n_levels[g], n_levels[h]
        if inside:
            parent = np.zeros(m, np.int32)
            parent[levels[g]] = levels[h]
            out[g, h] = _Pairs(np.arange(m, dtype=np.int32), parent, None, True)
        else:
            a, b = np.divmod(np.arange(m * k, dtype=np.int32), np.int32(k))
            out[g, h] = _Pairs(a, b, np.zeros(1, np.int32), False)
    return out


def plan_of_pairs(
    pairs: dict[tuple[int, int], _Pairs], n_levels: list[int], widths: list[int], names: list[str]
) -> Plan:
    """`make_plan` from the pairs of levels that meet."""
    G = len(n_levels)
    n_eliminated = 0
    while n_eliminated < G and all(pairs[e, n_eliminated].nested for e in range(n_eliminated)):
        n_eliminated += 1
    # No fill-in needs tracking: an eliminated block is nested in every block eliminated later, so the
    # pairs its elimination creates there were observed together in a row; the rest is dense anyway.
    sizes = [n_levels[g] * widths[g] for g in range(n_eliminated, G)]
    size = int(sum(sizes))
    if size * size * 8 > MAX_DENSE_BYTES:
        worst = n_eliminated + int(np.argmax(sizes))
        raise DataError(
            f"crossed grouping factors leave a dense block of {size:,} rows ({size * size * 8 / 1024**3:.1f} GiB), "
            f"most of it from {names[worst]!r} ({n_levels[worst]:,} levels x {widths[worst]} columns); the limit is "
            f"{MAX_DENSE_BYTES / 1024**3:.0f} GiB: drop that term or aggregate its levels"
        )
    if size >= 46_340:  # flat positions are int32
        raise DataError(f"crossed grouping factors leave a dense block of {size:,} rows; the limit is 46,340")
    offsets = [0] * n_eliminated + [int(sum(sizes[:i])) for i in range(len(sizes))]

    number: dict[tuple[int, int], int] = {}
    couplings: list[Coupling] = []
    for (g, h), pair in pairs.items():
        if pair.a.size:
            number[g, h] = len(couplings)
            couplings.append(Coupling(pair.a, pair.b, pair.row_pair, g, h))

    products: list[tuple[Product, ...]] = []
    dense: list[bool] = []
    for e in range(n_eliminated):
        joined = {
            (h, j): _schur_pairs(pairs[e, h], pairs[e, j], n_levels[e], h == j)
            for h in range(e + 1, G)
            for j in range(h, G)
        }
        # one multiply-add of a matrix product costs about 0.3 ns, a gathered and scattered product about 8 ns
        scattered = sum(
            b.size * widths[h] * widths[j] * widths[e] for (h, j), (_, _, b, _) in joined.items() if h >= n_eliminated
        )
        rows = n_levels[e] * widths[e]
        as_matrix = rows * size * size * 0.3 < scattered * 8.0 and rows * size < 2**25
        dense.append(as_matrix)
        out: list[Product] = []
        for (h, j), (p, q, b, c) in joined.items():
            left, right = number[e, h], number[e, j]
            if h >= n_eliminated and as_matrix:
                continue
            if h == j:
                same = b == c
                out.append(_product(p, q, b, same, left, right, "diagonal", h))
                if not same.all():
                    corner = _corner(offsets, widths, size, h, j, b, c)
                    out.append(_product(p, q, corner, ~same, left, right, "dense", h))
            elif h >= n_eliminated:
                corner = _corner(offsets, widths, size, h, j, b, c)
                out.append(_product(p, q, corner, None, left, right, "dense", h))
            else:
                pair, m_j = pairs[h, j], n_levels[j]
                target = (
                    b
                    if pair.nested
                    else np.searchsorted(pair.a.astype(np.int64) * m_j + pair.b, b.astype(np.int64) * m_j + c)
                )
                out.append(_product(p, q, target, None, left, right, "pair", number[h, j]))
        products.append(tuple(out))
    return Plan(tuple(couplings), tuple(products), n_eliminated, tuple(offsets), size, tuple(dense))


def _schur_pairs(
    left: _Pairs, right: _Pairs, m: int, symmetric: bool
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray, np.ndarray]:
    """Pair products (p, q) and the levels (b, c) they update; half of them if symmetric."""
    if left.nested and right.nested:
        return None, None, left.b, right.b
    p, q = _join(left, right, m)
    if symmetric:
        keep = p <= q
        p, q = p[keep], q[keep]
    return p, q, left.b[p], right.b[q]


def _corner(
    offsets: list[int], widths: list[int], size: int, h: int, j: int, b: np.ndarray, c: np.ndarray
) -> np.ndarray:
    """Flat position in the dense remainder of the corner of block (level b of h, level c of j)."""
    out = b.astype(np.int32)  # `plan_of_pairs` has seen to it that size^2 fits
    out *= widths[h]
    out += offsets[h]
    out *= size
    out += offsets[j]
    out += c.astype(np.int32) * np.int32(widths[j])
    return out


def _product(
    p: np.ndarray | None,
    q: np.ndarray | None,
    target: np.ndarray,
    keep: np.ndarray | None,
    left: int,
    right: int,
    kind: str,
    into: int,
) -> Product:
    if keep is not None and not keep.all():
        assert p is not None and q is not None
        p, q, target = p[keep], q[keep], target[keep]
    p, q = (None if x is None else aligned(x) for x in (p, q))
    return Product(p, q, aligned(target.astype(np.int32)), left, right, kind, into)
