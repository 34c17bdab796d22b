"""Searches other than the compiled BFGS: Newton, derivative-free, and any optax transformation.

They share the objective, the starting values and the metric of `problem`, work in coordinates where that
metric is the identity, and hand their point back to be judged like any other.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

if TYPE_CHECKING:
    from .problem import Problem, Start


class _Counted:
    """The objective as plain NumPy, counted, started from the modes of the last finite evaluation."""

    def __init__(self, problem: Problem, begin: Start):
        self.problem, self.carry, self.constant = problem, begin.carry, begin.constant
        self.x0, self.root = begin.x, np.linalg.cholesky(begin.inverse)
        self.evaluations = 0

    def at(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """Deviance and gradient at whitened coordinates z."""
        f, g, carry, _ = self.problem.evaluate(jnp.asarray(self.x(z)), self.carry, self.constant)
        self.evaluations += 1
        if np.isfinite(float(f)):
            self.carry = carry
        return float(f), self.root.T @ np.asarray(g)

    def x(self, z: np.ndarray) -> np.ndarray:
        return np.asarray(self.x0 + self.root @ z)


def search(problem: Problem, optimizer: Any, begin: Start, tol: float, max_evaluations: int) -> tuple[Start, int]:
    """Minimise the deviance from a start.

    Returns the point found, as a start, and the number of evaluations. Whether it is a minimum is judged by the caller.
    """
    counted = _Counted(problem, begin)
    if optimizer == "newton":
        z = _newton(counted, tol, max_evaluations)
    elif optimizer == "cobyqa":
        z = _cobyqa(counted, max_evaluations)
    else:
        z = _optax(counted, optimizer, tol, max_evaluations)
    return begin._replace(x=counted.x(z), carry=counted.carry), counted.evaluations


def _newton(c: _Counted, tol: float, limit: int) -> np.ndarray:
    """Newton steps with the exact Hessian, its eigenvalues made positive, halved until the deviance falls."""
    z = np.zeros_like(c.x0)
    f, g = c.at(z)
    while c.evaluations < limit:
        H = np.asarray(c.problem.exact_hessian(jnp.asarray(c.x(z)), c.carry, c.constant))
        values, vectors = np.linalg.eigh(c.root.T @ H @ c.root)
        values = np.maximum(np.abs(values), 1e-6 * np.abs(values).max(initial=1e-300))
        direction = -vectors @ ((vectors.T @ g) / values)
        decrement = -0.5 * float(g @ direction)
        step = 1.0
        while c.evaluations < limit:
            f_new, g_new = c.at(z + step * direction)
            if f_new <= f - 1e-4 * step * decrement or (np.isfinite(f_new) and decrement < 1e-8):
                break
            step *= 0.5
            if step < 1e-10:
                return z
        z, f, g = z + step * direction, f_new, g_new
        if decrement < tol:
            break
    return z


def _cobyqa(c: _Counted, limit: int) -> np.ndarray:
    """COBYQA (Ragonneau & Zhang 2024): derivative-free, by quadratic models in a trust region."""
    from scipy.optimize import minimize

    def value(z: np.ndarray) -> float:
        f = c.at(z)[0]
        return f if np.isfinite(f) else 1e30

    options = {"initial_tr_radius": 0.5, "final_tr_radius": 1e-6, "maxfev": limit}
    out = minimize(value, np.zeros_like(c.x0), method="COBYQA", options=options)
    return np.asarray(out.x)


def _optax(c: _Counted, optimizer: Any, tol: float, limit: int) -> np.ndarray:
    """Any optax transformation; line searches get the value, gradient and value function."""
    import optax

    transformation = optax.with_extra_args_support(optimizer)
    root, x0 = jnp.asarray(c.root), jnp.asarray(c.x0)

    def deviance(z: Array, carry: Any) -> Array:
        return c.problem.deviance(x0 + root @ z, carry, c.constant)

    @jax.jit
    def update(z: Array, state: Any, f: Array, g: Array, carry: Any) -> tuple[Array, Any]:
        updates, state = transformation.update(g, state, z, value=f, grad=g, value_fn=partial(deviance, carry=carry))
        return optax.apply_updates(z, updates), state

    z = jnp.zeros_like(x0)
    state = transformation.init(z)
    best, best_f = np.asarray(z), np.inf
    while c.evaluations < limit:
        f, g = c.at(np.asarray(z))
        if f < best_f:
            best, best_f = np.asarray(z), f
        # in these coordinates the starting metric is the identity, so this estimates the decrement
        if not np.isfinite(f) or 0.5 * float(g @ g) < tol:
            break
        z, state = update(z, state, jnp.asarray(f), jnp.asarray(g), c.carry)
    return best
