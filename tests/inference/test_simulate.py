"""Simulation: moments against lme4 and closed forms, what refit takes, draws without a fit.

Means are compared in units of their Monte-Carlo standard error: with 20 rows, 5 of them are a probability of 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, inference, load_data, reference_model

import glmmjax as gj
from glmmjax.results import NotSupportedError

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
SLEEP = "Reaction ~ Days + (Days | Subject)"
NSIM = 4000


@cache
def cbpp_fit() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"))


@cache
def sleep_fit() -> gj.MixedModel:
    return gj.lmer(SLEEP, load_data("sleepstudy"))


def errors(draws: Any, mean: Any, sd: Any, other: int | None = None) -> float:
    """Largest distance of the row means from `mean`, in standard errors; `other`: draws behind `mean`, if simulated."""
    x = np.asarray(draws, float)
    variance = np.asarray(sd) ** 2 * (1.0 / x.shape[1] + (0.0 if other is None else 1.0 / other))
    return float(np.max(np.abs(x.mean(axis=1) - mean) / np.sqrt(variance)))


# -------------------- moments
@pytest.mark.parametrize("key", ["cbpp_new_u", "sleep_new_u", "sleep_use_u"])
def test_moments_are_those_of_lme4(key: str) -> None:
    ref = inference("simulate_moments")[key]
    m = cbpp_fit() if key.startswith("cbpp") else sleep_fit()
    draws = m.simulate(NSIM, seed=11, use_u=key.endswith("use_u"))
    first, total = draws.iloc[:20], draws.sum().to_numpy()
    assert errors(first, ref["mean_first20"], ref["sd_first20"], ref["nsim"]) < 5.0
    # a standard deviation from 4000 draws has a relative error of .011, .02 for skewed counts; a ratio 1.4 times that
    assert_close(first.std(axis=1), ref["sd_first20"], rtol=0.09)
    assert errors(total[None], ref["mean_of_total"], ref["sd_of_total"], ref["nsim"]) < 5.0
    assert total.std() == pytest.approx(ref["sd_of_total"], rel=0.08)


def test_moments_at_the_modes() -> None:
    """The moments in cbpp_use_u were drawn after profile() had moved lme4's modes; those of the model file stand."""
    m, data = cbpp_fit(), load_data("cbpp")
    size = data["size"].to_numpy()
    draws = m.simulate(NSIM, seed=3, use_u=True).to_numpy()
    p = np.array(reference_model("cbpp_nagq1")["results"]["fitted_first20"])
    sd = np.sqrt(size * m.fitted * (1.0 - m.fitted)).to_numpy()
    assert errors(draws[:20], size[:20] * p, sd[:20]) < 5.0
    assert errors(draws, size * m.fitted, sd) < 5.0
    assert_close(draws.std(axis=1), sd, rtol=0.1)


def test_rows_of_a_level_move_together() -> None:
    """Covariances over draws are Z Lambda Lambda'Z' sigma^2 + sigma^2 I; given some terms, those of the others."""
    m = sleep_fit()
    draws = m.simulate(20_000, seed=4).to_numpy()[:20]
    Z, Lambda = m.getME("Z")[:20], m.getME("Lambda")
    V = m.sigma**2 * (Z @ Lambda @ Lambda.T @ Z.T + np.eye(20))
    scale = np.sqrt(np.diag(V))
    # a correlation r from N draws has standard error (1 - r^2) / sqrt(N) < .0071
    assert_close(np.corrcoef(draws), V / np.outer(scale, scale), atol=0.036)

    n = 40
    a, b = np.arange(n) % 8, np.arange(n) // 8
    y = np.random.default_rng(0).standard_normal((3, 10))
    data = pd.DataFrame({"a": a, "b": b, "y": 2 * y[0, a % 10] + 2 * y[1, b] + np.sin(np.arange(n) ** 2)})
    crossed = gj.lmer("y ~ 1 + (1 | a) + (1 | b)", data)
    given = crossed.simulate(20_000, seed=5, re_form="~(1 | a)").to_numpy()
    assert errors(given, crossed.predict(re_form="~(1 | a)"), given.std(axis=1)) < 5.0
    assert_close(given.std(axis=1), np.full(n, crossed.sigma * np.hypot(1.0, crossed.theta[1])), rtol=0.03)
    correlation = np.corrcoef(given)
    shared = crossed.theta[1] ** 2 / (1.0 + crossed.theta[1] ** 2)
    assert_close(correlation[0, 1], shared, atol=0.036)  # one level of b
    assert_close(correlation[0, 8], 0.0, atol=0.036)  # one level of a, which is given


def test_weights_and_offsets_of_a_linear_model() -> None:
    data = load_data("sleepstudy").assign(w=lambda d: 1.0 + d["Days"] % 3, o=lambda d: 10.0 * d["Days"])
    m = gj.lmer("Reaction ~ 1 + (1 | Subject)", data, weights="w", offset="o")
    draws = m.simulate(NSIM, seed=1, use_u=True)
    assert errors(draws, m.linear_predictor, m.sigma / np.sqrt(data["w"])) < 5.0
    assert_close(draws.std(axis=1), m.sigma / np.sqrt(data["w"]), rtol=0.06)


# -------------------- what comes back, and what refit takes
def test_a_seed_is_a_draw() -> None:
    m = cbpp_fit()
    first = m.simulate(3, seed=1)
    assert list(first.columns) == ["sim_1", "sim_2", "sim_3"] and first.index.equals(m.fitted.index)
    assert (first.dtypes == np.int64).all() and (first.max(axis=1) <= load_data("cbpp")["size"]).all()
    pd.testing.assert_frame_equal(first, m.simulate(3, seed=1))
    pd.testing.assert_frame_equal(first, m.simulate(3, seed=1, re_form="NA"))
    assert not first.equals(m.simulate(3, seed=2))
    generator = np.random.default_rng(1)
    pd.testing.assert_frame_equal(first, m.simulate(3, seed=generator))
    assert not first.equals(m.simulate(3, seed=generator))


def test_refit_takes_successes_proportions_and_pairs() -> None:
    m, size = cbpp_fit(), load_data("cbpp")["size"]
    new = m.simulate(1, seed=8).iloc[:, 0]
    fits = [m.refit(new), m.refit(new / size), m.refit(np.stack([new, size - new], axis=1)), m.refit(list(new))]
    fits.append(m.refit(pd.DataFrame({"s": new, "f": size - new})))
    for again in fits:
        assert_close(again.getME("y"), new / size, rtol=1e-15)
        assert again.objective == pytest.approx(fits[0].objective, abs=1e-9)
    for words, bad in {
        "16 successes in 14 trials": new.where(new.index != new.index[0], 16),
        "do not add up": np.stack([new, size], axis=1),
        r"outside \[0, 1\]": new + 0.5,
        "5 values": new.iloc[:5],
    }.items():
        with pytest.raises(gj.DataError, match=words):
            m.refit(bad)


def test_labels_of_a_factor_response() -> None:
    data = load_data("cbpp").assign(ill=lambda d: np.where(d["incidence"] > 1, "yes", "no"))
    m = gj.glmer("ill ~ size + (1 | herd)", data, control={"check_singular": "ignore"})
    numbers, names = m.simulate(2, seed=5), m.simulate(2, seed=5, labels=True)
    assert set(np.unique(numbers)) == {0, 1} and list(names["sim_1"].cat.categories) == ["no", "yes"]
    assert (names == "yes").equals(numbers == 1)
    fits = [m.refit(numbers["sim_1"]), m.refit(names["sim_1"]), m.refit(names["sim_1"].astype(str).to_numpy())]
    assert len({f.objective for f in fits}) == 1
    with pytest.raises(gj.DataError, match="value 'maybe'.*'no', 'yes'"):
        m.refit(np.full(56, "maybe"))
    with pytest.raises(ValueError, match="labels=True is for a response that was a factor"):
        cbpp_fit().simulate(labels=True)


def test_rows_that_were_dropped_stay_out() -> None:
    data = load_data("cbpp")
    data.loc[[3, 9], "incidence"] = np.nan
    m = gj.glmer(CBPP, data)
    new = m.simulate(1, seed=2)["sim_1"]
    assert new.index.equals(data.index.delete([3, 9]))
    whole = new.reindex(data.index, fill_value=0)  # one value per row of the data, as integers
    assert m.refit(whole).objective == pytest.approx(m.refit(new).objective, abs=1e-9)


def test_what_cannot_be_drawn() -> None:
    m = cbpp_fit()
    with pytest.raises(ValueError, match="use_u=True conditions on all"):
        m.simulate(use_u=True, re_form="~(1 | herd)")
    with pytest.raises(ValueError, match="nsim must be a positive integer, got 0"):
        m.simulate(0)
    with pytest.raises(ValueError, match="names some columns of the term"):
        sleep_fit().simulate(re_form="~(1 | Subject)")
    counts = pd.DataFrame({"g": np.arange(6) // 2, "w": 2.0})
    params = {"beta": [0.1], "theta": [0.5]}
    with pytest.raises(NotSupportedError, match="prior weights multiply the log density"):
        gj.simulate("~ 1 + (1 | g)", counts, params, "poisson", weights="w")
    with pytest.raises(NotSupportedError, match="not whole"):
        gj.simulate("~ 1 + (1 | g)", counts.assign(w=1.5), params, "binomial", weights="w")
    with pytest.raises(gj.DataError, match="identity link gives a mean of -.*outside the range of the poisson"):
        gj.simulate("~ 1 + (1 | g)", counts, {"beta": [-5.0], "theta": [0.5]}, "poisson(identity)")
    bare = gj.families.Custom(lambda y, eta, aux: -((y - eta) ** 2))
    with pytest.raises(NotSupportedError, match="give the family sampler=f"):
        gj.simulate("~ 1 + (1 | g)", counts, params, bare)


# -------------------- without a fit
def grid(n: int = 60) -> pd.DataFrame:
    return pd.DataFrame(
        {"x": np.linspace(-1.0, 1.0, n), "f": np.array(["u", "v"])[np.arange(n) % 2], "g": np.arange(n) // 6}
    )


def test_counts_have_the_moments_of_their_family() -> None:
    """Given a lognormal mean with variance v of the logarithm: E y = exp(eta + v/2), Var y by total variance."""
    params = {"beta": [0.5, 0.8], "theta": [0.4]}
    mean = np.exp(0.5 + 0.8 * grid()["x"].to_numpy() + 0.08)
    second = mean**2 * np.exp(0.16)  # E mu^2
    for family, extra in (("poisson", 0.0), ("negative.binomial(3)", 1.0 / 3.0)):
        draws = gj.simulate("y ~ x + (1 | g)", grid(), params, family, nsim=NSIM, seed=6)
        variance = mean + (1.0 + extra) * second - mean**2
        assert errors(draws, mean, np.sqrt(variance)) < 5.0
        assert_close(draws.var(axis=1), variance, rtol=0.25, what=family)
        assert (draws.dtypes == np.int64).all()


def test_vector_effects_and_named_parameters() -> None:
    theta = {"g.(Intercept)": 1.5, "g.x.(Intercept)": -0.5, "g.x": 0.7}
    beta = pd.Series({"fv": -1.0, "x": 2.0, "(Intercept)": 3.0})
    arguments = {"family": "gaussian", "nsim": NSIM, "seed": 2}
    draws = gj.simulate("~ x + f + (x | g)", grid(), {"beta": beta, "theta": theta, "sigma": 2.0}, **arguments)
    by_place = {"beta": [3.0, 2.0, -1.0], "theta": [1.5, -0.5, 0.7], "sigma": 2.0}
    pd.testing.assert_frame_equal(draws, gj.simulate("y ~ x + f + (x | g)", grid(), by_place, **arguments))
    T = np.array([[1.5, 0.0], [-0.5, 0.7]])
    z = np.stack([np.ones(60), grid()["x"]], axis=1)
    sd = 2.0 * np.sqrt(1.0 + ((z @ T) ** 2).sum(1))
    mean = 3.0 + 2.0 * grid()["x"] - 1.0 * (grid()["f"] == "v")
    assert errors(draws, mean, sd) < 5.0
    assert_close(draws.std(axis=1), sd, rtol=0.06)


def test_trials_of_a_response_that_is_not_there() -> None:
    m, data = cbpp_fit(), load_data("cbpp")
    params = {"beta": m.fixef, "theta": m.theta}
    ours = m.simulate(3, seed=9)
    bare = data.drop(columns="incidence")
    pd.testing.assert_frame_equal(ours, gj.simulate(CBPP, bare, params, "binomial", nsim=3, seed=9, weights="size"))
    pd.testing.assert_frame_equal(ours, gj.simulate(CBPP, data, params, "binomial", nsim=3, seed=9))
    with pytest.raises(gj.DataError, match=r"columns of cbind\(\) are not in newdata: give the numbers of trials"):
        gj.simulate(CBPP, bare, params, "binomial")
    assert set(np.unique(gj.simulate("y ~ period + (1 | herd)", data, params, "binomial", nsim=5))) == {0, 1}


def test_parameters_are_checked_by_name_and_size() -> None:
    good = {"beta": [0.0, 1.0, 2.0], "theta": [1.0, 0.0, 1.0]}
    cases: dict[str, tuple[type[Exception], Mapping[str, Any]]] = {
        r"params\['beta'\] has 1 value, the model needs 3 values: \(Intercept\), x, fv": (ValueError, {"beta": 1.0}),
        r"needs 3 values: g.\(Intercept\), g.x.\(Intercept\), g.x": (ValueError, {"theta": [1.0]}),
        r"names x, y; the model needs \(Intercept\), x, fv": (ValueError, {"beta": {"x": 1.0, "y": 2.0}}),
        "must be finite and positive": (ValueError, {"sigma": 0.0}),
        "must be finite": (ValueError, {"theta": [np.nan, 0.0, 1.0]}),
        "no argument 'tehta'; did you mean 'theta'|'tehta'": (TypeError, {"tehta": [1.0]}),
    }
    for words, (kind, changed) in cases.items():
        with pytest.raises(kind, match=words):
            gj.simulate("y ~ x + f + (x | g)", grid(), {**good, **changed})
    with pytest.raises(ValueError, match="params has no 'theta': the model needs 3 values: g"):
        gj.simulate("y ~ x + f + (x | g)", grid(), {"beta": good["beta"]})
    with pytest.raises(TypeError, match="params must be a dict with beta, theta, sigma"):
        gj.simulate("y ~ x + f + (x | g)", grid(), [1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="'sigma'"):
        gj.simulate("y ~ x + f + (x | g)", grid(), {**good, "sigma": 1.0}, "poisson")
    with pytest.raises(gj.DataError, match="'x'"):
        gj.simulate("y ~ x + f + (x | g)", grid().drop(columns="x"), good)
    with pytest.raises(gj.DataError, match="missing values in 'x'"):
        gj.simulate("y ~ x + f + (x | g)", grid().assign(x=np.nan), good)


def test_a_custom_family_brings_its_sampler() -> None:
    def logpdf(y: Any, eta: Any, aux: Mapping[str, Any]) -> Any:
        shape = aux["shape"]
        return shape * (jnp.log(shape * y) - eta) - shape * y * jnp.exp(-eta) - jnp.log(y) - jnp.asarray(0.0)

    def sampler(rng: np.random.Generator, eta: np.ndarray, aux: Mapping[str, Any]) -> np.ndarray:
        assert aux["weights"].shape == (eta.shape[0], 1)
        return rng.gamma(aux["shape"], np.exp(eta) / aux["shape"])

    family = gj.families.Custom(logpdf, "log", {"shape": 1.0}, sampler)
    params = {"beta": [0.5, 0.8], "theta": [0.4], "phi": {"shape": 5.0}}
    draws = gj.simulate("y ~ x + (1 | g)", grid(), params, family, nsim=NSIM, seed=3)
    mean = np.exp(0.5 + 0.8 * grid()["x"].to_numpy() + 0.08)
    sd = mean * np.sqrt(1.2 * np.exp(0.16) - 1.0)
    assert errors(draws, mean, sd) < 5.0
    with pytest.raises(ValueError, match="params has no 'phi': the model needs 1 value: shape"):
        gj.simulate("y ~ x + (1 | g)", grid(), {"beta": [0.5, 0.8], "theta": [0.4]}, family)
    narrow = gj.families.Custom(logpdf, "log", {"shape": 1.0}, lambda rng, eta, aux: eta[:, 0])
    with pytest.raises(ValueError, match=r"sampler returned shape \(60,\) for linear predictors of shape \(60, 1\)"):
        gj.simulate("y ~ x + (1 | g)", grid(), params, narrow)


def test_parameter_template() -> None:
    data = load_data("sleepstudy")
    template = gj.parameter_template("Reaction ~ Days + (Days | Subject)", data)
    assert {k: list(v.index) for k, v in template.items()} == {
        "beta": ["(Intercept)", "Days"],
        "theta": ["Subject.(Intercept)", "Subject.Days.(Intercept)", "Subject.Days"],
        "sigma": ["sigma"],
    }
    assert template["theta"].tolist() == [1.0, 0.0, 1.0]
    template["beta"]["Days"] = 5.0
    drawn = gj.simulate("~ Days + (Days | Subject)", data, template, seed=1)
    assert drawn.shape == (180, 1)
