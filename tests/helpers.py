"""What several test files share: reference results, data, comparisons and finite differences.

Results of R live in tests/reference. Those on four data sets that are not bundled with the package stay
outside the repository, in the folder named by GLMMJAX_REFERENCE (default: ../shared/reference beside the
repository); tests that need them are skipped where it is absent.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from glmmjax import datasets

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "tests" / "reference"
OUTSIDE = Path(os.environ.get("GLMMJAX_REFERENCE") or ROOT.parent / "shared" / "reference")
NOT_BUNDLED = ("cbpp2", "classroom", "Owls", "Salamanders")
_NOT_BUNDLED_FILES = {  # results outside models/ that are on data sets which are not bundled
    "fixed_params": ("lmm_classroom", "owls_offset"),
    "exact_marginal": ("owls_offset", "owls_slope2d"),
    "inference": ("anova_cbpp2",),
}


# -------------------- reference results
@lru_cache(maxsize=1)
def model_index() -> dict[str, dict[str, Any]]:
    """One row per fitted model of R: id -> dataset, formula, family, engine, nAGQ, REML, ..., bundled."""
    rows = json.loads((REFERENCE / "index.json").read_text(encoding="utf-8"))
    return {row["id"]: row for row in rows}


def all_models(where: Callable[[dict[str, Any]], bool] | None = None, **fields: Any) -> list[str]:
    """Ids of the models whose index row has these field values and satisfies `where`, for parametrize.

    Example: all_models(engine="lme4::glmer", nAGQ=1, dataset="cbpp"). Raises where nothing is left, so that
    no test is silently empty.
    """
    unknown = set(fields) - set(next(iter(model_index().values())))
    if unknown:
        raise KeyError(f"the index has no fields {sorted(unknown)}")
    found = [
        name
        for name, row in model_index().items()
        if all(row[k] == v for k, v in fields.items()) and (where is None or where(row))
    ]
    if not found:
        raise LookupError(f"no reference model has {fields}")
    return found


def _result(folder: str, name: str) -> dict[str, Any]:
    path = REFERENCE / folder / f"{name}.json"
    if not path.exists():
        outside = (
            not model_index()[name]["bundled"]
            if folder == "models" and name in model_index()
            else name in _NOT_BUNDLED_FILES.get(folder, ())
        )
        if not outside:
            raise FileNotFoundError(f"no reference result {folder}/{name}")
        path = OUTSIDE / folder / f"{name}.json"
        if not path.exists():
            pytest.skip(f"{folder}/{name} is on a data set that is not bundled (set GLMMJAX_REFERENCE)")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def reference_model(name: str) -> dict[str, Any]:
    """The record of one fitted model; numbers are in its "results". Skips the test where it is absent."""
    return _result("models", name)


def fixed_params(name: str) -> dict[str, Any]:
    """Objective values at fixed parameters. Skips the test where they are not available."""
    return _result("fixed_params", name)


def exact_marginal(name: str) -> dict[str, Any]:
    """Near-exact marginal log-likelihoods. Skips the test where they are not available."""
    return _result("exact_marginal", name)


def inference(name: str) -> dict[str, Any]:
    """Profiles, tables, predictions, moments of simulations. Skips the test where they are not available."""
    return _result("inference", name)


# -------------------- data
def read_outside(name: str) -> pd.DataFrame:
    """A data set from the folder outside the repository, rebuilt from its CSV file and sidecar of types."""
    sidecar = OUTSIDE / "data" / f"{name}.json"
    if not sidecar.exists():
        pytest.skip(f"data set {name} is not bundled (set GLMMJAX_REFERENCE)")
    spec = json.loads(sidecar.read_text(encoding="utf-8"))
    text = pd.read_csv(sidecar.parent / spec["file"], dtype=str, keep_default_na=False)
    out = {}
    for column in spec["columns"]:
        values = text[column["name"]].to_numpy(dtype=object)
        missing = values == ""
        if "levels" in column:
            levels = [str(level) for level in column["levels"]]
            values = np.where(missing, None, values)
            out[column["name"]] = pd.Categorical(values, levels, ordered=column["type"] == "ordered")
        elif column["type"] == "integer" and not missing.any():
            out[column["name"]] = np.array([int(v) for v in values], dtype=np.int64)
        else:
            out[column["name"]] = np.array([float(v) if v else np.nan for v in values])
    return pd.DataFrame(out)


def load_data(name: str) -> pd.DataFrame:
    """A data set by R's name: bundled, or one of the four that are not (skips the test where absent)."""
    return read_outside(name) if name in NOT_BUNDLED else datasets.load(name)


# -------------------- comparisons
def assert_close(actual: Any, desired: Any, *, rtol: float = 0.0, atol: float = 0.0, what: str = "") -> None:
    """|actual - desired| <= atol + rtol |desired| everywhere, equal shapes, no NaN; `what` names it."""
    a, d = np.asarray(actual, dtype=float), np.asarray(desired, dtype=float)
    assert a.shape == d.shape, f"{what}: shape {a.shape}, expected {d.shape}"
    assert not np.isnan(d).any(), f"{what}: the expected value has NaN"
    np.testing.assert_allclose(a, d, rtol=rtol, atol=atol, equal_nan=False, err_msg=what)


def sd_scaled(actual: Any, desired: Any, se: Any) -> float:
    """Largest |actual - desired| in units of the standard errors `se`."""
    a, d, s = (np.asarray(v, dtype=float) for v in (actual, desired, se))
    assert a.shape == d.shape == s.shape and (s > 0).all()
    return float(np.max(np.abs(a - d) / s))


# -------------------- finite differences
def fd_gradient(f: Callable[[np.ndarray], Any], x: Any, h: float = 1e-5) -> np.ndarray:
    """Central differences of f at the vector x (f's shape first, then x's); steps h (1 + |x_i|)."""
    x = np.asarray(x, dtype=float)
    columns = []
    for i in range(x.size):
        e = np.zeros_like(x)
        e[i] = h * (1.0 + abs(x[i]))
        columns.append((np.asarray(f(x + e), dtype=float) - np.asarray(f(x - e), dtype=float)) / (2.0 * e[i]))
    return np.stack(columns, axis=-1)


def fd_hessian_from_grad(grad: Callable[[np.ndarray], Any], x: Any, h: float = 1e-5) -> np.ndarray:
    """Symmetrised Hessian at the vector x by central differences of its gradient function."""
    hessian = fd_gradient(grad, x, h)
    return 0.5 * (hessian + hessian.T)
