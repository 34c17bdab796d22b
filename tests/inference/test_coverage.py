"""Coverage of intervals: those of a slope, on a small binary design, and those of predictions."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest

import glmmjax as gj

REPLICATES = 200


@pytest.mark.slow
def test_coverage() -> None:
    """95 % intervals of a slope, 40 groups of 6 binary rows: the coverage of 200 data sets is known within 1.5 %.

    Asked for is 95 % within four of these, and within what 99 bootstrap draws leave of a percentile.
    """
    rng = np.random.default_rng(11)
    g = np.repeat(np.arange(40), 6)
    frame = pd.DataFrame({"g": g.astype(str), "x": rng.normal(size=240)})
    truth = {"beta": [-0.3, 0.8], "theta": [0.7]}
    responses = gj.simulate("y ~ x + (1 | g)", frame, truth, family="binomial", nsim=REPLICATES, seed=12)
    model = gj.glmer("y ~ x + (1 | g)", frame.assign(y=responses.iloc[:, 0].to_numpy()))
    hits = {"wald": 0, "profile": 0, "boot": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)  # some data sets show no variance
        for name in responses:
            m = model.refit(responses[name])
            ends = {
                "wald": m.confint().loc["x"],
                "profile": m.profile("x", limit=2.0).confint().loc["x"],
                "boot": m.confint("boot", nsim=99, seed=13).loc["x"],
            }
            for method, (low, high) in ends.items():
                hits[method] += bool(low <= truth["beta"][1] <= high)
    coverage = {method: count / REPLICATES for method, count in hits.items()}
    assert all(0.89 <= c <= 0.99 for c in coverage.values()), coverage


@pytest.mark.slow
@pytest.mark.parametrize(("family", "replicates"), [("gaussian", 2000), ("binomial", 1000)])
def test_coverage_of_predictions(family: str, replicates: int) -> None:
    """95 % intervals at a new row of each group: of the linear predictor, and of a new observation of a linear model.

    Random effects, beta and theta are all drawn or estimated again in each data set. A data set's share of covered
    groups gives the simulation error: 0.1 % for 2,000 gaussian ones, 0.15 % for 1,000 binomial ones. Asked for is 93 to
    97 %, within three of these: what is left is of the order of one over the number of groups (Prasad & Rao 1990).
    """
    rng = np.random.default_rng(21)
    groups, size = (30, 8) if family == "gaussian" else (40, 6)
    g, x = np.repeat(np.arange(groups), size), np.tile(np.linspace(-1.0, 1.0, size), groups)
    frame = pd.DataFrame({"g": g.astype(str), "x": x, "n": 5})
    new = pd.DataFrame({"g": np.arange(groups).astype(str), "x": 0.5})
    beta, T = np.array([0.5, -1.0]), np.array([[1.0, 0.0], [0.3, 0.6]])
    if family == "binomial":  # five trials a row, a random intercept
        T = np.diag([1.0, 0.0])
    model, covered, observed = None, [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gj.ConvergenceWarning)  # some data sets have a correlation of 1
        for _ in range(replicates):
            effects = beta + rng.normal(size=(groups, 2)) @ T.T
            eta, truth = effects[g, 0] + effects[g, 1] * x, effects[:, 0] + 0.5 * effects[:, 1]
            if family == "gaussian":
                y = eta + rng.normal(size=g.size)
            else:
                y = rng.binomial(5, 1.0 / (1.0 + np.exp(-eta))) / 5.0
            if model is None and family == "gaussian":
                model = gj.lmer("y ~ x + (x | g)", frame.assign(y=y))
            elif model is None:
                model = gj.glmer("y ~ x + (1 | g)", frame.assign(y=y), weights="n")
            m = model.refit(y)
            p = m.predict(new, level=0.95)
            covered.append(((p["lower"] <= truth) & (truth <= p["upper"])).mean())
            if family == "gaussian":  # a new observation: interval="prediction" adds sigma^2, see test_predict
                half = 0.5 * (p["upper"] - p["lower"])
                half = np.hypot(half, half / p["se"] * m.sigma)
                observed.append((np.abs(truth + rng.normal(size=groups) - p["fit"]) <= half).mean())
    for shares in filter(None, (covered, observed)):
        error = np.std(shares) / np.sqrt(replicates)
        assert 0.93 + 3.0 * error < np.mean(shares) < 0.97 - 3.0 * error, (np.mean(shares), error)
