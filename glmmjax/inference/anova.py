"""Tables of tests: of the terms of one model, and of nested models by their likelihoods."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from .._arguments import checked, flag, is_model
from ..model.covariance import Diagonal
from ..report.summary import columns_text, stars

if TYPE_CHECKING:
    from ..results import MixedModel

LEGEND = "Signif. codes:  0 '***' 0.001 '**' 0.01 '*' 0.05 '.' 0.1 ' ' 1"
#: A column lies in the span of others if what they leave of it is below this part of its length.
WITHIN = 1e-9
#: The same for covariance matrices, squared lengths; what is left is known to about 1e-14.
SAME_COVARIANCE = 1e-9
#: Families whose responses have probabilities, and those with densities: likelihoods do not compare between the two.
DISCRETE = frozenset({"binomial", "poisson", "negative.binomial"})
CONTINUOUS = frozenset({"gaussian", "Gamma", "inverse.gaussian", "beta"})


# -------------------- printing
def r_format(values: Any, digits: int) -> list[str]:
    """R's format() of a vector: as many decimals as the number that needs most of them for `digits` significant
    digits, trailing zeros apart; all in scientific notation if that is narrower. NaN is empty."""
    array = np.asarray(values, float).reshape(-1)
    left = right = mantissa = 0
    large = False
    for v in array[np.isfinite(array)]:
        text, power = f"{abs(v):.{digits - 1}e}".split("e")
        exponent = int(power) if v else 0
        significant = max(len(text.replace(".", "").rstrip("0")), 1)
        left = max(left, max(exponent, 0) + 1 + (v < 0))
        right = max(right, significant - exponent - 1)
        mantissa = max(mantissa, significant - 1)
        large = large or abs(exponent) >= 100
    fixed = left + (right + 1 if right else 0)
    scientific = (array < 0).any() + 1 + (mantissa + 1 if mantissa else 0) + 4 + large
    style = f".{right}f" if fixed <= scientific else f".{mantissa}e"
    return ["" if np.isnan(v) else f"{v:{style}}" for v in array]


def r_pvalues(p: Any, digits: int = 4) -> list[str]:
    """R's format.pval of a vector; NaN is empty."""
    p = np.asarray(p, float).reshape(-1)
    tiny, eps = p < np.finfo(float).eps, np.finfo(float).eps
    power = np.floor(np.log10(np.where(p > 0.0, p, 1e-50)))
    plain = (power >= -3) | ((power == -4) & (digits > 1))
    out = np.full(p.size, "", dtype=object)
    for group in (plain & ~tiny, ~plain & ~tiny):
        if group.any():
            out[group] = r_format(p[group], digits)
    if tiny.any():
        fewer, space = max(1, digits - 2), " "
        widest = max((len(t) for t in out[~tiny]), default=0)
        if widest:
            fewer = max(1, widest - 7) if 1 < fewer and fewer + 6 > widest else fewer
            space = "" if fewer == 1 and widest <= 6 else " "
        out[tiny] = f"<{space}{r_format([eps], fewer)[0]}"
    return out.tolist()


class AnovaTable(pd.DataFrame):
    """A DataFrame that prints like R's anova tables.

    `attrs["heading"]` is what stands above the table, `attrs["notes"]` the sentences of it that concern the user.
    """

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def __copy__(self, deep: bool = True) -> AnovaTable:
        # what pandas makes of its rows and columns is a plain DataFrame, and a copy is a table like this one
        out = AnovaTable(super().copy(deep))
        out.attrs.update(self.attrs)
        return out

    def __deepcopy__(self, memo: Any = None) -> AnovaTable:
        return self.__copy__()

    def cells(self) -> list[list[str]]:
        """Text of the table: header, then rows; stars are in the last column, which has no name."""
        names = [str(c) for c in self.columns]
        values = {c: self[c].to_numpy(float) for c in self.columns}
        tested = [c for c, name in zip(self.columns, names, strict=True) if name[1:] == " value" or name == "Chisq"]
        text: dict[Any, list[str]] = {}
        joint = r_format(np.concatenate([np.round(values[c], 4) for c in tested]), 5) if tested else []
        for i, c in enumerate(tested):
            text[c] = joint[i * len(self) : (i + 1) * len(self)]
        for c, name in zip(self.columns, names, strict=True):
            if name.startswith("Pr("):
                text[c] = r_pvalues(values[c])
            elif c not in text:
                v = values[c]
                largest = np.nanmax(np.abs(v), initial=0.0)
                if not name.endswith("Df") and largest > 0.0:  # R's zapsmall
                    v = np.round(v, max(0, int(5.0 - np.log10(largest) + 0.5)))
                text[c] = r_format(v, 5)
        with_p = bool(names) and names[-1].startswith("Pr(")
        marks = [stars(p) if with_p else "" for p in self.iloc[:, -1]] if names else [""] * len(self)
        rows = [[str(label), *(text[c][i] for c in self.columns), marks[i]] for i, label in enumerate(self.index)]
        return [["", *names, ""], *rows]

    def __str__(self) -> str:
        rows = self.cells()
        lines = [self.attrs.get("heading", "Analysis of Variance Table")]
        lines += columns_text(rows, [False] + [True] * len(self.columns) + [False])
        if any(row[-1] for row in rows[1:]):
            lines += ["---", LEGEND]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = self.cells()
        heading = html.escape(self.attrs.get("heading", "Analysis of Variance Table")).replace("\n", "<br>")
        head = "".join(f"<th>{html.escape(c)}</th>" for c in rows[0])
        body = "".join(
            f"<tr><th>{html.escape(r[0])}</th>" + "".join(f"<td>{html.escape(c)}</td>" for c in r[1:]) + "</tr>"
            for r in rows[1:]
        )
        return f"<div><p>{heading}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def made_table(frame: pd.DataFrame, heading: Sequence[str], notes: Sequence[str] = ()) -> AnovaTable:
    """A table with its heading, notes last."""
    out = AnovaTable(frame)
    out.attrs["heading"] = "\n".join([*heading, *(f"Note: {note}" for note in notes)])
    out.attrs["notes"] = list(notes)
    return out


def chisq_tail(x: float, df: float) -> float:
    """P(chi2_df > x); NaN where df is 0."""
    from scipy.special import chdtrc

    return float(chdtrc(df, max(x, 0.0))) if df > 0 else float("nan")


# -------------------- one or several models
REFITTED = "refitting model(s) with ML (instead of REML)"


@checked(refit=flag)
def anova(
    model: MixedModel,
    *models: MixedModel,
    refit: bool = True,
    names: Sequence[str] | None = None,
    boundary: bool = False,
    type: int | str | None = None,
    ddf: str | None = None,
) -> AnovaTable:
    """Tests of the terms of one model, or likelihood-ratio tests between several.

    Args:
        model, models: fits by `glmmjax.lmer` or `glmmjax.glmer`. Several are sorted by their number of parameters,
            and each is tested against the one before it.
        refit: whether linear models fitted by REML are fitted by maximum likelihood first.
        names: of the models in the table, in the order given; default MODEL1, MODEL2, ...
            The line "Data:" is printed where the data frame has ``attrs["name"]``.
        boundary: add "Pr(>Chisq) boundary": where the smaller model is the larger one with one variance at 0, the
            p-value of the mixture (chi2_{Df-1} + chi2_Df) / 2; elsewhere the ordinary one.
        type: for one model: 3 (each term on equally weighted marginal means, whatever contrasts the fit used), 2
            (each term after all that do not contain it), or 1 (in the order of the formula). Default 3 for linear
            models and 1 for generalised ones.
        ddf: for one linear model: "satterthwaite" (default), or "kenward-roger" for fits by REML.

    Returns:
        DataFrame that prints like R's.
        Several models: npar, AIC, BIC, logLik, -2*log(L), Chisq, Df, Pr(>Chisq) by model. The p-value is NaN where
        Df is 0 or the smaller model is not nested in the larger one; ``attrs["notes"]`` says why.
        One linear model: Sum Sq, Mean Sq, NumDF, DenDF, F value, Pr(>F) by term, as lmerTest.
        One generalised model: npar, Sum Sq, Mean Sq, F value for type 1, as lme4; Chisq, Df, Pr(>Chisq) for types 2
        and 3, Wald tests: type 2 as car's, type 3 as lmerTest's hypotheses (car's with contrasts that sum to 0).

    Raises:
        ValueError: the models are not comparable: other rows or response, linear and generalised, other nAGQ.

    Sources: Kuznetsova, Brockhoff & Christensen 2017, J. Stat. Softw. 82(13); mixtures: Self & Liang 1987, J. Am.
    Stat. Assoc. 82; Stram & Lee 1994, Biometrics 50.
    """

    for m in (model, *models):
        if not is_model(m):
            raise ValueError(
                f"anova takes fitted models, got {m.__class__.__name__}; write other arguments by name: type=2"
            )
    if models:
        if type is not None or ddf is not None:
            raise ValueError("type and ddf are for the terms of one model; give one model, or leave them out")
        return _compare([model, *models], refit, names, boundary)
    if names is not None or boundary:
        raise ValueError("names and boundary are for comparisons; give two or more models, or leave them out")
    if model.is_linear:
        from .ddf import anova_table

        table = anova_table(model, 3 if type is None else type, "satterthwaite" if ddf is None else ddf)
        return made_table(table, [table.attrs["heading"]])
    if ddf is not None:
        from .ddf import _method

        _method(model, ddf)  # raises: it is for linear models
    kind = {"1": 1, "I": 1, "2": 2, "II": 2, "3": 3, "III": 3}.get("1" if type is None else str(type))
    if kind is None:
        raise ValueError(f"type must be 1, 2 or 3, got {type!r}")
    return _sequential(model) if kind == 1 else _wald_by_term(model, kind)


def _sequential(model: MixedModel) -> AnovaTable:
    """lme4's table of one generalised model: squared entries of R_X beta, summed by term."""
    separation = model._estimates.separation  # what runs off has no information left, nor a part in this
    effects = model._RX @ (model.beta if separation is None else separation.known(model.beta))
    assign = np.asarray(model._data.assign)
    rows = []
    for t in range(1, len(model._data.term_labels) + 1):
        own = assign == t
        total, size = float(np.square(effects[own]).sum()), int(own.sum())
        mean = total / size if size else float("nan")
        rows.append([size, total, mean, mean / model.sigma**2])
    names = ["npar", "Sum Sq", "Mean Sq", "F value"]
    frame = pd.DataFrame(np.reshape(rows, (-1, 4)), index=list(model._data.term_labels), columns=names)
    return made_table(frame, ["Analysis of Variance Table"])


def _wald_by_term(model: MixedModel, kind: int) -> AnovaTable:
    """Wald chi-square tests of the terms of a generalised model."""
    from .ddf import hypotheses

    V = model._fixed_covariance("hessian")
    if kind == 3:
        tested = {label: L.to_numpy() for label, L in hypotheses(model, 3).items()}
    else:
        separation = model._estimates.separation
        tested = _after_the_others(model, V if separation is None else separation.vague(V))
    rows, notes = [], []
    for label, L in tested.items():
        known, note = determined(model, L)
        statistic, df = wald(known @ L, known @ L @ model.beta, V)
        rows.append([statistic, df, chisq_tail(statistic, df)])
        notes += [f"{label}: {note}"] if note else []
    names = ["Chisq", "Df", "Pr(>Chisq)"]
    frame = pd.DataFrame(np.reshape(rows, (-1, 3)), index=list(tested), columns=names)
    title = f"Analysis of Deviance Table (Type {'I' * kind} Wald chisquare tests)"
    return made_table(frame, [title, "", f"Response: {model._data.response_name}"], notes)


def determined(model: MixedModel, L: np.ndarray) -> tuple[np.ndarray, str]:
    """Combinations (s, r) of hypotheses L (r, p) about coefficients that do not run off, and a sentence where s < r."""
    separation, r = model._estimates.separation, len(L)
    if separation is None or not r or not separation.touches(L).any():
        return np.eye(r), ""
    known = separation.determined_part(L)
    what = "coefficients run off because the response is separated"
    if not len(known):
        return known, f"{what}, and nothing of this is determined; compare likelihoods (anova of two models, drop1)"
    return known, f"{what}: only what is determined is tested; likelihoods compare all (anova of two models, drop1)"


def _after_the_others(model: MixedModel, V: np.ndarray) -> dict[str, np.ndarray]:
    """Per term, contrasts that are its coefficients in the model without the terms that contain it, to first order:
    uncorrelated with the coefficients of those. A term is contained in all that have its variables and more (car)."""
    codes, assign = model._data._fixed.terms.codes, np.asarray(model._data.assign)
    eye, out = np.eye(assign.size), {}
    for t, (label, code) in enumerate(zip(model._data.term_labels, codes, strict=True), start=1):
        own = assign == t
        rest = np.isin(assign, [u for u, d in enumerate(codes, start=1) if code & d == code != d])
        L = eye[own]
        if rest.any():
            L = L - V[np.ix_(own, rest)] @ np.linalg.solve(V[np.ix_(rest, rest)], eye[rest])
        out[label] = L
    return out


# -------------------- several models
def _compare(models: list[MixedModel], refit: bool, names: Sequence[str] | None, with_boundary: bool) -> AnovaTable:
    labels = [f"MODEL{i}" for i in range(1, len(models) + 1)] if names is None else [str(name) for name in names]
    if len(labels) != len(models) or len(set(labels)) < len(labels):
        raise ValueError(f"names must be {len(models)} different names, one for each model, got {names!r}")
    check_comparable(models)
    heading, notes = [], []
    by_reml = [m.REML for m in models]
    if any(by_reml):
        if refit:
            heading.append(REFITTED)
            models = [m.refit_ml() for m in models]
        elif not all(by_reml):
            raise ValueError("some models were fitted by REML and some by maximum likelihood: use refit=True")
    order = np.argsort([m.df for m in models], kind="stable")
    models, labels = [models[i] for i in order], [labels[i] for i in order]
    rows = []
    for i, m in enumerate(models):
        row = [m.df, m.aic, m.bic, m.loglik, m.objective, np.nan, np.nan, np.nan, np.nan]
        if i:
            smaller, pair = models[i - 1], f"{labels[i - 1]} and {labels[i]}"
            gain, df = smaller.objective - m.objective, m.df - smaller.df
            row[5:7] = [max(0.0, gain), df]
            relation = _relation(smaller, m)
            if relation.problem:
                notes.append(f"{pair}: {relation.problem}; no p-value")
            elif df:
                row[7:] = [chisq_tail(gain, df)] * 2
                if gain < -1e-6 * (1.0 + abs(m.objective)):
                    notes.append(
                        f"{pair}: the larger model has the lower likelihood; one of the fits is not an optimum"
                    )
                if relation.variances == 1:
                    what = "overdispersion" if relation.dispersion else "a variance"
                    notes.append(
                        f"{pair}: {what} is 0 in the smaller model, on the boundary, so Pr(>Chisq) is conservative"
                        + ("" if with_boundary else "; boundary=True adds the corrected one")
                    )
                    row[8] = 0.5 * (chisq_tail(gain, df - 1) + row[7]) if df > 1 else 0.5 * row[7]
                    row[8] = row[8] if gain > 1e-8 else 1.0
                elif relation.variances:
                    what = "variances, overdispersion among them," if relation.dispersion else "variances"
                    notes.append(
                        f"{pair}: {relation.variances} {what} are 0 in the smaller model, on the boundary, so "
                        "Pr(>Chisq) is conservative"
                    )
        rows.append(row)
    columns = ["npar", "AIC", "BIC", "logLik", "-2*log(L)", "Chisq", "Df", "Pr(>Chisq)", "Pr(>Chisq) boundary"]
    frame = pd.DataFrame(rows, index=labels, columns=columns).astype({"npar": int})
    data = models[0]._spec.arguments.get("data")
    title = getattr(data, "attrs", {}).get("name")
    heading += [f"Data: {title}"] if isinstance(title, str) else []
    heading += ["Models:", *(f"{label}: {m.formula}" for label, m in zip(labels, models, strict=True))]
    return made_table(frame if with_boundary else frame.iloc[:, :-1], heading, notes)


def check_comparable(models: list[MixedModel]) -> None:
    """Raise ValueError where the likelihoods of two models are not of the same thing."""
    first = models[0]
    for m in models[1:]:
        if m.is_linear != first.is_linear:
            raise ValueError(
                "linear and generalised models are not comparable here: fit all with lmer, or all with glmer"
            )
        if m.nobs != first.nobs:
            raise ValueError(
                f"the models were fitted to {first.nobs} and {m.nobs} rows: fit all to the rows that are complete in "
                "the columns of every model"
            )
        same = np.array_equal(np.asarray(m._design.y), np.asarray(first._design.y))
        trials = m.is_linear or np.array_equal(np.asarray(m._design.weights), np.asarray(first._design.weights))
        if not same or not trials:
            what = "weights or trials" if same else "response"
            raise ValueError(f"the models differ in their {what}: their likelihoods are of different data")
        if m.nAGQ != first.nAGQ:
            raise ValueError(
                f"the models were fitted with nAGQ = {first.nAGQ} and {m.nAGQ}: their errors of approximation differ; "
                "fit all with one nAGQ"
            )
        if m.family.name == first.family.name and m._spec.hessian != first._spec.hessian and not m.family.canonical:
            raise ValueError(
                "the models were fitted with expected and with observed curvature: fit all with one hessian"
            )
        kinds = {m.family.name, first.family.name}
        if kinds & DISCRETE and kinds & CONTINUOUS:
            raise ValueError(
                f"the families {first.family.name} and {m.family.name} are not comparable: one gives the response "
                "probabilities, the other a density"
            )


class Relation(NamedTuple):
    """How a smaller model lies in a larger one: why it does not (or ""), and how many variances it has at 0.

    Overdispersion is one of them where the smaller family is the limit of the larger one.
    """

    problem: str
    variances: int
    dispersion: bool = False


def _relation(smaller: MixedModel, larger: MixedModel) -> Relation:
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
    inside, variances = _covariance_within(_patterns(smaller), _patterns(larger))
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
    """The covariances of one random-effects term: z S z' within its levels, S in the span of `basis`."""

    z: np.ndarray  # (n, k)
    level: np.ndarray  # (n,)
    basis: np.ndarray  # (b, k, k) symmetric


def _patterns(model: MixedModel) -> list[Pattern]:
    out = []
    for term, labels in zip(model._design.terms, model._data.terms, strict=True):
        k = len(labels.names)
        z, eye = np.asarray(labels.z, float), np.eye(k)
        if isinstance(term.structure, Diagonal):
            z = z / np.linalg.norm(z, axis=0)
            basis = np.stack([np.outer(e, e) for e in eye])
        else:  # any basis of the columns will do: an orthogonal one
            z = np.linalg.qr(z)[0]
            pairs = [(i, j) for i in range(k) for j in range(i, k)]
            basis = np.stack([0.5 * (np.outer(eye[i], eye[j]) + np.outer(eye[j], eye[i])) for i, j in pairs])
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
        k = s.z.shape[1]
        eye = np.eye(k)
        directions = [e for e in eye]
        if len(s.basis) > k:
            directions += [eye[i] + sign * eye[j] for i in range(k) for j in range(i) for sign in (1.0, -1.0)]
        for v in directions:
            ray = np.zeros(own.size)
            ray[start : start + len(s.basis)] = np.einsum("bij,i,j->b", s.basis, v, v) / weights
            values = [np.linalg.eigvalsh(S) for S in blocks(ray)]
            largest = max(np.abs(x).max() for x in values)
            if min(x.min() for x in values) < -1e-6 * largest:
                return False, 0
        interior[start : start + len(s.basis)] = np.einsum("bii->b", s.basis) / weights
        start += len(s.basis)
    values = [np.linalg.eigvalsh(S) for S in blocks(interior)]
    floor = 1e-6 * max(np.abs(x).max() for x in values)
    return True, int(sum((x < floor).sum() for x in values))


# -------------------- linear hypotheses
#: Rows of L whose singular value is below this part of the largest are combinations of others.
DEPENDENT = 1e-10


def wald(L: np.ndarray, excess: np.ndarray, V: np.ndarray) -> tuple[float, int]:
    """Wald's chi-square of L beta = rhs, `excess` being L beta - rhs, and its degrees of freedom, the rank of L.

    NaN where the covariance V of the estimates is not known or not definite.
    """
    if not len(L):
        return float("nan"), 0
    basis = _independent_rows(L, excess)
    if not np.isfinite(V).all():
        return float("nan"), len(basis)
    inner, rest = basis @ L, basis @ excess
    covariance = inner @ V @ inner.T
    scale = np.sqrt(np.maximum(np.diag(covariance), np.finfo(float).tiny))
    try:
        half = np.linalg.cholesky(covariance / np.outer(scale, scale))
    except np.linalg.LinAlgError:
        return float("nan"), len(basis)
    return float(np.square(np.linalg.solve(half, rest / scale)).sum()), len(basis)


def _independent_rows(L: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """(rank, r) combinations of the rows of L that are independent."""
    size = np.linalg.norm(L, axis=1)
    if len(L) == 1:
        return np.eye(1)
    left, values, _ = np.linalg.svd(L / np.where(size > 0.0, size, 1.0)[:, None])
    rank = int((values > DEPENDENT * values[0]).sum())
    return left[:, :rank].T / np.where(size > 0.0, size, 1.0)


@dataclass(frozen=True)
class WaldTest:
    """Test of linear hypotheses about the fixed effects, as returned by `MixedModel.wald_test`.

    Attributes:
        statistic: chi-square, or F where `df_denom` is not None.
        df: rank of the hypotheses. df_denom: denominator degrees of freedom.
        p_value: of the statistic.
        estimate, std_error: (r,) of L beta, by hypothesis (Kenward-Roger: the adjusted errors).
        rhs: (r,) what L beta is tested to be.
        ddf: method of the degrees of freedom, None for a chi-square.
        note: what is not tested, because coefficients run off; "" where all is.
    """

    statistic: float
    df: int
    df_denom: float | None
    p_value: float
    estimate: pd.Series
    std_error: pd.Series
    rhs: np.ndarray
    ddf: str | None
    note: str = ""

    def table(self) -> AnovaTable:
        """The test as a table of one row, the hypotheses above it."""
        from ..report.summary import method_name

        title = "Linear hypothesis test"
        title += " (Wald chi-square)" if self.ddf is None else f" ({method_name(self.ddf)}'s method)"
        frame = pd.DataFrame({"estimate": self.estimate, "std.error": self.std_error, "tested": self.rhs})
        numbers = [r_format(frame[c], 5) for c in frame]
        rows = [
            ["", *frame.columns],
            *([str(i), *row] for i, row in zip(frame.index, zip(*numbers, strict=True), strict=True)),
        ]
        heading = [title, "", *columns_text(rows, [False, True, True, True]), ""]
        notes = [self.note] if self.note else []
        if self.df_denom is None:
            values = {"Chisq": self.statistic, "Df": self.df, "Pr(>Chisq)": self.p_value}
        else:
            values = {"NumDF": self.df, "DenDF": self.df_denom, "F value": self.statistic, "Pr(>F)": self.p_value}
        return made_table(
            pd.DataFrame([values], index=["joint" if len(frame) > 1 else ""], dtype=float), heading, notes
        )

    def __str__(self) -> str:
        return str(self.table())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def wald_test(model: MixedModel, L: Any, rhs: Any = 0.0, ddf: str | None = None) -> WaldTest:
    """See `MixedModel.wald_test`."""
    names = list(model._data.x_names)
    if not names:
        raise ValueError("the model has no fixed effects to test")
    if isinstance(L, str) or (isinstance(L, Sequence) and L and all(isinstance(part, str) for part in L)):
        text = L if isinstance(L, str) else ", ".join(L)
        labels, matrix, own = parse_hypotheses(text, names)
        if np.any(np.asarray(rhs, float)) and "=" in text:
            raise ValueError("the hypotheses have right-hand sides of their own; leave rhs out")
        rhs = own + np.asarray(rhs, float)
    elif isinstance(L, Mapping):
        unknown = [str(name) for name in L if name not in names]
        if unknown:
            raise ValueError(f"no fixed effect is named {unknown[0]!r}; there are {', '.join(names)}")
        matrix = np.array([[float(L.get(name, 0.0)) for name in names]])
        labels = [_hypothesis_label(matrix[0], names)]
    else:
        if isinstance(L, pd.DataFrame) and set(L.columns) == set(names):
            L = L[names]
        matrix = np.atleast_2d(np.asarray(L, float))
        if matrix.ndim != 2 or matrix.shape[1] != len(names):
            raise ValueError(
                f"L must have one column for each of the {len(names)} fixed effects ({', '.join(names)}), got shape "
                f"{np.shape(L)}"
            )
        labels = [_hypothesis_label(row, names) for row in matrix]
    if not np.isfinite(matrix).all() or not matrix.any(axis=1).all():
        raise ValueError("every hypothesis must have finite weights that are not all zero")
    try:
        target = np.broadcast_to(np.asarray(rhs, float), len(matrix)).copy()
    except ValueError:
        raise ValueError(f"rhs must be a number or one for each of the {len(matrix)} hypotheses") from None
    basis = _independent_rows(matrix, target)
    inner = basis @ matrix
    implied = matrix @ np.linalg.lstsq(inner, basis @ target, rcond=None)[0]
    if not np.allclose(implied, target, rtol=1e-8, atol=1e-8 * max(1.0, float(np.abs(target).max()))):
        raise ValueError("the hypotheses contradict each other: their rows depend on each other, their rhs does not")
    estimate, note = matrix @ model.beta, ""
    if ddf is None:
        error = np.sqrt(model._variances_of(matrix))
        known, note = determined(model, matrix)
        statistic, df = wald(known @ matrix, known @ (estimate - target), model._fixed_covariance("hessian"))
        p, denominator = chisq_tail(statistic, df), None
    else:
        from .ddf import contrast_test

        error = np.array([contrast_test(model, row, ddf).std_error for row in matrix])
        test = contrast_test(
            model, matrix if len(matrix) == 1 else inner, ddf, basis @ target if len(matrix) > 1 else target
        )
        statistic, df, denominator, p = test.f_value, test.num_df, test.den_df, test.p_value
    index = pd.Index(labels)
    errors = pd.Series(error, index)
    return WaldTest(statistic, df, denominator, p, pd.Series(estimate, index), errors, target, ddf, note)


def _hypothesis_label(row: np.ndarray, names: list[str]) -> str:
    out = ""
    for w, name in zip(row, names, strict=True):
        if w:
            sign = ("-" if w < 0 else "") if not out else (" - " if w < 0 else " + ")
            out += sign + ("" if abs(w) == 1.0 else f"{abs(w):.6g}*") + name
    return out or "0"


def parse_hypotheses(text: str, names: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Hypotheses in text, such as "b = 2*c, d - 1 = 0", about coefficients of these names.

    A part without "=" is tested to be 0; "a = b = c" is two hypotheses. Names are those of `fixef`, the longest that
    fits being taken; names with blanks or operators in them need no quotes.

    Returns:
        Labels, matrix (r, p) and right-hand sides (r,).

    Raises:
        ValueError: an unknown name or a product of coefficients, with the place.
    """
    reader = _Hypotheses(text, names)
    rows, rhs = reader.read()
    return [_hypothesis_label(row, list(names)) for row in rows], np.array(rows), np.array(rhs)


class _Hypotheses:
    """Recursive descent; a value is a vector (p + 1,) of weights, the constant last."""

    _NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

    def __init__(self, text: str, names: Sequence[str]) -> None:
        self.text, self.names = text, names
        self.longest_first = sorted(range(len(names)), key=lambda i: -len(names[i]))
        self.at = 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{what} at '{self.text[self.at :].strip()[:30]}' in the hypotheses '{self.text}'")

    def next(self) -> str:
        """The next character that is not blank, "" at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, wanted: str) -> str:
        """The next character if it is one of these, else ""."""
        found = self.next()
        if found and found in wanted:
            self.at += 1
            return found
        return ""

    def read(self) -> tuple[list[np.ndarray], list[float]]:
        rows: list[np.ndarray] = []
        rhs: list[float] = []
        while self.next():
            if self.take(",;\n"):
                continue
            sides = [self.sum()]
            while self.take("="):
                self.take("=")
                sides.append(self.sum())
            if len(sides) == 1:
                sides.append(np.zeros(len(self.names) + 1))
            for a, b in zip(sides, sides[1:], strict=False):
                rows.append((a - b)[:-1])
                rhs.append(float((b - a)[-1]))
            if self.next() and self.next() not in ",;\n":
                raise self.fail("expected '=', ',' or the end")
        if not rows:
            raise ValueError("there is no hypothesis in the text; write e.g. 'x1 = x2, x3 = 0'")
        return rows, rhs

    def sum(self) -> np.ndarray:
        total = np.zeros(len(self.names) + 1)
        sign = self.take("+-")
        while True:
            total += (-1.0 if sign == "-" else 1.0) * self.product()
            sign = self.take("+-")
            if not sign:
                return total

    def product(self) -> np.ndarray:
        value = self.factor()
        while operator := self.take("*/"):
            other = self.factor()
            if operator == "*" and not value[:-1].any():
                value, other = other, value
            if other[:-1].any() or (operator == "/" and not other[-1]):
                raise self.fail("only products with numbers and quotients by numbers are linear")
            value = value * other[-1] if operator == "*" else value / other[-1]
        return value

    def factor(self) -> np.ndarray:
        start = self.next()
        for i in self.longest_first:  # before parentheses: (Intercept)
            name = self.names[i]
            for form in (f"`{name}`", name):
                end = self.at + len(form)
                whole = not re.match(r"[\w.]", self.text[end : end + 1]) or not re.match(r"[\w.]", form[-1])
                if self.text.startswith(form, self.at) and whole:
                    self.at = end
                    out = np.zeros(len(self.names) + 1)
                    out[i] = 1.0
                    return out
        if start == "(":
            self.at += 1
            out = self.sum()
            if not self.take(")"):
                raise self.fail("expected ')'")
            return out
        number = self._NUMBER.match(self.text, self.at)
        if number is None:
            raise self.fail(f"expected a number or one of the coefficients {', '.join(self.names)}")
        self.at = number.end()
        out = np.zeros(len(self.names) + 1)
        out[-1] = float(number.group())
        return out
