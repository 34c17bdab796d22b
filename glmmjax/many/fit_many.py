"""`fit_many`: one model on many datasets, or on many responses of one design."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import DataError
from ..compiling.devices import devices_of
from ..compiling.digest import digest
from ..compiling.entry import entry
from ..compiling.precision import x64
from ..families import Family
from ..families import get as get_family
from ..fit import optimise as opt
from ..fit.batch import Many, fit_block
from ..fit.control import Control, as_control, unknown_argument
from ..fit.lanes import Engine, Generalised, Kind, Linear, cores
from ..formula.columns import Table, pandas_frame, plain, rows_of
from ..formula.frame import build
from ..formula.parse import parse
from ..formula.syntax import quote_name
from ..model.covariance import natural_of, numbered, structure_of
from ..model.frames import split_message
from ..objective.laplace import resolve_hessian
from ..objective.quadrature import check_nodes
from ..report.progress import counter, progress
from .data import Labels, Splitter, Stack, stacks
from .responses import Responses, Shared, as_responses

if TYPE_CHECKING:
    from ..formula.parse import Formula
    from ..results import MixedModel

CONVERGED, NOT_CONVERGED, SEPARATED, ERROR, NOT_RUN = "converged", "not converged", "separated", "error", "not run"
ADJUSTMENTS = ("BH", "bonferroni", "holm", "none")
#: Seconds between two savings of partial results.
SAVE_EVERY = 30.0


@dataclass(frozen=True)
class Piece:
    """Fits with the same columns: datasets `ids`, their numbers of rows, and whether coefficients run off."""

    labels: Labels
    ids: np.ndarray
    rows: np.ndarray
    separated: np.ndarray
    fits: Many


@checked("by")
def fit_many(
    formula: str | Formula,
    data: Any,
    family: str | Family = "gaussian",
    by: str | None = None,
    y: Any = None,
    nAGQ: int = 1,
    REML: bool = True,
    weights: Any = None,
    offset: Any = None,
    hessian: str | None = None,
    control: Control | dict[str, Any] | None = None,
    contrasts: dict[str, Any] | None = None,
    na: str = "drop",
    ddf: str | None = "satterthwaite",
    adjust: str = "BH",
    results: str | os.PathLike[str] | None = None,
    device: Any = None,
    dtype: str = "float64",
    workers: int | None = None,
    **unknown: Any,
) -> ManyFits:
    """Fit one model to every dataset of a table, or to every response of one design.

    Datasets are padded to few shapes and fitted together by programs that are compiled once per shape; the numbers
    are those of `glmer` and `lmer`. A dataset that cannot be fitted is reported and harms no other.

    Args:
        formula: as `glmer`. With `y` it needs no response, ``"~ x + (1 | g)"``; one that it has is not used.
        data: table of all datasets one below the other (with `by`), or of the design (with `y`).
        family: "gaussian" (as `lmer`), or any family of `glmer`.
        by: column that names each row's dataset.
        y: responses in columns, (n, B): array, DataFrame, or SciPy sparse matrix, which is made dense block by
            block. A missing value drops its row from that response's fit.
        nAGQ, weights, offset, hessian, control, contrasts, na: as `glmer`. With `y`, `weights` and `offset` may be
            (n, B) arrays.
        REML: of gaussian models.
        ddf: "satterthwaite" degrees of freedom for the p-values of gaussian models, or None for no p-values.
        adjust: p_adjusted over the datasets, term by term: "BH" (Benjamini & Hochberg 1995), "holm", "bonferroni"
            or "none".
        results: Parquet file in which partial results are kept; datasets found there are not fitted again. Further
            datasets may have come; a file of another model, of other data under the same name, weights and offsets
            included, or of datasets that are gone is refused.
        device: "cpu", "gpu", "tpu", a JAX device or a list of them; None for all devices of JAX's default kind.
            Datasets are spread over several devices, and over the processes of ``jax.distributed``.
        dtype: "float64", or "float32": half the memory, estimates good to 1e-4 standard errors and these to 5e-3
            (60 small datasets per family were within 3e-5 and 2e-3), no use for data that need more digits.
        workers: threads that feed a CPU; default one per core.

    Returns:
        `ManyFits`; its `frame` is the table of coefficients.

    Raises:
        FormulaError, DataError: what is wrong with all datasets. TypeError: unknown arguments.

    Interrupted from the keyboard it returns the fits made so far, the others marked "not run".
    """
    for name in unknown:
        import inspect

        raise unknown_argument(name, [p for p in inspect.signature(fit_many).parameters if p != "unknown"], "fit_many")
    if (by is None) == (y is None):
        raise ValueError("give either by=, the column that names each row's dataset, or y=, responses in columns")
    if adjust not in ADJUSTMENTS:
        raise ValueError(f"adjust must be one of {', '.join(map(repr, ADJUSTMENTS))}, got {adjust!r}")
    if ddf not in (None, "satterthwaite"):
        raise ValueError(f"ddf must be 'satterthwaite' or None, got {ddf!r}")
    if dtype not in ("float64", "float32"):
        raise ValueError(f"dtype must be 'float64' or 'float32', got {dtype!r}")
    family, control = get_family(family), as_control(control)
    if isinstance(nAGQ, bool) or not isinstance(nAGQ, (int, np.integer)) or nAGQ < 0:
        raise ValueError(f"nAGQ must be a non-negative integer, got {nAGQ!r}")
    _refuse_unused(control, family.linear)
    model = _Model(str(formula), family, int(nAGQ), resolve_hessian(hessian, family), REML, ddf, control, dtype)
    arguments = {"weights": weights, "offset": offset, "contrasts": contrasts, "na": na}
    source: _Source = _Rows(model, data, by, arguments) if by is not None else _Columns(model, data, y, arguments)
    return _run(model, source, devices_of(device), workers, None if results is None else Path(results), adjust)


def _refuse_unused(control: Control, linear: bool) -> None:
    """Raise ValueError for settings that many fits have no use for: none is accepted that does nothing."""
    used = ("auto",) if linear else ("auto", "bfgs")
    if control.optimizer not in used:
        raise ValueError(
            f"control: fit_many has one optimizer per kind of model, got {control.optimizer!r}; leave it at 'auto', or "
            "fit single data sets by glmer or lmer"
        )
    for name in ("check_grad", "check_singular", "check_rank"):
        if getattr(control, name) == "error":
            raise ValueError(
                f"control: {name}='error' is for single fits; fit_many reports every fit in the columns status, "
                "message and singular of .fits"
            )


@dataclass(frozen=True)
class _Model:
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


class _Source:
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


class _Rows(_Source):
    """A table's datasets."""

    def __init__(self, model: _Model, data: Any, by: str, arguments: dict[str, Any]) -> None:
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


class _Columns(_Source):
    """Responses of one design."""

    def __init__(self, model: _Model, data: Any, y: Any, arguments: dict[str, Any]) -> None:
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


def _run(
    model: _Model,
    source: _Source,
    devices: list[Any],
    workers: int | None,
    path: Path | None,
    adjust: str,
) -> ManyFits:
    """Fit every block of every stack, this process's share of them."""
    if workers is None:
        on_one_cpu = len(devices) == 1 and devices[0].platform == "cpu"
        workers = cores() if on_one_cpu else 1
    keys = [] if path is None else source.keys
    pieces = [] if path is None else load_pieces(path, model.settings, keys)
    done = np.concatenate([p.ids for p in pieces]) if pieces else np.zeros(0, int)
    rank, processes = jax.process_index(), jax.process_count()
    started, saved = time.perf_counter(), time.perf_counter()
    limits = opt.Limits(model.control.tol, model.control.max_evaluations, True)
    if model.dtype == "float32":
        limits = limits._replace(tol=max(model.control.tol, 1e-6))
    todo = [np.flatnonzero(~np.isin(stack.ids, done)) for stack in source.stacks]
    total = sum(t.size for t in todo)
    interrupted = False
    with ThreadPoolExecutor(workers) as pool:
        futures: list[Future[Piece]] = []
        for stack, members in zip(source.stacks, todo, strict=True):
            if not members.size:
                continue
            engine = Engine(model.kind(stack), stack.n, members.size // processes + 1, devices, workers)
            starts = range(0, members.size, engine.block)
            for k, a in enumerate(starts):
                if k % processes == rank:
                    futures.append(pool.submit(_fit, model, stack, engine, members[a : a + engine.block], limits))
        try:
            with counter("fits", total if processes == 1 else None) as count:
                for future in as_completed(futures):
                    pieces.append(future.result())
                    count(pieces[-1].ids.size)
                    if path is not None and time.perf_counter() - saved > SAVE_EVERY:
                        save_pieces(pieces, path, model.settings, keys)
                        saved = time.perf_counter()
        except KeyboardInterrupt:
            interrupted = True
            for future in futures:
                future.cancel()
    if interrupted:
        warnings.warn("interrupted: the fits made so far are kept, the others are 'not run'", UserWarning, stacklevel=3)
    errors = source.errors
    if processes > 1:
        pieces, errors = _from_all_processes(pieces, errors)
    if path is not None and rank == 0:
        save_pieces(pieces, path, model.settings, keys)
    return ManyFits(model, source, pieces, errors, adjust, time.perf_counter() - started)


@entry
def _fit(model: _Model, stack: Stack | Shared, engine: Engine, members: np.ndarray, limits: opt.Limits) -> Piece:
    """One block."""
    padded = np.concatenate([members, np.full(engine.block - members.size, members[-1])])
    design = stack.block(padded)
    if model.dtype == "float32":
        design = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, design)
    with x64(model.dtype == "float64"):
        fits = fit_block(engine, design, stack.own, members.size, limits)
    rows = (np.asarray(design.weights) > 0.0).sum(-1) * np.ones(engine.block, int)
    return Piece(stack.labels, stack.ids[members], rows[: members.size], fits.separated, fits)


# -------------------- results
@checked("name")  # which may be of any type
class ManyFits:
    """Fits of one model to many datasets, as returned by `fit_many`.

    Attributes:
        names: of the datasets. elapsed: seconds that the fits took, compilation included.
        frame: one row per dataset and fixed effect. fits: one row per dataset.
    """

    def __init__(
        self,
        model: _Model,
        source: _Source,
        pieces: list[Piece],
        errors: dict[int, str],
        adjust: str,
        elapsed: float,
    ) -> None:
        self._model, self._source, self._adjust = model, source, adjust
        self._pieces = sorted(pieces, key=lambda p: int(p.ids[0]))
        self._errors, self.elapsed = errors, elapsed
        self.names = source.names

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fits(self) -> pd.DataFrame:
        """One row per dataset, indexed by its name.

        status ("converged", "not converged", "separated", "error", "not run") and message, singular, nobs, logLik
        (of REML fits minus half the criterion), evaluations (of deviance and gradient), decrement (expected further
        decrease of the deviance), sigma and dispersions, standard deviations and correlations of the random effects
        (NaN where a dataset has no such parameter).
        """
        B = len(self)
        status = np.full(B, NOT_RUN, object)
        message = np.full(B, "", object)
        columns: dict[str, np.ndarray] = {}

        def put(name: str, ids: np.ndarray, values: np.ndarray) -> None:
            columns.setdefault(name, np.full(B, np.nan))[ids] = values

        singular = np.zeros(B, bool)
        for name in ("nobs", "logLik", "evaluations", "decrement"):
            columns[name] = np.full(B, np.nan)
        for piece in self._pieces:
            ids, fits = piece.ids, piece.fits
            status[ids] = np.where(fits.converged, CONVERGED, NOT_CONVERGED)
            for i in np.flatnonzero(~fits.converged):
                message[ids[i]] = opt.MESSAGES[int(fits.status[i])]
            flat = fits.flat & ~fits.singular & fits.converged
            message[ids[flat]] = "the data do not determine all parameters"
            limit = np.isinf(fits.phi).any(axis=1) & fits.converged & ~flat
            message[ids[limit]] = f"no overdispersion: the {self._model.family.limit} limit"
            status[ids[piece.separated]] = SEPARATED
            for i in np.flatnonzero(piece.separated):
                off = [n for n, v in zip(piece.labels.x, np.diag(fits.vcov[i]), strict=True) if np.isinf(v)]
                message[ids[i]] = f"the response is separated: {', '.join(off)} run{'' if len(off) > 1 else 's'} off"
            singular[ids] = fits.singular
            put("nobs", ids, piece.rows)
            put("logLik", ids, -0.5 * fits.objective)
            put("evaluations", ids, fits.evaluations)
            put("decrement", ids, fits.decrement)
            if self._model.linear:
                put("sigma", ids, fits.sigma)
            for j, name in enumerate(self._model.family.phi_names):
                put(name, ids, fits.phi[:, j])
            for name, values in standard_deviations(piece.labels, fits):
                put(name, ids, values)
        for number, text in self._errors.items():
            status[number], message[number], singular[number] = ERROR, text, False
            for values in columns.values():
                values[number] = np.nan
        out = pd.DataFrame({"status": status, "message": message, "singular": singular, **columns})
        for name in ("nobs", "evaluations"):
            out[name] = out[name].astype("Int64")
        out.index = pd.Index(self.names, name="dataset")
        return out

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per dataset and fixed effect.

        dataset, term, estimate, std_error, statistic, df (of gaussian models), p_value, p_adjusted (over the datasets
        whose fit converged, term by term), then the columns of `fits`.
        """
        linear = self._model.linear
        parts = []
        for piece in self._pieces:
            fits, p = piece.fits, len(piece.labels.x)
            good = np.array([int(i) not in self._errors for i in piece.ids])
            with np.errstate(invalid="ignore", divide="ignore"):
                se = np.sqrt(np.diagonal(fits.vcov, axis1=1, axis2=2))
                statistic = fits.beta / se
            parts.append(
                pd.DataFrame(
                    {
                        "id": np.repeat(piece.ids[good], p),
                        "term": np.tile(np.array(piece.labels.x, object), int(good.sum())),
                        "estimate": fits.beta[good].reshape(-1),
                        "std_error": se[good].reshape(-1),
                        "statistic": statistic[good].reshape(-1),
                        "df": fits.df[good].reshape(-1),
                    }
                )
            )
        columns = ["id", "term", "estimate", "std_error", "statistic", "df"]
        out = pd.concat(parts) if parts else pd.DataFrame({c: [] for c in columns})
        out = out.sort_values("id", kind="stable", ignore_index=True)
        out["p_value"] = p_values(out["statistic"].to_numpy(float), out["df"].to_numpy(float), linear)
        table = self.fits
        ids = out.pop("id").to_numpy(int)
        usable = (table["status"] == CONVERGED).to_numpy()[ids]
        p_value, p_adjusted = out["p_value"].to_numpy(float), np.full(len(out), np.nan)
        for rows in out.groupby("term", sort=False).indices.values():
            mine = rows[usable[rows]]
            p_adjusted[mine] = adjusted(p_value[mine], self._adjust)
        out["p_adjusted"] = p_adjusted
        if not linear:
            out = out.drop(columns="df")
        rest = table.iloc[ids].reset_index()
        out.insert(0, "dataset", rest.pop("dataset"))
        return pd.concat([out, rest], axis=1)

    def _table(self, values: str) -> pd.DataFrame:
        return self.frame.pivot(index="dataset", columns="term", values=values).reindex(
            index=self.names, columns=list(dict.fromkeys(self.frame["term"]))
        )

    @cached_property
    def coef(self) -> pd.DataFrame:
        """Fixed effects, one row per dataset."""
        return self._table("estimate")

    @cached_property
    def std_error(self) -> pd.DataFrame:
        """Their standard errors."""
        return self._table("std_error")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """NumPy arrays over the datasets, NaN where there is no fit.

        theta (B, n_theta), beta (B, p), vcov (B, p, p) of beta, phi (B, n_phi), sigma (B,), objective (B,).

        Raises:
            DataError: the datasets do not all have the same columns.
        """
        shapes = {(piece.labels.x, piece.labels.terms) for piece in self._pieces}
        if len(shapes) > 1:
            raise DataError(f"the datasets have {len(shapes)} different sets of columns; use frame, coef and fits")
        out: dict[str, np.ndarray] = {}
        for piece in self._pieces:
            for name in ("theta", "beta", "vcov", "phi", "sigma", "objective"):
                values = getattr(piece.fits, name)
                out.setdefault(name, np.full((len(self), *values.shape[1:]), np.nan))[piece.ids] = values
        for i in self._errors:
            for values in out.values():
                values[i] = np.nan
        return out

    @property
    def failed(self) -> pd.DataFrame:
        """Datasets without a converged fit: status and message."""
        fits = self.fits
        return fits.loc[fits["status"] != CONVERGED, ["status", "message"]]

    def fit(self, name: Any) -> MixedModel:
        """The fit of one dataset as a full model; it is made anew, from the estimates.

        Args:
            name: of the dataset.
        """
        from .._glmer import glmer
        from .._lmer import lmer

        try:
            i = self.names.index(name)
        except ValueError:
            raise KeyError(f"no dataset {name!r}; the first are {', '.join(map(repr, self.names[:5]))}") from None
        formula, data, arguments = self._source.model_arguments(i)
        model = self._model
        start: dict[str, Any] | None = None
        for piece in self._pieces:
            at = np.flatnonzero(piece.ids == i)
            if at.size and i not in self._errors and piece.fits.converged[at[0]]:
                start = {"theta": piece.fits.theta[at[0]]}
                if not model.linear:
                    start |= {"beta": piece.fits.beta[at[0]], "phi": piece.fits.phi[at[0]]}
        if model.linear:
            return lmer(formula, data, model.REML, start=start, control=model.control, **arguments)
        settings: dict[str, Any] = {"nAGQ": model.nAGQ, "hessian": model.hessian, "control": model.control}
        return glmer(formula, data, model.family, start=start, **settings, **arguments)

    def summary(self) -> pd.DataFrame:
        """Quantiles of the estimates over the datasets that converged, and how many are significant at 0.05."""
        good = self.frame[self.frame["status"] == CONVERGED]
        rows = {}
        for term in dict.fromkeys(good["term"]):
            own = good[good["term"] == term]
            quantiles = own["estimate"].quantile([0.0, 0.25, 0.5, 0.75, 1.0])
            rows[term] = [
                len(own),
                *quantiles,
                own["std_error"].median(),
                int((own["p_value"] < 0.05).sum()),
                int((own["p_adjusted"] < 0.05).sum()),
            ]
        names = ["fits", "min", "25 %", "median", "75 %", "max", "median std_error", "p < .05", "p_adjusted < .05"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=names)

    def _head(self) -> list[str]:
        fits, model = self.fits, self._model
        what = f"lmer ({'REML' if model.REML else 'ML'})" if model.linear else f"glmer ({model.family})"
        lines = [f"{len(self):,} fits of {model.formula}, {what}, in {self.elapsed:.3g} s"]
        counts = fits["status"].value_counts()
        lines.append(", ".join(f"{n:,} {status}" for status, n in counts.items()))
        if fits["singular"].any():
            lines.append(f"{int(fits['singular'].sum()):,} singular")
        return lines

    def __str__(self) -> str:
        lines = self._head()
        lines.append(self.summary().to_string(float_format=lambda v: f"{v:.4g}"))
        failed = self.failed
        for name, row in failed.head(3).iterrows():
            lines.append(f"  {name}: {row['status']}: {row['message']}")
        if len(failed) > 3:
            lines.append(f"  ... and {len(failed) - 3:,} more in .failed")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(f"<p>{line}</p>" for line in self._head()) + self.summary().to_html(float_format="{:.4g}".format)


def standard_deviations(labels: Labels, fits: Many) -> list[tuple[str, np.ndarray]]:
    """Standard deviations and correlations (B,) of the random effects under lme4's names."""
    structures, groups = [structure_of(label) for label in labels.terms], numbered(label[0] for label in labels.terms)
    names: list[str] = []
    for structure, label, group in zip(structures, labels.terms, groups, strict=True):
        names += structure.natural_names(group, label[1])
    return list(zip(names, natural_of(fits.theta, fits.sigma, structures).T, strict=True))


def p_values(statistic: np.ndarray, df: np.ndarray, linear: bool) -> np.ndarray:
    """Two-sided, of t with `df` degrees of freedom or normal."""
    from scipy.special import ndtr, stdtr

    tail = stdtr(df, -np.abs(statistic)) if linear else ndtr(-np.abs(statistic))
    return np.asarray(2.0 * tail)


def adjusted(p: np.ndarray, method: str) -> np.ndarray:
    """p-values adjusted for their number, NaN kept.

    "BH" is Benjamini & Hochberg 1995, J. R. Stat. Soc. B 57; "holm" Holm 1979, Scand. J. Stat. 6.
    """
    out = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    m = known.size
    if not m or method == "none":
        out[known] = p[known]
        return out
    if method == "bonferroni":
        out[known] = np.minimum(m * p[known], 1.0)
        return out
    order = known[np.argsort(p[known], kind="stable")]
    rank = np.arange(1, m + 1)
    if method == "BH":
        out[order] = np.minimum.accumulate((p[order] * m / rank)[::-1])[::-1]
    else:
        out[order] = np.maximum.accumulate(p[order] * (m + 1 - rank))
    out[known] = np.minimum(out[known], 1.0)
    return out


# -------------------- partial results
def save_pieces(pieces: list[Piece], path: Path, settings: dict[str, str], keys: list[tuple[str, str]]) -> None:
    """Write fits to a Parquet file, whole or not at all.

    Args:
        settings: as `_Model.settings`. keys: as `_Source.keys`.
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


def _from_all_processes(pieces: list[Piece], errors: dict[int, str]) -> tuple[list[Piece], dict[int, str]]:
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
