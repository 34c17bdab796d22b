"""A fitted mixed model: everything it answers, in NumPy and pandas.

Nothing here is traced except three small programs (per-row means, and two that read variances off the
derivative of a log-determinant), compiled when first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import erfc, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from ._arguments import checked, choice
from ._errors import NotSupportedError as NotSupportedError
from .algebra.bordered import selected_inverse
from .algebra.linalg import eliminate, factorise, penalised
from .compiling import programs
from .compiling.precision import x64
from .families import Family
from .fit.control import Control
from .fit.glmm import GeneralisedProblem, scale_design
from .fit.problem import Estimates, FitStats, Problem, Scaling
from .model.basis import inverse_of_lower
from .model.buckets import fill_rows
from .model.covariance import cov_to_sdcor
from .model.design import Design
from .objective.laplace import log_density_constant, pieces, products_at, working_weights
from .objective.pirls import Blocked, Parameters, reduce_fixed, row_sums
from .objective.quadrature import marginal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .formula.frame import ModelData
    from .inference.approximation import QuadratureError
    from .inference.bootstrap import Bootstrap
    from .inference.influence import Influence, Sensitivity
    from .inference.likelihood import Point
    from .inference.means import MarginalMeans
    from .inference.profile import Profile
    from .inference.wald import WaldTest
    from .report.summary import Summary

SINGULAR_TOLERANCE = 1e-4  # lme4's isSingular


@programs.kept("family")
def _rows(eta: Array, y: Array, weights: Array, phi: Array, family: Family) -> tuple[Array, ...]:
    mu = family.link.inverse(eta)
    try:
        variance, deviance = family.variance(mu, phi), family.deviance_contribution(y, mu, weights, phi)
    except NotImplementedError:
        variance = deviance = jnp.full_like(mu, jnp.nan)
    return mu, family.link.mu_eta(eta), variance, deviance


_pieces = jax.jit(pieces, static_argnames=("family", "hessian"))


@partial(jax.jit, static_argnames=("family", "hessian"))
def _conditional_covariances(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> Blocked:
    """Lambda (L L')^-1 Lambda' per level, (m, k, k) per block."""
    blocks, T = products_at(params, u, design, family, hessian)
    H = penalised(blocks, T, design.plan)
    inverse = selected_inverse(eliminate(H, design.plan), H, design.plan)
    return tuple(jnp.einsum("ij,mjk,lk->mil", t, v, t) for t, v in zip(T, inverse.diagonal, strict=True))


@partial(jax.jit, static_argnames=("family", "hessian"))
def _leverages(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> Array:
    """w_i d(log det of the joint penalised information)/dw_i: the diagonal of the hat matrix."""
    w, T = working_weights(params, u, design, family, hessian)

    def logdet(w: Array) -> Array:
        sums = row_sums(jnp.zeros_like(w), w, design, True)
        factor = factorise(sums.blocks, T, design.plan)
        assert sums.fixed is not None
        information, _, _ = reduce_fixed(sums.fixed, sums.score, factor, T, design)
        return factor.logdet + jnp.linalg.slogdet(information)[1]

    return w * jax.grad(logdet)(w)


@dataclass(frozen=True)
class VarCorrBlock:
    """Covariance of one random-effects term, on the scale of the data.

    Attributes:
        group: grouping factor (``g.1``, ``g.2`` for further terms on one factor, as lme4).
        names: columns of the term.
        sd: (k,). corr: (k, k), NaN where a standard deviation is 0. cov: (k, k).
    """

    group: str
    names: tuple[str, ...]
    sd: np.ndarray
    corr: np.ndarray
    cov: np.ndarray


class VarCorr(list[VarCorrBlock]):
    """Random-effects covariances, one block per term in the order of theta; prints as lme4's VarCorr.

    `residual` is the residual standard deviation, None for families without one.
    """

    residual: float | None = None

    def to_frame(self) -> pd.DataFrame:
        """lme4's ``as.data.frame(VarCorr(m))``: grp, var1, var2, vcov, sdcor (variances, then covariances)."""
        rows: list[tuple[Any, ...]] = []
        for block in self:
            for i, name in enumerate(block.names):
                rows.append((block.group, name, None, block.cov[i, i], block.sd[i]))
            for i in range(len(block.names)):
                for j in range(i + 1, len(block.names)):
                    rows.append((block.group, block.names[i], block.names[j], block.cov[i, j], block.corr[i, j]))
        if self.residual is not None:
            rows.append(("Residual", None, None, self.residual**2, self.residual))
        return pd.DataFrame(rows, columns=["grp", "var1", "var2", "vcov", "sdcor"])

    def __str__(self) -> str:
        from .report.summary import varcorr_text

        return varcorr_text(self, variance=False)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(index=False)


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
    #: whether a linear mixed model was fitted by REML; None for a generalised one
    REML: bool | None = None


@checked()
class MixedModel:
    """A fitted mixed model, as returned by `glmmjax.glmer` and `glmmjax.lmer`.

    Numbers are NumPy or pandas float64; theta and every random-effects table are in lme4's order.
    """

    def __init__(self, spec: ModelSpec, data: ModelData, problem: Problem, estimates: Estimates) -> None:
        self._spec, self._data, self._problem, self._estimates = spec, data, problem, estimates
        self._design: Design = problem.original
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
        return self._design.n_theta + self._design.p + len(self.family.phi_names) + self.is_linear

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
        factors = [t.structure.host_factor(theta[t.theta]) for t in self._design.terms]
        pairs = zip(factors, texts, strict=True)
        return list(dict.fromkeys(t for T, t in pairs if (np.abs(np.diag(T)) < SINGULAR_TOLERANCE).any()))

    @property
    def undetermined(self) -> list[str]:
        """Parameters that a flat direction of the deviance moves; empty for an identified model."""
        outside = self.nAGQ > 0 and not self.is_linear
        names = self.theta_names + (list(self._data.x_names) if outside else [])
        names += [f"log({n})" for n in self.family.phi_names]
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
        with x64():
            rows = (fill_rows(np.asarray(v)) for v in (self.linear_predictor, self._design.y, self._design.weights))
            out = _rows(*rows, self._estimates.phi, family=self.family)
            mu, slope, variance, deviance = (np.asarray(x)[: self.nobs] for x in out)
        return mu, slope, variance, deviance

    @property
    def fitted(self) -> pd.Series:
        """Conditional means at the modes, on the response scale (proportions for the binomial)."""
        return pd.Series(self._moments[0].copy(), index=self._data.row_index, name="fitted")

    def residuals(self, type: str | None = None, scaled: bool = False, seed: int = 0) -> pd.Series:
        """Residuals: "deviance", "pearson", "working", "response" (definitions as R's glm) or "quantile".

        The default is lme4's: "response" for linear models, else "deviance". `scaled` divides by sigma.
        "quantile" are Dunn & Smyth's randomised quantile residuals, standard normal under the model and
        `scaled` already; `seed` is that of their randomness.
        """
        type = type or ("response" if self.is_linear else "deviance")
        if type == "quantile":
            from .inference.summaries import quantile_residuals

            return pd.Series(quantile_residuals(self, seed), index=self._data.row_index, name="quantile_residual")
        mu, slope, variance, deviance = self._moments
        y, weights = np.asarray(self._design.y), np.asarray(self._design.weights)
        response = y - mu
        if type == "deviance":
            self._need(deviance, "deviance residuals")
            values = np.sign(response) * np.sqrt(np.maximum(deviance, 0.0))
        elif type == "pearson":
            self._need(variance, "Pearson residuals (it has no variance function)")
            # a mean that rounds to its end has no variance left, and its limit no residual
            values = response * np.sqrt(weights / np.where((response == 0.0) & (variance == 0.0), 1.0, variance))
        elif type == "working":
            values = response / slope
        elif type == "response":
            values = response
        else:
            known = "'deviance', 'pearson', 'working', 'response' or 'quantile'"
            raise ValueError(f"residuals type must be {known}, got {type!r}")
        if scaled:
            values = values / self.sigma
        return pd.Series(values, index=self._data.row_index, name=f"{type}_residual")

    def _need(self, values: np.ndarray, what: str) -> None:
        if np.isnan(values).all():
            raise NotSupportedError(f"family {self.family.name} does not provide {what}; use type='response'")

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
    def _scaled(self) -> tuple[Design, Scaling]:
        """The design in internal units, where columns far from 0 cancel nothing, and the units."""
        problem = self._problem
        if isinstance(problem, GeneralisedProblem):
            return problem.design, problem.scaling
        return scale_design(self._design, 0)

    @cached_property
    def _inside(self) -> tuple[Parameters, Blocked, Design]:
        """Estimates, modes u and design in internal units."""
        e, (design, scaling) = self._estimates, self._scaled
        return Parameters(scaling.basis.inner(e.theta), scaling.A @ e.beta, e.phi), tuple(e.u), design

    @cached_property
    def _laplace_pieces(self) -> tuple[float, np.ndarray]:
        """log|L|^2 and R_X'R_X in internal units."""
        with x64():
            logdet, information = _pieces(*self._inside, self.family, self._spec.hessian)
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
    def _working_weights(self) -> np.ndarray:
        """(n,) weights W of the fit."""
        with x64():
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
            from .inference.influence import robust_covariance

            joint = robust_covariance(self, cluster)
            joint.iloc[:, :] = self._shown(joint.to_numpy(), self._design.n_theta)
            return joint if full else joint.loc[names, names]
        if not full:
            return pd.DataFrame(self._shown(self._fixed_covariance(type)), names, names)
        if type == "rx":
            raise ValueError("vcov(full=True) needs type='hessian' or 'robust'")
        labels = self.theta_names + names + [f"log({n})" for n in self.family.phi_names]
        labels += ["log(sigma)"] if self.is_linear else []
        return pd.DataFrame(self._shown(self._joint_covariance, self._design.n_theta), labels, labels)

    @property
    def _joint_covariance(self) -> np.ndarray:
        """(P, P) covariance of all parameters, of what is determined of the fixed effects."""
        if self.is_linear:
            from .inference.influence import Sensitivity

            half = Sensitivity(self, self.REML).half
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
        t, p = self._design.n_theta, self._design.p
        return self._estimates.covariance[t : t + p, t : t + p]

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

    def coefficients(self, ddf: str | None = None) -> pd.DataFrame:
        """Table of the fixed effects: estimate, std_error, statistic, and where there are some df and p_value.

        Args:
            ddf: for linear models, "satterthwaite" or "kenward-roger" (of REML fits) denominator degrees of
                freedom; None leaves p-values out, as lme4. Generalised models have normal p-values.
        """
        if self.is_linear and ddf is not None:
            if ddf not in self._tables:
                from .inference.ddf import coefficient_table

                self._tables[ddf] = coefficient_table(self, ddf)
            return self._tables[ddf].copy()
        if ddf is not None:
            raise NotSupportedError("ddf is for linear mixed models; a generalised one has normal p-values")
        statistic = self.zvalues.to_numpy()
        table = {"estimate": self.beta, "std_error": self.bse.to_numpy(), "statistic": statistic}
        if not self.is_linear:
            # erfc is accurate in the tail; NormalDist.cdf cancels, and is 0 beyond |z| = 8.3
            table["p_value"] = np.array([erfc(v / sqrt(2.0)) for v in np.abs(statistic)])
        return pd.DataFrame(table, index=list(self._data.x_names))

    def confint(
        self,
        method: str = "wald",
        level: float = 0.95,
        profile: Profile | None = None,
        nsim: int = 1000,
        seed: Any = 0,
        kind: str = "percentile",
        which: str | None = "beta_",
    ) -> pd.DataFrame:
        """Confidence intervals, columns named as R's (``2.5 %``, ``97.5 %``).

        Args:
            method: "wald" for the fixed effects; "profile" or "boot" (parametric) for standard deviations,
                correlations, sigma and fixed effects, see `profile` and `bootstrap`; "uniroot" solves for the
                profile's ends in one step, without the profile between.
            profile: one made before, used again.
            nsim, seed, kind: of "boot"; kind "percentile", "basic" or "normal".
            which: of "wald": "beta_" for the fixed effects, "theta_" for standard deviations, correlations and
                sigma (symmetric on the log or Fisher's z scale, by the delta method), None for all.
        """
        choice(kind, "kind", ("percentile", "basic", "normal"))
        half_width = NormalDist().inv_cdf(0.5 + 0.5 * level)
        chosen = method.lower()
        if profile is not None and chosen != "profile":
            raise ValueError(f"a profile is used with method='profile', not {method!r}")
        if chosen == "profile":
            made = self.profile(limit=max(half_width, 2.0)) if profile is None else profile
            return made.confint(level)
        if chosen == "uniroot":
            from .inference.profile import profile as trace

            return trace(self, None, half_width, half_width).confint(level)
        if chosen == "boot":
            return self.bootstrap(nsim, seed).confint(level, kind)
        if chosen != "wald":
            raise ValueError(f"confint method {method!r} is not available; use 'wald', 'profile', 'uniroot' or 'boot'")
        if which not in ("beta_", "theta_", None):
            raise ValueError(f"which must be 'beta_', 'theta_' or None, got {which!r}")
        half = half_width * self.bse
        tail = 50.0 * (1.0 - level)
        ends = pd.DataFrame({f"{tail:g} %": self.fixef - half, f"{100.0 - tail:g} %": self.fixef + half})
        if which == "beta_":
            return ends
        random = self.sdcor()
        z = random["transformed"].to_numpy()
        width = half_width * random["transformed_error"].to_numpy()
        back = np.where(random["scale"] == "log", np.exp([z - width, z + width]), np.tanh([z - width, z + width]))
        random_ends = pd.DataFrame(back.T, random.index, ends.columns)
        return random_ends if which == "theta_" else pd.concat([random_ends, ends])

    def sdcor(self) -> pd.DataFrame:
        """Standard deviations, correlations, sigma and dispersions with delta-method standard errors.

        Returns:
            By name: estimate, std_error; "transformed" (its log, or Fisher's z of a correlation), its standard error,
            and "scale" ("log" or "z"). NaN errors where the estimate is on its boundary.
        """
        from .inference.likelihood import sdcor_table

        return sdcor_table(self)

    def profile(
        self,
        which: str | Sequence[str] | Mapping[str, Callable[[Point], Array]] | None = None,
        limit: float | None = None,
    ) -> Profile:
        """Profile likelihood of parameters, or of any scalar functions of them.

        Args:
            which: names (as in the rows of the result: ``sd_(Intercept)|herd``, ``cor_b.a|g``, ``sigma``, fixed
                effects), "theta_" or "beta_" for all of a kind, None for all; or name -> function, which
                receives theta, beta, sigma, phi and cov (per term) as JAX arrays and returns a scalar:
                ``{"icc": lambda q: q.cov[0][0, 0] / (q.cov[0][0, 0] + q.sigma**2)}``.
            limit: signed root of the deviance's rise to follow each path to; default 3.

        Returns:
            `Profile`: tidy `frame`, `confint(level)`, splines both ways. A REML fit is profiled by ML.

        Source: Bates et al. 2015, J. Stat. Softw. 67(1), section 5.1.
        """
        from .inference.profile import profile

        return profile(self, which, limit)

    # ---- random effects ----------------------------------------------------------------------------
    def VarCorr(self) -> VarCorr:
        """Standard deviations, correlations and covariances of the random effects, one block per term."""
        seen: dict[str, int] = {}
        out = VarCorr()
        for T, labels in zip(self._T, self._data.terms, strict=True):
            count = seen.get(labels.group, 0)
            seen[labels.group] = count + 1
            cov = self.sigma**2 * T @ T.T
            sd, corr = cov_to_sdcor(cov)
            group = labels.group if count == 0 else f"{labels.group}.{count}"
            out.append(VarCorrBlock(group, labels.names, sd, corr, cov))
        if self.is_linear:
            out.residual = self.sigma
        return out

    def ranef(self, condVar: bool = False) -> dict[str, Any]:
        """Conditional modes of the random effects.

        Returns:
            dict: grouping factor -> DataFrame (levels x columns of all its terms). With `condVar`, each
            frame's ``attrs["condVar"]`` holds the conditional covariances (levels, k, k), sigma^2
            included (Bates et al. 2015, eq. 58-59).
        """
        out: dict[str, pd.DataFrame] = {}
        for group, indices in self._by_group().items():
            columns: list[str] = []
            for i in indices:
                columns += self._data.terms[i].names
            values = np.concatenate([self._b[i] for i in indices], axis=1)
            index = pd.Index(self._data.terms[indices[0]].levels, name=group)
            out[group] = pd.DataFrame(values, index=index, columns=columns)
        if condVar:
            with x64():
                inner = _conditional_covariances(*self._inside, self.family, self._spec.hessian)
            outer = [inverse_of_lower(L) for L in self._scaled[1].basis.L]
            blocks = [half @ np.asarray(V) @ half.T for half, V in zip(outer, inner, strict=True)]
            for group, indices in self._by_group().items():
                terms = [self._design.terms[i] for i in indices]
                pick = np.concatenate([np.arange(t.first, t.first + t.structure.k) for t in terms])
                cov = blocks[terms[0].block][:, pick][:, :, pick]
                out[group].attrs["condVar"] = self.sigma**2 * cov
        return out

    def _by_group(self) -> dict[str, list[int]]:
        groups: dict[str, list[int]] = {}
        for i, labels in enumerate(self._data.terms):
            groups.setdefault(labels.group, []).append(i)
        return groups

    def ranef_frame(self) -> pd.DataFrame:
        """Tidy conditional modes: grpvar, term, grp, condval, condsd (lme4's as.data.frame(ranef(m)))."""
        parts = []
        for group, frame in self.ranef(condVar=True).items():
            sds = np.sqrt(np.einsum("mkk->mk", frame.attrs["condVar"]))
            for j, term in enumerate(frame.columns):
                parts.append(
                    pd.DataFrame(
                        {
                            "grpvar": group,
                            "term": term,
                            "grp": frame.index.to_numpy(),
                            "condval": frame.iloc[:, j].to_numpy(),
                            "condsd": sds[:, j],
                        }
                    )
                )
        return pd.concat(parts, ignore_index=True)

    def rePCA(self) -> dict[str, pd.DataFrame]:
        """Principal components of the random effects (lme4's rePCA): few of them say that a term is too rich.

        Returns:
            dict: grouping factor -> DataFrame with a row per component: sdev (relative to sigma), proportion
            (of the variance), cumulative; ``attrs["rotation"]`` has the directions.
        """
        from .inference.summaries import re_pca

        return re_pca(self)

    def icc(self, null: MixedModel | None = None) -> pd.Series:
        """Intraclass correlation on the link scale: share of the random effects in the variance.

        Random slopes count with the variance that they have on average over the rows; a term with a level per
        row is overdispersion and counts with the distribution. That of the binomial is that of the latent
        response: pi^2/3, 1, pi^2/6 (logit, probit, cloglog), for one trial; that of counts with a log link is
        log(1 + 1/mu [+ 1/theta]), mu = exp(intercept + half the random variance) of the model without covariates.

        Args:
            null: for count models, the fitted model without covariates; None fits it.

        Returns:
            Series: adjusted (of the variance that X beta leaves), unadjusted (of all).

        Raises:
            NotSupportedError: a family or link without such a variance.

        Source: Nakagawa, Johnson & Schielzeth 2017, J. R. Soc. Interface 14(134); Johnson 2014.
        """
        from .inference.summaries import icc

        return icc(self, null)

    def r2(self, null: MixedModel | None = None) -> pd.Series:
        """Nakagawa's R2 on the link scale; arguments and variances as `icc`.

        Returns:
            Series: marginal (share of X beta in the variance), conditional (with the random effects).

        Source: Nakagawa & Schielzeth 2013, Methods Ecol. Evol. 4(2); Johnson 2014, Methods Ecol. Evol. 5(9).
        """
        from .inference.summaries import r2

        return r2(self, null)

    def coef(self) -> dict[str, pd.DataFrame]:
        """Per grouping factor, fixed effects plus conditional modes of each level (lme4's coef)."""
        out = {}
        for group, effects in self.ranef().items():
            names = list(self._data.x_names) + [c for c in effects.columns if c not in self._data.x_names]
            frame = pd.DataFrame(0.0, index=effects.index, columns=names)
            frame += self.fixef.reindex(names).fillna(0.0)
            for j, name in enumerate(effects.columns):
                frame[name] += effects.iloc[:, j]
            out[group] = frame
        return out

    # ---- prediction --------------------------------------------------------------------------------
    def predict(
        self,
        newdata: Any = None,
        re_form: str | None = None,
        type: str = "link",
        allow_new_levels: bool = False,
        offset: Any = None,
        se: bool | str = False,
        level: float | None = None,
        given: Any = None,
        interval: str = "confidence",
    ) -> Any:
        """Predictions for the data of the fit or for new rows.

        Args:
            newdata: table with the model's columns (the response is not needed); None for the fit's rows. Columns
                that offset() or an offset by name use are looked up here; poly(), scale(), bs() are those of the fit.
            re_form: None uses all random effects, "NA" none, "~(1 | g)" those of the terms or columns named.
            type: "link"; "response" (conditional means, at the modes); or "marginal": means averaged over the random
                effects, over all of them unless re_form names some, which are then kept at their modes. The integral
                is exact for the log link, else numerical with an error below 1e-10 for standard deviations up to 8.
            allow_new_levels: predict unseen levels of a grouping factor with random effects 0.
            offset: (n_new,) in place of an offset array of the fit.
            se: True adds standard errors of the prediction as one of the unknown linear predictor (or mean): from
                the conditional variance of the random effects and the joint covariance of theta, beta and dispersions
                (glmmTMB's; observed information at the modes). "conditional" takes theta as known (lme4's definition).
                A new level adds the variance of its random effects.
            level: of intervals, such as 0.95; implies se=True.
            given: table with rows, responses included, of levels that were not in the fit: their random effects are
                found from these rows at the parameters of the fit. `newdata` then may have these levels. Standard
                errors need a single grouping factor.
            interval: of level: "confidence", of the linear predictor or mean; or "prediction", of a new observation of
                a linear model, whose residual variance it adds (with the weights of the fit's rows, for new rows 1).

        Returns:
            (n,) or (n_new,). With `se` or `level`, a DataFrame with fit, se (on the scale of fit, by the delta method
            where that is a mean), and with `level` lower and upper: normal on the link scale, transformed back.

        Raises:
            DataError: a column is missing, or new levels (named) without allow_new_levels; an offset array of the fit
                has no counterpart in newdata (give offset=).
        """
        from .inference.predict import predict

        return predict(self, newdata, re_form, type, allow_new_levels, offset, se, level, given, interval)

    def wald_test(self, L: Any, rhs: Any = 0.0, ddf: str | None = None) -> WaldTest:
        """Wald test of linear hypotheses about the fixed effects.

        Args:
            L: text such as ``"period2 = period3, period4 = 0"``; coefficient -> weight; or a matrix (r, p) over the
                coefficients of `fixef`.
            rhs: number, or (r,), that L beta is tested to be; text has its own.
            ddf: for linear models "satterthwaite" or "kenward-roger": an F test; None gives a chi-square test.

        Returns:
            `WaldTest`: text, HTML, statistic, df, df_denom, p_value, estimate, std_error.

        Raises:
            ValueError: an unknown coefficient, a wrong shape, or hypotheses that contradict each other.
            NotSupportedError: ddf for a generalised model.
        """
        from .inference.wald import wald_test

        return wald_test(self, L, rhs, ddf)

    def score_test(self, covariates: Any, adjust: str = "BH") -> pd.DataFrame:
        """Score tests of covariates that the model does not have, one at a time, without fitting any of them.

        For scans of many candidates: the null model is fitted once, and each covariate costs a pass over the rows.
        Random effects and dispersions are held at their estimates; to first order the p-values are those of
        likelihood-ratio tests.

        Args:
            covariates: (n, B) array or DataFrame of numbers, rows as the data of the fit (or its rows that were kept).
            adjust: p_adjusted over the covariates: "BH", "holm", "bonferroni" or "none".

        Returns:
            One row per covariate: estimate (of its coefficient after one step), std_error, statistic (z), p_value,
            p_adjusted. NaN where the fixed effects span the covariate.

        Raises:
            DataError: covariates that are not numbers, not finite, or have another number of rows.

        Source: Chen et al. 2016, Am. J. Hum. Genet. 98; see `_score.py`.
        """
        from .inference.score import score_test

        return score_test(self, covariates, adjust)

    # ---- simulation --------------------------------------------------------------------------------
    def simulate(
        self,
        nsim: int = 1,
        seed: Any = 0,
        re_form: str | None = None,
        use_u: bool = False,
        labels: bool = False,
    ) -> pd.DataFrame:
        """New responses drawn from the fitted model, for the rows of the fit.

        Args:
            nsim: number of responses.
            seed: integer, or a NumPy generator, which is advanced. Equal seeds give equal draws.
            re_form: None and "NA" draw all random effects anew (lme4's default); "~(1 | g)" conditions on the modes
                of the terms named and draws the others.
            use_u: condition on the modes of all terms.
            labels: for a response that was a factor, its labels instead of 0 and 1.

        Returns:
            DataFrame (n, nsim), columns sim_1, sim_2, ..., in the units of the response. Binomial responses are
            numbers of successes, as integers: 0 or 1 for binary data, at most the trials for cbind() and for
            proportions. `refit` takes every column as it is.

        Raises:
            NotSupportedError: a custom family without sampler; prior weights that are not trials or precisions.
        """
        from .inference.simulate import simulate_model

        return simulate_model(self, nsim, seed, re_form, use_u, labels)

    def bootstrap(
        self,
        nsim: int = 1000,
        seed: Any = 0,
        kind: str = "parametric",
        statistic: Callable[[MixedModel], Any] | None = None,
        batched: bool | None = None,
    ) -> Bootstrap:
        """Bootstrap distribution of the estimates, by refits of the compiled program.

        Args:
            nsim: replicates. seed: of NumPy's generator.
            kind: "parametric" simulates random effects and responses; "semiparametric" (linear models) keeps the
                conditional modes and resamples residuals, scaled to sigma; "groups" resamples the levels of the
                grouping factor.
            statistic: of a fitted model, a number, array or Series; default standard deviations, correlations,
                sigma and fixed effects, which is much faster.
            batched: fit replicates together by the programs of `glmmjax.fit_many`, some ten times as fast once these
                are compiled (or found in the cache); None does so from 1,000 replicates on.

        Returns:
            `Bootstrap`: `frame`, `summary()`, `confint(level, kind="percentile"|"basic"|"normal")`; refits that
            failed are counted and kept apart.
        """
        from .inference.bootstrap import bootstrap

        return bootstrap(self, nsim, seed, kind, statistic, batched)

    def marginal_means(
        self,
        by: str | Sequence[str],
        at: Mapping[str, Any] | None = None,
        type: str = "link",
        level: float = 0.95,
        ddf: str | None = None,
    ) -> MarginalMeans:
        """Means of the linear predictor by levels of variables, averaged over the other factors (emmeans).

        Args:
            by: variables of the fixed effects.
            at: values for variables instead of all levels of a factor or the mean of a number.
            type: "response" transforms the means and their intervals back.
            level: of the intervals. ddf: degrees of freedom of linear models, as in `coefficients`.

        Returns:
            `MarginalMeans`: `frame`, and `pairs(adjust)` for all differences.
        """
        from .inference.means import marginal_means

        return marginal_means(self, by, at, type, level, ddf)

    def marginal_coefficients(self) -> pd.DataFrame:
        """Population-averaged fixed effects: the marginal mean response, on the link scale, regressed on X.

        Returns:
            estimate, std_error (delta method, theta's uncertainty included), statistic, and the "conditional" ones.

        Source: Hedeker, du Toit, Demirtas & Gibbons 2018, Biometrics 74 (GLMMadaptive's marginal_coefs).
        """
        from .inference.means import marginal_coefficients

        return marginal_coefficients(self)

    def vif(self) -> pd.DataFrame:
        """Generalised variance-inflation factors of the terms (Fox & Monette 1992): GVIF, df, GVIF^(1/(2 df))."""
        from .inference.summaries import vif

        return vif(self)

    # ---- influence ---------------------------------------------------------------------------------
    @cached_property
    def _sensitivity(self) -> Sensitivity:
        from .inference.influence import Sensitivity

        return Sensitivity(self)

    def sensitivity(self, what: str = "weights") -> pd.DataFrame:
        """Derivatives of the estimates in the data, rows x parameters (theta, beta, log dispersion or log sigma).

        Args:
            what: "weights" (the family's weights: trials, or prior weights), "y" or "offset".

        By the implicit function theorem at the estimates; of a REML fit those of its ML fit.
        """
        from .inference.influence import sensitivity

        return sensitivity(self, what)

    def influence(
        self, groups: str | None = None, method: str = "first-order", batched: bool | None = None
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
        from .inference.influence import influence

        return influence(self, groups, method, batched)

    def cooks_distance(self, groups: str | None = None, method: str = "first-order") -> pd.Series:
        """`influence(groups, method).cooks_distance()`."""
        return self.influence(groups, method).cooks_distance()

    # ---- quality of the approximation ----------------------------------------------------------------
    def quadrature_error(self, k: int | None = None, tol: float = 1e-3, shift: bool = True) -> QuadratureError:
        """How far the approximation of the likelihood is off at the estimates, by level and in total.

        Args:
            k: quadrature points per random effect to compare with; None takes the first of 3, 5, 9, 17, 33, 65
                that agrees with 2k - 1 points within `tol`.
            tol: deviance units.
            shift: also estimate how far the parameters would move with k points, by one Newton step.

        Returns:
            `QuadratureError`: text, HTML, `frame` by level, `totals`, `error`, `k`, `shift`.

        Raises:
            NotSupportedError: several grouping factors, more than 4 random effects per level, or a linear model.
        """
        from .inference.approximation import quadrature_error

        return quadrature_error(self, k, tol, shift)

    def integrands(self, axis: int = 0, z: Any = None) -> pd.DataFrame:
        """The conditional density of each level's random effects along a standardised axis.

        Args:
            axis: random effect of the level, in the order of the terms; axes are L_j^-T's columns, the others at 0.
            z: points, standardised by each level's mode and curvature; default 81 from -4 to 4.

        Returns:
            Columns level, z, density (scaled to the standard normal's at z = 0), normal (that density),
            ratio (t(z), their quotient; 1 everywhere where Laplace's approximation is exact).
        """
        from .inference.approximation import integrands

        return integrands(self, axis, z)

    def plot_integrands(
        self, kind: str = "density", axis: int = 0, levels: Sequence[Any] | None = None, z: Any = None
    ) -> tuple[Figure, pd.DataFrame]:
        """A panel per level: its conditional density against the standard normal, or their ratio.

        Args:
            kind: "density" or "ratio".
            axis, z: as `integrands`.
            levels: to show; None takes all, or the 30 with the largest error.

        Returns:
            Figure, and the data in it.
        """
        from .inference.approximation import plot_integrands

        return plot_integrands(self, kind, axis, levels, z)

    @property
    def _nothing_left(self) -> bool:
        """Whether all rows are separated."""
        separation = self._estimates.separation
        return separation is not None and bool((separation.rows | ~(np.asarray(self._design.weights) > 0.0)).all())

    @cached_property
    def _separation_sentence(self) -> str:
        from .report.summary import separation_sentence

        return separation_sentence(self)

    @cached_property
    def _approximation_note(self) -> str:
        from .inference.approximation import notable

        return notable(self)

    # ---- lme4's getME, devcomp ---------------------------------------------------------------------
    def hatvalues(self) -> pd.Series:
        """Leverages: diagonal of W^1/2 [Z Lambda, X] M^-1 [Z Lambda, X]' W^1/2 with *working* weights W.

        Each lies in [0, 1]; their sum is the effective number of parameters at fixed theta.
        """
        with x64():
            h = _leverages(*self._inside, self.family, self._spec.hessian)
        return pd.Series(np.asarray(h), index=self._data.row_index, name="hat")

    def rstandard(self, type: str = "deviance") -> pd.Series:
        """Residuals over sigma sqrt(1 - h), h the leverages (R's rstandard); "deviance" or "pearson"."""
        if type not in ("deviance", "pearson"):
            raise ValueError(f"rstandard type must be 'deviance' or 'pearson', got {type!r}")
        left = np.sqrt(1.0 - np.minimum(self.hatvalues(), 1.0 - 1e-12))
        return (self.residuals(type) / (self.sigma * left)).rename("rstandard")

    def rstudent(self) -> pd.Series:
        """Approximate deletion residuals, sign(r) sqrt(d^2 + h p^2 / (1 - h)) / sigma: d deviance, p Pearson residuals.

        Source: Williams 1987, Appl. Stat. 36(2), equation 4 (R's rstudent of a glm; sigma of all rows).
        """
        h = np.minimum(self.hatvalues(), 1.0 - 1e-12)
        d, p = self.residuals("deviance"), self.residuals("pearson")
        return (np.sign(d) * np.sqrt(d**2 + h * p**2 / (1.0 - h)) / self.sigma).rename("rstudent")

    def devcomp(self) -> dict[str, float]:
        """Components of the deviance under lme4's names: ldL2, ldRX2, wrss, ussq, pwrss, drsum, dev."""
        logdet, information = self._laplace_pieces
        mu, slope, variance, deviance = self._moments
        ussq = float(sum((u**2).sum() for u in self._estimates.u))
        wrss = float((np.asarray(self._design.weights) / variance * (np.asarray(self._design.y) - mu) ** 2).sum())
        parts = {
            "ldL2": logdet,
            "ldRX2": float(np.linalg.slogdet(information)[1] + 2.0 * np.linalg.slogdet(self._scaled[1].A)[1]),
            "wrss": wrss,
            "ussq": ussq,
            "pwrss": wrss + ussq,
            "drsum": float(deviance.sum()),
            "REML" if self.REML else "dev": self.objective,
        }
        if self.is_linear:
            pwrss = parts["pwrss"]
            parts["sigmaML"] = float(np.sqrt(pwrss / self.nobs))
            parts["sigmaREML"] = float(np.sqrt(pwrss / (self.nobs - self._design.p)))
        return parts

    def getME(self, name: str) -> Any:
        """lme4's getME, by its names: "X", "Z", "Lambda", "theta", "b", "RX", "devcomp", ...; "ALL" for a dict of all.

        Matrices are dense, Z (n, q) with columns term by term, level by level, and nothing is permuted: L is the lower
        factor of Lambda'Z'WZ Lambda + I in that order. Positions count from 0.
        """
        from .inference.getme import get_me

        return get_me(self, name)

    def deviance_function(self) -> Callable[..., float]:
        """lme4's as.function: (theta, beta) -> minus twice the log-likelihood of this model and data.

        For a linear model it is theta -> what was minimised, beta and sigma profiled out.
        """
        if self.is_linear:
            from .objective.pls import lmm_deviance

            criterion = jax.jit(partial(lmm_deviance, REML=self.REML))

            def profiled(theta: Any) -> float:
                with x64():
                    return float(criterion(jnp.asarray(theta, float), self._design))

            return profiled
        start = tuple(np.asarray(u) for u in self._estimates.u)
        phi = self._estimates.phi

        def deviance(theta: Any, beta: Any) -> float:
            with x64():
                params = Parameters(jnp.asarray(theta, float), jnp.asarray(beta, float), jnp.asarray(phi))
                value, _ = _marginal(params, self._design, self.family, start, self._spec.hessian, max(self.nAGQ, 1))
                return float(value + log_density_constant(self._design, self.family))

        return deviance

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
        from ._glmer import refit

        return refit(self, newresp)

    def refit_many(self, responses: Any) -> pd.DataFrame:
        """The same model fitted to each column of `responses` (n, B), without recompilation.

        Returns:
            One row per column: standard deviations, correlations, sigma and fixed effects, their standard errors
            ("se_" + name), loglik, converged, singular.
        """
        from .inference.bootstrap import refit_many

        return refit_many(self, responses)

    def refit_ml(self) -> MixedModel:
        """The linear model fitted by maximum likelihood (itself if it was); no recompilation (lme4's refitML)."""
        if not self.is_linear:
            return self
        from ._lmer import refit_ml

        return refit_ml(self)

    def update(self, formula: str, **changes: Any) -> MixedModel:
        """Refit with a changed formula (``". ~ . + (1 | obs)"``) or changed arguments."""
        from ._glmer import update

        return update(self, formula, changes)

    # ---- printing ----------------------------------------------------------------------------------
    def summary(self, correlation: bool | None = None, ddf: str | None = None) -> Summary:
        """lme4-like summary; str() of it is the text.

        Args:
            correlation: of the fixed effects; None prints it up to 20 columns.
            ddf: for linear models "satterthwaite" or "kenward-roger" degrees of freedom and p-values; None
                prints t values alone.
        """
        from .report.summary import Summary

        return Summary(self, correlation, ddf)

    def tidy(self, level: float = 0.95, ddf: str | None = "satterthwaite") -> pd.DataFrame:
        """broom.mixed's tidy table: effect, group, term, estimate, std_error, statistic, p_value, interval.

        Args:
            level: of the intervals, which are normal.
            ddf: of the p-values of a linear model, as `coefficients`; None leaves them out. The default gives those of
                `pvalues`, and is nothing to a generalised model.
        """
        ci = self.confint(level=level).to_numpy()
        table = self.coefficients(None if ddf == "satterthwaite" and not self.is_linear else ddf)
        fixed = pd.DataFrame(
            {
                "effect": "fixed",
                "group": None,
                "term": list(self._data.x_names),
                "estimate": table["estimate"].to_numpy(),
                "std_error": table["std_error"].to_numpy(),
                "statistic": table["statistic"].to_numpy(),
                "p_value": table.get("p_value", pd.Series(np.nan, table.index)).to_numpy(),
                "conf_low": ci[:, 0],
                "conf_high": ci[:, 1],
            }
        )
        if "df" in table:
            fixed.insert(6, "df", table["df"].to_numpy())
        rows = []
        for _, r in self.VarCorr().to_frame().iterrows():
            single = pd.isna(r["var2"])
            first = "Observation" if pd.isna(r["var1"]) else r["var1"]
            name = f"sd__{first}" if single else f"cor__{first}.{r['var2']}"
            rows.append({"effect": "ran_pars", "group": r["grp"], "term": name, "estimate": r["sdcor"]})
        random = pd.DataFrame(rows).reindex(columns=fixed.columns)
        texts = dict.fromkeys(("effect", "group", "term"), object)
        return pd.concat([fixed.astype(texts), random.astype({**fixed.dtypes.to_dict(), **texts})], ignore_index=True)

    def messages(self) -> list[str]:
        """Notes and warnings about the data and the fit, one sentence each."""
        from .report.summary import messages

        return messages(self)

    def __str__(self) -> str:
        from .report.summary import short_text

        return short_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


def theta_names(design: Design, data: ModelData) -> list[str]:
    """lme4's names of theta."""
    names: list[str] = []
    for term, labels in zip(design.terms, data.terms, strict=True):
        names += term.structure.theta_names(labels.group, labels.names)
    return names


_marginal = jax.jit(marginal, static_argnames=("family", "hessian", "nAGQ"))


def _symmetric_inverse(A: np.ndarray) -> np.ndarray:
    scale = 1.0 / np.sqrt(np.diag(A))
    inverse = np.linalg.inv(A * np.outer(scale, scale)) * np.outer(scale, scale)
    return np.asarray(0.5 * (inverse + inverse.T))
