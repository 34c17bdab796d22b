"""theta <-> relative factor, standard deviations and correlations, and singular covariance matrices."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from helpers import assert_close, fd_gradient

from glmmjax.model.covariance import (
    Diagonal,
    Unstructured,
    cov_to_sdcor,
    semidefinite_cholesky,
)

SIZES = [1, 2, 3, 4, 5]


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("make", [Unstructured, Diagonal], ids=["unstructured", "diagonal"])
def test_round_trip(make: type, k: int) -> None:
    structure = make(k)
    theta = np.random.default_rng(k).normal(size=structure.n_theta)
    T = np.asarray(structure.factor(theta))
    assert T.shape == (k, k) and np.array_equal(T, np.tril(T))
    assert_close(structure.theta_of(T), theta)
    assert_close(structure.factor(structure.start()), np.eye(k))
    on = structure.on_diagonal()
    assert on.sum() == k
    assert_close(theta[on], np.diag(T))
    jacobian = np.asarray(jax.jacfwd(structure.factor)(theta))
    assert_close(jacobian, fd_gradient(lambda v: np.asarray(structure.factor(v)), theta), atol=1e-10)


def test_theta_is_lower_triangle_by_columns() -> None:
    """lme4's order: (1,1) (2,1) (3,1) (2,2) (3,2) (3,3)."""
    T = np.asarray(Unstructured(3).factor(np.arange(1.0, 7.0)))
    assert_close(T, [[1, 0, 0], [2, 4, 0], [3, 5, 6]])
    assert_close(Diagonal(3).factor(np.arange(1.0, 4.0)), np.diag([1.0, 2.0, 3.0]))


def test_theta_names_are_lme4s() -> None:
    names = Unstructured(2).theta_names("district", ("(Intercept)", "urbanY"))
    assert names == ["district.(Intercept)", "district.urbanY.(Intercept)", "district.urbanY"]
    assert Diagonal(2).theta_names("g", ("a", "b")) == ["g.a", "g.b"]


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("make", [Unstructured, Diagonal], ids=["unstructured", "diagonal"])
def test_flip_and_scale(make: type, k: int) -> None:
    structure, rng = make(k), np.random.default_rng(k)
    theta = rng.normal(size=structure.n_theta)
    T = np.asarray(structure.factor(theta))
    signs, turn = structure.flip(theta)
    assert set(signs) <= {-1.0, 1.0} and set(np.diag(turn)) <= {-1.0, 1.0}
    flipped = np.asarray(structure.factor(theta * signs))
    assert (np.diag(flipped) >= 0.0).all()
    assert np.array_equal(flipped, T @ turn)
    assert_close(flipped @ flipped.T, T @ T.T, rtol=1e-14, atol=1e-15)
    # T's rows multiplied by s: the same linear predictor with z divided by s
    s = rng.uniform(0.5, 3.0, k)
    assert_close(structure.factor(structure.turn(np.diag(s)) @ theta), s[:, None] * T, rtol=1e-15)


def test_flip_of_a_zero_diagonal_looks_below() -> None:
    for theta, signs in ((np.array([0.0, -2.0, 3.0]), [-1.0, 1.0]), (np.zeros(3), [1.0, 1.0])):
        assert np.diag(Unstructured(2).flip(theta)[1]).tolist() == signs


@pytest.mark.parametrize("k", SIZES)
def test_sd_and_correlation(k: int) -> None:
    rng = np.random.default_rng(k)
    root = rng.normal(size=(k, 2 * k))
    cov = root @ root.T
    sd, corr = cov_to_sdcor(cov)
    assert_close(sd**2, np.diag(cov), rtol=1e-14)
    assert_close(np.diag(corr), np.ones(k))
    assert_close(corr * np.outer(sd, sd), cov, rtol=1e-14, atol=1e-14)
    assert np.abs(corr).max() <= 1.0 + 1e-15


def test_correlation_with_a_zero_variance_is_nan() -> None:
    sd, corr = cov_to_sdcor(np.array([[0.0, 0.0], [0.0, 4.0]]))
    assert sd.tolist() == [0.0, 2.0]
    assert np.isnan(corr[0, 1]) and np.isnan(corr[1, 0]) and corr[1, 1] == 1.0


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_semidefinite_cholesky(k: int, rank: int) -> None:
    root = np.random.default_rng(10 * k + rank).normal(size=(k, min(rank, k)))
    cov = root @ root.T
    T = semidefinite_cholesky(cov)
    assert_close(T @ T.T, cov, atol=1e-12 * max(1.0, np.abs(cov).max()))
    assert np.array_equal(T, np.tril(T)) and (np.diag(T) >= 0.0).all()
    assert (np.linalg.norm(T, axis=0) > 0.0).sum() == min(rank, k)  # zero columns where rank is missing
    full = root @ root.T + np.eye(k)
    assert_close(semidefinite_cholesky(full), np.linalg.cholesky(full), rtol=1e-12, atol=1e-13)


def test_correlations_mirrored(rng: np.random.Generator) -> None:
    """The same standard deviations and rank; correlations with the first effect of the other sign."""
    for k, rank in ((2, 1), (2, 2), (3, 1), (3, 2), (4, 4)):
        A = rng.normal(size=(k, rank))
        T = semidefinite_cholesky(A @ A.T, tol=1e-10)
        structure = Unstructured(k)
        other = structure.host_factor(structure.mirrored(structure.theta_of(T)))
        assert_close(np.linalg.norm(other, axis=1), np.linalg.norm(T, axis=1), rtol=1e-12)
        assert np.linalg.matrix_rank(other, tol=1e-8) == np.linalg.matrix_rank(T, tol=1e-8)
        assert np.all((other[1:] @ other[0]) * (T[1:] @ T[0]) < 0.0)
        assert_close(np.triu(other, 1), np.zeros((k, k)), atol=0.0)


def test_undecided_correlations() -> None:
    """Near +-1 and not far from 0, by squares of estimates in variances; nothing where there is no correlation."""
    variance = np.array([0.01, 1.0, 1.0])
    theta = np.array(
        [[1.0, 2.0, 1.0], [1.0, 2.0, 1.5], [1.0, 2.5, 1.0], [1.0, -2.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 0.0]]
    )
    expected = [True, False, False, True, False, False]
    assert Unstructured(2).undecided(theta, np.broadcast_to(variance, theta.shape)).tolist() == expected
    three = np.array([[1.0, 2.0, 9.0, 9.0, 9.0, 1.0], [1.0, 9.0, 2.0, 9.0, 9.0, 1.0]])  # of one effect, not of two
    assert Unstructured(3).undecided(three, np.ones((2, 6))).tolist() == [False, True]
    structures = (Unstructured(3), Unstructured(4), Unstructured(1), Diagonal(3))
    assert [s.has_mirror for s in structures] == [True, False, False, False]
