"""The table of tests, which prints as R's anova tables do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from .numbers import legend, r_format, r_pvalues, stars
from .table import Block, Column, Shown, Table


class AnovaTable(Shown, pd.DataFrame):  # type: ignore[misc]
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

    def _table(self) -> Table:
        """The numbers as texts, stars last."""
        names = [str(c) for c in self.columns]
        values = {name: self[c].to_numpy(float) for c, name in zip(self.columns, names, strict=True)}
        tested = [name for name in names if name[1:] == " value" or name == "Chisq"]
        joint = r_format(np.concatenate([np.round(values[name], 4) for name in tested]), 5) if tested else []
        text = {name: joint[i * len(self) : (i + 1) * len(self)] for i, name in enumerate(tested)}
        for name in names:
            if name.startswith("Pr("):
                text[name] = r_pvalues(values[name])
            elif name not in text:
                v = values[name]
                largest = np.nanmax(np.abs(v), initial=0.0)
                if not name.endswith("Df") and largest > 0.0:  # R's zapsmall
                    v = np.round(v, max(0, int(5.0 - np.log10(largest) + 0.5)))
                text[name] = r_format(v, 5)
        with_p = bool(names) and names[-1].startswith("Pr(")
        marks = [stars(p) for p in values[names[-1]]] if with_p else [""] * len(self)
        labels = Column("", [str(label) for label in self.index], right=False)
        return Table([labels, *(Column(name, text[name]) for name in names), Column("", marks, right=False)])

    def cells(self) -> list[list[str]]:
        """Text of the table: header, then rows; stars are in the last column, which has no name."""
        table = self._table()
        return [table.header, *table.rows]

    def _report(self, page: bool) -> Sequence[Block]:
        table = self._table()
        heading = self.attrs.get("heading", "Analysis of Variance Table")
        return [heading, table, *([] if page else legend(table.columns[-1].cells))]


def made_table(frame: pd.DataFrame, heading: Sequence[str], notes: Sequence[str] = ()) -> AnovaTable:
    """A table with its heading, notes last."""
    out = AnovaTable(frame)
    out.attrs["heading"] = "\n".join([*heading, *(f"Note: {note}" for note in notes)])
    out.attrs["notes"] = list(notes)
    return out
