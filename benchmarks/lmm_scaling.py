"""Time of one evaluation of a linear model's criterion as rows are added and the random effects stay the same."""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from . import report
from .cases import crossed, slopes
from .measure import Record, Settings, Suite, child, emit, peak_mb, python, repeat

SIZES = (10_000, 100_000, 1_000_000)
TARGET = 1.5
#: Seconds of one reading of the clock: single evaluations are too short for it.
BATCH = 0.02


@dataclass(frozen=True)
class ScalingCase:
    title: str
    formula: str
    load: Callable[[int], pd.DataFrame]  # of a number of rows


CASES = {
    "scaling_slopes": ScalingCase(
        "correlated random slopes of 1,000 levels",
        "y ~ x + (x | g)",
        lambda n: slopes(1_000, n),
    ),
    "scaling_crossed": ScalingCase(
        "1,000 levels crossed with 50, the same 10,000 cells observed at each size",
        "y ~ x + (1 | a) + (1 | b)",
        crossed,
    ),
}


def run(name: str, settings: Settings) -> list[Record]:
    """A process per number of rows; without the largest if quick."""
    records: list[Record] = []
    for n in SIZES[:-1] if settings.quick else SIZES:
        command = python("benchmarks.lmm_scaling", name, json.dumps(vars(settings)), str(n))
        found = child(command, settings.timeout, {"GLMMJAX_CACHE": "off", "JAX_ENABLE_X64": "0"})
        records += [{"case": name, "system": "glmmjax", "target": TARGET, **r, "variant": f"n = {n:,}"} for r in found]
    base = records[0].get("times", {}).get("evaluation")
    for record in records:
        if base and "evaluation" in record.get("times", {}):
            own = record["times"]["evaluation"]
            record["ratio"] = own["median"] / base["median"]
            record["ratio_of_least"] = own["min"] / base["min"]  # other load of the machine moves it less
    return records


def _per_call(call: Callable[[], Any], settings: Settings) -> dict[str, float]:
    """Seconds of one of many calls in a row, as `measure.repeat`."""
    call()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    count = max(1, round(BATCH / statistics.median(seconds)))

    def batch() -> None:
        for _ in range(count):
            call()

    found = repeat(batch, settings)
    return {**found, **{k: found[k] / count for k in ("median", "min", "max")}, "calls": count}


def _worker(case: ScalingCase, settings: Settings, n: int) -> None:
    """Time refits, the cross-products, and evaluations of criterion and gradient on cross-products."""
    warnings.simplefilter("ignore")
    import jax

    import glmmjax as gj
    from glmmjax.compiling.precision import x64
    from glmmjax.fit.lmm import LinearProblem

    data = case.load(n)
    m = gj.lmer(case.formula, data)  # compiles
    problem = m._problem
    assert isinstance(problem, LinearProblem)
    record: Record = {
        "variant": "",
        "status": "running",
        "rows": int(m.nobs),
        "levels": "x".join(str(k) for k in m._design.n_levels),
        "objective": float(m.objective),
        "converged": bool(m.converged),
        "message": "" if m.converged else m.fit_stats.message,
        "evaluations": int(m.fit_stats.evaluations),
        "times": {},
    }
    y = m.getME("y")
    with x64():

        def form() -> Any:
            return jax.block_until_ready(problem.with_rows("y", y).cross)  # a new problem: the old one keeps them

        form()
        record["times"]["cross"] = repeat(form, settings)
        begin = problem.start({})
        jax.block_until_ready(problem.cross)

        def evaluate() -> Any:
            return jax.block_until_ready(problem.evaluate(begin.x, begin.carry, 0.0))

        record["times"]["evaluation"] = _per_call(evaluate, settings)
    m.refit(y)
    record["times"]["refit"] = repeat(lambda: m.refit(y), settings)
    record["memory"] = {"peak": peak_mb()}
    emit({**record, "status": "ok"})


SUITE = Suite(
    "lmm_scaling",
    "One evaluation of a linear mixed model by number of rows",
    tuple(CASES),
    run,
    report.scaling,
    ("scaling_crossed",),
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("settings")
    parser.add_argument("rows", type=int)
    given = parser.parse_args()
    _worker(CASES[given.case], Settings(**json.loads(given.settings)), given.rows)
