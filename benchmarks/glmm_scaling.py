"""Time of one generalised fit as rows, levels, fixed effects or covariance parameters are added; with a picture."""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import report
from .cases import SEED
from .measure import ROOT, Record, Settings, Suite, child, emit, peak_mb, python, repeat, timing


@dataclass(frozen=True)
class Size:
    """Binary responses: n rows, m levels, p fixed effects, k of them with random slopes (the intercept is one)."""

    n: int = 10_000
    m: int = 100
    p: int = 3
    k: int = 1

    @property
    def formula(self) -> str:
        x = [f"x{j}" for j in range(1, self.p)]
        return f"y ~ {' + '.join(['1', *x])} + ({' + '.join(['1', *x[: self.k - 1]])} | g)"

    def data(self) -> pd.DataFrame:
        rng = np.random.default_rng(SEED)
        g = rng.permutation(np.concatenate([np.arange(self.m), rng.integers(0, self.m, self.n - self.m)]))
        X = np.column_stack([np.ones(self.n), rng.standard_normal((self.n, self.p - 1))])
        b = rng.standard_normal((self.m, self.k)) * 0.7
        eta = X @ (0.6 / np.arange(1, self.p + 1)) + (X[:, : self.k] * b[g]).sum(axis=1)
        out = pd.DataFrame(X[:, 1:], columns=[f"x{j}" for j in range(1, self.p)])
        return out.assign(y=(rng.random(self.n) < 1.0 / (1.0 + np.exp(-eta))).astype(float), g=g.astype(str))


@dataclass(frozen=True)
class ScalingCase:
    """One number varied; `along` is what stands on the axis."""

    title: str
    along: str
    sizes: tuple[tuple[int, Size], ...]


CASES = {
    "scaling_rows": ScalingCase(
        "rows n, 100 levels", "n", tuple((n, Size(n=n)) for n in (1_000, 10_000, 100_000, 400_000))
    ),
    "scaling_levels": ScalingCase(
        "levels m = q, 50,000 rows", "q", tuple((m, Size(n=50_000, m=m)) for m in (10, 100, 1_000, 10_000))
    ),
    "scaling_fixed_effects": ScalingCase(
        "fixed effects p, 10,000 rows", "p", tuple((p, Size(p=p)) for p in (2, 4, 8, 16, 32))
    ),
    "scaling_covariance_parameters": ScalingCase(
        "covariance parameters, 10,000 rows",
        "theta",
        tuple((k * (k + 1) // 2, Size(p=5, k=k)) for k in (1, 2, 3, 4)),
    ),
}


def run(name: str, settings: Settings) -> list[Record]:
    """A process per system for all sizes."""
    records = []
    for system in ("glmmjax", "glmm"):
        if importlib.util.find_spec(system) is None:
            records.append({"system": system, "status": "skipped", "message": f"{system} is not installed"})
            continue
        command = python("benchmarks.glmm_scaling", name, system, json.dumps(vars(settings)))
        records += [{"system": system, **r} for r in child(command, settings.timeout, {"GLMMJAX_CACHE": "off"})]
    best: dict[str, float] = {}
    for record in records:
        if "objective" in record:
            best[record["variant"]] = min(record["objective"], best.get(record["variant"], np.inf))
    for record in records:
        if "objective" in record:
            record["above_best"] = record["objective"] - best[record["variant"]]
    return [{"case": name, "variant": "", **record} for record in records]


def _worker(case: ScalingCase, system: str, settings: Settings) -> None:
    warnings.simplefilter("ignore")
    few = Settings(**{**vars(settings), "repeats": 5, "budget": 4.0})
    for value, size in case.sizes[:-1] if settings.quick else case.sizes:
        data = size.data()
        start = time.perf_counter()
        if system == "glmmjax":
            import glmmjax as gj

            m = gj.glmer(size.formula, data, "binomial")
            m.bse  # noqa: B018
            first = time.perf_counter() - start
            own = m

            def call(data: pd.DataFrame = data, size: Size = size) -> Any:
                return gj.glmer(size.formula, data, "binomial").bse

            found: Record = {
                "objective": float(own.objective),
                "converged": bool(own.converged),
                "evaluations": int(own.fit_stats.evaluations),
                "hessian_evaluations": int(own.fit_stats.hessian_evaluations),
            }
        else:
            import glmm

            peer = glmm.fit(data, size.formula, "binomial", anova_test="Wald")
            first = time.perf_counter() - start

            def call(data: pd.DataFrame = data, size: Size = size) -> Any:
                return glmm.fit(data, size.formula, "binomial", anova_test="Wald")

            found = {"objective": -2.0 * float(peer.loglik), "converged": bool(peer.converged)}
            found["evaluations"] = int(peer.n_eval)
        record: Record = {
            "variant": f"{case.along} = {value:,}",
            "value": value,
            "status": "ok",
            "message": "",
            **found,
        }
        record["rows"] = size.n
        record["times"] = {"first": timing([first]), "call": repeat(call, few)}
        record["memory"] = {"peak": peak_mb()}
        emit(record)


def picture(records: list[Record], path: Path) -> None:
    """Warm times against each number, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(CASES), figsize=(3.2 * len(CASES), 3.2), layout="constrained", sharey=True)
    for ax, (name, case) in zip(axes, CASES.items(), strict=True):
        for i, system in enumerate(("glmmjax", "glmm")):
            mine = [r for r in records if r["case"] == name and r["system"] == system and "value" in r]
            x, y = [r["value"] for r in mine], [r["times"]["call"]["median"] for r in mine]
            ax.plot(x, y, "o-", color=f"C{i}", label=system, markersize=4)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xticks([value for value, _ in case.sizes], [f"{value:,}" for value, _ in case.sizes], fontsize="small")
        ax.minorticks_off()
        ax.set_xlabel(case.title, fontsize="small")
    axes[0].set_ylabel("seconds of a warm fit")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(records: list[Record]) -> str:
    """A table of all sizes and, where all cases are there, the picture."""
    rows = [
        [
            f"{r['case']}, {r['variant']}",
            r["system"],
            report.show_time(report.seconds(r, "first")),
            report.show_time(report.seconds(r, "call")),
            f"{r['evaluations']}" + (f" + {r['hessian_evaluations']}" if "hessian_evaluations" in r else ""),
            f"{r['objective']:.6f}",
            f"{r['above_best']:.1e}",
            f"{r['memory']['peak']:.0f}",
        ]
        for r in records
        if "value" in r
    ]
    text = "\n".join(f"- `{name}`: {case.title}" for name, case in CASES.items()) + "\n\n"
    header = ["case", "system", "first", "warm call", "evaluations", "-2 log-likelihood", "above best", "peak MB"]
    text += report.table(header, rows)
    if {r["case"] for r in records} >= set(CASES):
        picture(records, ROOT / "benchmarks" / "results" / f"{SUITE.name}.png")
        text += f"\n![warm times]({SUITE.name}.png)\n"
    return text


SUITE = Suite(
    "glmm_scaling",
    "Generalised fits by rows, levels, fixed effects and covariance parameters",
    tuple(CASES),
    run,
    write,
    tuple(CASES)[1:],
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("system")
    parser.add_argument("settings")
    given = parser.parse_args()
    _worker(CASES[given.case], given.system, Settings(**json.loads(given.settings)))
