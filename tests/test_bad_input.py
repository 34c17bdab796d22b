"""Bad input gets one clear sentence before anything is traced: what was found, where, and what to do."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pandas as pd
import pytest
from helpers import load_data

import glmmjax as gj

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
COUNT = "TICKS ~ YEAR + (1 | BROOD)"


def small(**columns: Any) -> pd.DataFrame:
    """Twelve rows: y 0/1, k counts, x, f with three levels, g with four, n trials."""
    base = {
        "y": [0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0],
        "k": [0, 2, 1, 0, 3, 1, 4, 2, 0, 1, 2, 0],
        "x": [0.3, -1.2, 0.8, 0.1, -0.5, 1.9, 0.4, -0.9, 1.1, 0.2, -0.3, 0.6],
        "f": list("abcabcabcabc"),
        "g": list("ppppqqqqrrss"),
        "n": [4.0] * 12,
    }
    return pd.DataFrame({**base, **columns})


def changed(values: Any, row: int, value: Any) -> list[Any]:
    values = list(values)
    values[row] = value
    return values


def refused(call: Callable[[], Any], kind: type[Exception], words: list[str]) -> None:
    """`call` raises `kind` with one line that has all the words, and traces nothing."""
    with jax.log_compiles(False), pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text.strip() or kind is gj.FormulaError, text  # a formula error draws a caret
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"


Y, K, X = small()["y"], small()["k"], small()["x"]
#: id -> arguments of glmer, type of error, words of its message
RESPONSES: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "above one": (
        ("y ~ x + (1 | g)", small(y=changed(Y, 4, 2))),
        {},
        ["y has 2", "row 4", "outside [0, 1]", "cbind"],
    ),
    "negative": (("y ~ x + (1 | g)", small(y=changed(Y, 2, -1))), {}, ["-1", "row 2", "outside [0, 1]"]),
    "proportion without trials": (
        ("y ~ x + (1 | g)", small(y=changed(Y, 7, 0.25))),
        {},
        ["0.25", "row 7", "weights=", "cbind"],
    ),
    "more successes than trials": (
        ("cbind(k, n - 2 - k) ~ x + (1 | g)", small()),
        {},
        ["n - 2 - k", "negative", "row 4"],
    ),
    "negative successes": (
        ("cbind(k, n) ~ x + (1 | g)", small(k=changed(K, 3, -1))),
        {},
        ["'k'", "negative", "row 3"],
    ),
    "negative count": (
        ("k ~ x + (1 | g)", small(k=changed(K, 5, -2))),
        {"family": "poisson"},
        ["k has -2", "row 5", "cannot be negative"],
    ),
    "fractional count": (
        ("k ~ x + (1 | g)", small(k=changed(K, 6, 1.5))),
        {"family": "poisson"},
        ["k has 1.5", "row 6", "count", "offset(log("],
    ),
    "fractional count, nb": (
        ("k ~ x + (1 | g)", small(k=changed(K, 6, 1.5))),
        {"family": "negative.binomial(2)"},
        ["1.5", "row 6", "negative binomial"],
    ),
    "three levels": (("f ~ x + (1 | g)", small()), {}, ["'f'", "3 levels", "two levels"]),
    "constant": (("y ~ x + (1 | g)", small(y=1)), {}, ["'y'", "constant"]),
    "constant counts": (("k ~ x + (1 | g)", small(k=3)), {"family": "poisson"}, ["'k'", "constant", "3"]),
    "all failures": (("cbind(y, n) ~ x + (1 | g)", small(y=0)), {}, ["constant", "failures"]),
    "factor counts": (
        ("z ~ x + (1 | g)", small(z=np.where(Y == 1, "yes", "no"))),
        {"family": "poisson"},
        ["z", "two-level factor", "binomial"],
    ),
    "cbind counts": (("cbind(y, n) ~ x + (1 | g)", small()), {"family": "poisson"}, ["cbind", "binomial"]),
}


@pytest.mark.parametrize("name", RESPONSES)
def test_response(name: str) -> None:
    args, settings, words = RESPONSES[name]
    refused(lambda: gj.glmer(*args, **settings), gj.DataError, words)


DATA: dict[str, tuple[tuple[Any, ...], dict[str, Any], list[str]]] = {
    "infinite predictor": (
        ("y ~ x + (1 | g)", small(x=changed(X, 8, np.inf))),
        {},
        ["'x'", "infinite", "row 8"],
    ),
    "infinite response": (
        ("k ~ x + (1 | g)", small(k=changed([float(v) for v in K], 1, -np.inf))),
        {"family": "poisson"},
        ["'k'", "infinite", "row 1"],
    ),
    "missing column": (("y ~ xx + (1 | g)", small()), {}, ["'xx'", "'x'"]),
    "missing group": (("y ~ x + (1 | gg)", small()), {}, ["'gg'", "'g'"]),
    "one level": (("y ~ x + (1 | g)", small(g="a")), {}, ["'g'", "only one level"]),
    "one level left": (
        ("y ~ x + (1 | g)", small()),
        {"subset": "g == 'p'"},
        ["'g'", "only one level", "'p'"],
    ),
    "factor with one level": (("y ~ f + (1 | g)", small(f="a")), {}, ["'f'", "only one level", "'a'"]),
    "more effects than rows": (
        ("y ~ x + (f | o)", small(o=[f"o{i}" for i in range(12)])),
        {},
        ["o", "36 random effects", "12 rows"],
    ),
    "negative weight": (
        ("y ~ x + (1 | g)", small(w=changed([1.0] * 12, 9, -1.0))),
        {"weights": "w"},
        ["weights", "negative", "row 9"],
    ),
    "weights too short": (("y ~ x + (1 | g)", small()), {"weights": np.ones(5)}, ["weights", "5", "12"]),
    "weights not there": (("y ~ x + (1 | g)", small()), {"weights": "ww"}, ["weights", "'ww'"]),
    "weights not numeric": (("y ~ x + (1 | g)", small()), {"weights": "f"}, ["weights", "numeric"]),
    "infinite weight": (
        ("y ~ x + (1 | g)", small(w=changed([1.0] * 12, 9, np.inf))),
        {"weights": "w"},
        ["weights", "infinite"],
    ),
    "offset too long": (("y ~ x + (1 | g)", small()), {"offset": np.ones(13)}, ["offset", "13", "12"]),
    "infinite offset": (
        ("k ~ x + offset(log(n)) + (1 | g)", small(n=changed([4.0] * 12, 3, 0.0))),
        {"family": "poisson"},
        ["log(n)", "infinite", "row 3"],
    ),
    "all missing": (("y ~ x + (1 | g)", small(x=np.nan)), {}, ["no rows are left", "12 rows", "x"]),
    "missing refused": (
        ("y ~ x + (1 | g)", small(x=changed(X, 8, np.nan))),
        {"na": "error"},
        ["1 row", "missing", "x", "row 8", "na='drop'"],
    ),
    "empty": (("y ~ x + (1 | g)", small().iloc[:0]), {}, ["no rows"]),
    "subset that keeps nothing": (
        ("y ~ x + (1 | g)", small()),
        {"subset": np.zeros(12, bool)},
        ["subset", "empty"],
    ),
    "subset too short": (("y ~ x + (1 | g)", small()), {"subset": np.ones(3, bool)}, ["subset", "3", "12"]),
    "dates": (
        ("y ~ d + (1 | g)", small(d=pd.date_range("2020-01-01", periods=12))),
        {},
        ["'d'", "dates", "numbers"],
    ),
    "two columns of one name": (
        ("y ~ x + (1 | g)", pd.concat([small(), small()[["x"]]], axis=1)),
        {},
        ["'x'", "several columns"],
    ),
    "rank deficient, refused": (
        ("y ~ x + I(2 * x) + (1 | g)", small()),
        {"control": {"check_rank": "error"}},
        ["I(2 * x)", "linearly dependent"],
    ),
    "contrasts of a number": (("y ~ x + (1 | g)", small()), {"contrasts": {"x": "sum"}}, ["'x'", "not a factor"]),
    "contrasts of nothing": (("y ~ x + (1 | g)", small()), {"contrasts": {"zz": "sum"}}, ["'zz'"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str) -> None:
    args, settings, words = DATA[name]
    refused(lambda: gj.glmer(*args, **settings), gj.DataError, words)


@pytest.mark.parametrize(
    ("formula", "words"),
    [
        ("y ~ x + ", ["y ~ x +"]),
        ("y ~ (1 | g", ["'('"]),
        ("y ~ x + (1 | g))", [")"]),
        ("y ~ x ++* z + (1 | g)", ["*"]),
        ("y ~ x $ z + (1 | g)", ["'$'"]),
        ("y ~ x", ["no random-effects term", "(1 | group)"]),
        ("~ x + (1 | g)", ["no response"]),
        ("y x + (1 | g)", ["x"]),
        ("", []),
        ("y ~ frob(x) + (1 | g)", ["frob"]),
    ],
)
def test_formula(formula: str, words: list[str]) -> None:
    refused(lambda: gj.glmer(formula, small()), gj.FormulaError, words)


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "misspelt": ({"famly": "poisson"}, TypeError, ["'famly'", "did you mean 'family'"]),
    "REML": ({"REML": True}, TypeError, ["'REML'", "maximum likelihood"]),
    "nagq": ({"nagq": 2}, TypeError, ["'nagq'", "nAGQ="]),
    "nonsense": ({"zzzz": 2}, TypeError, ["'zzzz'", "formula", "family"]),
    "nAGQ negative": ({"nAGQ": -1}, ValueError, ["nAGQ", "-1"]),
    "nAGQ fractional": ({"nAGQ": 1.5}, ValueError, ["nAGQ", "1.5"]),
    "nAGQ logical": ({"nAGQ": True}, ValueError, ["nAGQ", "True"]),
    "nAGQ too large": ({"nAGQ": 101}, ValueError, ["nAGQ", "at most 100", "101"]),
    "unknown family": ({"family": "binomal"}, ValueError, ["'binomal'", "binomial", "poisson"]),
    "unknown link": ({"family": "binomial(logti)"}, ValueError, ["'logti'", "logit", "probit"]),
    "quasi": ({"family": "quasibinomial"}, ValueError, ["quasi", "observation-level", "beta-binomial"]),
    "hessian": ({"hessian": "exact"}, ValueError, ["hessian", "'expected' or 'observed'", "'exact'"]),
    "device": ({"device": "abacus"}, ValueError, ["'abacus'", "cpu"]),
    "na": ({"na": "omit"}, ValueError, ["na", "'omit'"]),
    "start name": ({"start": {"thta": [1.0]}}, TypeError, ["'thta'", "did you mean 'theta'"]),
    "start size": ({"start": {"theta": [1.0, 2.0]}}, ValueError, ["start['theta']", "2 values", "needs 1"]),
    "start beta": ({"start": {"beta": [1.0]}}, ValueError, ["start['beta']", "1 values", "needs 2"]),
    "start not finite": ({"start": {"theta": [np.nan]}}, ValueError, ["start['theta']", "finite"]),
    "control name": ({"control": {"optimiser": "bfgs"}}, TypeError, ["'optimiser'", "'optimizer'"]),
    "control type": ({"control": "bfgs"}, TypeError, ["control", "gj.Control", "str"]),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name: str) -> None:
    settings, kind, words = ARGUMENTS[name]
    refused(lambda: gj.glmer("y ~ x + (1 | g)", small(), **settings), kind, words)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"optimizer": "bfsg"}, ValueError, ["'bfsg'", "did you mean 'bfgs'", "newton", "optax"]),
        ({"optimizer": 3}, ValueError, ["optax"]),
        ({"tol": 0.0}, ValueError, ["tol", "0.0"]),
        ({"tol": 2.0}, ValueError, ["tol", "2.0"]),
        ({"max_evaluations": 0}, ValueError, ["max_evaluations", "0"]),
        ({"check_grad": "stop"}, ValueError, ["check_grad", "warn, ignore, error", "'stop'"]),
        ({"check_singular": True}, ValueError, ["check_singular", "warn, ignore, error"]),
        ({"check_rank": "stop"}, ValueError, ["check_rank", "'message'"]),
        ({"tolerance": 1e-8}, TypeError, ["'tolerance'", "tol"]),
        ({"maxeval": 8}, TypeError, ["'maxeval'", "'max_evaluations'"]),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_control(settings: dict[str, Any], kind: type[Exception], words: list[str]) -> None:
    refused(lambda: gj.Control(**settings), kind, words)


def test_every_argument_does_something() -> None:
    """None is accepted that does nothing: each has a test here or a refusal."""
    known = set(inspect.signature(gj.glmer).parameters)
    assert known <= {
        "formula", "data", "family", "nAGQ", "weights", "offset", "hessian", "start", "control",
        "contrasts", "subset", "na", "verbose", "device", "unknown",
    }  # fmt: skip


# -------------------- what is allowed, with a note
def test_rank_deficient_columns_are_dropped_with_a_message() -> None:
    data = load_data("cbpp").assign(double=lambda d: d["size"] * 2.0)
    formula = CBPP + " + size + double"
    m = gj.glmer(formula, data)
    assert "double" not in m.fixef.index and np.isnan(m.fixef_all()["double"])
    assert list(m.fixef_all().index)[-1] == "double" and m.df == 6
    assert any("aliased" in t and "double" in t for t in m.messages())
    assert m.objective == pytest.approx(gj.glmer(CBPP + " + size", data).objective, abs=1e-9)
    with pytest.warns(UserWarning, match="linearly dependent; dropped double"):
        gj.glmer(formula, data, control={"check_rank": "warn"})


def test_observation_level_effects_are_allowed() -> None:
    data = load_data("cbpp")
    m = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | obs)", data)
    assert m.ngrps == {"obs": 56} and m.nobs == 56


def test_rounded_proportions_are_counts() -> None:
    data = load_data("cbpp")
    data["p"] = (data["incidence"] / data["size"]).round(9)
    m = gj.glmer("p ~ period + (1 | herd)", data, weights="size")
    assert m.messages() == [] and m.objective == pytest.approx(184.0525637, abs=1e-5)


def test_fractional_successes_are_noted() -> None:
    data = load_data("cbpp")
    data["p"] = np.clip(data["incidence"] / data["size"] + 0.01, 0, 1)
    m = gj.glmer("p ~ period + (1 | herd)", data, weights="size")
    assert any("non-integer number of successes" in t and "row" in t for t in m.messages())


def test_weight_zero_drops_the_row() -> None:
    data = load_data("cbpp")
    data["w"] = data["size"].where(data.index != 7, 0.0)
    m = gj.glmer("prop ~ period + (1 | herd)", data, weights="w")
    assert m.nobs == 55 and any("1 row of weight 0" in t for t in m.messages())
    without = gj.glmer("prop ~ period + (1 | herd)", data.drop(index=7), weights="size")
    assert m.objective == pytest.approx(without.objective, rel=1e-12)


def test_warnings_point_at_the_caller() -> None:
    data = load_data("cbpp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gj.glmer(CBPP, data, control={"max_evaluations": 2})
    assert [w.filename for w in caught] == [__file__]


# -------------------- design
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"y": np.ones((3, 2))}, ["y must be one-dimensional", "(3, 2)"]),
        ({"terms": []}, ["at least one random-effects term"]),
        ({"X": np.ones((4, 1))}, ["X has 4 rows", "y has 3"]),
        ({"weights": np.ones(2)}, ["weights has 2 rows", "y has 3"]),
        ({"offset": np.array([0.0, np.nan, 0.0])}, ["offset", "missing or infinite"]),
        ({"y": np.array([0.0, np.inf, 1.0])}, ["y has missing or infinite"]),
        ({"terms": [(np.ones(3), np.array([0.0, 1.0, 1.0]))]}, ["level of term 1", "integers"]),
        ({"terms": [(np.ones(3), np.array([0, -1, 1]))]}, ["level of term 1", "negative"]),
        ({"terms": [(np.ones(3), np.array([0, 1]))]}, ["level of term 1 has 2 rows", "y has 3"]),
        ({"terms": [(np.ones(4), np.array([0, 1, 1]))]}, ["z of term 1 has 4 rows"]),
        (
            {"terms": [(np.ones(3), np.array([0, 1, 1]), gj.Unstructured(2))]},
            ["term 1 has 1 columns", "has 2"],
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else None,
)
def test_design_arrays(arguments: dict[str, Any], words: list[str]) -> None:
    good = {"y": np.array([0.0, 1.0, 1.0]), "X": np.ones((3, 1)), "terms": [(np.ones(3), np.array([0, 1, 1]))]}
    gj.design_arrays(**good)
    refused(lambda: gj.design_arrays(**{**good, **arguments}), gj.DataError, words)


@pytest.mark.parametrize("given", [gj.Diagonal, "cs", 2], ids=str)
def test_structures(given: Any) -> None:
    terms = [(np.ones(3), np.array([0, 1, 1]), given)]
    words = ["structure of term 1", "such as Unstructured(1) or Diagonal(1)"]
    refused(lambda: gj.design_arrays(np.arange(3.0), np.ones((3, 1)), terms), TypeError, words)


def test_design_from_a_formula() -> None:
    refused(lambda: gj.design("y ~ xx + (1 | g)", small()), gj.DataError, ["'xx'", "'x'"])
    refused(lambda: gj.design("y ~ x", small()), gj.FormulaError, ["no random-effects term"])


# -------------------- predict and refit
@pytest.fixture(scope="module")
def cbpp_fit() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"))


def test_predict(cbpp_fit: gj.MixedModel) -> None:
    new = pd.DataFrame({"period": ["1", "2"], "herd": ["1", "99"]})
    words = ["'herd'", "'99'", "allow_new_levels=True"]
    refused(lambda: cbpp_fit.predict(new), gj.DataError, words)
    refused(lambda: cbpp_fit.predict(new[["herd"]]), gj.DataError, ["'period'"])
    refused(lambda: cbpp_fit.predict(new[["period"]]), gj.DataError, ["'herd'"])
    other = new.assign(period=["1", "7"])
    refused(lambda: cbpp_fit.predict(other, re_form="NA"), gj.DataError, ["'period'", "7", "'1'"])
    refused(lambda: cbpp_fit.predict(type="probability"), ValueError, ["'link' or 'response'", "'probability'"])
    many = pd.DataFrame({"period": ["1"] * 9, "herd": [f"new{i}" for i in range(9)]})
    refused(lambda: cbpp_fit.predict(many), gj.DataError, ["'new0'", "'new4'", "..."])


def test_refit(cbpp_fit: gj.MixedModel) -> None:
    y = cbpp_fit.getME("y")
    refused(lambda: cbpp_fit.refit(y[:-1]), gj.DataError, ["55", "56"])
    refused(lambda: cbpp_fit.refit(changed(y, 4, np.nan)), gj.DataError, ["missing or infinite"])
    refused(lambda: cbpp_fit.refit(changed(y, 4, 1.5)), gj.DataError, ["1.5", "row", "outside [0, 1]"])


def test_data_of_a_wrong_type() -> None:
    refused(lambda: gj.glmer("y ~ x + (1 | g)", [1, 2, 3]), TypeError, ["data", "DataFrame", "list"])
    ragged = {"y": [0, 1], "x": [1.0, 2.0, 3.0], "g": ["a", "b"]}
    refused(lambda: gj.glmer("y ~ x + (1 | g)", ragged), gj.DataError, ["length"])


def test_unknown_dataset() -> None:
    with pytest.raises((KeyError, ValueError, LookupError)) as caught:
        gj.datasets.load("cbp")
    assert "cbpp" in str(caught.value)


def test_unknown_name_of_the_package() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'glme'"):
        _ = gj.glme  # type: ignore[attr-defined]
