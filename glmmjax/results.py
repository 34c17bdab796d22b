"""A fitted mixed model: its estimates and what they say of themselves, in NumPy and pandas.

What is asked of it beyond that is written in `inference`, a module to a question, imported when first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas as pd

from . import inference
from ._arguments import checked
from ._errors import NotSupportedError as NotSupportedError
from ._methods import Method
from .compiling.entry import entry
from .families import Family, log_of
from .fit.control import Control
from .fit.glmm import GeneralisedProblem, scale_design
from .fit.lmm import LinearProblem
from .fit.problem import Estimates, FitStats, Problem
from .inference.varcorr import VarCorr as VarCorr
from .inference.varcorr import VarCorrBlock as VarCorrBlock
from .model.covariance import structure_of
from .model.design import Design
from .model.parameters import Layout, Parameters, Scaling
from .objective.laplace import pieces, working_weights
from .objective.pirls import Blocked
from .report.table import Block, Shown

if TYPE_CHECKING:
    from .formula.model_data import ModelData
    from .inference.influence import Sensitivity


_pieces = jax.jit(pieces, static_argnames=("family", "hessian"))


@dataclass(frozen=True)
class Entry:
    """How the function that fitted a model fits again: a model knows this, and not who made it.

    Attributes:
        refit: of (model, response). update: of (model, formula or None, changed arguments).
        fit: of (spec, frame, problem, start or None), for a problem that is there already.
    """

    refit: Callable[[MixedModel, Any], MixedModel]
    update: Callable[[MixedModel, str | None, dict[str, Any]], MixedModel]
    fit: Callable[[ModelSpec, ModelData, Problem, dict[str, np.ndarray] | None], MixedModel]


@dataclass(frozen=True)
class ModelSpec:
    """What was asked for: enough to fit the same model to another response."""

    formula: str
    family: Family
    nAGQ: int
    hessian: str
    control: Control
    weights_label: str | None
    offset_label: str | None
    arguments: dict[str, Any]
    entry: Entry
    #: whether a linear mixed model was fitted by REML; None for a generalised one
    REML: bool | None = None


@checked()
class MixedModel(Shown):
    """A fitted mixed model, as returned by `glmmjax.glmer` and `glmmjax.lmer`.

    Numbers are NumPy or pandas float64; theta and every random-effects table are in lme4's order.
    """

    def __init__(self, spec: ModelSpec, data: ModelData, problem: Problem, estimates: Estimates) -> None:
        self._spec, self._problem, self._estimates = spec, problem, estimates
        self._design: Design = problem.original
        pairs = zip(data.terms, self._design.terms, strict=True)
        if own := {i: d.structure for i, (t, d) in enumerate(pairs) if structure_of(t.label) != d.structure}:
            terms = [replace(t, structure=own[i]) if i in own else t for i, t in enumerate(data.terms)]
            data = replace(data, terms=tuple(terms))
        self._data = data
        self._tables: dict[str, pd.DataFrame] = {}

    # ---- estimates ---------------------------------------------------------------------------------
    @property
    def formula(self) -> str:
        """The model formula."""
        return self._spec.formula

    @property
    def family(self) -> Family:
        """Family object, with its link."""
        return self._spec.family

    @property
    def nAGQ(self) -> int:
        """0: beta found inside PIRLS; 1: Laplace; more: adaptive Gauss-Hermite points per random effect."""
        return self._spec.nAGQ

    @property
    def beta(self) -> np.ndarray:
        """(p,) fixed effects, link scale."""
        return self._estimates.beta.copy()

    @property
    def theta(self) -> np.ndarray:
        """(n_theta,) relative covariance parameters in lme4's order and sign."""
        return self._estimates.theta.copy()

    @property
    def theta_names(self) -> list[str]:
        """lme4's names of theta, such as ``district.urbanY.(Intercept)``."""
        return theta_names(self._design, self._data)

    @property
    def sigma(self) -> float:
        """Residual standard deviation; 1 for families without a free scale."""
        return self._estimates.sigma

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear mixed model (sigma profiled out)."""
        return self._spec.REML is not None

    @property
    def REML(self) -> bool:
        """Whether the REML criterion was minimised."""
        return bool(self._spec.REML)

    @property
    def phi(self) -> pd.Series:
        """Dispersion parameters of the family by name; empty if it has none."""
        return pd.Series(self._estimates.phi.copy(), index=list(self.family.phi_names), dtype=float)

    @property
    def fixef(self) -> pd.Series:
        """Fixed effects, named as R's model.matrix."""
        return pd.Series(self.beta, index=list(self._data.x_names), name="fixef")

    def fixef_all(self) -> pd.Series:
        """Fixed effects with NaN for the aliased columns that were dropped."""
        return self.fixef.reindex(list(self._data.all_x_names))

    @property
    def u(self) -> np.ndarray:
        """(q,) spherical conditional modes, in the order of Z's columns."""
        parts = []
        for term in self._design.terms:
            parts.append(self._estimates.u[term.block][:, term.columns].reshape(-1))
        return np.concatenate(parts)

    @cached_property
    def _T(self) -> list[np.ndarray]:
        """Per term, the relative factor (k, k)."""
        theta = self._estimates.theta
        return [t.structure.host_factor(theta[t.theta]) for t in self._design.terms]

    @cached_property
    def _b(self) -> list[np.ndarray]:
        """Per term, conditional modes (m, k) on the original scale."""
        out = []
        for term, T in zip(self._design.terms, self._T, strict=True):
            out.append(self._estimates.u[term.block][:, term.columns] @ T.T)
        return out

    # ---- fit quality -------------------------------------------------------------------------------
    @property
    def objective(self) -> float:
        """What was minimised: minus twice the log-likelihood, or the REML criterion."""
        return self._estimates.objective

    @property
    def loglik(self) -> float:
        """Log-likelihood with all constants, comparable across nAGQ; minus half the criterion of a REML fit."""
        return -0.5 * self._estimates.objective

    @property
    def df(self) -> int:
        """Number of parameters: theta, beta, dispersions, and sigma of a linear model."""
        return self._layout.size

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._design.n

    @property
    def df_resid(self) -> int:
        """nobs - df."""
        return self.nobs - self.df

    @property
    def aic(self) -> float:
        """-2 loglik + 2 df."""
        return self.objective + 2.0 * self.df

    @property
    def aicc(self) -> float:
        """AIC with the small-sample correction 2 df (df + 1) / (n - df - 1)."""
        return self.aic + 2.0 * self.df * (self.df + 1.0) / (self.nobs - self.df - 1.0)

    @property
    def bic(self) -> float:
        """-2 loglik + log(nobs) df."""
        return self.objective + float(np.log(self.nobs)) * self.df

    @property
    def converged(self) -> bool:
        """Whether the gradient is zero to tolerance at a minimum."""
        return self._estimates.converged

    @property
    def fit_stats(self) -> FitStats:
        """Evaluations, decrement, status and path of the fit."""
        return self._estimates.stats

    @property
    def is_singular(self) -> bool:
        """A diagonal entry of some T below 1e-4 (lme4's isSingular), columns taken in units of their root mean square.

        The terms are judged as they are fitted, so that the answer depends neither on the units of a covariate nor, in
        a term like (x | g), on where it is 0.
        """
        return bool(self.singular_terms)

    @property
    def singular_terms(self) -> list[str]:
        """The terms whose covariance is singular, as written in the formula; of `||` the columns."""
        texts = self._data.shown_terms
        theta = self._problem.scaling.basis.inner(self._estimates.theta)
        pairs = zip(self._design.terms, texts, strict=True)
        singular = [text for t, text in pairs if t.structure.singular(theta[t.theta])]
        return list(dict.fromkeys(singular))

    @property
    def undetermined(self) -> list[str]:
        """Parameters that a flat direction of the deviance moves; empty for an identified model."""
        names = self._names_in(self._problem.layout)
        return [names[i] for i in self._estimates.ridge]

    @property
    def at_limit(self) -> str:
        """The family whose numbers these are where a dispersion is infinite, such as "poisson"; else ""."""
        return self.family.limit if np.isinf(self._estimates.phi).any() else ""

    @property
    def separated(self) -> list[str]:
        """Fixed effects that run off because the response is separated; empty if it is not.

        Their estimates are where their rows have probability 1 but for rounding, their standard errors infinite.
        """
        separation = self._estimates.separation
        if separation is None:
            return []
        return [name for name, off in zip(self._data.x_names, separation.columns, strict=True) if off]

    @property
    def ngrps(self) -> dict[str, int]:
        """Grouping factor -> number of levels."""
        return {labels.group: len(labels.levels) for labels in self._data.terms}

    # ---- per-row quantities ------------------------------------------------------------------------
    @cached_property
    def linear_predictor(self) -> np.ndarray:
        """(n,) eta at the conditional modes."""
        eta = self._design.offset + np.asarray(self._design.X) @ self._estimates.beta
        return np.asarray(eta + self._random_part(range(len(self._b))))

    def _random_part(self, which: Sequence[int]) -> np.ndarray:
        total = np.zeros(self.nobs)
        for i in which:
            labels = self._data.terms[i]
            total += np.einsum("nk,nk->n", labels.z, self._b[i][labels.level])
        return total

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """mu, dmu/deta, variance function and squared deviance residuals per row."""
        return inference.residuals.moments(self)

    @property
    def fitted(self) -> pd.Series:
        """Conditional means at the modes, on the response scale (proportions for the binomial)."""
        return pd.Series(self._moments[0].copy(), index=self._data.row_index, name="fitted")

    residuals = Method(lambda: inference.residuals.residuals)

    @property
    def conditional_deviance(self) -> float:
        """Sum of squared deviance residuals (lme4's deviance() of a glmer fit)."""
        return float(self._moments[3].sum())

    # ---- variances ---------------------------------------------------------------------------------
    @cached_property
    def _device(self) -> tuple[Parameters, Blocked]:
        e = self._estimates
        return Parameters(e.theta, e.beta, e.phi), tuple(e.u)

    @cached_property
    def _layout(self) -> Layout:
        """Of all parameters, whether or not the search profiled them out."""
        return Layout(self._design.terms, self._design.p, len(self.family.phi_names), has_sigma=self.is_linear)

    def _names_in(self, layout: Layout) -> list[str]:
        """(P,) names of parameters."""
        return layout.names(self.theta_names, self._data.x_names, self.family.phi_names)

    @cached_property
    def _scaled(self) -> tuple[Design, Scaling]:
        """The design in internal units, where columns far from 0 cancel nothing, and the units."""
        problem = self._problem
        if isinstance(problem, GeneralisedProblem):
            return problem.design, problem.scaling
        return scale_design(self._design, self._layout)

    @cached_property
    def _internal(self) -> tuple[Parameters, Blocked, Design]:
        """Estimates, modes u and design in internal units."""
        e, (design, scaling) = self._estimates, self._scaled
        return Parameters(scaling.basis.inner(e.theta), scaling.A @ e.beta, e.phi), tuple(e.u), design

    @cached_property
    @entry
    def _laplace_pieces(self) -> tuple[float, np.ndarray]:
        """log|L|^2 and R_X'R_X in internal units."""
        logdet, information = _pieces(*self._internal, self.family, self._spec.hessian)
        return float(logdet), np.asarray(information)

    @property
    def _RX(self) -> np.ndarray:
        """(p, p) upper triangular with a positive diagonal."""
        information, separation = self._laplace_pieces[1], self._estimates.separation
        if separation is not None:
            information = separation.information(information)
        R = np.linalg.cholesky(information).T @ self._scaled[1].A
        return np.asarray(np.sign(np.diag(R))[:, None] * R)

    @cached_property
    @entry
    def _working_weights(self) -> np.ndarray:
        """(n,) weights W of the fit."""
        return np.asarray(working_weights(*self._device, self._design, self.family, self._spec.hessian)[0])

    def vcov(self, full: bool = False, type: str = "hessian", cluster: str | None = None) -> pd.DataFrame:
        """Covariance of the estimates.

        Args:
            full: over theta, beta and log-dispersions (log sigma of a linear model) instead of beta alone.
            type: "hessian" (2 x inverse Hessian of the deviance over all parameters), "rx"
                ((R_X'R_X)^-1, theta taken as known: lme4's use.hessian=FALSE), or "robust" (sandwich of the
                clusters' scores). nAGQ = 0 has "rx" only, and for linear models beta's part of both is
                sigma^2 (R_X'R_X)^-1. A REML fit's robust covariance is that of its ML fit.
            cluster: for "robust", independent clusters: a grouping factor or a column; None takes the factor in
                which the others are nested.
        """
        if type not in ("hessian", "rx", "robust"):
            raise ValueError(f"vcov type must be 'hessian', 'rx' or 'robust', got {type!r}")
        if cluster is not None and type != "robust":
            raise ValueError("cluster is for type='robust'")
        names = list(self._data.x_names)
        if type == "robust":
            joint = inference.influence.robust_covariance(self, cluster)
            joint.iloc[:, :] = self._shown(joint.to_numpy(), self._layout.at.beta.start)
            return joint if full else joint.loc[names, names]
        if not full:
            return pd.DataFrame(self._shown(self._fixed_covariance(type)), names, names)
        if type == "rx":
            raise ValueError("vcov(full=True) needs type='hessian' or 'robust'")
        labels = self._names_in(self._layout)
        return pd.DataFrame(self._shown(self._joint_covariance, self._layout.at.beta.start), labels, labels)

    @property
    def _joint_covariance(self) -> np.ndarray:
        """(P, P) covariance of all parameters, of what is determined of the fixed effects."""
        if self.is_linear:
            half = inference.influence.Sensitivity(self, self.REML).half
            return np.asarray(2.0 * half @ half.T)
        if self.nAGQ == 0:
            raise NotSupportedError("nAGQ = 0 has no joint covariance of theta and beta; fit with nAGQ = 1")
        return self._estimates.covariance

    @property
    def bse(self) -> pd.Series:
        """Standard errors of the fixed effects; infinite for coefficients that run off (see `separated`)."""
        return pd.Series(self._standard_errors, index=list(self._data.x_names), name="std_error")

    @cached_property
    def _standard_errors(self) -> np.ndarray:
        return np.sqrt(self._variances_of(np.eye(self._design.p)))

    def _variances_of(self, L: np.ndarray) -> np.ndarray:
        """(r,) variances of linear combinations L (r, p) of the fixed effects: infinite where one is not determined,
        NaN where none is known."""
        out = np.einsum("ri,ij,rj->r", L, self._fixed_covariance("hessian"), L)
        out = np.where(out >= 0.0, out, np.nan)
        separation = self._estimates.separation
        return np.asarray(out if separation is None else np.where(separation.touches(L), np.inf, out))

    def _shown(self, V: np.ndarray, first: int = 0) -> np.ndarray:
        """A covariance as it is reported, the fixed effects from number `first` on."""
        separation = self._estimates.separation
        return V if separation is None else separation.shown(V, first)

    def _fixed_covariance(self, type: str) -> np.ndarray:
        """(p, p) covariance of the fixed effects, of what is determined of them; nAGQ = 0 has "rx" only."""
        if self._estimates.RX is not None:
            half = np.linalg.inv(self._estimates.RX)
            return self.sigma**2 * half @ half.T
        if type == "rx" or self.nAGQ == 0:
            information, separation = self._laplace_pieces[1], self._estimates.separation
            if separation is None:
                half = np.linalg.inv(self._scaled[1].A)
                return np.asarray(half @ _symmetric_inverse(information) @ half.T)
            known = _symmetric_inverse(separation.kept.T @ information @ separation.kept)
            return np.asarray(separation.basis @ known @ separation.basis.T)
        own = self._problem.layout.at.beta
        return self._estimates.covariance[own, own]

    @property
    def zvalues(self) -> pd.Series:
        """Wald statistics, estimate / standard error (t values of a linear model)."""
        return (self.fixef / self.bse).rename("z")

    @property
    def tvalues(self) -> pd.Series:
        """The same as `zvalues`, under the name it has for linear models."""
        return self.zvalues.rename("t")

    @property
    def pvalues(self) -> pd.Series:
        """Two-sided p-values: normal, or for linear models t with Satterthwaite's degrees of freedom."""
        return self.coefficients("satterthwaite" if self.is_linear else None)["p_value"]

    coefficients = Method(lambda: inference.coefficients.coefficients)
    confint = Method(lambda: inference.coefficients.confint)
    sdcor = Method(lambda: inference.sdcor.sdcor_table)
    profile = Method(lambda: inference.profile.profile)

    # ---- random effects ----------------------------------------------------------------------------
    VarCorr = Method(lambda: inference.varcorr.varcorr)
    ranef = Method(lambda: inference.modes.ranef)
    ranef_frame = Method(lambda: inference.modes.ranef_frame)
    coef = Method(lambda: inference.modes.coef)
    rePCA = Method(lambda: inference.summaries.re_pca)
    icc = Method(lambda: inference.summaries.icc)
    r2 = Method(lambda: inference.summaries.r2)

    def _by_group(self) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for i, labels in enumerate(self._data.terms):
            groups.setdefault(labels.group, []).append(i)
        return groups

    # ---- prediction and tests ----------------------------------------------------------------------
    predict = Method(lambda: inference.predict.predict)
    wald_test = Method(lambda: inference.wald.wald_test)
    score_test = Method(lambda: inference.score.score_test)

    marginal_means = Method(lambda: inference.means.marginal_means)
    marginal_coefficients = Method(lambda: inference.means.marginal_coefficients)
    vif = Method(lambda: inference.summaries.vif)

    # ---- simulation --------------------------------------------------------------------------------
    simulate = Method(lambda: inference.simulate.simulate_model)
    bootstrap = Method(lambda: inference.bootstrap.bootstrap)

    # ---- influence ---------------------------------------------------------------------------------
    @cached_property
    def _sensitivity(self) -> Sensitivity:
        return inference.influence.Sensitivity(self)

    sensitivity = Method(lambda: inference.influence.sensitivity)
    influence = Method(lambda: inference.influence.influence)

    def cooks_distance(self, groups: str | None = None, method: str = "first-order") -> pd.Series:
        """`influence(groups, method).cooks_distance()`."""
        return self.influence(groups, method).cooks_distance()

    # ---- quality of the approximation ----------------------------------------------------------------
    quadrature_error = Method(lambda: inference.approximation.quadrature_error)
    integrands = Method(lambda: inference.approximation.integrands)
    plot_integrands = Method(lambda: inference.approximation.plot_integrands)

    @property
    def _nothing_left(self) -> bool:
        """Whether all rows are separated."""
        separation = self._estimates.separation
        return separation is not None and bool((separation.rows | ~(np.asarray(self._design.weights) > 0.0)).all())

    @cached_property
    def _separation_sentence(self) -> str:
        return inference.messages.separation_sentence(self)

    @cached_property
    def _approximation_note(self) -> str:
        return inference.approximation.notable(self)

    # ---- lme4's getME, devcomp ---------------------------------------------------------------------
    hatvalues = Method(lambda: inference.residuals.hatvalues)
    rstandard = Method(lambda: inference.residuals.rstandard)
    rstudent = Method(lambda: inference.residuals.rstudent)
    devcomp = Method(lambda: inference.getme.devcomp)
    getME = Method(lambda: inference.getme.get_me)

    @entry
    def deviance_function(self) -> Callable[..., float]:
        """lme4's as.function: (theta, beta) -> minus twice the log-likelihood of this model and data.

        For a linear model it is theta -> what was minimised, beta and sigma profiled out.
        """
        problem, log_phi = self._problem, log_of(self._estimates.phi)
        if not (problem.layout.has_beta or self.is_linear):  # of beta, too, which nAGQ = 0 has no function of
            problem = GeneralisedProblem(self._design, self.family, 1, self._spec.hessian)
        begin = problem.start({})

        @entry
        def at(*parts: Any) -> float:
            x = np.concatenate([np.asarray(part, float).reshape(-1) for part in parts])
            inner: Any = problem.scaling.inner(x)
            return float(problem.evaluate(inner, begin.carry, begin.constant)[0])

        if self.is_linear:
            return lambda theta: at(theta)
        return lambda theta, beta: at(theta, beta, log_phi)

    # ---- refits ------------------------------------------------------------------------------------
    def refit(self, newresp: Any) -> MixedModel:
        """The same model fitted to another response, without recompilation.

        Args:
            newresp: (n,) response in the units of the fit's, for its rows or for all rows of its table; a pandas object
                goes by its index. For the binomial with the fit's trials: integers are numbers of successes, floats
                are proportions, two columns are successes and failures; for a response that was a factor its labels
                are taken too.

        Raises:
            DataError: what a fit to this response would refuse: another length, missing values, a constant, values that
                the family cannot have, a response that the fixed effects of a linear model fit exactly.
        """
        return self._spec.entry.refit(self, newresp)

    refit_many = Method(lambda: inference.bootstrap.refit_many)

    @entry
    @entry
    def refit_ml(self) -> MixedModel:
        """The linear model fitted by maximum likelihood (itself if it was); no recompilation (lme4's refitML)."""
        if not isinstance(self._problem, LinearProblem) or not self.REML:
            return self
        spec = replace(self._spec, REML=False)
        return spec.entry.fit(spec, self._data, self._problem.with_criterion(False), None)

    def update(self, formula: str, **changes: Any) -> MixedModel:
        """Refit with a changed formula (``". ~ . + (1 | obs)"``) or changed arguments."""
        return self._spec.entry.update(self, formula, changes)

    # ---- printing ----------------------------------------------------------------------------------
    summary = Method(lambda: inference.summary.summary)
    tidy = Method(lambda: inference.coefficients.tidy)
    messages = Method(lambda: inference.messages.messages)

    def _report(self, page: bool) -> Sequence[Block]:
        return self.summary()._report(page) if page else [inference.summary.short_text(self)]


def theta_names(design: Design, data: ModelData) -> list[str]:
    """lme4's names of theta."""
    names: list[str] = []
    for term, labels in zip(design.terms, data.terms, strict=True):
        names += term.structure.theta_names(labels.group, labels.names)
    return names


def _symmetric_inverse(A: np.ndarray) -> np.ndarray:
    scale = 1.0 / np.sqrt(np.diag(A))
    inverse = np.linalg.inv(A * np.outer(scale, scale)) * np.outer(scale, scale)
    return np.asarray(0.5 * (inverse + inverse.T))
