"""Memory and time of designs and fits with many rows or levels, each in a process of its own."""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from . import report
from .cases import INSTEVAL_FORMULA, insteval, nested
from .measure import (
    Record,
    Settings,
    Suite,
    child,
    emit,
    peak_mb,
    python,
    reset_peak,
    rss_mb,
    timing,
)


@dataclass(frozen=True)
class MemoryCase:
    """`fit` False builds the design only."""

    title: str
    formula: str
    load: Callable[[bool], pd.DataFrame]  # True: a small version
    fit: bool
    target: str


CASES = {
    "design_insteval": MemoryCase(
        "design of InstEval as a binary model, three crossed factors",
        INSTEVAL_FORMULA,
        lambda quick: insteval(),
        False,
        "under 1 s and 200 MB above the process with data and imports loaded",
    ),
    "nested_million": MemoryCase(
        "fit of a nested binary model, simulated: 10^6 rows, 10^5 levels in 10^4 (a tenth with --quick)",
        "y ~ x + (1 | a/b)",
        lambda quick: nested(1_000) if quick else nested(),
        True,
        "peak of the whole process under 4 GB",
    ),
}


def run(name: str, settings: Settings) -> list[Record]:
    case = CASES[name]
    command = python("benchmarks.memory", name, json.dumps(vars(settings)))
    records = child(command, settings.timeout, {"GLMMJAX_CACHE": "off"})
    return [{"case": name, "system": "glmmjax", "target": case.target, **record} for record in records]


def _worker(case: MemoryCase, settings: Settings) -> None:
    warnings.simplefilter("ignore")
    import glmmjax as gj

    data = case.load(settings.quick)
    gj.design("y ~ x + (1 | a/b)", nested(3, 3, 3))  # everything that is imported when first used
    gj.glmer  # noqa: B018
    exact = reset_peak()
    before = rss_mb()
    start = time.perf_counter()
    made = gj.design(case.formula, data)
    seconds = time.perf_counter() - start
    after = rss_mb("VmHWM") if exact else peak_mb()
    levels = "x".join(str(m) for m in made.n_levels)
    record: Record = {
        "variant": "design",
        "status": "ok",
        "rows": len(data),
        "levels": levels,
        "times": {"call": timing([seconds])},
        "memory": {"before": before, "peak": after, "above": after - before, "kept": rss_mb() - before},
        "peak_reset": exact,
    }
    emit(record)
    if not case.fit:
        return
    del made
    exact = reset_peak()
    before = rss_mb()
    start = time.perf_counter()
    m = gj.glmer(case.formula, data)
    first = time.perf_counter() - start
    record = {
        "variant": "fit",
        "status": "running",
        "rows": int(m.nobs),
        "levels": levels,
        "objective": float(m.objective),
        "converged": bool(m.converged),
        "message": m.fit_stats.message,
        "evaluations": int(m.fit_stats.evaluations),
        "hessian_evaluations": int(m.fit_stats.hessian_evaluations),
        "times": {"first": timing([first])},
        "memory": {"before": before, "peak": peak_mb(), "above": peak_mb() - before},
    }
    emit(record)
    start = time.perf_counter()
    m = gj.glmer(case.formula, data)
    record["times"]["call"] = timing([time.perf_counter() - start])
    y = m.getME("y")
    start = time.perf_counter()
    m.refit(y)
    record["times"]["refit"] = timing([time.perf_counter() - start])
    record["memory"].update(peak=peak_mb(), above=peak_mb() - before)
    emit({**record, "status": "ok"})


SUITE = Suite("memory", "Memory of large designs", tuple(CASES), run, report.memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("settings")
    given = parser.parse_args()
    _worker(CASES[given.case], Settings(**json.loads(given.settings)))
