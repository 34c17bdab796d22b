"""The families: binomial, Poisson, Gaussian, negative binomial, and a user's own; `get` finds them by R's names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import gammaln, xlogy
from numpy import ndarray
from numpy.random import Generator

from . import _arguments as arguments
from . import links
from ._densities import log1p_less, log_rising, product, saturation
from ._errors import DataError, NotSupportedError
from ._family import Family as Family
from ._family import first_bad, offered
from .compiling.digest import contents
from .links import Link

#: log of the largest dispersion that log densities are evaluated at, where a family with a limit has reached it
LOG_PHI_MAX = 0.5 * float(np.log(np.finfo(float).max))


def most_log_phi(dtype: Any) -> float:
    """`LOG_PHI_MAX` of a precision."""
    return 0.5 * float(np.log(float(jnp.finfo(dtype).max)))


def dispersions(log_phi: Array) -> Array:
    """exp(log_phi), held finite: its derivative is 0 at infinity, and not NaN."""
    most = most_log_phi(log_phi.dtype)
    return jnp.exp(jnp.where(log_phi < most, log_phi, most))


def reported(log_phi: ndarray) -> ndarray:
    """Dispersions as estimates have them: infinite from `LOG_PHI_MAX` on."""
    finite: ndarray = np.exp(np.minimum(log_phi, LOG_PHI_MAX))
    return np.where(log_phi < LOG_PHI_MAX, finite, np.inf)


def log_of(phi: ndarray) -> ndarray:
    """The inverse of `reported`."""
    return np.minimum(np.log(phi), LOG_PHI_MAX)


@dataclass(frozen=True)
class Binomial(Family):
    """Binomial proportions y with `weights` trials; y in {0, 1} for binary data.

    Links: logit, probit, cloglog, cauchit, log, or any `Link` into (0, 1).
    """

    link: Link = links.logit
    name: ClassVar[str] = "binomial"
    discrete: ClassVar[bool | None] = True
    trials: ClassVar[bool | None] = True
    support: ClassVar[tuple[float, float]] = (0.0, 1.0)
    default_hessian: ClassVar[str] = "expected"
    links_offered: ClassVar[tuple[str, ...]] = ("logit", "probit", "cloglog", "cauchit", "log")

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.logit:
            return weights * (y * eta - links.softplus(eta))
        log_mu, log1m_mu = self.link.log_mu(eta), self.link.log1m_mu(eta)
        return weights * (product(y, log_mu) + product(1.0 - y, log1m_mu))

    def in_range(self, y: Array, eta: Array) -> Array:
        if self.link is links.log:
            return (eta < -links.EDGE) | (y == 1.0)
        return jnp.ones_like(eta, bool)

    def constant(self, y: Array, weights: Array) -> Array:
        successes = weights * y
        # together: the program for log gamma is long
        trials, ones, zeros = gammaln(jnp.stack([weights, successes, weights - successes]) + 1.0)
        return trials - ones - zeros

    @property
    def canonical(self) -> bool:
        return self.link is links.logit

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.logit:
            mu = links.logistic(eta)
            return weights * mu * (1.0 - mu)
        # mu'^2 / (mu (1 - mu)) as the product of two slopes that stay finite where mu rounds to 0 or 1
        ones = jnp.ones_like(eta)
        _, slope = jax.jvp(self.link.log_mu, (eta,), (ones,))
        _, slope1m = jax.jvp(self.link.log1m_mu, (eta,), (ones,))
        return -weights * slope * slope1m

    def check_response(self, y: ndarray, weights: ndarray | None, name: str, labels: Any) -> list[str]:
        why = (
            ", outside [0, 1]: binomial responses are 0/1, a two-level factor, cbind(successes, failures) or a "
            "proportion with weights = trials; measurements have family gaussian, counts poisson"
        )
        self.refuse(y, (y < 0.0) | (y > 1.0), name, labels, why)
        trials = np.ones_like(y) if weights is None else weights
        successes = y * trials
        off = np.abs(successes - np.rint(successes)) > 1e-6 * np.maximum(1.0, trials)
        if off.any():
            if weights is None:
                raise DataError(
                    f"response {name} has proportions such as {y[off][0]:g} ({first_bad(off, labels)}) but no "
                    "numbers of trials: give them by weights=, or use cbind(successes, failures)"
                )
            return [
                f"{int(off.sum())} rows have a non-integer number of successes (first: {first_bad(off, labels)}); "
                "the log density is continued to non-integers by gamma functions"
            ]
        return []

    def ends(self, y: ndarray) -> ndarray | None:
        direction = self.link.direction(*self.support)
        if not direction:
            return None
        # means of the log link end at eta = 0, where the likelihood of successes has a slope
        successes = 0 if self.link is links.log else direction
        return np.where(y == 1.0, successes, np.where(y == 0.0, -direction, 0)).astype(np.int8)

    def mustart(self, y: Array, weights: Array) -> Array:
        return (weights * y + 0.5) / (weights + 1.0)

    def variance(self, mu: Array, phi: Array) -> Array:
        return mu * (1.0 - mu)

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        fit = xlogy(y, mu) + jax.scipy.special.xlog1py(1.0 - y, -mu)
        full = xlogy(y, y) + jax.scipy.special.xlog1py(1.0 - y, -y)
        return 2.0 * weights * (full - fit)

    def simulate(self, rng: Generator, eta: ndarray, weights: ndarray, phi: ndarray, sigma: float = 1.0) -> ndarray:
        trials = np.rint(weights)
        if (np.abs(weights - trials) > 1e-8 * np.maximum(1.0, trials)).any():
            raise NotImplementedError("some numbers of trials (weights) are not whole: no successes can be drawn")
        return rng.binomial(trials.astype(np.int64)[:, None], self._mean_within(eta))

    def distribution(self, mu: ndarray, weights: ndarray, phi: ndarray) -> Any:
        from scipy import stats

        return stats.binom(np.rint(weights), mu)

    def latent_variance(self, mean: Callable[[], float], phi: ndarray, sigma: float) -> float | None:
        return {"logit": np.pi**2 / 3.0, "probit": 1.0, "cloglog": np.pi**2 / 6.0}.get(self.link.name)


@dataclass(frozen=True)
class _Counts(Family):
    """Counts: 0, 1, 2, ..."""

    #: the family in messages
    called: ClassVar[str]
    discrete: ClassVar[bool | None] = True
    support: ClassVar[tuple[float, float]] = (0.0, math.inf)
    links_offered: ClassVar[tuple[str, ...]] = ("log", "sqrt", "identity")

    def check_response(self, y: ndarray, weights: ndarray | None, name: str, labels: Any) -> list[str]:
        self.refuse(y, y < 0.0, name, labels, f": a {self.called} response cannot be negative")
        why = f": a {self.called} response must be a count; model rates with counts and offset(log(exposure))"
        self.refuse(y, np.abs(y - np.rint(y)) > 1e-7 * np.maximum(1.0, y), name, labels, why)
        return []

    def ends(self, y: ndarray) -> ndarray | None:
        """A count of 0 wants the smallest mean."""
        direction = self.link.direction(*self.support)
        return np.where(y == 0.0, -direction, 0).astype(np.int8) if direction else None

    def distribution(self, mu: ndarray, weights: ndarray, phi: ndarray) -> Any:
        if (weights != 1.0).any():
            raise NotSupportedError(
                f"weights multiply the log density of the {self.name} family, so that the counts have no distribution"
            )
        from scipy import stats

        return stats.poisson(mu)


@dataclass(frozen=True)
class Poisson(_Counts):
    """Poisson counts. Links: log, sqrt, identity, or any `Link` into (0, inf)."""

    link: Link = links.log
    name: ClassVar[str] = "poisson"
    called: ClassVar[str] = "Poisson"
    default_hessian: ClassVar[str] = "expected"

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.log:
            return weights * (y * eta - links.exp_extended(eta))
        mu = self.link.inverse(eta)
        value = product(y, self.link.log_mu(eta)) - mu
        if self.link is links.identity:  # a steep parabola holds the mean of zero counts at zero
            value = value - 0.5 * (jnp.minimum(eta, 0.0) / links.EDGE) ** 2
        elif self.link is not links.sqrt:
            # a mean outside (0, inf) has density 0: PIRLS then halves its step
            value = jnp.where((mu >= 0.0) & ~jnp.isnan(value), value, -jnp.inf)
        return weights * value

    def in_range(self, y: Array, eta: Array) -> Array:
        if self.link is links.sqrt:
            return (eta > links.EDGE) | (y == 0.0)
        if self.link is links.identity:
            return jnp.where(y > 0.0, eta > links.EDGE, eta >= 0.0)
        if self.link is links.log:
            return eta < links.EXP_RANGE
        return jnp.ones_like(eta, bool)

    def constant(self, y: Array, weights: Array) -> Array:
        return -weights * gammaln(y + 1.0)

    @property
    def canonical(self) -> bool:
        return self.link is links.log

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.log:
            return weights * links.exp_extended(eta)
        if self.link is links.sqrt:
            return 4.0 * weights
        mu, slope = jax.jvp(self.link.inverse, (eta,), (jnp.ones_like(eta),))
        return weights * slope * slope / mu

    def mustart(self, y: Array, weights: Array) -> Array:
        return y + 0.1

    def variance(self, mu: Array, phi: Array) -> Array:
        return mu

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        return 2.0 * weights * (xlogy(y, y) - xlogy(y, mu) - (y - mu))

    def simulate(self, rng: Generator, eta: ndarray, weights: ndarray, phi: ndarray, sigma: float = 1.0) -> ndarray:
        self._unweighted(weights)
        return rng.poisson(self._mean_within(eta))

    def latent_variance(self, mean: Callable[[], float], phi: ndarray, sigma: float) -> float | None:
        if self.link.name == "sqrt":
            return 0.25
        return float(np.log1p(1.0 / mean())) if self.link.name == "log" else None


@dataclass(frozen=True)
class Gaussian(Family):
    """Gaussian responses with identity link: the linear mixed model, its scale relative to sigma.

    Densities are those at sigma = 1; `glmmjax.lmer` profiles sigma out. `weights` are precision weights.
    """

    link: Link = links.identity
    name: ClassVar[str] = "gaussian"
    discrete: ClassVar[bool | None] = False
    linear: ClassVar[bool] = True
    default_hessian: ClassVar[str] = "expected"
    links_offered: ClassVar[tuple[str, ...]] = ("identity",)

    def __post_init__(self) -> None:
        if self.link is not links.identity and not (isinstance(self.link, str) and self.link == "identity"):
            raise ValueError(
                f"link {str(getattr(self.link, 'name', self.link))!r} is not available for the gaussian family, "
                "which is fitted as a linear mixed model: use the identity link, or transform the response"
            )
        object.__setattr__(self, "link", links.identity)

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        return -0.5 * weights * jnp.square(y - eta)

    def constant(self, y: Array, weights: Array) -> Array:
        return 0.5 * jnp.log(weights) - 0.5 * jnp.log(2.0 * jnp.pi) * jnp.ones_like(y)

    @property
    def canonical(self) -> bool:
        return True

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        return weights * jnp.ones_like(eta)

    def variance(self, mu: Array, phi: Array) -> Array:
        return jnp.ones_like(mu)

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        return weights * jnp.square(y - mu)

    def simulate(self, rng: Generator, eta: ndarray, weights: ndarray, phi: ndarray, sigma: float = 1.0) -> ndarray:
        return np.asarray(eta + sigma / np.sqrt(weights)[:, None] * rng.standard_normal(eta.shape))

    def latent_variance(self, mean: Callable[[], float], phi: ndarray, sigma: float) -> float | None:
        return sigma**2


@dataclass(frozen=True)
class NegativeBinomial(_Counts):
    """NB2 counts, Var = mu + mu^2 / phi; glmmTMB's nbinom2, MASS's negative.binomial(theta) with theta = phi.

    Args:
        theta: phi where it is known, > 0, ``inf`` being the Poisson; None to estimate it.
        link: log (default), sqrt, identity or any `Link` into (0, inf).
    """

    theta: float | None = None
    link: Link = links.log
    name: ClassVar[str] = "negative.binomial"
    called: ClassVar[str] = "negative binomial"
    limit: ClassVar[str] = "poisson"

    def __init__(self, theta: float | None = None, link: str | Link = "log") -> None:
        if theta is not None and not (isinstance(theta, float) and theta == math.inf):
            arguments.number(theta, "theta", 0.0)
        object.__setattr__(self, "theta", None if theta is None else float(theta))
        object.__setattr__(self, "link", offered(link, self))

    @property
    def phi_names(self) -> tuple[str, ...]:
        return ("phi",) if self.theta is None else ()

    def shape(self, phi: Any) -> Any:
        """phi, given or estimated; may be infinite."""
        return phi[0] if self.theta is None else self.theta

    def _finite_shape(self, phi: Array, like: Array) -> Array:
        """phi, an infinite one as a number at which nothing is left of its inverse."""
        shape, most = jnp.asarray(self.shape(phi), like.dtype), jnp.finfo(like.dtype).max ** 0.5
        return jnp.where(shape < most, shape, most)

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        log_mu, shape = self.link.log_mu(eta), self._finite_shape(phi, eta)
        # y log(mu / (1 + mu / phi)) - phi log(1 + mu / phi): the Poisson kernel and what vanishes with mu / phi
        x = saturation(log_mu, shape)
        value = product(y, log_mu) - y * x.softplus - x.part
        if self.theta is None:
            value = value + log_rising(y, shape)
        return weights * value

    def constant(self, y: Array, weights: Array) -> Array:
        counts = -gammaln(y + 1.0)
        if self.theta is not None:
            counts = counts + log_rising(y, self._finite_shape(jnp.zeros(0), counts))
        return weights * counts

    def expected_information(self, eta: Array, weights: Array, phi: Array) -> Array:
        if self.link is links.log:
            return weights * saturation(eta, self._finite_shape(phi, eta)).mean
        mu, slope = jax.jvp(self.link.inverse, (eta,), (jnp.ones_like(eta),))
        return weights * (slope / mu) * slope / (1.0 + mu / self.shape(phi))

    def mustart(self, y: Array, weights: Array) -> Array:
        return y + jnp.where(y == 0.0, 1.0 / 6.0, 0.0)

    def variance(self, mu: Array, phi: Array) -> Array:
        return mu * (1.0 + mu / self.shape(phi))

    def deviance_contribution(self, y: Array, mu: Array, weights: Array, phi: Array) -> Array:
        shape = self._finite_shape(phi, mu)
        away = (y - mu) / (mu + shape)
        near = jnp.abs(away) < 0.5  # then the Poisson deviance and what vanishes with 1 / phi
        small = jnp.where(near, away, 0.0)
        poisson = (y - mu) * (1.0 + small) + (y + shape) * log1p_less(small)
        rest = jnp.where(near, poisson, (y + shape) * jnp.log1p(jnp.where(near, 0.0, away)))
        return 2.0 * weights * (xlogy(y, y) - xlogy(y, mu) - rest)

    def simulate(self, rng: Generator, eta: ndarray, weights: ndarray, phi: ndarray, sigma: float = 1.0) -> ndarray:
        self._unweighted(weights)
        mu, shape = self._mean_within(eta), float(self.shape(phi))
        if shape < 1e6:
            return rng.negative_binomial(shape, shape / (shape + mu))
        # the probability above would round; the mixture that it stands for does not
        return rng.poisson(mu if np.isinf(shape) else mu * (rng.standard_gamma(shape, mu.shape) / shape))

    def distribution(self, mu: ndarray, weights: ndarray, phi: ndarray) -> Any:
        poisson, shape = super().distribution(mu, weights, phi), float(self.shape(phi))
        if shape > 1e8 * max(1.0, float(mu.max())):  # nothing is left of the difference, and 1 - p would round
            return poisson
        from scipy import stats

        return stats.nbinom(shape, shape / (shape + mu))

    def latent_variance(self, mean: Callable[[], float], phi: ndarray, sigma: float) -> float | None:
        return float(np.log1p(1.0 / mean() + 1.0 / self.shape(phi))) if self.link.name == "log" else None

    def __str__(self) -> str:
        return f"{'nbinom2' if self.theta is None else f'negative.binomial({self.theta:g})'} ({self.link.name})"


#: Code of log densities that change what they read themselves when they run: a list of calls, a random generator.
_CHANGES: set[Any] = set()


@dataclass(frozen=True)
class Custom(Family):
    """A user's family: a log density, and nothing else.

    Args:
        logpdf: ``logpdf(y, eta, aux)`` -> log density per row, written with jax.numpy. `aux` is a dict
            of the parameters below and ``aux["weights"]`` (trials or prior weights, ones by default). A `logpdf` that
            uses these applies them itself; the values of one that does not are multiplied by them.
        link: name or `Link`; used for fitted values and `predict(type="response")` only.
        aux: name -> starting value of each extra *positive* parameter, estimated jointly on the log
            scale. For a parameter on the whole line write ``jnp.log(aux["k"])`` in `logpdf`.
        sampler: ``sampler(rng, eta, aux)`` -> responses (n, s), needed by `simulate` only: a NumPy generator, linear
            predictors (n, s), and `aux` as above with weights (n, 1).

    The Laplace approximation uses the observed information, found by differentiation.

    Raises:
        TypeError, ValueError: what is wrong with logpdf, found by tracing it: its arguments, NumPy instead of
            jax.numpy, one number for all rows.

    What `logpdf` reads from outside (globals, closures, attributes of its object, a file) is read when a model is
    fitted; a change of it is seen by the next fit. A fitted model keeps to what it was fitted with, and refuses what
    would have to read it again.
    """

    logpdf: Callable[[Array, Array, Mapping[str, Array]], Array]
    link: Link
    aux: tuple[tuple[str, float], ...]
    weighs: bool = field(compare=False)  # whether logpdf uses the weights
    sampler: Callable[[Generator, ndarray, Mapping[str, Any]], Any] | None = field(compare=False)
    #: `logpdf` with what it reads from outside, as it was when the family was made or given to a fit.
    read: Hashable = field(repr=False)
    name: ClassVar[str] = "custom"
    trials: ClassVar[bool | None] = None

    def __init__(
        self,
        logpdf: Callable[[Array, Array, Mapping[str, Array]], Array],
        link: str | Link = "identity",
        aux: Mapping[str, float] | None = None,
        sampler: Callable[[Generator, ndarray, Mapping[str, Any]], Any] | None = None,
    ) -> None:
        if aux is not None and not isinstance(aux, Mapping):
            raise TypeError(f"aux must be a dict of names and starting values, got {arguments.shown(aux)}")
        for key, value in (aux or {}).items():
            if not isinstance(key, str):
                raise TypeError(f"aux must have texts as names, got {arguments.shown(key)}")
            try:
                arguments.number(value, "value", 0.0)
            except ValueError:
                raise ValueError(
                    f"aux[{key!r}] must start at a positive number, got {value!r}: extra parameters are estimated "
                    "on the log scale; for one on the whole line use jnp.log(aux[...]) in logpdf"
                ) from None
            if key == "weights":
                raise ValueError("aux['weights'] is filled with the prior weights; choose another name")
        items = tuple((k, float(v)) for k, v in (aux or {}).items())
        if sampler is not None:
            arguments.function(sampler, "sampler")
        numbers = {**dict.fromkeys((k for k, _ in items), 0), "weights": 1}
        like = ("y", 1), ("eta", 1), numbers
        used = arguments.of_rows(logpdf, "logpdf", like, ", the log density of that row")
        if not used[1]:
            raise ValueError("logpdf(y, eta, aux) does not depend on eta, the linear predictor")
        object.__setattr__(self, "logpdf", logpdf)
        object.__setattr__(self, "link", links.get(link))
        object.__setattr__(self, "aux", items)
        object.__setattr__(self, "sampler", sampler)
        object.__setattr__(self, "weighs", used[2 + sorted(numbers).index("weights")])
        object.__setattr__(self, "read", contents(logpdf))

    def at_present(self) -> Family:
        other = super().at_present()
        if contents(self.logpdf) == self.read:
            return other
        now = Custom(self.logpdf, other.link, dict(self.aux))
        return other._with(read=now.read, weighs=now.weighs)

    @property
    def phi_names(self) -> tuple[str, ...]:
        return tuple(k for k, _ in self.aux)

    def phi_start(self) -> tuple[float, ...]:
        return tuple(v for _, v in self.aux)

    def kernel(self, y: Array, eta: Array, weights: Array, phi: Array) -> Array:
        aux = {name: phi[i] for i, name in enumerate(self.phi_names)}
        # rows of weight 0 are not there, whatever the user's function makes of it
        value = jnp.where(weights > 0.0, self._log_density(y, eta, {**aux, "weights": weights}), 0.0)
        return value if self.weighs else weights * value

    def _log_density(self, y: Array, eta: Array, aux: Mapping[str, Array]) -> Array:
        """`logpdf`, which is traced for several programs of one model: all of them must read the same from outside."""
        before, code = contents(self.logpdf), getattr(self.logpdf, "__code__", type(self.logpdf))
        if before != self.read and code not in _CHANGES:
            raise ValueError(
                "what the log density of this family reads from outside (globals, closures, attributes) has changed "
                "since the model was fitted, and this would mix both: fit the model again"
            )
        value = self.logpdf(y, eta, aux)
        if contents(self.logpdf) != before:
            _CHANGES.add(code)
        return value

    def simulate(self, rng: Generator, eta: ndarray, weights: ndarray, phi: ndarray, sigma: float = 1.0) -> ndarray:
        if self.sampler is None:
            raise NotImplementedError(
                "a log density alone cannot be drawn from: give the family sampler=f with f(rng, eta, aux) -> responses"
            )
        if not self.weighs:
            self._unweighted(weights)
        aux = {name: float(phi[i]) for i, name in enumerate(self.phi_names)}
        drawn = np.asarray(self.sampler(rng, eta, {**aux, "weights": weights[:, None]}))
        if drawn.shape != eta.shape:
            raise ValueError(f"the sampler returned shape {drawn.shape} for linear predictors of shape {eta.shape}")
        return drawn


_QUASI = (
    "quasi families have no likelihood and cannot be fitted by Laplace or quadrature; for overdispersion use an "
    'observation-level random effect "(1 | obs)", or the beta-binomial or negative binomial families'
)
_NAMES: dict[str, Callable[..., Family]] = {"binomial": Binomial, "poisson": Poisson, "gaussian": Gaussian}
_ALIASES = {"bernoulli": "binomial", "normal": "gaussian"}


def get(family: str | Family, link: str | Link | None = None) -> Family:
    """Family object from R's spelling: ``"binomial"``, ``"binomial(probit)"``, ``"poisson(link = 'sqrt')"``,
    ``"negative.binomial(2)"`` (theta fixed), ``"nbinom2"`` (phi estimated), or a `Family`.

    Raises:
        ValueError: unknown family or link; the message lists what there is.
    """
    if isinstance(family, Family):
        if link is not None:
            raise ValueError("give the link inside the family object, not twice")
        return family.at_present()
    if not isinstance(family, str):
        raise ValueError(f"family must be a name or a gj.families object, got {type(family).__name__}")
    match = re.fullmatch(r"\s*(?:MASS::)?([A-Za-z][\w.]*)\s*(?:\((.*)\))?\s*", family)
    name = match.group(1) if match else family
    arguments = [a.strip() for a in (match.group(2) or "").split(",")] if match else []
    arguments = [a for a in arguments if a]
    if name.lower().startswith("quasi"):
        raise ValueError(_QUASI)
    key = _ALIASES.get(name.lower(), name.lower())
    theta: float | None = None
    for argument in arguments:
        label, _, value = argument.rpartition("=")
        value = value.strip().strip("'\"")
        try:
            theta = float(value)
        except ValueError:
            if label.strip() not in ("", "link"):
                raise ValueError(f"family {family!r}: unknown argument {label.strip()!r}") from None
            link = value
    if key in ("negative.binomial", "negative_binomial", "nbinom2"):
        return NegativeBinomial(theta, link or "log")
    if key not in _NAMES or theta is not None:
        raise ValueError(
            f"unknown family {family!r}; available: {', '.join(_NAMES)}, nbinom2, negative.binomial(theta), "
            "or gj.families.Custom(logpdf, link, aux)"
        )
    return _NAMES[key]() if link is None else _NAMES[key](link=link)
