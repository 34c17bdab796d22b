"""Columns of every container as what they are, and which row a value beside the table belongs to."""

from __future__ import annotations

import datetime
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

import glmmjax as gj
from glmmjax._errors import DataError
from glmmjax.formula.columns import Factor, as_column, pandas_frame
from glmmjax.formula.frame import build

pl = pytest.importorskip("polars")
pa = pytest.importorskip("pyarrow")

ROWS = 24
FIRST = 20260101000012000  # beyond 2^53: as floats these are 4 numbers, not 12
IDS = [FIRST + i % 12 for i in range(ROWS)]
GONE = 4


def _objects(values):
    out = np.empty(len(values), object)
    out[:] = values
    return out


def _missing(values):
    return [None if i == GONE else v for i, v in enumerate(values)]


def _levels(column, data=None):
    data = {"y": np.arange(ROWS) % 7.0, "g": column} if data is None else data
    return list(build("y ~ 1 + (1 | g)", data).terms[0].levels)


EXACT = [str(v) for v in IDS[:12]]
CONTAINERS = {
    "int64": np.array(IDS),
    "list": IDS,
    "list with None": _missing(IDS),
    "object": _objects(IDS),
    "object with None": _objects(_missing(IDS)),
    "object with NaN": _objects([np.nan if i == GONE else v for i, v in enumerate(IDS)]),
    "Int64": pd.array(IDS, "Int64"),
    "Int64 with NA": pd.array(_missing(IDS), "Int64"),
    "masked": np.ma.masked_array(IDS, np.arange(ROWS) == GONE),
    "Decimal": _objects([Decimal(v) for v in IDS]),
    "Decimal with None": _objects(_missing([Decimal(v) for v in IDS])),
    "int64[pyarrow]": pd.array(_missing(IDS), "Int64").astype("int64[pyarrow]"),
    "pyarrow": pa.array(_missing(IDS)),
    "decimal[pyarrow]": pa.array(_missing([Decimal(v) for v in IDS])),
    "polars": pl.Series(_missing(IDS)),
    "polars Decimal": pl.Series(_missing([Decimal(v) for v in IDS])),
    "categories": pd.Categorical(_objects(IDS)),
    "strings": [str(v) for v in IDS],
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_large_ids_stay_apart(kind):
    column = CONTAINERS[kind]
    assert _levels(column) == EXACT
    crossed = build("y ~ 1 + (1 | factor(g)) + (1 | g:h)", {"y": np.arange(ROWS) % 7.0, "g": column, "h": ["a"] * ROWS})
    assert {len(t.levels) for t in crossed.terms} == {12}
    new = crossed.terms_for({"g": np.array([FIRST + 3, FIRST + 12]), "h": ["a", "a"]})
    assert [t.level.tolist() for t in new] == [[3, -1]] * 2
    if kind not in ("strings", "categories"):  # and are numbers where numbers are wanted
        numbers = as_column(column, "g").astype(float)
        np.testing.assert_array_equal(
            numbers[~np.isnan(numbers)], np.delete(IDS, GONE if np.isnan(numbers).any() else [])
        )


def test_large_ids_of_tables():
    y = np.arange(ROWS) % 7.0
    for table in (pl.DataFrame({"y": y, "g": _missing(IDS)}), pa.table({"y": y, "g": pa.array(_missing(IDS))})):
        assert _levels(None, table) == EXACT
        assert pandas_frame(table)["g"].isna().sum() == 1 and pandas_frame(table)["g"].nunique() == 12
    wide = [2**63 + 2 + i % 12 for i in range(ROWS)]
    for column in (
        np.array(wide, np.uint64),
        wide,
        pd.array(_missing(wide), "UInt64"),
        pl.Series(wide, dtype=pl.UInt64),
    ):
        assert _levels(column) == [str(v) for v in wide[:12]]
    widest = [10**30 + i % 12 for i in range(ROWS)]
    assert _levels(_objects(widest)) == [str(v) for v in widest[:12]]
    spread = np.array([-(2**63), 2**63 - 1] * 12)
    assert _levels(spread) == [str(-(2**63)), str(2**63 - 1)]


def test_floats_that_cannot_tell_ids_apart_are_refused():
    y = np.arange(ROWS) % 7.0
    for column in (np.array(IDS, float), pl.Series(np.array(IDS, float)), pd.Categorical(np.array(IDS, float))):
        with pytest.raises(DataError, match="g'.* as floats.*give them as integers or text"):
            build("y ~ 1 + (1 | g)", {"y": y, "g": column})
    data = pd.DataFrame({"y": y, "x": y + 1, "g": np.tile([1, 2], 12), "id": np.array(IDS, float)})
    for text in (
        "y ~ 1 + (1 | factor(id))",
        "y ~ 1 + (1 | g:id)",
        "y ~ factor(id) + (1 | g)",
        "y ~ as.character(id) + (1 | g)",
    ):
        with pytest.raises(DataError, match="as floats"):
            build(text, data)
    with pytest.raises(DataError, match="column 'id'.* as floats"):
        gj.fit_many("y ~ x + (1 | g)", data, by="id")
    build("y ~ id + (1 | g)", data)  # a number is a number
    with pytest.raises(gj.FormulaError, match="compares integers beyond 2\\^53"):
        build("y ~ x + (1 | g)", data.assign(id=IDS), subset=f"id == {FIRST + 1}")
    assert _levels(np.array([2.0**53 - 1, 2.0**53 - 2] * 12)) == ["9007199254740990", "9007199254740991"]
    assert _levels(np.array([0.0, -0.0, 1.0, 2.5] * 6)) == ["0", "1", "2.5"]


NUMBERS = {
    "Decimal": _objects([Decimal(i) / 4 for i in range(6)]),
    "Decimal and int": _objects([0, Decimal("0.25"), Decimal("0.5"), Decimal("0.75"), 1, Decimal("1.25")]),
    "Decimal[pyarrow]": pa.array([Decimal(i) / 4 for i in range(6)], pa.decimal128(6, 2)),
    "polars Decimal": pl.Series([Decimal(i) / 4 for i in range(6)], dtype=pl.Decimal(6, 2)),
    "sparse": pd.arrays.SparseArray([i / 4 for i in range(6)]),
    "float32": np.arange(6, dtype=np.float32) / 4,
    "objects": _objects([0, 0.25, np.float32(0.5), 0.75, np.int8(1), 1.25]),
    "double[pyarrow]": pd.array([i / 4 for i in range(6)], "double[pyarrow]"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers_are_numbers(kind):
    value = as_column(NUMBERS[kind], "x")
    np.testing.assert_array_equal(value.astype(float), np.arange(6) / 4)


REFUSED = {
    "datetime": (np.array(["2020-01-01"] * 3, "datetime64[D]"), "dates or times"),
    "timedelta": (np.array([1, 2, 3], "timedelta64[D]"), "dates or times"),
    "time": ([datetime.time(1)] * 3, "dates or times"),
    "period": (pd.period_range("2020", periods=3, freq="D"), "dates or times"),
    "categories of dates": (pd.Categorical(pd.date_range("2020", periods=3)), "dates or times"),
    "categories of date objects": (pd.Categorical([datetime.date(2020, 1, 1), None]), "dates or times"),
    "masked dates": (np.ma.masked_array(np.array(["2020", "2021"], "M8[D]"), [0, 1]), "dates or times"),
    "list of True and numbers": ([True, 2, 3], "mixes values of types bool and int"),
    "date32[pyarrow]": (pd.array([datetime.date(2020, 1, 1)] * 3, "date32[pyarrow]"), "dates or times"),
    "time64[pyarrow]": (pa.array([datetime.time(1)] * 3), "dates or times"),
    "polars Date": (pl.Series([datetime.date(2020, 1, 1)] * 3), "dates or times"),
    "polars Duration": (pl.Series([datetime.timedelta(1)] * 3), "dates or times"),
    "polars Time": (pl.Series([datetime.time(1)] * 3), "dates or times"),
    "bytes": ([b"a", b"b", b"a"], "bytes"),
    "bytes that are no text": (np.array([b"\xff", b"b", b"a"]), "bytes that are no text"),
    "binary[pyarrow]": (pa.array([b"a", b"b", None]), "binary"),
    "polars Binary": (pl.Series([b"a", b"b", None]), "bytes"),
    "complex": (np.array([1 + 2j, 2, 3]), "complex"),
    "polars List": (pl.Series([[1], [2], [3]]), "list"),
    "polars Struct": (pl.Series([{"a": 1}] * 3), "dict"),
    "list[pyarrow]": (pa.array([[1], [2], [3]]), "list"),
    "lists": (_objects([[1], [2], [3]]), "type list"),
    "text and True": (_objects(["a", True, "b"]), "mixes values of types bool and str"),
    "numbers and True": (_objects([1, True, 2]), "mixes values of types bool and int"),
    "text and fractions": (_objects(["a", 1.5, "b"]), "mixes values of types float and str"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_neither_number_nor_label_is_refused(kind):
    column, says = REFUSED[kind]
    with pytest.raises(DataError, match=f"column 'when' .*{says}"):
        as_column(column, "when")


def test_factors_and_text():
    """Order of levels is what the container says; only pandas' and pyarrow's ordered categories are ordered factors."""
    values = ["x", "y", None, "x"]
    enum = as_column(pl.Series(values, dtype=pl.Enum(["y", "x", "w"])), "f")
    assert enum.levels == ("y", "x", "w") and not enum.ordered and enum.codes.tolist() == [1, 0, -1, 1]
    category = as_column(pl.Series(values, dtype=pl.Categorical), "f")  # in the order in which polars met them
    assert category.levels == ("x", "y") and category.text
    ordered = pd.Categorical(values, ["y", "x", "w"], ordered=True)
    assert as_column(ordered, "f").ordered and as_column(pa.array(ordered), "f").ordered
    assert not as_column(pd.Categorical(values), "f").ordered
    for text in (
        pl.Series(values),
        pa.array(values),
        pd.array(values, "string"),
        pd.array(values, "string[pyarrow]"),
        values,
    ):
        found = as_column(text, "f")
        assert isinstance(found, Factor) and found.levels == ("x", "y") and found.codes.tolist() == [0, 1, -1, 0]
    logical = [True, None, False]
    for column in (pl.Series(logical), pa.array(logical), pd.array(logical, "boolean"), _objects(logical)):
        found = as_column(column, "f")
        assert found.logical and found.codes.tolist() == [1, -1, 0]
    assert as_column(pl.Series([True, False]), "f").dtype == bool
    assert as_column([True, None, np.nan, False], "f").codes.tolist() == [1, -1, -1, 0]
    masked = as_column(np.ma.masked_array(["a", "b", "a"], [0, 1, 0]), "f")
    assert masked.levels == ("a",) and masked.codes.tolist() == [0, -1, 0]
    assert as_column(np.ma.masked_array([True, False], [0, 1]), "f").codes.tolist() == [1, -1]
    assert as_column(pa.array(["x", None], pa.string_view()), "f").codes.tolist() == [0, -1]
    assert as_column(["a ", "a"], "f").levels == ("a", "a ")  # as R
    assert as_column(_objects(["a", 1]), "f").levels == ("1", "a")
    assert as_column(pd.cut([1, 2, 3], 2), "f").ordered
    assert np.isnan(as_column(pl.Series([None, None]), "f")).all()
    frame = pl.DataFrame(
        {"y": [1.0, 2, 4, 3, 5, 6], "f": pl.Series(list("yxwxyw"), dtype=pl.Enum(list("yxw"))), "g": list("aabbcc")}
    )
    assert build("y ~ f + (1 | g)", frame).x_names == ("(Intercept)", "fx", "fw")


def test_columns_that_the_model_does_not_use_may_be_anything():
    y = np.array([1.0, 2, 4, 3, 5, 6, 8, 7, 2, 1, 4, 4])
    d = pl.DataFrame({"y": y, "g": list("aabbcc") * 2, "id": [1] * 6 + [2] * 6}).with_columns(
        when=pl.Series([None] + [datetime.date(2020, 1, 1)] * 11),
        at=pl.Series([datetime.time(1)] * 12),
        long=pl.Series([datetime.timedelta(1)] * 12),
        raw=pl.Series([b"a"] * 12),
        parts=pl.Series([[1]] * 12),
        record=pl.Series([{"a": 1}] * 12),
        price=pl.Series([Decimal("1.5")] * 12),
    )
    for table in (d, d.to_arrow(), d.to_pandas()):
        assert build("y ~ . - when - at - long - raw - parts - record - price - id + (1 | g)", table).nobs == 11
        fits = gj.fit_many("y ~ 1 + (1 | g)", table, by="id")
        assert fits.frame["status"].tolist() == ["converged"] * 2 and fits.names == [1, 2]
        for name in ("when", "at", "long", "raw", "parts", "record"):
            with pytest.raises(DataError, match=f"column '{name}' holds"):
                build(f"y ~ {name} + (1 | g)", table)


def test_names_that_are_not_text():
    data = {1: [1.0, 2, 4, 3, 5, 6], "g": list("aabbcc"), 7: np.arange(6)}
    for table in (data, pd.DataFrame(data)):
        assert build("`1` ~ `7` + (1 | g)", table).X.shape == (6, 2)
        assert build("`1` ~ . + (1 | g)", table).x_names == ("(Intercept)", "`7`")
    with pytest.raises(DataError, match="several columns named '1'"):
        build("`1` ~ 1 + (1 | g)", {**data, "1": np.arange(6)})


# ------------------------------------------------------------------------------------- alignment

rng = np.random.default_rng(5)
DATA = pd.DataFrame({"x": rng.normal(size=60), "g": np.repeat(np.arange(10), 6), "w": rng.uniform(0.5, 2, 60)})
DATA["y"] = 1 + DATA["x"] + rng.normal(size=10)[DATA["g"]] + rng.normal(size=60)
DATA["v"] = rng.normal(size=60)
MIXED = DATA.sample(frac=1, random_state=1)
LATER = DATA.set_axis(np.arange(100, 160))
FORMULA = "y ~ x + (1 | g)"


def _weights(**given):
    return build(FORMULA, DATA, **given).weights


def test_one_rule_for_what_stands_beside_the_table():
    w = DATA["w"].to_numpy()
    for given in (
        DATA["w"],
        MIXED["w"],
        MIXED[["w"]],
        w,
        w.tolist(),
        pl.Series(w),
        pa.array(w),
        pl.DataFrame({"w": w}),
        w[:, None],
    ):
        np.testing.assert_array_equal(_weights(weights=given), w)
    for given, says in (
        (LATER["w"], "index of weights has no row 0 and so differs.*to_numpy"),
        (DATA["w"].set_axis([0] * 60), "more than once"),
        (DATA["w"].iloc[:50], "weights has 50 values, but the data have 60 rows"),
        (w[:50], "weights has 50 values"),
        (DATA[["w", "x"]], "weights has 2 dimensions"),
    ):
        with pytest.raises(DataError, match=says):
            _weights(weights=given)
    chosen = DATA["x"] > 0
    for given in (chosen, chosen.loc[MIXED.index], chosen.to_numpy(), pl.Series(chosen.to_numpy())):
        assert build(FORMULA, DATA, subset=given).nobs == chosen.sum()
        np.testing.assert_array_equal(build(FORMULA, DATA, subset=given).y, DATA["y"][chosen])
    with pytest.raises(DataError, match="index of subset"):
        build(FORMULA, DATA, subset=LATER["x"] > 0)
    twice = pd.concat([DATA, DATA])  # repeated labels in the same order are the same rows
    np.testing.assert_array_equal(build(FORMULA, twice, weights=twice["w"]).weights, np.tile(w, 2))
    with pytest.raises(DataError, match="more than once"):
        build(FORMULA, twice, weights=twice["w"].iloc[::-1])
    m = build(FORMULA, DATA, offset=MIXED["v"])
    np.testing.assert_array_equal(m.offset, DATA["v"])
    np.testing.assert_array_equal(m.matrix_for(MIXED, offset=DATA["v"])[1], MIXED["v"])
    with pytest.raises(DataError, match="index of offset"):
        m.matrix_for(MIXED, offset=LATER["v"])


def test_columns_of_a_dict_are_aligned_too():
    plain = {name: DATA[name].to_numpy() for name in DATA}
    mixed = {"y": DATA["y"], "x": MIXED["x"], "g": MIXED["g"]}
    np.testing.assert_array_equal(build(FORMULA, mixed).X, build(FORMULA, plain).X)
    with pytest.raises(DataError, match="columns 'x' and 'y' of data have rows in another order"):
        build(FORMULA, {**plain, "x": MIXED["x"], "y": DATA["y"]})  # g goes by which of them?
    later = build(FORMULA, {name: LATER[name] for name in LATER}, weights=LATER["w"])
    assert later.row_index.equals(LATER.index)
    with pytest.raises(DataError, match="index of column 'x' of data"):
        build(FORMULA, {**mixed, "x": LATER["x"]})
    z = np.ones(60)
    design = gj.design_arrays(DATA["y"], MIXED[["x", "w"]], [(z, MIXED["g"])], weights=MIXED["w"])
    np.testing.assert_array_equal(design.X, DATA[["x", "w"]])
    np.testing.assert_array_equal(design.weights, DATA["w"])
    np.testing.assert_array_equal(np.asarray(design.level[0]), DATA["g"])
    with pytest.raises(DataError, match="index of offset"):
        gj.design_arrays(DATA["y"], DATA[["x"]], [(z, DATA["g"])], offset=LATER["v"])


@pytest.fixture(scope="module")
def fit():
    return gj.lmer(FORMULA, DATA.assign(x=DATA["x"].where(DATA.index != 7)))  # the fit has 59 of the 60 rows


def test_refits_go_by_the_index(fit):
    there = DATA["v"].drop(7)
    wanted = fit.refit(there.to_numpy()).objective
    for given in (
        DATA["v"],
        MIXED["v"],
        there,
        there.iloc[::-1],
        MIXED[["v"]],
        DATA["v"].to_numpy(),
        pl.Series(there.to_numpy()),
    ):
        assert fit.refit(given).objective == wanted
    for given in (LATER["v"], LATER["v"].iloc[:59], DATA["v"].drop(8)):
        with pytest.raises(DataError, match="index of the new response has no row .*to_numpy"):
            fit.refit(given)
    with pytest.raises(DataError, match="has 58 values, the fit has 59 rows and its table 60"):
        fit.refit(there.to_numpy()[1:])
    both = fit.refit_many(DATA[["v", "y"]])
    pd.testing.assert_frame_equal(fit.refit_many(MIXED[["v", "y"]]), both)
    assert both["loglik"].iloc[0] == pytest.approx(-0.5 * wanted, rel=1e-12)
    apart = fit.refit_many(pl.DataFrame({"v": DATA["v"].to_numpy(), "y": DATA["y"].to_numpy()}))
    np.testing.assert_array_equal(apart, both)
    with pytest.raises(DataError, match="index of responses"):
        fit.refit_many(LATER[["v"]])


def test_score_tests_go_by_the_index(fit):
    wanted = fit.score_test(DATA[["v", "w"]])
    for given in (
        MIXED[["v", "w"]],
        MIXED[["v", "w"]].drop(7),
        pl.DataFrame({c: DATA[c].to_numpy() for c in ("v", "w")}),
    ):
        pd.testing.assert_frame_equal(fit.score_test(given), wanted)
    assert fit.score_test(MIXED["v"])["p_value"].iloc[0] == wanted["p_value"].iloc[0]
    with pytest.raises(DataError, match="index of covariates"):
        fit.score_test(LATER[["v"]])


def test_many_fits_go_by_the_index():
    fits = {}
    Y, W = DATA[["y", "v"]], pd.DataFrame({"y": DATA["w"], "v": 2 * DATA["w"] ** 2})
    formula = "~ x + (1 | g)"
    for name, y, weights in (
        ("frames", Y, W),
        ("rows in another order", Y.loc[MIXED.index], W.loc[MIXED.index]),
        ("columns in another order", Y, W[["v", "y"]]),
        ("arrays", Y.to_numpy(), W.to_numpy()),
    ):
        fits[name] = gj.fit_many(formula, DATA, y=y, weights=weights).coef.to_numpy()
    for found in fits.values():
        np.testing.assert_array_equal(found, fits["arrays"])
    alone = gj.lmer("v ~ x + (1 | g)", DATA, weights=W["v"])
    np.testing.assert_allclose(fits["frames"][1], alone.fixef, rtol=1e-6)
    for y, weights, says in (
        (LATER[["y", "v"]], None, "index of y"),
        (Y, W.set_axis(LATER.index), "index of weights"),
        (Y, W.set_axis(["y", "z"], axis=1), "columns of weights are not those of y"),
    ):
        with pytest.raises(DataError, match=says):
            gj.fit_many(formula, DATA, y=y, weights=weights)
    stacked = DATA.assign(id=np.tile(["p", "q"], 30))
    wanted = gj.fit_many(FORMULA, stacked, by="id", weights=DATA["w"].to_numpy()).coef
    pd.testing.assert_frame_equal(gj.fit_many(FORMULA, stacked, by="id", weights=MIXED["w"]).coef, wanted)
    with pytest.raises(TypeError, match="by must be the name of a column, not list"):
        gj.fit_many(FORMULA, stacked, by=[1] * 60)
    with pytest.raises(DataError, match="several columns named 'id'"):
        gj.fit_many(FORMULA, pd.concat([stacked, stacked[["id"]]], axis=1), by="id")
    for weights, says in (
        (LATER["w"], "index of weights"),
        (np.ones(50), "weights has 50 values, but the data have 60"),
    ):
        with pytest.raises(DataError, match=says):
            gj.fit_many(FORMULA, stacked, by="id", weights=weights)


def test_contrasts_go_by_the_levels():
    d = DATA.assign(f=np.tile(["p", "q", "r"], 20))
    table = pd.DataFrame({"a": [1.0, 0, -1], "b": [0.5, -1, 0.5]}, index=list("pqr"))
    wanted = build("y ~ f + (1 | g)", d, contrasts={"f": table.to_numpy()}).X
    for given in (table, table.loc[list("rpq")], table.reset_index(drop=True)):
        np.testing.assert_array_equal(build("y ~ f + (1 | g)", d, contrasts={"f": given}).X, wanted)
    with pytest.raises(TypeError, match="contrasts must be a dict from columns to contrasts, not list"):
        build("y ~ f + (1 | g)", d, contrasts=[("f", "sum")])
    with pytest.raises(DataError, match="index of the contrasts of 'f' .* differs from the levels"):
        build("y ~ f + (1 | g)", d, contrasts={"f": table.set_axis(list("pqs"))})
