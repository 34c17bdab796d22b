"""`fit_many`: one model on many datasets, or on many responses of one design."""

from __future__ import annotations

import os
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ._arguments import checked
from ._glmer import glmer
from ._lmer import lmer
from .compiling.devices import devices_of
from .compiling.entry import entry
from .compiling.precision import x64
from .families import Family
from .families import get as get_family
from .fit import optimise as opt
from .fit.batch import fit_block
from .fit.control import Control, as_control, unknown_argument
from .fit.lanes import Engine, cores
from .many.data import Stack
from .many.multiple import ADJUSTMENTS
from .many.partial import Piece, from_all_processes, load_pieces, save_pieces
from .many.responses import Shared
from .many.results import ManyFits
from .many.sources import Model, ResponsesSource, Source, TableSource
from .objective.laplace import resolve_hessian
from .report.progress import counter

if TYPE_CHECKING:
    from .formula.parse import Formula
    from .results import MixedModel

#: Seconds between two savings of partial results.
SAVE_EVERY = 30.0


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
    model = Model(str(formula), family, int(nAGQ), resolve_hessian(hessian, family), REML, ddf, control, dtype)
    arguments = {"weights": weights, "offset": offset, "contrasts": contrasts, "na": na}
    source: Source
    source = ResponsesSource(model, data, y, arguments) if by is None else TableSource(model, data, by, arguments)
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


def _run(
    model: Model, source: Source, devices: list[Any], workers: int | None, path: Path | None, adjust: str
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
        pieces, errors = from_all_processes(pieces, errors)
    if path is not None and rank == 0:
        save_pieces(pieces, path, model.settings, keys)
    return ManyFits(model, source, pieces, errors, adjust, time.perf_counter() - started, _single)


def _single(model: Model, formula: str, data: Any, start: Any, arguments: dict[str, Any]) -> MixedModel:
    """One dataset as a full model."""
    if model.linear:
        return lmer(formula, data, model.REML, start=start, control=model.control, **arguments)
    settings: dict[str, Any] = {"nAGQ": model.nAGQ, "hessian": model.hessian, "control": model.control}
    return glmer(formula, data, model.family, start=start, **settings, **arguments)


@entry
def _fit(model: Model, stack: Stack | Shared, engine: Engine, members: np.ndarray, limits: opt.Limits) -> Piece:
    """One block."""
    padded = np.concatenate([members, np.full(engine.block - members.size, members[-1])])
    design = stack.block(padded)
    if model.dtype == "float32":
        design = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, design)
    with x64(model.dtype == "float64"):
        fits = fit_block(engine, design, stack.own, members.size, limits)
    rows = (np.asarray(design.weights) > 0.0).sum(-1) * np.ones(engine.block, int)
    return Piece(stack.labels, stack.ids[members], rows[: members.size], fits.separated, fits)
