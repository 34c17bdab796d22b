"""Tests between and within models: against lme4's tables, R's printed digits, and hand computation."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, inference, load_data
from scipy import stats

import glmmjax as gj
from glmmjax.inference import nested
from glmmjax.inference.hypotheses import parse_hypotheses
from glmmjax.inference.nested import Pattern
from glmmjax.report.numbers import r_format, r_pvalues
from glmmjax.results import MixedModel, NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
CONTRA = "use ~ age * ch + I(age^2) + urban + "
# R's fits here stop within 1e-9 of the optimum; ours below 1e-10
ATOL = 1e-6
MODELS: dict[str, Any] = {
    "g1": lambda: gj.glmer(CBPP, named_cbpp()),
    "g0": lambda: fit("g1").update(". ~ . - period"),
    "go": lambda: fit("g1").update(". ~ . + (1 | obs)"),
    "gt": lambda: gj.glmer("cbind(incidence, size - incidence) ~ period + tr + (1 | herd)", with_tr()),
    "gx": lambda: gj.glmer("cbind(incidence, size - incidence) ~ period * tr + (1 | herd)", with_tr()),
    "s0": lambda: gj.lmer("Reaction ~ Days + (1 | Subject)", load_data("sleepstudy")),
    "s1": lambda: gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy")),
    "s2": lambda: gj.lmer("Reaction ~ Days + (Days || Subject)", load_data("sleepstudy")),
    "n0": lambda: gj.lmer("Reaction ~ 1 + (Days | Subject)", load_data("sleepstudy")),
    "cm2": lambda: gj.glmer("use ~ age + I(age^2) + urban + ch + (1 | district)", load_data("Contraception")),
    "cm3": lambda: gj.glmer(CONTRA + "(1 | district)", load_data("Contraception")),
    "cm4": lambda: gj.glmer(CONTRA + "(urban | district)", load_data("Contraception")),
    "cm5": lambda: gj.glmer(CONTRA + "(1 | urban:district) + (1 | district)", load_data("Contraception")),
}
_FITTED: dict[str, MixedModel] = {}


@pytest.fixture(autouse=True, scope="module")
def forget_models() -> Iterator[None]:
    yield
    _FITTED.clear()


def fit(name: str) -> MixedModel:
    if name not in _FITTED:
        _FITTED[name] = MODELS[name]()
    return _FITTED[name]


def altered(name: str, objective: float | None = None, **changes: Any) -> MixedModel:
    """A fit that says it is another: nothing is fitted."""
    out = copy(fit(name))
    out._spec = replace(out._spec, **changes)
    if objective is not None:
        out._estimates = replace(out._estimates, objective=objective)
    return out


def named_cbpp() -> pd.DataFrame:
    data = load_data("cbpp")
    data.attrs["name"] = "cbpp"
    return data


def with_tr() -> pd.DataFrame:
    return load_data("cbpp").assign(tr=np.resize(["a", "b", "c"], 56))


def check_table(table: pd.DataFrame, golden: dict[str, Any], rows: list[str] | None = None) -> None:
    """Every number of R's table that is not missing."""
    keep = [golden["rows"].index(r) for r in rows or golden["rows"]]
    assert list(table.index) == [golden["rows"][i] for i in keep]
    for j, column in enumerate(golden["columns"]):
        column = "-2*log(L)" if column == "deviance" else column
        values = [golden["values"][i][j] for i in keep]
        for name, ours, theirs in zip(table.index, table[column], values, strict=True):
            if theirs is None:
                assert np.isnan(ours), (name, column)
            elif column.startswith("Pr("):
                assert_close(ours, theirs, rtol=1e-5, what=f"{name} {column}")
            else:
                assert_close(ours, theirs, atol=ATOL, what=f"{name} {column}")


def body(table: Any) -> list[list[str]]:
    """The lines below the heading, by cells."""
    lines = str(table).splitlines()
    return [line.split() for line in lines[str(table.attrs["heading"]).count("\n") + 1 :]]


# -------------------- printing
@pytest.mark.parametrize(
    "values, text",  # format(x, digits = 5) of R 4.2
    [
        ([213.6626, 194.0526], "213.66 194.05"),
        ([-104.8313, -92.02628], "-104.831 -92.026"),
        ([1, 1e6, 1e-7], "1e+00 1e+06 1e-07"),
        ([123456, 0.5], "123456.0 0.5"),
        ([1e5], "1e+05"),
        ([123456.7], "123457"),
        ([0, 1e-17], "0e+00 1e-17"),
        ([1e200, 1], "1e+200 1e+00"),
        ([0.00012345], "0.00012345"),
        ([25.61006, np.nan], "25.61 "),
    ],
)
def test_numbers_are_formatted_as_in_r(values: list[float], text: str) -> None:
    assert " ".join(r_format(values, 5)) == text


@pytest.mark.parametrize(
    "values, text",  # format.pval(p, digits = 4) of R 4.2
    [
        ([1.15e-5, 0.4], "1.15e-05 0.4"),
        ([1e-20, 0.3758], "<2e-16 0.3758"),
        ([1e-20], "< 2.2e-16"),
        ([1e-20, 1e-10], "<2e-16 1e-10"),
        ([1e-20, 1], "<2e-16 1"),
        ([np.nan, 0.05], " 0.05"),
    ],
)
def test_p_values_are_formatted_as_in_r(values: list[float], text: str) -> None:
    assert " ".join(r_pvalues(values)) == text


def test_drop1_prints_as_lme4() -> None:
    assert str(gj.drop1(fit("gt"))) == (
        "Single term deletions\n\nModel:\n"
        "cbind(incidence, size - incidence) ~ period + tr + (1 | herd)\n"
        "       npar    AIC     LRT   Pr(Chi)\n"
        "<none>      196.14\n"
        "period    3 215.65 25.5153 1.205e-05 ***\n"
        "tr        2 194.05  1.9163    0.3836\n"
        "---\nSignif. codes:  0 '***' 0.001 '**' 0.01 '*' 0.05 '.' 0.1 ' ' 1"
    )


def test_comparisons_print_the_digits_of_lme4() -> None:
    table = gj.anova(fit("s1"), fit("s0"), fit("s2"), names=["s1", "s0", "s2"])
    assert body(table)[:4] == [
        ["npar", "AIC", "BIC", "logLik", "-2*log(L)", "Chisq", "Df", "Pr(>Chisq)"],
        ["s0", "4", "1802.1", "1814.8", "-897.04", "1794.1"],
        ["s2", "5", "1762.0", "1778.0", "-876.00", "1752.0", "42.0754", "1", "8.782e-11", "***"],
        ["s1", "6", "1763.9", "1783.1", "-875.97", "1751.9", "0.0639", "1", "0.8004"],
    ]
    assert table.attrs["heading"].splitlines()[:5] == [
        "refitting model(s) with ML (instead of REML)",
        "Models:",
        "s0: Reaction ~ Days + (1 | Subject)",
        "s2: Reaction ~ Days + (Days || Subject)",
        "s1: Reaction ~ Days + (Days | Subject)",
    ]


def test_html_escapes_and_has_every_cell() -> None:
    table = gj.anova(fit("g0"), fit("g1"))
    html = table._repr_html_()
    assert "Pr(&gt;Chisq)" in html and "<td>1.151e-05</td><td>***</td>" in html and "<br>MODEL1: " in html
    assert "&lt;none&gt;" in gj.drop1(fit("gt"), test="none")._repr_html_()
    assert type(table[["AIC"]]) is pd.DataFrame  # parts are ordinary frames


# -------------------- several models
def test_cbpp_against_lme4() -> None:
    golden = inference("anova_cbpp")
    table = gj.anova(fit("g1"), fit("g0"), names=["g1", "g0"])
    check_table(table, golden["anova_null_full"])
    assert table.attrs["heading"].splitlines() == golden["anova_null_full"]["heading"]
    check_table(gj.anova(fit("go"), fit("g1"), names=["go", "g1"]), golden["anova_with_obs"])


def test_sleepstudy_against_lme4() -> None:
    golden = inference("anova_sleep")
    names = ["s1", "s2", "s0"]
    check_table(gj.anova(*map(fit, names), names=names), golden["anova_s0_s2_s1"])
    check_table(gj.anova(fit("n0"), fit("s1"), names=["n0", "s1"]), golden["anova_n0_s1"])


@pytest.mark.slow
def test_contraception_against_lme4() -> None:
    names = ["cm2", "cm3", "cm5", "cm4"]
    table = gj.anova(*map(fit, names), names=names)
    golden = inference("anova_contra")["anova_cm1_to_cm6"]
    rows = dict(zip(golden["rows"], golden["values"], strict=True))
    for name in ("cm3", "cm4", "cm5"):
        assert_close(table.loc[name].iloc[:5], rows[name][:5], atol=ATOL, what=name)
    # R's cm2 there is with nAGQ = 0; with Laplace's approximation throughout the first step is that of drop1
    assert_close(table.loc["cm3", "Chisq"], 8.004510, atol=1e-6)
    assert_close(table.loc["cm4", "Chisq":], rows["cm4"][5:], rtol=1e-5, atol=1e-6)  # cm5 is cm4 with equal variances
    assert [note.split(":")[0] for note in table.attrs["notes"]] == ["cm3 and cm5"]


@pytest.mark.slow
def test_a_zero_variance_and_cbpp2_against_lme4() -> None:
    golden = inference("anova_cbpp2")
    b3 = gj.glmer("incidence/size ~ period + treatment + avg_size + (1 | obs)", load_data("cbpp2"), weights="size")
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        b2 = b3.update(". ~ . + (1 | herd)")
    table = gj.anova(b3, b2, names=["b3", "b2"], boundary=True)
    check_table(table.round(9), golden["anova_gm3_gm2"])
    assert_close(table.loc["b2", "Pr(>Chisq) boundary"], 1.0, atol=0.51)  # 1 at 0, 1/2 just above
    check_table(gj.drop1(b2, "~ treatment + avg_size"), golden["drop1_gm2"])


def test_boundary_p_values_are_mixtures() -> None:
    chi2 = stats.chi2.sf
    table = gj.anova(fit("s0"), fit("s1"), boundary=True).iloc[1]  # a column more, with one covariance
    x = table["Chisq"]
    assert_close(table["Pr(>Chisq) boundary"], 0.5 * chi2(x, 1) + 0.5 * chi2(x, 2), rtol=1e-10)
    table = gj.anova(fit("g1"), fit("go"), boundary=True)
    assert_close(table.iloc[1, -1], 0.5 * table.iloc[1, -2], rtol=1e-12)
    assert "conservative" in table.attrs["notes"][0] and "boundary=True" not in table.attrs["notes"][0]
    assert "boundary=True" in gj.anova(fit("g1"), fit("go")).attrs["notes"][0]
    table = gj.anova(fit("s2"), fit("s1"), boundary=True)  # a correlation of 0 is inside
    assert table.iloc[1, -1] == table.iloc[1, -2] and not table.attrs["notes"]


def test_models_that_are_not_nested_have_no_p_value() -> None:
    data = load_data("sleepstudy").assign(x=np.sin(np.arange(180.0)))
    a = gj.lmer("Reaction ~ x + (1 | Subject)", data)
    table = gj.anova(a, fit("s1"))
    assert np.isnan(table.iloc[1]["Pr(>Chisq)"]) and table.iloc[1]["Df"] == 2 and table.iloc[1]["Chisq"] > 0
    assert table.attrs["notes"] == ["MODEL1 and MODEL2: the fixed effects are not nested; no p-value"]
    twice = gj.anova(fit("g0"), fit("g0"))
    assert np.isnan(twice.iloc[1]["Pr(>Chisq)"]) and twice.iloc[1]["Chisq"] == 0.0
    probit = altered("g1", family=gj.families.get("binomial(probit)"))
    assert "families or links" in gj.anova(fit("g0"), probit).attrs["notes"][0]


def test_reml_fits_compare_if_asked() -> None:
    table = gj.anova(fit("s0"), fit("s1"), refit=False)  # R: 42.837, 4.99e-10
    assert table.attrs["heading"].startswith("Models:")
    assert body(table)[2][-4:] == ["42.837", "2", "4.99e-10", "***"]
    other = gj.anova(fit("n0"), fit("s1"), refit=False)
    assert np.isnan(other.iloc[1]["Pr(>Chisq)"]) and "REML criteria" in other.attrs["notes"][0]
    with pytest.raises(ValueError, match="refit=True"):
        gj.anova(fit("s0"), fit("s1").refit_ml(), refit=False)


def test_incomparable_models_are_refused() -> None:
    cbpp = load_data("cbpp")
    cases = {
        "fitted to 56 and 1934 rows": fit("cm2"),
        "differ in their response": fit("g1").refit(np.roll(fit("g1").getME("y"), 1) * 0.0 + 0.5 * (np.arange(56) % 2)),
        "nAGQ = 1 and 0": altered("g1", nAGQ=0),
        "linear and generalised": fit("s0"),
    }
    for message, other in cases.items():
        with pytest.raises(ValueError, match=message):
            gj.anova(fit("g1"), other)
    doubled = gj.glmer("I(incidence/size) ~ period + (1 | herd)", cbpp.assign(w=2 * cbpp["size"]), weights="w")
    with pytest.raises(ValueError, match="weights or trials"):
        gj.anova(fit("g1"), doubled)
    cloglog = gj.families.get("binomial(cloglog)")
    curvatures = [altered("g1", family=cloglog, hessian=h) for h in ("expected", "observed")]
    with pytest.raises(ValueError, match="one hessian"):
        gj.anova(*curvatures)
    with pytest.raises(ValueError, match="2 different names"):
        gj.anova(fit("g0"), fit("g1"), names=["a", "a"])
    with pytest.raises(ValueError, match="got int; write other arguments by name: type=2"):
        gj.anova(fit("s0"), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one model"):
        gj.anova(fit("g0"), fit("g1"), type=2)
    with pytest.raises(ValueError, match="two or more"):
        gj.anova(fit("g0"), boundary=True)


# -------------------- nesting, without fits
def pattern(z: Any, level: Any, diagonal: bool = False) -> Pattern:
    z = np.asarray(z, float).reshape(len(level), -1)
    k = z.shape[1]
    eye = np.eye(k)
    pairs = [(i, i) for i in range(k)] if diagonal else [(i, j) for i in range(k) for j in range(i, k)]
    return Pattern(
        z, np.asarray(level), np.stack([(np.outer(eye[i], eye[j]) + np.outer(eye[j], eye[i])) / 2 for i, j in pairs])
    )


G = np.repeat(np.arange(6), 8)
H = np.tile(np.repeat([0, 1], 4), 6)  # two halves of each level of G
ONE, X = np.ones(48), np.sin(np.arange(48.0))
BOTH, HALVES = np.column_stack([ONE, X]), np.column_stack([H == 0, H == 1])
GH = 2 * G + H


@pytest.mark.parametrize(
    "small, large, expected",
    [
        ([pattern(ONE, G)], [pattern(BOTH, G)], (True, 1)),
        ([pattern(ONE, G)], [pattern(ONE, G), pattern(X, G)], (True, 1)),
        ([pattern(ONE, G), pattern(X, G)], [pattern(BOTH, G)], (True, 0)),
        ([pattern(BOTH, G)], [pattern(ONE, G), pattern(X, G)], (False, 0)),
        ([pattern(BOTH, G, diagonal=True)], [pattern(ONE, G), pattern(X, G)], (True, 0)),
        ([pattern(ONE, G)], [pattern(BOTH, G, diagonal=True)], (True, 1)),
        ([pattern(BOTH, G)], [pattern(BOTH @ [[1, 2], [3, 4]], G)], (True, 0)),  # other columns of the same span
        ([pattern(X, G)], [pattern(ONE, G)], (False, 0)),
        ([pattern(ONE, GH)], [pattern(ONE, G)], (False, 0)),
        ([pattern(ONE, G)], [pattern(ONE, GH), pattern(ONE, G)], (True, 1)),
        ([pattern(ONE, G)], [pattern(HALVES, G)], (True, 1)),
        ([pattern(ONE, GH)], [pattern(HALVES, G)], (True, 0)),  # equal variances, no covariance: inside
        ([pattern(ONE, GH), pattern(ONE, G)], [pattern(HALVES, G)], (True, 0)),
        # of the first half alone = both halves apart - the second half: in the span, but with a negative variance
        ([pattern(HALVES[:, 0], G)], [pattern(ONE, GH), pattern(HALVES[:, 1], G)], (False, 0)),
        ([pattern(ONE, G)], [pattern(ONE, G), pattern(X, G), pattern(ONE, GH)], (True, 2)),
    ],
)
def test_nesting_of_random_effects(small: list[Pattern], large: list[Pattern], expected: tuple[bool, int]) -> None:
    assert nested._covariance_within(small, large) == expected


def test_inner_products_are_those_of_the_covariance_matrices() -> None:
    s, t = pattern(BOTH, G), pattern(HALVES, GH)

    def covariance(p: Pattern, S: np.ndarray) -> np.ndarray:
        return np.asarray((p.z @ S @ p.z.T) * (p.level[:, None] == p.level))

    dense = [[(covariance(s, S) * covariance(t, T)).sum() for T in t.basis] for S in s.basis]
    assert_close(nested._inner(s, t), dense, atol=1e-10)


def test_columns_within_a_span() -> None:
    big = np.column_stack([np.ones(48), 1e6 + X, X**2])
    assert nested._within(np.column_stack([X + 3, np.zeros(48)]), big)
    assert not nested._within(X[:, None] ** 3, big)


def test_fits_that_are_no_optimum_are_told() -> None:
    worse = altered("go", objective=fit("g1").objective + 1.0)
    table = gj.anova(fit("g1"), worse)
    assert table.iloc[1]["Chisq"] == 0.0 and table.iloc[1]["Pr(>Chisq)"] == 1.0
    assert "the larger model has the lower likelihood" in table.attrs["notes"][0]
    better = altered("g1", objective=fit("g0").objective + 1.0)
    assert gj.drop1(better).attrs["notes"] == ["the fit without period did not converge, or the model's own did not"]


# -------------------- one generalised model
def test_sequential_table_is_that_of_lme4() -> None:
    table = gj.anova(fit("gt"))
    assert str(table).startswith("Analysis of Variance Table\n       npar")
    assert_close(table["npar"], [3, 2])
    # lme4's R_X is at the modes and weights where its iteration stopped
    assert_close(table["Sum Sq"], [24.19546782598, 2.05728267335], rtol=1e-5)
    assert_close(table["F value"], [8.06515594199, 1.02864133668], rtol=1e-5)
    assert_close(gj.anova(fit("gt"), type="I"), table)


def test_wald_tables_of_terms() -> None:
    # R: joint tests of the coefficients of the fit with contrasts that sum to 0 (type 3), and differences of the
    # tests with and without the interaction (type 2); its Hessian is by differences
    third, second = gj.anova(fit("gx"), type=3), gj.anova(fit("gx"), type="II")
    assert_close(third["Chisq"], [23.587375247, 0.802965420977, 6.77361438666], rtol=3e-3)
    assert_close(second["Chisq"], [23.1978491923, 0.853890250355, 6.77361438666], rtol=3e-3)
    assert_close(third["Df"], [3, 2, 6])
    assert_close(third["Pr(>Chisq)"], stats.chi2.sf(third["Chisq"], third["Df"]), rtol=1e-10)
    title = (
        "Analysis of Deviance Table (Type III Wald chisquare tests)\n\nResponse: cbind(incidence, size - incidence)\n"
    )
    assert str(third).startswith(title)
    # the same from our own estimates, exactly
    sums = gj.glmer(str(fit("gx").formula), with_tr(), contrasts={"period": "sum", "tr": "sum"})
    b, V, assign = sums.beta, sums.vcov().to_numpy(), np.asarray(sums._data.assign)

    def joint(terms: list[int]) -> float:
        i = np.flatnonzero(np.isin(assign, terms))
        return float(b[i] @ np.linalg.solve(V[np.ix_(i, i)], b[i]))

    assert_close(third["Chisq"], [joint([t]) for t in (1, 2, 3)], rtol=1e-5)
    assert_close(second["Chisq"], [joint([1, 3]) - joint([3]), joint([2, 3]) - joint([3]), joint([3])], rtol=1e-5)
    with pytest.raises(ValueError, match="type must be"):
        gj.anova(fit("gx"), type=4)
    with pytest.raises(NotSupportedError, match="linear mixed models only"):
        gj.anova(fit("gx"), ddf="satterthwaite")


def test_one_linear_model_keeps_its_f_table() -> None:
    table = gj.anova(fit("s1"))
    assert body(table)[1] == ["Days", "30031", "30031", "1", "17", "45.853", "3.264e-06", "***"]
    assert "Kenward-Roger" in gj.anova(fit("s1"), type=1, ddf="kenward-roger").attrs["heading"]


# -------------------- drop1, add1
def test_drop1_against_lme4() -> None:
    check_table(gj.drop1(fit("g1")), inference("anova_cbpp")["drop1"])
    table = gj.drop1(fit("s1"))
    check_table(table, inference("anova_sleep")["drop1_s1"])
    assert table.attrs["heading"].startswith("refitting model with ML (instead of REML)\nSingle term deletions\n")
    check_table(gj.drop1(fit("cm3")), inference("anova_contra")["drop1_cm3"])  # age and ch stay: age:ch has them
    assert list(gj.drop1(fit("gt"), test="none").columns) == ["npar", "AIC"]


def test_add1_is_lme4s_and_inverts_drop1() -> None:
    null = gj.glmer("cbind(incidence, size - incidence) ~ 1 + (1 | herd)", with_tr())
    table = gj.add1(null, ["period", "tr"])
    assert str(table).startswith("Single term additions\n\nModel:\n")
    assert_close(table["LRT"][1:], [25.61006344472, 2.01100230963], atol=ATOL)
    assert_close(table["AIC"], [213.662627188, 194.052563743, 215.651624878], atol=ATOL)
    assert_close(table["npar"][1:], [3, 2])
    assert_close(table["Pr(Chi)"][1:], [1.15093669431e-05, 3.65861235732e-01], rtol=1e-5)
    assert_close(gj.drop1(fit("gt")).loc["tr", "LRT"], 1.91625071641, atol=ATOL)
    up = gj.add1(fit("gt"), "~ . + tr:period")
    assert list(up.index) == ["<none>", "period:tr"]
    assert_close(up.loc["period:tr", "LRT"], fit("gt").objective - fit("gx").objective, atol=ATOL)
    # from a formula, only terms whose margins are in the model
    assert list(gj.add1(null, "~ period * tr", test="none").index) == ["<none>", "period", "tr"]


def test_scopes_that_make_no_sense() -> None:
    for scope in ("~ . + herd2", "foo", ["period", "foo"]):
        with pytest.raises(ValueError, match="which is not in the model; its terms are period, tr"):
            gj.drop1(fit("gt"), scope)
    with pytest.raises(gj.DataError, match="'foo'"):
        gj.add1(fit("gt"), "~ . + foo")
    with pytest.raises(ValueError, match="no term that the model lacks"):
        gj.add1(fit("gt"), ["period"])
    with pytest.raises(ValueError, match=r"anova\(m1, m2\)"):
        gj.add1(fit("gt"), "~ . + (1 | tr)")
    with pytest.raises(ValueError, match=r"anova\(m1, m2\)"):
        gj.drop1(fit("gt"), "(1 | herd)")
    with pytest.raises(ValueError, match="cannot be read"):
        gj.drop1(fit("gt"), ["tr +"])
    with pytest.raises(ValueError, match="labels of terms"):
        gj.drop1(fit("gt"), [])
    with pytest.raises(ValueError, match="test must be 'Chisq' or 'none'"):
        gj.drop1(fit("gt"), test="F")


def test_refits_keep_rows_response_and_contrasts(sleepstudy: pd.DataFrame) -> None:
    data = sleepstudy.assign(x=np.sin(np.arange(180.0)), f=np.resize(["a", "b", "c"], 180))
    data.loc[data.index[:7], "x"] = np.nan
    model = gj.lmer("Reaction ~ Days + x + f + (1 | Subject)", data, REML=False, contrasts={"f": "sum"})
    without = gj.lmer("Reaction ~ Days + f + (1 | Subject)", data.iloc[7:], REML=False)
    table = gj.drop1(model)
    assert_close(table.loc["x", "AIC"], without.aic, atol=ATOL)
    # a term that the others contain: other columns of the same model
    crossed = gj.lmer("Reaction ~ x * f + (1 | Subject)", data, REML=False)
    assert list(gj.drop1(crossed).index) == ["<none>", "x:f"]
    row = gj.drop1(crossed, "x").loc["x"]
    assert row["npar"] == 0 and row["LRT"] < ATOL and np.isnan(row["Pr(Chi)"])
    with pytest.raises(ValueError, match="7 of the model's rows have missing values in x"):
        gj.add1(gj.lmer("Reaction ~ Days + (1 | Subject)", data), "~ . + x")
    # the response of a refit, not that in the data
    y = model.getME("y") + 30.0 * np.cos(np.arange(173.0))
    data = data.iloc[7:].assign(y=y)
    direct = gj.lmer("y ~ Days + x + f + (1 | Subject)", data, REML=False)
    assert_close(gj.drop1(model.refit(y))["AIC"], gj.drop1(direct)["AIC"], atol=ATOL)
    bare = gj.lmer("y ~ 0 + f + (1 | Subject) + offset(Days)", data, REML=False)
    other = gj.lmer("y ~ 0 + (1 | Subject) + offset(Days)", data, REML=False)
    assert_close(gj.drop1(bare).loc["f", ["npar", "AIC"]], [3, other.aic], atol=ATOL)


def test_drop1_of_a_singular_fit_finds_the_variance_that_the_term_took() -> None:
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"g": np.repeat(np.arange(10), 6), "x": np.repeat(rng.normal(size=10), 6)})
    data["y"] = 2.0 * data["x"] + rng.normal(size=60)
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        model = gj.lmer("y ~ x + (1 | g)", data, REML=False)
    assert_close(gj.drop1(model).loc["x", "AIC"], gj.lmer("y ~ 1 + (1 | g)", data, REML=False).aic, atol=ATOL)


# -------------------- linear hypotheses
def test_wald_test_by_hand() -> None:
    model = fit("g1")
    b, V = model.beta, model.vcov().to_numpy()
    L = np.array([[0, 1.0, -1, 0], [0, 0, 0, 1]])
    by_hand = (L @ b) @ np.linalg.solve(L @ V @ L.T, L @ b)
    for form in ("period2 = period3, period4 = 0", "period2 - period3, period4", ["period2 = period3", "period4"], L):
        test = model.wald_test(form)
        assert_close(test.statistic, by_hand, rtol=1e-10)
        assert_close(test.estimate, L @ b, rtol=1e-12)
        assert_close(test.std_error, np.sqrt(np.diag(L @ V @ L.T)), rtol=1e-10)
        assert_close(test.p_value, stats.chi2.sf(by_hand, 2), rtol=1e-10)
        assert test.df == 2 and test.df_denom is None
        assert list(test.estimate.index) == ["period2 - period3", "period4"]
    single = model.wald_test({"period2": 1.0})
    assert_close(single.statistic, model.zvalues["period2"] ** 2, rtol=1e-10)
    assert_close(single.p_value, model.pvalues["period2"], rtol=1e-8)
    assert model.wald_test(np.vstack([L, L.sum(axis=0)])).df == 2  # a row that follows from the others
    assert_close(model.wald_test(np.vstack([L, L.sum(axis=0)])).statistic, by_hand, rtol=1e-8)
    shifted = model.wald_test(L, rhs=[0.5, -1.5])
    e = L @ b - [0.5, -1.5]
    assert_close(shifted.statistic, e @ np.linalg.solve(L @ V @ L.T, e), rtol=1e-10)
    assert_close(model.wald_test("period2 = period3 + 0.5, period4 = -1.5").statistic, shifted.statistic, rtol=1e-10)
    frame = pd.DataFrame(L, columns=model.fixef.index)[model.fixef.index[::-1]]  # columns go by name
    assert_close(model.wald_test(frame).statistic, by_hand, rtol=1e-10)


def test_wald_test_prints() -> None:
    test = fit("g1").wald_test("period2 = period3, period4 = 0")
    assert str(test).splitlines()[:8] == [
        "Linear hypothesis test (Wald chi-square)",
        "",
        "                  estimate std.error tested",
        "period2 - period3  0.13634   0.38071      0",
        "period4           -1.58031   0.42744      0",
        "",
        "       Chisq Df Pr(>Chisq)",
        "joint 13.803  2   0.001006 **",
    ]
    html = test._repr_html_()
    assert html.startswith("<div><p>Linear hypothesis test") and html.count("<table>") == 2
    assert "<th>period2 - period3</th><td>0.13634</td>" in html and "Pr(&gt;Chisq)" in html
    assert str(test) == str(test.table())


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger"])
def test_wald_test_of_a_linear_model_is_an_f_test(ddf: str) -> None:
    model = fit("s1")
    table = model.coefficients(ddf).loc["Days"]
    test = model.wald_test("Days = 0", ddf=ddf)
    assert_close([test.statistic, test.df_denom], [table["statistic"] ** 2, table["df"]], rtol=1e-9)
    assert_close([test.p_value, test.std_error.iloc[0]], [table["p_value"], table["std_error"]], rtol=1e-8)
    shifted = model.wald_test("Days = 10", ddf=ddf)
    assert_close(shifted.statistic, ((table["estimate"] - 10.0) / table["std_error"]) ** 2, rtol=1e-9)
    # moving the response moves the estimates, and nothing else
    y = model.getME("y") - 250.0 - 10.0 * model.getME("X")["Days"].to_numpy()
    moved = model.refit(y).wald_test(np.eye(2), ddf=ddf)
    joint = model.wald_test("`(Intercept)` = 250, Days = 10", ddf=ddf)
    assert_close([joint.statistic, joint.df_denom], [moved.statistic, moved.df_denom], rtol=1e-5)
    assert joint.df == 2 and "DenDF" in str(joint)


def test_hypotheses_in_text() -> None:
    names = ["(Intercept)", "x", "x2", "a:x", "I(x^2)", "bs(x, df = 5)1", "x.y"]

    def read(text: str) -> tuple[list[list[float]], list[float]]:
        _, matrix, rhs = parse_hypotheses(text, names)
        return matrix.tolist(), rhs.tolist()

    assert read("x2 = 1e1") == ([[0, 0, 1, 0, 0, 0, 0]], [10])
    assert read("a:x - 2*(x + 1)/4 == x.y") == ([[0, -0.5, 0, 1, 0, 0, -1]], [0.5])
    assert read("-I(x^2) + (Intercept); bs(x, df = 5)1\n") == ([[1, 0, 0, 0, -1, 0, 0], [0, 0, 0, 0, 0, 1, 0]], [0, 0])
    assert read("x = x2 = a:x") == ([[0, 1, -1, 0, 0, 0, 0], [0, 0, 1, -1, 0, 0, 0]], [0, 0])
    for text, message in {
        "x3 = 0": "expected a number or one of the coefficients .* at 'x3 = 0'",
        "x * x2 = 0": "only products with numbers",
        "x / 0": "quotients by numbers",
        "x = 0 x2": "expected '=', ',' or the end at 'x2'",
        "(x": "expected '\\)'",
        " , ": "no hypothesis",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(text)


def test_hypotheses_that_make_no_sense() -> None:
    model = fit("g1")
    for L, rhs, message in (
        ({"period5": 1}, 0, "no fixed effect is named 'period5'"),
        (np.eye(3), 0, "one column for each of the 4 fixed effects"),
        (np.zeros((1, 4)), 0, "not all zero"),
        (np.eye(4), [1, 2], "rhs must be a number or one for each of the 4"),
        ("period2 = 1", 2, "leave rhs out"),
        ("period2 = 1, period2 = 2", 0, "contradict each other"),
        ("period2 = period2", 0, "not all zero"),
    ):
        with pytest.raises(ValueError, match=message):
            model.wald_test(L, rhs)
    with pytest.raises(NotSupportedError, match="linear mixed models only"):
        model.wald_test("period2", ddf="satterthwaite")
