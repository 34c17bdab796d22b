"""What is shown: blocks in every format, escaped, and as pandas prints its tables."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import load_data

import glmmjax as gj
from glmmjax.report.anova_table import AnovaTable, made_table
from glmmjax.report.table import (
    HTML,
    LATEX,
    MARKDOWN,
    TEXT,
    Block,
    Column,
    Format,
    Heading,
    Notes,
    Shown,
    Table,
    of_frame,
)

TABLE = Table([Column("", ["a", "b_1"], right=False), Column("x", ["-1.5", " 10"]), Column("", ["***", ""], False)])
BLOCKS: list[Block] = [Heading("Title", "\nFormula: y ~ x | g"), "", TABLE, Notes(["5 % < 6 & more."])]


class Answer(Shown):
    """A table of its own: what a new class writes to be shown in every format."""

    def _report(self, page: bool) -> Sequence[Block]:
        return BLOCKS


class Csv(Format):
    """A format of its own: what a new format writes to show every class."""

    def escape(self, text: str) -> str:
        return text

    def strong(self, inside: str) -> str:
        return inside

    def notes(self, items: list[str]) -> str:
        return "\n".join(f"# {item}" for item in items)

    def paragraph(self, inside: str) -> str:
        return "\n".join(f"# {line}" for line in inside.split("\n"))

    def table(self, table: Table) -> str:
        return "\n".join(";".join(row) for row in (table.header, *table.rows))


# -------------------- formats
def test_text() -> None:
    expected = ["Title", "Formula: y ~ x | g", "", "       x", "a   -1.5 ***", "b_1   10", "Note: 5 % < 6 & more."]
    assert str(Answer()) == repr(Answer()) == "\n".join(expected)


def test_html() -> None:
    assert Answer()._repr_html_() == (
        "<div><p><b>Title</b><br>Formula: y ~ x | g</p>"
        "<table><thead><tr><th></th><th>x</th><th></th></tr></thead><tbody>"
        "<tr><th>a</th><td>-1.5</td><td>***</td></tr><tr><th>b_1</th><td>10</td><td></td></tr></tbody></table>"
        "<ul><li>5 % &lt; 6 &amp; more.</li></ul></div>"
    )


def test_latex() -> None:
    assert Answer().to_latex().split("\n") == [
        "\\textbf{Title} \\newline",
        "Formula: y \\textasciitilde{} x \\textbar{} g",
        "",
        "\\begin{tabular}{lrl}",
        "\\toprule",
        " & x &  \\\\",
        "\\midrule",
        "a & $-$1.5 & *** \\\\",
        "b\\_1 & 10 &  \\\\",
        "\\bottomrule",
        "\\end{tabular}",
        "",
        "\\begin{itemize}",
        "\\item 5 \\% \\textless{} 6 \\& more.",
        "\\end{itemize}",
    ]


def test_markdown() -> None:
    assert Answer().to_markdown().split("\n") == [
        "**Title**  ",
        "Formula: y \\~ x \\| g",
        "",
        "|      |    x |        |",
        "| ---- | ---: | ------ |",
        "| a    | -1.5 | \\*\\*\\* |",
        "| b\\_1 |   10 |        |",
        "",
        "- 5 % \\< 6 &amp; more.",
    ]


def test_what_latex_would_misread() -> None:
    assert LATEX.escape("\\{}$&#^_~%|<>") == (
        "\\textbackslash{}\\{\\}\\$\\&\\#\\textasciicircum{}\\_\\textasciitilde{}\\%\\textbar{}\\textless{}\\textgreater{}"
    )
    levels = Table([Column("", ["[0,1)", "*", "-"], right=False), Column("x", ["-Inf", "-0.5", "--"])])
    rows = LATEX.table(levels).split("\n")[4:7]
    # a bracket or star after \\ would be its argument; only numbers have a minus
    assert rows == ["{}[0,1) & $-$Inf \\\\", "{}* & $-$0.5 \\\\", "- & -- \\\\"]


def test_empty_tables() -> None:
    empty = Table([Column("", []), Column("Estimate", [])])
    assert TEXT.table(empty) == " Estimate"
    assert HTML.table(empty).endswith("<tbody></tbody></table>")
    assert MARKDOWN.table(empty).split("\n") == ["|     | Estimate |", "| --: | -------: |"]
    assert "\\midrule\n\\bottomrule" in LATEX.table(empty)


def test_a_label_has_a_line_in_text_and_the_corner_elsewhere() -> None:
    table = Table([Column("", ["1", "2"], right=False), Column("x", ["5", "6"])], label="herd")
    assert TEXT.table(table).split("\n") == ["     x", "herd", "1    5", "2    6"]
    assert table.header == ["herd", "x"]


# -------------------- tables of pandas
def test_frames_are_printed_as_pandas_does(rng: np.random.Generator) -> None:
    for case in range(60):
        n = int(rng.integers(1, 6))
        kinds: list[Any] = [
            rng.normal(size=n) * 10.0 ** rng.integers(-5, 6),
            np.where(rng.random(n) < 0.3, np.nan, rng.normal(size=n)),
            np.where(rng.random(n) < 0.3, np.inf, rng.normal(size=n)),
            rng.integers(-50, 1000, n),
            rng.random(n) < 0.5,
            rng.choice(["a", "bb", "c c"], n),
            pd.Categorical(rng.choice(["u", "v"], n)),
        ]
        names = ["x", "estimate", "p < .05"]
        frame = pd.DataFrame({name: kinds[rng.integers(len(kinds))] for name in names})
        if case % 2:
            frame.index = pd.Index([f"l{i}" for i in range(n)], name=[None, "g", "a long name"][case % 3])
        for digits in (None, ".5g"):
            write = None if digits is None else f"{{:{digits}}}".format
            for index in (True, False):
                lines = frame.to_string(index=index, float_format=write).split("\n")
                assert TEXT.table(of_frame(frame, digits, index)).split("\n") == [line.rstrip() for line in lines]
            series = pd.Series(np.abs(rng.normal(size=n)), index=[f"l{i}" for i in range(n)])
            assert TEXT.table(of_frame(series, digits)) == series.to_string(float_format=write)


# -------------------- classes
@cache
def answers() -> dict[str, Any]:
    cbpp, sleep = load_data("cbpp"), load_data("sleepstudy")
    g = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", cbpp)
    m = gj.lmer("Reaction ~ Days + (1 | Subject)", sleep)
    many = gj.fit_many("y ~ Days + (1 | Subject)", sleep, y=np.stack([sleep["Reaction"], sleep["Reaction"] + 1.0], 1))
    found = [g, g.summary(), g.VarCorr(), gj.anova(g), gj.drop1(m, test="none"), g.wald_test("period2 = period3"), many]
    found += [
        m.profile("sigma"),
        m.bootstrap(3),
        m.influence("Subject"),
        gj.lm_list("Reaction ~ Days | Subject", sleep),
    ]
    found += [gj.pool([m, m]), gj.exact_test(m, nsim=20), gj.structure(m), g.marginal_means("period")]
    found += [g.quadrature_error(k=3), gj.power(g, "period2", nsim=2)]
    return {type(one).__name__: one for one in found}


def rules(markdown: str) -> int:
    """Lines below a header."""
    return sum(re.fullmatch(r"\|[ :|-]*--[ :|-]*\|", line) is not None for line in markdown.split("\n"))


def test_every_class_has_every_format() -> None:
    for name, one in answers().items():
        assert str(one) and (repr(one) == str(one) or name == "Structure"), name  # its repr is short and has its fields
        assert one._repr_html_().startswith("<div>"), name
        tables = one.to_latex().count("\\toprule")
        assert tables == one._repr_html_().count("<table>") == rules(one.to_markdown()), name


def test_a_new_format_is_one_class() -> None:
    lines = Csv().document(answers()["MixedModel"]._report(True)).split("\n")
    assert "Groups;Name;Variance;Std.Dev." in lines and "herd;(Intercept);0.4125;0.6423" in lines
    assert any(line.startswith("period2;-0.9923") for line in lines)
    lines = Csv().document(answers()["Pooled"]._report(True)).split("\n")
    assert lines[0] == "# Pooled over 2 fits (Rubin's rules)" and lines[2].startswith(";estimate;std_error;")


def test_no_class_writes_a_format_of_its_own() -> None:
    own = []
    for module in pkgutil.walk_packages(gj.__path__, "glmmjax."):
        if module.name.rpartition(".")[2].startswith("__"):
            continue
        for name, kind in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(kind) and kind.__module__ == module.name and kind is not Shown:
                own += [name for part in ("_repr_html_", "to_latex", "to_markdown") if part in vars(kind)]
                if issubclass(kind, Shown):
                    own += [name for part in ("__str__", "_repr_latex_") if part in vars(kind)]
    assert own == []


def test_varcorr_in_latex() -> None:
    m = gj.lmer("Reaction ~ Days + (Days | Subject)", load_data("sleepstudy"))
    rows = [line.removesuffix(" \\\\") for line in m.VarCorr().to_latex().split("\n")]
    assert "Groups & Name & Variance & Std.Dev. & Corr" in rows
    assert "Subject & (Intercept) & 612.09 & 24.740 & " in rows and " & Days & 35.07 & 5.922 & 0.07" in rows
    assert "Residual &  & 654.94 & 25.592 & " in rows


def test_a_table_of_tests_is_still_a_frame() -> None:
    table = made_table(pd.DataFrame({"Chisq": [3.0], "Df": [1.0], "Pr(>Chisq)": [0.0832]}, index=["x"]), ["Title"])
    assert isinstance(table, AnovaTable) and isinstance(table, pd.DataFrame)
    assert str(table).split("\n") == [
        "Title",
        "  Chisq Df Pr(>Chisq)",
        "x     3  1     0.0832 .",
        *str(table).split("\n")[3:],
    ]
    assert table.to_markdown().split("\n")[-1] == "| x   |     3 |   1 |      0.0832 | .   |"
    assert type(table[["Df"]]) is pd.DataFrame and pytest.approx(3.0) == table.loc["x", "Chisq"]


def test_rows_of_texts_are_at_hand() -> None:
    header, first, *_ = answers()["Summary"].coefficients()
    assert header == ["", "Estimate", "Std. Error", "z value", "Pr(>|z|)", ""]
    assert first[0] == "(Intercept)" and first[1].startswith("-1.398")
    table = made_table(pd.DataFrame({"Df": [1.0]}, index=["x"]), ["Title"])
    assert table.cells() == [["", "Df", ""], ["x", "1", ""]]
