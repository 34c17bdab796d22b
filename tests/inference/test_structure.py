"""Symbolic structure: counts against brute-force elimination and CHOLMOD, values against lme4, the picture."""

from __future__ import annotations

import builtins
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import assert_close, fixed_params, load_data

import glmmjax as gj
from glmmjax.inference import structure as _structure
from glmmjax.inference.structure import Block, Structure, structure

PENICILLIN = "diameter ~ 1 + (1 | plate) + (1 | sample)"
CLASSROOM = "mathgain ~ mathkind + minority + ses + (1 | classid) + (1 | schoolid)"


def random_design(kind: str, seed: int) -> gj.Design:
    rng = np.random.default_rng(seed)
    n = 60
    # every level occurs: one without rows has no cross-products, its columns would not meet
    a, b, c = (np.concatenate([np.arange(m), rng.integers(0, m, n - m)]) for m in (17, 9, 4))
    if kind == "nested":
        b, c = a // 3, a // 9
    x = np.column_stack([np.ones(n), rng.normal(size=(n, 2))])
    widths = (2, 1, 3) if "slopes" in kind else (1, 1, 1)
    terms = [(x[:, :k], level) for k, level in zip(widths, (a, b, c), strict=True)]
    if kind == "slopes in two terms":
        terms.append((x[:, 1], a))
    return gj.design_arrays(rng.normal(size=n), np.ones((n, 1)), terms)


def entries(design: gj.Design) -> tuple[np.ndarray, list[np.ndarray]]:
    """Boolean pattern of Z'Z + I from a dense Z in the order of the blocks, and the columns of each block."""
    parts = []
    for z, level, m in zip(design.z, design.level, design.n_levels, strict=True):
        Z = np.zeros((design.n, m, z.shape[1]))
        Z[np.arange(design.n), level] = z
        parts.append(Z.reshape(design.n, -1))
    Z = np.concatenate(parts, axis=1) != 0
    ends = np.cumsum([p.shape[1] for p in parts])
    columns = np.split(np.arange(ends[-1]), ends[:-1])
    return (Z.T.astype(int) @ Z > 0) | np.eye(ends[-1], dtype=bool), columns


def eliminate(pattern: np.ndarray) -> int:
    """Non-zeros of L by Gaussian elimination on a dense boolean matrix."""
    L = pattern.copy()
    for j in range(len(L)):
        rows = np.flatnonzero(L[:, j])
        rows = rows[rows > j]
        L[np.ix_(rows, rows)] = True
    return int(np.tril(L).sum())


def plain_minimum_degree(pattern: np.ndarray) -> int:
    """Non-zeros of L when the row with fewest neighbours always goes next, neighbours counted one by one."""
    L, left, total = pattern.copy(), list(range(len(pattern))), 0
    while left:
        degrees = [L[i, left].sum() for i in left]
        pivot = left.pop(int(np.argmin(degrees)))
        rows = [i for i in left if L[i, pivot]]
        L[np.ix_(rows, rows)] = True
        total += 1 + len(rows)
    return total


def flat(s: Structure) -> str:
    """The text without its line breaks."""
    return " ".join(str(s).split())


# -------------------- counts
@pytest.mark.parametrize("kind", ["crossed", "nested", "crossed slopes", "slopes in two terms"])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_those_of_dense_elimination(kind: str, seed: int) -> None:
    design = random_design(kind, seed)
    s = structure(design)
    A, columns = entries(design)
    assert s.q == len(A) == design.q
    assert s.nnz_A == np.tril(A).sum()
    assert s.nnz_L == eliminate(A)
    assert s.fill_in == s.nnz_L - s.nnz_A
    back = np.concatenate(columns[::-1])
    assert s.nnz_reversed == eliminate(A[np.ix_(back, back)])

    # the permutation moves whole levels
    order = s._orders[2]
    assert order is not None and sorted(order) == list(range(sum(design.n_levels)))
    width = np.repeat([z.shape[1] for z in design.z], design.n_levels)
    start = np.cumsum(width) - width
    moved = np.concatenate([np.arange(start[i], start[i] + width[i]) for i in order])
    assert s.nnz_permuted == eliminate(A[np.ix_(moved, moved)])


@pytest.mark.parametrize("seed", range(20))
def test_permutation_is_close_to_plain_minimum_degree(seed: int) -> None:
    """Approximate degrees, merged variables and ties move the count either way (Penicillin: 204 against 189)."""
    design = random_design("crossed", seed)
    s = structure(design)
    assert s.nnz_permuted is not None
    assert s.nnz_permuted <= 1.15 * plain_minimum_degree(entries(design)[0])
    assert s.nnz_permuted <= s.nnz_reversed


def test_penicillin_counts_are_those_of_the_slides() -> None:
    """189, 450, 204: also Matrix::Cholesky(A) with perm = FALSE, reversed, and reversed with perm = TRUE."""
    design = gj.design(PENICILLIN, load_data("Penicillin"))
    s = structure(design, names=["plate", "sample"])
    assert s.blocks == (Block("plate", 24, 1, True), Block("sample", 6, 1, False))
    assert (s.nnz_A, s.nnz_L, s.nnz_reversed, s.nnz_permuted) == (174, 189, 450, 204)
    # 24 diagonal entries, 144 couplings, 6 x 6 remainder: equal to the permuted count by accident
    assert s.nnz_held == 24 + 144 + 36
    # the 204 come from merging the samples, not from the idea of a minimum degree
    assert plain_minimum_degree(entries(design)[0]) == 189


@pytest.mark.parametrize(
    "formula, data, counts",
    [
        ("strength ~ 1 + (1 | batch / cask)", "Pastes", (70, 70, 100, 70)),
        (CLASSROOM, "classroom", (731, 731, 1125, 731)),
    ],
)
def test_nested_factors_have_no_fill_in(formula: str, data: str, counts: tuple[int, ...]) -> None:
    s = structure(gj.design(formula, load_data(data)))
    assert (s.nnz_A, s.nnz_L, s.nnz_reversed, s.nnz_permuted) == counts  # Pastes: as Matrix::Cholesky
    assert s.fill_in == 0
    assert all(b.by_level for b in s.blocks)
    assert s.nnz_held == s.nnz_L
    assert "In the chosen order there is none." in flat(s)


def test_insteval_is_counted_in_seconds() -> None:
    s = structure(gj.design("y ~ 1 + (1 | s) + (1 | d) + (1 | dept)", load_data("InstEval")))
    assert s.nnz_L == 733_097  # Matrix::Cholesky(A, perm = FALSE)
    assert s.nnz_permuted is not None
    # CHOLMOD's AMD has 580,441
    assert 0.9 * 580_441 < s.nnz_permuted < 1.02 * 580_441


def test_slopes_store_full_squares() -> None:
    s = structure(gj.design("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy")))
    assert (s.nnz_A, s.nnz_L, s.nnz_held) == (18 * 3, 18 * 3, 18 * 4)


def test_levels_without_rows_stand_alone() -> None:
    level = np.array([0, 2, 4, 4])  # 1 and 3 occur in no row
    s = structure(gj.design_arrays(np.zeros(4), np.ones((4, 1)), [(np.ones(4), level), (np.ones(4), level // 2)]))
    assert s.nnz_A == 5 + 3 + 3
    assert s.nnz_L == s.nnz_A


# -------------------- values
def test_penicillin_factor_is_that_of_lme4() -> None:
    s = structure(gj.design(PENICILLIN, load_data("Penicillin")))
    L = s.L_at([1.2, 2.1])
    assert_close(np.diag(L)[:24], np.full(24, 3.104834939), atol=1e-9, what="diagonal")
    assert_close(L[24:, :24], np.full((6, 24), 0.8116373493), atol=1e-10, what="below the diagonal")
    assert_close(L[0, 0], 3.104834939, atol=1e-9)
    assert_close(2 * np.log(np.diag(L)).sum(), 80.22194479, atol=1e-8)
    assert (np.abs(L) > 1e-12).sum() == s.nnz_L
    for point in fixed_params("lmm_penicillin")["points"]:
        L = s.L_at(point["theta"])
        assert_close(2 * np.log(np.diag(L)).sum(), point["ldL2"], rtol=1e-12, what=str(point["theta"]))


@pytest.mark.parametrize("name", ["lmm_pastes", "lmm_sleep", "lmm_sleep_weights", "lmm_classroom"])
def test_log_determinant_is_that_of_lme4(name: str) -> None:
    record = fixed_params(name)
    data = load_data(record["dataset"])
    weights = np.asarray(data[record["weights"]]) if record["weights"] in data else None
    if record["weights"] and weights is None:
        pytest.skip("weights are an expression")
    s = structure(gj.design(record["formula"], data))
    for point in record["points"]:
        L = s.L_at(point["theta"], weights)
        assert_close(2 * np.log(np.diag(L)).sum(), point["ldL2"], rtol=1e-11, atol=1e-11, what=name)


@pytest.mark.parametrize("kind", ["crossed slopes", "slopes in two terms"])
def test_values_with_slopes(kind: str, rng: np.random.Generator) -> None:
    """L L' = Lambda'Z'WZ Lambda + I made from dense matrices, and no value lies outside the pattern."""
    design = random_design(kind, 5)
    s = structure(design)
    theta, w = rng.normal(size=design.n_theta), rng.uniform(0.5, 2.0, design.n)
    parts = []
    for g, (z, level, m) in enumerate(zip(design.z, design.level, design.n_levels, strict=True)):
        T = np.zeros((z.shape[1], z.shape[1]))
        for t in design.terms:
            if t.block == g:
                packed = theta[t.theta]
                r, c = np.tril_indices(t.structure.k)
                by_column = np.lexsort((r, c))
                T[t.first + r[by_column], t.first + c[by_column]] = packed
        parts.append(np.stack([np.where((level == i)[:, None], z @ T, 0) for i in range(m)], 1).reshape(design.n, -1))
    Z = np.concatenate(parts, axis=1)
    A = Z.T @ (w[:, None] * Z) + np.eye(design.q)
    L = s.L_at(theta, w)
    assert_close(L @ L.T, A, atol=1e-11)
    assert (L != 0).sum() <= s.nnz_L


# -------------------- text and table
def test_text_and_table() -> None:
    s = structure(gj.design(PENICILLIN, load_data("Penicillin")), names=["plate", "sample"])
    for part in ("plate", "level by level", "in the dense remainder", "189", "450", "204", "stores 204 entries"):
        assert part in flat(s)
    assert max(map(len, str(s).splitlines())) <= 100
    frame = s.to_frame()
    assert list(frame["nnz_L"]) == [189, 450, 204]
    assert list(frame["fill_in"]) == [15, 276, 30]
    assert "<table" in s._repr_html_() and "sample" in s._repr_html_()


def test_a_fitted_model_brings_its_names() -> None:
    design = gj.design(PENICILLIN, load_data("Penicillin"))
    terms = [SimpleNamespace(group="plate"), SimpleNamespace(group="sample")]
    model = SimpleNamespace(_design=design, _data=SimpleNamespace(terms=terms))
    assert [b.name for b in structure(model).blocks] == ["plate", "sample"]
    assert [b.name for b in structure(design).blocks] == ["1", "2"]


def test_the_permutation_is_left_out_where_it_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_structure, "MAX_PERMUTED_ROWS", 29)
    s = structure(gj.design(PENICILLIN, load_data("Penicillin")))
    assert s.nnz_permuted is None
    assert s.to_frame()["nnz_L"].isna().tolist() == [False, False, True]
    assert "not sought for crossed factors above 29 rows" in flat(s)
    assert "<td>-</td>" in s._repr_html_()
    nested = structure(gj.design("strength ~ 1 + (1 | batch / cask)", load_data("Pastes")))
    assert nested.nnz_permuted == 70


# -------------------- errors
def test_errors_say_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    design = gj.design(PENICILLIN, load_data("Penicillin"))
    with pytest.raises(TypeError, match="fitted model or a Design, got str"):
        structure("y ~ x")
    with pytest.raises(gj.DataError, match="names has 1 entries, this design has 2"):
        structure(design, names=["plate"])
    s = structure(design)
    with pytest.raises(gj.DataError, match=r"theta has shape \(3,\), this design has 2"):
        s.L_at([1.0, 2.0, 3.0])
    with pytest.raises(gj.DataError, match=r"weights have shape \(2,\), this design has 144 rows"):
        s.L_at([1.0, 2.0], [1.0, 1.0])
    monkeypatch.setattr(_structure, "MAX_DENSE_ROWS", 20)
    with pytest.raises(gj.DataError, match="L has 30 rows; as a dense matrix it is made up to 20"):
        s.L_at([1.0, 2.0])


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    s = structure(random_design("crossed", 0))
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"python -m pip install 'glmmjax\[plots\]'"):
        s.plot()


# -------------------- picture
@pytest.mark.parametrize("cells", [1000, 20])
def test_raster_holds_every_entry(cells: int) -> None:
    """Cell sums are the counts, at full resolution and when several entries share a cell."""
    s = structure(random_design("crossed slopes", 1))
    step = -(-s.q // cells)
    for order, count in zip(s._orders, (s.nnz_L, s.nnz_reversed, s.nnz_permuted), strict=True):
        assert order is not None
        own, fill = s._raster(order, step)
        assert own.sum() == s.nnz_A and (own + fill).sum() == count
        assert not np.triu(own + fill, 1).any()
    if step == 1:
        assert np.array_equal(s._raster(s._orders[0], 1)[0] > 0, np.tril(entries(s._design)[0]))


def test_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    plt = pytest.importorskip("matplotlib.pyplot")
    s = structure(gj.design(PENICILLIN, load_data("Penicillin")), names=["plate", "sample"])
    figure = s.plot()
    titles = [a.get_title() for a in figure.axes]
    assert [t.split("\n")[1] for t in titles] == [
        "174 non-zeros",
        "189 non-zeros (15 fill-in)",
        "450 non-zeros (276 fill-in)",
        "204 non-zeros (30 fill-in)",
    ]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["plate", "sample"]
    pixels = np.asarray(figure.axes[1].images[0].get_array())
    assert pixels.shape == (30, 30, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 3  # white, of A, fill-in
    figure.canvas.draw()

    coloured = s.plot(theta=[1.2, 2.1])
    shown = np.ma.asarray(coloured.axes[1].images[0].get_array())
    assert_close(shown.max(), s.L_at([1.2, 2.1]).max(), rtol=1e-12)
    assert shown.count() == s.nnz_L

    own, axes = plt.subplots(2, 2)
    monkeypatch.setattr(_structure, "_CELLS", 8)
    assert s.plot(theta=[1.2, 2.1], ax=axes) is own
    assert axes[0, 0].images[0].get_array().shape == (8, 8, 3)
    with pytest.raises(ValueError, match="4 axes, one per panel; got 1"):
        s.plot(ax=axes[0, 0])
    monkeypatch.setattr(_structure, "MAX_PERMUTED_ROWS", 29)
    left_out = structure(s._design).plot()
    assert "not sought above" in left_out.axes[3].texts[0].get_text()
    plt.close("all")
