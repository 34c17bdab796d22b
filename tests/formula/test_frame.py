"""Formula + data -> arrays, against frozen results of R (reference/model_matrix.R) and by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import glmmjax as gj
from glmmjax._errors import DataError, FormulaError
from glmmjax.formula.columns import Table, label_of
from glmmjax.formula.frame import build
from glmmjax.formula.functions import Evaluator
from glmmjax.formula.matrix import independent_columns
from glmmjax.formula.model_data import ModelData
from glmmjax.formula.parse import parse_expression

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "model_matrix.json").read_text())
TOL = 1e-12  # the JSON holds 15 significant digits


def _frame() -> pd.DataFrame:
    columns = {}
    for c in REFERENCE["data"]:
        if c["type"] in ("factor", "ordered"):
            columns[c["name"]] = pd.Categorical(c["values"], c["levels"], ordered=c["type"] == "ordered")
        else:
            columns[c["name"]] = c["values"]
    return pd.DataFrame(columns)


DATA = _frame()
NEW = pd.DataFrame({c["name"]: c["values"] for c in REFERENCE["new"]})


def _ids(key: str) -> list[str]:
    return [case["formula"] for case in REFERENCE[key]]


def _close(ours, theirs, tol=TOL):
    theirs = np.array(theirs, dtype=float)
    scale = np.maximum(1.0, np.nanmax(np.abs(theirs), initial=0.0))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tol * scale)


def _full(m: ModelData) -> np.ndarray:
    """The model matrix before aliased columns were dropped."""
    from glmmjax.formula.model_data import new_matrix

    return new_matrix(m._fixed, Evaluator(Table(DATA), m.formula.text, m._state, m._levels, False))


def check_fixed(case, contrasts=None):
    m = build(case["formula"], DATA, require_bars=False, contrasts=contrasts)
    assert list(m.all_x_names) == case["names"]
    assert list(m.term_labels) == case["labels"]
    X = np.array(case["X"]).reshape(len(case["names"]), len(DATA)).T
    _close(_full(m), X)
    kept = [i for i, name in enumerate(m.all_x_names) if name in m.x_names]
    assert len(kept) == np.linalg.matrix_rank(X) if X.size else not kept
    _close(m.X, X[:, kept])
    assert list(m.assign) == [case["assign"][i] for i in kept]
    assert m.X.flags.c_contiguous and m.X.dtype == np.float64
    if case.get("new"):
        new, _ = m.matrix_for(NEW)
        _close(new, np.array(case["new"]).T[:, kept], 1e-11)


@pytest.mark.parametrize("case", REFERENCE["fixed"], ids=_ids("fixed"))
def test_model_matrix_is_r(case):
    check_fixed(case)


@pytest.mark.parametrize("case", REFERENCE["contrasts"], ids=lambda c: f"{c['formula']} {list(c['contrasts'])}")
def test_contrasts_are_r(case):
    specs = {}
    for name, spec in case["contrasts"].items():
        if isinstance(spec, dict):
            columns = spec["columns"]
            specs[name] = pd.DataFrame(spec["matrix"], columns=columns) if columns else np.array(spec["matrix"])
        else:
            specs[name] = spec
    check_fixed(case, specs)


@pytest.mark.parametrize("case", REFERENCE["mixed"], ids=_ids("mixed"))
def test_random_terms_are_lme4(case):
    m = build(case["formula"], DATA)
    assert [(t.group, list(t.names)) for t in m.terms] == [(t["group"], t["names"]) for t in case["terms"]]
    for ours, theirs in zip(m.terms, case["terms"], strict=True):
        assert list(ours.levels) == theirs["levels"]
        assert ours.level.dtype == np.int32
        np.testing.assert_array_equal(ours.level, theirs["level"])
        _close(ours.z, np.array(theirs["z"]).T)


# ------------------------------------------------------------------------- transforms beyond the table


def test_polynomial_basis_is_orthonormal():
    m = build("y ~ poly(x, 3)", DATA, require_bars=False)
    _close(m.X[:, 1:].T @ m.X[:, 1:], np.eye(3))


def test_summaries_inside_a_formula_are_kept_for_new_data():
    m = build("y ~ I(x - mean(x)) + I(x/sd(x)) + center(x)", DATA, require_bars=False)
    assert m.dropped == ("I(x/sd(x))", "center(x)")
    X, _ = m.matrix_for(NEW)
    _close(X[:, 1], NEW["x"] - DATA["x"].mean())


def test_splines_continue_as_their_end_pieces():
    m = build("y ~ ns(x, 3)", DATA, require_bars=False)
    far = pd.DataFrame({"x": [10.0, 11.0, 12.0, -10.0, -11.0, -12.0]})
    X, _ = m.matrix_for(far)
    _close(X[0] - 2 * X[1] + X[2], np.zeros(4), 1e-9)  # linear beyond the boundary
    _close(X[3] - 2 * X[4] + X[5], np.zeros(4), 1e-9)


EXPRESSIONS = [  # formula part, the same by NumPy
    ("log1p(k) ", np.log1p(DATA["k"])),
    ("expm1(x)", np.expm1(DATA["x"])),
    ("I(x %% 2)", DATA["x"] % 2),
    ("I(k %/% 4)", DATA["k"] // 4),
    ("I(k^2 - 2*k)", DATA["k"] ** 2.0 - 2 * DATA["k"]),
    ("I(k ** 2)", DATA["k"] ** 2.0),
    ("I(-k^2)", -(DATA["k"] ** 2.0)),
    ("sin(x)", np.sin(DATA["x"])),
    ("I(cos(x) + tan(x))", np.cos(DATA["x"]) + np.tan(DATA["x"])),
    ("log10(k)", np.log10(DATA["k"])),
    ("np.log(k)", np.log(DATA["k"])),
    ("as.integer(x)", np.trunc(DATA["x"])),
    ("I(2 * (x > 1 & k < 5))", 2.0 * ((DATA["x"] > 1) & (DATA["k"] < 5))),
    ("I(1 * (x > 1 | !(k < 5)))", 1.0 * ((DATA["x"] > 1) | (DATA["k"] >= 5))),
    ("I((a == 'a2') * x)", (DATA["a"] == "a2") * DATA["x"]),
    ("I((o >= 'mid') * 1)", (DATA["o"] >= "mid") * 1.0),
    ("I(pi * x)", np.pi * DATA["x"]),
    ("as.numeric(a %in% c('a1', 'a3'))", DATA["a"].isin(["a1", "a3"]) * 1.0),
    ("round(x, 1)", np.round(DATA["x"], 1)),
    ("I(pmin(x, k, 2))", np.minimum(np.minimum(DATA["x"], DATA["k"]), 2)),
    (
        "I(x - median(x) + min(x) + max(x))",
        DATA["x"] - DATA["x"].median() + DATA["x"].min() + DATA["x"].max(),
    ),
]


@pytest.mark.parametrize("text, values", EXPRESSIONS, ids=[e[0] for e in EXPRESSIONS])
def test_expressions(text, values):
    m = build(f"y ~ 0 + {text}", DATA, require_bars=False)
    _close(m.X[:, 0], np.asarray(values, dtype=float), 1e-14)


def test_contrasts_for_a_column_with_an_unusual_name():
    d = DATA.rename(columns={"a": "my a"})
    m = build("y ~ `my a`", d, contrasts={"my a": "sum"}, require_bars=False)
    assert m.x_names == ("(Intercept)", "`my a`1", "`my a`2")


def test_integer_powers_do_not_overflow():
    d = {"y": np.arange(4.0), "k": np.array([3_000_000_000, 5, -7, 2**40]), "g": [1, 1, 2, 2]}
    m = build("y ~ I(k^3) + (1 | g)", d)
    _close(m.X[:, 1], d["k"].astype(float) ** 3)


# ------------------------------------------------------------------------------------------- response


def _d(**columns):
    return pd.DataFrame({"y": [1.0, 2.0, 4.0, 3.0, 5.0, 6.0], "g": list("aabbcc"), **columns})


def test_response_cbind():
    d = _d(s=[0, 1, 2, 3, 0, 4], f=[3, 2, 1, 0, 0, 4])
    m = build("cbind(s, f) ~ 1 + (1 | g)", d)
    assert m.response_kind == "cbind" and m.response_name == "cbind(s, f)" and m.response_levels is None
    np.testing.assert_array_equal(m.trials, [3, 3, 3, 3, 8])
    np.testing.assert_allclose(m.y, [0, 1 / 3, 2 / 3, 1, 0.5])
    assert m.notes == ("1 row with 0 trials dropped",)
    np.testing.assert_array_equal(m.keep, [True, True, True, True, False, True])


BINARY = [
    (pd.Categorical(list("NYNYNY"), ["N", "Y"]), ("N", "Y")),
    (pd.Categorical(list("NYNYNY"), ["Y", "N", "unused"]), ("Y", "N")),
    (list("NYNYNY"), ("N", "Y")),
    (np.array(list("NYNYNY")), ("N", "Y")),
    ([False, True] * 3, ("FALSE", "TRUE")),
    (pd.array([False, True] * 3, dtype="boolean"), ("FALSE", "TRUE")),
]


@pytest.mark.parametrize("column, levels", BINARY, ids=range(len(BINARY)))
def test_response_with_two_levels(column, levels):
    m = build("b ~ 1 + (1 | g)", _d(b=column))
    assert m.response_kind == "binary" and m.response_levels == levels and m.trials is None
    first_is_failure = np.array([0.0, 1.0] * 3)
    np.testing.assert_array_equal(m.y, first_is_failure if levels[0] != "Y" else 1 - first_is_failure)


def test_response_expressions():
    assert build("log(y) ~ 1 + (1 | g)", _d()).response_name == "log(y)"
    m = build("y > 3.5 ~ 1 + (1 | g)", _d())
    assert m.response_kind == "binary" and m.response_levels == ("FALSE", "TRUE")
    np.testing.assert_array_equal(m.y, [0, 0, 1, 0, 1, 1])


# ----------------------------------------------------------------------------------------- containers


def test_any_table_gives_the_same_arrays():
    frame = _d(x=[1.5, 2, 3, 4, 5, 7], f=["u", "v", "u", "v", "u", "u"], k=[1, 2, 3, 1, 2, 3])
    columns = {name: frame[name].to_numpy() for name in frame}
    record = np.empty(6, dtype=[(n, "U2" if n in "gf" else columns[n].dtype) for n in columns])
    for name, values in columns.items():
        record[name] = values

    class Foreign:  # what polars and others offer
        def to_pandas(self):
            return frame

    tables = {
        "dict of arrays": columns,
        "dict of lists": {n: v.tolist() for n, v in columns.items()},
        "structured array": record,
        "to_pandas": Foreign(),
        "categories": frame.astype({"g": "category", "f": "category"}),
        "nullable": frame.convert_dtypes(),
        "object": frame.astype({"g": object, "f": object}),
    }
    formula = "y ~ x*f + k + (x | g)"
    base = build(formula, frame)
    for name, table in tables.items():
        m = build(formula, table)
        assert m.x_names == base.x_names, name
        np.testing.assert_array_equal(m.X, base.X, err_msg=name)
        np.testing.assert_array_equal(m.y, base.y, err_msg=name)
        np.testing.assert_array_equal(m.terms[0].level, base.terms[0].level, err_msg=name)
        assert list(m.terms[0].levels) == ["a", "b", "c"], name


def test_not_a_table():
    with pytest.raises(TypeError, match="must be a DataFrame, a dict of arrays or a structured array, not list"):
        build("y ~ 1 + (1 | g)", [1, 2])
    with pytest.raises(DataError, match=r"differ in length \('y': 3, 'g': 2\)"):
        build("y ~ 1 + (1 | g)", {"y": [1, 2, 3], "g": [1, 2]})


def test_labels_of_numbers():
    assert [label_of(v) for v in (1, 1.0, 2.5, True, "x", np.int8(3), 0.1 + 0.2)] == "1 1 2.5 TRUE x 3 0.3".split()


def test_numeric_groups_sort_as_numbers_and_text_as_text():
    d = _d(k=[10, 9, 10, 9, 2, 2], t=["10", "9", "10", "9", "2", "2"])
    assert list(build("y ~ 1 + (1 | k)", d).terms[0].levels) == ["2", "9", "10"]
    assert list(build("y ~ 1 + (1 | t)", d).terms[0].levels) == ["10", "2", "9"]
    wide = _d(k=[10**15 + 1, 10**15 + 2] * 3)  # beyond a lookup table, and distinct as integers
    assert list(build("y ~ 1 + (1 | k)", wide).terms[0].levels) == ["1000000000000001", "1000000000000002"]


def test_small_category_codes_do_not_overflow():
    n = 120 * 110  # codes are int8; the product needs more
    d = pd.DataFrame({"a": pd.Categorical(np.arange(n) % 120), "b": pd.Categorical(np.arange(n) // 120 % 110)})
    d["y"] = np.arange(n) % 7
    assert d["a"].cat.codes.dtype == np.int8
    m = build("y ~ 1 + (1 | a:b)", d)
    assert len(m.terms[0].levels) == n
    np.testing.assert_array_equal(m.terms[0].level, (np.arange(n) % 120) * 110 + np.arange(n) // 120)


# ------------------------------------------------------------------------- missing rows, subset, weights


def test_missing_values_are_dropped_with_a_note():
    d = _d(x=[1, np.nan, 3, 4, 9, 6], f=["u", "v", None, "v", "u", "u"], unused=[np.nan] * 6)
    d.index = pd.Index(list("pqrstu"))
    m = build("y ~ x + f + (1 | g)", d)
    assert m.n_missing == 2 and m.missing_columns == ("x", "f")
    assert m.notes == ("2 rows with missing values in 'x', 'f' dropped",)
    assert list(m.row_index) == list("pstu")
    np.testing.assert_array_equal(m.keep, [1, 0, 0, 1, 1, 1])
    assert m.X.shape == (4, 3) and len(m.y) == 4 and len(m.terms[0].level) == 4
    with pytest.raises(DataError, match=r"2 rows with missing values in 'x', 'f' \(first in row q\)"):
        build("y ~ x + f + (1 | g)", d, na="error")


MISSING = [
    ("y", [None, 2.0, 1, 3, 4, 5]),
    ("y", pd.array([pd.NA, 2, 1, 3, 4, 5], dtype="Int64")),
    ("g", [None, "a", "b", "b", "c", "c"]),
    ("g", pd.Categorical([None, "a", "b", "b", "c", "c"])),
    ("g", [np.nan, 1.0, 2, 2, 3, 3]),
    ("x", pd.array([pd.NA, True, False, True, False, True], dtype="boolean")),
    ("x", np.array([None, 1, 2, 3, 4, 6], dtype=object)),
    ("x", [np.nan, "u", "v", "u", "v", "u"]),
    ("x", np.array([None, True, False, True, False, True], dtype=object)),
    ("x", np.ma.masked_array([9, 1, 2, 3, 4, 6], [1, 0, 0, 0, 0, 0])),
]


@pytest.mark.parametrize("name, values", MISSING, ids=[f"{n}-{i}" for i, (n, _) in enumerate(MISSING)])
def test_kinds_of_missing(name, values):
    data = {"y": [1.0, 2, 4, 3, 5, 6], "g": list("aabbcc"), "x": [1.0, 2, 4, 3, 5, 7]} | {name: values}
    for table in [data] + [pd.DataFrame(data)] * (not isinstance(values, np.ma.MaskedArray)):
        m = build("y ~ x + (1 | g)", table)
        assert m.missing_columns == (name,) and m.n_missing == 1 and m.nobs == 5
        assert m.X.shape == (5, 2) and np.isfinite(m.X).all()


def test_undefined_values_are_missing_and_named():
    with np.errstate(all="raise"):
        m = build("y ~ log(x) + (1 | g)", _d(x=[-1.0, 2, 3, 4, 5, 6]))
    assert m.missing_columns == ("log(x)",) and m.nobs == 5


def test_missing_comparisons_are_missing():
    d = _d(x=[np.nan, 2.0, 3, 4, 5, 6])
    m = build("y ~ I(x > 3) + (1 | g)", d)
    assert m.missing_columns == ("x",) and m.x_names == ("(Intercept)", "I(x > 3)TRUE")
    np.testing.assert_array_equal(m.X[:, 1], [0, 0, 1, 1, 1])


def test_levels_left_unused_are_dropped():
    d = _d(f=pd.Categorical(list("uvwuvw"), list("uvwz")))
    d["g"] = pd.Categorical(d["g"], list("zabc"))
    m = build("y ~ f + (1 | g)", d, subset="f != 'w'")
    assert m.x_names == ("(Intercept)", "fv")
    assert list(m.terms[0].levels) == ["a", "b", "c"]
    m = build("y ~ f + (1 | g)", d.assign(y=[1, 2, 3, 4, np.nan, np.nan]))
    assert list(m.terms[0].levels) == ["a", "b"] and m.terms[0].level.max() == 1


SUBSETS = [
    ("g != 'a'", [2, 3, 4, 5]),
    ("y > 2 & k < 3", [2, 3, 4]),
    ("!(k == 1)", [1, 2, 4, 5]),
    ("k %in% c(1, 3)", [0, 3, 5]),
    ("g %in% c('a', 'b') | k == 3", [0, 1, 2, 3, 5]),
    ("`a b` >= 2", [2, 3]),
    ("h == 3", [4, 5]),
    ("is.na(`a b`)", [1, 4]),
    (np.array([True, True, False, True, True, True]), [0, 1, 3, 4, 5]),
    (pd.Series([True, True, False, True, True, True], index=[5, 4, 3, 2, 1, 0]), [0, 1, 2, 4, 5]),
]


@pytest.mark.parametrize("subset, rows", SUBSETS, ids=[str(i) for i in range(len(SUBSETS))])
def test_subset(subset, rows):
    d = _d(k=[1, 2, 2, 1, 2, 3], h=pd.Categorical([1, 1, 2, 2, 3, 3]))
    d["a b"] = [1, np.nan, 2, 3, np.nan, 1]
    m = build("y ~ 1", d, subset=subset, require_bars=False)
    assert list(m.row_index) == rows


def test_weights_and_offset():
    d = _d(w=[1, 2, 0, 1, 1, 3], e=[1.0, 2, 3, 4, 5, 6])
    m = build("y ~ 1 + offset(log(e)) + (1 | g)", d, weights="w", offset="e")
    assert m.notes == ("1 row of weight 0 dropped",)
    np.testing.assert_array_equal(m.weights, [1, 2, 1, 1, 3])
    rows = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(m.offset, (d["e"] + np.log(d["e"]))[rows])
    by_array = build("y ~ 1 + offset(log(e)) + (1 | g)", d, weights=d["w"].to_numpy(), offset=d["e"][::-1])
    np.testing.assert_array_equal(by_array.weights, m.weights)
    np.testing.assert_array_equal(by_array.offset, m.offset)  # the Series is aligned by its labels
    expression = build("y ~ 1 + (1 | g)", d, offset="log(e)")
    np.testing.assert_allclose(expression.offset, np.log(d["e"]))
    plain = build("y ~ 1 + (1 | g)", d)
    assert plain.weights is None and plain.offset is None
    missing = build("y ~ 1 + (1 | g)", d.assign(w=[1, 2, np.nan, 1, 1, 3]), weights="w")
    assert missing.missing_columns == ("w",)


# ------------------------------------------------------------------------------------ rank deficiency


def test_aliased_columns_are_dropped_from_the_right():
    d = _d(x=[1.0, 2, 3, 4, 5, 7], z=[2.0, 4, 6, 8, 10, 14])
    m = build("y ~ x + z + I(x^2) + (1 | g)", d)
    assert m.dropped == ("z",) and m.x_names == ("(Intercept)", "x", "I(x^2)")
    assert m.all_x_names == ("(Intercept)", "x", "z", "I(x^2)")
    assert m.assign == (0, 1, 3) and m.term_labels == ("x", "z", "I(x^2)")
    assert m.notes == ("dropped 1 aliased column of the fixed effects (rank deficient): z",)
    X, _ = m.matrix_for(d)
    np.testing.assert_array_equal(X, m.X)


def test_empty_cells_are_dropped():
    d = _d(a=list("uuvvuv"), b=list("ststss"))
    d = d[~((d.a == "v") & (d.b == "t"))]
    assert build("y ~ a*b + (1 | g)", d).dropped == ("av:bt",)


def test_rank_tolerance():
    rng = np.random.default_rng(3)
    x, noise = rng.normal(size=(2, 50))
    ones = np.ones(50)
    for size, kept in ((1e-5, True), (1e-6, True), (1e-8, False), (1e-11, False)):
        near = x + size * noise
        X = np.column_stack([ones, x, near, x + noise])
        # where `near` stays, the last column is the sum of its neighbours
        assert independent_columns(X).tolist() == [True, True, kept, not kept], size
    X = np.column_stack([ones, 1e9 + x, x * 1e-12])  # scale alone is no reason to drop; the shift is
    assert independent_columns(X).tolist() == [True, False, True]
    assert independent_columns(np.column_stack([ones, x, x * 1e-12 + 1e-13 * noise])).all()
    assert independent_columns(np.eye(3, 5)).tolist() == [True] * 3 + [False] * 2
    assert independent_columns(np.zeros((4, 2))).tolist() == [False, False]
    assert independent_columns(np.empty((4, 0))).size == 0


# -------------------------------------------------------------------------------------------- new data


def test_matrix_for_new_data_needs_no_response():
    d = _d(x=[1.0, 2, 3, 4, 5, 7], f=list("uvuvuw"))
    m = build("y ~ scale(x)*f + offset(log(e)) + (x | g)", d.assign(e=1.0 + d.x), offset="x")
    new = pd.DataFrame({"x": [10.0, np.nan], "f": ["w", "u"], "e": [1.0, 2], "g": ["c", "q"]})
    X, offset = m.matrix_for(new)
    assert X.shape == (2, len(m.x_names))
    z = (10 - d.x.mean()) / d.x.std()
    expected = dict(zip(m.all_x_names, [1, z, 0, 1, 0, z], strict=True))
    _close(X[0], [expected[n] for n in m.x_names])
    assert np.isnan(X[1]).any()
    np.testing.assert_allclose(offset, [10.0, np.nan])
    terms = m.terms_for(new)
    assert [t.group for t in terms] == ["g"]
    np.testing.assert_array_equal(terms[0].level, [2, -1])
    assert terms[0].unknown == ("q",) and terms[0].z[0].tolist() == [1.0, 10.0]


def test_new_data_reproduces_the_fit():
    for case in REFERENCE["mixed"] + REFERENCE["fixed"]:
        m = build(case["formula"], DATA, require_bars=False)
        X, _ = m.matrix_for(DATA.drop(columns="y"))
        np.testing.assert_array_equal(X, m.X, err_msg=case["formula"])
        for ours, again in zip(m.terms, m.terms_for(DATA.drop(columns="y")), strict=True):
            np.testing.assert_array_equal(again.z, ours.z)
            np.testing.assert_array_equal(again.level, ours.level)
            assert again.unknown == ()


def test_new_group_labels():
    d = _d(h=[1, 2, 1, 2, 1, 2])
    m = build("y ~ 1 + (1 | g/h) + (1 | h)", d)
    new = {"g": ["a", "b", "z", None], "h": [2.0, 5.0, 1.0, 1.0]}  # 2.0 is the level "2"
    by_group = {t.group: t for t in m.terms_for(new)}
    np.testing.assert_array_equal(by_group["h:g"].level, [list(m.terms[0].levels).index("2:a"), -1, -1, -1])
    assert by_group["h:g"].unknown == ("5:b", "1:z", "1:NA")
    np.testing.assert_array_equal(by_group["g"].level, [0, 1, -1, -1])
    np.testing.assert_array_equal(by_group["h"].level, [1, -1, 0, 0])
    assert by_group["h"].unknown == ("5",)


def test_new_data_with_few_levels_keep_the_codings_of_the_fit():
    m = build("y ~ factor(k) + relevel(a, ref = 'a2') + as.numeric(c) + o + l", DATA, require_bars=False)
    some = DATA.iloc[[4]].copy()
    for name in "aco":
        some[name] = some[name].astype(str)
    X, _ = m.matrix_for(some)
    _close(X[0], m.X[4])


def test_new_data_errors():
    d = _d(x=[1.0, 2, 3, 4, 5, 7], f=list("uvuvuw"))
    m = build("y ~ x + f + (1 | g)", d, offset=np.arange(6.0))
    with pytest.raises(
        DataError, match="'f' of the new data has levels that were not in the fit: 'q'; the fit has 'u'"
    ):
        m.matrix_for({"x": [1.0], "f": ["q"]})
    with pytest.raises(DataError, match="no column 'f' in the data"):
        m.matrix_for({"x": [1.0], "ff": ["u"]})
    with pytest.raises(DataError, match="'x' was numeric in the fit but is a factor in the new data"):
        m.matrix_for({"x": ["one"], "f": ["u"]})
    with pytest.raises(DataError, match="fitted with an offset array"):
        m.matrix_for({"x": [1.0], "f": ["u"]})
    X, offset = m.matrix_for({"x": [1.0], "f": ["u"]}, offset=[2.5])
    assert offset.tolist() == [2.5] and X.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    with pytest.raises(DataError, match="no column 'g'"):
        m.terms_for({"x": [1.0], "f": ["u"]})


# -------------------------------------------------------------------------------------- random effects


def test_double_bar_takes_a_factor_apart():
    m = build("y ~ 1 + (a || g)", DATA)
    assert [t.names for t in m.terms] == [("(Intercept)",), ("aa2",), ("aa3",)]
    for t, name in zip(m.terms[1:], ("a2", "a3"), strict=True):
        np.testing.assert_array_equal(t.z[:, 0], DATA["a"] == name)
    m = build("y ~ 1 + (0 + a || g)", DATA)
    assert [t.names for t in m.terms] == [("aa1",), ("aa2",), ("aa3",)]
    same = build("y ~ 1 + diag(a | g)", DATA)
    assert [t.names for t in same.terms] == [("(Intercept)",), ("aa2",), ("aa3",)]
    assert m.formula_bars == ("(0 + a | g)",) * 3
    assert build("y ~ (x || a/g)", DATA).formula_bars == (
        "(0 + x | g:a)",  # level counts increase in the order written, so decreasing with ties reversed
        "(1 | g:a)",
        "(0 + x | a)",
        "(1 | a)",
    )
    whole = build("y ~ 1 + us(a | g)", DATA)
    assert [t.names for t in whole.terms] == [("(Intercept)", "aa2", "aa3")]


def test_double_bar_of_a_factor_is_said_once():
    rng = np.random.default_rng(1)
    d = pd.DataFrame({"f": rng.choice(list("abc"), 90), "g": rng.integers(0, 9, 90), "x": rng.normal(size=90)})
    d["y"] = rng.normal(size=90)
    with pytest.warns(UserWarning, match=r"\(f \|\| g\) makes each") as seen:
        setup = gj.lmer_setup("y ~ 1 + (f || g)", d)
    assert len(seen) == 1 and "(0 + fb | g), (0 + fc | g)" in str(seen[0].message)
    assert setup.data.shown_terms == ("(1 | g)", "(0 + fb | g)", "(0 + fc | g)")
    many = pd.concat([d.assign(id=1), d.assign(id=2)], ignore_index=True)
    for given in ({"data": many, "by": "id"}, {"data": d, "y": d[["y", "x"]]}):
        with pytest.warns(UserWarning, match=r"\(f \|\| g\) makes each") as seen:
            gj.fit_many("y ~ 1 + (f || g)", **given)
        assert len(seen) == 1
    with pytest.warns(UserWarning, match=r"\(0 \+ poly\(x, 2\) \| g\), with all their"):
        gj.lmer_setup("y ~ 1 + (poly(x, 2) || g)", d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numbers are apart in lme4 too
        gj.lmer_setup("y ~ 1 + (x || g)", d)
        gj.lmer_setup("y ~ 1 + (f | g)", d)


def test_rows_are_those_of_every_variable_named():
    """Row counts of model.frame in R 4.2.2 and of lme4 1.1-31."""
    d = pd.DataFrame({"y": np.arange(12.0) % 5, "x": np.arange(12.0), "g": list("abc") * 4, "h": list("uv") * 6})
    d["f"] = ["p", "q", "r", None] * 3
    d["z"] = [np.nan, np.inf] + [1.0] * 10
    for text, n in {
        "y ~ x + f - f + (1 | g)": 9,
        "y ~ x - f + (1 | g)": 9,
        "y ~ -f + x + (1 | g)": 9,
        "y ~ x + (1 + f - f | g)": 9,
        "y ~ x + (-z | g)": 11,  # of an infinite value nothing is asked where it is not used
        "y ~ x - z + z:f - z:f + (1 | g)": 8,
        "y ~ x + offset(z) - offset(z) + (1 | g)": 11,
        "y ~ x + I(z^0) + (1 | g)": 12,  # NA^0 is 1
        "y ~ x + (1 | g) + (1 | f:h)": 9,
    }.items():
        assert build(text, d).nobs == n, text
    d["when"] = pd.to_datetime(["2020-01-01", None] + ["2020-01-02"] * 10)  # of a type that no model can use
    assert build("y ~ . - when - z - f + (1 | g)", d).nobs == 7  # rows 0, 1, 3, 7, 11 miss z, when, f
    with pytest.raises(DataError, match="column 'when' holds dates"):
        build("y ~ x - when + (when | g)", d)
    assert build("y ~ x - h + (h | g)", d).terms[0].names == ("(Intercept)", "hv")
    whole, part = build("y ~ x + f + (1 | g)", d), build("y ~ x + f - f + (1 | g)", d)
    np.testing.assert_array_equal(whole.keep, part.keep)


UNKNOWN = [  # an argument that a function does not have here is an error that names it
    ("poly(x, k, 2)", "'2' is not a column"),
    ("poly(x, 2, TRUE)", "raw by its name"),
    ("poly(x, 2, degree = 2)", "given twice"),
    ("poly(x, degree = 2, degree = 3)", "'degree' of poly\\(\\) is given twice"),
    ("poly(x, coefs = 2)", "no argument 'coefs'"),
    ("poly(x, 2, raw = 'yes')", "raw of poly\\(\\) must be TRUE or FALSE"),
    ("pmax(x, 0, na.rn = TRUE)", "no argument 'na.rn'"),
    ("relevel(k, 2)", "relevel\\(\\) is for factors"),
    ("relevel(o, 'mid')", "unordered"),
    ("relevel(a, 4)", "1 to 3"),
    ("cut(x, 3, lab = FALSE)", "no argument 'lab'"),
    ("cut(x, 3, labels = 'A')", "1 labels for 3 intervals"),
    ("cut(x, c(0, 0, 9))", "must differ"),
    ("cut(x, 3, right = 'no')", "right of cut\\(\\) must be"),
    ("ns(x, 2, degree = 2)", "no argument 'degree'"),
    ("bs(x, 5, warn.outside = FALSE)", "no argument 'warn.outside'"),
    ("bs(x, 5, intercept = 'yes')", "intercept of bs"),
    ("scale(x, scale = 0)", "scale must not be 0"),
    ("factor(a, levels = c('a1', 'a1'))", "two levels of factor\\(\\) are the same"),
    ("factor(a, exclude = NULL)", "missing values cannot be a level"),
    ("factor(a, levels = NULL)", "levels must be text or numbers"),
    ("factor(a, nmax = 2)", "no argument 'nmax'"),
    ("ordered(a, ordered = FALSE)", "no argument 'ordered'"),
    ("round(x, 1, 2)", "too many arguments"),
    ("round(x, 1.5)", "whole number"),
    ("log(k, 2, 3)", "too many arguments"),
    ("offset(x, k)", "too many arguments"),
    ("I(x, k)", "too many arguments"),
    ("exp(x, base = 2)", "no argument 'base'"),
    ("ifelse(l, 1)", "needs test, yes and no"),
    ("ifelse(x > 1, a, b)", "must be numeric but is a factor"),
    ("ifelse(x > 1, s, 2)", "must be numeric"),
    ("ifelse(TRUE, x, 0)", "must be a column"),
    ("interaction(a, 2)", "is not a column"),
    ("interaction(a, b, seq = '_')", "no argument 'seq'"),
    ("C(a, sum, base = 2)", "base is of treatment contrasts only"),
    ("C(a, helmert, 1)", "how.many is not available"),
    ("C(a, c(1, 1, 1))", "the same for all levels"),
    ("C(a, c(1, 2))", "2 contrast values for 3 levels"),
    ("C(a, 2)", "contrasts are a name"),
    ("mean(x, trim = 0.1)", "no argument 'trim'"),
    ("I(x - min(x, k))", "takes one column"),
    ("I(x + c(1, 2))", "combines 2 and 36 values"),
    ("I(poly(x, 2) + x)", "several columns at once"),
    ("as.numeric(x, 3)", "too many arguments"),
    ("x == '\\d'", "in a string is not available"),
]


@pytest.mark.parametrize("text, says", UNKNOWN, ids=[u[0] for u in UNKNOWN])
def test_arguments_are_used_or_refused(text, says):
    with pytest.raises(FormulaError, match=says):
        build(f"y ~ {text}", DATA, require_bars=False)


def test_functions_of_levels():
    """As R's factor(): excluded and unnamed levels are missing, equal labels are one level, one label is numbered."""
    m = build("y ~ factor(c, exclude = 'v')", DATA, require_bars=False)
    assert m.x_names[1:] == tuple(f'factor(c, exclude = "v"){v}' for v in "wz")
    assert m.nobs == (DATA["c"] != "v").sum()
    m = build("y ~ factor(c, labels = 'L')", DATA, require_bars=False)
    assert [n[-2:] for n in m.x_names[1:]] == ["L2", "L3", "L4"]
    few = DATA.iloc[:3]
    np.testing.assert_array_equal(m.matrix_for(few)[0], m.X[:3])  # new data keep the numbers of the fit
    m = build("y ~ (1 | factor(c, labels = c('p', 'q', 'p', 'r')))", DATA)
    assert list(m.terms[0].levels) == ["p", "q", "r"]
    np.testing.assert_array_equal(m.terms[0].level == 0, DATA["c"].isin(["u", "w"]))
    with pytest.raises(FormulaError, match="add na.rm = TRUE"):
        build("y ~ I(x - mean(x))", DATA.assign(x=DATA["x"].where(DATA["k"] > 1)), require_bars=False)
    m = build("y ~ I(x - mean(x, na.rm = TRUE))", DATA.assign(x=DATA["x"].where(DATA["k"] > 1)), require_bars=False)
    assert abs(m.X[:, 1].mean()) < 1e-12
    m = build("y ~ pmax(x, z, na.rm = TRUE)", _d(x=[1.0, 2, np.nan, 4, 5, 6], z=[3.0] * 6), require_bars=False)
    np.testing.assert_array_equal(m.X[:, 1], [3, 3, 3, 4, 5, 6])


def test_rounding_is_r():
    """R 4.2.2, e.g. round(c(0.15, 0.25, 0.35, 2.5, -1.5), 1) and round(c(.285, 1.005, 2.675, 5.015), 2)."""
    for digits, values, rounded in (
        (1, [0.15, 0.25, 0.35, 2.5, -1.5, np.nan], [0.1, 0.2, 0.3, 2.5, -1.5, np.nan]),
        (2, [0.285, 1.005, 2.675, 5.015, -2.675, np.inf], [0.28, 1.0, 2.67, 5.02, -2.67, np.inf]),
        (-1, [15.0, 25, 35, -5, 5.5, 0], [20.0, 20, 40, 0, 10, 0]),
    ):
        m = Evaluator(Table({"x": values}), "", {}, {}, True)
        np.testing.assert_array_equal(m.variable(parse_expression(f"round(x, {digits})")), rounded)


def test_grouping_by_an_expression():
    m = build("y ~ 1 + (1 | factor(k > 4)) + (1 | interaction(a, b))", DATA)
    by_group = {t.group: list(t.levels) for t in m.terms}
    assert by_group["factor(k > 4)"] == ["FALSE", "TRUE"]
    assert by_group["interaction(a, b)"] == ["a1.lo", "a2.lo", "a3.lo", "a1.hi", "a2.hi", "a3.hi"]


def test_dot():
    d = _d(x=[1.0, 2, 3, 4, 5, 7])
    assert build("y ~ . + (1 | g)", d).x_names == ("(Intercept)", "x")
    assert str(build("y ~ . + (1 | g)", d).formula) == "y ~ x + (1 | g)"


# ---------------------------------------------------------------------------------------------- errors

FORMULA = "y ~ x + (1 | g)"
X6 = [1.0, 2, 3, 4, 5, 7]
UV = list("uvuvuv")
DATES = pd.date_range("2024-01-01", periods=6)
BAD = [  # formula, columns that differ, keyword arguments, error, message
    ("y ~ xx + (1 | g)", {}, {}, DataError, "no column 'xx' in the data; did you mean 'x'?"),
    ("Y ~ x + (1 | g)", {}, {}, DataError, "no column 'Y' in the data; did you mean 'y'?"),
    ("y ~ quite + (1 | g)", {}, {}, DataError, "no column 'quite' in the data; its columns are: y, g, x"),
    ("y ~ x", {}, {}, FormulaError, r"no random-effects term in 'y ~ x': add e.g. \(1 \| group\)"),
    ("~ x + (1 | g)", {}, {}, FormulaError, "the formula has no response; write e.g. y ~x"),
    (FORMULA, {"x": [1, np.inf, 3, 4, 5, -np.inf]}, {}, DataError, r"'x' has 2 infinite values \(first in"),
    (FORMULA, {"y": [1, 2, np.inf, 4, 5, 6]}, {}, DataError, r"'y' has 1 infinite value \(first in row 2\)"),
    ("y ~ log(x) + (1 | g)", {"x": [0.0, 1, 2, 3, 4, 5]}, {}, DataError, r"'log\(x\)' has 1 infinite value"),
    ("y ~ bs(x) + (1 | g)", {"x": [1, np.inf, 3, 4, 5, 6]}, {}, DataError, "has 1 infinite value"),
    ("y ~ poly(x, 2) + (1 | g)", {"x": [1, np.inf, 3, 4, 5, 6]}, {}, DataError, "has 1 infinite value"),
    ("y ~ 1 + (x | g)", {"x": [1, np.inf, 3, 4, 5, 6]}, {}, DataError, "column 'x' has 1 infinite value"),
    (FORMULA, {}, {"weights": [1, 2, 3, 4, 5, np.inf]}, DataError, "the weights vector has 1 infinite value"),
    (FORMULA, {}, {"offset": [1, 2, 3, 4, 5, np.inf]}, DataError, "the offset has 1 infinite value"),
    (FORMULA, {"x": [np.nan] * 6}, {}, DataError, "no rows are left: 6 rows with missing values"),
    (FORMULA, {}, {"subset": [False] * 6}, DataError, "no rows are left: the subset is empty"),
    (FORMULA, {"g": ["a"] * 6}, {}, DataError, r"grouping factor 'g' has only one level \('a'\)"),
    (FORMULA, {"y": [2.0] * 6}, {}, DataError, "the response 'y' is constant: every row is 2"),
    (FORMULA, {"y": ["n"] * 6}, {}, DataError, "the response 'y' is constant: every row is 'n'"),
    (FORMULA, {"y": list("abcabc")}, {}, DataError, r"the response 'y' has 3 levels \('a', 'b', 'c'\)"),
    ("poly(y, 2) ~ x + (1 | g)", {}, {}, DataError, r"the response 'poly\(y, 2\)' has several columns"),
    ("cbind(y, x, x) ~ 1 + (1 | g)", {}, {}, FormulaError, r"cbind\(\) has 3 arguments; write cbind\(succ"),
    ("cbind(x, -y) ~ 1 + (1 | g)", {}, {}, DataError, r"'-y' in cbind\(\) is negative \(first in row 0\)"),
    ("cbind(y, 0*y) ~ 1 + (1 | g)", {}, {}, DataError, "the response is constant: all trials are successes"),
    (FORMULA, {"x": DATES}, {}, DataError, "column 'x' holds dates or times"),
    (FORMULA, {"g": DATES}, {}, DataError, "column 'g' holds dates or times"),
    (FORMULA, {"x": [1j] * 6}, {}, DataError, "column 'x' has type complex128"),
    (FORMULA, {"x": [[1], [2], [3], [4], [5], [6]]}, {}, DataError, "column 'x' holds objects of type list"),
    (FORMULA, {"x": ["u"] * 6}, {}, DataError, r"factor 'x' has only one level \('u'\) in the rows used"),
    ("y ~ 1 + (x | g)", {"x": ["u"] * 6}, {}, DataError, "factor 'x' has only one level"),
    (FORMULA, {}, {"weights": [1, 2, 3]}, DataError, "weights has 3 values, but the data have 6 rows"),
    (FORMULA, {}, {"offset": [1, 2, 3]}, DataError, "offset has 3 values, but the data have 6 rows"),
    (FORMULA, {}, {"weights": [1, 2, 3, -1, 1, 1]}, DataError, r"1 negative value \(first in row 3\)"),
    (FORMULA, {}, {"weights": "g"}, DataError, "the weights 'g' is not numeric"),
    (FORMULA, {}, {"weights": list("abcdef")}, DataError, "weights is not numeric"),
    (FORMULA, {}, {"weights": "ww"}, DataError, "weights: no column 'ww' in the data"),
    (FORMULA, {}, {"weights": 2.0}, TypeError, "weights must be a column name, an array or a Series"),
    (FORMULA, {}, {"weights": [0] * 6}, DataError, "no rows are left: 6 rows of weight 0 dropped"),
    (FORMULA, {}, {"subset": [True, False]}, DataError, "subset has 2 values, but the data have 6 rows"),
    (FORMULA, {}, {"subset": [1, 2, 3, 4, 5, 6]}, TypeError, "subset must be a boolean array or a condition"),
    (FORMULA, {}, {"subset": "x + 1"}, DataError, r"subset 'x \+ 1' is not a condition"),
    (FORMULA, {}, {"subset": "q == 1"}, DataError, "subset: no column 'q' in the data"),
    (FORMULA, {}, {"na": "omit"}, ValueError, "na must be 'drop' or 'error', not 'omit'"),
    (FORMULA, {"x": UV}, {"contrasts": {"x": "sums"}}, DataError, "unknown contrasts 'sums' for 'x'"),
    (FORMULA, {}, {"contrasts": {"x": "sum"}}, DataError, "given for 'x', which is not a factor"),
    (FORMULA, {}, {"contrasts": {"q": "sum"}}, DataError, "given for 'q', which is not a variable"),
    (FORMULA, {"x": UV}, {"contrasts": {"x": np.eye(3)}}, DataError, "3 rows, but the factor has 2 levels"),
    ("y ~ I(g + 1) + (1 | g)", {}, {}, FormulaError, "'g' must be numeric but is a factor or text"),
    ("y ~ I(g < 'b' & g < x) + (1 | g)", {}, {}, FormulaError, "needs numbers or an ordered factor"),
    ("y ~ I(x == 'a') + (1 | g)", {}, {}, FormulaError, "compares numbers with text"),
    ("y ~ poly(x, 6) + (1 | g)", {}, {}, DataError, "degree 6 must be less than the number of distinct"),
    ("y ~ poly(x, degre = 2) + (1 | g)", {}, {}, FormulaError, r"no argument 'degre'; it has x, degree, raw"),
    ("y ~ poly(x, 2, FALSE, 3) + (1 | g)", {}, {}, FormulaError, r"too many arguments for poly\(\)"),
    ("y ~ poly(x, 1.5) + (1 | g)", {}, {}, FormulaError, "degree must be a whole number"),
    ("y ~ bs(x, df = 1) + (1 | g)", {}, {}, DataError, "df must be at least 3 for degree 3"),
    ("y ~ bs(x, degree = NULL) + (1 | g)", {}, {}, DataError, "the degree must be at least 1"),
    ("y ~ ns(x, df = 0) + (1 | g)", {}, {}, DataError, "df must be at least 1"),
    ("y ~ scale(x) + (1 | g)", {"x": [3.0] * 6}, {}, DataError, r"scale\(x\): the column is constant"),
    ("y ~ relevel(g, ref = 'q') + (1 | g)", {}, {}, FormulaError, "not a level; the levels are a, b, c"),
    ("y ~ cbind(x, y) + (1 | g)", {}, {}, FormulaError, r"cbind\(\) can only be the response"),
    ("y ~ log(3) + (1 | g)", {}, {}, FormulaError, r"'log\(3\)' is not a column"),
    ("y ~ C(x, sum) + (1 | g)", {"x": UV}, {"contrasts": {"x": "sum"}}, DataError, "given for 'x', which is"),
]  # fmt: skip


@pytest.mark.parametrize("formula, columns, kwargs, error, message", BAD, ids=[f"{b[0]} {b[4][:30]}" for b in BAD])
def test_bad_input(formula, columns, kwargs, error, message):
    data = {"y": [1.0, 2, 4, 3, 5, 6], "g": list("aabbcc"), "x": X6} | columns
    with pytest.raises(error, match=message) as e:
        build(formula, pd.DataFrame(data), **kwargs)
    assert e.type is error


def test_no_rows_and_duplicate_columns():
    with pytest.raises(DataError, match="the data have no rows"):
        build(FORMULA, _d(x=X6).iloc[:0])
    twice = pd.concat([_d(x=X6), pd.Series(X6, name="x")], axis=1)
    with pytest.raises(DataError, match="several columns named 'x'"):
        build(FORMULA, twice)


def test_without_bars_or_response_on_request():
    m = build("y ~ x", _d(x=X6), require_bars=False)
    assert m.terms == () and m.X.shape == (6, 2)
    m = build("~ x", _d(x=X6), require_bars=False, require_response=False)
    assert m.y is None and m.response_kind == "none" and m.x_names == ("(Intercept)", "x")


def test_inputs_are_neither_changed_nor_kept():
    d = {"y": np.arange(6.0), "x": np.array(X6), "g": np.array(list("aabbcc")), "w": np.ones(6)}
    before = {k: v.copy() for k, v in d.items()}
    m = build("y ~ x + (x | g)", d, weights=d["w"], offset="x")
    for array in (m.y, m.X, m.weights, m.offset, m.terms[0].z, m.terms[0].level):
        assert not any(np.shares_memory(array, column) for column in d.values())
        array[:] = -1
    for name in d:
        np.testing.assert_array_equal(d[name], before[name])
