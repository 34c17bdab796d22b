"""Thousands of random designs against R, in one process; run from the project's root:

    PYTHONPATH=tests python -m differential.live FOLDER --n 3000 --first 0 [--frozen] [--verify]

FOLDER holds everything: `designs.jsonl`, R's `answers.jsonl` (R is run for designs without an answer, unless --no-r),
`ours.jsonl` (one line per design: outcome, numbers, seconds, memory mappings of the process) and `table.md`. R's
answers are kept, so that a changed package is tried again without R; --skip-done goes on where a run stopped.
--verify evaluates R's objective at this package's parameters wherever the two optima differ.

Designs are fitted in the order of their structures, so that each program is compiled once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import comparison
from .comparison import Comparison, Fit, compare, fit
from .designs import Design, draw

SCRIPT = Path(__file__).with_name("answers.R")


def lines(path: Path) -> dict[int, dict[str, Any]]:
    """Records of a file of JSON lines by their seed; none where there is no file."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    return {record["seed"]: record for record in records}


def ask_r(mode: str, source: Path, target: Path) -> None:
    """Run answers.R over a file; what the target has already is not asked again."""
    subprocess.run(["Rscript", str(SCRIPT), mode, str(source), str(target)], check=True)


def record(design: Design, ours: Fit, found: Comparison, seconds: float) -> dict[str, Any]:
    """One line of ours.jsonl."""
    return {
        "seed": design.seed,
        "outcome": found.outcome,
        "difference": found.difference,
        "ours_at_r": found.ours_at_r,
        "detail": found.detail,
        "structure": design.structure.name,
        "kind": design.kind,
        "formula": design.formula,
        "family": design.family,
        "loglik": ours.loglik,
        "theta": ours.theta.tolist(),
        "beta": ours.fixef.tolist(),
        "se": ours.se.tolist(),
        "phi": ours.phi.tolist(),
        "converged": ours.converged,
        "singular": ours.singular,
        "evaluations": ours.evaluations,
        "messages": list(ours.messages),
        "seconds": round(seconds, 3),
        "maps": mappings(),
    }


def mappings() -> int:
    """Memory mappings of this process, of which Linux allows 65,530."""
    path = Path("/proc/self/maps")
    return path.read_text().count("\n") if path.exists() else 0


def run(designs: list[Design], answers: dict[int, dict[str, Any]], target: Path) -> list[dict[str, Any]]:
    """Fit and compare every design that R has an answer to, writing each as it ends."""
    records = []
    with target.open("a", encoding="utf-8") as out:
        for i, design in enumerate(designs):
            begin = time.perf_counter()
            ours = fit(design)
            took = time.perf_counter() - begin
            try:
                found = compare(design, answers[design.seed], ours)
            except Exception as error:  # the comparison itself evaluates our objective
                found = Comparison(comparison.OURS_FAILED, detail=f"comparison: {type(error).__name__}: {error}"[:200])
            records.append(record(design, ours, found, took))
            out.write(json.dumps(records[-1]) + "\n")
            out.flush()
            if found.outcome not in comparison.EXPLAINED:
                where = f"{design.structure.name} | {design.formula}"
                print(f"{i} seed {design.seed} {found.outcome}: {found.detail} | {where}", flush=True)
    return records


def verify(folder: Path, records: list[dict[str, Any]], designs: list[Design]) -> dict[int, float]:
    """R's log-likelihood at this package's parameters, for the designs whose optima differ."""
    by_seed = {design.seed: design for design in designs}
    different = (comparison.R_WORSE, comparison.OBJECTIVE, comparison.OURS_WORSE, comparison.OURS_SAYS)
    source, target = folder / "requests.jsonl", folder / "values.jsonl"
    target.unlink(missing_ok=True)
    with source.open("w", encoding="utf-8") as out:
        for r in records:
            if r["outcome"] in different:
                request = json.loads(by_seed[r["seed"]].to_json())
                request |= {"theta": r["theta"], "beta": r["beta"], "phi": r["phi"]}
                out.write(json.dumps(request) + "\n")
    ask_r("evaluate", source, target)
    return {seed: value["logLik"] for seed, value in lines(target).items() if isinstance(value.get("logLik"), float)}


def table(records: list[dict[str, Any]], answers: dict[int, dict[str, Any]], at_ours: dict[int, float]) -> str:
    """Outcomes with their counts, the different ones one by one, in Markdown."""
    counts = Counter(r["outcome"] for r in records)
    rows = [f"{len(records)} designs", "", "| outcome | designs |", "|---|---|"]
    rows += [f"| {outcome} | {count} |" for outcome, count in counts.most_common()]
    unexplained = sum(count for outcome, count in counts.items() if outcome not in comparison.EXPLAINED)
    rows += ["", f"Unexplained: {unexplained}", ""]
    rows += ["| seed | outcome | structure | formula | here | R | here at R's | R at ours | detail |", "|" + "---|" * 9]

    def bar(formula: str) -> str:
        return formula.replace("|", "\\|")

    for r in sorted(records, key=lambda r: (r["outcome"] in comparison.EXPLAINED, r["outcome"], r["seed"])):
        if r["outcome"] == comparison.AGREES:
            continue
        theirs = answers[r["seed"]].get("logLik")
        logliks = [r["loglik"], theirs, r["ours_at_r"], at_ours.get(r["seed"])]
        shown = ["" if v is None else f"{v:.6f}" for v in logliks]
        rows.append(
            f"| {r['seed']} | {r['outcome']} | {r['structure']} ({r['kind']}) | `{bar(r['formula'])}` | "
            + " | ".join(shown)
            + f" | {r['detail']} |"
        )
    return "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--frozen", action="store_true", help="structures of the frozen answers only")
    parser.add_argument("--no-r", action="store_true", help="compare what R has answered already")
    parser.add_argument("--skip-done", action="store_true", help="keep ours.jsonl and go on")
    parser.add_argument("--verify", action="store_true", help="evaluate R's objective at our parameters")
    asked = parser.parse_args(arguments)
    asked.folder.mkdir(parents=True, exist_ok=True)
    designs = [draw(seed, asked.frozen) for seed in range(asked.first, asked.first + asked.n)]
    source, target, ours = (asked.folder / f"{name}.jsonl" for name in ("designs", "answers", "ours"))
    if not asked.no_r:
        source.write_text("".join(design.to_json() + "\n" for design in designs), encoding="utf-8")
        ask_r("fit", source, target)
    answers = lines(target)
    if not asked.skip_done:
        ours.unlink(missing_ok=True)
    done = lines(ours)
    designs = sorted((d for d in designs if d.seed in answers), key=lambda d: (d.structure.name, d.seed))
    run([d for d in designs if d.seed not in done], answers, ours)
    records = list(lines(ours).values())
    at_ours = verify(asked.folder, records, designs) if asked.verify else {}
    text = table(records, answers, at_ours)
    (asked.folder / "table.md").write_text(text, encoding="utf-8")
    print(text[: text.index("| seed")])
    print(f"fits {sum(r['seconds'] for r in records):.0f} s, most memory mappings {max(r['maps'] for r in records)}")


if __name__ == "__main__":
    main()
