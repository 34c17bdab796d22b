"""What several test files share: reference results, data, comparisons and finite differences.

Results of R live in tests/reference. Those on four data sets that are not bundled with the package stay
outside the repository, in the folder named by GLMMJAX_REFERENCE (default: ../shared/reference beside the
repository); tests that need them are skipped where it is absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special

from glmmjax import datasets
from glmmjax.objective import laplace
from glmmjax.objective.pirls import parameters, zero_u

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
OUTSIDE = Path(os.environ.get("GLMMJAX_REFERENCE") or ROOT.parent / "shared" / "reference")
NOT_BUNDLED = ("cbpp2", "classroom", "Owls", "Salamanders")
_NOT_BUNDLED_FILES = {  # results outside models/ that are on data sets which are not bundled
    "fixed_params": ("lmm_classroom", "owls_offset"),
    "exact_marginal": ("owls_offset", "owls_slope2d"),
    "inference": ("anova_cbpp2",),
}


# -------------------- reference results
@lru_cache(maxsize=1)
def model_index() -> dict[str, dict[str, Any]]:
    """One row per fitted model of R: id -> dataset, formula, family, engine, nAGQ, REML, ..., bundled."""
    rows = json.loads((REFERENCE / "index.json").read_text(encoding="utf-8"))
    return {row["id"]: row for row in rows}


def all_models(where: Callable[[dict[str, Any]], bool] | None = None, **fields: Any) -> list[str]:
    """Ids of the models whose index row has these field values and satisfies `where`, for parametrize.

    Example: all_models(engine="lme4::glmer", nAGQ=1, dataset="cbpp"). Raises where nothing is left, so that
    no test is silently empty.
    """
    unknown = set(fields) - set(next(iter(model_index().values())))
    if unknown:
        raise KeyError(f"the index has no fields {sorted(unknown)}")
    found = [
        name
        for name, row in model_index().items()
        if all(row[k] == v for k, v in fields.items()) and (where is None or where(row))
    ]
    if not found:
        raise LookupError(f"no reference model has {fields}")
    return found


def _result(folder: str, name: str) -> dict[str, Any]:
    path = REFERENCE / folder / f"{name}.json"
    if not path.exists():
        outside = (
            not model_index()[name]["bundled"]
            if folder == "models" and name in model_index()
            else name in _NOT_BUNDLED_FILES.get(folder, ())
        )
        if not outside:
            raise FileNotFoundError(f"no reference result {folder}/{name}")
        path = OUTSIDE / folder / f"{name}.json"
        if not path.exists():
            pytest.skip(f"{folder}/{name} is on a data set that is not bundled (set GLMMJAX_REFERENCE)")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def reference_model(name: str) -> dict[str, Any]:
    """The record of one fitted model; numbers are in its "results". Skips the test where it is absent."""
    return _result("models", name)


def fixed_params(name: str) -> dict[str, Any]:
    """Objective values at fixed parameters. Skips the test where they are not available."""
    return _result("fixed_params", name)


def exact_marginal(name: str) -> dict[str, Any]:
    """Near-exact marginal log-likelihoods. Skips the test where they are not available."""
    return _result("exact_marginal", name)


def inference(name: str) -> dict[str, Any]:
    """Profiles, tables, predictions, moments of simulations. Skips the test where they are not available."""
    return _result("inference", name)


# -------------------- data
def read_outside(name: str) -> pd.DataFrame:
    """A data set from the folder outside the repository, rebuilt from its CSV file and sidecar of types."""
    sidecar = OUTSIDE / "data" / f"{name}.json"
    if not sidecar.exists():
        pytest.skip(f"data set {name} is not bundled (set GLMMJAX_REFERENCE)")
    spec = json.loads(sidecar.read_text(encoding="utf-8"))
    text = pd.read_csv(sidecar.parent / spec["file"], dtype=str, keep_default_na=False)
    out = {}
    for column in spec["columns"]:
        values = text[column["name"]].to_numpy(dtype=object)
        missing = values == ""
        if "levels" in column:
            levels = [str(level) for level in column["levels"]]
            values = np.where(missing, None, values)
            out[column["name"]] = pd.Categorical(values, levels, ordered=column["type"] == "ordered")
        elif column["type"] == "integer" and not missing.any():
            out[column["name"]] = np.array([int(v) for v in values], dtype=np.int64)
        else:
            out[column["name"]] = np.array([float(v) if v else np.nan for v in values])
    return pd.DataFrame(out)


def load_data(name: str) -> pd.DataFrame:
    """A data set by R's name: bundled, or one of the four that are not (skips the test where absent)."""
    return read_outside(name) if name in NOT_BUNDLED else datasets.load(name)


# -------------------- comparisons
def assert_close(actual: Any, desired: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str = "") -> None:
    """|actual - desired| <= atol + rtol |desired| everywhere, equal shapes, no NaN; `what` names it."""
    a, d = np.asarray(actual, dtype=float), np.asarray(desired, dtype=float)
    assert a.shape == d.shape, f"{what}: shape {a.shape}, expected {d.shape}"
    assert not np.isnan(d).any(), f"{what}: the expected value has NaN"
    np.testing.assert_allclose(a, d, rtol=rtol, atol=atol, equal_nan=False, err_msg=what)


def sd_scaled(actual: Any, desired: Any, se: Any) -> float:
    """Largest |actual - desired| in units of the standard errors `se`."""
    a, d, s = (np.asarray(v, dtype=float) for v in (actual, desired, se))
    assert a.shape == d.shape == s.shape and (s > 0).all()
    return float(np.max(np.abs(a - d) / s))


# -------------------- finite differences
def fd_gradient(f: Callable[[np.ndarray], Any], x: Any, h: float = 1e-5) -> np.ndarray:
    """Central differences of f at the vector x (f's shape first, then x's); steps h (1 + |x_i|)."""
    x = np.asarray(x, dtype=float)
    columns = []
    for i in range(x.size):
        e = np.zeros_like(x)
        e[i] = h * (1.0 + abs(x[i]))
        columns.append((np.asarray(f(x + e), dtype=float) - np.asarray(f(x - e), dtype=float)) / (2.0 * e[i]))
    return np.stack(columns, axis=-1)


def fd_hessian_from_grad(grad: Callable[[np.ndarray], Any], x: Any, h: float = 1e-5) -> np.ndarray:
    """Symmetrised Hessian at the vector x by central differences of its gradient function."""
    hessian = fd_gradient(grad, x, h)
    return 0.5 * (hessian + hessian.T)


def fd6(f: Callable[[np.ndarray], Any], x: Any, steps: Any) -> np.ndarray:
    """Sixth-order central differences of f at the vector x, one step per entry; shape as `fd_gradient`."""
    x, steps = np.asarray(x, dtype=float), np.broadcast_to(np.asarray(steps, dtype=float), np.shape(x))
    columns = []
    for i in range(x.size):
        e = np.zeros_like(x)
        e[i] = steps[i]
        total = 0.0
        for j, c in ((1, 45.0), (2, -9.0), (3, 1.0)):
            total = total + c * (np.asarray(f(x + j * e), dtype=float) - np.asarray(f(x - j * e), dtype=float))
        columns.append(total / (60.0 * steps[i]))
    return np.stack(columns, axis=-1)


# -------------------- an independent Laplace approximation
def _link_parts(link: str, eta: np.ndarray) -> tuple[np.ndarray, ...]:
    """mu, dmu/deta, d2mu/deta2, log mu, log(1 - mu) (NaN where it has no meaning); holomorphic in eta."""
    none = np.full_like(eta, np.nan)
    if link == "logit":
        log_mu, log_1m = -np.log1p(np.exp(-eta)), -np.log1p(np.exp(eta))
        mu, one = np.exp(log_mu), np.exp(log_1m)
        return mu, mu * one, mu * one * (one - mu), log_mu, log_1m
    if link == "probit":
        density = np.exp(-0.5 * eta * eta) / np.sqrt(2.0 * np.pi)
        return special.ndtr(eta), density, -eta * density, special.log_ndtr(eta), special.log_ndtr(-eta)
    if link == "cloglog":
        t = np.exp(eta)
        mu = -np.expm1(-t)
        return mu, t * np.exp(-t), t * np.exp(-t) * (1.0 - t), np.log(mu), -t
    if link == "cauchit":
        density = 1.0 / (np.pi * (1.0 + eta * eta))
        mu = 0.5 + np.arctan(eta) / np.pi
        return mu, density, -2.0 * np.pi * eta * density**2, np.log(mu), np.log(0.5 - np.arctan(eta) / np.pi)
    if link == "log":
        mu = np.exp(eta)
        inside = np.real(mu) < 1.0
        return mu, mu, mu, eta, np.where(inside, np.log1p(-np.where(inside, mu, 0.0)), np.nan)
    if link == "sqrt":
        return eta * eta, 2.0 * eta, 2.0 + 0.0 * eta, 2.0 * np.log(eta), none
    if link == "identity":
        return eta, 1.0 + 0.0 * eta, 0.0 * eta, np.log(eta), none
    raise KeyError(link)


class DenseLaplace:
    """The Laplace deviance by dense NumPy matrices and closed-form derivatives, Newton to machine precision.

    It shares nothing with the package but the arrays of the design. Every formula is holomorphic, so that
    `gradient` is a complex step, exact to rounding, through the converged mode. Single rows of -2 log f,
    |u|^2 and log det(Lambda'Z'WZ Lambda + I) are those of Bates et al. 2015, J. Stat. Softw. 67(1).

    Args:
        design: of the package; its arrays only.
        family: "binomial", "poisson" or "negative.binomial". link: its name.
        hessian: "expected" or "observed" weights W in the determinant.
        shape: theta of the negative binomial.
    """

    def __init__(self, design: Any, family: str, link: str, hessian: str = "expected", shape: float = 1.0) -> None:
        self.y, self.X = np.asarray(design.y), np.asarray(design.X)
        self.weights, self.offset = np.asarray(design.weights), np.asarray(design.offset)
        self.family, self.link, self.hessian, self.shape = family, link, hessian, shape
        n = self.y.size
        self.terms: list[tuple[int, int]] = []  # levels and columns of each term
        parts = []
        for term in design.terms:
            z = np.asarray(design.z[term.block])[:, term.columns]
            m, k = design.n_levels[term.block], z.shape[1]
            Z = np.zeros((n, m, k))
            Z[np.arange(n), np.asarray(design.level[term.block])] = z
            parts.append(Z.reshape(n, m * k))
            self.terms.append((m, k))
        self.Z = np.concatenate(parts, axis=1)
        y, w = self.y, self.weights
        if family == "binomial":
            s = w * y
            constant = special.gammaln(w + 1) - special.gammaln(s + 1) - special.gammaln(w - s + 1)
        elif family == "poisson":
            constant = -w * special.gammaln(y + 1)
        else:
            rising = special.gammaln(y + shape) - special.gammaln(shape) - y * np.log(shape)
            constant = w * (rising - special.gammaln(y + 1))
        self.constant = float(constant.sum())

    def scaled_Z(self, theta: np.ndarray) -> np.ndarray:
        """Z Lambda(theta), theta the lower triangles of the terms, column by column."""
        blocks, start, column = [], 0, 0
        for m, k in self.terms:
            T = np.zeros((k, k), theta.dtype)
            for j in range(k):
                for i in range(j, k):
                    T[i, j] = theta[start]
                    start += 1
            Z = self.Z[:, column : column + m * k].reshape(-1, m, k)
            blocks.append((Z @ T).reshape(-1, m * k))
            column += m * k
        assert start == theta.size
        return np.concatenate(blocks, axis=1)

    def rows(self, eta: np.ndarray) -> tuple[np.ndarray, ...]:
        """log f without its constant, score, observed and expected information, per row."""
        y, a = self.y, self.weights
        mu, d1, d2, log_mu, log_1m = _link_parts(self.link, eta)
        if self.family == "binomial":
            V, dV = mu * (1.0 - mu), 1.0 - 2.0 * mu
            log_f = np.where(y > 0, y * log_mu, 0.0) + np.where(y < 1, (1.0 - y) * log_1m, 0.0)
        elif self.family == "poisson":
            V, dV = mu, 1.0 + 0.0 * mu
            log_f = np.where(y > 0, y * log_mu, 0.0) - mu
        else:
            r = self.shape
            V, dV = mu + mu * mu / r, 1.0 + 2.0 * mu / r
            log_f = np.where(y > 0, y * log_mu, 0.0) - (y + r) * np.log1p(mu / r)
        expected = a * d1 * d1 / V
        slope = d2 / V - d1 * d1 * dV / (V * V)
        return a * log_f, a * (y - mu) * d1 / V, expected - a * (y - mu) * slope, expected

    def mode(self, theta: np.ndarray, beta: np.ndarray, A: np.ndarray | None = None) -> np.ndarray:
        """u at real parameters: damped Newton, expected information where the observed is not definite."""
        A = self.scaled_Z(np.asarray(theta, float)) if A is None else A
        fixed = self.offset + self.X @ beta
        u = np.zeros(A.shape[1])

        def penalised(v: np.ndarray) -> float:
            with np.errstate(all="ignore"):
                value = -2.0 * self.rows(fixed + A @ v)[0].sum() + v @ v
            return float(value) if np.isfinite(value) else np.inf

        value, final = penalised(u), 0
        assert np.isfinite(value), "the dense reference needs a start inside the range of the link"
        for _ in range(200):
            _, score, observed, expected = self.rows(fixed + A @ u)
            g = A.T @ score - u
            for w in (observed, expected):
                H = A.T @ (w[:, None] * A) + np.eye(u.size)
                try:
                    np.linalg.cholesky(H)
                except np.linalg.LinAlgError:
                    continue
                break
            step = np.linalg.solve(H, g)
            decrement = g @ step
            if decrement < 1e-20 * (1.0 + abs(value)):  # quadratic from here: two full steps are exact
                u, final = u + step, final + 1
                if final == 2:
                    return u
                continue
            scale = 1.0
            while penalised(u + scale * step) > value + 1e-13 * abs(value) and scale > 1e-12:
                scale *= 0.5
            u = u + scale * step
            value = penalised(u)
        raise AssertionError("the dense reference did not converge")

    def _value(self, theta: np.ndarray, beta: np.ndarray, u: np.ndarray, A: np.ndarray) -> complex:
        eta = self.offset + self.X @ beta + A @ u
        log_f, _, observed, expected = self.rows(eta)
        w = expected if self.hessian == "expected" else observed
        sign, logabs = np.linalg.slogdet(A.T @ (w[:, None] * A) + np.eye(u.size))
        return -2.0 * (log_f.sum() + self.constant) + (u * u).sum() + logabs + 1j * np.angle(sign)

    def deviance(self, theta: Any, beta: Any) -> float:
        """-2 log-likelihood by Laplace's approximation, all constants included."""
        theta, beta = np.asarray(theta, float), np.asarray(beta, float)
        A = self.scaled_Z(theta)
        return float(np.real(self._value(theta, beta, self.mode(theta, beta, A), A)))

    def gradient(self, theta: Any, beta: Any) -> np.ndarray:
        """Gradient in (theta, beta) by complex steps through the mode: exact to rounding."""
        theta, beta = np.asarray(theta, float), np.asarray(beta, float)
        real = self.mode(theta, beta)
        h, out = 1e-30, []
        x = np.concatenate([theta, beta])
        for i in range(x.size):
            xc = x.astype(complex)
            xc[i] += 1j * h
            t, b = xc[: theta.size], xc[theta.size :]
            A, u = self.scaled_Z(t), real.astype(complex)
            for _ in range(2):
                _, score, observed, _ = self.rows(self.offset + self.X @ b + A @ u)
                H = A.T @ (observed[:, None] * A) + np.eye(u.size)
                u = u + np.linalg.solve(H, A.T @ score - u)
            out.append(np.imag(self._value(t, b, u, A)) / h)
        return np.array(out)

    def hessian_matrix(self, theta: Any, beta: Any, steps: Any) -> np.ndarray:
        """Hessian in (theta, beta): sixth-order differences of `gradient`."""
        t = np.size(theta)
        H = fd6(lambda x: self.gradient(x[:t], x[t:]), np.concatenate([theta, beta]), steps)
        return 0.5 * (H + H.T)


# -------------------- nAGQ = 0
def laplace_joint(theta: Any, design: Any, family: Any, beta0: Any, phi: Any = None) -> tuple[Any, Any]:
    """The Laplace deviance at (theta, beta~, u~), the joint penalised mode, and beta~ (p,); beta0 (p,) is a start."""
    params = parameters(theta, beta0, family, phi)
    u0 = zero_u(design, params.beta.dtype)
    value, at = laplace.laplace(params, design, family, u0, laplace.resolve_hessian(None, family), joint=True)
    return value + laplace.log_density_constant(design, family), at.beta
