"""Summary of a fitted model, in lme4's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._errors import NotSupportedError
from ..report.numbers import abbreviate, legend, p_text, signif, stars
from ..report.table import TEXT, Block, Column, Heading, Notes, Shown, Table
from .messages import messages, verdict
from .wald import method_name

if TYPE_CHECKING:
    from ..results import MixedModel

WIDTH = 80
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


def fit_block(model: MixedModel) -> Block:
    """AIC, BIC, logLik, -2*log(L), df.resid; the REML criterion of a fit by REML."""
    if model.REML:
        return f"REML criterion at convergence: {model.objective:.1f}"
    values = {"AIC": model.aic, "BIC": model.bic, "logLik": model.loglik, "-2*log(L)": model.objective}
    shown = {name: f"{v:.1f}" for name, v in values.items()} | {"df.resid": str(model.df_resid)}
    return Table([Column(name.rjust(8), [text]) for name, text in shown.items()])


def group_line(model: MixedModel) -> str:
    """Number of observations and of levels."""
    groups = "; ".join(f"{g}, {m}" for g, m in model.ngrps.items())
    return f"Number of obs: {model.nobs}, groups:  {groups}"


def short_text(model: MixedModel) -> str:
    """What print(m) shows."""
    lines: list[Block] = [*header_lines(model), fit_block(model), "Random effects:", model.VarCorr()._table(False)]
    lines += [group_line(model), "Fixed Effects:"]
    line_names, line_values = "", ""
    for name, value in zip(model._data.x_names, signif(model.beta, 4), strict=True):
        w = max(len(name), len(value)) + 2
        if line_names and len(line_names) + w > WIDTH:
            lines += [line_names, line_values]
            line_names, line_values = "", ""
        line_names += name.rjust(w)
        line_values += value.rjust(w)
    lines += [line_names, line_values]
    if len(model.fitted) and (not model.converged or model.is_singular):
        lines.append(verdict(model))
    return TEXT.document(lines)


def summary(model: MixedModel, correlation: bool | None = None, ddf: str | None = None) -> Summary:
    """lme4-like summary; str() of it is the text.

    Args:
        correlation: of the fixed effects; None prints it up to 20 columns.
        ddf: for linear models "satterthwaite" or "kenward-roger" degrees of freedom and p-values; None
            prints t values alone.
    """
    return Summary(model, correlation, ddf)


class Summary(Shown):
    """Summary of a fit: str() is lme4's printout; a notebook shows the estimates without residuals and correlations."""

    def __init__(self, model: MixedModel, correlation: bool | None = None, ddf: str | None = None) -> None:
        self.model = model
        self.table = model.coefficients(ddf)
        self.method = None if ddf is None else method_name(ddf)
        p = len(model._data.x_names)
        self.correlation = (1 < p <= 20) if correlation is None else bool(correlation) and p > 1

    def coefficients(self) -> list[list[str]]:
        """Rows of the fixed-effects table with header."""
        table = self._fixed()
        return [table.header, *table.rows]

    def _fixed(self) -> Table:
        """The fixed effects; stars are in the last column, which has no name."""
        table, letter = self.table, "t" if self.model.is_linear else "z"
        columns = [
            Column("", list(table.index), right=False),
            Column("Estimate", signif(table["estimate"].to_numpy(), 5)),
            Column("Std. Error", signif(table["std_error"].to_numpy(), 4)),
        ]
        if "df" in table:
            columns.append(Column("df", [f"{v:.2f}" for v in table["df"]]))
        columns.append(Column(f"{letter} value", [f"{v:.3f}" for v in table["statistic"]]))
        if "p_value" in table:
            columns.append(Column(f"Pr(>|{letter}|)", [p_text(v) for v in table["p_value"]]))
            columns.append(Column("", [stars(v) for v in table["p_value"]], right=False))
        return Table(columns)

    def _residuals(self) -> list[Block]:
        try:
            scaled = self.model.residuals("pearson", scaled=True).to_numpy()
        except NotSupportedError:
            return []
        quantiles = signif(np.quantile(scaled, [0.0, 0.25, 0.5, 0.75, 1.0]), 5)
        names = ["Min", "1Q", "Median", "3Q", "Max"]
        table = Table([Column(name, [f"{float(q):.4f}"]) for name, q in zip(names, quantiles, strict=True)])
        return ["", "Scaled residuals: ", table]

    def _correlations(self) -> list[Block]:
        V = self.model.vcov().to_numpy()
        sd = np.sqrt(np.diag(V))
        with np.errstate(invalid="ignore", divide="ignore"):
            corr = np.where(np.isinf(np.outer(sd, sd)), np.nan, V / np.outer(sd, sd))
        names = list(self.model._data.x_names)
        label = [abbreviate("(Intr)" if n == "(Intercept)" else n, 11) for n in names]
        short = ["(Intr)" if n == "(Intercept)" else abbreviate(n, 6) for n in names]
        columns = [Column("", label[1:], right=False)]
        for j, name in enumerate(short[:-1]):
            own = ["." if np.isnan(r) else f"{r:.3f}" for r in corr[j + 1 :, j]]
            columns.append(Column(name, [""] * j + own))
        return ["", "Correlation of Fixed Effects:", Table(columns)]

    def _report(self, page: bool) -> Sequence[Block]:
        m, fixed = self.model, self._fixed()
        title, *rest = header_lines(m)
        out: list[Block] = [
            Heading(title, "".join(f"\n{line.strip() if page else line}" for line in rest)),
            "",
            fit_block(m),
        ]
        out += [] if page else self._residuals()
        out += ["", Heading("Random effects:"), m.VarCorr()._table(), group_line(m)]
        if len(m.phi):
            out += ["", "Dispersion: " + ", ".join(f"{k} = {v:.5g}" for k, v in m.phi.items())]
        out += ["", Heading("Fixed effects:" if self.method is None else f"Fixed effects ({self.method}'s method):")]
        out.append(fixed if len(self.table) else "(none)")
        if not page:
            out += legend(fixed.columns[-1].cells if "p_value" in self.table else [])
            if self.correlation:
                out += self._correlations()
            elif len(m._data.x_names) > 20:
                out += ["", "Correlation matrix not shown by default, as p > 20; use summary(correlation=True)."]
        notes = [f"{text[:1].upper()}{text[1:]}." for text in messages(m)]
        return [*out, "", verdict(m), *([Notes(notes)] if notes else [])]
