"""Tests and power by simulation: bootstrapped likelihood ratios, and how often an effect is found.

Sources: Halekoh & Højsgaard 2014, J. Stat. Softw. 59(9) (bootstrap likelihood ratio); Green & MacLeod 2016, Methods
Ecol. Evol. 7 (power by simulation); Wilson 1927, J. Am. Stat. Assoc. 22 (intervals of proportions).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import a_test, checked, mapping
from ..compiling.entry import entry
from ..fit import optimise as opt
from ..report.progress import progress
from ..report.table import Block, Shown
from .bootstrap import draw_responses, refitted

if TYPE_CHECKING:
    from ..results import MixedModel


@dataclass(frozen=True, repr=False)
class BootstrapTest(Shown):
    """A likelihood-ratio test by simulation from the smaller model, as returned by `bootstrap_test`.

    Attributes:
        statistic: of the data. df: difference in parameters.
        p_value: (1 + number of replicates at least as large) / (1 + replicates). chisq_p_value: of chi-square(df).
        replicates: their statistics. failed: how many fits did not converge and are left out.
    """

    statistic: float
    df: int
    p_value: float
    chisq_p_value: float
    replicates: np.ndarray
    failed: int

    def _report(self, page: bool) -> Sequence[Block]:
        return [
            f"Likelihood-ratio test by parametric bootstrap, {self.replicates.size} replicates",
            f"LRT = {self.statistic:.4f}, p = {self.p_value:.4g} "
            f"(chi-square on {self.df} Df: {self.chisq_p_value:.4g})",
            *([f"{self.failed} replicates did not converge and are left out"] if self.failed else []),
        ]


@checked()
@entry
def bootstrap_test(smaller: MixedModel, larger: MixedModel, nsim: int = 1000, seed: Any = 0) -> BootstrapTest:
    """Test a model against a larger one by responses simulated from the smaller.

    Args:
        smaller, larger: fits to the same rows; REML fits with different fixed effects are refitted by ML.
        nsim: replicates. seed: of NumPy's generator.

    Raises:
        ValueError: the models do not compare (see `anova`), or the larger has no more parameters.
    """
    from scipy.stats import chi2

    from .anova import check_comparable

    smaller, larger = smaller.refit_ml(), larger.refit_ml()
    check_comparable([smaller, larger])
    df = larger.df - smaller.df
    if df < 1:
        raise ValueError("the second model must have more parameters than the first")
    if isinstance(nsim, bool) or not isinstance(nsim, (int, np.integer)) or nsim < 1:
        raise ValueError(f"nsim must be a positive integer, got {nsim!r}")
    observed = smaller.objective - larger.objective
    found, failed = [], 0
    for y in progress(draw_responses(smaller, int(nsim), seed, "parametric"), "bootstrap test"):
        fits = [_deviance(m, y) for m in (smaller, larger)]
        if None in fits:
            failed += 1
            continue
        found.append(fits[0] - fits[1])  # type: ignore[operator]
    replicates = np.array(found)
    p = (1.0 + np.count_nonzero(replicates >= observed - 1e-9)) / (1.0 + replicates.size)
    return BootstrapTest(float(observed), df, float(p), float(chi2.sf(max(observed, 0.0), df)), replicates, failed)


def _deviance(model: MixedModel, y: np.ndarray) -> float | None:
    """The lowest deviance at another response; None where the search failed."""
    problem = model._problem.with_rows("y", y)
    start = {"theta": model._estimates.theta, "phi": model._estimates.phi}
    if not model.is_linear:
        start["beta"] = model._estimates.beta
    control = model._spec.control
    found = problem.run(problem.start(start), opt.Limits(control.tol, control.max_evaluations, False), "own")
    return found.f if found.status == opt.CONVERGED else None


@dataclass(frozen=True, repr=False)
class Power(Shown):
    """How often a test rejects, as returned by `power`: `estimate` with Wilson's interval, `p_values`, `failed`."""

    estimate: float
    conf_low: float
    conf_high: float
    alpha: float
    p_values: np.ndarray
    failed: int

    def to_frame(self) -> pd.DataFrame:
        row = {"power": self.estimate, "conf_low": self.conf_low, "conf_high": self.conf_high, "alpha": self.alpha}
        return pd.DataFrame([{**row, "nsim": self.p_values.size, "failed": self.failed}])

    def _report(self, page: bool) -> Sequence[Block]:
        text = (
            f"Power {100 * self.estimate:.1f} % ({100 * self.conf_low:.1f} to {100 * self.conf_high:.1f} %) at "
            f"alpha = {self.alpha:g}, {self.p_values.size} simulated data sets"
        )
        return [text + (f", {self.failed} of them without a test" if self.failed else "")]


@checked(test=a_test, beta=mapping)
def power(
    model: MixedModel,
    test: str | Callable[[MixedModel], float],
    nsim: int = 1000,
    seed: Any = 0,
    alpha: float = 0.05,
    beta: Any = None,
) -> Power:
    """Power of a test by simulation from a model.

    Args:
        model: what to simulate from, and to fit to each response.
        test: a fixed effect, for its Wald test, or a function of a fitted model that returns a p-value.
        nsim: data sets. seed: of NumPy's generator. alpha: of the test.
        beta: fixed effects to simulate with instead of the estimates: dict name -> value of those that differ.

    Returns:
        `Power`; a fit without convergence or with a NaN p-value counts as not rejected.
    """
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha must be between 0 and 1, got {alpha!r}")
    if isinstance(test, str) and test not in model.fixef.index:
        raise ValueError(f"test {test!r} is not a fixed effect; these are: {', '.join(model.fixef.index)}")

    def p_value(m: MixedModel) -> float:
        return float(m.pvalues[test]) if isinstance(test, str) else float(test(m))

    found, failed = [], 0
    drawn = _with_beta(model, beta)
    for y in progress(draw_responses(drawn, int(nsim), seed, "parametric"), "power"):
        m = refitted(model, y)
        p = p_value(m) if m is not None and m.converged else np.nan
        failed += bool(np.isnan(p))
        found.append(p)
    values = np.array(found)
    hits, n = int(np.count_nonzero(values < alpha)), values.size
    z = NormalDist().inv_cdf(0.975)
    middle = (hits + 0.5 * z**2) / (n + z**2)
    half = z / (n + z**2) * np.sqrt(hits * (n - hits) / n + 0.25 * z**2)
    return Power(hits / n, max(middle - half, 0.0), min(middle + half, 1.0), alpha, values, failed)


def _with_beta(model: MixedModel, beta: Any) -> MixedModel:
    """The model with other fixed effects, for simulation only."""
    if beta is None:
        return model
    values = model.fixef
    for name, value in dict(beta).items():
        if name not in values.index:
            raise ValueError(f"beta names {name!r}, which is not a fixed effect: {', '.join(values.index)}")
        values[name] = float(value)
    estimates = replace(model._estimates, beta=values.to_numpy())
    return type(model)(model._spec, model._data, model._problem, estimates)
