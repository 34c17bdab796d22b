"""What should be said about a fit: notes about its data, warnings, and whether it converged."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._errors import DataError, FormulaError
from ..fit.optimise import EVALUATION_LIMIT, EXACT, IMPOSSIBLE
from ..formula.terms import bits

if TYPE_CHECKING:
    from ..results import MixedModel


def convergence_problems(model: MixedModel) -> list[str]:
    """Sentences about a fit that did not converge or runs off; empty if there is nothing to say."""
    out = []
    stats = model.fit_stats
    if not model.converged:
        advice = ": try other start values, or Control(optimizer='newton')"
        out.append(
            f"the fit did not converge ({stats.message}; expected further decrease of the deviance "
            f"{stats.decrement:.2g}){'' if stats.status == EVALUATION_LIMIT else advice}"
        )
    undetermined = [] if stats.status in (EXACT, IMPOSSIBLE) else model.undetermined
    if undetermined and not model.is_singular and not model._nothing_left:
        out.append(
            f"the data do not determine {', '.join(undetermined)} separately: the deviance is flat along a "
            "direction of them; simplify the model"
        )
    return out + ([model._separation_sentence] if model._separation_sentence else [])


def separation_sentence(model: MixedModel) -> str:
    """What is separated, which coefficients run off, and what to do; empty if nothing is."""
    separation = model._estimates.separation
    if separation is None:
        return ""
    names = list(model._data.x_names)
    alone = [names[j] for j in np.flatnonzero(separation.alone)]
    together = [names[j] for j in np.flatnonzero(separation.columns & ~separation.alone)]
    which = []
    if alone:
        plural = len(alone) > 1
        which.append(f"the coefficient{'s' if plural else ''} of {_listed(alone)} run{'' if plural else 's'} off")
    if together:
        which.append(
            f"a combination of the coefficients of {_listed(together)} runs off"
            if len(together) > 1
            else f"the coefficient of {together[0]} runs off"
        )
    where = _cells(model, separation.rows)
    if not where:
        what = [name for name in alone + together if name != "(Intercept)"] or ["the intercept"]
        count = int(separation.rows.sum())
        where = [f"{_listed(what)} predict{'s' if len(what) == 1 else ''} {count:,} of {model.nobs:,} rows for sure"]
    rest = "standard errors are infinite there; all else is that of the fit without these rows"
    if model._nothing_left:
        rest = "standard errors are infinite, and no row is left to tell the random effects' covariance"
    return (
        f"the response is separated: {'; '.join(where)}, so that {' and '.join(which)} to infinity ({rest}); drop the "
        "column, merge levels, use a prior or a penalty, or test it by likelihoods (drop1, anova of two models)"
    )


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _cells(model: MixedModel, rows: np.ndarray) -> list[str]:
    """Levels of factors, and cells of interactions, all of whose rows are separated."""
    data = model._data
    try:
        codes = data.factor_codes(model._spec.arguments["data"])
    except (DataError, FormulaError, KeyError, TypeError, ValueError, AttributeError, IndexError):
        return []  # the table is another one by now
    y, counts = np.asarray(model._design.y), not model.family.trials
    covered, out = np.zeros(rows.size, bool), []
    terms = [[i for i in bits(code) if i in codes] for code in data._fixed.terms.codes]
    for variables in sorted({tuple(t) for t in terms if t}, key=len):
        sizes = [len(data._fixed.coded[i].levels) for i in variables]
        cell = np.ravel_multi_index([codes[i] for i in variables], sizes)
        rest = np.bincount(cell[~rows], minlength=int(np.prod(sizes)))
        new = np.unique(cell[rows & ~covered])
        for c in new[rest[new] == 0]:
            mine = cell == c
            covered |= mine
            at = zip(variables, np.unravel_index(c, sizes), strict=True)
            label = ", ".join(f"{data._fixed.coded[i].levels[k]!r} of {data._fixed.coded[i].label}" for i, k in at)
            only = "counts of 0" if counts else "successes" if y[mine].min() == 1.0 else "failures"
            if counts or y[mine].min() == y[mine].max():
                out.append(f"{'level' if len(variables) == 1 else 'the cell'} {label} has {only} only")
    shown = out[:5] + ([f"{len(out) - 5} more such"] if len(out) > 5 else [])
    return shown if out and covered[rows].all() else []


def singular_sentence(model: MixedModel) -> str:
    """Which terms are singular, and what to do; empty if none is."""
    terms = model.singular_terms
    if not terms:
        return ""
    return (
        f"the fit is singular: the covariance of {', '.join(terms)} is on the boundary (a variance of 0 or a "
        "correlation of +-1); consider a simpler term"
    )


def limit_sentence(model: MixedModel) -> str:
    """That a dispersion is infinite, and which model that is; empty if none is."""
    if not model.at_limit:
        return ""
    return (
        f"the counts show no overdispersion: {', '.join(model.family.phi_names)} is infinite, where the "
        f"{model.family.name} distribution is the {model.at_limit} one and these are its numbers; "
        f"fit family={model.at_limit!r}"
    )


def messages(model: MixedModel) -> list[str]:
    """Notes and warnings about the data and the fit, one sentence each."""
    singular = singular_sentence(model)
    few = [f"{g} ({m})" for g, m in model.ngrps.items() if m < 5]
    notes = list(model._data.notes)
    if model._data.response_levels is not None:
        failure, success = model._data.response_levels
        notes.append(
            f"response {model._data.response_name}: modelling the probability of {success!r} (0 is {failure!r})"
        )
    if few:
        notes.append(f"fewer than 5 levels, variances are poorly determined: {', '.join(few)}")
    rough = model._approximation_note
    about = [singular, limit_sentence(model), rough]
    return notes + convergence_problems(model) + [text for text in about if text]


def verdict(model: MixedModel) -> str:
    """One sentence on convergence."""
    stats = model.fit_stats
    if model.converged:
        text = (
            f"Converged in {stats.evaluations} evaluations of deviance and gradient "
            f"(expected further decrease {stats.decrement:.1e})."
        )
        return text if not model.is_singular else text[:-1] + "; the fit is singular."
    return f"NOT converged: {stats.message} (expected further decrease {stats.decrement:.1e})."
