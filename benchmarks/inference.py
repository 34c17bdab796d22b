"""Profiles, bootstraps and deletion influence of one fitted model: glmmjax and lme4 in the same run."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import report
from .cases import FITS, Case
from .measure import Record, Settings, Suite, child, emit, peak_mb, python, repeat, timing
from .peers import lme4_available, write_for_r


@dataclass(frozen=True)
class InferenceCase:
    """`task` on the model of a single-fit case; `replicates` of a bootstrap here and in lme4, whose time is scaled."""

    title: str
    task: str
    model: str
    group: str = ""
    replicates: tuple[int, int] = (0, 0)
    long: bool = False

    @property
    def case(self) -> Case:
        return FITS[self.model]


CASES = {
    "profile_cbpp": InferenceCase("profile of all parameters, cbpp", "profile", "cbpp"),
    "profile_contraception_cm3": InferenceCase(
        "profile of all parameters, Contraception cm3", "profile", "contraception_cm3", long=True
    ),
    "profile_sleepstudy": InferenceCase("profile of all parameters, sleepstudy", "profile", "sleepstudy"),
    "bootstrap_cbpp": InferenceCase(
        "1,000 parametric bootstrap refits, cbpp", "bootstrap", "cbpp", replicates=(1000, 50)
    ),
    "bootstrap_sleepstudy": InferenceCase(
        "1,000 parametric bootstrap refits, sleepstudy", "bootstrap", "sleepstudy", replicates=(1000, 100)
    ),
    "influence_cbpp": InferenceCase("deletion of each of 15 herds, cbpp", "influence", "cbpp", "herd"),
    "influence_contraception_cm3": InferenceCase(
        "deletion of each of 60 districts, Contraception cm3", "influence", "contraception_cm3", "district", long=True
    ),
}

_R = r"""
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]; form <- as.formula(arguments[2]); family <- arguments[3]; task <- arguments[4]
group <- arguments[5]; nsim <- as.integer(arguments[6]); wanted <- as.integer(arguments[7])
suppressPackageStartupMessages(library(lme4))
data <- read.csv(file.path(folder, "data.csv"), check.names = FALSE)
for (file in list.files(folder, pattern = "[.]levels$")) {
  column <- sub("[.]levels$", "", file)
  data[[column]] <- factor(data[[column]], levels = readLines(file.path(folder, file)))
}
quiet <- function(x) suppressMessages(suppressWarnings(x))
call <- if (family %in% c("REML", "ML")) bquote(lmer(.(form), data, REML = .(family == "REML"))) else
  bquote(glmer(.(form), data, .(family)))  # literals: influence() evaluates the call again
m <- quiet(eval(call))
start <- as.numeric(Sys.time())
value <- quiet(switch(task,
  profile = confint(profile(m))[1, ],
  bootstrap = { b <- bootMer(m, fixef, nsim = nsim, seed = 1); apply(b$t, 2, sd, na.rm = TRUE)[1:2] },
  influence = { i <- influence(m, groups = group); sort(cooks.distance(i), decreasing = TRUE)[1:2] }))
seconds <- as.numeric(Sys.time()) - start
scale <- if (task == "bootstrap") wanted / nsim else 1
time <- sprintf('{"median": %.6g, "min": %.6g, "max": %.6g, "repeats": 1}', seconds * scale, seconds * scale,
                seconds * scale)
cat(sprintf('RECORD {"variant": "", "status": "ok", "message": "%s", "times": {"call": %s}, "value": [%.10g, %.10g]}\n',
            if (scale != 1) sprintf("timed on %d replicates, scaled", nsim) else "", time, value[1], value[2]))
"""


def run(name: str, settings: Settings) -> list[Record]:
    """glmmjax in a process of its own, then lme4."""
    case = CASES[name]
    command = python("benchmarks.inference", name, json.dumps(vars(settings)))
    found = child(command, settings.timeout, {"GLMMJAX_CACHE": "off", "JAX_ENABLE_X64": "0"})
    records = [{"case": name, "system": "glmmjax", **r} for r in found]
    return records + [{"case": name, "system": "lme4", **r} for r in _lme4(case, settings)]


def _lme4(case: InferenceCase, settings: Settings) -> list[Record]:
    if reason := lme4_available():
        return [{"variant": "", "status": "skipped", "message": reason}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_for_r(case.case.data(), folder)
        (folder / "task.R").write_text(_R)
        kind = case.case.family if case.case.REML is None else ("REML" if case.case.REML else "ML")
        ours, theirs = case.replicates
        arguments = [case.case.formula_for("lme4"), kind, case.task, case.group or "-", str(theirs), str(ours)]
        return child(["Rscript", "--vanilla", str(folder / "task.R"), str(folder), *arguments], settings.timeout)


def _worker(case: InferenceCase, settings: Settings) -> None:
    """Time the first run, compilation included, and warm ones; the fit itself is outside the clock."""
    import glmmjax as gj

    warnings.simplefilter("ignore")
    single, data = case.case, case.case.data()
    if single.REML is None:
        m = gj.glmer(single.formula, data, family=single.family)
    else:
        m = gj.lmer(single.formula, data, REML=single.REML)

    def again() -> Any:
        """The same model anew, so that nothing kept with it helps."""
        return m.refit(m.getME("y"))

    def profile() -> np.ndarray:
        return np.asarray(again().profile().confint().iloc[0])

    def bootstrap() -> np.ndarray:
        return again().bootstrap(case.replicates[0], seed=1).summary()["std_error"][list(m.fixef.index)].to_numpy()[:2]

    def influence(method: str, batched: bool = False) -> Callable[[], np.ndarray]:
        return lambda: again().influence(case.group, method, batched).cooks_distance("lme4").nlargest(2).to_numpy()

    tasks: dict[str, Callable[[], np.ndarray]] = {"": profile if case.task == "profile" else bootstrap}
    if case.task == "influence":
        tasks = {
            "exact refits": influence("exact"),
            "exact refits, together": influence("exact", True),
            "first order": influence("first-order"),
        }
    for variant, task in tasks.items():
        start = time.perf_counter()
        value = task()
        first = time.perf_counter() - start
        record: Record = {
            "variant": variant,
            "status": "ok",
            "message": "",
            "value": [float(v) for v in value],
            "times": {"first": timing([first]), "call": repeat(task, settings)},
            "memory": {"peak": peak_mb()},
        }
        emit(record)


LONG = tuple(name for name, case in CASES.items() if case.long)
SUITE = Suite("inference", "Profiles, bootstraps and influence", tuple(CASES), run, report.inference, LONG)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("settings")
    given = parser.parse_args()
    _worker(CASES[given.case], Settings(**json.loads(given.settings)))
