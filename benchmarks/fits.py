"""One model in all systems: a process each for glmmjax and the peers, one after the other, on the same data."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from typing import TYPE_CHECKING

from .cases import FITS, Case
from .measure import Record, Settings, child, emit, peak_mb, pin_to_one_core, python, repeat, rss_mb, timing

if TYPE_CHECKING:
    import glmmjax as gj


def compared(name: str, records: list[Record]) -> list[Record]:
    """The records of one case, each with how far its objective is above the lowest."""
    finished = [r["objective"] for r in records if r.get("objective") is not None]
    for record in records:
        record["case"] = name
        if record.get("objective") is not None:
            record["above_best"] = record["objective"] - min(finished)
    return records


def ours(case: Case, settings: Settings) -> list[Record]:
    """glmmjax: without a cache; the first fit again in a new process with one; and on one core."""

    def process(variant: str, cache: str, *options: str) -> list[Record]:
        command = python("benchmarks.fits", case.name, json.dumps(vars(settings)), variant, *options)
        found = child(command, settings.timeout, {"GLMMJAX_CACHE": cache, "JAX_ENABLE_X64": "0"})
        return [{"system": "glmmjax", **record} for record in found]

    records = process("default", "off")
    if settings.quick or records[0]["status"] != "ok":
        return records
    with tempfile.TemporaryDirectory() as cache:
        process("fill", cache, "--first-only")
        again = process("cached", cache, "--first-only")[0]
        if again["status"] == "ok":
            records[0]["times"]["first_cached"] = again["times"]["first"]
            records[0]["times"]["import_cached"] = again["times"]["import"]
        records += process("one core", cache, "--one-core")
    for record in records[1:]:
        record.get("times", {}).pop("first", None)  # from the cache: reported above
    return records


def _worker(case: Case, settings: Settings, variant: str, first_only: bool) -> None:
    """Time a first fit, warm whole calls, and warm refits, each to estimates and standard errors."""
    start = time.perf_counter()
    import glmmjax as gj

    gj.glmer if case.REML is None else gj.lmer  # noqa: B018 - imported when first used: jax, pandas and the engine
    imported = time.perf_counter() - start
    data = case.data()
    before = rss_mb()
    warnings.simplefilter("ignore")  # singular and unconverged fits are in the record

    def fit() -> gj.MixedModel:
        if case.REML is None:
            m = gj.glmer(case.formula, data, family=case.family, nAGQ=case.nAGQ)
        else:
            m = gj.lmer(case.formula, data, REML=case.REML)
        m.bse  # noqa: B018
        return m

    start = time.perf_counter()
    m = fit()
    first = time.perf_counter() - start
    stats = m.fit_stats
    record: Record = {
        "variant": variant,
        "status": "ok" if first_only else "running",
        "objective": float(m.objective),
        "converged": bool(m.converged),
        "message": "singular" if m.is_singular else ("" if m.converged else stats.message),
        "evaluations": int(stats.evaluations),
        "hessian_evaluations": int(stats.hessian_evaluations),
        "pirls_iterations": int(stats.pirls_iterations),
        "rows": int(m.nobs),
        "times": {"import": timing([imported]), "first": timing([first])},
        "memory": {"before": before, "peak": peak_mb()},
    }
    emit(record)
    if first_only:
        return
    record["times"]["call"] = repeat(fit, settings)
    y = m.getME("y")
    m.refit(y)  # outside the clock: a refit may compile what the first fit did not
    record["times"]["refit"] = repeat(lambda: m.refit(y).bse, settings)
    record["memory"]["peak"] = peak_mb()
    emit({**record, "status": "ok"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("settings")
    parser.add_argument("variant")
    parser.add_argument("--first-only", action="store_true")
    parser.add_argument("--one-core", action="store_true")
    given = parser.parse_args()
    if given.one_core:
        pin_to_one_core()
    _worker(FITS[given.case], Settings(**json.loads(given.settings)), given.variant, given.first_only)
