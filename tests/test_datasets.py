"""Bundled data: values, level orders, types, descriptions."""

from __future__ import annotations

import csv
import gzip
import json

import numpy as np
import pandas as pd
import pytest
from helpers import NOT_BUNDLED, OUTSIDE, assert_close, load_data, model_index, read_outside

from glmmjax import datasets

NAMES = [
    "arabidopsis", "cake", "cbpp", "chem97", "contraception", "dyestuff", "dyestuff2", "early", "gammadat",
    "grouseticks", "insteval", "orthodont", "oxboys", "pastes", "penicillin", "petrol", "sleepstudy",
    "toenail", "toy15", "verbagg",
]  # fmt: skip


def test_names_are_all_and_in_order():
    assert datasets.names() == NAMES
    files = {p.name for p in (datasets._FOLDER).glob("*.csv.gz")}
    assert files == {f"{name}.csv.gz" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_frame_agrees_with_its_description_and_file(name):
    frame, info = datasets.load(name), datasets.describe(name)
    assert len(frame) == info.rows
    assert list(frame.columns) == list(info.columns)
    assert isinstance(frame.index, pd.RangeIndex)
    assert not frame.isna().any().any()  # also: no cell holds a level that the catalogue does not know
    with gzip.open(datasets._FOLDER / f"{name}.csv.gz", "rt", newline="") as f:
        rows = list(csv.reader(f))
    assert rows[0] == list(frame.columns)
    for j, (column, kind) in enumerate(info.columns.items()):
        cells, values = [row[j] for row in rows[1:]], frame[column]
        if kind.startswith(("factor", "ordered")):
            assert isinstance(values.dtype, pd.CategoricalDtype)
            assert values.cat.ordered == kind.startswith("ordered")
            assert all(isinstance(level, str) for level in values.cat.categories)
            assert kind.endswith(f"({len(values.cat.categories)} levels)")
            assert set(cells) == set(values.cat.categories)  # no unused level
            assert list(values.astype(str)) == cells
        elif kind == "integer":
            assert values.dtype == np.int64 and list(values) == [int(c) for c in cells]
        else:
            assert kind == "numeric"
            assert values.dtype == np.float64 and list(values) == [float(c) for c in cells]  # exact


@pytest.mark.parametrize("name", NAMES)
def test_against_the_files_written_by_r(name):
    source = next((p.stem for p in (OUTSIDE / "data").glob("*.json") if p.stem.lower() == name), None)
    if source is None:
        pytest.skip("the folder of reference results is absent (set GLMMJAX_REFERENCE)")
    expected = read_outside(source)
    pd.testing.assert_frame_equal(datasets.load(name), expected, check_categorical=False, check_exact=True)
    for column, dtype in expected.dtypes.items():
        if isinstance(dtype, pd.CategoricalDtype):
            assert list(datasets.load(name)[column].cat.categories) == list(dtype.categories)
            assert datasets.load(name)[column].cat.ordered == dtype.ordered


def test_known_values():
    cbpp = datasets.load("cbpp")
    assert (len(cbpp), cbpp.herd.nunique(), cbpp["size"].sum(), cbpp.incidence.sum()) == (56, 15, 842, 99)
    assert list(cbpp.period.cat.categories) == ["1", "2", "3", "4"]
    assert_close(cbpp.prop, cbpp.incidence / cbpp["size"], rtol=1e-14, what="prop")
    sleep = datasets.load("sleepstudy")
    assert sleep.Reaction[0] == 249.56 and list(sleep.Days[:10]) == list(range(10))
    assert list(sleep.Subject.cat.categories[:3]) == ["308", "309", "310"]
    assert list(sleep.Days3[:10].astype(int)) == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    contraception = datasets.load("Contraception")
    assert list(contraception.livch.cat.categories) == ["0", "1", "2", "3+"]
    assert ((contraception.ch == "Y") == (contraception.livch != "0")).all()
    assert list(datasets.load("toenail").outcome.cat.categories) == ["none or mild", "moderate or severe"]
    # Level orders that are not alphabetical.
    assert list(datasets.load("Orthodont").Subject.cat.categories[:3]) == ["M16", "M05", "M02"]
    assert list(datasets.load("VerbAgg")["mode"].cat.categories) == ["want", "do"]
    assert list(datasets.load("Chem97").gender.cat.categories) == ["M", "F"]
    assert datasets.load("InstEval").dept.cat.categories[0] == "15"


def test_ordered_factors():
    ordered = {
        (name, column)
        for name in NAMES
        for column, dtype in datasets.load(name).dtypes.items()
        if isinstance(dtype, pd.CategoricalDtype) and dtype.ordered
    }
    assert ordered == {
        ("cake", "temperature"),
        ("insteval", "studage"),
        ("insteval", "lectage"),
        ("verbagg", "resp"),
    }
    temperatures = datasets.load("cake").temperature.cat.categories
    assert list(temperatures) == ["175", "185", "195", "205", "215", "225"]
    assert list(datasets.load("verbagg").resp.cat.categories) == ["no", "perhaps", "yes"]


@pytest.mark.parametrize("spelling", ["InstEval", "insteval", "INSTEVAL", " instEval "])
def test_lookup_ignores_case(spelling):
    assert datasets.describe(spelling).name == "insteval"


def test_load_returns_a_new_frame():
    first = datasets.load("dyestuff")
    first.loc[0, "Yield"] = -1.0
    assert datasets.load("dyestuff").Yield[0] == 1545.0


def test_unknown_name():
    with pytest.raises(datasets.UnknownDatasetError, match="no bundled data set is called 'slepstudy'") as error:
        datasets.load("slepstudy")
    assert isinstance(error.value, ValueError)
    assert "Did you mean 'sleepstudy'?" in str(error.value)
    assert all(name in str(error.value) for name in NAMES)
    with pytest.raises(datasets.UnknownDatasetError) as error:
        datasets.describe("zzz")
    assert "Did you mean" not in str(error.value)
    with pytest.raises(TypeError, match="string, not int"):
        datasets.load(3)


def test_not_bundled_sets_stay_outside():
    for name in NOT_BUNDLED:
        with pytest.raises(datasets.UnknownDatasetError):
            datasets.load(name)
    text = "".join(p.read_text() for p in datasets._FOLDER.glob("*.json")).lower()
    assert not any(f'"{name.lower()}"' in text for name in NOT_BUNDLED)


@pytest.mark.parametrize("name", NAMES)
def test_descriptions_are_complete(name):
    info = datasets.describe(name)
    assert all(getattr(info, field) for field in ("title", "source", "reference", "licence"))
    assert set(info.added) <= set(info.columns)
    if info.source.startswith("R: "):
        assert "::" in info.source and "version" in info.source and "GPL" in info.licence
        assert any(str(year) in info.reference for year in range(1930, 2020))
    text = str(info)
    assert all(column in text for column in info.columns) and info.reference in text
    with pytest.raises(AttributeError):
        info.rows = 0  # frozen
    with pytest.raises(TypeError):
        info.columns["new"] = "numeric"


def test_added_columns():
    added = {name: set(datasets.describe(name).added) for name in NAMES if datasets.describe(name).added}
    assert added == {
        "arabidopsis": {"obs"},
        "cbpp": {"obs", "prop"},
        "contraception": {"ch"},
        "petrol": {"prop", "EP10"},
        "sleepstudy": {"w", "off", "fDays", "Days3"},
    }


def test_table():
    table = datasets.table()
    assert list(table.index) == NAMES
    assert table.loc["insteval", "rows"] == 73421
    assert table.loc["cbpp", "added"] == "obs, prop"
    assert table.notna().all().all()


def test_readme_lists_every_set():
    text = (datasets._FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        info = datasets.describe(name)
        assert f"| {name} | {info.rows} | {info.title} |" in text
        assert f"- {name}: {info.reference}" in text


@pytest.mark.parametrize("name", sorted({row["dataset"] for row in model_index().values()}))
def test_reference_models_find_their_data(name):
    frame = load_data(name)
    rows = {row["n"] for row in model_index().values() if row["dataset"] == name}
    assert max(rows) <= len(frame)
    variables = json.dumps([row["formula"] for row in model_index().values() if row["dataset"] == name])
    assert any(column in variables for column in frame.columns)
