"""One design fitted here, set against R's answer, and what the difference is.

Two optima are compared by evaluating: where one side's objective is lower, both functions are taken at both points
(this package's at R's parameters here; R's at ours by ``answers.R evaluate``), so that a search that stopped early is
told from a wrong objective.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

import glmmjax as gj

from .designs import Design

#: Log-likelihoods: searches end within 1e-6 of the optimum on both sides, PIRLS in R within 1e-7 of the mode.
LOGLIK = 1e-5
#: relative to |logLik|, for responses on scales that make it large
LOGLIK_RELATIVE = 2e-9
#: Estimates, in standard errors: a log-likelihood 1e-5 below its maximum is sqrt(2e-5) = 4.5e-3 of them away.
ESTIMATE = 1e-2
#: Standard errors, relative: R's are differences of an objective with noise of 1e-9, ours of an exact gradient.
ERROR = 5e-3
#: Standard deviations of random effects, relative to the largest of the term (or to sigma): flat near 0.
DEVIATION = 2e-2

#: The sqrt link as lme4 has it: linear predictors of either sign. This package integrates over its range, eta > 0.
BOTH_SIGNS = gj.links.Link("square", inverse=jnp.square, link=jnp.sqrt)

AGREES = "agrees"
R_FAILED = "R failed"
R_WORSE = "R worse"
R_ERRORS = "R's standard errors are off"
R_ROUGH = "R's objective is rough"
R_BRANCH = "R integrates over both branches of the link"
BOTH_REFUSE = "both refuse"
SINGULAR = "singular in one only"
SEPARATED = "separated, said here"
UNDETERMINED = "not determined, said here"
OURS_SAYS = "ours worse, says not converged"
FALSE_ALARM = "agrees, but says not converged"
OURS_WORSE = "ours worse"
OURS_FAILED = "ours failed"
OBJECTIVE = "objectives differ"
ESTIMATES = "estimates differ"
NAMES = "names differ"
#: outcomes that need no explanation beyond themselves; all others count as faults here
EXPLAINED = (AGREES, R_FAILED, R_WORSE, R_ERRORS, R_ROUGH, R_BRANCH, BOTH_REFUSE, SINGULAR, SEPARATED, UNDETERMINED)


@dataclass(frozen=True)
class Fit:
    """What a fit of this package says of a design; `error` is set where it raised."""

    loglik: float = np.nan
    names: tuple[str, ...] = ()
    fixef: np.ndarray = field(default_factory=lambda: np.empty(0))
    se: np.ndarray = field(default_factory=lambda: np.empty(0))
    theta: np.ndarray = field(default_factory=lambda: np.empty(0))
    phi: np.ndarray = field(default_factory=lambda: np.empty(0))
    sigma: float = 1.0
    cov: tuple[np.ndarray, ...] = ()
    groups: tuple[str, ...] = ()
    singular: bool = False
    converged: bool = False
    undetermined: tuple[str, ...] = ()
    evaluations: int = 0
    nobs: int = 0
    messages: tuple[str, ...] = ()
    covariance: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """An outcome and the numbers that show it.

    Attributes:
        outcome: one of the constants of this module.
        difference: log-likelihood here minus R's.
        ours_at_r: log-likelihood of this package's objective at R's parameters, where it was needed.
        detail: one line for tables.
    """

    outcome: str
    difference: float = np.nan
    ours_at_r: float | None = None
    detail: str = ""


def arguments(design: Design) -> dict[str, Any]:
    """Keyword arguments of `gj.lmer` or `gj.glmer` that mean what R is asked for."""
    asked: dict[str, Any] = {"weights": design.weights, "offset": design.offset}
    if design.family == "gaussian":
        return asked | {"REML": design.structure.REML}
    if design.family.startswith("negative.binomial"):
        asked["hessian"] = "expected"  # lme4's Laplace approximation
    return asked | {"family": design.family, "nAGQ": design.structure.nAGQ}


def fit(design: Design) -> Fit:
    """The design fitted by this package."""
    function = gj.lmer if design.family == "gaussian" else gj.glmer
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            m = function(design.formula, design.data, **arguments(design))
            blocks = m.VarCorr()
            fixef, se = m.fixef, np.asarray(m.bse)
            return Fit(
                m.loglik,
                tuple(map(str, fixef.index)),
                np.asarray(fixef),
                se,
                np.asarray(m.theta),
                np.asarray(m.phi, float).reshape(-1),
                m.sigma,
                tuple(np.asarray(b.cov) for b in blocks),
                tuple(b.group for b in blocks),
                m.is_singular,
                m.converged,
                tuple(m.undetermined),
                m.fit_stats.evaluations,
                m.nobs,
                tuple(dict.fromkeys([*m.messages(), *(str(w.message) for w in heard)])),
                np.asarray(m.vcov(full=True)) if not m.is_linear and m.nAGQ else np.empty((0, 0)),
            )
        except Exception as error:  # anything is a finding
            return Fit(error=f"{type(error).__name__}: {error}")


def compare(design: Design, answer: dict[str, Any], ours: Fit) -> Comparison:
    """R's answer (a line of answers.R) against a fit of this package."""
    if "error" in answer:
        here = ours.error or ("converged here" if ours.converged else "not converged here either")
        return Comparison(BOTH_REFUSE if ours.error else R_FAILED, detail=f"{answer['error'][:80]}; {here[:80]}")
    if ours.error:
        return Comparison(OURS_FAILED, detail=ours.error[:160])
    order = _order(answer["names"], list(ours.names))
    if order is None and set(answer["names"]) > set(ours.names) and ours.loglik >= answer["logLik"] - LOGLIK:
        return Comparison(R_FAILED, ours.loglik - answer["logLik"], detail="glmmTMB keeps aliased columns")
    if order is None or ours.nobs != answer["nobs"]:
        return Comparison(NAMES, detail=f"{answer['names']} {answer['nobs']}, here {list(ours.names)} {ours.nobs}")
    difference = ours.loglik - answer["logLik"]
    tolerance = LOGLIK + LOGLIK_RELATIVE * abs(answer["logLik"])
    if not abs(difference) <= tolerance:
        if design.family.startswith("negative") and design.weights is not None:
            return Comparison(R_FAILED, difference, detail="lme4's weights of this family do not repeat rows")
        return _different_optima(design, answer, ours, difference, tolerance, order)
    theirs, se, own = numbers(answer["fixef"]), numbers(answer["se"]), ours.se[order]
    unit = np.where(np.isfinite(own) & (own > 0.0), own, se)
    off = np.abs(ours.fixef[order] - theirs) / unit
    away = np.isposinf(own)  # said to run off: where R stops is arbitrary
    if not np.all((off <= ESTIMATE) | away):
        return Comparison(ESTIMATES, difference, detail=f"fixed effects, in standard errors {_shown(off)}")
    worst = _worst_covariance(design, answer, ours)
    if not worst <= DEVIATION and not set(ours.undetermined) - set(ours.names):
        return Comparison(ESTIMATES, difference, detail=f"standard deviations of random effects, {worst:.2g}")
    if not np.all((np.abs(own / se - 1.0) <= ERROR) | away):
        return _different_errors(design, ours, se, difference, order)
    if not ours.converged:
        return Comparison(FALSE_ALARM, difference, detail=f"{ours.evaluations} evaluations")
    if away.any():
        return Comparison(SEPARATED, difference, detail=", ".join(np.asarray(answer["names"])[away]))
    if worst > DEVIATION:
        return Comparison(UNDETERMINED, difference, detail=", ".join(ours.undetermined))
    if ours.singular != answer["singular"]:
        return Comparison(SINGULAR, difference, detail="here" if ours.singular else "in R")
    return Comparison(AGREES, difference)


def numbers(values: list[Any]) -> np.ndarray:
    """A list of JSON as floats, null and "NA" as NaN."""
    return np.array([np.nan if v is None or isinstance(v, str) else float(v) for v in values])


def objective_at(design: Design, theta: Any, beta: Any, phi: Any = None, **other: Any) -> float:
    """This package's log-likelihood (or REML criterion / -2) at given parameters, theta as lme4 has it.

    Args:
        other: arguments of the fit other than the design's.
    """
    return -0.5 * _deviance_function(design, **other)(_point(design, theta, beta, phi))


def _deviance_function(design: Design, **other: Any) -> Any:
    setup = gj.lmer_setup if design.family == "gaussian" else gj.glmer_setup
    return gj.deviance_function(setup(design.formula, design.data, **(arguments(design) | other)))


def _point(design: Design, theta: Any, beta: Any, phi: Any) -> np.ndarray:
    parts = [np.asarray(theta, float)]
    if design.family != "gaussian" and design.structure.nAGQ > 0:
        parts.append(np.asarray(beta, float))
    if phi is not None:
        parts.append(np.log(np.atleast_1d(np.asarray(phi, float))))
    return np.concatenate(parts)


def r_parameters(answer: dict[str, Any], ours: Fit) -> tuple[np.ndarray, np.ndarray, Any]:
    """R's theta, beta and phi as this package orders them; theta of glmmTMB from its covariances."""
    order = _order(answer["names"], list(ours.names))
    assert order is not None
    beta = np.empty(len(order))
    beta[order] = numbers(answer["fixef"])
    if answer.get("theta") is not None:
        return numbers(answer["theta"]), beta, None
    theta = []
    for cov in _covariances(answer, ours):
        values, vectors = np.linalg.eigh(cov)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        T = np.linalg.qr(root.T)[1].T
        T = T * np.where(np.diag(T) < 0.0, -1.0, 1.0)
        theta.append(T.T[np.triu_indices(len(T))])
    return np.concatenate(theta), beta, answer["phi"]


def _different_optima(
    design: Design, answer: dict[str, Any], ours: Fit, difference: float, tolerance: float, order: np.ndarray
) -> Comparison:
    theta, beta, phi = r_parameters(answer, ours)
    at = objective_at(design, theta, beta, phi)
    if not np.isfinite(at) and phi is None and design.structure.nAGQ:  # PIRLS from the modes of the fit instead of 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = gj.glmer(design.formula, design.data, **arguments(design))
        at = -0.5 * model.deviance_function()(theta, beta)
    same = abs(at - answer["logLik"]) <= 10.0 * tolerance
    detail = f"here {ours.loglik:.7f}, R {answer['logLik']:.7f}, here at R's {at:.7f}"
    if difference > 0.0:
        if not at >= answer["logLik"] - 10.0 * tolerance:
            return Comparison(OBJECTIVE, difference, at, detail)
        # R's value is not above the Laplace approximation at its own parameters: it stopped early, or its PIRLS did
        return Comparison(R_WORSE if at < ours.loglik - 0.5 * tolerance else R_ROUGH, difference, at, detail)
    if not same:
        if design.family == "poisson(sqrt)" and design.structure.nAGQ > 1:
            both = objective_at(design, theta, beta, family=gj.families.Poisson(BOTH_SIGNS))
            if abs(both - answer["logLik"]) <= 10.0 * tolerance:
                return Comparison(R_BRANCH, difference, at, f"{detail}, over both {both:.7f}")
        return Comparison(OBJECTIVE, difference, at, detail)
    if at <= ours.loglik + 0.1 * tolerance:  # R's value at its own point is what differs, by its PIRLS
        return Comparison(R_ROUGH, difference, at, detail)
    if not np.isfinite(ours.se).all() and ours.converged:
        return Comparison(SEPARATED, difference, at, detail)
    return Comparison(OURS_WORSE if ours.converged else OURS_SAYS, difference, at, detail)


def _different_errors(design: Design, ours: Fit, se: np.ndarray, difference: float, order: np.ndarray) -> Comparison:
    """Standard errors differ: those of a Hessian by differences of the objective itself decide."""
    own = ours.se[order]
    ratio = own / se - 1.0
    detail = f"ours/R - 1 = {_shown(ratio)}"
    if design.family == "gaussian" or design.structure.nAGQ == 0:
        return Comparison(ESTIMATES, difference, detail="standard errors, " + detail)
    third = differenced_errors(design, ours)[order]
    off = np.where(np.isposinf(own), 0.0, np.abs(own / third - 1.0))
    detail += f"; ours/differences - 1 = {off.max():.2g}"
    return Comparison(R_ERRORS if off.max() <= ERROR else ESTIMATES, difference, detail="standard errors, " + detail)


def differenced_errors(design: Design, ours: Fit) -> np.ndarray:
    """(p,) standard errors of beta from second differences of the deviance, directions without curvature left out."""
    f = _deviance_function(design)
    x = _point(design, ours.theta, ours.fixef, ours.phi if ours.phi.size else None)
    t, p, k = ours.theta.size, ours.fixef.size, x.size
    # coordinates to begin with are those of the covariance that is judged: far from 0 an intercept and a slope trade
    # places, and differences need the directions apart; were it wrong, the Hessian in them would not be 2. What runs
    # off to infinity stays where it is.
    if not ours.covariance.size:
        return np.full(p, np.nan)
    there = np.isfinite(np.diag(ours.covariance))
    values, vectors = np.linalg.eigh(ours.covariance[np.ix_(there, there)])
    basis = np.zeros((k, values.size))
    basis[there] = vectors * np.sqrt(np.maximum(values, 1e-12 * values.max()))
    k = values.size

    def hessian(h: float) -> np.ndarray:
        E, H, f0 = h * basis.T, np.empty((k, k)), f(x)
        up, down = [f(x + e) for e in E], [f(x - e) for e in E]
        for i in range(k):
            H[i, i] = (up[i] - 2.0 * f0 + down[i]) / h**2
            for j in range(i):
                a, b = E[i], E[j]
                H[i, j] = (f(x + a + b) - f(x + a - b) - f(x - a + b) + f(x - a - b)) / (4.0 * h**2)
                H[j, i] = H[i, j]
        return H

    for h in (1e-3, 1e-2, 0.1):
        H = hessian(h)
        if not np.isfinite(H).all():
            return np.full(p, np.nan)
        values, vectors = np.linalg.eigh(H)
        basis = basis @ (vectors / np.sqrt(np.clip(values / 2.0, 1e-3, np.inf)))
    values, vectors = np.linalg.eigh((4.0 * hessian(0.1) - hessian(0.2)) / 3.0)
    use = values > 0.1
    V = 2.0 * (vectors[:, use] / values[use]) @ vectors[:, use].T
    found: np.ndarray = np.sqrt(np.diag(basis @ V @ basis.T))[t : t + p]
    return found


def _order(theirs: list[str], ours: list[str]) -> np.ndarray | None:
    """Where R's coefficients are among ours; None where the names differ."""
    plain = [re.sub(r"\s+", "", name) for name in ours]
    wanted = [re.sub(r"\s+", "", name) for name in theirs]
    if sorted(plain) != sorted(wanted):
        return None
    return np.array([plain.index(name) for name in wanted], int)


def _covariances(answer: dict[str, Any], ours: Fit) -> list[np.ndarray]:
    """R's covariances of random effects in our order of terms (the k-th of a group is the k-th)."""
    theirs: dict[str, list[np.ndarray]] = {}
    for block in answer["cov"]:
        k = len(block["names"])
        values = np.asarray(block["values"], object).reshape(k, k)
        theirs.setdefault(re.sub(r"\.\d+$", "", block["group"]), []).append(
            np.array([[np.nan if isinstance(v, str) or v is None else float(v) for v in row] for row in values])
        )
    return [theirs[re.sub(r"\.\d+$", "", g)].pop(0) for g in ours.groups]


def _worst_covariance(design: Design, answer: dict[str, Any], ours: Fit) -> float:
    """Largest difference of the standard deviations that each grouping factor gives to linear predictors.

    These and the covariances of neighbouring rows do not depend on where zero is on an axis; terms that are the same
    but for it (an intercept beside a slope far from 0) may trade their variances. Relative to the larger one and, as
    the log-likelihood is flat near 0, to a tenth of sigma.
    """
    made = (gj.lmer_setup if design.family == "gaussian" else gj.glmer_setup)(
        design.formula, design.data, **arguments(design)
    ).design
    floor, worst = (0.1 * ours.sigma) ** 2, 0.0
    theirs = _covariances(answer, ours)
    for block, z in enumerate(np.asarray(z) for z in made.z):
        both = np.zeros((2, z.shape[1], z.shape[1]))
        for term, *pair in zip(made.terms, theirs, ours.cov, strict=True):
            if term.block == block:
                both[:, term.columns, term.columns] = pair
        own = np.einsum("ni,sij,nj->sn", z, both, z)
        near = np.einsum("ni,sij,nj->sn", z[:-1], both, z[1:])
        unit = np.maximum(own.max(axis=0), floor)
        worst = max(worst, float((np.abs(own[0] - own[1]) / unit).max()))
        worst = max(worst, float((np.abs(near[0] - near[1]) / np.sqrt(unit[:-1] * unit[1:])).max()))
    return worst / 2.0


def _shown(values: Any) -> str:
    return ", ".join(f"{v:.2g}" if isinstance(v, float) else str(v) for v in values)
