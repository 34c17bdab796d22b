"""Clocks, memory, child processes and the record of the machine."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: one thread for every BLAS, in every process, set before anything is imported
THREADS = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

#: One measured (case, system, variant), the line format of all suites:
#: case, system, variant, status ("ok", "timeout", "failed", "skipped"), and where they apply objective,
#: converged, message, evaluations, hessian_evaluations, rows, times {name: timing}, memory {name: MB}.
Record = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run asks of every suite."""

    quick: bool = False
    timeout: float = 600.0  # seconds for one process
    repeats: int = 30  # of fits that take milliseconds
    minimum: int = 3  # of fits that take longer than the budget allows
    budget: float = 10.0  # seconds of repeats for one number


@dataclass(frozen=True)
class Suite:
    """A family of cases that share one results file."""

    name: str
    title: str
    cases: Sequence[str]
    run: Callable[[str, Settings], list[Record]]  # one case
    report: Callable[[list[Record]], str]  # Markdown of all records
    long: Sequence[str] = ()  # cases left out of --quick


def repeat(call: Callable[[], Any], settings: Settings) -> dict[str, float]:
    """Seconds of `call`: median, min and max of up to `repeats` runs within the budget.

    Also the processor seconds per wall second, which shows how many threads were at work.
    """
    seconds: list[float] = []
    began, busy = time.perf_counter(), time.process_time()
    while len(seconds) < settings.repeats:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
        total = time.perf_counter() - began
        if total > settings.budget and len(seconds) >= settings.minimum:
            break
        if total > 6.0 * settings.budget:
            break
    total, busy = time.perf_counter() - began, time.process_time() - busy
    return {**timing(seconds), "cores_used": busy / total}


def timing(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "repeats": len(seconds),
    }


def rss_mb(field: str = "VmRSS") -> float:
    """Resident memory of this process in MB: "VmRSS" now, "VmHWM" its peak."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return float(line.split()[1]) / 1024.0
    except OSError:
        pass
    return peak_mb()


def peak_mb() -> float:
    """Peak resident memory of this process in MB."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (1024.0**2 if sys.platform == "darwin" else 1024.0)


def reset_peak() -> bool:
    """Let the peak start again from the present memory (Linux); False where that is not possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return rss_mb("VmHWM") < rss_mb() + 16.0
    except OSError:
        return False


def emit(record: Record) -> None:
    """Print one record for the parent process."""
    print("RECORD " + json.dumps(record), flush=True)


def child(command: Sequence[str], timeout: float, env: dict[str, str] | None = None) -> list[Record]:
    """Run a process that emits records; the last one of each variant counts.

    A process that runs out of time or fails leaves what it emitted before, with the reason in `status`
    and `message`.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        environment = {**os.environ, **THREADS, **(env or {})}
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment)
        problem = ""
        try:
            process.wait(timeout)
            if process.returncode:
                problem = "failed"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            problem = "timeout"
        out.seek(0)
        err.seek(0)
        records: dict[str, Record] = {}
        for line in out:
            if line.startswith("RECORD "):
                record = json.loads(line[len("RECORD ") :])
                records[record.get("variant", "")] = record
        if problem:
            tail = [line for line in err.read().strip().splitlines() if line.strip()]
            reason = f"stopped after {timeout:.0f} s" if problem == "timeout" else (tail or ["no message"])[-1]
            what: Record = {"status": problem, "message": reason}
            if problem == "timeout":
                what["stopped_after"] = timeout
            partial = [r for r in records.values() if r.get("status") != "ok"]
            for record in partial:
                record.update(what)
            if not partial:
                records["(unfinished)"] = {"variant": "", **what}
    return list(records.values())


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def pin_to_one_core() -> bool:
    """Keep this process on one core, which also makes XLA's thread pool one thread; before importing jax."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return True


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **THREADS})
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment(settings: Settings) -> dict[str, Any]:
    """Versions, hardware and threads of a run."""
    packages = ("jax", "jaxlib", "numpy", "pandas", "glmm", "mixedlm", "gpboost", "statsmodels")
    r = _output(
        "Rscript",
        "-e",
        "cat(paste(R.version$major, R.version$minor, sep = '.'), "
        "if (requireNamespace('lme4', quietly = TRUE)) as.character(packageVersion('lme4')) else '', "
        "if (requireNamespace('glmmTMB', quietly = TRUE)) as.character(packageVersion('glmmTMB')) else '', "
        "basename(extSoftVersion()[['BLAS']]), sep = '\\n')",
    )
    r_version, lme4, glmmtmb, blas = (r.split("\n") + [""] * 4)[:4] if r else [""] * 4
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "rev-parse", "HEAD"),
        "uncommitted_changes": bool(_output("git", "status", "--porcelain", "--", "glmmjax")),
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "R": r_version or None,
        "lme4": lme4 or None,
        "glmmTMB": glmmtmb or None,
        "R_blas": blas or None,
        "cpu": _cpu(),
        "cores": cores,
        "threads": {**THREADS, "XLA": f"{cores} (default), and 1 where a variant says so"},
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "precision": "float64",
        "settings": {"quick": settings.quick, "repeats": settings.repeats, "timeout": settings.timeout},
    }
