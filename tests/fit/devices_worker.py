"""Run by test_devices.py in processes of its own: fits on one device and on all, as JSON on standard output.

Arguments: number of processes, rank, port of the first; XLA_FLAGS gives the devices of each process.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import jax
import numpy as np
import pandas as pd


def table() -> pd.DataFrame:
    """Ragged groups nested in ragged regions, in no order."""
    rng = np.random.default_rng(7)
    n = 700
    g = rng.choice(40, n, p=rng.dirichlet(np.full(40, 2.0)))
    x = rng.normal(size=n)
    b = rng.normal(size=(40, 2)) * [0.7, 0.4]
    r = rng.normal(size=12) * 0.5
    eta = -0.3 + 0.6 * x + b[g, 0] + b[g, 1] * x + r[g % 12]
    y = (rng.random(n) < 1.0 / (1.0 + np.exp(-eta))).astype(float)
    c = rng.integers(0, 11, n)
    v = eta + rng.normal(size=11)[c] + rng.normal(size=n)
    data = {"y": y, "x": x, "g": g, "r": g % 12, "c": c, "v": v}
    return pd.DataFrame(data, index=rng.permutation(n))


def counts() -> pd.DataFrame:
    """30 small datasets of unequal size."""
    rng = np.random.default_rng(3)
    parts = []
    for i in range(30):
        n = int(rng.integers(40, 60))
        g, x = rng.integers(0, 6, n), rng.normal(size=n)
        y = rng.poisson(np.exp(0.4 + 0.3 * x + 0.5 * rng.normal(size=6)[g]))
        parts.append(pd.DataFrame({"set": i, "y": y, "x": x, "g": g}))
    return pd.concat(parts, ignore_index=True)


def numbers(model: Any) -> dict[str, Any]:
    """What is compared of a fit."""
    ranef = model.ranef(condVar=False)
    frames = list(ranef.values()) if isinstance(ranef, dict) else [ranef]
    modes = np.concatenate([frame.select_dtypes("number").to_numpy(float).reshape(-1) for frame in frames])
    return {
        "objective": model.objective,
        "parameters": [*model.theta, *model.beta, model.sigma],
        "vcov": np.asarray(model.vcov()).reshape(-1).tolist(),
        "modes": modes.tolist(),
        "fitted": model.fitted.tolist(),
        "residuals": model.residuals().tolist(),
        "index": model.fitted.index.tolist(),
        "converged": model.converged,
    }


def estimates(many: Any) -> list[float]:
    arrays = many.arrays
    return np.concatenate([arrays["theta"].reshape(-1), arrays["beta"].reshape(-1)]).tolist()


def main() -> None:
    processes, rank, port = (int(v) for v in sys.argv[1:])
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, rank)
    import glmmjax as gj

    warnings.simplefilter("error")
    data, everyone = table(), jax.devices()
    out: dict[str, Any] = {"devices": len(everyone)}
    tight = {"control": {"tol": 1e-13}}  # the search's own tolerance leaves 5e-8 in the parameters
    fits = {
        "slope": lambda device: gj.glmer("y ~ x + (x | g)", data, "binomial", device=device, **tight),
        "nested": lambda device: gj.glmer("y ~ x + (1 | r/g)", data, "binomial", device=device, **tight),
        "joint": lambda device: gj.glmer("y ~ x + (1 | g)", data, "binomial", nAGQ=0, device=device, **tight),
        "crossed linear": lambda device: gj.lmer("v ~ x + (x | g) + (1 | c)", data, device=device),
    }
    for name, fit in fits.items():
        if processes == 1:
            out[name] = {"one": numbers(fit(None)), "all": numbers(fit(everyone))}
        elif name in ("slope", "crossed linear"):  # programs are compiled in each process
            out[name] = {"all": numbers(fit(everyone))}
    other = 1.0 - data["y"]
    if processes == 1:
        slope = fits["slope"]
        out["refit"] = {"one": numbers(slope(None).refit(other)), "all": numbers(slope(everyone).refit(other))}
    try:
        gj.glmer("y ~ x + (1 | g) + (1 | c)", data, "binomial", device=everyone)
    except gj.DataError as error:
        out["crossed"] = str(error)
    ids = {"data": counts(), "by": "set", "family": "poisson"}
    out["many"] = {"all": estimates(gj.fit_many("y ~ x + (1 | g)", **ids))}
    if processes == 1:
        out["many"]["one"] = estimates(gj.fit_many("y ~ x + (1 | g)", device=everyone[0], **ids))
    print("RESULT " + json.dumps(out))


if __name__ == "__main__":
    main()
