"""The other systems: R's lme4 and glmmTMB, and from PyPI glmm, mixedlm, gpboost and statsmodels.

One that is not installed is skipped by name.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from .cases import FITS, Case
from .measure import Record, Settings, child, emit, peak_mb, python, repeat, rss_mb, timing

#: arguments of (g)lmerControl: lme4 as it comes, and without its final finite-difference check (on which the
#: standard errors of glmer are based, those of lmer are not)
LME4_VARIANTS = {"default": "", "calc.derivs=FALSE": "calc.derivs = FALSE"}

#: Makes one fit of (case, data), and reads a record from the result.
Peer = tuple[Callable[[Case, pd.DataFrame], Any], Callable[[Any], Record]]

_LME4 = r"""
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]; repeats <- as.integer(arguments[2]); minimum <- as.integer(arguments[3])
budget <- as.numeric(arguments[4]); form <- as.formula(arguments[5])
family <- arguments[6]; REML <- arguments[6] == "REML"
suppressPackageStartupMessages(library(lme4))
data <- read.csv(file.path(folder, "data.csv"), check.names = FALSE)
for (file in list.files(folder, pattern = "[.]levels$")) {
  column <- sub("[.]levels$", "", file)
  data[[column]] <- factor(data[[column]], levels = readLines(file.path(folder, file)))
}
quoted <- function(x) paste0('"', gsub('"', "'", gsub("[\n\\\\]", " ", x)), '"')
clock <- function() as.numeric(Sys.time())
resident <- function(field) {  # MB of this process; Linux only
  lines <- tryCatch(readLines("/proc/self/status"), error = function(e) "", warning = function(w) "")
  as.numeric(sub("[^0-9]*([0-9]+).*", "\\1", grep(paste0("^", field, ":"), lines, value = TRUE))) / 1024
}
before <- resident("VmRSS")
saturated <- function(m) {  # -2 log density at mu = y, which logLik leaves out for nAGQ > 1
  if (!isGLMM(m) || m@devcomp$dims[["nAGQ"]] <= 1) return(0)
  y <- m@resp$y; w <- m@resp$weights
  family(m)$aic(y, w, y, w, 0)
}
emit <- function(variant, status, m, times) {
  messages <- paste(unlist(m@optinfo$conv$lme4$messages), collapse = "; ")
  if (isSingular(m)) messages <- paste(c("singular", messages[messages != ""]), collapse = "; ")
  peak <- resident("VmHWM")
  memory <- if (length(peak)) sprintf(', "memory": {"before": %.1f, "peak": %.1f}', before, peak) else ""
  cat(sprintf(paste0('RECORD {"variant": %s, "status": %s, "objective": %.15g, "converged": %s, ',
                     '"message": %s, "evaluations": %d, "rows": %d, "times": {%s}%s}\n'),
              quoted(variant), quoted(status), -2 * as.numeric(logLik(m)) + saturated(m),
              if (messages == "") "true" else "false",
              quoted(messages), as.integer(m@optinfo$feval), nobs(m), times, memory))
  flush(stdout())
}
entry <- function(name, x) sprintf('"%s": {"median": %.6g, "min": %.6g, "max": %.6g, "repeats": %d}',
                                   name, median(x), min(x), max(x), length(x))
for (variant in VARIANT) {
  fit <- function() suppressMessages(suppressWarnings(FIT))
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


_GLMMTMB = r"""
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]; repeats <- as.integer(arguments[2]); minimum <- as.integer(arguments[3])
budget <- as.numeric(arguments[4]); form <- as.formula(arguments[5]); kind <- arguments[6]
suppressWarnings(suppressPackageStartupMessages(library(glmmTMB)))
data <- read.csv(file.path(folder, "data.csv"), check.names = FALSE)
for (file in list.files(folder, pattern = "[.]levels$")) {
  column <- sub("[.]levels$", "", file)
  data[[column]] <- factor(data[[column]], levels = readLines(file.path(folder, file)))
}
clock <- function() as.numeric(Sys.time())
resident <- function(field) {  # MB of this process; Linux only
  lines <- tryCatch(readLines("/proc/self/status"), error = function(e) "", warning = function(w) "")
  as.numeric(sub("[^0-9]*([0-9]+).*", "\\1", grep(paste0("^", field, ":"), lines, value = TRUE))) / 1024
}
before <- resident("VmRSS")
fit <- function() suppressMessages(suppressWarnings(
  if (kind %in% c("REML", "ML")) glmmTMB(form, data, REML = kind == "REML") else glmmTMB(form, data, family = kind)))
entry <- function(name, x) sprintf('"%s": {"median": %.6g, "min": %.6g, "max": %.6g, "repeats": %d}',
                                   name, median(x), min(x), max(x), length(x))
emit <- function(status, m, times) {
  peak <- resident("VmHWM")
  memory <- if (length(peak)) sprintf(', "memory": {"before": %.1f, "peak": %.1f}', before, peak) else ""
  good <- m$fit$convergence == 0 && isTRUE(m$sdr$pdHess)
  cat(sprintf(paste0('RECORD {"variant": "", "status": "%s", "objective": %.15g, "converged": %s, "message": "", ',
                     '"evaluations": %d, "gradient_evaluations": %d, "rows": %d, "times": {%s}%s}\n'),
              status, 2 * m$fit$objective, if (good) "true" else "false", as.integer(m$fit$evaluations[1]),
              as.integer(m$fit$evaluations[2]), nobs(m), times, memory))
  flush(stdout())
}
began <- clock(); m <- fit(); first <- clock() - began
emit("running", m, entry("first", first))
seconds <- if (first > 3 * budget) first else numeric()
began <- clock()
while (length(seconds) < repeats && first <= 3 * budget) {
  start <- clock(); m <- fit(); seconds <- c(seconds, clock() - start)
  if (clock() - began > budget && length(seconds) >= minimum) break
}
emit("ok", m, paste(entry("first", first), entry("call", seconds), sep = ", "))
"""


@cache
def r_package_missing(name: str) -> str:
    """Empty if an R package can be run, else why not."""
    if shutil.which("Rscript") is None:
        return "Rscript is not installed"
    probe = ["Rscript", "-e", f"quit(status = !requireNamespace('{name}', quietly = TRUE))"]
    return "" if subprocess.run(probe, capture_output=True).returncode == 0 else f"{name} is not installed"


def lme4_available() -> str:
    """Empty if lme4 can be run, else why not."""
    return r_package_missing("lme4")


def write_for_r(data: pd.DataFrame, folder: Path) -> None:
    """data.csv, and for each categorical column its levels in order, one a line."""
    data.to_csv(folder / "data.csv", index=False)
    for column in data.columns:
        dtype = data[column].dtype
        if isinstance(dtype, pd.CategoricalDtype):
            (folder / f"{column}.levels").write_text("\n".join(map(str, dtype.categories)) + "\n")


def lme4(case: Case, settings: Settings) -> list[Record]:
    """Default (g)lmer and, unless quick or out of time, without derivatives; an R process each."""
    if reason := lme4_available():
        return [{"system": "lme4", "variant": "default", "status": "skipped", "message": reason}]
    if reason := case.cannot.get("lme4"):
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
            if case.REML is None:
                fit = f"glmer(form, data, family = family, nAGQ = {case.nAGQ}, control = glmerControl({control}))"
                kind = case.family
            else:
                fit = f"{{m <- lmer(form, data, REML = REML, control = lmerControl({control})); vcov(m); m}}"
                kind = "REML" if case.REML else "ML"
            script.write_text(_LME4.replace("VARIANT", json.dumps(variant)).replace("FIT", fit))
            command = ["Rscript", "--vanilla", str(script), str(folder), *numbers]
            found = child([*command, case.formula_for("lme4"), kind], settings.timeout)
            records += [{"system": "lme4", **record, "variant": variant} for record in found]
    return records


def glmmtmb(case: Case, settings: Settings) -> list[Record]:
    """glmmTMB in an R process of its own; it knows Laplace's approximation only."""
    base: Record = {"system": "glmmTMB", "variant": "", "status": "skipped"}
    reason = r_package_missing("glmmTMB") or ("no quadrature" if case.nAGQ > 1 else case.cannot.get("glmmTMB", ""))
    if reason:
        return [{**base, "message": reason}]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_for_r(case.data(), folder)
        (folder / "fit.R").write_text(_GLMMTMB)
        kind = case.family if case.REML is None else ("REML" if case.REML else "ML")
        numbers = [str(settings.repeats), str(settings.minimum), str(settings.budget)]
        command = ["Rscript", "--vanilla", str(folder / "fit.R"), str(folder), *numbers, case.formula_for("lme4"), kind]
        return [{**base, **record} for record in child(command, settings.timeout)]


def gpboost(case: Case, settings: Settings) -> list[Record]:
    """gpboost, for models of random intercepts."""
    reason = "" if in_gpboost(case) else "its random slopes are uncorrelated, its binomial responses binary"
    if case.nAGQ > 1:
        reason = "no quadrature"
    if reason:
        return [{"system": "gpboost", "variant": "", "status": "skipped", "message": reason}]
    return _in_python("gpboost", case, settings)


def in_gpboost(case: Case) -> bool:
    """Whether a model is one of random intercepts with single responses."""
    bars = re.findall(r"\(([^()|]*)\|[^()]*\)", case.formula)
    return all(left.strip() == "1" for left in bars) and "cbind" not in case.formula


def glmm(case: Case, settings: Settings) -> list[Record]:
    """glmm in a process of its own; of linear models also with the degrees of freedom it computes by default."""
    records = _in_python("glmm", case, settings)
    if case.REML is not None and not settings.quick and records[0]["status"] == "ok":
        records += _in_python("glmm", case, settings, WITH_DF)
    return records


def mixedlm(case: Case, settings: Settings) -> list[Record]:
    return _in_python("mixedlm", case, settings)


def statsmodels(case: Case, settings: Settings) -> list[Record]:
    """statsmodels, for models of one term."""
    if statsmodels_parts(case.formula_for("statsmodels")) is None:
        reason = "MixedLM takes one grouping factor"
        return [{"system": "statsmodels", "variant": "", "status": "skipped", "message": reason}]
    return _in_python("statsmodels", case, settings)


def _in_python(system: str, case: Case, settings: Settings, variant: str = "") -> list[Record]:
    """A system from PyPI in a process of its own."""
    if importlib.util.find_spec(system) is None:
        return [{"system": system, "variant": variant, "status": "skipped", "message": f"{system} is not installed"}]
    command = python("benchmarks.peers", system, case.name, json.dumps(vars(settings)), variant)
    return [{"system": system, **record, "variant": variant} for record in child(command, settings.timeout)]


WITH_DF = "with df"


def _glmm(variant: str) -> Peer:
    """`glmm.fit`, which has no tolerance to tighten.

    Its default also stores likelihood-ratio tables of Poisson models by refitting them, and computes
    Satterthwaite's degrees of freedom of linear models; ``anova_test="Wald"`` and ``satterthwaite=False`` leave
    those out, so that one fit is timed. Standard errors of generalised models are from its Hessian (the default).
    `loglik` has all constants, and is minus half the REML criterion where that is fitted.
    """
    import glmm

    def fit(case: Case, data: pd.DataFrame) -> glmm.Fit:
        formula = case.formula_for("glmm")
        if case.REML is None:
            family = {"nbinom2": "negativebinomial"}.get(case.family, case.family)
            return glmm.fit(data, formula, family, anova_test="Wald", nagq=case.nAGQ)
        return glmm.fit(data, formula, reml=case.REML, satterthwaite=variant == WITH_DF)

    def read(m: glmm.Fit) -> Record:
        return {
            "objective": -2.0 * float(m.loglik),
            "converged": bool(m.converged),
            "message": "singular" if m.singular else "",
            "evaluations": int(m.n_eval),
            "gradient_evaluations": int(m.n_grad),
        }

    return fit, read


def _mixedlm(variant: str) -> Peer:
    """`mixedlm.lmer` at its defaults; `deviance` is the minimised criterion, all constants included."""
    import mixedlm

    def fit(case: Case, data: pd.DataFrame) -> mixedlm.LmerResult:
        m = mixedlm.lmer(case.formula_for("mixedlm"), data, REML=bool(case.REML))
        m.vcov()
        return m

    def read(m: mixedlm.LmerResult) -> Record:
        singular = bool(m.isSingular())
        return {
            "objective": float(m.deviance),
            "converged": bool(m.converged),
            "message": "singular" if singular else ("" if m.converged else str(m.message)),
            "evaluations": int(m.function_evals),
        }

    return fit, read


def _gpboost(variant: str) -> Peer:
    """`GPModel` on arrays that are ready (it has no formulas), with the standard errors of the coefficients.

    Its likelihood has all constants.
    """
    import gpboost as gpb
    import numpy as np

    import glmmjax as gj

    likelihoods = {"binomial": "bernoulli_logit", "poisson": "poisson", "nbinom2": "negative_binomial"}
    ready: dict[int, tuple[Any, ...]] = {}

    def fit(case: Case, data: pd.DataFrame) -> Any:
        if id(data) not in ready:  # once, in the first call, which is not reported as a warm one
            made = gj.glmer_setup(case.formula, data, case.family)
            levels = [np.asarray(term.level) for term in made.data.terms]
            ready[id(data)] = np.asarray(made.design.y), np.asarray(made.design.X), np.column_stack(levels)
        y, X, groups = ready[id(data)]
        m = gpb.GPModel(group_data=groups, likelihood=likelihoods[case.family], num_parallel_threads=1)
        m.fit(y=y, X=X)
        m.get_coef(std_err=True)
        return m

    def read(m: Any) -> Record:
        return {
            "objective": 2.0 * float(m.get_current_neg_log_likelihood()),
            "converged": True,
            "message": "evaluations are iterations",
            "evaluations": int(m._get_num_optim_iter()),
        }

    return fit, read


def statsmodels_parts(formula: str) -> tuple[str, str, str] | None:
    """(fixed, random, grouping factor) of a formula with one term of random effects, else None."""
    found = re.fullmatch(r"([^|]*?)\s*\+\s*\(([^|()]+)\|\s*(\w+)\s*\)", formula)
    return None if found is None else (found[1], "~ " + found[2].strip(), found[3])


def _statsmodels(variant: str) -> Peer:
    """`MixedLM` with its default optimisers; `llf` has all constants, and X'X in no part of the REML criterion."""
    import statsmodels.formula.api as smf

    def fit(case: Case, data: pd.DataFrame) -> Any:
        parts = statsmodels_parts(case.formula_for("statsmodels"))
        assert parts is not None
        fixed, random, group = parts
        m = smf.mixedlm(fixed, data, groups=group, re_formula=random).fit(reml=bool(case.REML))
        m.bse  # noqa: B018
        return m

    def read(m: Any) -> Record:
        return {"objective": -2.0 * float(m.llf), "converged": bool(m.converged), "message": ""}

    return fit, read


def _worker(peer: Peer, case: Case, settings: Settings) -> None:
    """Time whole calls on the prepared DataFrame; one of minutes is not repeated, as in R."""
    fit, read = peer
    data = case.data()
    before = rss_mb()
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    m = fit(case, data)
    first = time.perf_counter() - start
    record: Record = {
        "variant": "",
        "status": "running",
        **read(m),
        "rows": len(data),
        "times": {"first": timing([first])},
        "memory": {"before": before, "peak": peak_mb()},
    }
    emit(record)
    long = first > 3.0 * settings.budget
    record["times"]["call"] = timing([first]) if long else repeat(lambda: fit(case, data), settings)
    record["memory"]["peak"] = peak_mb()
    emit({**record, "status": "ok"})


PEERS = {"glmm": _glmm, "mixedlm": _mixedlm, "gpboost": _gpboost, "statsmodels": _statsmodels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("system", choices=PEERS)
    parser.add_argument("case")
    parser.add_argument("settings")
    parser.add_argument("variant")
    given = parser.parse_args()
    _worker(PEERS[given.system](given.variant), FITS[given.case], Settings(**json.loads(given.settings)))
