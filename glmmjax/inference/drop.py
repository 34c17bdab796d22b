"""Models without one of their terms, or with one more: `drop1`, `add1`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import checked, text
from .._errors import FormulaError
from ..compiling.entry import entry
from ..formula.parse import Formula, parse, simplify
from ..formula.parse import update as update_formula
from ..formula.syntax import deparse
from ..formula.terms import Terms, bits
from ..report.anova_table import AnovaTable, made_table
from .wald import chisq_tail

if TYPE_CHECKING:
    from ..formula.frame import ModelData
    from ..results import MixedModel, ModelSpec

TESTS = ("Chisq", "none")
REFITTED = "refitting model with ML (instead of REML)"


@checked(test=text)
def drop1(model: MixedModel, scope: str | Sequence[str] | None = None, test: str = "Chisq") -> AnovaTable:
    """The model refitted without each of its fixed-effects terms in turn.

    Args:
        model: a fit by `glmmjax.lmer` or `glmmjax.glmer`; one by REML is fitted by maximum likelihood first.
        scope: labels of terms, or a formula such as ``"~ x + z"``; None takes the terms that no other term contains.
        test: "Chisq" for likelihood-ratio tests, or "none" for AIC alone.

    Returns:
        DataFrame that prints like R's: npar (how many parameters go with the term), AIC and, with a test, LRT and
        Pr(Chi); one row per term, after the one of the model itself, "<none>".

    Raises:
        ValueError: a term of the scope is not in the model, or an unknown test.

    Every refit is to the rows of the model and starts from its estimates. A term that others contain can be named in
    the scope; without it the model may be the same one in other columns (npar 0).
    """
    _check_test(test)
    terms = model._data.formula.fixed_terms
    if scope is None:
        codes = [c for c in terms.codes if not any(c & d == c != d for d in terms.codes)]
    else:
        codes = _codes_in(terms, _scope_terms(model, scope, "drop1"))
    return _table(model, [(terms, [c for c in terms.codes if c != code], code) for code in codes], test, "deletions")


@checked(test=text)
def add1(model: MixedModel, scope: str | Sequence[str], test: str = "Chisq") -> AnovaTable:
    """The model refitted with each of several further fixed-effects terms in turn.

    Args:
        model, test: as `drop1`.
        scope: labels of terms, or a formula such as ``"~ . + x * z"``, whose terms that the model lacks are added if
            all that they contain are in the model.

    Returns:
        As `drop1`.

    Raises:
        ValueError: nothing to add, a random-effects term in the scope, or rows with missing values in a new term.
        DataError: a column is not in the data.
    """
    _check_test(test)
    labels = _scope_terms(model, scope, "add1")
    have = model._data.formula.fixed_terms
    old = {_key(have, c) for c in have.codes}
    extended = parse(f"~ {' + '.join([*have.labels, *labels, '1' if have.intercept else '0'])}").fixed_terms
    new = [c for c in extended.codes if _key(extended, c) not in old]
    if isinstance(scope, str) and "~" in scope:
        new = [c for c in new if not any(d & c == d != c for d in new)]
    if not new:
        raise ValueError("the scope has no term that the model lacks")
    kept = [c for c in extended.codes if _key(extended, c) in old]
    return _table(model, [(extended, [*kept, c], c) for c in new], test, "additions")


def _check_test(test: str) -> None:
    if test not in TESTS:
        raise ValueError(f"test must be {' or '.join(map(repr, TESTS))}, got {test!r}")


def _key(terms: Terms, code: int) -> frozenset[str]:
    """A term whatever the order of its variables."""
    return frozenset(deparse(terms.variables[i]) for i in bits(code))


def _label(terms: Terms, code: int) -> str:
    return ":".join(deparse(terms.variables[i]) for i in bits(code))


def _scope_terms(model: MixedModel, scope: str | Sequence[str], where: str) -> list[str]:
    """Labels of the fixed terms of a scope."""
    if isinstance(scope, str) and "~" in scope:
        formula = update_formula(model._data.formula, scope)
        bars = {str(bar) for bar in model._data.formula.bars}
        if where == "add1" and any(str(bar) not in bars for bar in formula.bars):
            raise ValueError("add1 adds fixed effects; compare random effects with anova(m1, m2)")
    else:
        labels = [scope] if isinstance(scope, str) else list(scope)
        if not labels or not all(isinstance(label, str) for label in labels):
            raise ValueError(f"scope must be labels of terms or a formula such as '~ x + z', got {scope!r}")
        try:
            formula = parse("~ " + " + ".join(labels))
        except FormulaError as error:
            raise ValueError(f"the scope cannot be read: {error}") from None
        if formula.bars:
            raise ValueError(f"{where} takes fixed-effects terms; compare random effects with anova(m1, m2)")
    return list(formula.fixed_terms.labels)


def _codes_in(terms: Terms, labels: list[str]) -> list[int]:
    known = {_key(terms, c): c for c in terms.codes}
    out = []
    for label in labels:
        own = parse(f"~ {label}").fixed_terms
        key = _key(own, own.codes[0])
        if key not in known:
            have = ", ".join(terms.labels) or "none"
            raise ValueError(f"the scope has the term {label!r}, which is not in the model; its terms are {have}")
        out.append(known[key])
    return out


def _table(model: MixedModel, changes: list[tuple[Terms, list[int], int]], test: str, what: str) -> AnovaTable:
    heading = [f"Single term {what}", "", "Model:", model.formula]
    if model.REML:
        heading.insert(0, REFITTED)
        model = model.refit_ml()
    sign = 1.0 if what == "deletions" else -1.0
    rows, labels, notes = [[np.nan, model.aic, np.nan, np.nan]], ["<none>"], []
    for terms, codes, code in changes:
        label = _label(terms, code)
        other = _refitted(model, terms, codes, label)
        change, df = sign * (other.objective - model.objective), sign * (model.df - other.df)
        tiny = 1e-7 * (1.0 + abs(model.objective))
        if change < -tiny and df > 0 or not other.converged:
            verb = "without" if sign > 0 else "with"
            notes.append(f"the fit {verb} {label} did not converge, or the model's own did not")
        change = 0.0 if -tiny <= change < 0.0 else change
        rows.append([df, other.aic, change, chisq_tail(change, df)])
        labels.append(label)
    frame = pd.DataFrame(rows, index=labels, columns=["npar", "AIC", "LRT", "Pr(Chi)"])
    return made_table(frame if test == "Chisq" else frame.iloc[:, :2], heading, notes)


def _with_terms(formula: Formula, terms: Terms, codes: list[int]) -> Formula:
    """The formula with these fixed terms; bars and offsets stay."""
    own = simplify(formula)
    parts = [_label(terms, c) for c in codes]
    parts += [] if formula.intercept else ["0"]
    rest = own.random_formula().removeprefix("~")
    parts += [rest, *(deparse(o) for o in formula.offsets)]
    left = "" if formula.response is None else deparse(formula.response)
    return parse(f"{left} ~ {' + '.join(parts)}")


def _refitted(model: MixedModel, terms: Terms, codes: list[int], label: str) -> MixedModel:
    """The model with other fixed terms, on the same rows and responses, from its estimates."""
    from ..formula.frame import build

    spec, data = model._spec, model._data
    arguments: dict[str, Any] = dict(spec.arguments)
    formula = _with_terms(data.formula, terms, codes)
    coded = {deparse(v) for v in formula.fixed_terms.variables}
    own = {k: v for k, v in (arguments["contrasts"] or {}).items() if k in coded or f"`{k}`" in coded}
    frame = build(
        formula,
        arguments["data"],
        weights=arguments["weights"],
        offset=arguments["offset"],
        contrasts=own,
        subset=data.keep,
    )
    if frame.nobs != data.nobs:
        missing = ", ".join(frame.missing_columns)
        raise ValueError(
            f"{data.nobs - frame.nobs} of the model's rows have missing values in {label} ({missing}): fit the model "
            "to the rows without them"
        )
    frame = replace(frame, y=data.y)  # that of a refit is not the one in the data
    control = replace(spec.control, check_grad="ignore", check_singular="ignore", check_rank="silent")
    return _from_estimates(model, frame, replace(spec, formula=str(frame.formula), control=control))


@entry
def _from_estimates(model: MixedModel, frame: ModelData, spec: ModelSpec) -> MixedModel:
    """The fit of a frame of the same rows, from the model's estimates."""
    from ..fit.glmm import GeneralisedProblem
    from ..fit.lmm import LinearProblem
    from ..fit.problem import Problem
    from ..model.frames import frame_design

    design, control = frame_design(frame), spec.control
    start = {"theta": model.theta}
    problem: Problem
    if model.is_linear:
        problem = LinearProblem(design, False, control.exact)
    else:
        X = np.asarray(model._design.X)
        start["beta"] = np.linalg.lstsq(np.asarray(design.X), X @ model.beta, rcond=None)[0]
        if len(spec.family.phi_names):
            start["phi"] = model.phi.to_numpy()
        problem = GeneralisedProblem(design, spec.family, spec.nAGQ, spec.hessian, control.exact)
    return spec.entry.fit(spec, frame, problem, start)
