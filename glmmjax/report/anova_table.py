"""The table of tests, which prints as R's anova tables do."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .numbers import LEGEND, r_format, r_pvalues, stars
from .summary import columns_text


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
