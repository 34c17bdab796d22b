"""Freezes R's answers to random designs; run from the project's root, with R, lme4 and glmmTMB installed:

    PYTHONPATH=tests python tests/reference/differential/freeze.py FOLDER [--n 300]

FOLDER is a working folder of `differential.live` (R's answers in it are kept). Writes `answers.jsonl.gz`, one line per
design with R's estimates and the outcome of the comparison, and `explained.md`, the designs in which the two differ
with both objectives at both optima. The designs follow from their seeds, see `tests/differential/designs.py`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
from pathlib import Path
from typing import Any

from differential import comparison, live

HERE = Path(__file__).parent
KEPT = ("logLik", "names", "fixef", "se", "theta", "sigma", "phi", "cov", "singular", "nobs", "error")


def rounded(value: Any) -> Any:
    """Numbers with eleven significant digits, which is beyond what optima determine."""
    if isinstance(value, float):
        return float(f"{value:.11g}")
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return value


def versions() -> str:
    """Of R and the packages that answered."""
    script = 'cat(R.version.string); for (p in c("lme4", "glmmTMB")) cat(",", p, as.character(packageVersion(p)))'
    return subprocess.run(["Rscript", "-e", script], check=True, capture_output=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--skip-done", action="store_true", help="keep the fits of this package that FOLDER has")
    asked = parser.parse_args()
    live.main([str(asked.folder), "--n", str(asked.n), "--frozen", "--verify", *["--skip-done"] * asked.skip_done])
    answers, ours = live.lines(asked.folder / "answers.jsonl"), live.lines(asked.folder / "ours.jsonl")
    at_ours = {s: v["logLik"] for s, v in live.lines(asked.folder / "values.jsonl").items() if "logLik" in v}
    wrong = [r for r in ours.values() if r["outcome"] not in comparison.EXPLAINED]
    if wrong:
        raise SystemExit(f"{len(wrong)} unexplained: " + "; ".join(f"{r['seed']} {r['outcome']}" for r in wrong))
    with gzip.GzipFile(HERE / "answers.jsonl.gz", "wb", mtime=0) as out:
        for seed in range(asked.n):
            record = {k: rounded(answers[seed][k]) for k in KEPT if answers[seed].get(k) is not None}
            more = {"formula": ours[seed]["formula"], "outcome": ours[seed]["outcome"], "at_ours": at_ours.get(seed)}
            out.write((json.dumps({"seed": seed} | more | record) + "\n").encode())
    text = live.table(list(ours.values()), answers, at_ours)
    (HERE / "explained.md").write_text(f"# Frozen designs: outcomes\n\n{versions()}\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
