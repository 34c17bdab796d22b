"""Errors a user can cause, each one clear sentence with the remedy, and warnings."""

from __future__ import annotations

import inspect
import warnings

import numpy as np

#: Sizes of numbers whose products with their likes stay within floating point.
SMALLEST, LARGEST = 1e-100, 1e100


class FormulaError(ValueError):
    """The formula cannot be parsed or does not describe a mixed model."""


class DataError(ValueError):
    """The data do not suit the model: the message names the column, what was found and what to do."""


class NotSupportedError(NotImplementedError):
    """A question this fit cannot answer, with the reason."""


class ConvergenceWarning(UserWarning):
    """The fit did not converge, is singular, or its coefficients run off."""


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the first caller outside this package, whichever of its functions was called."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == __package__:
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def check_scale(values: np.ndarray, what: str) -> None:
    """Raise `DataError` for a column of (n,) or (n, k) whose squares would over- or underflow."""
    if not values.size or values.dtype.kind != "f":  # integers end at 2^64
        return
    sizes = np.atleast_1d(np.maximum(values.max(axis=0), -values.min(axis=0)))
    bad = (sizes > LARGEST) | ((sizes < SMALLEST) & (sizes > 0.0))
    if bad.any():
        raise DataError(
            f"{what} has numbers of size {sizes[bad][0]:.0e}, whose squares leave the range of floating point: give it "
            "in other units"
        )
