"""Influence of rows and groups on the estimates, derivatives of the estimates in the data, and robust covariances.

All rest on the implicit function theorem at the estimates x^: with D(x; a) the deviance as a function of parameters and
data a, dx^/da = -H^-1 d2D/dx da. To first order a row is deleted by moving its weight from 1 to 0 (the infinitesimal
jackknife). A group takes its random effects with it, of which a weight of its rows knows nothing: it is deleted by one
step -H^-1 grad D_(-g), D_(-g) the deviance without its rows. Exactly, either is a refit with weights of 0: few by the
fit's own program, many together (`many.refits`).

Sources: Cook 1977, Technometrics 19; Jaeckel 1972 (infinitesimal jackknife); White 1982, Econometrica 50 (sandwich).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import DataError, NotSupportedError
from ..compiling.entry import entry
from ..fit import optimise as opt
from ..fit.problem import searched
from ..formula.columns import Table
from ..many.refits import BATCH_FROM, LEAST_INFORMATION, fit_rows, information_by_cluster
from ..model.parameters import Layout
from ..report.progress import progress
from ..report.pyplot import given_axes, pyplot
from ..report.table import Block, Shown, of_frame
from .bootstrap import natural_parameters
from .likelihood import Likelihood

if TYPE_CHECKING:
    from ..results import MixedModel


class Sensitivity:
    """Derivatives of a model's estimates; kept with the model, as several answers share them."""

    def __init__(self, model: MixedModel, reml: bool = False) -> None:

        if not model.is_linear and model.nAGQ == 0:
            raise NotSupportedError("nAGQ = 0 maximises no likelihood in (theta, beta); fit with nAGQ = 1")
        self.likelihood = Likelihood(model, reml)
        self.names = self.likelihood.names
        H = self.likelihood.hessian(self.likelihood.x[None])[0]
        separation, root = model._estimates.separation, self.likelihood.root
        if separation is not None:  # along what runs off nothing moves
            kept = np.linalg.qr(np.linalg.solve(root, separation.kept_of(self.likelihood.layout)))[0]
            root, H = root @ kept, kept.T @ H @ kept
        scale = 1.0 / np.sqrt(np.maximum(np.abs(np.diag(H)), 1e-12))
        values, vectors = np.linalg.eigh(H * np.outer(scale, scale))
        keep = values > 1e-8  # a direction that the data do not determine does not move
        #: (P, r) with half half' the inverse Hessian
        self.half = root @ (scale[:, None] * vectors[:, keep]) / np.sqrt(values[keep])
        self._mixed: dict[str, np.ndarray] = {}

    def mixed(self, what: str) -> np.ndarray:
        """(P, n) second derivatives of the deviance."""
        if what not in self._mixed:
            self._mixed[what] = self.likelihood.mixed(what)
        return self._mixed[what]

    def scores(self) -> np.ndarray:
        """(P, n) derivatives of the gradient in the number of times that each row is there."""
        out = np.asarray(self.likelihood.model._design.weights) * self.mixed("weights")
        out[self.likelihood.layout.at.log_sigma] += 2.0  # precision weights leave out the row's own log sigma^2
        return np.asarray(out)

    def cluster_scores(self, codes: np.ndarray, m: int) -> np.ndarray:
        """(P, m) gradients of each cluster's part of the deviance, where no random effect crosses clusters."""
        likelihood = self.likelihood
        whole = likelihood(likelihood.x[None])[1]
        return np.asarray((whole - likelihood.without(codes, m)).T)

    def derivative(self, what: str) -> np.ndarray:
        """(P, n) derivatives of the estimates."""
        return -self.moves(self.mixed(what))

    def moves(self, gradients: np.ndarray) -> np.ndarray:
        """H^-1 times gradients (P, m)."""
        return np.asarray(self.half @ (self.half.T @ gradients))


def sensitivity(model: MixedModel, what: str = "weights") -> pd.DataFrame:
    """Derivatives of the estimates in the data, rows x parameters (theta, beta, log dispersion or log sigma).

    Args:
        what: "weights" (the family's weights: trials, or prior weights), "y" or "offset".

    By the implicit function theorem at the estimates; of a REML fit those of its ML fit.
    """
    if what not in ("weights", "y", "offset"):
        raise ValueError(f"estimates have derivatives in 'weights', 'y' or 'offset', not {what!r}")
    model = model.refit_ml()
    made = model._sensitivity
    return pd.DataFrame(made.derivative(what).T, index=model._data.row_index, columns=made.names)


def _clusters(model: MixedModel, groups: str | None) -> tuple[np.ndarray, list[Any]]:
    """Cluster of each row and the clusters' labels; without a name each row is one."""
    if groups is None:
        return np.arange(model.nobs), list(model._data.row_index)
    for term in model._data.terms:
        if term.group == groups:
            return np.asarray(term.level), list(term.levels)
    table = Table(model._spec.arguments["data"])
    if groups not in table:
        raise DataError(f"{groups!r} is neither a grouping factor ({', '.join(model.ngrps)}) nor a column of the data")
    column = table.raw(groups)
    codes, labels = pd.factorize(pd.Series(getattr(column, "array", column))[model._data.keep])
    if (codes < 0).any():
        raise DataError(f"column {groups!r} has missing values in the rows of the fit; fill them or choose another")
    return np.asarray(codes), list(labels)


@checked()
@dataclass(frozen=True, repr=False)
class Influence(Shown):
    """What deleting each row or group does, as returned by `MixedModel.influence`.

    Attributes:
        groups: what was deleted: a factor, or None for rows. method: "first-order" or "exact".
        change: estimates without minus with, one row per deletion, one column per parameter (theta, fixed effects,
            log dispersion or log sigma); NaN for coefficients that run off (`MixedModel.separated`).
        failed: labels of the deletions whose refit did not converge, or without which some fixed effect is not
            determined (NaN).
    """

    groups: str | None
    method: str
    change: pd.DataFrame
    failed: tuple[Any, ...]
    _covariance: np.ndarray = field(compare=False)
    _layout: Layout = field(compare=False)
    _errors: np.ndarray = field(compare=False)
    #: changes of what is determined of the fixed effects, in units in which their covariance is the identity
    _moves: np.ndarray = field(compare=False)

    @cached_property
    def _beta(self) -> pd.DataFrame:
        return self.change[list(self.change.columns[self._layout.at.beta])]

    def cooks_distance(self, scale: str = "p") -> pd.Series:
        """d'V^-1 d / p for the change d of the fixed effects, V their covariance in the whole fit.

        Args:
            scale: "p", or "lme4" for that package's further factor (n - p) / n, n the number of deletions.
        """
        if scale not in ("p", "lme4"):
            raise ValueError(f"scale must be 'p' or 'lme4', got {scale!r}")
        n, p = self._moves.shape
        distance = np.square(self._moves).sum(axis=1) / p
        if scale == "lme4":
            distance *= (n - p) / n
        return pd.Series(distance, index=self.change.index, name="cooks_distance")

    def dfbeta(self) -> pd.DataFrame:
        """Fixed effects of the whole fit minus those without each row or group (R's sign)."""
        return pd.DataFrame(-self._beta)

    def dfbetas(self) -> pd.DataFrame:
        """`dfbeta` in standard errors of the whole fit (0 for coefficients that run off)."""
        return self.dfbeta().div(self._errors, axis=1)

    def to_frame(self) -> pd.DataFrame:
        """Tidy: one row per deletion, its Cook's distance, and the changes."""
        out = self.change.copy()
        out.insert(0, "cooks_distance", self.cooks_distance())
        return out.rename_axis(self.groups or "row").reset_index()

    def plot(self, what: str = "cooks_distance", label: int = 5, ax: Any = None) -> tuple[Any, pd.DataFrame]:
        """Index plot of Cook's distances or of a parameter's changes, the largest labelled.

        Returns:
            Axes, and the data in them.
        """
        if what != "cooks_distance" and what not in self.change:
            known = ", ".join(["cooks_distance", *map(str, self.change.columns)])
            raise ValueError(f"nothing called {what!r} to plot; there are: {known}")
        plt = pyplot()
        values = self.cooks_distance() if what == "cooks_distance" else self.change[what]
        ax = plt.subplots(figsize=(7.0, 3.5), layout="constrained")[1] if ax is None else given_axes(ax, 1)[0]
        at = np.arange(len(values))
        ax.vlines(at, 0.0, values, color="C0", linewidth=1.2)
        ax.plot(at, values, "o", color="C0", markersize=4)
        ax.axhline(0.0, color="0.6", linewidth=0.8)
        for i in np.argsort(-np.abs(values.to_numpy()))[:label]:
            ax.annotate(
                str(values.index[i]), (i, values.iloc[i]), xytext=(3, 3), textcoords="offset points", fontsize="small"
            )
        ax.margins(y=0.12)
        ax.set_xlabel(f"{self.groups or 'row'}, in order")
        ax.set_ylabel("Cook's distance" if what == "cooks_distance" else f"change of {what}")
        ax.set_title(f"Deleting one {self.groups or 'row'} ({self.method})", fontsize="medium")
        return ax, values.rename_axis(self.groups or "row").reset_index()

    def _report(self, page: bool) -> Sequence[Block]:
        if page:
            return [of_frame(self.to_frame().sort_values("cooks_distance", ascending=False).head(10), index=False)]
        cook = self.cooks_distance().sort_values(ascending=False)
        what = f"one {self.groups}" if self.groups else "one row"
        title = f"Influence of deleting {what} ({self.method}; {len(cook)} deletions); largest Cook's distances:"
        left = f"Not converged, or not determined, without: {', '.join(map(str, self.failed))}"
        largest = of_frame(cook.head(6).rename_axis(None))
        return [title, str(cook.index.name), largest, *([left] if self.failed else [])]


def influence(
    model: MixedModel, groups: str | None = None, method: str = "first-order", batched: bool | None = None
) -> Influence:
    """What deleting each level of a grouping factor, or each row, does to the estimates.

    Args:
        groups: a grouping factor, or another column whose levels are deleted one by one; None for rows.
        method: "first-order", from derivatives in the weights (of a REML fit: its ML fit's), or
            "exact", by refits.
        batched: refit many at a time, as in `bootstrap`; None does so from 1,000 deletions on.

    Returns:
        `Influence`: `change`, `cooks_distance()`, `dfbeta()`, `dfbetas()`, `to_frame()`, `plot()`.
    """
    if method not in ("first-order", "exact"):
        raise ValueError(f"method must be 'first-order' or 'exact', got {method!r}")
    codes, labels = _clusters(model, groups)
    covariance = model._fixed_covariance("hessian")
    failed: list[Any] = []
    if method == "first-order":
        made = model.refit_ml()._sensitivity
        names = made.names
        scores = made.scores() if groups is None else made.cluster_scores(codes, len(labels))
        moves = made.moves(scores).T
    else:
        parts = information_by_cluster(np.asarray(model._design.X), codes, len(labels))
        known = 1.0 - np.linalg.eigvalsh(parts).max(axis=1, initial=0.0) > LEAST_INFORMATION
        names, found, converged = _refits(model, codes, np.flatnonzero(known), batched)
        moves, good = np.full((len(labels), len(names)), np.nan), known.copy()
        moves[known], good[known] = found, converged
        failed = [label for label, fine in zip(labels, good, strict=True) if not fine]
    index = pd.Index(labels, name=groups or "row")
    change = pd.DataFrame(moves, index=index, columns=names)
    separation, at = model._estimates.separation, model._layout.at.beta
    own, V = moves[:, at], covariance
    if separation is not None:
        onto = separation.kept.T @ separation.A  # coordinates in its basis
        own, V = own @ onto.T, onto @ V @ onto.T
        change.iloc[:, at.start + np.flatnonzero(separation.columns)] = np.nan
    scale = np.sqrt(np.diag(V))
    half = np.linalg.cholesky(V / np.outer(scale, scale))
    units = np.linalg.solve(half, (own / scale).T).T
    return Influence(groups, method, change, tuple(failed), covariance, model._layout, model._standard_errors, units)


def _parameters(model: MixedModel, theta: np.ndarray, beta: np.ndarray, sigma: float, phi: np.ndarray) -> np.ndarray:
    """(P,), theta in its canonical sign."""
    canonical = theta.copy()
    for term in model._design.terms:
        canonical[term.theta] *= term.structure.flip(theta[term.theta])[0]
    return model._layout.of(canonical, beta, sigma, phi)


@entry
def _refits(
    model: MixedModel, codes: np.ndarray, clusters: np.ndarray, batched: bool | None
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Names of the parameters, their changes (c, P) by refitting without each of the clusters, and which converged."""
    whole = model._estimates
    begin = {"theta": whole.theta, "beta": whole.beta, "phi": whole.phi}
    if model.is_linear:
        begin = {"theta": whole.theta}
    names = model._names_in(model._layout)
    weights = np.asarray(model._design.weights)
    control = model._spec.control
    limits = opt.Limits(control.tol, control.max_evaluations, False)  # nothing asks for standard errors
    base = _parameters(model, whole.theta, whole.beta, whole.sigma, whole.phi)
    m, off = clusters.size, np.isin(model._data.x_names, model.separated)
    each = (np.where(codes == j, 0.0, weights) for j in clusters)
    if m and (m >= BATCH_FROM if batched is None else batched):
        fits = fit_rows(model, "weights", each, m, limits, begin)
        moves = model._layout.of(fits.theta, fits.beta, fits.sigma, fits.phi) - base
        ran = np.isinf(np.diagonal(fits.vcov, axis1=1, axis2=2)) & fits.separated[:, None]
        return names, _known_moves(model, moves), fits.converged & ~(ran & ~off).any(axis=1)
    moves, good = np.full((m, base.size), np.nan), np.zeros(m, bool)
    for j, without in enumerate(progress(each, "refits", m)):
        problem = model._problem.with_rows("weights", without)
        problem, found, separation = searched(problem, begin, limits)
        moves[j] = _parameters(model, *natural_parameters(problem, found)) - base
        good[j] = found.status == opt.CONVERGED
        if separation is not None:
            good[j] &= not (separation.columns & ~off).any()
    return names, _known_moves(model, moves), good


def _known_moves(model: MixedModel, moves: np.ndarray) -> np.ndarray:
    """Changes (c, P) without those of coefficients along directions in which they run off."""
    separation, at = model._estimates.separation, model._layout.at.beta
    if separation is not None:
        moves[:, at] = moves[:, at] @ separation.projection.T
    return moves


def robust_covariance(model: MixedModel, cluster: str | None = None) -> pd.DataFrame:
    """Sandwich covariance of all parameters: H^-1 (sum of s_g s_g') H^-1, s_g the score of a cluster.

    Args:
        cluster: a grouping factor or column whose levels are independent; None for the factor in which all others are
            nested.
    """

    name = _outermost(model) if cluster is None else cluster
    codes, labels = _clusters(model, name)
    for term in model._data.terms:
        pairs = pd.DataFrame({"a": np.asarray(term.level), "b": codes}).drop_duplicates()
        if pairs["a"].duplicated().any():
            raise NotSupportedError(
                f"clusters of {name} are not independent: levels of {term.group} occur in several of them; "
                "a sandwich needs clusters that no random effect crosses"
            )
    made = model.refit_ml()._sensitivity
    scores = made.cluster_scores(codes, len(labels))
    half = made.moves(scores)
    # the deviance is twice the negative log-likelihood: scores and Hessian are both in its units
    V = half @ half.T
    if model.at_limit:
        V[model._layout.at.log_phi, model._layout.at.log_phi] = np.inf  # held where it is
    return pd.DataFrame(V, made.names, made.names)


def _outermost(model: MixedModel) -> str:
    return min(model.ngrps, key=lambda g: model.ngrps[g])
