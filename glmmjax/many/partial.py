"""Partial results of many fits: kept in a Parquet file, and exchanged between processes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import DataError
from ..fit.batch import Many
from .data import Labels


@dataclass(frozen=True)
class Piece:
    """Fits with the same columns: datasets `ids`, their numbers of rows, and whether coefficients run off."""

    labels: Labels
    ids: np.ndarray
    rows: np.ndarray
    separated: np.ndarray
    fits: Many


def save_pieces(pieces: list[Piece], path: Path, settings: dict[str, str], keys: list[tuple[str, str]]) -> None:
    """Write fits to a Parquet file, whole or not at all.

    Args:
        settings: as `Model.settings`. keys: as `Source.keys`.
    """
    pa, parquet = _pyarrow()
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        for i, number in enumerate(piece.ids):
            name, found = keys[number]
            row: dict[str, Any] = {"name": name, "digest": found}
            row |= {"rows": int(piece.rows[i]), "off": bool(piece.separated[i])}
            row["x"] = json.dumps(piece.labels.x)
            row["terms"] = json.dumps(piece.labels.terms)
            for column in Many.__dataclass_fields__:
                value = getattr(piece.fits, column)[i]
                row[column] = np.ravel(value).tolist() if np.ndim(value) else value.item()
            rows.append(row)
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"glmmjax": json.dumps(settings)})
    part = path.with_name(path.name + ".part")
    parquet.write_table(table, part)
    os.replace(part, path)


def load_pieces(path: Path, settings: dict[str, str], keys: list[tuple[str, str]]) -> list[Piece]:
    """Fits from a file of the same model, data by data; none if there is no file. Arguments as `save_pieces`.

    Raises:
        DataError: it has fits of something else; the message says of what.
    """
    pa, parquet = _pyarrow()
    if not path.exists():
        return []
    remedy = "remove it or name another file"
    try:
        table = parquet.read_table(path)
    except (pa.ArrowInvalid, OSError):
        raise DataError(f"{str(path)!r} is no Parquet file; {remedy}") from None
    try:
        before = json.loads((table.schema.metadata or {})[b"glmmjax"])
        names, digests = table["name"].to_pylist(), table["digest"].to_pylist()
        odd = next((name for name in settings if before.get(name) != settings[name]), None)
    except (KeyError, ValueError, AttributeError):
        raise DataError(f"{str(path)!r} has no results of this version of fit_many; {remedy}") from None
    if odd is not None:
        change = f"{odd} was {before.get(odd)}, and is {settings[odd]}"
        if odd == "function of the family":
            change = "the functions of the family, or what they use, have changed"
        raise DataError(f"{str(path)!r} has results of another model: {change}; {remedy}")
    ids = _matched(names, digests, keys, str(path), remedy)
    frame = table.to_pandas()
    frame["id"] = ids
    out = []
    for (x, terms), part in frame.groupby(["x", "terms"], sort=False):
        p = len(json.loads(x))
        values = {}
        for name in Many.__dataclass_fields__:
            column = part[name]
            listed = column.dtype == object
            values[name] = np.stack([np.asarray(v, float) for v in column]) if listed else column.to_numpy()
        values["vcov"] = values["vcov"].reshape(len(part), p, p)
        labels = Labels(tuple(json.loads(x)), tuple((g, tuple(n), *kind) for g, n, *kind in json.loads(terms)))
        out.append(
            Piece(labels, part["id"].to_numpy(), part["rows"].to_numpy(), part["off"].to_numpy(), Many(**values))
        )
    return out


def _matched(names: list[str], digests: list[str], keys: list[tuple[str, str]], path: str, remedy: str) -> list[int]:
    """Numbers of the datasets that results in a file are of."""
    at: dict[tuple[str, str], list[int]] = {}
    for i, key in enumerate(keys):
        at.setdefault(key, []).append(i)
    known, out = {name for name, _ in keys}, []
    for name, found in zip(names, digests, strict=True):
        same = at.get((name, found))
        if not same:
            if name in known:
                what = f"of other data in {name!r}: its response, columns, groups, weights, offset or contrasts differ"
            else:
                what = f"of the dataset {name!r}, which is not there now"
            raise DataError(f"{path!r} has results {what}; {remedy}")
        out.append(same.pop(0))
    return out


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ModuleNotFoundError(
            "results= writes Parquet files, which needs pyarrow: pip install 'glmmjax[parquet]'"
        ) from None
    return pyarrow, pyarrow.parquet


def from_all_processes(pieces: list[Piece], errors: dict[int, str]) -> tuple[list[Piece], dict[int, str]]:
    """Every process's pieces and errors, on every process."""
    import pickle

    from jax.experimental import multihost_utils

    own = np.frombuffer(pickle.dumps((pieces, errors)), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.array([own.size], np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: own.size] = own
    everyone = np.asarray(multihost_utils.process_allgather(padded)).reshape(sizes.size, -1)
    all_pieces: list[Piece] = []
    all_errors: dict[int, str] = {}
    for size, row in zip(sizes, everyone, strict=True):
        theirs, wrong = pickle.loads(row[:size].tobytes())
        all_pieces += theirs
        all_errors |= wrong
    return all_pieces, all_errors
