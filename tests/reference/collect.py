"""Copy the reference results that the tests need from a full reference folder to this one.

    python collect.py FOLDER

FOLDER holds data/, models/, fixed_params/, exact_marginal/ and inference/, as the R scripts beside this file
write them. Results on data sets that are not bundled with the package are left out (tests read them from the
folder itself), as are timings and the longest vectors; index.json lists all models, left out or not. No
number is rounded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDERS = ("models", "fixed_params", "exact_marginal", "inference")
NOT_BUNDLED = {"cbpp2", "classroom", "Owls", "Salamanders"}

# Vectors that are dropped where a model has more random effects than this.
LONG = {"u": 2000, "condVar": 4500}
INDEX_FIELDS = (
    "id dataset formula family link family_call engine nAGQ REML weights offset ziformula dispformula notes"
).split()


def slim(record: dict[str, Any]) -> dict[str, Any]:
    """One results file without what no test reads: timings, and u or condVar where they are very long."""
    record = {k: v for k, v in record.items() if k not in ("seed_doc", "elapsed_s", "data_file")}
    if "document" in str(record.get("notes", "")):  # remarks that refer to texts outside this repository
        record["notes"] = ""
    if "default_fit" in record and record["default_fit"] is not None:
        record["default_fit"] = {k: v for k, v in record["default_fit"].items() if k not in ("elapsed_s", "reps")}
    results = record.get("results", {})
    n_re = results.get("n_re", 0)
    dropped = {name for name, limit in LONG.items() if n_re > limit}
    if dropped:
        record["results"] = {k: v for k, v in results.items() if k not in dropped}
    return record


def write(path: Path, value: Any) -> None:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def main(source: Path) -> None:
    index = []
    for folder in FOLDERS:
        target = HERE / folder
        target.mkdir(exist_ok=True)
        for old in target.glob("*.json"):
            old.unlink()
        for path in sorted((source / folder).glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            bundled = record.get("dataset") not in NOT_BUNDLED
            if folder == "models":
                row = {k: record.get(k) for k in INDEX_FIELDS}
                row |= {
                    "n": record["results"]["nobs"],
                    "logLik": record["results"]["logLik"],
                    "bundled": bundled,
                }
                index.append(row)
            if bundled:
                write(target / path.name, slim(record))
    lines = ",\n".join(json.dumps(row, separators=(",", ":"), allow_nan=False) for row in index)
    (HERE / "index.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    size = sum(p.stat().st_size for p in HERE.rglob("*.json"))
    copied = sum(row["bundled"] for row in index)
    print(f"{len(index)} models listed, {copied} copied, {size / 1e6:.2f} MB in all")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
