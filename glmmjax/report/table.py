"""What classes show of themselves, written in several formats: text, HTML, LaTeX, Markdown.

A class that shows something is a `Shown`: it says in `_report` of which blocks it consists (paragraphs, notes, tables
of columns of cells). A format is a `Format`: it says how each kind of block is written. Neither knows the other.
"""

from __future__ import annotations

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd


class Column(NamedTuple):
    """A column of a table: its name and its cells, which a format of numbers made texts (see `numbers`).

    Blanks before a cell or name push it to the right in text; the other formats have ways of their own.
    """

    name: str
    cells: Sequence[str]
    right: bool = True


@dataclass(frozen=True)
class Table:
    """Columns of cells; the first labels the rows. `label` is its name where text gives that a line of its own."""

    columns: Sequence[Column]
    label: str = ""

    @property
    def header(self) -> list[str]:
        """Names of the columns."""
        first, *rest = (c.name.strip() for c in self.columns)
        return [first or self.label, *rest]

    @property
    def rows(self) -> list[list[str]]:
        """Cells without the blanks around them, by row."""
        return [[cell.strip() for cell in row] for row in zip(*(c.cells for c in self.columns), strict=True)]


class Heading(NamedTuple):
    """A paragraph whose first words stand out."""

    title: str
    rest: str = ""


class Notes(NamedTuple):
    """A list of sentences."""

    sentences: Sequence[str]


#: A str is a paragraph; "" is a blank line of text, and nothing elsewhere.
Block = str | Heading | Notes | Table


class Format(ABC):
    """How blocks are written: a new output format is a subclass of this, and no more."""

    #: between blocks, and between the lines of a paragraph
    gap, newline = "\n\n", "\n"

    def document(self, blocks: Iterable[Block]) -> str:
        """All blocks, one below the other."""
        return self.gap.join(self.block(b) for b in blocks if b != "")

    def block(self, block: Block) -> str:
        """One block of any kind."""
        if isinstance(block, Table):
            return self.table(block)
        if isinstance(block, Notes):
            return self.notes([self.inline(s) for s in block.sentences])
        if isinstance(block, Heading):
            return self.paragraph(self.strong(self.inline(block.title)) + self.inline(block.rest))
        return self.paragraph(self.inline(block))

    def inline(self, text: str) -> str:
        """Text that may have several lines."""
        return self.newline.join(self.escape(line) for line in text.split("\n"))

    def paragraph(self, inside: str) -> str:
        """A paragraph of what is written already."""
        return inside

    @abstractmethod
    def escape(self, text: str) -> str:
        """Text as it is written where some characters have a meaning."""

    @abstractmethod
    def strong(self, inside: str) -> str:
        """Words that stand out."""

    @abstractmethod
    def notes(self, items: list[str]) -> str:
        """A list."""

    @abstractmethod
    def table(self, table: Table) -> str:
        """A table."""


class Text(Format):
    """What a terminal shows: aligned columns, a blank between them."""

    gap = "\n"

    def document(self, blocks: Iterable[Block]) -> str:
        return self.gap.join(map(self.block, blocks))

    def escape(self, text: str) -> str:
        return text

    def strong(self, inside: str) -> str:
        return inside

    def notes(self, items: list[str]) -> str:
        return "\n".join(f"Note: {item}" for item in items)

    def table(self, table: Table) -> str:
        columns = table.columns
        rows = [[c.name for c in columns]] if any(c.name for c in columns) else []
        rows += [[table.label, *[""] * (len(columns) - 1)]] if table.label else []
        rows += [list(row) for row in zip(*(c.cells for c in columns), strict=True)]
        widths = [max((len(row[j]) for row in rows), default=0) for j in range(len(columns))]
        return "\n".join(
            " ".join(
                cell.rjust(w) if c.right else cell.ljust(w) for cell, w, c in zip(row, widths, columns, strict=True)
            ).rstrip()
            for row in rows
        )


class Html(Format):
    """What a notebook shows."""

    gap, newline = "", "<br>"

    def document(self, blocks: Iterable[Block]) -> str:
        return f"<div>{super().document(blocks)}</div>"

    def escape(self, text: str) -> str:
        return html.escape(text)

    def strong(self, inside: str) -> str:
        return f"<b>{inside}</b>"

    def paragraph(self, inside: str) -> str:
        return f"<p>{inside}</p>"

    def notes(self, items: list[str]) -> str:
        return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"

    def table(self, table: Table) -> str:
        def line(cells: list[str], others: str) -> str:
            kinds = ["th", *[others] * (len(cells) - 1)]
            return f"<tr>{''.join(f'<{k}>{self.escape(c)}</{k}>' for k, c in zip(kinds, cells, strict=True))}</tr>"

        body = "".join(line(row, "td") for row in table.rows)
        return f"<table><thead>{line(table.header, 'th')}</thead><tbody>{body}</tbody></table>"


class Latex(Format):
    """For a paper, with the package booktabs."""

    newline = " \\newline\n"
    _MEANT = {
        **{c: f"\\{c}" for c in "&%$#_{}"},
        **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
        **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"},
    }

    def escape(self, text: str) -> str:
        return "".join(self._MEANT.get(c, c) for c in text)

    def strong(self, inside: str) -> str:
        return f"\\textbf{{{inside}}}"

    def notes(self, items: list[str]) -> str:
        return "\\begin{itemize}\n" + "".join(f"\\item {item}\n" for item in items) + "\\end{itemize}"

    def table(self, table: Table) -> str:
        def line(cells: list[str]) -> str:
            # a minus is longer than a hyphen; after \\ a bracket or star would be taken for its argument
            shown = [re.sub(r"^-(?=[\d.]|Inf|inf)", "$-$", self.escape(cell)) for cell in cells]
            return ("{}" if shown[0].startswith(("[", "*")) else "") + " & ".join(shown) + " \\\\"

        places = "".join("r" if c.right else "l" for c in table.columns)
        return "\n".join(
            [f"\\begin{{tabular}}{{{places}}}", "\\toprule", line(table.header), "\\midrule"]
            + [*map(line, table.rows), "\\bottomrule", "\\end{tabular}"]
        )


class Markdown(Format):
    """For a README or a report, as GitHub, Jupyter and pandoc read it."""

    newline = "  \n"

    def escape(self, text: str) -> str:
        return re.sub(r"([\\`*_<>\[\]|$~])", r"\\\1", text.replace("&", "&amp;"))

    def strong(self, inside: str) -> str:
        return f"**{inside}**"

    def notes(self, items: list[str]) -> str:
        return "\n".join(f"- {item}" for item in items)

    def table(self, table: Table) -> str:
        rows = [[self.escape(cell) for cell in row] for row in (table.header, *table.rows)]
        widths = [max(3, *(len(row[j]) for row in rows)) for j in range(len(table.columns))]
        right = [c.right for c in table.columns]
        rule = ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
        rows = [
            [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
            for row in rows
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


TEXT, HTML, LATEX, MARKDOWN = Text(), Html(), Latex(), Markdown()


class Shown:
    """A class that prints: text at a terminal, HTML in a notebook, LaTeX and Markdown when asked for."""

    def _report(self, page: bool) -> Sequence[Block]:
        """What is shown: at a terminal, or on a page, where the eye takes in larger tables."""
        raise NotImplementedError

    def __str__(self) -> str:
        return TEXT.document(self._report(False))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return HTML.document(self._report(True))

    def to_latex(self) -> str:
        r"""LaTeX of what a notebook shows; tables need ``\usepackage{booktabs}``."""
        return LATEX.document(self._report(True))

    def to_markdown(self) -> str:
        """Markdown of what a notebook shows."""
        return MARKDOWN.document(self._report(True))


def of_frame(frame: pd.DataFrame | pd.Series, digits: str | None = None, index: bool = True) -> Table:
    """A table of a DataFrame, or of a Series without a header, as pandas prints it.

    Args:
        digits: format of real numbers, such as ".5g"; None for pandas' own.
        index: whether the index is the first column.
    """
    series = isinstance(frame, pd.Series)
    data = frame.to_frame("") if isinstance(frame, pd.Series) else frame
    write = None if digits is None else f"{{:{digits}}}".format
    columns = [Column("", [str(v) for v in data.index], right=False)] if index else []
    for j, name in enumerate(data.columns):
        one = data.iloc[:, [j]]
        lines = one.to_string(index=False, header=False, float_format=write).split("\n") if len(one) else []
        kind = one.dtypes.iloc[0].kind
        # pandas leaves room for a sign, in the names of columns of numbers and where numbers are its own
        room = " " * (index and not (kind == "f" and write is not None)) + "  " * series
        signed = ("-", "NaN") if kind == "f" else "-"
        cells = [cell if cell.startswith(signed) else room + cell for cell in map(str.strip, lines)]
        columns.append(Column((" " if kind in "iufb" and not series else "") + str(name), cells))
    return Table(columns, str(data.index.name) if index and data.index.name is not None else "")
