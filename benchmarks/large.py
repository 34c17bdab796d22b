"""Single large fits: time and peak memory of whole processes, against glmm; each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

from . import report
from .cases import binary_slopes, slopes
from .measure import Record, Settings, Suite, child, emit, peak_mb, python, rss_mb, timing

#: lme4 takes minutes to hours here: bobyqa's hundreds of evaluations of this model, without gradients
WITHOUT_LME4 = "hundreds of evaluations of seconds each"


@dataclass(frozen=True)
class LargeCase:
    """A model of n rows and m groups."""

    title: str
    formula: str
    n: int
    m: int
    linear: bool = False
    peer: bool = True  # whether glmm is run too


CASES = {
    "slope_million": LargeCase("logistic, correlated random intercept and slope", "y ~ x + (x | g)", 10**6, 10**4),
    "slope_ten_million": LargeCase(
        "logistic, correlated random intercept and slope", "y ~ x + (x | g)", 10**7, 10**5, peer=False
    ),
    "linear_ten_million": LargeCase(
        "linear, REML, correlated random intercept and slope", "y ~ x + (x | g)", 10**7, 10**5, True, False
    ),
}


def run(name: str, settings: Settings) -> list[Record]:
    """Without any program, with all of them from the cache of the run before, and the peer."""
    case = CASES[name]
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as cache:
        for variant in ("compiling", "programs cached"):
            command = python("benchmarks.large", name, "glmmjax", variant)
            records += child(command, settings.timeout, {"GLMMJAX_CACHE": cache})
    if case.peer:
        if importlib.util.find_spec("glmm") is None:
            records.append({"system": "glmm", "status": "skipped", "message": "glmm is not installed"})
        else:
            found = child(python("benchmarks.large", name, "glmm", ""), settings.timeout)
            records += [{"system": "glmm", **record} for record in found]
        records.append({"system": "lme4", "status": "skipped", "message": WITHOUT_LME4})
    return [{"case": name, "variant": "", "system": "glmmjax", **record} for record in records]


def _worker(case: LargeCase, system: str, variant: str) -> None:
    warnings.simplefilter("ignore")
    data = slopes(case.m, case.n) if case.linear else binary_slopes(case.m, case.n)
    before = rss_mb()
    start = time.perf_counter()
    if system == "glmm":
        import glmm

        def fit() -> Any:
            return glmm.fit(data, case.formula, reml=True) if case.linear else glmm.fit(data, case.formula, "binomial")

        def read(m: Any) -> Record:
            return {"objective": -2.0 * float(m.loglik), "converged": bool(m.converged), "evaluations": int(m.n_eval)}
    else:
        import glmmjax as gj

        def fit() -> Any:
            return gj.lmer(case.formula, data) if case.linear else gj.glmer(case.formula, data, "binomial")

        def read(m: Any) -> Record:
            stats = m.fit_stats
            return {
                "objective": float(m.objective),
                "converged": bool(m.converged),
                "evaluations": int(stats.evaluations),
                "hessian_evaluations": int(stats.hessian_evaluations),
            }

    imported = time.perf_counter() - start
    start = time.perf_counter()
    m = fit()
    first = time.perf_counter() - start
    record: Record = {
        "variant": variant,
        "status": "running",
        "rows": case.n,
        "levels": f"{case.m:,}",
        **read(m),
        "times": {"import": timing([imported]), "first": timing([first])},
        "memory": {"before": before, "peak": peak_mb(), "above": peak_mb() - before},
    }
    emit(record)
    del m  # the peak is that of one fit
    start, busy = time.perf_counter(), time.process_time()
    fit()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    record["times"]["call"] = {**timing([seconds]), "cores_used": busy / seconds}
    emit({**record, "status": "ok"})


SUITE = Suite(
    "large", "Large single fits", tuple(CASES), run, report.large, ("slope_ten_million", "linear_ten_million")
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("system")
    parser.add_argument("variant")
    given = parser.parse_args()
    _worker(CASES[given.case], given.system, given.variant)
