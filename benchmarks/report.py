"""Markdown tables from results. ``python -m benchmarks.report RESULTS.json`` prints one again."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case

Record = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, first column to the left and the others to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def seconds(record: Record, name: str) -> float | None:
    value = record.get("times", {}).get(name)
    return None if value is None else float(value["median"])


def show_time(value: float | None) -> str:
    """Seconds with three digits, in the unit that reads best."""
    if value is None:
        return ""
    return f"{1e3 * value:.3g} ms" if value < 1.0 else f"{value:.3g} s" if value < 100.0 else f"{value:.0f} s"


def show_ratio(peer: Record, own: float | None) -> str:
    """Warm call of `peer` over `own` seconds; a lower bound where the peer's process ran out of time."""
    value = seconds(peer, "call")
    if own is None:
        return ""
    if value is not None:
        return f"{value / own:.3g}"
    if "stopped_after" in peer and not peer.get("times"):
        return f"> {peer['stopped_after'] / own:.3g}"
    return ""


def _number(value: float | None, digits: str) -> str:
    return "" if value is None else format(value, digits)


def _label(record: Record) -> str:
    return record["system"] + (f" ({record['variant']})" if record.get("variant") else "")


def _remarks(record: Record) -> str:
    parts = [] if record["status"] == "ok" else [record["status"]]
    if record.get("converged") is False and not record.get("message"):
        parts.append("not converged")
    parts.append(str(record.get("message") or "")[:120])
    return "; ".join(p for p in parts if p).replace("|", "\\|")


def _find(records: Sequence[Record], system: str, variant: str) -> Record:
    for record in records:
        if record["system"] == system and record.get("variant", "") == variant:
            return record
    return {}


def _by_case(records: Sequence[Record]) -> dict[str, list[Record]]:
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(record["case"], []).append(record)
    return grouped


#: (title, system, variant) of the columns of ratios
GLMM_PEERS = (
    ("lme4", "lme4", "default"),
    ("lme4 without derivatives", "lme4", "calc.derivs=FALSE"),
    ("glmm", "glmm", ""),
    ("glmmTMB", "glmmTMB", ""),
    ("gpboost", "gpboost", ""),
)
LMM_PEERS = (*GLMM_PEERS[:-1], ("mixedlm", "mixedlm", ""), ("statsmodels", "statsmodels", ""))


def fits(records: list[Record]) -> str:
    """Ratios of all generalised models, then one table per case."""
    return _fits(records, "glmer()", GLMM_PEERS, _FIT_NOTES)


def linear_fits(records: list[Record]) -> str:
    """Ratios of all linear models, then one table per case."""
    return _fits(records, "lmer()", LMM_PEERS, _LINEAR_NOTES)


def _fits(records: list[Record], own_call: str, peers: Sequence[tuple[str, str, str]], notes: str) -> str:
    from .cases import FITS

    ratios, details = [], []
    for name, group in _by_case(records).items():
        own = _find(group, "glmmjax", "default")
        call, refit = seconds(own, "call"), seconds(own, "refit")
        row = [name, show_time(call), show_time(refit)]
        for _, system, variant in peers:
            peer = _find(group, system, variant)
            row += [show_ratio(peer, call), show_ratio(peer, refit)]
        ratios.append(row)
        details.append(fit_table(group, FITS[name]))
    header = ["case", own_call, "refit()"]
    for title, _, _ in peers:
        header += [f"{title} / {own_call}", f"{title} / refit()"]
    return (
        "Warm times of glmmjax, and how many times as long the peers take.\n\n"
        + table(header, ratios)
        + "\n"
        + notes
        + "\n"
        + "\n".join(details)
    )


_FIT_NOTES = """\
`glmer()`: the whole call on a DataFrame, formula included, and its standard errors. `refit()`: a new
response to estimates and standard errors. `first`: the first fit of a process, compilation included, imports
not; `first, cached`: the same in a new process that finds the compiled programs on disk. lme4 stops early by
default and its standard errors come from finite differences (none without derivatives): `above best` is what
its objective lacks. lme4's fits of more than half a minute run once. glmm runs with `anova_test="Wald"`,
without which it refits Poisson models for tests, and has no tolerance to set. gpboost gets arrays, and maximises
over variances alone, its coefficients in turn. `evaluations`: glmmjax counts
objective and gradient together, and `+` the final Hessian; glmm objective (+ gradient apart) and lme4
objective, of its last stage. `cores`: processor time over wall time of the warm calls. `above best`: how far
the objective is above the lowest of all systems on the same data.
"""

_LINEAR_NOTES = """\
`lmer()`: the whole call on a DataFrame, formula included, and its standard errors. `refit()`: a new response
to estimates and standard errors. `first`: the first fit of a process, compilation included, imports not;
`first, cached`: the same in a new process that finds the compiled programs on disk. All systems run at their
defaults, glmm without Satterthwaite's degrees of freedom (`with df`: with them, its default). Fits of more than
half a minute in a peer run once. `evaluations`: glmmjax counts objective, gradient and information together, the
others the objective (glmm's and mixedlm's gradients apart; statsmodels keeps no count). `peak MB`: of the whole
process, data, imports and compilation included; `MB before`: with the data and the package loaded, before the
first fit. `cores`: processor time over wall time of the warm calls. `above best`: how far the objective is above
the lowest of all systems on the same data; all of them include the same constants.
"""


def fit_table(group: Sequence[Record], case: Case) -> str:
    """All systems on one case."""
    rows = []
    for r in group:
        evaluations = _number(r.get("evaluations"), "d")
        if r.get("hessian_evaluations"):
            evaluations += f" + {r['hessian_evaluations']}"
        call = r.get("times", {}).get("call", {})
        repeats = str(call.get("repeats", ""))
        rows.append(
            [
                _label(r),
                _number(r.get("objective"), ".6f"),
                _number(r.get("above_best"), ".1e"),
                evaluations,
                show_time(seconds(r, "first")),
                show_time(seconds(r, "first_cached")),
                show_time(seconds(r, "call")),
                show_time(seconds(r, "refit")),
                repeats,
                _number(call.get("cores_used"), ".2f"),
                _number(r.get("memory", {}).get("before"), ".0f"),
                _number(r.get("memory", {}).get("peak"), ".0f"),
                _remarks(r),
            ]
        )
    header = [
        "system",
        case.criterion,
        "above best",
        "evaluations",
        "first",
        "first, cached",
        "warm call",
        "warm refit",
        "repeats",
        "cores",
        "MB before",
        "peak MB",
        "remarks",
    ]
    n = next((r["rows"] for r in group if r.get("rows")), None)
    return f"### {case.title}\n\n`{case.formula}`{f', {n:,} rows' if n else ''}\n\n{table(header, rows)}"


def inference(records: list[Record]) -> str:
    """One row per task and way."""
    rows = []
    for name, group in _by_case(records).items():
        peer = _find(group, "lme4", "")
        for r in group:
            if r["system"] != "glmmjax":
                continue
            value = " ".join(f"{v:.5g}" for v in r.get("value", []))
            other = " ".join(f"{v:.5g}" for v in peer.get("value", []))
            rows.append(
                [
                    name,
                    r.get("variant", ""),
                    show_time(seconds(r, "first")),
                    show_time(seconds(r, "call")),
                    show_time(seconds(peer, "call")),
                    show_ratio(peer, seconds(r, "call")),
                    value,
                    other,
                    str(peer.get("message", "")),
                ]
            )
    header = ["task", "way", "first", "warm", "lme4", "lme4 / warm", "value", "lme4's value", "remarks"]
    return table(header, rows) + "\n" + _INFERENCE_NOTES


_INFERENCE_NOTES = """\
The fit is outside the clock, in both systems. `first`: with compilation; `warm`: the same again on a refitted
model. `value`: of a profile the 95 % interval of the first parameter; of a bootstrap the standard errors of the first
two fixed effects; of a deletion the two largest Cook's distances on lme4's scale. lme4 profiles and deletes with its
default tolerances, on which its values depend; its bootstrap runs fewer replicates and its time is scaled up.
"""


def scaling(records: list[Record]) -> str:
    """One row per number of rows."""
    from .lmm_scaling import CASES, TARGET

    rows, notes = [], []
    for name, group in _by_case(records).items():
        notes.append(f"- `{name}`: {CASES[name].title}, `{CASES[name].formula}`.")
        for r in group:
            rows.append(
                [
                    name,
                    _number(r.get("rows"), ",d"),
                    str(r.get("levels", "")),
                    show_time(seconds(r, "evaluation")),
                    _number(r.get("ratio"), ".2f"),
                    _number(r.get("ratio_of_least"), ".2f"),
                    show_time(seconds(r, "cross")),
                    show_time(seconds(r, "refit")),
                    _number(r.get("evaluations"), "d"),
                    _number(r.get("memory", {}).get("peak"), ".0f"),
                    _remarks(r) or ("" if r.get("ratio", 0.0) <= TARGET else "above the target"),
                ]
            )
    header = [
        "case",
        "rows",
        "levels",
        "evaluation",
        "to the smallest",
        "least times",
        "cross-products",
        "refit",
        "evaluations of the fit",
        "peak MB",
        "remarks",
    ]
    return "\n".join(notes) + "\n\n" + table(header, rows) + "\n" + _SCALING_NOTES.format(target=TARGET)


_SCALING_NOTES = """\
`evaluation`: REML criterion and gradient at the starting values, from cross-products that are formed once per
fit in the time of `cross-products` (transfer to the device included). `to the smallest`: its median time over that
at the smallest number of rows; the target is within {target}. `least times`: the same of the least times, which
other work on the machine moves less. `refit`: cross-products and the whole search.
"""


def memory(records: list[Record]) -> str:
    """One row per design and fit."""
    from .memory import CASES

    rows, notes = [], []
    for name, group in _by_case(records).items():
        notes.append(f"- `{name}`: {CASES[name].title}, `{CASES[name].formula}`. Target: {CASES[name].target}.")
        for r in group:
            kept = r.get("memory", {})
            rows.append(
                [
                    f"{name}, {r.get('variant', '')}",
                    _number(r.get("rows"), ",d"),
                    str(r.get("levels", "")),
                    show_time(seconds(r, "first")),
                    show_time(seconds(r, "call")),
                    show_time(seconds(r, "refit")),
                    _number(kept.get("before"), ".0f"),
                    _number(kept.get("above"), ".0f"),
                    _number(kept.get("peak"), ".0f"),
                    _number(r.get("objective"), ".6f"),
                    _number(r.get("evaluations"), "d"),
                    _remarks(r),
                ]
            )
    header = [
        "case",
        "rows",
        "levels",
        "first",
        "call",
        "refit",
        "MB before",
        "MB above",
        "peak MB",
        "-2 log-likelihood",
        "evaluations",
        "remarks",
    ]
    return "\n".join(notes) + "\n\n" + table(header, rows)


def large(records: list[Record]) -> str:
    """One row per process."""
    from .large import CASES

    rows, notes = [], []
    for name, group in _by_case(records).items():
        case = CASES[name]
        notes.append(f"- `{name}`: {case.title}, `{case.formula}`, {case.n:,} rows, {case.m:,} groups in random order")
        for r in group:
            used = r.get("memory", {})
            rows.append(
                [
                    f"{name}, {r['system']} {r.get('variant', '')}".strip(),
                    show_time(seconds(r, "import")),
                    show_time(seconds(r, "first")),
                    show_time(seconds(r, "call")),
                    _number(used.get("before"), ".0f"),
                    _number(used.get("peak"), ".0f"),
                    _number(1e6 * used["above"] / r["rows"] if used else None, ".0f"),
                    _number(r.get("objective"), ".6f"),
                    _number(r.get("evaluations"), "d"),
                    _remarks(r),
                ]
            )
    header = ["process", "import", "first fit", "second fit", "MB before", "peak MB, first fit", "bytes per row above"]
    return "\n".join(notes) + "\n\n" + table([*header, "objective", "evaluations", "remarks"], rows)


def first(records: list[Record]) -> str:
    """Whole processes against R's, then glmmjax's stages."""
    from .first import CASES

    rows, stages, operations, notes = [], [], [], []
    for name, group in _by_case(records).items():
        case = CASES[name].case
        notes.append(f"- `{name}`: `{case.formula}`, {case.family}")
        lme4 = _find(group, "lme4", "")
        for r in group:
            if str(r.get("variant", "")).startswith("stages"):
                continue
            own, peer = seconds(r, "process"), seconds(lme4, "process")
            ratio = f"{own / peer:.2f}" if own and peer else ""
            spread = r.get("times", {}).get("process", {})
            rows.append(
                [
                    f"{name}, {_label(r)}",
                    show_time(own),
                    f"{show_time(spread.get('min'))} to {show_time(spread.get('max'))}" if spread else "",
                    ratio,
                    _number(r.get("memory", {}).get("peak"), ".0f"),
                    _remarks(r),
                ]
            )
        cold = _find(group, "glmmjax", "stages, nothing cached")
        warm = _find(group, "glmmjax", "stages, programs cached")
        for stage in dict.fromkeys([*cold.get("times", {}), *warm.get("times", {})]):
            stages.append([f"{name}, {stage}", show_time(seconds(cold, stage)), show_time(seconds(warm, stage))])
        operations += [[f"{name}, {k}", f"{v:,}"] for k, v in cold.get("operations", {}).items()]
    header = ["process", "seconds", "range", "of lme4's", "peak MB", "remarks"]
    text = "\n".join(notes) + "\n\n" + table(header, rows)
    text += "\nWhere glmmjax's time goes (stages in parentheses lie within others):\n\n"
    text += table(["stage", "nothing cached", "programs cached"], stages)
    return text + "\nOperations of the programs that are compiled:\n\n" + table(["program", "operations"], operations)


def provenance(runs: dict[str, dict[str, Any]]) -> str:
    """One sentence per run that contributed."""
    lines = []
    for date, e in runs.items():
        versions = ", ".join(
            f"{k} {e[k]}"
            for k in (
                "jax",
                "jaxlib",
                "numpy",
                "pandas",
                "glmm",
                "mixedlm",
                "gpboost",
                "statsmodels",
                "R",
                "lme4",
                "glmmTMB",
            )
            if e.get(k)
        )
        changed = " with uncommitted changes" if e.get("uncommitted_changes") else ""
        threads = ", ".join(f"{k} {v}" for k, v in e["threads"].items())
        lines.append(
            f"- {date}: commit {(e.get('commit') or 'unknown')[:12]}{changed}; Python {e['python']}, "
            f"{versions}; "
            f"{e['cpu']}, {e['cores']} cores; {threads}; load average before the run {e['load_average']}; "
            f"{e['precision']}."
        )
    return "\n".join(lines) + "\n"


def document(result: dict[str, Any], body: str) -> str:
    """The whole Markdown file of a suite."""
    top = f"# {result['title']}\n\nGenerated by `python -m benchmarks`."
    return f"{top}\n\n{body}\n## Runs\n\n{provenance(result['runs'])}"


if __name__ == "__main__":
    from .__main__ import SUITES

    found = json.loads(Path(sys.argv[1]).read_text())
    print(document(found, SUITES[found["suite"]].report(found["records"])))
