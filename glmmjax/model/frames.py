"""From a model frame to the arrays of a model that can be fitted: what the data cannot tell is said here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .._errors import DataError, warn
from ..compiling.memory import triangle
from .covariance import structure_of
from .design import Design, design_arrays

if TYPE_CHECKING:
    from ..families import Family
    from ..formula.model_data import ModelData

#: What the fixed effects leave of a response that they fit exactly, relative to it.
EXACT = 1e-13


def frame_design(frame: ModelData) -> Design:
    """The arrays of a model frame; trials times prior weights."""
    assert frame.y is not None
    weights = frame.weights
    if frame.trials is not None:
        weights = frame.trials if weights is None else weights * frame.trials
    terms = [(t.z, t.level, structure_of(t.label)) for t in frame.terms]
    names = [t.group for t in frame.terms]
    return design_arrays(frame.y, frame.X, terms, weights=weights, offset=frame.offset, names=names)


def make_design(frame: ModelData, family: Family) -> tuple[Design, list[str]]:
    """Design of a model frame, the response checked against the family; and notes for the user."""
    made = frame_design(frame)
    if frame.response_kind in ("binary", "cbind") and family.trials is False:
        what = "a two-level factor" if frame.response_kind == "binary" else "cbind(successes, failures)"
        raise DataError(f"response {frame.response_name} is {what}: use family='binomial', not {family.name!r}")
    notes = check_response(frame, made, family)
    n = made.n
    for term in frame.terms:
        q = len(term.levels) * len(term.names)
        if q > n:
            raise DataError(
                f"the term ({' + '.join(term.names)} | {term.group}) has {q} random effects for {n} rows: its "
                "covariance cannot be estimated; drop columns from it or use a factor with fewer levels"
            )
    return made, list(notes)


def check_response(frame: ModelData, made: Design, family: Family) -> list[str]:
    """Raise DataError for responses that the family cannot have; notes for the user."""
    weights = None if frame.weights is None and frame.trials is None else np.asarray(made.weights)
    return family.check_response(np.asarray(made.y), weights, frame.response_name, frame.row_index)


def make_linear_design(frame: ModelData) -> Design:
    """Design of a model frame whose residual variance can be told from the random effects."""
    if frame.response_kind in ("binary", "cbind"):
        what = "a two-level factor" if frame.response_kind == "binary" else "cbind(successes, failures)"
        raise DataError(f"response {frame.response_name} is {what}: use glmer with family='binomial'")
    made = frame_design(frame)
    n, p = made.n, made.p
    for term in frame.terms:
        m, k = len(term.levels), len(term.names)
        if m >= n:
            raise DataError(
                f"grouping factor {term.group!r} has {m} levels for {n} rows: its variance cannot be told from the "
                "residual variance; drop the term or use a factor with fewer levels"
            )
        if m * k >= n:
            raise DataError(
                f"the term ({' + '.join(term.names)} | {term.group}) has {m * k} random effects for {n} rows: its "
                "covariance cannot be told from the residual variance; drop columns from it or use a factor with "
                "fewer levels"
            )
    if n <= p:
        raise DataError(f"{p} fixed effects for {n} rows: nothing is left to estimate variances from; drop some")
    refuse_exact(made, np.asarray(made.y), frame)
    return made


def refuse_exact(made: Design, y: np.ndarray, frame: ModelData) -> None:
    """Raise DataError if the fixed effects leave nothing of a response (n,)."""
    X, offset, weights = (np.asarray(v) for v in (made.X, made.offset, made.weights))

    def weighted(rows: slice) -> np.ndarray:
        return np.sqrt(weights[rows, None]) * np.column_stack([X[rows], y[rows] - offset[rows]])

    last = np.abs(triangle(made.n, weighted)[:, -1])  # of y: along the columns of X, and what is left
    if last[-1] <= EXACT * np.linalg.norm(last):
        raise DataError(
            f"response {frame.response_name} is fitted exactly by the fixed effects (a constant response is): no "
            "variance is left to estimate"
        )


def rank_message(frame: ModelData, check: str) -> None:
    """Say that aliased columns were dropped, as `Control.check_rank` asks."""
    if not frame.dropped or check in ("message", "silent"):
        return
    text = f"the fixed-effects columns are linearly dependent; dropped {', '.join(frame.dropped)}"
    if check == "error":
        raise DataError(f"{text}: remove them from the formula")
    warn(text, UserWarning)


def split_message(frame: ModelData) -> None:
    """Say what a `||` has made of a factor, which lme4 keeps together."""
    if frame.split_columns:
        warn(frame.split_columns, UserWarning)
