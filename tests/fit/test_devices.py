"""Fits on eight forced devices and in two processes: the numbers of one device."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import ROOT, assert_close, load_data

import glmmjax as gj
from glmmjax import _glmer
from glmmjax.fit import shards

WORKER = Path(__file__).with_name("devices_worker.py")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def outcomes(processes: int, devices: int) -> list[dict[str, Any]]:
    """What each process found."""
    cache = os.environ.get("GLMMJAX_TEST_CACHE") or str(ROOT / ".jax_cache")
    env = {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "GLMMJAX_CACHE": cache,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    port = str(free_port())
    with ExitStack() as stack:  # files, not pipes: a process that waits to be read keeps the others from ending
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(processes)]
        command = [sys.executable, str(WORKER), str(processes)]
        running = [
            stack.enter_context(subprocess.Popen([*command, str(rank), port], env=env, stdout=f, stderr=f))
            for rank, f in enumerate(files)
        ]
        try:
            for process in running:
                process.wait(timeout=150)
        finally:
            for process in running:
                process.kill()
        texts = []
        for f in files:
            f.seek(0)
            texts.append(f.read())
    out = []
    for text in texts:
        lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
        assert lines, text[-3000:]
        out.append(json.loads(lines[0].removeprefix("RESULT ")))
    return out


@pytest.fixture(scope="module")
def eight() -> dict[str, Any]:
    return outcomes(1, 8)[0]


def check(found: dict[str, Any], alone: dict[str, Any], names: tuple[str, ...]) -> None:
    for name in names:
        one, everyone = alone[name]["one"], found[name]["all"]
        assert one["converged"] and everyone["converged"], name
        assert one["index"] == everyone["index"]
        for quantity in ("objective", "parameters", "vcov", "modes", "fitted", "residuals"):
            assert_close(everyone[quantity], one[quantity], rtol=1e-8, atol=1e-8, what=f"{name}: {quantity}")
    assert found["crossed"].startswith("grouping factors 'g' and 'c' are crossed")
    assert_close(found["many"]["all"], alone["many"]["one"], rtol=1e-10, atol=1e-10)


def test_eight_devices(eight: dict[str, Any]) -> None:
    assert eight["devices"] == 8
    check(eight, eight, ("slope", "nested", "joint", "refit", "crossed linear"))


def test_two_processes(eight: dict[str, Any]) -> None:
    for own in outcomes(2, 1):
        assert own["devices"] == 2
        check(own, eight, ("slope", "crossed linear"))


def test_ends_of_parts() -> None:
    """Parts are of about equal weight, and none is empty."""
    for weights, parts in (([1, 1, 1, 1], 2), ([100, 1, 1], 3), ([1, 1, 100], 3), ([5] * 40, 8)):
        ends = shards._ends(np.array(weights), parts)
        assert ends[0] == 0 and ends[-1] == len(weights) and (np.diff(ends) > 0).all()
    assert shards._ends(np.array([5] * 40), 8).tolist() == list(range(0, 41, 5))


def test_one_device_by_name(cbpp: Any) -> None:
    formula = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
    default = gj.glmer(formula, cbpp, "binomial")
    for device in ("cpu", jax.devices("cpu")[0]):
        named = gj.glmer(formula, cbpp, "binomial", device=device)
        assert_close(named.objective, default.objective, rtol=1e-12)


def test_update_keeps_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    m = gj.glmer("incidence ~ 1 + (1 | herd)", load_data("cbpp"), "poisson", device="cpu")
    seen: list[Any] = []
    monkeypatch.setattr(_glmer, "fit", lambda setup, start, verbose, device: seen.append(device) or m)
    m.update(". ~ . + period")
    m.update(". ~ . + period", device=None)
    assert seen == ["cpu", None]
