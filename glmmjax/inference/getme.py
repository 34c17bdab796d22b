"""lme4's getME: the pieces of a fitted model under the names of the theory, as dense arrays.

Source: Bates et al. 2015, J. Stat. Softw. 67(1), sections 2 and 3; the names are lme4's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._errors import NotSupportedError
from ..algebra.linalg import block_diagonal
from ..fit.control import unknown_argument
from ..model.covariance import semidefinite_cholesky

if TYPE_CHECKING:
    from ..results import MixedModel


def get_me(model: MixedModel, name: str) -> Any:
    """lme4's getME, by its names: "X", "Z", "Lambda", "theta", "b", "RX", "devcomp", ...; "ALL" for a dict of all.

    Matrices are dense, Z (n, q) with columns term by term, level by level, and nothing is permuted: L is the lower
    factor of Lambda'Z'WZ Lambda + I in that order. Positions count from 0.
    """
    pieces = _pieces(model)
    if name == "ALL":
        return {key: value for key, make in pieces.items() if (value := _available(make)) is not None}
    if name not in pieces:
        raise ValueError(str(unknown_argument(name, [*pieces, "ALL"], "getME")))
    return pieces[name]()


def _pieces(m: MixedModel) -> dict[str, Callable[[], Any]]:
    terms = m._data.terms
    bars = [f"{' + '.join(t.names)} | {t.group}" for t in terms]
    columns = [len(t.names) for t in terms]
    levels = [len(t.levels) for t in terms]
    parameters = [t.structure.n_theta for t in m._design.terms]
    sizes = [k * n for k, n in zip(columns, levels, strict=True)]
    design = m._design

    def named(values: list[int]) -> pd.Series:
        return pd.Series(values, index=bars)

    return {
        "X": lambda: pd.DataFrame(design.X, m._data.row_index, list(m._data.x_names)),
        "Z": lambda: dense_Z(m),
        "Zt": lambda: dense_Z(m).T,
        "Ztlist": lambda: _columns_of_Z(m),
        "mmList": lambda: {bar: np.asarray(t.z).copy() for bar, t in zip(bars, terms, strict=True)},
        "y": lambda: np.asarray(design.y).copy(),
        "mu": lambda: m._moments[0].copy(),
        "eta": lambda: m.linear_predictor.copy(),
        "u": lambda: m.u,
        "b": lambda: np.concatenate([b.reshape(-1) for b in m._b]),
        "Gp": lambda: np.concatenate([[0], np.cumsum(sizes)]),
        "Tp": lambda: np.concatenate([[0], np.cumsum(parameters)]),
        "L": lambda: _dense_L(m),
        "Lambda": lambda: dense_Lambda(m),
        "Lambdat": lambda: dense_Lambda(m).T,
        "Lind": lambda: _theta_of_Lambda(m),
        "Tlist": lambda: [T.copy() for T in m._T],
        "ST": lambda: [_st(T) for T in m._T],
        "A": lambda: (dense_Z(m) @ dense_Lambda(m)).T,
        "RX": lambda: m._RX,
        "RZX": lambda: _dense_RZX(m),
        "sigma": lambda: m.sigma,
        "flist": lambda: pd.DataFrame({t.group: np.asarray(t.levels)[t.level] for t in terms}, index=m._data.row_index),
        "cnms": lambda: [(t.group, t.names) for t in terms],
        "theta": lambda: pd.Series(m.theta, index=m.theta_names),
        "beta": lambda: m.beta,
        "fixef": lambda: m.fixef,
        "lower": lambda: pd.Series(np.concatenate([t.structure.lower() for t in design.terms]), m.theta_names),
        "weights": lambda: np.asarray(design.weights).copy(),
        "offset": lambda: np.asarray(design.offset).copy(),
        "REML": lambda: design.p if m.REML else 0,
        "is_REML": lambda: m.REML,
        "N": lambda: m.nobs,
        "n": lambda: m.nobs,
        "p": lambda: design.p,
        "q": lambda: design.q,
        "k": lambda: len(terms),
        "m": lambda: design.n_theta,
        "p_i": lambda: named(columns),
        "l_i": lambda: named(levels),
        "q_i": lambda: named(sizes),
        "m_i": lambda: named(parameters),
        "n_rtrms": lambda: len(terms),
        "n_rfacs": lambda: len(m.ngrps),
        "devcomp": m.devcomp,
        "devfun": m.deviance_function,
        "theta_names": lambda: m.theta_names,
    }


def _available(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except NotSupportedError:
        return None


def dense_Z(model: MixedModel) -> np.ndarray:
    """(n, q)."""
    parts = []
    for labels in model._data.terms:
        m, k = len(labels.levels), len(labels.names)
        Z = np.zeros((model.nobs, m, k))
        Z[np.arange(model.nobs), labels.level] = labels.z
        parts.append(Z.reshape(model.nobs, m * k))
    return np.concatenate(parts, axis=1)


def dense_Lambda(model: MixedModel) -> np.ndarray:
    """(q, q)."""
    pairs = zip(model._data.terms, model._T, strict=True)
    return block_diagonal([np.kron(np.eye(len(t.levels)), T) for t, T in pairs])


def _dense_L(model: MixedModel) -> np.ndarray:
    ZL = dense_Z(model) @ dense_Lambda(model)
    w = model._working_weights
    return np.asarray(np.linalg.cholesky(ZL.T @ (w[:, None] * ZL) + np.eye(ZL.shape[1])))


def _dense_RZX(model: MixedModel) -> np.ndarray:
    """(q, p): L^-1 Lambda'Z'WX."""
    ZL = dense_Z(model) @ dense_Lambda(model)
    w = model._working_weights
    return np.asarray(np.linalg.solve(_dense_L(model), ZL.T @ (w[:, None] * np.asarray(model._design.X))))


def _columns_of_Z(model: MixedModel) -> dict[str, np.ndarray]:
    """Per column of each term, the (levels, n) rows of Z' that it has."""
    out = {}
    for labels in model._data.terms:
        for j, name in enumerate(labels.names):
            rows = np.zeros((len(labels.levels), model.nobs))
            rows[labels.level, np.arange(model.nobs)] = labels.z[:, j]
            out[f"{labels.group}.{name}"] = rows
    return out


def _theta_of_Lambda(model: MixedModel) -> np.ndarray:
    """For each non-zero of Lambda', column by column, the position in theta (from 0) of its value."""
    parts = []
    for term, labels in zip(model._design.terms, model._data.terms, strict=True):
        position = term.structure.position()
        if position is None:
            raise NotSupportedError(f"Lambda of ({' + '.join(labels.names)} | {labels.group}) has no entries of theta")
        parts.append(np.tile(position[position > 0] - 1 + term.theta_start, len(labels.levels)))
    return np.concatenate(parts)


def _st(T: np.ndarray) -> np.ndarray:
    """T = (unit lower triangle) (diagonal), both in one matrix; a column of zeros stays one."""
    if np.triu(T, 1).any():
        T = semidefinite_cholesky(T @ T.T)
    d = np.diag(T)
    out = T / np.where(d != 0.0, d, 1.0)
    np.fill_diagonal(out, d)
    return np.asarray(out)


def devcomp(model: MixedModel) -> dict[str, float]:
    """Components of the deviance under lme4's names: ldL2, ldRX2, wrss, ussq, pwrss, drsum, dev."""
    logdet, information = model._laplace_pieces
    mu, slope, variance, deviance = model._moments
    ussq = float(sum((u**2).sum() for u in model._estimates.u))
    wrss = float((np.asarray(model._design.weights) / variance * (np.asarray(model._design.y) - mu) ** 2).sum())
    parts = {
        "ldL2": logdet,
        "ldRX2": float(np.linalg.slogdet(information)[1] + 2.0 * np.linalg.slogdet(model._scaled[1].A)[1]),
        "wrss": wrss,
        "ussq": ussq,
        "pwrss": wrss + ussq,
        "drsum": float(deviance.sum()),
        "REML" if model.REML else "dev": model.objective,
    }
    if model.is_linear:
        pwrss = parts["pwrss"]
        parts["sigmaML"] = float(np.sqrt(pwrss / model.nobs))
        parts["sigmaREML"] = float(np.sqrt(pwrss / (model.nobs - model._design.p)))
    return parts
