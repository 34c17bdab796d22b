"""What `fit_many` fits: one model, to datasets that stand in stacks, from a table or from responses of one design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from .._errors import DataError
from ..compiling.digest import digest
from ..families import Family
from ..fit.control import Control
from ..fit.lanes import Generalised, Kind, Linear
from ..formula.columns import Table, pandas_frame, plain, rows_of
from ..formula.frame import build
from ..formula.parse import parse
from ..formula.syntax import quote_name
from ..model.frames import split_message
from ..objective.quadrature import check_nodes
from ..report.progress import progress
from .data import Splitter, Stack, stacks
from .responses import Responses, Shared, as_responses


@dataclass(frozen=True)
class Model:
    """What is fitted to every dataset."""

    formula: str
    family: Family
    nAGQ: int
    hessian: str
    REML: bool
    ddf: str | None
    control: Control
    dtype: str

    @property
    def linear(self) -> bool:
        return self.family.linear

    def kind(self, stack: Stack | Shared) -> Kind:
        """As the engine sees it."""
        terms = stack.template.terms
        if self.linear:
            return Linear(self.REML, terms, self.ddf is not None)
        if self.nAGQ > 1:
            check_nodes(self.nAGQ, [z.shape[-1] for z in stack.template.z])
        return Generalised(self.family, self.hessian, self.nAGQ, self.control.exact and self.nAGQ > 0)

    @cached_property
    def settings(self) -> dict[str, str]:
        """What results must agree in to be continued, data apart.

        Raises:
            DataError: nothing is to be known about a user's function.
        """
        from .. import __version__

        family = digest(self.family)
        if family is None:
            raise DataError(
                "results= cannot tell this family from another by what its functions use: leave results out, or let "
                "them use numbers and arrays only"
            )
        what = {
            "formula": self.formula,
            "family": str(self.family),
            "function of the family": family,
            "nAGQ": self.nAGQ,
            "hessian": self.hessian,
            "REML": self.REML if self.linear else None,
            "ddf": self.ddf if self.linear else None,
            "dtype": self.dtype,
            **{f"control {name}": getattr(self.control, name) for name in ("tol", "max_evaluations", "exact")},
            "version of glmmjax": __version__,
        }
        return {name: str(value) for name, value in what.items()}


class Source:
    """Datasets in stacks, with the names and the errors of all."""

    names: list[Any]
    errors: dict[int, str]
    stacks: Sequence[Stack | Shared]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Per dataset its name and the digest of its data, an empty one where it cannot be fitted."""
        out = [(str(name), "") for name in self.names]
        for stack in self.stacks:
            for i, found in zip(stack.ids, stack.digests(), strict=True):
                out[i] = out[i][0], found
        return out

    def model_arguments(self, i: int) -> tuple[str, Any, dict[str, Any]]:
        """Formula, data and arguments of dataset i for `glmer` or `lmer`."""
        raise NotImplementedError


class TableSource(Source):
    """A table's datasets."""

    def __init__(self, model: Model, data: Any, by: str, arguments: dict[str, Any]) -> None:
        self._splitter = Splitter(model.formula, pandas_frame(data), by, model.family, arguments)
        split = self._splitter.split(progress)
        self.names, self.errors = split.names, split.errors
        self.stacks = [stack for group in split.groups for stack in stacks(group, model.family)]
        self._formula = model.formula
        fitted = next((int(stack.ids[0]) for stack in self.stacks), None)
        if fitted is not None and any(bar.part for bar in parse(model.formula).bars):
            split_message(self._splitter.frame(fitted))

    def model_arguments(self, i: int) -> tuple[str, Any, dict[str, Any]]:
        return self._formula, *self._splitter.part(i)


class ResponsesSource(Source):
    """Responses of one design."""

    def __init__(self, model: Model, data: Any, y: Any, arguments: dict[str, Any]) -> None:
        parse(model.formula)
        formula = "~" + model.formula.partition("~")[2]  # a response of its own gives way to those of y
        index = Table(data).index
        responses = as_responses(y, index)
        arguments = {k: self._by_column(v, k, responses, index) for k, v in arguments.items()}
        self._formula, self._data, self._arguments = formula, data, arguments
        shared: dict[str, Any] = {k: None if _by_response(v, responses.B) else v for k, v in arguments.items()}
        frame = build(formula, data, require_response=False, **shared)
        if responses.n != frame.keep.size:
            other = " (its rows are responses: transpose it)" if responses.B == frame.keep.size else ""
            raise DataError(f"y has {responses.n} rows, the data have {frame.keep.size}{other}")
        if model.linear and frame.nobs <= frame.X.shape[1]:
            raise DataError(f"{frame.X.shape[1]} fixed effects for {frame.nobs} rows: drop some")
        own = {k: v for k, v in arguments.items() if _by_response(v, responses.B)}
        split_message(frame)
        self.names, self.errors = responses.names, {}
        self._responses = responses
        self.stacks = [Shared(frame, responses, own, model.family, self.errors)]

    @staticmethod
    def _by_column(value: Any, what: str, responses: Responses, index: pd.Index) -> Any:
        """Weights or offsets of each response as an array (n, B); tables by the names of rows and columns."""
        if not _by_response(value, responses.B):
            return value
        table = rows_of(value, index, what)
        if isinstance(table, pd.DataFrame) and responses.named and list(table.columns) != responses.names:
            if not table.columns.is_unique or set(table.columns) != set(responses.names):
                raise DataError(f"the columns of {what} are not those of y; name them alike, or pass .to_numpy()")
            table = table[responses.names]
        return plain(table, what).astype(np.float64)

    def model_arguments(self, i: int) -> tuple[str, Any, dict[str, Any]]:
        name = str(self.names[i])
        data = pandas_frame(self._data)
        name = f"y_{name}" if name in data or name.isdigit() else name
        data = data.assign(**{name: self._responses.block(np.array([i]))[0]})
        arguments = {k: v[:, i] if _by_response(v, self._responses.B) else v for k, v in self._arguments.items()}
        return f"{quote_name(name)} {self._formula}", data, arguments


def _by_response(value: Any, B: int) -> bool:
    return value is not None and not isinstance(value, (str, dict)) and np.ndim(value) == 2 and np.shape(value)[1] == B
