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

from .._arguments import checked
from ..algebra.linalg import Blocks, factorise, weighted_products
from ..compiling.precision import own_settings
from ..families import Family
from ..families import get as get_family
from ..model.design import Design, factors, linear_predictor, over_devices
from ..model.parameters import Parameters
from ..model.rows import sum_over_rows
from .pirls import (
    CONVERGED,
    Blocked,
    Mode,
    Sums,
    at_conditional_mode,
    curvature_weights,
    parameters,
    reduce_fixed,
    row_sums,
    squared_norm,
    unspool,
    zero_u,
)


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

    def at(rows: Design) -> Array:
        weights = jnp.asarray(rows.weights)
        there = weights > 0.0  # else the constant may be infinite
        return jnp.where(there, family.constant(jnp.asarray(rows.y), jnp.where(there, weights, 1.0)), 0.0).sum()

    return -2.0 * over_devices(sum_over_rows(at, design), design)


class AtMode(NamedTuple):
    """An evaluation with its pieces."""

    value: Array  # Laplace deviance without the data constant; +inf where PIRLS failed
    mode: Mode
    T: Blocked
    blocks: Blocks  # Z'WZ with the weights of log det

    @property
    def evaluation(self) -> Evaluation:
        return Evaluation(self.mode.u, self.mode.beta, self.mode.status, self.mode.iterations)


def at_mode(
    params: Parameters, design: Design, family: Family, u0: Blocked, hessian: str, joint: bool = False
) -> AtMode:
    """Laplace deviance and what it is made of; arguments as for `laplace`."""
    mode, rows = at_conditional_mode(params, design, u0, family, hessian, joint)
    T = factors(params.theta, design)
    factor = factorise(rows.blocks, T, design.plan)
    value = -2.0 * rows.kernel + squared_norm(mode.u) + factor.logdet
    good = (mode.status == CONVERGED) & jnp.isfinite(value) & (rows.outside == 0.0)
    beta = mode.beta if joint else params.beta
    return AtMode(jnp.where(good, value, jnp.inf), mode._replace(beta=beta), T, rows.blocks)


def laplace(
    params: Parameters, design: Design, family: Family, u0: Blocked, hessian: str, joint: bool = False
) -> tuple[Array, Evaluation]:
    """Laplace deviance without the data constant, and the modes it was computed at.

    With `joint`, beta is the penalised joint mode (nAGQ = 0) and params.beta only its start.
    """
    at = at_mode(params, design, family, u0, hessian, joint)
    return at.value, at.evaluation


def pieces(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> tuple[Array, Array]:
    """log|L|^2 and R_X'R_X at the modes."""
    T = factors(params.theta, design)

    def at(rows: Design, b: Blocked, params: Parameters) -> Sums:
        w = _row_weights(b, params, rows, family, hessian)
        return row_sums(jnp.zeros_like(w), w, rows, True)

    sums = sum_over_rows(at, design, unspool(u, T), params)
    assert sums.fixed is not None
    factor = factorise(sums.blocks, T, design.plan)
    return factor.logdet, reduce_fixed(sums.fixed, sums.score, factor, T, design)[0]


def products_at(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> tuple[Blocks, Blocked]:
    """Z'WZ with the working weights at the modes, and T."""
    T = factors(params.theta, design)

    def at(rows: Design, b: Blocked, params: Parameters) -> Blocks:
        w = _row_weights(b, params, rows, family, hessian)
        return weighted_products(rows.z, rows.level, rows.n_levels, w, rows.plan)

    return sum_over_rows(at, design, unspool(u, T), params), T


def working_weights(
    params: Parameters, u: Blocked, design: Design, family: Family, hessian: str
) -> tuple[Array, Blocked]:
    """(n,) working weights at the modes, and T."""
    T = factors(params.theta, design)
    return _row_weights(unspool(u, T), params, design, family, hessian), T


def _row_weights(b: Blocked, params: Parameters, design: Design, family: Family, hessian: str) -> Array:
    eta = linear_predictor(b, params.beta, design)
    weights = jnp.asarray(design.weights)
    _, _, w = family.derivatives(jnp.asarray(design.y), eta, weights, params.phi)
    return curvature_weights(w, eta, weights, params, family, hessian)


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


@checked(traceable=True)
@own_settings
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
    function theorem, `pirls`).
    """
    warn_if_single_precision()
    family = get_family(family).at_present()
    params = parameters(theta, beta, family, phi, design)
    value, _ = laplace(params, design, family, zero_u(design, params.beta.dtype), resolve_hessian(hessian, family))
    return value + log_density_constant(design, family)
