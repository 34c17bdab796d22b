"""A fitted mixed model: everything it answers, in NumPy and pandas.

Nothing here is traced except three small programs (per-row means, and two that read variances off the
derivative of a log-determinant), compiled when first asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

from . import inference
from ._arguments import checked, choice
from ._errors import NotSupportedError as NotSupportedError
from ._methods import Method
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
    from .formula.frame import ModelData
    from .inference.influence import Sensitivity
    from .inference.profile import Profile
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
            from .inference.profile import traced

            return traced(self, None, half_width, half_width).confint(level)
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

    sdcor = Method(lambda: inference.likelihood.sdcor_table)
    profile = Method(lambda: inference.profile.profile)

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

    rePCA = Method(lambda: inference.summaries.re_pca)
    icc = Method(lambda: inference.summaries.icc)
    r2 = Method(lambda: inference.summaries.r2)

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
    predict = Method(lambda: inference.predict.predict)
    wald_test = Method(lambda: inference.wald.wald_test)
    score_test = Method(lambda: inference.score.score_test)

    # ---- simulation --------------------------------------------------------------------------------
    simulate = Method(lambda: inference.simulate.simulate_model)
    bootstrap = Method(lambda: inference.bootstrap.bootstrap)
    marginal_means = Method(lambda: inference.means.marginal_means)
    marginal_coefficients = Method(lambda: inference.means.marginal_coefficients)
    vif = Method(lambda: inference.summaries.vif)

    # ---- influence ---------------------------------------------------------------------------------
    @cached_property
    def _sensitivity(self) -> Sensitivity:
        from .inference.influence import Sensitivity

        return Sensitivity(self)

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

    getME = Method(lambda: inference.getme.get_me)

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

    refit_many = Method(lambda: inference.bootstrap.refit_many)

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
