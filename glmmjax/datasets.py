"""Bundled data sets: the classic examples of mixed models, with R's level orders.

`load("cbpp")` returns a new pandas DataFrame every time. Factors of R are categorical columns whose string
categories stand in R's level order (ordered where R has them ordered), numbers are float64 and integers
int64, so that coefficients come out with R's names and reference levels. Names are lower case; lookup
ignores case.
Where the data come from, and under which licence, is in `describe(name)` and in `table()`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DatasetInfo", "UnknownDatasetError", "describe", "load", "names", "table"]

_FOLDER = Path(__file__).parent / "data"


class UnknownDatasetError(ValueError):
    """No bundled data set has the name asked for; the message lists near names and all names."""


@dataclass(frozen=True)
class DatasetInfo:
    """What is known about one bundled data set."""

    name: str
    """Lower-case name, as `load` takes it."""
    title: str
    """What the data are, in one line."""
    rows: int
    columns: Mapping[str, str]
    """Column name -> type: "numeric", "integer", "factor (15 levels)" or "ordered (4 levels)"."""
    added: Mapping[str, str]
    """Columns that the source does not have -> how they were made."""
    source: str
    """The R package, object and version that the values were taken from."""
    reference: str
    """The publication that the data come from."""
    licence: str
    """The licence of the source package, as stated there."""
    note: str
    """Other differences from the source, or a remark; may be empty."""

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.title}", f"{self.rows} rows, {len(self.columns)} columns"]
        for column, kind in self.columns.items():
            added = f"; added: {self.added[column]}" if column in self.added else ""
            lines.append(f"  {column}: {kind}{added}")
        lines += [
            f"Source: {self.source}",
            f"Reference: {self.reference}",
            f"Licence of the source: {self.licence}",
        ]
        if self.note:
            lines.append(f"Note: {self.note}")
        return "\n".join(lines)


@lru_cache(maxsize=1)
def _catalogue() -> dict[str, dict[str, Any]]:
    catalogue: dict[str, dict[str, Any]] = json.loads((_FOLDER / "datasets.json").read_text(encoding="utf-8"))
    return catalogue


def _find(name: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(name, str):
        raise TypeError(f"the name of a data set is a string, not {type(name).__name__}")
    catalogue = _catalogue()
    key = name.strip().lower()
    if key in catalogue:
        return key, catalogue[key]
    import difflib

    near = difflib.get_close_matches(key, catalogue, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise UnknownDatasetError(f"no bundled data set is called {name!r}.{hint} There are: {', '.join(catalogue)}")


def _levels(column: Mapping[str, Any]) -> list[str]:
    levels = column["levels"]  # a number n stands for "1" ... "n"
    return [str(i) for i in range(1, levels + 1)] if isinstance(levels, int) else list(levels)


def names() -> list[str]:
    """Names of the bundled data sets, lower case, in alphabetical order."""
    return list(_catalogue())


def load(name: str) -> pd.DataFrame:
    """One bundled data set as a new DataFrame.

    Args:
        name: see `names()`; case does not matter.
    Returns:
        One row per observation, in R's order, with a default index. Categorical columns have string
        categories in R's level order; the first is the reference level of treatment contrasts.
    Raises:
        UnknownDatasetError: (a ValueError) names near matches and all data sets.
    """
    key, record = _find(name)
    import pandas as pd

    columns = record["columns"]
    factors = {c: s for c, s in columns.items() if "levels" in s}
    dtypes: dict[str, Any] = {
        c: str if c in factors else "int64" if s["type"] == "integer" else "float64" for c, s in columns.items()
    }
    for column, spec in factors.items():
        dtypes[column] = pd.CategoricalDtype(_levels(spec), ordered=spec["type"] == "ordered")
    # Before 3.1 pandas converts decimals to floats exactly only on request; from 3.1 on always.
    old = tuple(int(part) for part in pd.__version__.split(".")[:2]) < (3, 1)
    exact: dict[str, Any] = {"float_precision": "round_trip"} if old else {}
    # Only an empty cell is a missing value: "None" or "NA" may be a level.
    frame: pd.DataFrame = pd.read_csv(
        _FOLDER / f"{key}.csv.gz", dtype=dtypes, keep_default_na=False, na_values=[""], **exact
    )
    return frame


def describe(name: str) -> DatasetInfo:
    """Rows, columns, source, reference and licence of one bundled data set, by its name as in `load`."""
    key, record = _find(name)
    columns = record["columns"]
    kinds = {c: s["type"] + (f" ({len(_levels(s))} levels)" if "levels" in s else "") for c, s in columns.items()}
    return DatasetInfo(
        name=key,
        title=record["title"],
        rows=record["rows"],
        columns=MappingProxyType(kinds),
        added=MappingProxyType({c: s["added"] for c, s in columns.items() if "added" in s}),
        source=record["source"],
        reference=record["reference"],
        licence=record["licence"],
        note=record["note"],
    )


def table() -> pd.DataFrame:
    """All bundled data sets, one row each: title, rows, columns, added ones, source, reference, licence."""
    import pandas as pd

    infos = [describe(name) for name in names()]
    return pd.DataFrame(
        {
            "title": [i.title for i in infos],
            "rows": [i.rows for i in infos],
            "columns": [", ".join(i.columns) for i in infos],
            "added": [", ".join(i.added) for i in infos],
            "source": [i.source for i in infos],
            "reference": [i.reference for i in infos],
            "licence": [i.licence for i in infos],
        },
        index=pd.Index(names(), name="name"),
    )
