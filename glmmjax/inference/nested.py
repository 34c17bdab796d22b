"""Whether one model is nested in another: their fixed effects and their covariances as spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from ..results import MixedModel

#: A column lies in the span of others if what they leave of it is below this part of its length.
WITHIN = 1e-9
#: The same for covariance matrices, squared lengths; what is left is known to about 1e-14.
SAME_COVARIANCE = 1e-9


class Relation(NamedTuple):
    """How a smaller model lies in a larger one: why it does not (or ""), and how many variances it has at 0.

    Overdispersion is one of them where the smaller family is the limit of the larger one.
    """

    problem: str
    variances: int
    dispersion: bool = False


def relation_of(smaller: MixedModel, larger: MixedModel) -> Relation:
    if smaller.df == larger.df:
        return Relation("as many parameters in both", 0)
    limit = smaller.family.name == larger.family.limit and smaller.family.link == larger.family.link
    limit = limit and bool(larger.family.phi_names)
    if limit and smaller._spec.hessian != larger._spec.hessian and not smaller.family.canonical:
        return Relation("one was fitted with expected and one with observed curvature", 0)
    if smaller.family != larger.family and not limit:
        return Relation("the families or links differ, so that the models are not nested", 0)
    a, b = smaller._design, larger._design
    Xa, Xb = np.asarray(a.X), np.asarray(b.X)
    if smaller.is_linear and not np.array_equal(np.asarray(a.weights), np.asarray(b.weights)):
        return Relation("the weights differ, so that the models are not nested", 0)
    if smaller.REML and not np.array_equal(Xa, Xb):
        return Relation("REML criteria of models with different fixed effects are not comparable", 0)
    shift = np.asarray(a.offset) - np.asarray(b.offset)
    if not _within(np.column_stack([Xa, shift]), Xb):
        return Relation("the fixed effects are not nested", 0)
    small, large = _patterns(smaller), _patterns(larger)
    if small is None or large is None:
        return Relation("whether covariances that are not linear in their parameters are nested is not known", 0)
    inside, variances = _covariance_within(small, large)
    if not inside:
        return Relation("the random effects are not nested", 0)
    return Relation("", variances + limit, limit)


def _within(A: np.ndarray, B: np.ndarray) -> bool:
    """Whether the columns of A lie in the span of those of B."""
    size_a, size_b = np.linalg.norm(A, axis=0), np.linalg.norm(B, axis=0)
    A, B = A[:, size_a > 0.0] / size_a[size_a > 0.0], B / np.where(size_b > 0.0, size_b, 1.0)
    Q = np.linalg.qr(B)[0]
    for _ in range(2):
        A = A - Q @ (Q.T @ A)
    return bool((np.linalg.norm(A, axis=0) < WITHIN).all())


class Pattern(NamedTuple):
    """The covariances of one random-effects term: z S z' within its levels, S in the span of `basis`, orthogonal."""

    z: np.ndarray  # (n, k)
    level: np.ndarray  # (n,)
    basis: np.ndarray  # (b, k, k) symmetric


def _patterns(model: MixedModel) -> list[Pattern] | None:
    """Those of a model's terms; None where a structure has none."""
    out = []
    for term, labels in zip(model._design.terms, model._data.terms, strict=True):
        z, basis = np.asarray(labels.z, float), term.structure.basis()
        if basis is None:
            return None
        z = np.linalg.qr(z)[0] if term.structure.any_basis else z / term.structure.units(np.linalg.norm(z, axis=0))
        out.append(Pattern(z, np.asarray(labels.level), basis))
    return out


def _inner(s: Pattern, t: Pattern) -> np.ndarray:
    """Inner products of the (n, n) covariances of two terms' bases, from cross-products by pairs of levels."""
    pair = s.level.astype(np.int64) * (int(t.level.max()) + 1) + t.level
    found, cell = np.unique(pair, return_inverse=True)
    C = np.zeros((found.size, s.z.shape[1], t.z.shape[1]))
    np.add.at(C, cell.reshape(-1), s.z[:, :, None] * t.z[:, None, :])
    return np.asarray(np.einsum("aij,bkl,ijkl->ab", s.basis, t.basis, np.einsum("cil,cjk->ijkl", C, C)))


def _covariance_within(small: list[Pattern], large: list[Pattern]) -> tuple[bool, int]:
    """Whether every covariance of the smaller model is one of the larger, and how far the latter is from full rank
    there: the number of variances that are 0.

    Covariances are linear in their parameters, so that this is a question of spans; a representation by least
    squares must also have positive semi-definite blocks.
    """
    gram = np.block([[_inner(s, t) for t in large] for s in large])
    across = np.block([[_inner(s, t) for t in small] for s in large])
    own = np.concatenate([np.diag(_inner(s, s)) for s in small])
    scale = 1.0 / np.sqrt(np.diag(gram))
    # (parameters of large, parameters of small)
    map_ = scale[:, None] * (
        np.linalg.pinv(gram * np.outer(scale, scale), 1e-10, hermitian=True) @ (scale[:, None] * across)
    )
    if (own - (across * map_).sum(axis=0) > SAME_COVARIANCE * own).any():
        return False, 0

    def blocks(coefficients: np.ndarray) -> list[np.ndarray]:
        image, out, start = map_ @ coefficients, [], 0
        for t in large:
            out.append(np.tensordot(image[start : start + len(t.basis)], t.basis, 1))
            start += len(t.basis)
        return out

    interior, start = np.zeros(own.size), 0
    for s in small:
        weights = np.square(s.basis).sum(axis=(1, 2))
        for v in np.concatenate([*np.linalg.eigh(s.basis)[1].swapaxes(1, 2), np.eye(s.z.shape[1])]):
            ray = np.zeros(own.size)
            ray[start : start + len(s.basis)] = np.einsum("bij,i,j->b", s.basis, v, v) / weights
            values = [np.linalg.eigvalsh(S) for S in blocks(ray)]
            largest = max(np.abs(x).max() for x in values)
            if min(x.min() for x in values) < -1e-6 * largest:
                return False, 0
        interior[start : start + len(s.basis)] = np.einsum("bii->b", s.basis) / weights
        start += len(s.basis)
    pairs = [np.linalg.eigh(S) for S in blocks(interior)]
    floor = 1e-6 * max(np.abs(values).max() for values, _ in pairs)
    spaces = [vectors[:, values < floor] for values, vectors in pairs]
    return True, sum(_variances_in(space, t.basis) for space, t in zip(spaces, large, strict=True))


def _variances_in(space: np.ndarray, basis: np.ndarray) -> int:
    """How many different variances covariances in the span of basis (b, k, k) have in a subspace (k, r)."""
    if not space.shape[1]:
        return 0
    weights = np.random.default_rng(0).normal(size=len(basis))
    values = np.linalg.eigvalsh(space.T @ np.tensordot(weights, basis, 1) @ space)
    return 1 + int((np.diff(values) > 1e-6 * np.abs(values).max()).sum())
