"""Every picture says what to install where matplotlib is missing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

import pytest
from helpers import load_data

import glmmjax as gj


@cache
def cbpp() -> gj.MixedModel:
    return gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", load_data("cbpp"))


PICTURES: dict[str, Callable[[], object]] = {
    "integrands": lambda: cbpp().plot_integrands(),
    "influence": lambda: cbpp().influence("herd").plot(),
    "zeta": lambda: cbpp().profile("period2", limit=2.0).plot(),
    "pairs": lambda: cbpp().profile(["period2", "period3"], limit=2.0).plot("pairs"),
    "lm_list": lambda: gj.lm_list("Reaction ~ Days | Subject", load_data("sleepstudy")).plot(),
    "structure": lambda: gj.structure(cbpp()).plot(),
    "diagnostics": lambda: gj.plots.diagnostics(cbpp()),
}


@pytest.mark.parametrize("name", PICTURES)
def test_missing_matplotlib(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib: python -m pip install 'glmmjax\[plots\]'"):
        PICTURES[name]()
