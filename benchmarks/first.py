"""Time to the first result: whole processes that load a system, fit one model and print its summary.

glmmjax's is the command line, with an empty cache and with the programs of an earlier process in it; R's is Rscript
with library(lme4); glmm's a Python process. A further process of glmmjax says where its time goes, and counts the
operations of its programs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import report
from .cases import FITS, Case
from .measure import ROOT, THREADS, Record, Settings, Suite, child, emit, python, timing
from .peers import lme4_available, write_for_r


@dataclass(frozen=True)
class FirstCase:
    """A model of `cases.FITS` on a bundled data set."""

    model: str
    data: str

    @property
    def case(self) -> Case:
        return FITS[self.model]


CASES = {
    "first_cbpp": FirstCase("cbpp", "cbpp"),
    "first_sleepstudy": FirstCase("sleepstudy", "sleepstudy"),
    "first_contraception": FirstCase("contraception_cm4", "contraception"),
    "first_grouseticks": FirstCase("grouseticks", "grouseticks"),
}

_R = r"""
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]; form <- as.formula(arguments[2]); family <- arguments[3]
suppressPackageStartupMessages(library(lme4))
data <- read.csv(file.path(folder, "data.csv"), check.names = FALSE)
for (file in list.files(folder, pattern = "[.]levels$")) {
  column <- sub("[.]levels$", "", file)
  data[[column]] <- factor(data[[column]], levels = readLines(file.path(folder, file)))
}
m <- if (family %in% c("REML", "ML")) lmer(form, data, REML = family == "REML") else glmer(form, data, family)
print(summary(m))
"""


def process(command: Sequence[str], env: dict[str, str], timeout: float) -> tuple[float, float]:
    """Wall seconds and peak MB of a process."""
    environment = {**os.environ, **THREADS, **env}
    with tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, env=environment)
        alarm = threading.Timer(timeout, running.kill)
        alarm.start()
        _, status, used = os.wait4(running.pid, 0)
        seconds = time.perf_counter() - start
        alarm.cancel()
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            errors.seek(0)
            raise RuntimeError((errors.read().strip().splitlines() or [f"exit status {running.returncode}"])[-1])
    return seconds, used.ru_maxrss / (1024.0**2 if sys.platform == "darwin" else 1024.0)


def _repeated(one: Callable[[], tuple[float, float]], repeats: int) -> Record:
    found = [one() for _ in range(repeats)]
    return {
        "status": "ok",
        "message": "",
        "times": {"process": timing([seconds for seconds, _ in found])},
        "memory": {"peak": max(peak for _, peak in found)},
    }


def run(name: str, settings: Settings) -> list[Record]:
    """A process per system and variant, which starts the measured ones."""
    records = []
    for system, variant in (
        ("lme4", ""),
        ("glmm", ""),
        ("glmmjax", "nothing cached"),
        ("glmmjax", "programs cached"),
        ("glmmjax", "stages, nothing cached"),
        ("glmmjax", "stages, programs cached"),
    ):
        command = python("benchmarks.first", name, system, variant, json.dumps(vars(settings)))
        records += [{"system": system, **r, "variant": variant} for r in child(command, settings.timeout)]
    return [{"case": name, **record} for record in records]


def _worker(case: FirstCase, system: str, variant: str, settings: Settings) -> None:
    repeats = 2 if settings.quick else 7
    kind = case.case.family if case.case.REML is None else ("REML" if case.case.REML else "ML")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if system == "lme4":
            if reason := lme4_available():
                emit({"status": "skipped", "message": reason})
                return
            write_for_r(case.case.data(), folder)
            (folder / "fit.R").write_text(_R)
            command = ["Rscript", "--vanilla", str(folder / "fit.R"), str(folder), case.case.formula, kind]
            emit(_repeated(lambda: process(command, {}, settings.timeout), repeats))
            return
        if system == "glmm":
            import importlib.util

            if importlib.util.find_spec("glmm") is None:
                emit({"status": "skipped", "message": "glmm is not installed"})
                return
            case.case.data().to_pickle(folder / "data")
            command = [sys.executable, "-c", _GLMM, str(folder / "data"), case.case.formula_for("glmm"), kind]
            emit(_repeated(lambda: process(command, {}, settings.timeout), repeats))
            return
        if variant.startswith("stages"):
            _emit_stages(case, variant, folder, settings)
            return
        command = [sys.executable, "-m", "glmmjax._cli", "fit", case.case.formula, case.data]
        command += ["--family", "gaussian" if kind in ("REML", "ML") else kind, *(["--ML"] if kind == "ML" else [])]

        def one(number: int = 0) -> tuple[float, float]:
            cache = folder / f"cache{number}"
            return process(command, {"GLMMJAX_CACHE": str(cache)}, settings.timeout)

        if variant == "programs cached":
            one()
            emit(_repeated(one, repeats))
        else:
            numbers = iter(range(repeats))
            emit(_repeated(lambda: one(next(numbers)), repeats))


_GLMM = """
import sys
import pandas as pd
import glmm
data = pd.read_pickle(sys.argv[1])
formula, kind = sys.argv[2:]
m = glmm.fit(data, formula, reml=kind == "REML") if kind in ("REML", "ML") else glmm.fit(data, formula, kind)
print(m.summary())
"""


def _emit_stages(case: FirstCase, variant: str, folder: Path, settings: Settings) -> None:
    """Medians over processes of the stages that each of them prints."""
    stages: list[dict[str, Any]] = []
    if variant.endswith("programs cached"):
        _stages_of_process(case, folder / "cache")
    for number in range(2 if settings.quick else 5):
        cache = folder / ("cache" if variant.endswith("programs cached") else f"cache{number}")
        stages.append(_stages_of_process(case, cache))
    times = {name: timing([s["seconds"].get(name, 0.0) for s in stages]) for name in stages[0]["seconds"]}
    operations = stages[0]["operations"]
    emit({"status": "ok", "message": "", "times": times, "operations": operations})


def _stages_of_process(case: FirstCase, cache: Path) -> dict[str, Any]:
    command = python("benchmarks.first_stages", case.model, case.data)
    environment = {**os.environ, **THREADS, "GLMMJAX_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


SUITE = Suite("first", "Time to the first result", tuple(CASES), run, report.first, tuple(CASES)[1:])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("system")
    parser.add_argument("variant")
    parser.add_argument("settings")
    given = parser.parse_args()
    _worker(CASES[given.case], given.system, given.variant, Settings(**json.loads(given.settings)))
