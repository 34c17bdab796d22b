"""Pictures of fitted models: the data drawn against independent numbers, and what is on the axes."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, load_data
from scipy import optimize, stats

import glmmjax as gj
from glmmjax import plots
from glmmjax.report.panels import plotting_positions, smooth
from glmmjax.results import NotSupportedError

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


@lru_cache(maxsize=1)
def sleep() -> gj.MixedModel:
    return gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))


@lru_cache(maxsize=1)
def cbpp() -> gj.MixedModel:
    return gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", load_data("cbpp"))


@lru_cache(maxsize=1)
def contraception() -> gj.MixedModel:
    return gj.glmer("use ~ age + urban + (urban | district)", load_data("contraception"), family="binomial")


@lru_cache(maxsize=2)
def ticks(family: str = "poisson") -> gj.MixedModel:
    return gj.glmer("TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", load_data("grouseticks"), family=family)


def texts(panel: Any) -> list[str]:
    return [t.get_text() for t in panel.texts]


def inside(figure: Any) -> None:
    """Draw it, so that what matplotlib warns of is an error; every title and label lies on the page."""
    figure.canvas.draw()
    page = figure.bbox
    for panel in figure.axes:
        for text in (panel.title, panel.xaxis.label, panel.yaxis.label):
            box = text.get_window_extent()
            assert box.x0 >= -2 and box.x1 <= page.x1 + 2 and box.y0 >= -2 and box.y1 <= page.y1 + 2, text


# -------------------- residuals
def test_smooth_reproduces_a_line_and_stands_ties(rng: np.random.Generator):
    x = rng.normal(size=50)
    assert_close(smooth(x, 3.0 - 2.0 * x), 3.0 - 2.0 * x, atol=1e-8)
    assert_close(smooth(np.zeros(8), np.arange(8.0)), np.full(8, 3.5), rtol=1e-12)
    tied = np.repeat([0.0, 1.0], 20)
    assert_close(smooth(tied, tied + 1.0), tied + 1.0, atol=1e-6)


def test_residuals_fitted_of_a_linear_model():
    m = sleep()
    figure, data = plots.residuals_fitted(m)
    inside(figure)
    assert_close(data["fitted"], m.fitted)
    assert_close(data["residual"], m.residuals("pearson") / m.sigma)
    largest = data["residual"].abs().nlargest(3).index
    assert sorted(data.index[data["labelled"]]) == sorted(largest)
    (panel,) = figure.axes
    assert sorted(texts(panel)) == sorted(str(r) for r in data["row"][largest])
    assert_close(panel.collections[0].get_offsets(), data[["fitted", "residual"]])
    assert panel.get_xlabel() == "fitted value" and panel.get_ylabel() == "Pearson residual / sigma"


def test_residuals_fitted_of_a_generalised_model_has_the_linear_predictor():
    figure, data = plots.residuals_fitted(cbpp(), type="deviance", n_labels=0)
    assert_close(data["fitted"], cbpp().linear_predictor)
    assert_close(data["residual"], cbpp().residuals("deviance"))
    assert not data["labelled"].any() and not figure.axes[0].texts
    assert figure.axes[0].get_xlabel() == "linear predictor"


def test_scale_location():
    figure, data = plots.scale_location(cbpp())
    inside(figure)
    assert_close(data["root_abs_residual"] ** 2, cbpp().residuals("pearson").abs(), rtol=1e-12)
    assert figure.axes[0].get_ylim()[0] <= 0.0


def test_residuals_by_group():
    figure, data = plots.residuals_by_group(sleep())
    inside(figure)
    r = (sleep().residuals("pearson") / sleep().sigma).groupby(load_data("sleepstudy")["Subject"].to_numpy())
    assert data["median"].is_monotonic_increasing and len(data) == 18
    for _, row in data.iterrows():
        own = r.get_group(row["level"])
        assert_close(row[["q1", "median", "q3"]].astype(float), own.quantile([0.25, 0.5, 0.75]), rtol=1e-10)
        reach = 1.5 * (row["q3"] - row["q1"])
        within = own[(own >= row["q1"] - reach) & (own <= row["q3"] + reach)]
        assert (row["low"], row["high"], row["n"]) == (within.min(), within.max(), 10)
        assert row["outside"] == 10 - len(within)
    assert data["outside"].sum() > 0
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == data["level"].tolist()


def test_residuals_by_group_with_many_levels_or_another_variable():
    figure, data = plots.residuals_by_group(ticks())
    inside(figure)
    medians = ticks().residuals("pearson").groupby(load_data("grouseticks")["BROOD"].astype(str).to_numpy()).median()
    # an interpolated quantile may round otherwise than the mean of the two in the middle
    assert_close(np.sort(data["median"].abs()), np.sort(medians.abs().nlargest(60)), rtol=1e-15, atol=0.0)
    assert "60 of 118 levels" in figure.axes[0].get_title()
    _, data = plots.residuals_by_group(cbpp(), load_data("cbpp")["period"])
    assert sorted(data["level"]) == ["1", "2", "3", "4"]
    with pytest.raises(ValueError, match="no grouping factor 'period'; it has herd"):
        plots.residuals_by_group(cbpp(), "period")
    with pytest.raises(ValueError, match="group has 3 values, the fit has 56 rows"):
        plots.residuals_by_group(cbpp(), [1, 2, 3])


def test_an_effect_per_row_is_not_the_default_group():
    m = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | obs) + (1 | herd)", load_data("cbpp"))
    assert plots.residuals_by_group(m)[0].axes[0].get_title() == "Residuals by herd"
    figure, data = plots.ranef_qq(m)
    assert len(figure.axes) == 2 and data["group"].value_counts().to_dict() == {"obs": 56, "herd": 15}


def test_residuals_qq():
    figure, data = plots.residuals_qq(sleep())
    inside(figure)
    r = np.sort(sleep().residuals("pearson") / sleep().sigma)
    z = stats.norm.ppf((np.arange(180) + 0.5) / 180)
    assert_close(data["residual"], r)
    assert_close(data["theoretical"], z, atol=1e-12)
    q, zq = np.quantile(r, [0.25, 0.75]), stats.norm.ppf([0.25, 0.75])
    slope = (q[1] - q[0]) / (zq[1] - zq[0])
    assert_close(data["line"], q[0] + slope * (z - zq[0]), atol=1e-10)
    ends = stats.norm.ppf(stats.beta.ppf([0.025, 0.975], 180, 1))  # the largest of 180
    assert_close((data[["lower", "upper"]].iloc[-1] - q.mean()) / slope, ends, rtol=1e-8)
    small = plotting_positions(5)
    assert_close(stats.norm.cdf(small), (np.arange(1, 6) - 0.375) / 5.25, rtol=1e-12)


def test_residuals_qq_of_a_generalised_model_has_quantile_residuals():
    _, data = plots.residuals_qq(cbpp(), seed=4)
    assert_close(data["residual"], np.sort(cbpp().residuals("quantile", seed=4)))
    assert_close(plots.residuals_qq(cbpp(), "pearson")[1]["residual"], np.sort(cbpp().residuals("pearson")))


def test_diagnostics_is_the_four_on_a_page():
    figure, data = plots.diagnostics(sleep())
    inside(figure)
    names = ["residuals_fitted", "residuals_qq", "scale_location", "residuals_by_group"]
    assert len(figure.axes) == 4 and list(dict.fromkeys(data.index.get_level_values("panel"))) == names
    for name in names:
        alone = getattr(plots, name)(sleep())[1]
        own = data.loc[name][alone.columns].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, alone, check_dtype=False, check_names=False, check_index_type=False)
    mine, axes = plt.subplots(2, 2, layout="constrained")
    assert plots.diagnostics(cbpp(), ax=axes)[0] is mine
    with pytest.raises(ValueError, match="ax must hold 4 axes, one per panel; got 2"):
        plots.diagnostics(cbpp(), ax=axes[0])


# -------------------- random effects
def test_caterpillar():
    figure, data = plots.caterpillar(sleep())
    inside(figure)
    known = sleep().ranef_frame().set_index(["term", "grp"])
    assert [panel.get_title() for panel in figure.axes] == ["(Intercept)", "Days"]
    for panel, (column, own) in zip(figure.axes, data.groupby("column", sort=False), strict=True):
        truth = known.loc[column].loc[own["level"]]
        assert own["mode"].is_monotonic_increasing
        assert_close(own["mode"], truth["condval"])
        assert_close(own["lower"], truth["condval"] - 1.959964 * truth["condsd"], atol=1e-5)
        assert_close(own["upper"], truth["condval"] + 1.959964 * truth["condsd"], atol=1e-5)
        assert [t.get_text() for t in panel.get_yticklabels()] == own["level"].tolist()


def test_caterpillar_sorted_by_a_column_and_terms():
    _, data = plots.caterpillar(sleep(), sort="Days", level=0.5)
    first, second = (own for _, own in data.groupby("column", sort=False))
    assert second["mode"].is_monotonic_increasing and first["level"].tolist() == second["level"].tolist()
    assert_close((second["upper"] - second["mode"]) / second["sd"], np.full(18, stats.norm.ppf(0.75)), rtol=1e-8)
    with pytest.raises(ValueError, match=r"sort must be one of the columns \(Intercept\), Days; got 'x'"):
        plots.caterpillar(sleep(), sort="x")
    split = gj.lmer("Reaction ~ Days + (1 | Subject) + (0 + Days | Subject)", load_data("sleepstudy"))
    figure, data = plots.caterpillar(split, "(0 + Days|Subject)")
    assert len(figure.axes) == 1 and set(data["column"]) == {"Days"}
    assert len(plots.caterpillar(split, "Subject")[0].axes) == 2
    with pytest.raises(ValueError, match="no grouping factor or term 'Days'; it has Subject"):
        plots.caterpillar(split, "Days")
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        plots.caterpillar(split, level=95)


def test_names_are_left_out_where_they_cannot_be_read():
    figure, data = plots.caterpillar(ticks())
    inside(figure)
    assert len(data) == 118 and not figure.axes[0].get_yticklabels()
    assert figure.axes[0].get_ylabel() == "118 levels of BROOD"


def test_ranef_qq():
    figure, data = plots.ranef_qq(sleep())
    inside(figure)
    assert [panel.get_title() for panel in figure.axes] == ["Subject: (Intercept)", "Subject: Days"]
    for column, own in data.groupby("column", sort=False):
        z = stats.norm.ppf((np.arange(18) + 0.5) / 18)
        assert_close(own["theoretical"], z, atol=1e-12)
        assert_close(own["mode"], np.sort(sleep().ranef()["Subject"][column]))
        assert_close(own["line"], np.polyval(np.polyfit(z, own["mode"], 1), z), atol=1e-8)
        assert_close(own["upper"] - own["mode"], 1.959964 * own["sd"], rtol=1e-6)


# -------------------- shrinkage
def test_shrinkage_of_a_linear_model_is_from_separate_least_squares():
    figure, data = plots.shrinkage(sleep())
    inside(figure)
    frame = load_data("sleepstudy")
    wide = data.pivot(index="level", columns="column", values=["no_pooling", "mode"])
    for subject, own in frame.groupby(frame["Subject"].astype(str)):
        slope, intercept = np.polyfit(own["Days"], own["Reaction"], 1)
        assert_close(wide.loc[subject, "no_pooling"][["(Intercept)", "Days"]], [intercept, slope], rtol=1e-8)
    assert_close(wide["mode"].loc["308"][["(Intercept)", "Days"]], sleep().coef()["Subject"].loc["308"])
    assert data.groupby("column")["fixed"].first().to_dict() == pytest.approx(sleep().fixef.to_dict())
    assert (data["n"] == 10).all()
    (panel,) = figure.axes
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("(Intercept)", "Days")
    assert sorted(texts(panel)) == sorted(frame["Subject"].astype(str).unique())


def test_shrinkage_of_a_generalised_model_is_from_separate_likelihoods():
    m = cbpp()
    figure, data = plots.shrinkage(m, "herd")
    inside(figure)
    frame, eta = load_data("cbpp"), m.predict(re_form="NA")
    for _, row in data.iterrows():
        own = (frame["herd"].astype(str) == row["level"]).to_numpy()
        y, n, offset = frame["incidence"][own], frame["size"][own], eta[own]
        if y.sum() == 0:
            assert np.isnan(row["no_pooling"])
            continue
        best = optimize.brentq(lambda b, y=y, n=n, o=offset: (y - n / (1 + np.exp(-o - b))).sum(), -9, 9, xtol=1e-13)
        assert_close(row["no_pooling"], m.beta[0] + best, rtol=1e-8)
    # partial pooling draws every level towards the fixed effect
    away = (data["no_pooling"] - data["fixed"]).abs(), (data["mode"] - data["fixed"]).abs()
    assert (away[1] < away[0]).all() and np.sign(data["mode"] - data["fixed"]).nunique() == 2


def test_shrinkage_leaves_out_what_a_level_does_not_determine():
    m, frame = contraception(), load_data("contraception")
    figure, data = plots.shrinkage(m)
    inside(figure)
    cells = frame.assign(y=frame["use"] == "Y").groupby(["district", "urban"], observed=False)["y"].agg(["sum", "size"])
    finite = ((cells["sum"] > 0) & (cells["sum"] < cells["size"])).groupby("district", observed=False).all()
    slope = data[data["column"] == "urbanY"].set_index("level")["no_pooling"]
    assert slope.notna().to_dict() == {str(k): bool(v) for k, v in finite.items()}
    assert f"{int((~finite).sum())} of 60 levels have no estimate of their own" in figure.axes[0].get_title()
    # and the separate estimates solve their score equations
    rest = m.predict(re_form="NA")
    for level in slope.dropna().index[:5]:
        own = (frame["district"].astype(str) == level).to_numpy()
        b = data[data["level"] == level].set_index("column")["no_pooling"] - m.fixef[["(Intercept)", "urbanY"]]
        urban = (frame["urban"][own] == "Y").to_numpy(float)
        mu = 1 / (1 + np.exp(-rest[own] - b["(Intercept)"] - b["urbanY"] * urban))
        residual = (frame["use"][own] == "Y").to_numpy(float) - mu
        assert_close([residual.sum(), residual @ urban], [0.0, 0.0], atol=1e-6)


def test_shrinkage_of_three_columns_has_a_panel_each(rng: np.random.Generator):
    g = np.repeat(np.arange(12), 15)
    x, z = rng.normal(size=(2, 180))
    b = rng.normal(size=(12, 3))
    y = 1.0 + x + b[g, 0] + b[g, 1] * x + b[g, 2] * z + 0.5 * rng.normal(size=180)
    m = gj.lmer("y ~ x + (x + z || g)", pd.DataFrame({"y": y, "x": x, "z": z, "g": g}))
    figure, data = plots.shrinkage(m)
    inside(figure)
    assert len(figure.axes) == 3 and len(data) == 36
    assert data.groupby("column", sort=False)["fixed"].first().to_dict() == pytest.approx({**m.fixef, "z": 0.0})
    own = g == 4
    X = np.column_stack([np.ones(15), x[own], z[own]])
    assert_close(data[data["level"] == "4"]["no_pooling"], np.linalg.lstsq(X, y[own], rcond=None)[0], rtol=1e-8)


def test_a_singular_fit_is_drawn(rng: np.random.Generator):
    data = pd.DataFrame(
        {"y": np.tile(np.arange(5.0), 16) + 0.1 * rng.normal(size=80), "g": np.repeat(np.arange(16), 5)}
    )
    with pytest.warns(gj.ConvergenceWarning, match="singular"):
        m = gj.lmer("y ~ 1 + (1 | g)", data)
    figure, drawn = plots.caterpillar(m)
    inside(figure)
    assert (drawn[["mode", "sd", "lower", "upper"]] == 0.0).all(axis=None)
    assert_close(plots.ranef_qq(m)[1]["line"], np.zeros(16))
    pooled = plots.shrinkage(m)[1].set_index("level")
    assert_close(pooled["mode"], np.full(16, m.beta[0]))
    assert_close(pooled["no_pooling"].loc["3"], data.loc[data["g"] == 3, "y"].mean(), rtol=1e-10)


# -------------------- coefficients
def test_coefficients_of_one_model():
    figure, data = plots.coefficients(cbpp(), level=0.9)
    inside(figure)
    assert data["coefficient"].tolist() == list(cbpp().fixef.index)
    assert_close(data["estimate"], cbpp().beta)
    assert_close(data[["lower", "upper"]], cbpp().confint(level=0.9))
    assert figure.axes[0].get_legend() is None
    assert len(plots.coefficients(cbpp(), intercept=False)[1]) == 3


def test_coefficients_of_several_models_and_methods():
    given = pd.DataFrame({"2.5 %": [0.1, -2.0], "97.5 %": [1.0, -0.5]}, index=[".sig01", "(Intercept)"])
    known = pd.DataFrame({"lower": [-3.0], "estimate": [-2.0], "upper": [-1.0]}, index=["period4"])
    figure, data = plots.coefficients({"a": cbpp(), "b": ticks()}, intervals={"profile": given, "other": known})
    inside(figure)
    names = ["(Intercept)", "period2", "period3", "period4", "YEAR96", "YEAR97", "cHEIGHT"]
    assert list(dict.fromkeys(data["coefficient"])) == names
    assert data["label"].value_counts().to_dict() == {"a": 4, "b": 4, "profile": 1, "other": 1}
    profile = data[data["label"] == "profile"].iloc[0]
    assert np.isnan(profile["estimate"]) and (profile["lower"], profile["upper"]) == (-2.0, -0.5)
    assert data[data["label"] == "other"]["estimate"].tolist() == [-2.0]
    legend = figure.axes[0].get_legend()
    assert [t.get_text() for t in legend.get_texts()] == ["a", "b", "profile", "other"]
    heights = [s[0, 1] for c in figure.axes[0].collections for s in c.get_segments()]
    assert len(set(heights)) == len(heights)  # nothing is drawn over something else
    # of a single model the estimates serve
    _, single = plots.coefficients(cbpp(), intervals={"profile": given})
    assert_close(single[single["label"] == "profile"]["estimate"], cbpp().fixef[["(Intercept)"]])
    _, alone = plots.coefficients(intervals={"profile": given})
    assert alone["coefficient"].tolist() == [".sig01", "(Intercept)"]


def test_coefficients_say_what_is_wrong():
    with pytest.raises(ValueError, match="nothing to draw: give a fitted model"):
        plots.coefficients()
    three = pd.DataFrame(np.zeros((1, 3)), index=["period2"], columns=["a", "b", "c"])
    with pytest.raises(ValueError, match="intervals 'x' must have two columns, lower and upper; it has 3"):
        plots.coefficients(cbpp(), intervals={"x": three})
    with pytest.raises(ValueError, match="intervals 'x' has none of the models' fixed effects"):
        plots.coefficients(cbpp(), intervals={"x": three[["a", "b"]].set_axis(["q"])})
    with pytest.raises(ValueError, match="two sets of intervals are labelled 'Wald'"):
        plots.coefficients(cbpp(), intervals={"Wald": cbpp().confint()})


# -------------------- calibration
def test_observed_fitted_of_proportions():
    figure, data = plots.observed_fitted(cbpp(), bins=4)
    inside(figure)
    frame = load_data("cbpp").assign(mu=cbpp().fitted)
    frame["expected"], frame["v"] = frame["size"] * frame["mu"], frame["size"] * frame["mu"] * (1 - frame["mu"])
    sums = frame.groupby(pd.qcut(frame["mu"], 4), observed=True)[["incidence", "size", "expected", "v"]].sum()
    assert data["n"].tolist() == [14, 14, 14, 14]
    assert_close(data["weight"], sums["size"])
    assert_close(data["observed"], sums["incidence"] / sums["size"], rtol=1e-12)
    assert_close(data["fitted"], sums["expected"] / sums["size"], rtol=1e-12)
    assert_close(data["upper"] - data["fitted"], 1.959964 * np.sqrt(sums["v"]) / sums["size"], rtol=1e-6)
    assert texts(figure.axes[0]) == ["14"] * 4
    with pytest.raises(ValueError, match="bins must be a positive integer"):
        plots.observed_fitted(cbpp(), bins=0)


def test_observed_fitted_of_counts_and_of_a_linear_model():
    figure, data = plots.observed_fitted(ticks())
    inside(figure)
    assert data["n"].sum() == 403 and (data["lower"] >= 0.0).all()
    assert_close((data["n"] * data["observed"]).sum(), load_data("grouseticks")["TICKS"].sum(), rtol=1e-12)
    _, data = plots.observed_fitted(sleep(), bins=6)
    assert_close(data["upper"] - data["fitted"], 1.959964 * sleep().sigma / np.sqrt(data["n"]), rtol=1e-6)


@pytest.mark.parametrize("family", ["poisson", "negative.binomial(2)"])
def test_rootogram(family: str):
    m = ticks(family)
    figure, data = plots.rootogram(m)
    inside(figure)
    y, mu = load_data("grouseticks")["TICKS"], m.fitted.to_numpy()
    law = stats.poisson(mu) if family == "poisson" else stats.nbinom(2.0, 2.0 / (2.0 + mu))
    assert data["count"].tolist() == list(range(int(y.max()) + 1))
    assert_close(data["observed"], np.bincount(y.astype(int)))
    assert_close(data["expected"], [law.pmf(k).sum() for k in data["count"]], rtol=1e-10)
    # bars hang from the expected: their lower ends are the differences of the roots
    bottoms = [p.get_y() + min(p.get_height(), 0.0) for p in figure.axes[0].patches]
    tops = np.sqrt(data["expected"])
    assert_close(np.sort(bottoms), np.sort(tops - np.sqrt(data["observed"])), atol=1e-12)
    assert len(plots.rootogram(m, max_count=9)[1]) == 10


def test_rootogram_is_of_counts():
    with pytest.raises(NotSupportedError, match=r"not binomial \(logit\); observed_fitted"):
        plots.rootogram(cbpp())


# -------------------- everything
@pytest.mark.parametrize(
    "name",
    [
        *("residuals_fitted", "scale_location", "residuals_by_group", "residuals_qq", "caterpillar", "ranef_qq"),
        *("shrinkage", "coefficients", "observed_fitted"),
    ],
)
def test_axes_of_ones_own(name: str):
    mine, panel = plt.subplots()
    figure, data = getattr(gj.plots, name)(cbpp(), ax=panel)
    assert figure is mine and len(data) and panel.has_data()
    with pytest.raises(ValueError, match="one per panel; got 2"):
        getattr(plots, name)(cbpp(), ax=plt.subplots(1, 2)[1])


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    for draw in (plots.diagnostics, plots.caterpillar, plots.shrinkage, plots.coefficients, plots.observed_fitted):
        with pytest.raises(ImportError, match=r"pip install 'glmmjax\[plots\]'"):
            draw(cbpp())
