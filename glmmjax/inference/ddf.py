"""Denominator degrees of freedom of linear mixed models: Satterthwaite's and Kenward and Roger's, and their tables.

Both need how the covariance of the fixed effects moves with the variance parameters. Satterthwaite's method takes it,
and the curvature of the criterion, from automatic differentiation; Kenward and Roger's closed forms are sums
over levels of cross-products, so that no matrix over the n rows is ever made.

Sources: Kuznetsova, Brockhoff & Christensen 2017, J. Stat. Softw. 82(13) (lmerTest); Halekoh & Højsgaard 2014,
J. Stat. Softw. 59(9) (pbkrtest); Kenward & Roger 1997, Biometrics 53; Fai & Cornelius 1996, J. Stat. Comput.
Simul. 54. What is computed is what lmerTest 3.1 and pbkrtest 0.5 define, but for two things: Kenward-Roger knows prior
weights (pbkrtest takes all of them as 1), and `a` is contained in `a:b` also where `b` is not a term of the model
(lmerTest then tests `a` at the first level of `b`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import jax
import numpy as np
import pandas as pd

from .._errors import NotSupportedError
from ..compiling.entry import entry
from ..fit.lmm import LinearProblem
from ..formula.columns import Factor, as_factor, take_rows
from ..formula.matrix import independent_columns
from ..formula.terms import bits
from ..model.design import Design
from ..objective.pls import gradient_and_covariance, moving_covariance

if TYPE_CHECKING:
    from ..results import MixedModel

METHODS = {"satterthwaite": "Satterthwaite", "kenward-roger": "Kenward-Roger"}
#: Random effects of models with several grouping factors that Kenward-Roger takes: it holds a matrix over all of them.
MAX_DENSE = 6000
#: Dense remainder up to which second derivatives are exact; beyond, the gradient alone compiles in half the time, and
#: second derivatives would hold the remainder once per parameter and more.
MAX_EXACT = 500
#: Step of the differences then, in standard errors of theta (1 at most): relative error 3e-8.
STEP = 1e-3
#: Eigenvalues of a Hessian up to this part of the largest are noise; lmerTest's bound is absolute.
FLAT = 1e-10
#: Entries of estimable functions below this, columns scaled to at most 1, are rounding.
ROUNDING = 1e-9


class ContrastTest(NamedTuple):
    """Test of L beta = rhs.

    Attributes:
        f_value: F, with Kenward and Roger's scale factor. num_df, den_df, p_value: of its distribution.
        mean_sq: F without that factor, times sigma^2.
        estimate, std_error, t_value: of L beta - rhs where L has one row, else NaN.
    """

    f_value: float
    num_df: int
    den_df: float
    p_value: float
    mean_sq: float
    estimate: float
    std_error: float
    t_value: float


class _Method(Protocol):
    """One way to degrees of freedom; contrasts L (r, p) are in units of Xs, X = Xs A."""

    def single(self, row: np.ndarray) -> tuple[float, float]:
        """Variance and degrees of freedom of one contrast (p,)."""

    def joint(self, L: np.ndarray, estimate: np.ndarray) -> tuple[float, int, float, float]:
        """F without its scale factor, numerator and denominator df, and that factor."""


# -------------------- Satterthwaite
_exact = jax.jit(moving_covariance, static_argnames=("terms",))


_compiled_gradient = jax.jit(gradient_and_covariance, static_argnames=("terms",))


def _by_differences(theta: np.ndarray, steps: np.ndarray, *data: Any) -> tuple[Any, Any]:
    """`_exact` by central differences."""
    columns = []
    for e in np.diag(steps):
        up, down = (_compiled_gradient(theta + d, *data) for d in (e, -e))
        columns.append([(np.asarray(a) - np.asarray(b)) / (2.0 * e.sum()) for a, b in zip(up, down, strict=True)])
    derivatives = tuple(np.stack(c, axis=-1) for c in zip(*columns, strict=True))
    return derivatives, _compiled_gradient(theta, *data)[1]


class Satterthwaite:
    """Degrees of freedom 2 v^2 / Var(v), v the variance of a contrast, by the delta method.

    With sigma profiled out of criterion and variance alike, Var(v) = v' A v' + 2 v^2 / N: A is twice the inverse
    Hessian of the profiled criterion in theta, v' the derivative of the profiled variance, and N is n, or n - p by
    REML. That is the partitioned inverse of the Hessian over (theta, log sigma), lmerTest's parameters.

    At a singular fit the Hessian can have directions without positive curvature (which of several factors of one
    singular covariance is taken, say): they are left out, A being a pseudo-inverse, as in lmerTest.
    """

    @entry
    def __init__(self, model: MixedModel, exact: bool | None = None) -> None:
        problem = _problem(model)
        basis = problem.scaling.basis
        theta = basis.inner(model.theta)
        data: Any = problem._arguments
        if problem.original.plan.size <= MAX_EXACT if exact is None else exact:
            found = _exact(theta, *data)
        else:
            curvature = np.diag(basis.inverse.T @ model._estimates.hessian @ basis.inverse)
            found = _by_differences(theta, STEP / np.sqrt(np.maximum(curvature, 1.0)), *data)
        (H, self.slopes), self.covariance = jax.tree.map(np.asarray, found)
        values, vectors = np.linalg.eigh(0.5 * (H + H.T))
        up = values > max(1e-8, FLAT * values[-1])
        self.of_theta = 2.0 * (vectors[:, up] / values[up]) @ vectors[:, up].T
        self.size = model.nobs - (self.covariance.shape[0] if model.REML else 0)

    def single(self, row: np.ndarray) -> tuple[float, float]:
        v = row @ self.covariance @ row
        slope = np.einsum("i,ijt,j->t", row, self.slopes, row)
        return float(v), float(2.0 * v**2 / (slope @ self.of_theta @ slope + 2.0 * v**2 / self.size))

    def joint(self, L: np.ndarray, estimate: np.ndarray) -> tuple[float, int, float, float]:
        """Fai & Cornelius: F is the mean of q independent squared t, its df the one that gives their mean."""
        values, vectors = np.linalg.eigh(L @ self.covariance @ L.T)
        keep = np.flatnonzero(values > np.sqrt(np.finfo(float).eps) * values[-1])[::-1]
        P = vectors[:, keep].T
        F = float((np.square(P @ estimate) / values[keep]).mean())
        return F, len(keep), _mean_df(np.array([self.single(row)[1] for row in P @ L])), 1.0


def _mean_df(nu: np.ndarray) -> float:
    """Denominator df of an F that is the mean of squared t with df nu; 2 where one has no mean (lmerTest)."""
    if (np.abs(np.diff(nu)) < 1e-8).all():
        return float(nu.mean())
    if (nu <= 2.0).any():
        return 2.0
    # 2 E / (E - q) with E = sum nu / (nu - 2), without the cancellation
    return float((nu / (nu - 2.0)).sum() / (1.0 / (nu - 2.0)).sum())


# -------------------- Kenward-Roger
class KenwardRoger:
    """Kenward and Roger's adjusted covariance of beta and scaled F.

    V = sigma^2 (W^-1 + sum_i gamma_i G_i), G_i = Z E_i Z', with the matrices E_i of which the terms' covariances are
    combinations, the same for every level: of lme4's terms gamma are the distinct entries, E_i their 0/1 patterns. All
    that is needed follows from K = Z'V^-1 Z, C = Z'V^-1 X and M = X'V^-1 X at sigma = 1. As W^-1 = V - sum_i gamma_i
    G_i, and nothing changes under a linear change of parameters, V itself stands for the derivative in sigma^2: its
    products are M, C and n.

    K is block diagonal over the levels of a single grouping factor, and dense (q, q) for several.
    """

    @entry
    def __init__(self, model: MixedModel) -> None:
        if not model.REML:
            raise ValueError("ddf='Kenward-Roger' is defined for REML fits; refit with REML=True")
        problem = _problem(model)
        design = problem.original
        cross: Any = jax.tree.map(np.asarray, problem.cross)
        p = design.p
        S = _covariances(problem.scaling.basis.inner(model.theta), design, [A.shape[-1] for A in cross.blocks.diagonal])
        A, B, positions = _stacked(cross, design, model)  # (b, r, r), (b, r, p)
        AS, SB = np.empty_like(A), np.empty_like(B)
        for s, at in zip(S, positions, strict=True):
            m, k = at.shape
            AS[:, :, at.ravel()] = (A[:, :, at.ravel()].reshape(*A.shape[:2], m, k) @ s).reshape(*A.shape[:2], m * k)
            SB[:, at.ravel()] = (s @ B[:, at]).reshape(B.shape[0], m * k, p)
        # (I + Z'WZ Lambda Lambda')^-1: no cancellation, and nothing divides by a variance
        KC = np.linalg.solve(np.eye(A.shape[1]) + AS, np.concatenate([A, B], axis=2))
        K, C = 0.5 * (KC[:, :, :-p] + KC[:, :, :-p].swapaxes(1, 2)), KC[:, :, -p:]
        M = cross.gram[:p, :p] - _dot(SB, C)
        self._adjust(K, C, 0.5 * (M + M.T), _patterns(design, positions), design.n, model.sigma**2)

    def _adjust(
        self,
        K: np.ndarray,
        C: np.ndarray,
        M: np.ndarray,
        patterns: list[Pattern],
        n: int,
        sigma2: float,
    ) -> None:
        """P, W and the adjusted covariance (Halekoh & Højsgaard 2014, section 2.2); V comes last among the G_i."""
        p, g = M.shape[0], len(patterns)
        Phi = np.linalg.inv(M)
        P, Q, trace = np.empty((g + 1, p, p)), np.empty((g + 1, g + 1, p, p)), np.empty((g + 1, g + 1))
        P[g], Q[g, g], trace[g, g] = -M, M, n
        moved = []  # E_i C
        for i, (rows, columns, size) in enumerate(patterns):
            moved.append(np.zeros_like(C))
            np.add.at(moved[i].swapaxes(0, 1), rows, (size[:, None] * C[:, columns]).swapaxes(0, 1))
            P[i] = -_dot(C, moved[i])
            Q[i, g] = Q[g, i] = -P[i]
            trace[i, g] = trace[g, i] = (K[:, columns, rows] * size).sum()
        for j, (rows, columns, size) in enumerate(patterns):
            KD = K @ moved[j]
            for i, (rows_i, columns_i, size_i) in enumerate(patterns[: j + 1]):
                Q[i, j] = _dot(moved[i], KD)
                Q[j, i] = Q[i, j].T
                left, right = K[:, rows_i[:, None], columns], K[:, columns_i[:, None], rows]
                trace[i, j] = trace[j, i] = np.vdot(left * size_i[:, None] * size, right)
        PhiP = Phi @ P
        information = trace - 2.0 * np.einsum("ab,ijab->ij", Phi, Q) + np.einsum("iab,jba->ij", PhiP, PhiP)
        seen = np.diag(information) > 1e-10 * np.diag(trace)  # else X explains all that the term could
        scale = np.where(seen, 1.0 / np.sqrt(np.where(seen, np.diag(information), 1.0)), 0.0)
        W = 2.0 * np.linalg.pinv(information * np.outer(scale, scale), 1e-10, hermitian=True) * np.outer(scale, scale)
        U = np.einsum("ij,ijab->ab", W, Q) - np.einsum("ij,iab,jbc->ac", W, P, PhiP)
        self.covariance = sigma2 * Phi
        self.adjusted = sigma2 * (Phi + Phi @ (U + U.T) @ Phi)
        self.W, self.half = W, PhiP @ self.covariance

    def single(self, row: np.ndarray) -> tuple[float, float]:
        return float(row @ self.adjusted @ row), self._df(row[None])[0]

    def joint(self, L: np.ndarray, estimate: np.ndarray) -> tuple[float, int, float, float]:
        F = float(estimate @ np.linalg.solve(L @ self.adjusted @ L.T, estimate)) / len(L)
        return F, len(L), *self._df(L)

    def _df(self, L: np.ndarray) -> tuple[float, float]:
        """Denominator df and scale factor of F for L of full row rank (Kenward & Roger 1997, section 3)."""
        q = len(L)
        inner = np.linalg.solve(L @ self.covariance @ L.T, np.einsum("ra,iab,sb->irs", L, self.half, L))
        traces = np.trace(inner, axis1=1, axis2=2)
        A1 = float(traces @ self.W @ traces)
        A2 = float(np.einsum("ij,irs,jsr->", self.W, inner, inner))
        b = (A1 + 6.0 * A2) / (2.0 * q)
        g = ((q + 1.0) * A1 - (q + 4.0) * A2) / ((q + 2.0) * A2)
        size = 3.0 * q + 2.0 * (1.0 - g)
        v0, v1, v2 = 1.0 + g / size * b, 1.0 - (q - g) / size * b, 1.0 - (q + 2.0 - g) / size * b
        v0 = 0.0 if abs(v0) < 1e-10 else v0
        top = 1.0 - A2 / q
        ratio = 1.0 if abs(top) < 1e-14 and abs(v1) < 1e-14 else top / v1
        rho = ratio**2 * v0 / v2 / q
        df = 4.0 + (q + 2.0) / (q * rho - 1.0)
        return df, 1.0 if abs(df - 2.0) < 0.01 else df * top / (df - 2.0)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(p, p'): a'b summed over blocks; a (b, r, p), b (b, r, p')."""
    return a.reshape(-1, a.shape[2]).T @ b.reshape(-1, b.shape[2])


def _covariances(theta: np.ndarray, design: Design, widths: list[int]) -> list[np.ndarray]:
    """T T' (k, k) of every block."""
    out = [np.zeros((k, k)) for k in widths]
    for t in design.terms:
        T = t.structure.host_factor(theta[t.theta])
        out[t.block][t.columns, t.columns] = T @ T.T
    return out


def _stacked(cross: Any, design: Design, model: MixedModel) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Z'WZ and Z'W Xs: (m, k, .) for one grouping factor; else (1, q, .), with the position of each (level, column)."""
    p, diagonal = design.p, cross.blocks.diagonal
    if len(diagonal) == 1:
        return diagonal[0], cross.border[0][..., :p], [np.arange(diagonal[0].shape[-1])[None]]
    q = design.q
    if q > MAX_DENSE:
        raise NotSupportedError(
            f"ddf='Kenward-Roger' needs a dense matrix over the {q:,} random effects of several grouping factors "
            f"({', '.join(model.ngrps)}); the limit is {MAX_DENSE:,}: use ddf='Satterthwaite'"
        )
    A, positions, start = np.zeros((q, q)), [], 0
    for block in diagonal:
        m, k = block.shape[:2]
        at = start + np.arange(m * k).reshape(m, k)
        A[at[:, :, None], at[:, None, :]] = block
        positions.append(at)
        start += m * k
    for c, block in zip(design.plan.couplings, cross.blocks.pairs, strict=True):
        rows, columns = positions[c.first][c.a], positions[c.second][c.b]
        A[rows[:, :, None], columns[:, None, :]] = block
        A[columns[:, :, None], rows[:, None, :]] = block.swapaxes(1, 2)
    B = np.concatenate([b[..., :p].reshape(-1, p) for b in cross.border])
    return A[None], B[None], positions


class Pattern(NamedTuple):
    """The entries of one E_i that are not 0."""

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


def _patterns(design: Design, positions: list[np.ndarray]) -> list[Pattern]:
    """E_i of each matrix that the covariance of each term is a combination of."""
    out = []
    for t in design.terms:
        at, basis = positions[t.block][:, t.columns], t.structure.basis()
        if basis is None:
            raise NotSupportedError(
                f"ddf='Kenward-Roger' is for covariances that are linear in parameters, not {t.structure}: "
                "use ddf='Satterthwaite'"
            )
        for E in basis:
            a, b = np.nonzero(E)
            out.append(Pattern(at[:, a].T.ravel(), at[:, b].T.ravel(), np.repeat(E[a, b], len(at))))
    return out


# -------------------- hypotheses
def hypotheses(model: MixedModel, type: int | str = 3) -> dict[str, pd.DataFrame]:
    """Contrast matrices (r, p) of each fixed-effects term, as lmerTest's ``show_tests``.

    Args:
        type: 1, "I": terms in order, each given those before it (Doolittle's factor of X'X without weights).
            2, "II": each given all that do not contain it; 3, "III": marginal means with equal weights.

    A term is contained in another that has all its factors and more, and the same numeric variables; matrices such as
    ``poly(x, 2)`` count as factors (lmerTest). A term without columns of its own, all aliased, has no rows.
    """
    kind = {"1": 1, "I": 1, "2": 2, "II": 2, "3": 3, "III": 3}.get(str(type))
    if kind is None:
        raise ValueError(f"type must be 1, 2 or 3, got {type!r}")
    data = model._data
    assign = np.asarray(data.assign)
    if len(data.term_labels) == 1:  # one hypothesis, but Fai & Cornelius's df can depend on its basis: lmerTest's
        kind = 1
    if kind == 1:
        L = _doolittle(data.X)
        made = [L[assign == t] for t in range(1, len(data.term_labels) + 1)]
    else:
        made = (_type_two if kind == 2 else _type_three)(model, assign)
    return {label: pd.DataFrame(L, columns=list(data.x_names)) for label, L in zip(data.term_labels, made, strict=True)}


def _doolittle(X: np.ndarray) -> np.ndarray:
    """U of X'X = U'D U, upper triangular with unit diagonal."""
    R = np.linalg.qr(X, mode="r")
    return np.asarray(R / np.diag(R)[:, None])


def _containing(model: MixedModel) -> list[list[int]]:
    """Per term (from 1), the terms that contain it."""
    spec = model._data._fixed
    codes = spec.terms.codes
    numeric = sum(1 << i for i, c in spec.coded.items() if c.kind == "numeric")
    return [[u for u, d in enumerate(codes, start=1) if c & d == c != d and c & numeric == d & numeric] for c in codes]


def _type_two(model: MixedModel, assign: np.ndarray) -> list[np.ndarray]:
    out, p = [], assign.size
    for t, inside in enumerate(_containing(model), start=1):
        own, last = assign == t, np.isin(assign, inside)
        if not inside:
            out.append(np.eye(p)[own])
            continue
        order = np.concatenate([np.flatnonzero(~own & ~last), np.flatnonzero(own), np.flatnonzero(last)])
        L = np.empty((p, p))
        L[np.ix_(order, order)] = _doolittle(model._data.X[:, order])
        out.append(L[own])
    return out


def _type_three(model: MixedModel, assign: np.ndarray) -> list[np.ndarray]:
    """From the general form of estimable functions, in indicators of all levels: the rows of a term are orthogonal to
    those of the terms that contain it. Written for treatment contrasts, then translated to those of the fit.
    Without an intercept the first factor's hypothesis is one on its level means, which keeps a part of the
    interactions (lmerTest)."""
    full, kept, owner = _indicators(model)
    X = full[:, kept]
    independent = independent_columns(X)
    X, kept = X[:, independent], kept[independent]
    scale, scale_full = (np.abs(x).max(axis=0) for x in (X, full))
    scale_full[scale_full == 0.0] = 1.0  # a combination of levels without rows
    q, r = np.linalg.qr(X / scale)

    def on_X(columns: np.ndarray, size: np.ndarray) -> np.ndarray:
        out = np.linalg.solve(r, q.T @ (columns / size))
        out[np.abs(out) < ROUNDING] = 0.0
        return np.asarray(out * size / scale[:, None])

    L = on_X(full, scale_full).T  # (all levels, columns of X)
    term = owner[kept]
    containing = _containing(model)
    by_degree = sorted(range(1, len(containing) + 1), key=lambda t: -model._data._fixed.terms.codes[t - 1].bit_count())
    for t in by_degree:
        own, others = term == t, np.isin(term, containing[t - 1])
        if own.any() and others.any():
            rest = L[:, own] - L[:, others] @ np.linalg.lstsq(L[:, others], L[:, own], rcond=ROUNDING)[0]
            rest[np.abs(rest) < ROUNDING * np.abs(L[:, own]).max()] = 0.0
            L[:, own] = rest
    translate = on_X(model._data.X, np.abs(model._data.X).max(axis=0))
    if not np.allclose(X @ translate, model._data.X):
        raise ValueError("the data have changed since the fit; fit again, or use type 1 or 2")
    out = []
    for t in range(1, len(containing) + 1):
        rows = L[np.ix_(kept, term == t)].T
        out.append(rows[np.abs(rows).sum(axis=1) > 1e-8] @ translate)
    return out


def _indicators(model: MixedModel) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns of every term with factors as indicators of all levels (n, N); which of them treatment contrasts keep,
    and the term of each, 0 for the intercept."""
    data = model._data
    spec, evaluator = data._fixed, data._evaluator(model._spec.arguments["data"])
    rows = None if data.keep.all() else np.flatnonzero(data.keep)
    own: dict[int, np.ndarray] = {}
    for i, coded in spec.coded.items():
        value = take_rows(evaluator.variable(spec.terms.variables[i]), rows)
        if coded.kind == "factor":
            factor = as_factor(value)
            codes = np.array([coded.levels.index(v) if v in coded.levels else -1 for v in factor.levels])
            value = Factor(codes[factor.codes], coded.levels)
        own[i] = coded.columns(value, False)[0]
    n = data.nobs
    parts = [np.ones((n, 1))] if spec.terms.intercept else []
    kept = [np.arange(len(parts))]
    owner = [0] * len(parts)
    for t, (code, variables) in enumerate(zip(spec.terms.codes, spec.plan, strict=True), start=1):
        block, index = np.ones((n, 1)), [np.arange(own[i].shape[1]) for i in bits(code)]
        for i in bits(code):  # the first variable varies fastest
            block = (own[i][:, :, None] * block[:, None, :]).reshape(n, -1)
        positions = np.arange(block.shape[1]).reshape([x.size for x in index], order="F")
        chosen = [
            x[1:] if by_contrasts and spec.coded[i].kind == "factor" else x
            for x, (i, by_contrasts) in zip(index, variables, strict=True)
        ]
        kept.append(len(owner) + positions[np.ix_(*chosen)].ravel(order="F"))
        parts.append(block)
        owner += [t] * block.shape[1]
    return np.concatenate(parts, axis=1), np.concatenate(kept), np.array(owner)


# -------------------- tables
_MADE: WeakKeyDictionary[MixedModel, dict[str, _Method]] = WeakKeyDictionary()


def _problem(model: MixedModel) -> LinearProblem:
    problem = model._problem
    assert isinstance(problem, LinearProblem)
    return problem


def _checked(model: MixedModel, ddf: str) -> str:
    """The method's name, of a model that it is for."""
    name = ddf.lower() if isinstance(ddf, str) else ddf
    if name not in METHODS:
        raise ValueError(f"ddf must be {' or '.join(map(repr, METHODS))}, got {ddf!r}")
    if not model.is_linear:
        raise NotSupportedError(
            f"denominator degrees of freedom ({METHODS[name]}) are defined for linear mixed models only; "
            "the tests of a generalised model are asymptotic: use summary() without ddf, or anova(m1, m2)"
        )
    return name


def _method(model: MixedModel, ddf: str) -> _Method:
    """What a method knows of a model; kept, as summary and tables share it."""
    name = _checked(model, ddf)
    if not model._design.p:
        raise ValueError("the model has no fixed effects to test")
    made = _MADE.setdefault(model, {})
    if name not in made:
        made[name] = Satterthwaite(model) if name == "satterthwaite" else KenwardRoger(model)
    return made[name]


@entry
def _in_units_of_Xs(L: np.ndarray, model: MixedModel) -> np.ndarray:
    A = np.asarray(_problem(model).cross.A)
    return np.linalg.solve(A.T, L.T).T


def coefficient_table(model: MixedModel, ddf: str) -> pd.DataFrame:
    """Tests of the fixed effects, as lmerTest's ``coef(summary(m, ddf = ))``.

    Args:
        ddf: "satterthwaite" or "kenward-roger", in any case; the latter for REML fits only.

    Returns:
        estimate, std_error (Kenward-Roger: the adjusted one), df, statistic (t), p_value by coefficient.
    """
    _checked(model, ddf)
    if not model._design.p:
        return pd.DataFrame({name: np.zeros(0) for name in ("estimate", "std_error", "df", "statistic", "p_value")})
    from scipy.special import stdtr

    method = _method(model, ddf)
    rows = _in_units_of_Xs(np.eye(model._design.p), model)
    variance, df = np.array([method.single(row) for row in rows]).T
    se = np.sqrt(variance)
    t = model.beta / se
    columns = {"estimate": model.beta, "std_error": se, "df": df, "statistic": t}
    return pd.DataFrame({**columns, "p_value": 2.0 * stdtr(df, -np.abs(t))}, index=list(model._data.x_names))


def contrast_test(model: MixedModel, L: Any, ddf: str = "satterthwaite", rhs: Any = 0.0) -> ContrastTest:
    """Test of L beta = rhs, as lmerTest's ``contest``.

    Args:
        L: (r, p) or (p,) contrasts of the coefficients of `fixef`; rows may be dependent.
        ddf: as in `coefficient_table`.
        rhs: () or (r,); `estimate` is what is left after it.

    Raises:
        ValueError: the shape does not fit, an entry is not finite, or all are 0.
    """
    from scipy.special import fdtrc

    method = _method(model, ddf)
    L = np.atleast_2d(np.asarray(L, float))
    p = model._design.p
    if L.ndim != 2 or L.shape[1] != p:
        raise ValueError(f"L must have one column for each of the {p} fixed effects, got shape {L.shape}")
    if not np.isfinite(L).all() or not L.any():
        raise ValueError("L must be finite and not all zero")
    estimate, inner = L @ model.beta - rhs, _in_units_of_Xs(L, model)
    if len(L) > 1 and isinstance(method, KenwardRoger):  # Satterthwaite's finds the row space itself
        left, size, _ = np.linalg.svd(inner, full_matrices=False)
        basis = left[:, size > np.sqrt(np.finfo(float).eps) * size[0]].T
        estimate, inner = basis @ estimate, basis @ inner
    single = [np.nan] * 3
    if len(L) == 1:
        variance, df = method.single(inner[0])
        t = float(estimate[0]) / np.sqrt(variance)
        single = [float(estimate[0]), float(np.sqrt(variance)), float(t)]
        F, q, factor = float(t) ** 2, 1, 1.0
    else:
        F, q, df, factor = method.joint(inner, estimate)
    return ContrastTest(factor * F, q, df, float(fdtrc(q, df, factor * F)), model.sigma**2 * F, *single)


def anova_table(model: MixedModel, type: int | str = 3, ddf: str = "satterthwaite") -> pd.DataFrame:
    """F tests of the fixed-effects terms, as lmerTest's ``anova(m, type = , ddf = )``.

    Args:
        type: see `hypotheses`. ddf: as in `coefficient_table`.

    Returns:
        "Sum Sq", "Mean Sq", "NumDF", "DenDF", "F value", "Pr(>F)" by term, without the intercept; the heading
        is in ``attrs["heading"]``. "Mean Sq" is F times sigma^2, for Kenward-Roger F before scaling. A term
        whose columns are all aliased has NaN.
    """
    _method(model, ddf)  # refusals first
    tested = hypotheses(model, type)
    rows = []
    for L in tested.values():
        if not len(L):
            rows.append([np.nan] * 6)
            continue
        test = contrast_test(model, L, ddf)
        rows.append([test.num_df * test.mean_sq, test.mean_sq, test.num_df, test.den_df, test.f_value, test.p_value])
    names = ["Sum Sq", "Mean Sq", "NumDF", "DenDF", "F value", "Pr(>F)"]
    table = pd.DataFrame(np.reshape(rows, (-1, 6)), index=list(tested), columns=names)
    roman = {"1": "I", "2": "II", "3": "III"}.get(str(type), str(type))
    table.attrs["heading"] = f"Type {roman} Analysis of Variance Table with {METHODS[ddf.lower()]}'s method"
    return table
