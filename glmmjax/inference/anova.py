"""Tables of tests: of the terms of one model, and of nested models by their likelihoods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from .._arguments import checked, flag, is_model
from ..report.anova_table import AnovaTable, made_table
from .nested import relation_of
from .wald import chisq_tail, determined, wald

if TYPE_CHECKING:
    from ..results import MixedModel

#: Families whose responses have probabilities, and those with densities: likelihoods do not compare between the two.
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
            relation = relation_of(smaller, m)
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
        if {m.family.discrete, first.family.discrete} == {True, False}:
            raise ValueError(
                f"the families {first.family.name} and {m.family.name} are not comparable: one gives the response "
                "probabilities, the other a density"
            )
