"""Text and HTML of a fitted model, in lme4's layout."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import numpy as np

from .._errors import DataError, FormulaError, NotSupportedError
from ..fit.optimise import EVALUATION_LIMIT, EXACT, IMPOSSIBLE
from ..formula.terms import bits
from .numbers import LEGEND, abbreviate, p_text, signif, stars

if TYPE_CHECKING:
    from ..results import MixedModel, VarCorr

WIDTH = 80


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] if text else text


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
    """Notes about the data, then warnings about the fit."""
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


def method_name(ddf: str) -> str:
    """ "Satterthwaite" or "Kenward-Roger", however it was written."""
    return "-".join(part.capitalize() for part in ddf.lower().split("-"))


def columns_text(rows: list[list[str]], right: list[bool]) -> list[str]:
    """Lines of a table whose cells are aligned, those of `right` columns to the right."""
    widths = [max(len(row[j]) for row in rows) for j in range(len(rows[0]))]
    return [
        " ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in rows
    ]


def varcorr_text(blocks: VarCorr, variance: bool = True) -> str:
    """Table of random effects: groups, names, (variance,) standard deviation and correlations."""
    k = max((len(b.names) for b in blocks), default=1)
    residual = [] if blocks.residual is None else [np.array([blocks.residual])]
    sds = signif(np.concatenate([*[b.sd for b in blocks], *residual]), 4)
    variances = signif(np.concatenate([*[np.diag(b.cov) for b in blocks], *[r**2 for r in residual]]), 4)
    header = ["Groups", "Name"] + (["Variance"] if variance else []) + ["Std.Dev."]
    if k > 1:
        header += ["Corr"] + [""] * (k - 2)
    rows, i = [header], 0
    for block in blocks:
        for j, name in enumerate(block.names):
            row = [block.group if j == 0 else "", name] + ([variances[i]] if variance else []) + [sds[i]]
            if k > 1:
                corr = ["" if c >= j else ("NaN" if np.isnan(r) else f"{r:.2f}") for c, r in enumerate(block.corr[j])]
                row += (corr + [""] * k)[: k - 1]
            rows.append(row)
            i += 1
    if residual:
        row = ["Residual", ""] + ([variances[i]] if variance else []) + [sds[i]]
        rows.append(row + [""] * (len(header) - len(row)))
    return "\n".join(" " + line for line in columns_text(rows, [False, False] + [True] * (len(header) - 2)))


_APPROXIMATION = {0: "joint PIRLS, nAGQ = 0", 1: "Laplace Approximation"}


def header_lines(model: MixedModel) -> list[str]:
    """Title, family, formula, weights and offset."""
    if model.is_linear:
        out = [f"Linear mixed model fit by {'REML' if model.REML else 'maximum likelihood'}"]
    else:
        how = _APPROXIMATION.get(model.nAGQ, f"Adaptive Gauss-Hermite Quadrature, nAGQ = {model.nAGQ}")
        out = [f"Generalized linear mixed model fit by maximum likelihood ({how})"]
        out.append(f" Family: {model.family.name}  ( {model.family.link.name} )")
    out.append(f"Formula: {model.formula}")
    if model._spec.hessian != model.family.default_hessian:
        out.append(f"Curvature: {model._spec.hessian} information")
    if model._spec.weights_label:
        out.append(f"Weights: {model._spec.weights_label}")
    if model._spec.offset_label:
        out.append(f"Offset: {model._spec.offset_label}")
    return out


def fit_lines(model: MixedModel) -> list[str]:
    """AIC, BIC, logLik, -2*log(L), df.resid; the REML criterion of a fit by REML."""
    if model.REML:
        return [f"REML criterion at convergence: {model.objective:.1f}"]
    names = ["AIC", "BIC", "logLik", "-2*log(L)", "df.resid"]
    values = [f"{v:.1f}" for v in (model.aic, model.bic, model.loglik, model.objective)] + [str(model.df_resid)]
    width = [max(len(a), len(b), 8) for a, b in zip(names, values, strict=True)]
    return [
        " ".join(n.rjust(w) for n, w in zip(names, width, strict=True)),
        " ".join(v.rjust(w) for v, w in zip(values, width, strict=True)),
    ]


def group_line(model: MixedModel) -> str:
    """Number of observations and of levels."""
    groups = "; ".join(f"{g}, {m}" for g, m in model.ngrps.items())
    return f"Number of obs: {model.nobs}, groups:  {groups}"


def short_text(model: MixedModel) -> str:
    """What print(m) shows."""
    lines = [*header_lines(model), *fit_lines(model), "Random effects:", varcorr_text(model.VarCorr(), False)]
    lines += [group_line(model), "Fixed Effects:"]
    names = list(model._data.x_names)
    values = signif(model.beta, 4)
    line_names, line_values = "", ""
    for name, value in zip(names, values, strict=True):
        w = max(len(name), len(value)) + 2
        if line_names and len(line_names) + w > WIDTH:
            lines += [line_names, line_values]
            line_names, line_values = "", ""
        line_names += name.rjust(w)
        line_values += value.rjust(w)
    lines += [line_names, line_values]
    if len(model.fitted) and (not model.converged or model.is_singular):
        lines.append(verdict(model))
    return "\n".join(lines)


class Summary:
    """Summary of a fit: str() is lme4's printout, `_repr_html_` the notebook form."""

    def __init__(self, model: MixedModel, correlation: bool | None = None, ddf: str | None = None) -> None:
        self.model = model
        self.table = model.coefficients(ddf)
        self.method = None if ddf is None else method_name(ddf)
        p = len(model._data.x_names)
        self.correlation = (1 < p <= 20) if correlation is None else bool(correlation) and p > 1

    def coefficients(self) -> list[list[str]]:
        """Rows of the fixed-effects table with header."""
        table = self.table
        estimate, se = signif(table["estimate"].to_numpy(), 5), signif(table["std_error"].to_numpy(), 4)
        letter = "t" if self.model.is_linear else "z"
        columns = [estimate, se]
        header = ["", "Estimate", "Std. Error"]
        if "df" in table:
            header.append("df")
            columns.append([f"{v:.2f}" for v in table["df"]])
        header.append(f"{letter} value")
        columns.append([f"{v:.3f}" for v in table["statistic"]])
        if "p_value" in table:
            header += [f"Pr(>|{letter}|)", ""]
            columns += [[p_text(v) for v in table["p_value"]], [stars(v) for v in table["p_value"]]]
        return [header, *[list(row) for row in zip(table.index, *columns, strict=True)]]

    def _residual_lines(self) -> list[str]:

        try:
            scaled = self.model.residuals("pearson", scaled=True).to_numpy()
        except NotSupportedError:
            return []
        quantiles = signif(np.quantile(scaled, [0.0, 0.25, 0.5, 0.75, 1.0]), 5)
        quantiles = [f"{float(q):.4f}" for q in quantiles]
        names = ["Min", "1Q", "Median", "3Q", "Max"]
        w = [max(len(a), len(b)) for a, b in zip(names, quantiles, strict=True)]
        return [
            "",
            "Scaled residuals: ",
            " ".join(n.rjust(k) for n, k in zip(names, w, strict=True)),
            " ".join(q.rjust(k) for q, k in zip(quantiles, w, strict=True)),
        ]

    def _correlation_lines(self) -> list[str]:
        V = self.model.vcov().to_numpy()
        sd = np.sqrt(np.diag(V))
        with np.errstate(invalid="ignore", divide="ignore"):
            corr = np.where(np.isinf(np.outer(sd, sd)), np.nan, V / np.outer(sd, sd))
        names = list(self.model._data.x_names)
        short = [abbreviate(n, 6) for n in names]
        label = [abbreviate("(Intr)" if n == "(Intercept)" else n, 11) for n in names]
        short = ["(Intr)" if n == "(Intercept)" else s for n, s in zip(names, short, strict=True)]
        rows = [["", *short[:-1]]]
        for i in range(1, len(names)):
            own = [
                "" if j >= i else "." if np.isnan(corr[i, j]) else f"{corr[i, j]:.3f}" for j in range(len(names) - 1)
            ]
            rows.append([label[i], *own])
        return ["", "Correlation of Fixed Effects:", *columns_text(rows, [False] + [True] * (len(names) - 1))]

    def __str__(self) -> str:
        m = self.model
        lines = [*header_lines(m), "", *fit_lines(m), *self._residual_lines(), "", "Random effects:"]
        lines += [varcorr_text(m.VarCorr()), group_line(m)]
        phi = m.phi
        if len(phi):
            lines += ["", "Dispersion: " + ", ".join(f"{k} = {v:.5g}" for k, v in phi.items())]
        rows = self.coefficients()
        title = "Fixed effects:" if self.method is None else f"Fixed effects ({self.method}'s method):"
        starred = rows[0][-1] == ""
        right = [False] + [True] * (len(rows[0]) - 1 - starred) + [False] * starred
        lines += ["", title, *(columns_text(rows, right) if len(rows) > 1 else ["(none)"])]
        if starred and any(row[-1] for row in rows[1:]):
            lines += ["---", LEGEND]
        if self.correlation:
            lines += self._correlation_lines()
        elif len(m._data.x_names) > 20:
            lines += [
                "",
                "Correlation matrix not shown by default, as p > 20; use summary(correlation=True).",
            ]
        lines += ["", verdict(m)]
        lines += [f"Note: {_sentence(note)}." for note in messages(m)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        m = self.model
        esc = html.escape

        def table(rows: list[list[str]]) -> str:
            head = "".join(f"<th>{esc(c)}</th>" for c in rows[0])
            body = "".join(
                "<tr>" + f"<th>{esc(r[0])}</th>" + "".join(f"<td>{esc(c)}</td>" for c in r[1:]) + "</tr>"
                for r in rows[1:]
            )
            return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

        values = {"AIC": m.aic, "BIC": m.bic, "logLik": m.loglik, "-2 log L": m.objective}
        if m.REML:
            values = {"REML criterion": m.objective}
        numbers = [[*values, "df.resid", "obs"], [*[f"{v:.1f}" for v in values.values()], str(m.df_resid), str(m.nobs)]]
        random = [["Group", "Name", "Variance", "Std.Dev.", "Corr"]]
        for b in m.VarCorr():
            for j, name in enumerate(b.names):
                corr = " ".join(f"{r:.2f}" for r in b.corr[j, :j])
                random.append([b.group, name, f"{b.cov[j, j]:.4g}", f"{b.sd[j]:.4g}", corr])
        if m.is_linear:
            random.append(["Residual", "", f"{m.sigma**2:.4g}", f"{m.sigma:.4g}", ""])
        notes = "".join(f"<li>{esc(_sentence(t))}.</li>" for t in messages(m))
        title, *rest = header_lines(m)
        return (
            f"<div><p><b>{esc(title)}</b><br>{'<br>'.join(esc(r.strip()) for r in rest)}</p>"
            f"{table(numbers)}<p><b>Random effects</b> ({esc(group_line(m))})</p>{table(random)}"
            f"<p><b>Fixed effects</b></p>{table(self.coefficients())}<p>{esc(verdict(m))}</p>"
            f"{'<ul>' + notes + '</ul>' if notes else ''}</div>"
        )
