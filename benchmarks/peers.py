"""The other systems: R's lme4 and the PyPI package glmm. One that is not installed is skipped, saying so."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import tempfile
import time
import warnings
from functools import cache
from pathlib import Path

import pandas as pd

from .cases import GLMM_FITS, Case
from .measure import Record, Settings, child, emit, peak_mb, python, repeat

#: lme4 as it comes, and without its final finite-difference check (so without Hessian standard errors)
LME4_VARIANTS = {"default": "glmerControl()", "calc.derivs=FALSE": "glmerControl(calc.derivs = FALSE)"}

_LME4 = r"""
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]; repeats <- as.integer(arguments[2]); minimum <- as.integer(arguments[3])
budget <- as.numeric(arguments[4]); form <- as.formula(arguments[5]); family <- arguments[6]
suppressPackageStartupMessages(library(lme4))
data <- read.csv(file.path(folder, "data.csv"), check.names = FALSE)
for (file in list.files(folder, pattern = "[.]levels$")) {
  column <- sub("[.]levels$", "", file)
  data[[column]] <- factor(data[[column]], levels = readLines(file.path(folder, file)))
}
quoted <- function(x) paste0('"', gsub('"', "'", gsub("[\n\\\\]", " ", x)), '"')
clock <- function() as.numeric(Sys.time())
emit <- function(variant, status, m, times) {
  messages <- paste(unlist(m@optinfo$conv$lme4$messages), collapse = "; ")
  if (isSingular(m)) messages <- paste(c("singular", messages[messages != ""]), collapse = "; ")
  cat(sprintf(paste0('RECORD {"variant": %s, "status": %s, "objective": %.15g, "converged": %s, ',
                     '"message": %s, "evaluations": %d, "rows": %d, "times": {%s}}\n'),
              quoted(variant), quoted(status), -2 * as.numeric(logLik(m)),
              if (messages == "") "true" else "false",
              quoted(messages), as.integer(m@optinfo$feval), nobs(m), times))
  flush(stdout())
}
entry <- function(name, x) sprintf('"%s": {"median": %.6g, "min": %.6g, "max": %.6g, "repeats": %d}',
                                   name, median(x), min(x), max(x), length(x))
variants <- list(VARIANTS)
for (variant in names(variants)) {
  fit <- function() suppressMessages(suppressWarnings(
    glmer(form, data, family = family, control = variants[[variant]])))
  began <- clock(); m <- fit(); first <- clock() - began
  emit(variant, "running", m, entry("first", first))
  # a fit that takes minutes is not repeated: its first run is also its warm one
  seconds <- if (first > 3 * budget) first else numeric()
  began <- clock()
  while (length(seconds) < repeats && first <= 3 * budget) {
    start <- clock(); m <- fit(); seconds <- c(seconds, clock() - start)
    if (clock() - began > budget && length(seconds) >= minimum) break
  }
  emit(variant, "ok", m, paste(entry("first", first), entry("call", seconds), sep = ", "))
}
"""


@cache
def lme4_available() -> str:
    """Empty if lme4 can be run, else why not."""
    if shutil.which("Rscript") is None:
        return "Rscript is not installed"
    probe = ["Rscript", "-e", "quit(status = !requireNamespace('lme4', quietly = TRUE))"]
    return "" if subprocess.run(probe, capture_output=True).returncode == 0 else "lme4 is not installed"


def glmm_available() -> str:
    return "" if importlib.util.find_spec("glmm") else "glmm is not installed"


def write_for_r(data: pd.DataFrame, folder: Path) -> None:
    """data.csv, and for each categorical column its levels in order, one a line."""
    data.to_csv(folder / "data.csv", index=False)
    for column in data.columns:
        dtype = data[column].dtype
        if isinstance(dtype, pd.CategoricalDtype):
            (folder / f"{column}.levels").write_text("\n".join(map(str, dtype.categories)) + "\n")


def lme4(case: Case, settings: Settings) -> list[Record]:
    """Default glmer and, unless quick or out of time, glmer without derivatives; an R process each."""
    if reason := lme4_available():
        return [{"system": "lme4", "variant": "default", "status": "skipped", "message": reason}]
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_for_r(case.data(), folder)
        script = folder / "fit.R"
        numbers = [str(settings.repeats), str(settings.minimum), str(settings.budget)]
        for variant, control in LME4_VARIANTS.items():
            if records and (settings.quick or records[-1]["status"] != "ok"):
                break
            script.write_text(_LME4.replace("VARIANTS", f"{json.dumps(variant)} = {control}"))
            command = ["Rscript", "--vanilla", str(script), str(folder), *numbers]
            found = child([*command, case.formula_for("lme4"), case.family], settings.timeout)
            records += [{"system": "lme4", **record, "variant": variant} for record in found]
    return records


def glmm(case: Case, settings: Settings) -> list[Record]:
    """glmm in a process of its own."""
    if reason := glmm_available():
        return [{"system": "glmm", "variant": "", "status": "skipped", "message": reason}]
    arguments = [case.name, json.dumps(vars(settings))]
    return [{"system": "glmm", **r} for r in child(python("benchmarks.peers", *arguments), settings.timeout)]


def _glmm_worker(case: Case, settings: Settings) -> None:
    """Time `glmm.fit` on the prepared DataFrame.

    glmm has no tolerance to tighten. Its default also stores likelihood-ratio tables of Poisson models by
    refitting them; ``anova_test="Wald"`` leaves those refits out, so that one fit is timed. Standard errors
    are from its Hessian (the default).
    """
    import glmm

    data, formula = case.data(), case.formula_for("glmm")
    warnings.simplefilter("ignore")

    def fit() -> glmm.Fit:
        return glmm.fit(data, formula, case.family, anova_test="Wald")

    start = time.perf_counter()
    m = fit()
    first = time.perf_counter() - start
    record: Record = {
        "variant": "",
        "status": "running",
        "objective": -2.0 * float(m.loglik),
        "converged": bool(m.converged),
        "message": "singular" if m.singular else "",
        "evaluations": int(m.n_eval),
        "gradient_evaluations": int(m.n_grad),
        "rows": len(data),
        "times": {"first": {"median": first, "min": first, "max": first, "repeats": 1}},
    }
    emit(record)
    record["times"]["call"] = repeat(fit, settings)
    record["memory"] = {"peak": peak_mb()}
    emit({**record, "status": "ok"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("settings")
    given = parser.parse_args()
    _glmm_worker(GLMM_FITS[given.case], Settings(**json.loads(given.settings)))
