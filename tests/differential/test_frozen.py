"""300 random designs against frozen answers of R: agreement, or a difference that evaluating shows to be R's."""

from __future__ import annotations

import gzip
import json
from functools import lru_cache
from typing import Any

import pytest
from helpers import REFERENCE

from .comparison import AGREES, EXPLAINED, LOGLIK, R_WORSE, compare, fit
from .designs import FROZEN, Design, draw


@lru_cache(maxsize=1)
def answers() -> dict[int, dict[str, Any]]:
    """R's answers, with the outcome that was found when they were frozen, by seed."""
    with gzip.open(REFERENCE / "differential" / "answers.jsonl.gz", "rt", encoding="utf-8") as file:
        return {record["seed"]: record for record in map(json.loads, file)}


@lru_cache(maxsize=1)
def designs() -> list[Design]:
    return [draw(seed, frozen=True) for seed in answers()]


@pytest.mark.parametrize("structure", FROZEN, ids=lambda s: s.name.replace(" ", "_"))
def test_frozen_answers(structure: Any) -> None:
    wrong = []
    for design in designs():
        if design.structure != structure:
            continue
        answer = answers()[design.seed]
        assert design.formula == answer["formula"], "the generator draws other designs: freeze R's answers again"
        found = compare(design, answer, fit(design))
        if found.outcome not in (AGREES, answer["outcome"]):
            wrong.append(f"seed {design.seed}, {design.formula}: {found}")
    assert not wrong, "\n".join(wrong)


def test_explained_differences_are_shown() -> None:
    """Where R's optimum is the worse one, R's own objective says so at the parameters found here."""
    worse = [answer for answer in answers().values() if answer["outcome"] == R_WORSE]
    assert all(answer["outcome"] in EXPLAINED for answer in answers().values())
    assert worse
    for answer in worse:
        assert answer["at_ours"] > answer["logLik"] + 0.4 * LOGLIK, answer["seed"]
