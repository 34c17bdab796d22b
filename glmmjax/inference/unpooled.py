"""Random effects of each level from its own rows alone, which pictures of shrinkage set beside the modes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array

from ..compiling.entry import entry
from ..families import Family

if TYPE_CHECKING:
    from ..results import MixedModel


@partial(jax.jit, static_argnames=("family",))
def _pieces(eta: Array, y: Array, weights: Array, phi: Array, family: Family) -> tuple[Array, Array, Array]:
    """Log density, score and information per row; the expected information where the family has it."""
    value, score, observed = family.derivatives(y, eta, weights, phi)
    expected = family.expected_information(eta, weights, phi)
    return value, score, observed if expected is None else expected


def unpooled(model: MixedModel, group: str) -> np.ndarray:
    """(m, k) effects of each level from its own rows alone, everything else in the model held fixed.

    For a linear model that is (weighted) least squares of the residual without the group's effects on its
    columns; for a generalised one maximum likelihood by Fisher scoring with the rest of the linear predictor
    as offset. NaN where the level's rows do not determine it: columns without rank, or a likelihood that
    rises forever (all responses equal, for instance).
    """
    indices = model._by_group()[group]
    z = np.concatenate([model._data.terms[i].z for i in indices], axis=1)
    level = np.asarray(model._data.terms[indices[0]].level)
    m, k = len(model._data.terms[indices[0]].levels), z.shape[1]
    y, weights = np.asarray(model._design.y), np.asarray(model._design.weights)
    offset = model.linear_predictor - model._random_part(indices)

    def total(rows: np.ndarray) -> np.ndarray:
        out = np.zeros((m, *rows.shape[1:]))
        np.add.at(out, level, rows)
        return out

    squares = total(weights[:, None, None] * z[:, :, None] * z[:, None, :])
    size = np.sqrt(np.maximum(np.einsum("mkk->mk", squares), np.finfo(float).tiny))
    smallest = np.linalg.eigvalsh(squares / (size[:, :, None] * size[:, None, :]))[:, 0]
    known = (smallest > 1e-8) & (np.einsum("mkk->mk", squares) > 0.0).all(axis=1)
    b = np.zeros((m, k))

    def step(score: np.ndarray, information: np.ndarray, active: np.ndarray) -> np.ndarray:
        moves = np.zeros((m, k))
        moves[active] = np.linalg.solve(information[active], score[active][:, :, None])[:, :, 0]
        return moves

    if model.is_linear:
        b = step(total((weights * (y - offset))[:, None] * z), squares, known)
    else:
        b, known = _separate_fits(model, z, level, offset, total, step, squares, known)
    b[~known] = np.nan
    return b


def _separate_fits(
    model: MixedModel,
    z: np.ndarray,
    level: np.ndarray,
    offset: np.ndarray,
    total: Callable[[np.ndarray], np.ndarray],
    step: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    squares: np.ndarray,
    known: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Fisher scoring for all levels at once, each with its own step halving; and which of them have a maximum."""
    y, weights = np.asarray(model._design.y), np.asarray(model._design.weights)
    phi = model._estimates.phi

    @entry
    def at(b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        eta = offset + np.einsum("nk,nk->n", z, b[level])
        value, score, w = (np.asarray(x) for x in _pieces(eta, y, weights, phi, model.family))
        return total(value), total(score[:, None] * z), total(w[:, None, None] * z[:, :, None] * z[:, None, :])

    def weakest(information: np.ndarray) -> np.ndarray:
        """Least information of a level in any direction, relative to that of its rows at weight one."""
        size = np.sqrt(np.maximum(np.einsum("mkk->mk", squares), np.finfo(float).tiny))
        return np.linalg.eigvalsh(information / (size[:, :, None] * size[:, None, :]))[:, 0]

    b = np.zeros((squares.shape[0], z.shape[1]))
    value, score, information = at(b)
    done = ~known
    for _ in range(100):
        active = ~done & (weakest(information) > 1e-7)  # below, the likelihood is flat: it has no maximum nearby
        if not active.any():
            break
        moves = step(score, information, active)
        done |= active & ((moves * score).sum(axis=1) < 1e-16)
        length = np.where(active, 1.0, 0.0)
        for _ in range(20):
            new = at(b + length[:, None] * moves)
            worse = (length > 0.0) & ~(new[0] >= value - 1e-10 * (1.0 + np.abs(value)))
            if not worse.any():
                break
            length = np.where(worse, 0.5 * length, length)
        b = b + length[:, None] * moves
        value, score, information = new
    return b, known & done & (weakest(information) > 1e-5)
