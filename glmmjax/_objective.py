"""Minus twice the log-likelihood at given parameters, by Laplace's approximation.

Source: Bates et al. 2015, J. Stat. Softw. 67(1); with log f the full conditional density and u~ its
penalised mode, -2 l = -2 sum log f(y | u~) + |u~|^2 + log det(Lambda'Z'WZ Lambda + I). No term in
2 pi is left over.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from ._design import Design, factors, linear_predictor
from ._linalg import Blocks, factorise, solve, weighted_products
from ._pirls import (
    CONVERGED,
    Blocked,
    Mode,
    Parameters,
    border,
    conditional_mode,
    fixed_information,
    parameters,
    score_u,
    squared_norm,
    unspool,
    zero_u,
)
from .families import Family


class Evaluation(NamedTuple):
    """What one evaluation of the objective hands to the next."""

    u: Blocked
    beta: Array
    status: Array
    iterations: Array


def resolve_hessian(hessian: str | None, family: Family) -> str:
    """The curvature used in log det: the family's default, or the user's choice checked.

    Raises:
        ValueError: unknown choice, or "expected" where the family has no expected information.
    """
    if hessian is None:
        return family.default_hessian
    if hessian not in ("expected", "observed"):
        raise ValueError(f"hessian must be None, 'expected' or 'observed', got {hessian!r}")
    if hessian == "expected":
        probe = jnp.ones(1)
        if family.expected_information(probe, probe, jnp.ones(len(family.phi_names))) is None:
            raise ValueError(
                f"hessian='expected' is not available: family {family.name} provides no expected information; "
                "use hessian='observed'"
            )
    return hessian


def log_density_constant(design: Design, family: Family) -> Array:
    """-2 times the part of the log density that no parameter enters."""
    return -2.0 * family.constant(jnp.asarray(design.y), jnp.asarray(design.weights)).sum()


def curvature_weights(
    observed: Array, eta: Array, weights: Array, params: Parameters, family: Family, hessian: str
) -> Array:
    """(n,) weights W of log det from the observed ones."""
    if hessian == "observed" or family.canonical:
        return observed
    expected = family.expected_information(eta, weights, params.phi)
    assert expected is not None
    return expected


class AtMode(NamedTuple):
    """An evaluation with its pieces."""

    value: Array  # Laplace deviance without the data constant; +inf where PIRLS failed
    mode: Mode
    T: Blocked
    eta: Array  # (n,)
    kernel: Array  # (n,) log density without its constant
    blocks: Blocks  # Z'WZ with the weights of log det

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.mode.u, self.mode.beta, self.mode.status, self.mode.iterations)


def at_mode(
    params: Parameters, design: Design, family: Family, u0: Blocked, hessian: str, joint: bool = False
) -> AtMode:
    """Laplace deviance and what it is made of; arguments as for `laplace`."""
    mode: Mode = conditional_mode(params, design, u0, family, joint)
    beta = mode.beta if joint else params.beta
    T = factors(params.theta, design)
    y, weights = jnp.asarray(design.y), jnp.asarray(design.weights)
    eta = linear_predictor(unspool(mode.u, T), beta, design)
    kernel, _, w = family.derivatives(y, eta, weights, params.phi)
    w = curvature_weights(w, eta, weights, params, family, hessian)
    blocks = weighted_products(design.z, design.level, design.n_levels, w, design.plan)
    factor = factorise(blocks, T, design.plan)
    value = -2.0 * kernel.sum() + squared_norm(mode.u) + factor.logdet
    good = (mode.status == CONVERGED) & jnp.isfinite(value) & family.in_range(y, eta).all()
    return AtMode(jnp.where(good, value, jnp.inf), mode._replace(beta=beta), T, eta, kernel, blocks)


def laplace(
    params: Parameters, design: Design, family: Family, u0: Blocked, hessian: str, joint: bool = False
) -> tuple[Array, Evaluation]:
    """Laplace deviance without the data constant, and the modes it was computed at.

    With `joint`, beta is the penalised joint mode (nAGQ = 0) and params.beta only its start.
    """
    at = at_mode(params, design, family, u0, hessian, joint)
    return at.value, at.evaluation


def pieces(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> tuple[Array, Array, Array]:
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


_warned = False


def warn_if_single_precision() -> None:
    """Say once that JAX computes in float32 here."""
    global _warned
    if not _warned and jnp.result_type(float) == jnp.float32:
        _warned = True
        warnings.warn(
            "JAX's 64-bit mode is off, so this computes in float32 (about 1e-3 in a deviance); "
            "call jax.enable_x64(True) (jax.config.update('jax_enable_x64', True)) first for float64",
            UserWarning,
            stacklevel=3,
        )


def laplace_deviance(
    theta: Any, beta: Any, design: Design, family: Family, phi: Any = None, hessian: str | None = None
) -> Array:
    """Minus twice the Laplace-approximated marginal log-likelihood.

    Args:
        theta: (n_theta,) packed relative factors in lme4's order, dimensionless (sigma = 1).
        beta: (p,) fixed effects, link scale.
        design: see `Design`.
        family: static; a new family or link retraces.
        phi: (n_phi,) positive dispersion parameters, for families that have any.
        hessian: "expected" (lme4's Laplace), "observed" (the true Laplace approximation, glmmTMB's),
            or None for the family's default.

    Returns:
        () all normalising constants included; +inf where PIRLS failed (`pirls` gives the status).

    Differentiable to second order in theta, beta, phi and the float arrays of `design` (implicit
    function theorem, `_pirls.py`).
    """
    warn_if_single_precision()
    params = parameters(theta, beta, family, phi)
    value, _ = laplace(params, design, family, zero_u(design, params.beta.dtype), resolve_hessian(hessian, family))
    return value + log_density_constant(design, family)


def laplace_joint(theta: Any, design: Design, family: Family, beta0: Any, phi: Any = None) -> tuple[Array, Array]:
    """nAGQ = 0: the Laplace deviance at (theta, beta~, u~), the joint penalised mode, and beta~ (p,).

    beta0 (p,) is where the joint PIRLS starts.
    """
    params = parameters(theta, beta0, family, phi)
    u0 = zero_u(design, params.beta.dtype)
    value, at = laplace(params, design, family, u0, resolve_hessian(None, family), joint=True)
    return value + log_density_constant(design, family), at.beta
