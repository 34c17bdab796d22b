"""``python -m benchmarks [names...] [--quick] [--out DIR]``: run suites or cases, write JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from . import first, glmm_fits, glmm_scaling, inference, large, lmm_fits, lmm_scaling, many, memory, report
from .measure import ROOT, Record, Settings, Suite, environment

_MODULES = (first, glmm_fits, lmm_fits, glmm_scaling, lmm_scaling, inference, many, large, memory)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in _MODULES}


def chosen(names: list[str], quick: bool) -> dict[str, list[str]]:
    """Suite -> cases to run. Without names all of them, long ones only without `quick`."""
    plan: dict[str, list[str]] = {}
    for suite in SUITES.values():
        for case in suite.cases:
            if case in names or (not (quick and case in suite.long) and (not names or suite.name in names)):
                plan.setdefault(suite.name, []).append(case)
    known = {*SUITES, *(case for suite in SUITES.values() for case in suite.cases)}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; there are: {', '.join(sorted(known))}")
    return plan


def show(record: Record) -> None:
    times = ", ".join(f"{k} {report.show_time(v['median'])}" for k, v in record.get("times", {}).items())
    objective = f"{record['objective']:.6f}" if record.get("objective") is not None else ""
    above = f" (+{record['above_best']:.1e})" if record.get("above_best") is not None else ""
    label = f"{record['system']} {record.get('variant', '')}".strip()
    sizes = ", ".join(f"{k} {v:.0f} MB" for k, v in record.get("memory", {}).items())
    evaluations = f"{record['evaluations']} evaluations" if "evaluations" in record else ""
    parts = [f"{objective}{above}", evaluations, times, sizes, str(record.get("message") or "")[:100]]
    print(f"  {label:28s} {record['status']:8s} " + "; ".join(p for p in parts if p), flush=True)


def save(suite: Suite, records: list[Record], run: dict[str, Any], folder: Path, quick: bool) -> None:
    """Replace the cases that were run in the suite's results; quick runs have files of their own."""
    stem = suite.name + ("_quick" if quick else "")
    path = folder / f"{stem}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {"records": [], "runs": {}}
    fresh = {record["case"] for record in records}
    everything = [r for r in earlier["records"] if r["case"] not in fresh and r["case"] in suite.cases]
    everything += [{**record, "run": run["date"]} for record in records]
    everything.sort(key=lambda record: suite.cases.index(record["case"]))
    runs = {**earlier["runs"], run["date"]: run}
    used = {record["run"] for record in everything}
    result = {
        "suite": suite.name,
        "title": suite.title,
        "runs": {date: value for date, value in runs.items() if date in used},
        "records": everything,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(report.document(result, suite.report(everything)))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="suites or cases; all of them if none is named")
    parser.add_argument("--quick", action="store_true", help="few repeats, short cases")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for one process")
    parser.add_argument("--repeats", type=int, default=None, help="of fits that take milliseconds")
    given = parser.parse_args()
    settings = Settings(quick=given.quick, timeout=given.timeout)
    if given.quick:
        settings = Settings(quick=True, timeout=min(given.timeout, 60.0), repeats=3, minimum=1, budget=2.0)
    if given.repeats:
        settings = Settings(**{**vars(settings), "repeats": given.repeats})
    plan = chosen(given.names, given.quick)
    run = environment(settings)
    print(report.provenance({run["date"]: run}))
    for name, cases in plan.items():
        suite = SUITES[name]
        for case in cases:
            print(f"{name}: {case}", flush=True)
            start = time.perf_counter()
            records = suite.run(case, settings)
            for record in records:
                show(record)
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
            save(suite, records, run, given.out, given.quick)  # after every case: a long run may be cut short
        print(f"wrote {given.out / name}{'_quick' if given.quick else ''}.md and .json")


if __name__ == "__main__":
    main()
