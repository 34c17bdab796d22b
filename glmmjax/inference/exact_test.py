"""Exact likelihood-ratio tests of one variance component of a linear mixed model.

With the tested variance lambda sigma^2, X'WX factored out and w_s, v_s independent standard normal variables, the
restricted likelihood ratio against lambda = 0 is distributed for every sample size as

    sup_{lambda >= 0}  (n - p) log(1 + N(lambda) / D(lambda)) - sum_s log(1 + lambda mu_s),
    N = sum_s lambda mu_s / (1 + lambda mu_s) w_s^2,   D = sum_s w_s^2 / (1 + lambda mu_s) + sum_{s > q}^{n-p} v_s^2,

mu_s the eigenvalues of Z'P0Z, where P0 projects X out; the likelihood ratio has n in place of n - p and the eigenvalues
of Z'Z in the last sum. One draw costs a chi-square variable per different eigenvalue, whatever the number of rows.

Sources: Crainiceanu & Ruppert 2004, J. R. Stat. Soc. B 66, theorem 1; with further components (nuisance)
Greven, Crainiceanu, Kuechenhoff & Peters 2008, J. Comput. Graph. Stat. 17. R: RLRsim (Scheipl, Greven & Kuechenhoff).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import NotSupportedError
from ..report.table import Block, Shown, of_frame
from .anova import check_comparable
from .wald import chisq_tail

if TYPE_CHECKING:
    from ..results import MixedModel

#: Values of log lambda at which a draw is evaluated; a parabola through the best three finds the rest.
GRID = 512
#: Largest dense matrix of which eigenvalues are taken: ten seconds, 0.3 GB.
MAX_DENSE = 4000
#: Numbers held at a time.
CHUNK = 2**22
#: Eigenvalues closer than this part of the largest are one.
SAME = 1e-10


@dataclass(frozen=True, repr=False)
class ExactTest(Shown):
    """A test that one variance is 0, as returned by `exact_test`.

    Attributes:
        kind: "RLRT" (of REML fits) or "LRT". term: the tested one, as in the formula.
        statistic: of the data, deviance units. p_value: (1 + number of draws at least as large) / (1 + draws).
        chibar_p_value: of the asymptotic mixture, half chi-square(0) and half chi-square(1).
        replicates: (nsim,) draws of the statistic without the variance.
    """

    kind: str
    term: str
    statistic: float
    p_value: float
    chibar_p_value: float
    replicates: np.ndarray

    def to_frame(self) -> pd.DataFrame:
        """One row: statistic, p_value, chibar_p_value, nsim; by term."""
        row = {"statistic": self.statistic, "p_value": self.p_value, "chibar_p_value": self.chibar_p_value}
        return pd.DataFrame([{**row, "nsim": self.replicates.size}], index=pd.Index([self.term], name=self.kind))

    def _report(self, page: bool) -> Sequence[Block]:
        if page:
            return [of_frame(self.to_frame())]
        return [
            f"Exact {self.kind} of no variance of {self.term}, {self.replicates.size} draws",
            f"{self.kind} = {self.statistic:.4f}, p = {self.p_value:.4g} "
            f"(half chi-square(0), half chi-square(1): {self.chibar_p_value:.4g})",
        ]


@checked()
def exact_test(
    model: MixedModel,
    alternative: MixedModel | None = None,
    null: MixedModel | None = None,
    nsim: int = 10_000,
    seed: int | np.random.Generator = 0,
) -> ExactTest:
    """Test that a variance is 0, by the exact distribution of the (restricted) likelihood ratio.

    Args:
        model: from `lmer`, with the tested term alone, a scalar one such as ``(1 | g)`` or ``(0 + x | g)``. Without the
            other two arguments it is tested against the linear model with the same fixed effects.
        alternative, null: for a model with further terms, that model and the one without the tested term. The
            statistic is theirs, its distribution that of `model`: an approximation if the other terms' random effects
            are independent of the tested ones (Greven et al. 2008).
        nsim: draws of the null distribution. seed: of NumPy's generator.

    Returns:
        `ExactTest`; REML fits have the restricted likelihood ratio, ML fits the likelihood ratio. The distribution
        does not depend on beta, sigma or the offset. The asymptotic p-value beside it is too large in small samples.

    Raises:
        NotSupportedError: a generalised model, a term with several random effects per level, or so many levels with
            different eigenvalues that they cannot be computed.
        ValueError: models that do not belong together.
    """
    if isinstance(nsim, bool) or not isinstance(nsim, (int, np.integer)) or nsim < 1:
        raise ValueError(f"nsim must be a positive integer, got {nsim!r}")
    _check_model(model)
    if (alternative is None) != (null is None):
        raise ValueError(
            "alternative and null belong together: the model with all terms, and that without the tested one"
        )
    space = _spectra(model)
    if alternative is None or null is None:
        statistic = _linear_objective(model) - model.objective
    else:
        _check_models(model, alternative, null)
        statistic = null.objective - alternative.objective
    statistic = max(0.0, float(statistic))
    draws = _draw(space, model.REML, int(nsim), np.random.default_rng(seed))
    p = (1.0 + np.count_nonzero(draws >= statistic - 1e-9)) / (1.0 + draws.size)
    chibar = 0.5 * chisq_tail(statistic, 1) if statistic > 0.0 else 1.0
    term = model._data.formula_bars[0]
    return ExactTest("RLRT" if model.REML else "LRT", term, statistic, float(p), float(chibar), draws)


# -------------------- what is tested
def _check_model(model: MixedModel) -> None:
    if not model.is_linear:
        raise NotSupportedError(
            "exact_test is for linear mixed models: likelihood ratios of generalised ones have no such distribution; "
            "use gj.bootstrap_test against a model without the term"
        )
    bars, terms = model._data.formula_bars, model._design.terms
    if len(terms) > 1:
        raise ValueError(
            f"the model has {len(terms)} random-effects terms, {', '.join(bars)}: give exact_test the model with the "
            "tested term alone, and the models with and without it as alternative= and null="
        )
    if terms[0].structure.k > 1:
        raise NotSupportedError(
            f"exact_test is for one variance: the term {bars[0]} has {terms[0].structure.k} random effects per level; "
            "fit it with || and test one of its parts, or use gj.bootstrap_test"
        )


def _check_models(model: MixedModel, alternative: MixedModel, null: MixedModel) -> None:
    for label, other in (("alternative", alternative), ("null", null)):
        if not other.is_linear or other.REML != model.REML:
            how = "REML" if model.REML else "maximum likelihood"
            raise ValueError(f"{label} must be a linear model fitted by {how}, as the model of the tested term is")
        check_comparable([model, other])
        for what in ("X", "weights", "offset"):
            if not np.array_equal(np.asarray(getattr(model._design, what)), np.asarray(getattr(other._design, what))):
                kind = "fixed effects" if what == "X" else what
                raise ValueError(f"{label} and the model of the tested term differ in their {kind}")
    tested, rest, every = (sorted((t.group, t.names) for t in m._data.terms) for m in (model, null, alternative))
    if sorted(tested + rest) != every:
        raise ValueError(
            f"alternative ({alternative.formula}) must have the terms of null ({null.formula}) and "
            f"{model._data.formula_bars[0]}, and no others"
        )


def _linear_objective(model: MixedModel) -> float:
    """The criterion of the linear model with the same fixed effects: profiled deviance, or that of REML."""
    y, X, _, _, log_weights = _rows(model)
    n, p = X.shape
    Q, R = np.linalg.qr(X)
    rest = y - Q @ (Q.T @ y)
    rest -= Q @ (Q.T @ rest)
    size = n - p if model.REML else n
    value = size * (1.0 + np.log(2.0 * np.pi * (rest @ rest) / size)) - log_weights
    return float(value + (2.0 * np.log(np.abs(np.diag(R))).sum() if model.REML else 0.0))


def _rows(model: MixedModel) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]:
    """y less the offset (n,), X (n, p), z (n,), all times the roots of the weights; level (n,); sum of log weights."""
    d = model._design
    weights = np.asarray(d.weights)
    used = weights > 0.0
    root = np.sqrt(weights[used])
    y = (np.asarray(d.y) - np.asarray(d.offset))[used]
    z = np.asarray(d.z[0])[used, 0]
    X, level = np.asarray(d.X)[used], np.asarray(d.level[0])[used]
    return root * y, root[:, None] * X, root * z, level, 2.0 * float(np.log(root).sum())


# -------------------- its distribution
class Spectrum(NamedTuple):
    """Different eigenvalues above 0, and how often each occurs; both (J,)."""

    values: np.ndarray
    counts: np.ndarray


class Spectra(NamedTuple):
    """What the distribution depends on: those of Z'P0Z and of Z'Z, rows and fixed effects."""

    inside: Spectrum
    whole: Spectrum
    n: int
    p: int


def _spectra(model: MixedModel) -> Spectra:
    """See `Spectra`.

    Z'Z is diagonal and Z'P0Z differs from it by a matrix BB' of rank p. Where m levels have the same diagonal entry d,
    all directions among them but p are eigenvectors with value d, so that what is dense has min(m, p) rows for each.
    """
    _, X, z, level, _ = _rows(model)
    n, p = X.shape
    q = model._design.n_levels[0]
    Q = np.linalg.qr(X)[0]
    d = np.bincount(level, z**2, q)
    B = np.stack([np.bincount(level, z * column, q) for column in Q.T], axis=1) if p else np.zeros((q, 0))
    order = np.argsort(d)
    groups = np.split(order, np.flatnonzero(np.diff(d[order]) > SAME * d.max()) + 1)
    size = sum(min(g.size, p) for g in groups)
    if size > MAX_DENSE:
        raise NotSupportedError(
            f"{model._data.terms[0].group!r} has {len(groups)} levels with different sums of squares of "
            f"{model._data.terms[0].names[0]}, whose eigenvalues need a dense matrix of {size} rows (at most "
            f"{MAX_DENSE}); with so many levels the asymptotic mixture, half of chi-square(1)'s p-value, is close"
        )
    values, counts, rows = [], [], []
    for g in groups:
        own = B[g]
        if g.size > p:
            own = np.linalg.qr(own)[1]
            values.append(d[g].mean())
            counts.append(g.size - p)
        rows.append(np.column_stack([np.full(own.shape[0], d[g].mean()), own]))
    dense = np.concatenate(rows)
    matrix = -dense[:, 1:] @ dense[:, 1:].T
    matrix[np.diag_indices(size)] += dense[:, 0]
    eigenvalues = np.linalg.eigvalsh(matrix)
    inside = _distinct(np.concatenate([values, eigenvalues]), np.concatenate([counts, np.ones(size)]))
    return Spectra(inside, _distinct(d, np.ones(q)), n, p)


def _distinct(values: np.ndarray, counts: np.ndarray) -> Spectrum:
    order = np.argsort(values)
    values, counts = values[order], counts[order]
    zero = SAME * values[-1]
    parts = np.split(np.arange(values.size), np.flatnonzero(np.diff(values) > zero) + 1)
    kept = [part for part in parts if values[part[-1]] > zero]
    return Spectrum(np.array([values[k].mean() for k in kept]), np.array([counts[k].sum() for k in kept]))


def _draw(space: Spectra, reml: bool, nsim: int, rng: np.random.Generator) -> np.ndarray:
    """(nsim,) draws of the statistic where the variance is 0."""
    (mu, counts), whole = space.inside, space.inside if reml else space.whole
    if not mu.size:  # the term lies in the span of X
        return np.zeros(nsim)
    rest = space.n - space.p - counts.sum()
    size = space.n - space.p if reml else space.n
    # lambda in units of the largest eigenvalue, until it is large for the smallest
    top = min(1e5 * mu[-1] / mu[0], 1e12)
    lam = np.geomspace(1e-5, top, GRID) / mu[-1]
    shrink = 1.0 / (1.0 + np.outer(mu, lam))
    penalty = whole.counts @ np.log1p(np.outer(whole.values, lam))
    out, step = np.zeros(nsim), max(1, CHUNK // max(mu.size, GRID))
    for start in range(0, nsim, step):
        some = min(step, nsim - start)
        w2 = rng.chisquare(counts, (some, mu.size))
        v2 = rng.chisquare(rest, some) if rest > 0 else np.zeros(some)
        total = w2.sum(1) + v2
        value = size * np.log(total[:, None] / (w2 @ shrink + v2[:, None])) - penalty
        best = np.clip(value.argmax(1), 1, GRID - 2)
        left, middle, right = (np.take_along_axis(value, (best + i)[:, None], 1)[:, 0] for i in (-1, 0, 1))
        bend = left - 2.0 * middle + right
        peak = (bend < 0.0) & (middle >= np.maximum(left, right))
        above = np.where(peak, (right - left) ** 2 / np.where(peak, -8.0 * bend, 1.0), 0.0)
        out[start : start + some] = np.maximum(value.max(1), middle + above)
    return np.maximum(out, 0.0)
