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

from ._bordered import selected_inverse
from ._control import Control
from ._covariance import cov_to_sdcor
from ._design import Design, factors, linear_predictor
from ._errors import DataError
from ._fit import Estimates, FitStats, Problem, block_diagonal
from ._linalg import eliminate, factorise, penalised, solve, weighted_products
from ._objective import curvature_weights, log_density_constant
from ._pirls import Blocked, Parameters, border, fixed_information, score_u, unspool
from ._precision import x64
from ._quadrature import marginal
from .families import Family

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ._approximation import QuadratureError
    from ._frame import ModelData
    from ._summary import Summary

SINGULAR_TOLERANCE = 1e-4  # lme4's isSingular


class NotSupportedError(NotImplementedError):
    """A question this fit cannot answer, with the reason."""


@partial(jax.jit, static_argnames=("family",))
def _rows(eta: Array, y: Array, weights: Array, phi: Array, family: Family) -> tuple[Array, ...]:
    mu = family.link.inverse(eta)
    try:
        variance, deviance = family.variance(mu, phi), family.deviance_contribution(y, mu, weights, phi)
    except NotImplementedError:
        variance = deviance = jnp.full_like(mu, jnp.nan)
    return mu, family.link.mu_eta(eta), variance, deviance


@partial(jax.jit, static_argnames=("family", "hessian"))
def _pieces(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> tuple[Array, Array, Array]:
    """log|L|^2, R_X'R_X and the working weights at the modes."""
    w, T = working_weights(params, u, design, family, hessian)
    factor = factorise(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
    zero = jnp.zeros_like(w)
    B = border(w, T, design)
    g = score_u(zero, u, T, design)
    rhs = tuple(jnp.concatenate([x[..., None], b], axis=2) for x, b in zip(g, B, strict=True))
    information, _ = fixed_information(w, zero, B, g, solve(factor, rhs, design.plan), design)
    return factor.logdet, information, w


def working_weights(
    params: Parameters, u: Blocked, design: Design, family: Family, hessian: str
) -> tuple[Array, Blocked]:
    T = factors(params.theta, design)
    eta = linear_predictor(unspool(u, T), params.beta, design)
    weights = jnp.asarray(design.weights)
    _, _, w = family.derivatives(jnp.asarray(design.y), eta, weights, params.phi)
    return curvature_weights(w, eta, weights, params, family, hessian), T


@partial(jax.jit, static_argnames=("family", "hessian"))
def _conditional_covariances(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> Blocked:
    """Lambda (L L')^-1 Lambda' per level, (m, k, k) per block."""
    w, T = working_weights(params, u, design, family, hessian)
    blocks = weighted_products(design.z, design.level, design.n_levels, w, design.plan)
    H = penalised(blocks, T, design.plan)
    inverse = selected_inverse(eliminate(H, design.plan), H, design.plan)
    return tuple(jnp.einsum("ij,mjk,lk->mil", t, v, t) for t, v in zip(T, inverse.diagonal, strict=True))


@partial(jax.jit, static_argnames=("family", "hessian"))
def _leverages(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> Array:
    """w_i d(log det of the joint penalised information)/dw_i: the diagonal of the hat matrix."""
    w, T = working_weights(params, u, design, family, hessian)

    def logdet(w: Array) -> Array:
        factor = factorise(weighted_products(design.z, design.level, design.n_levels, w, design.plan), T, design.plan)
        B = border(w, T, design)
        X = jnp.asarray(design.X)
        information = X.T @ (w[:, None] * X)
        for b, s in zip(B, solve(factor, B, design.plan), strict=True):
            information = information - (b[..., :, None] * s[..., None, :]).sum((0, 1))
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
        from ._summary import varcorr_text

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
        names: list[str] = []
        for term, labels in zip(self._design.terms, self._data.terms, strict=True):
            names += term.structure.theta_names(labels.group, labels.names)
        return names

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
        """lme4's isSingular: a diagonal entry of some T below 1e-4."""
        return bool(self.singular_terms)

    @property
    def singular_terms(self) -> list[str]:
        """The terms whose covariance is singular, as written in the formula."""
        texts = self._data.formula_bars
        pairs = zip(self._T, texts, strict=True)
        return list(dict.fromkeys(t for T, t in pairs if (np.abs(np.diag(T)) < SINGULAR_TOLERANCE).any()))

    @property
    def undetermined(self) -> list[str]:
        """Parameters that a flat direction of the deviance moves; empty for an identified model."""
        outside = self.nAGQ > 0 and not self.is_linear
        names = self.theta_names + (list(self._data.x_names) if outside else [])
        names += [f"log({n})" for n in self.family.phi_names]
        return [names[i] for i in self._estimates.ridge]

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
            out = _rows(self.linear_predictor, self._design.y, self._design.weights, self._estimates.phi, self.family)
            mu, slope, variance, deviance = (np.asarray(x) for x in out)
        return mu, slope, variance, deviance

    @property
    def fitted(self) -> pd.Series:
        """Conditional means at the modes, on the response scale (proportions for the binomial)."""
        return pd.Series(self._moments[0].copy(), index=self._data.row_index, name="fitted")

    def residuals(self, type: str | None = None, scaled: bool = False) -> pd.Series:
        """Residuals: "deviance", "pearson", "working" or "response"; definitions as R's glm.

        The default is lme4's: "response" for linear models, else "deviance". `scaled` divides by sigma.
        """
        type = type or ("response" if self.is_linear else "deviance")
        mu, slope, variance, deviance = self._moments
        y, weights = np.asarray(self._design.y), np.asarray(self._design.weights)
        response = y - mu
        if type == "deviance":
            self._need(deviance, "deviance residuals")
            values = np.sign(response) * np.sqrt(np.maximum(deviance, 0.0))
        elif type == "pearson":
            self._need(variance, "Pearson residuals (it has no variance function)")
            values = response * np.sqrt(weights / variance)
        elif type == "working":
            values = response / slope
        elif type == "response":
            values = response
        else:
            raise ValueError(f"residuals type must be 'deviance', 'pearson', 'working' or 'response', got {type!r}")
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
    def _laplace_pieces(self) -> tuple[float, np.ndarray, np.ndarray]:
        with x64():
            logdet, information, w = _pieces(*self._device, self._design, self.family, self._spec.hessian)
            return float(logdet), np.asarray(information), np.asarray(w)

    def vcov(self, full: bool = False, type: str = "hessian") -> pd.DataFrame:
        """Covariance of the estimates.

        Args:
            full: over theta, beta and log-dispersions instead of beta alone.
            type: "hessian" (2 x inverse Hessian of the deviance over all parameters) or "rx"
                ((R_X'R_X)^-1, theta taken as known: lme4's use.hessian=FALSE). nAGQ = 0 has "rx" only,
                and for linear models both are sigma^2 (R_X'R_X)^-1.
        """
        if type not in ("hessian", "rx"):
            raise ValueError(f"vcov type must be 'hessian' or 'rx', got {type!r}")
        if full and self.is_linear:
            raise NotSupportedError("vcov(full=True) is for generalised models; vcov() has the fixed effects")
        names = list(self._data.x_names)
        if not full:
            return pd.DataFrame(self._fixed_covariance(type), names, names)
        if type == "rx":
            raise ValueError("vcov(full=True) needs type='hessian'")
        if self.nAGQ == 0:
            raise NotSupportedError("nAGQ = 0 has no joint covariance of theta and beta; fit with nAGQ = 1")
        labels = self.theta_names + names + [f"log({n})" for n in self.family.phi_names]
        return pd.DataFrame(self._estimates.covariance, labels, labels)

    @property
    def bse(self) -> pd.Series:
        """Standard errors of the fixed effects."""
        return pd.Series(self._standard_errors, index=list(self._data.x_names), name="std_error")

    @cached_property
    def _standard_errors(self) -> np.ndarray:
        V = np.diag(self._fixed_covariance("hessian"))
        return np.sqrt(np.where(V >= 0.0, V, np.nan))

    def _fixed_covariance(self, type: str) -> np.ndarray:
        """(p, p) covariance of the fixed effects; nAGQ = 0 has "rx" only."""
        if self._estimates.RX is not None:
            half = np.linalg.inv(self._estimates.RX)
            return self.sigma**2 * half @ half.T
        if type == "rx" or self.nAGQ == 0:
            return _symmetric_inverse(self._laplace_pieces[1])
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
                from ._ddf import coefficient_table

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

    def confint(self, method: str = "wald", level: float = 0.95) -> pd.DataFrame:
        """Wald intervals of the fixed effects, columns named as R's (``2.5 %``, ``97.5 %``)."""
        if method.lower() != "wald":
            raise ValueError(f"confint method {method!r} is not available; use 'wald'")
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must be between 0 and 1, got {level!r}")
        half = NormalDist().inv_cdf(0.5 + 0.5 * level) * self.bse
        tail = 50.0 * (1.0 - level)
        return pd.DataFrame({f"{tail:g} %": self.fixef - half, f"{100.0 - tail:g} %": self.fixef + half})

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
                blocks = _conditional_covariances(*self._device, self._design, self.family, self._spec.hessian)
            for group, indices in self._by_group().items():
                terms = [self._design.terms[i] for i in indices]
                pick = np.concatenate([np.arange(t.first, t.first + t.structure.k) for t in terms])
                cov = np.asarray(blocks[terms[0].block])[:, pick][:, :, pick]
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
    ) -> np.ndarray:
        """Predictions for the data of the fit or for new rows.

        Args:
            newdata: table with the model's columns (the response is not needed); None for the fit's rows.
            re_form: None uses all random effects, "NA" none, "~(1 | g)" those of the terms named.
            type: "link" or "response" (conditional means; not averaged over random effects).
            allow_new_levels: predict unseen levels of a grouping factor with random effects 0.
            offset: (n_new,) in place of an offset array of the fit.

        Returns:
            (n,) or (n_new,).

        Raises:
            DataError: a column is missing, or new levels (named) without allow_new_levels.
        """
        which = self._terms_of(re_form)
        if newdata is None:
            eta = np.asarray(self._design.offset + np.asarray(self._design.X) @ self._estimates.beta)
            eta = eta + self._random_part(which)
        else:
            X, extra = self._data.matrix_for(newdata, offset)
            eta = X @ self._estimates.beta + (0.0 if extra is None else extra)
            if which:
                new = self._data.terms_for(newdata)
                for i in which:
                    unknown = new[i].unknown
                    if len(unknown) and not allow_new_levels:
                        shown = ", ".join(repr(str(v)) for v in unknown[:5]) + (", ..." if len(unknown) > 5 else "")
                        raise DataError(
                            f"newdata has levels of {self._data.terms[i].group!r} that were not in the fit: {shown}; "
                            "say allow_new_levels=True to predict them with random effects of 0"
                        )
                    level = np.asarray(new[i].level)
                    effects = np.where((level >= 0)[:, None], self._b[i][np.maximum(level, 0)], 0.0)
                    eta = eta + np.einsum("nk,nk->n", new[i].z, effects)
        if type == "link":
            return np.asarray(eta)
        if type == "response":
            with x64():
                return np.asarray(self.family.link.inverse(jnp.asarray(eta)))
        raise ValueError(f"predict type must be 'link' or 'response', got {type!r}")

    def _terms_of(self, re_form: str | None) -> list[int]:
        if re_form is None:
            return list(range(len(self._b)))
        if re_form in ("NA", "~0", "~ 0"):
            return []
        from ._parse import parse

        wanted = parse(re_form if re_form.lstrip().startswith("~") else "~" + re_form)
        out = []
        for bar in wanted.bars:
            match = [i for i, own in enumerate(self._data.formula_bars) if own == str(bar)]
            if not match:
                have = ", ".join(self._data.formula_bars)
                raise ValueError(f"re_form term {bar} is not in the model; it has {have}")
            out += match
        return sorted(set(out))

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
        from ._approximation import quadrature_error

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
        from ._approximation import integrands

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
        from ._approximation import plot_integrands

        return plot_integrands(self, kind, axis, levels, z)

    @cached_property
    def _approximation_note(self) -> str:
        from ._approximation import notable

        return notable(self)

    # ---- lme4's getME, devcomp ---------------------------------------------------------------------
    def hatvalues(self) -> pd.Series:
        """Leverages: diagonal of W^1/2 [Z Lambda, X] M^-1 [Z Lambda, X]' W^1/2 with *working* weights W.

        Each lies in [0, 1]; their sum is the effective number of parameters at fixed theta.
        """
        with x64():
            h = _leverages(*self._device, self._design, self.family, self._spec.hessian)
        return pd.Series(np.asarray(h), index=self._data.row_index, name="hat")

    def devcomp(self) -> dict[str, float]:
        """Components of the deviance under lme4's names: ldL2, ldRX2, wrss, ussq, pwrss, drsum, dev."""
        logdet, information, w = self._laplace_pieces
        mu, slope, variance, deviance = self._moments
        ussq = float(sum((u**2).sum() for u in self._estimates.u))
        wrss = float((np.asarray(self._design.weights) / variance * (np.asarray(self._design.y) - mu) ** 2).sum())
        parts = {
            "ldL2": logdet,
            "ldRX2": float(np.linalg.slogdet(information)[1]),
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
        """lme4's getME: X, Z (dense, n x q, columns term by term, level by level), Lambda, theta, beta, b, u,
        y, mu, eta, weights, offset, n, p, q, theta_names, T (list), flist, cnms, devcomp, RX, L (dense
        lower factor of Lambda'Z'WZ Lambda + I in Z's order)."""
        simple: dict[str, Callable[[], Any]] = {
            "X": lambda: pd.DataFrame(self._design.X, self._data.row_index, list(self._data.x_names)),
            "y": lambda: np.asarray(self._design.y).copy(),
            "mu": lambda: self._moments[0].copy(),
            "eta": lambda: self.linear_predictor.copy(),
            "theta": lambda: pd.Series(self.theta, index=self.theta_names),
            "beta": lambda: self.beta,
            "fixef": lambda: self.fixef,
            "u": lambda: self.u,
            "b": lambda: np.concatenate([b.reshape(-1) for b in self._b]),
            "weights": lambda: np.asarray(self._design.weights).copy(),
            "offset": lambda: np.asarray(self._design.offset).copy(),
            "sigma": lambda: self.sigma,
            "n": lambda: self.nobs,
            "p": lambda: self._design.p,
            "q": lambda: self._design.q,
            "Z": self._dense_Z,
            "Lambda": self._dense_Lambda,
            "Tlist": lambda: [T.copy() for T in self._T],
            "L": self._dense_L,
            "RX": lambda: np.linalg.cholesky(self._laplace_pieces[1]).T,
            "flist": lambda: pd.DataFrame(
                {t.group: np.asarray(t.levels)[t.level] for t in self._data.terms}, index=self._data.row_index
            ),
            "cnms": lambda: [(t.group, t.names) for t in self._data.terms],
            "devcomp": self.devcomp,
            "n_rtrms": lambda: len(self._data.terms),
            "n_rfacs": lambda: len(self.ngrps),
        }
        if name not in simple:
            from ._control import unknown_argument

            raise ValueError(str(unknown_argument(name, simple, "getME")))
        return simple[name]()

    def _dense_Z(self) -> np.ndarray:
        parts = []
        for labels in self._data.terms:
            m, k = len(labels.levels), len(labels.names)
            Z = np.zeros((self.nobs, m, k))
            Z[np.arange(self.nobs), labels.level] = labels.z
            parts.append(Z.reshape(self.nobs, m * k))
        return np.concatenate(parts, axis=1)

    def _dense_Lambda(self) -> np.ndarray:
        pairs = zip(self._data.terms, self._T, strict=True)
        return block_diagonal([np.kron(np.eye(len(t.levels)), T) for t, T in pairs])

    def _dense_L(self) -> np.ndarray:
        ZL = self._dense_Z() @ self._dense_Lambda()
        w = self._laplace_pieces[2]
        return np.asarray(np.linalg.cholesky(ZL.T @ (w[:, None] * ZL) + np.eye(ZL.shape[1])))

    def deviance_function(self) -> Callable[..., float]:
        """lme4's as.function: (theta, beta) -> minus twice the log-likelihood of this model and data.

        For a linear model it is theta -> what was minimised, beta and sigma profiled out.
        """
        if self.is_linear:
            from ._pls import lmm_deviance

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
            newresp: (n,) response on the scale of the fit's y: counts, 0/1, or proportions with the
                fit's trials.
        """
        from ._glmer import refit

        return refit(self, newresp)

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
        from ._summary import Summary

        return Summary(self, correlation, ddf)

    def tidy(self, level: float = 0.95, ddf: str | None = None) -> pd.DataFrame:
        """broom.mixed's tidy table: effect, group, term, estimate, std_error, statistic, p_value, interval.

        A linear model has p-values if `ddf` is given, see `coefficients`; its intervals are normal.
        """
        ci = self.confint(level=level).to_numpy()
        table = self.coefficients(ddf)
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
        return pd.concat([fixed.astype({"group": object}), random.astype(fixed.dtypes.to_dict())], ignore_index=True)

    def messages(self) -> list[str]:
        """Notes and warnings about the data and the fit, one sentence each."""
        from ._summary import messages

        return messages(self)

    def __str__(self) -> str:
        from ._summary import short_text

        return short_text(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()


_marginal = jax.jit(marginal, static_argnames=("family", "hessian", "nAGQ"))


def _symmetric_inverse(A: np.ndarray) -> np.ndarray:
    scale = 1.0 / np.sqrt(np.diag(A))
    inverse = np.linalg.inv(A * np.outer(scale, scale)) * np.outer(scale, scale)
    return np.asarray(0.5 * (inverse + inverse.T))
