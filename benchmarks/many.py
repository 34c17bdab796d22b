"""One model on many data sets: `fit_many` against loops over lme4's `refit` and glmm's `fit`, in the same run.

The peers fit a sample; their time is per fit. Objectives are summed over the sample, so that a fast wrong answer shows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import report
from .measure import ROOT, Record, Settings, Suite, child, emit, peak_mb, python, timing
from .peers import lme4_available

GROUPS, ROWS = 20, 200


@dataclass(frozen=True)
class ManyCase:
    """`count` data sets of `rows` rows (by), or `count` responses of one design (y)."""

    title: str
    family: str
    count: int
    rows: int = ROWS
    groups: int = GROUPS
    one_design: bool = False
    long: bool = False


CASES: dict[str, ManyCase] = {}
for _family in ("poisson", "binomial"):
    for _count in (1_000, 10_000):
        CASES[f"many_{_family}_{_count}"] = ManyCase(
            f"{_count:,} data sets of 200 rows and 20 groups, {_family}",
            _family,
            _count,
            long=_count > 1_000 or _family != "poisson",
        )
for _label, _family in (("poisson", "poisson"), ("nbinom2", "nbinom2")):
    CASES[f"responses_{_label}"] = ManyCase(
        f"2,000 responses of 5,000 rows and 40 subjects, {_family}", _family, 2_000, 5_000, 40, True, True
    )
CASES["many_scaling"] = ManyCase("time against the number of data sets and their rows", "poisson", 0, long=True)
SCALING_B, SCALING_N = (100, 316, 1_000, 3_162, 10_000), (50, 100, 200, 400, 800, 1_600)


def sample_size(case: ManyCase) -> int:
    """Data sets that the peers fit."""
    return 8 if case.one_design else 40


def draw(case: ManyCase, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """Data sets one below the other with column `id`, or the one design; and responses (rows, count)."""
    rng = np.random.default_rng(seed)
    n, m, B = case.rows, case.groups, case.count
    copies = 1 if case.one_design else B
    g = np.tile(np.repeat(np.arange(m), n // m), copies)
    data = pd.DataFrame({"id": np.repeat(np.arange(copies), n), "x": rng.normal(size=n * copies), "g": g})
    data["treat"] = (g % 2).astype(float)
    effects = rng.normal(size=(B, m)) * rng.uniform(0.3, 0.9, (B, 1))
    fixed = (0.2 + 0.4 * data["x"] + 0.3 * data["treat"]).to_numpy()
    eta = fixed[:, None] + effects.T[g] if case.one_design else fixed + effects[data["id"], g]
    if case.family == "binomial":
        return data, rng.binomial(1, 1.0 / (1.0 + np.exp(-eta))).astype(float)
    mean = np.exp(eta)
    if case.family == "nbinom2":
        mean = mean * rng.gamma(2.0, 0.5, mean.shape)
    return data, rng.poisson(mean).astype(float)


def fit(case: ManyCase, data: pd.DataFrame, y: np.ndarray) -> Any:
    """All of them by glmmjax."""
    import glmmjax as gj

    if case.one_design:
        return gj.fit_many("~ x + treat + (1 | g)", data, case.family, y=y)
    return gj.fit_many("y ~ x + treat + (1 | g)", data.assign(y=y), case.family, by="id")


def run(name: str, settings: Settings) -> list[Record]:
    """glmmjax with nothing cached, then with its programs in the cache; lme4 and glmm on a sample."""
    case = CASES[name]
    if name == "many_scaling":
        return _scaling(settings)
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as cache:
        for state in ("nothing cached", "programs cached"):
            command = python("benchmarks.many", "own", name, json.dumps(vars(settings)))
            found = child(command, settings.timeout, {"GLMMJAX_CACHE": cache, "JAX_ENABLE_X64": "0"})
            records += [{"system": "glmmjax", **r, "variant": state} for r in found]
    records += [{"system": "glmm", **r} for r in child(python("benchmarks.many", "glmm", name, "{}"), settings.timeout)]
    peer = "glmmTMB" if case.family == "nbinom2" else "lme4"
    records += [{"system": peer, **r} for r in _in_r(case, settings)]
    best = min((r["objective"] for r in records if r.get("objective") is not None), default=None)
    for record in records:
        record["case"] = name
        if record.get("objective") is not None and best is not None:
            record["above_best"] = record["objective"] - best
    return records


def _own(case: ManyCase, settings: Settings) -> None:
    warnings.simplefilter("ignore")
    data, y = draw(case)
    start = time.perf_counter()
    many = fit(case, data, y)
    first = time.perf_counter() - start
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        many = fit(case, data, y)
        seconds.append(time.perf_counter() - start)
    fits = many.fits
    emit(
        {
            "variant": "",
            "status": "ok",
            "objective": float(-2.0 * fits["logLik"].iloc[: sample_size(case)].sum()),
            "converged": bool((fits["status"] == "converged").all()),
            "message": ", ".join(f"{n} {s}" for s, n in fits["status"].value_counts().items()),
            "evaluations": float(fits["evaluations"].mean()),
            "count": case.count,
            "times": {
                "first": timing([first / case.count]),
                "call": timing([s / case.count for s in seconds]),
            },
            "memory": {"peak": peak_mb()},
        }
    )


def _glmm(case: ManyCase) -> None:
    try:
        import glmm
    except ImportError:
        emit({"variant": "loop", "status": "skipped", "message": "glmm is not installed"})
        return
    warnings.simplefilter("ignore")
    if case.family == "nbinom2":
        emit({"variant": "loop", "status": "skipped", "message": "the peer here is glmmTMB"})
        return
    data, y = draw(case)
    seconds, objective = [], 0.0
    for i in range(sample_size(case)):
        if case.one_design:
            own = data.assign(y=y[:, i])
        else:
            rows = slice(i * case.rows, (i + 1) * case.rows)
            own = data.iloc[rows].assign(y=y[rows])
        start = time.perf_counter()
        m = glmm.fit(own, "y ~ x + treat + (1 | g)", case.family, anova_test="Wald")
        if i:  # the first call loads what the others find
            seconds.append(time.perf_counter() - start)
        objective += -2.0 * float(m.loglik)
    emit({"variant": "loop", "status": "ok", "objective": objective, "times": {"call": timing(seconds)}})


_R = r"""
arguments <- commandArgs(trailingOnly = TRUE)
folder <- arguments[1]; count <- as.integer(arguments[2]); n <- as.integer(arguments[3]); family <- arguments[4]
shared <- arguments[5] == "TRUE"; tmb <- family == "nbinom2"
suppressPackageStartupMessages(if (tmb) library(glmmTMB) else library(lme4))
data <- read.csv(file.path(folder, "data.csv")); Y <- as.matrix(read.csv(file.path(folder, "y.csv"), header = FALSE))
quiet <- function(x) suppressMessages(suppressWarnings(x))
clock <- function() as.numeric(Sys.time())
part <- function(i) cbind(if (shared) data else data[(i - 1) * n + seq_len(n), ], y = Y[, i])
whole <- function(i) quiet(if (tmb) glmmTMB(y ~ x + treat + (1 | g), part(i), nbinom2) else
  glmer(y ~ x + treat + (1 | g), part(i), family))
objective <- 0; seconds <- numeric(); m <- whole(1)
for (i in seq_len(count)) {
  start <- clock(); fit <- if (shared && !tmb) quiet(refit(m, Y[, i])) else whole(i); taken <- clock() - start
  objective <- objective - 2 * as.numeric(logLik(fit))
  if (!shared) {  # refit of one design is the fastest that lme4 has: its time counts, where it is less
    start <- clock(); quiet(refit(m, Y[, i])); taken <- min(taken, clock() - start)
  }
  seconds <- c(seconds, taken)
}
s <- seconds
cat(sprintf(paste0('RECORD {"variant": "%s", "status": "ok", "objective": %.12g, "times": {"call": {"median": %.6g, ',
                   '"min": %.6g, "max": %.6g, "repeats": %d}}}\n'),
            if (tmb) "fit" else if (shared) "refit" else "refit or glmer, the faster", objective,
            median(s), min(s), max(s), length(s)))
"""


def _in_r(case: ManyCase, settings: Settings) -> list[Record]:
    if reason := lme4_available():
        return [{"variant": "refit", "status": "skipped", "message": reason}]
    data, y = draw(case)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        count = sample_size(case)
        rows = slice(0, case.rows if case.one_design else count * case.rows)
        data.iloc[rows].to_csv(folder / "data.csv", index=False)
        sample = y[:, :count] if case.one_design else y[rows].reshape(count, case.rows).T
        np.savetxt(folder / "y.csv", sample, fmt="%g", delimiter=",")
        (folder / "many.R").write_text(_R)
        arguments = [str(sample_size(case)), str(case.rows), case.family, str(case.one_design).upper()]
        return child(["Rscript", "--vanilla", str(folder / "many.R"), str(folder), *arguments], settings.timeout)


def _scaling(settings: Settings) -> list[Record]:
    command = python("benchmarks.many", "scaling", "many_scaling", json.dumps(vars(settings)))
    found = child(command, settings.timeout, {"JAX_ENABLE_X64": "0"})
    records = [{"case": "many_scaling", "system": "glmmjax", **r} for r in found]
    if any(r["status"] == "ok" for r in records):
        _picture(records)
    return records


def _scaling_worker() -> None:
    warnings.simplefilter("ignore")
    cases = [("B", ManyCase("", "poisson", B)) for B in SCALING_B]
    cases += [("n", ManyCase("", "poisson", 500, n, max(5, n // 10))) for n in SCALING_N]
    for what, case in cases:
        data, y = draw(case)
        fit(case, data, y)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            fit(case, data, y)
            seconds.append(time.perf_counter() - start)
        value = case.count if what == "B" else case.rows
        emit(
            {
                "variant": f"{what} = {value:,}",
                "status": "ok",
                "axis": what,
                "value": value,
                "count": case.count,
                "times": {"call": timing([s / case.count for s in seconds])},
            }
        )


def slope(records: Sequence[Record], axis: str) -> float:
    """Slope of log time of the whole call against the log of the axis."""
    own = [r for r in records if r.get("axis") == axis]
    total = np.log([r["times"]["call"]["median"] * r["count"] for r in own])
    return float(np.polyfit(np.log([r["value"] for r in own]), total, 1)[0])


def _picture(records: list[Record]) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    labels = {"B": "data sets (200 rows each)", "n": "rows per data set (500 data sets)"}
    for panel, (axis, label) in zip(axes, labels.items(), strict=True):
        own = [r for r in records if r.get("axis") == axis]
        x = np.array([r["value"] for r in own])
        seconds = np.array([r["times"]["call"]["median"] * r["count"] for r in own])
        panel.loglog(x, seconds, "o-", label=f"fit_many, slope {slope(records, axis):.2f}")
        panel.loglog(x, seconds[-1] * x / x[-1], "--", color="0.6", label="slope 1")
        panel.set(xlabel=label, ylabel="seconds, warm")
        panel.legend(frameon=False)
    figure.savefig(ROOT / "benchmarks" / "results" / "many_scaling.png", dpi=120)


def write(records: list[Record]) -> str:
    """Markdown tables."""
    parts = []
    for name, case in CASES.items():
        own = [r for r in records if r["case"] == name]
        if not own:
            continue
        parts.append(f"## {name}: {case.title}\n")
        if name == "many_scaling":
            rows = [
                [r["variant"], report.show_time(r["times"]["call"]["median"] * r["count"]), _micro(r, "call")]
                for r in own
                if r["status"] == "ok"
            ]
            parts.append(report.table(["", "whole call, warm", "per fit"], rows))
            parts.append(
                f"Slope of log time: {slope(own, 'B'):.2f} in the number of data sets, {slope(own, 'n'):.2f} in rows.\n"
                "\n![time against B and n](many_scaling.png)\n"
            )
            continue
        ours = [r for r in own if r["system"] == "glmmjax" and r["status"] == "ok"]
        warm = min((r["times"]["call"]["median"] for r in ours), default=None)
        rows = []
        for r in own:
            ratio = ""
            if r["system"] != "glmmjax" and warm and r.get("times"):
                ratio = f"{r['times']['call']['median'] / warm:.3g}"
            rows.append(
                [
                    f"{r['system']} ({r.get('variant', '')})",
                    _micro(r, "first"),
                    _micro(r, "call"),
                    ratio,
                    f"{r['above_best']:.1e}" if r.get("above_best") is not None else "",
                    f"{r['memory']['peak']:.0f}" if r.get("memory") else "",
                    str(r.get("message") or ""),
                ]
            )
        header = [
            "system",
            "per fit, first call",
            "warm",
            "over ours",
            "deviance of the sample above best",
            "peak MB",
            "",
        ]
        parts.append(report.table(header, rows))
    return "\n".join(parts)


def _micro(record: Record, name: str) -> str:
    value = report.seconds(record, name)
    if value is None:
        return ""
    return f"{1e6 * value:.0f} µs" if value < 1e-3 else report.show_time(value)


SUITE = Suite(
    "many",
    "Many data sets at once",
    tuple(CASES),
    run,
    write,
    long=[name for name, case in CASES.items() if case.long],
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["own", "glmm", "scaling"])
    parser.add_argument("name", choices=list(CASES))
    parser.add_argument("settings", type=json.loads)
    given = parser.parse_args()
    workers: dict[str, Callable[[], None]] = {
        "own": lambda: _own(CASES[given.name], Settings(**given.settings)),
        "glmm": lambda: _glmm(CASES[given.name]),
        "scaling": _scaling_worker,
    }
    workers[given.what]()


if __name__ == "__main__":
    main()
