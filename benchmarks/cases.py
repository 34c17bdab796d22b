"""Named benchmark models: a formula, a family, and the data, prepared alike for every system."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

SEED = 20240917


@dataclass(frozen=True)
class Case:
    """One model.

    `formula` is R's and goes to glmmjax and lme4 as it stands; `formulas` holds what another system needs
    in its place (glmm 0.6 has no ``(a + b)^2``, wants 0/1 responses and plain columns in ``cbind``).
    """

    name: str
    title: str
    formula: str
    family: str
    load: Callable[[], pd.DataFrame]
    formulas: Mapping[str, str] = field(default_factory=dict)
    long: bool = False  # left out of --quick
    REML: bool | None = None  # of linear models; None: a generalised one
    nAGQ: int = 1
    cannot: Mapping[str, str] = field(default_factory=dict)  # systems without this model, and why

    @property
    def criterion(self) -> str:
        """What is minimised."""
        return "REML criterion" if self.REML else "-2 log-likelihood"

    def formula_for(self, system: str) -> str:
        return self.formulas.get(system, self.formula)

    def columns(self, data: pd.DataFrame) -> list[str]:
        """Columns of `data` that any of the formulas names."""
        words = set(re.findall(r"[A-Za-z_.][\w.]*", " ".join([self.formula, *self.formulas.values()])))
        return [str(c) for c in data.columns if c in words]

    def data(self) -> pd.DataFrame:
        """The columns the formulas use, ready to be fitted."""
        frame = self.load()
        return frame[self.columns(frame)].copy()


def _bundled(name: str) -> pd.DataFrame:
    import glmmjax as gj

    return gj.datasets.load(name)


def _cbpp() -> pd.DataFrame:
    data = _bundled("cbpp")
    return data.assign(healthy=data["size"] - data["incidence"])


def _contraception() -> pd.DataFrame:
    data = _bundled("contraception")
    return data.assign(use01=(data["use"] == "Y").astype(float))


def _verbagg() -> pd.DataFrame:
    data = _bundled("verbagg")
    return data.assign(r01=(data["r2"] == "Y").astype(float))


def insteval() -> pd.DataFrame:
    """InstEval with a binary response, y > 3."""
    data = _bundled("insteval")
    cell = (data["dept"].astype(str) + ":" + data["service"].astype(str)).astype("category")
    return data.assign(y01=(data["y"] > 3).astype(float), cell=cell)


def maximal(n_subj: int = 60, n_item: int = 40, columns: int = 5, seed: int = SEED) -> pd.DataFrame:
    """Binary responses of every subject to every item, with correlated slopes of all covariates on both.

    x1 to x3 are standard normal, the others 0/1; all vary within subjects and within items.
    """
    rng = np.random.default_rng(seed)
    n, k = n_subj * n_item, columns + 1
    subj, item = np.repeat(np.arange(n_subj), n_item), np.tile(np.arange(n_item), n_subj)
    X = np.ones((n, k))
    X[:, 1:4] = rng.standard_normal((n, 3))
    X[:, 4:] = rng.integers(0, 2, (n, k - 4))
    sd = np.array([1.0, 0.8, 0.8, 0.8, *[1.1] * (k - 4)])
    effects = []
    for levels in (n_subj, n_item):
        root = np.linalg.cholesky(0.8 * np.eye(k) + 0.2)  # correlations of 0.2
        effects.append(rng.standard_normal((levels, k)) @ root.T * sd)
    beta = np.array([-0.3, 0.5, -0.4, 0.3, 0.6, -0.5])[:k]
    eta = X @ beta + (X * (effects[0][subj] + effects[1][item])).sum(axis=1)
    data = pd.DataFrame({f"x{j}": X[:, j] for j in range(1, k)})
    data["subj"] = pd.Categorical([f"s{i + 1:03d}" for i in subj])
    data["item"] = pd.Categorical([f"i{i + 1:03d}" for i in item])
    data["y"] = (rng.random(n) < 1.0 / (1.0 + np.exp(-eta))).astype(float)
    return data


def nested(n_a: int = 10_000, b_per_a: int = 10, rows_per_b: int = 10, seed: int = SEED) -> pd.DataFrame:
    """Binary responses with b nested in a; the labels of b repeat within each a."""
    rng = np.random.default_rng(seed)
    n_b, n = n_a * b_per_a, n_a * b_per_a * rows_per_b
    cell = np.repeat(np.arange(n_b), rows_per_b)
    a = cell // b_per_a
    x = rng.standard_normal(n)
    eta = -0.5 + 0.7 * x + 0.8 * rng.standard_normal(n_a)[a] + 0.6 * rng.standard_normal(n_b)[cell]
    return pd.DataFrame(
        {
            "y": (rng.random(n) < 1.0 / (1.0 + np.exp(-eta))).astype(float),
            "x": x,
            "a": pd.Categorical.from_codes(a, dtype=pd.CategoricalDtype([f"a{i}" for i in range(n_a)])),
            "b": pd.Categorical.from_codes(
                cell % b_per_a, dtype=pd.CategoricalDtype([f"b{i}" for i in range(b_per_a)])
            ),
        }
    )


def binary_slopes(m: int = 10_000, n: int = 1_000_000, seed: int = SEED) -> pd.DataFrame:
    """Binary responses with random intercepts and slopes; m levels in random order."""
    rng = np.random.default_rng(seed)
    g = rng.integers(0, m, n)
    x = rng.standard_normal(n)
    b = rng.standard_normal((m, 2)) * [0.8, 0.4]
    eta = -0.5 + 0.7 * x + b[g, 0] + b[g, 1] * x
    y = (rng.random(n) < 1.0 / (1.0 + np.exp(-eta))).astype(float)
    return pd.DataFrame({"y": y, "x": x, "g": g})


def binary_crossed(n: int = 200_000, m_a: int = 5_000, m_b: int = 300, seed: int = SEED) -> pd.DataFrame:
    """Binary responses with two crossed factors, cells drawn at random."""
    rng = np.random.default_rng(seed)
    a, b = rng.integers(0, m_a, n), rng.integers(0, m_b, n)
    x = rng.standard_normal(n)
    eta = -0.3 + 0.5 * x + 0.9 * rng.standard_normal(m_a)[a] + 0.6 * rng.standard_normal(m_b)[b]
    return pd.DataFrame(
        {
            "y": (rng.random(n) < 1.0 / (1.0 + np.exp(-eta))).astype(float),
            "x": x,
            "a": pd.Categorical.from_codes(a, dtype=pd.CategoricalDtype([f"a{j}" for j in range(m_a)])),
            "b": pd.Categorical.from_codes(b, dtype=pd.CategoricalDtype([f"b{j}" for j in range(m_b)])),
        }
    )


def slopes(m: int = 100_000, n: int = 1_000_000, seed: int = SEED) -> pd.DataFrame:
    """Normal responses with correlated random intercepts and slopes; m levels of unequal sizes in random order."""
    rng = np.random.default_rng(seed)
    g = rng.permutation(np.concatenate([np.arange(m), rng.integers(0, m, n - m)]))  # every level has a row
    x = rng.standard_normal(n)
    effects = rng.standard_normal((m, 2)) @ np.array([[0.8, 0.15], [0.0, 0.4]])
    y = 1.0 + 0.5 * x + effects[g, 0] + effects[g, 1] * x + rng.standard_normal(n)
    levels = pd.CategoricalDtype([f"g{i}" for i in range(m)])
    return pd.DataFrame({"y": y, "x": x, "g": pd.Categorical.from_codes(g, dtype=levels)})


def crossed(n: int, m_a: int = 1_000, m_b: int = 50, seed: int = SEED) -> pd.DataFrame:
    """Normal responses with two crossed factors; the same 10 m_a cells are observed whatever n."""
    rng = np.random.default_rng(seed)
    i = np.arange(n)
    a = i % m_a
    b = (7 * a + 5 * ((i // m_a) % 10)) % m_b
    x = rng.standard_normal(n)
    y = 1.0 + 0.5 * x + 0.8 * rng.standard_normal(m_a)[a] + 0.6 * rng.standard_normal(m_b)[b] + rng.standard_normal(n)
    return pd.DataFrame(
        {
            "y": y,
            "x": x,
            "a": pd.Categorical.from_codes(a, dtype=pd.CategoricalDtype([f"a{j}" for j in range(m_a)])),
            "b": pd.Categorical.from_codes(b, dtype=pd.CategoricalDtype([f"b{j}" for j in range(m_b)])),
        }
    )


_X = " + ".join(f"x{j}" for j in range(1, 6))
_CM = "age*ch + I(age^2) + urban"
_VERBAGG = ("Anger", "Gender", "btype", "situ")
_PAIRS = [f"{a}:{b}" for i, a in enumerate(_VERBAGG) for b in _VERBAGG[i + 1 :]]

INSTEVAL_FORMULA = "y01 ~ service + (1 | s) + (1 | d) + (1 | dept:service)"

#: single fits of generalised models by the Laplace approximation, and by quadrature where the name says so
GLMM_FITS = {
    case.name: case
    for case in (
        Case(
            "cbpp",
            "cbpp: binomial counts, one factor",
            "cbind(incidence, size - incidence) ~ period + (1 | herd)",
            "binomial",
            _cbpp,
            {"glmm": "cbind(incidence, healthy) ~ period + (1 | herd)"},
        ),
        Case(
            "contraception_cm3",
            "Contraception cm3: binary, random intercept",
            f"use ~ {_CM} + (1 | district)",
            "binomial",
            _contraception,
            {"glmm": f"use01 ~ {_CM} + (1 | district)"},
        ),
        Case(
            "contraception_cm4",
            "Contraception cm4: binary, random intercept and slope",
            f"use ~ {_CM} + (urban | district)",
            "binomial",
            _contraception,
            {"glmm": f"use01 ~ {_CM} + (urban | district)"},
            long=True,
        ),
        Case(
            "cbpp_nagq25",
            "cbpp by adaptive quadrature with 25 points",
            "cbind(incidence, size - incidence) ~ period + (1 | herd)",
            "binomial",
            _cbpp,
            {"glmm": "cbind(incidence, healthy) ~ period + (1 | herd)"},
            nAGQ=25,
        ),
        Case(
            "contraception_cm3_nagq9",
            "Contraception cm3 by adaptive quadrature with 9 points",
            f"use ~ {_CM} + (1 | district)",
            "binomial",
            _contraception,
            {"glmm": f"use01 ~ {_CM} + (1 | district)"},
            nAGQ=9,
            long=True,
        ),
        Case(
            "contraception_cm4_nagq9",
            "Contraception cm4 by adaptive quadrature with 9 x 9 points",
            f"use ~ {_CM} + (urban | district)",
            "binomial",
            _contraception,
            {"glmm": f"use01 ~ {_CM} + (urban | district)"},
            nAGQ=9,
            cannot={"lme4": "nAGQ > 1 takes one scalar term"},
        ),
        Case(
            "grouseticks",
            "grouseticks: Poisson, three factors",
            "TICKS ~ YEAR + cHEIGHT + (1 | BROOD) + (1 | INDEX) + (1 | LOCATION)",
            "poisson",
            lambda: _bundled("grouseticks"),
        ),
        Case(
            "grouseticks_nbinom2",
            "grouseticks: negative binomial with its dispersion estimated, two factors",
            "TICKS ~ YEAR + cHEIGHT + (1 | BROOD) + (1 | LOCATION)",
            "nbinom2",
            lambda: _bundled("grouseticks"),
            cannot={"lme4": "glmer estimates no dispersion; its glmer.nb refits in turn"},
        ),
        Case(
            "verbagg",
            "VerbAgg: binary, two crossed factors",
            "r2 ~ (Anger + Gender + btype + situ)^2 + (1 | id) + (1 | item)",
            "binomial",
            _verbagg,
            {"glmm": f"r01 ~ {' + '.join([*_VERBAGG, *_PAIRS])} + (1 | id) + (1 | item)"},
            long=True,
        ),
        Case(
            "maximal",
            "maximal crossed model (simulated): binary, 60 subjects x 40 items, 2 x 21 covariance parameters",
            f"y ~ {_X} + ({_X} | subj) + ({_X} | item)",
            "binomial",
            maximal,
            long=True,
        ),
        Case(
            "insteval",
            "InstEval, y > 3: binary, three crossed factors, 73,421 rows",
            INSTEVAL_FORMULA,
            "binomial",
            insteval,
            {"glmm": "y01 ~ service + (1 | s) + (1 | d) + (1 | cell)"},
            long=True,
        ),
        Case(
            "crossed_200k",
            "simulated: binary, two crossed factors of 5,000 and 300 levels, 200,000 rows",
            "y ~ x + (1 | a) + (1 | b)",
            "binomial",
            binary_crossed,
            long=True,
        ),
    )
}

#: single fits of linear models
LMM_FITS = {
    case.name: case
    for case in (
        Case(
            "sleepstudy",
            "sleepstudy: random intercept and slope",
            "Reaction ~ Days + (Days | Subject)",
            "gaussian",
            lambda: _bundled("sleepstudy"),
            REML=True,
        ),
        Case(
            "penicillin",
            "Penicillin: two crossed factors",
            "diameter ~ 1 + (1 | plate) + (1 | sample)",
            "gaussian",
            lambda: _bundled("penicillin"),
            REML=True,
        ),
        Case(
            "pastes",
            "Pastes: two nested factors",
            "strength ~ 1 + (1 | batch/cask)",
            "gaussian",
            lambda: _bundled("pastes"),
            REML=True,
        ),
        Case(
            "chem97",
            "Chem97: 2,410 schools in 131 authorities",
            "score ~ gcsecnt + (1 | lea/school)",
            "gaussian",
            lambda: _bundled("chem97"),
            REML=True,
            long=True,
        ),
        Case(
            "insteval_ml",
            "InstEval: three crossed factors, by maximum likelihood",
            "y ~ service + (1 | s) + (1 | d) + (1 | dept:service)",
            "gaussian",
            lambda: _bundled("insteval"),
            REML=False,
            long=True,
        ),
        Case(
            "slopes_million",
            "correlated random slopes (simulated): 10^6 rows, 10^5 levels",
            "y ~ x + (x | g)",
            "gaussian",
            slopes,
            long=True,
            REML=True,
        ),
    )
}

FITS = {**GLMM_FITS, **LMM_FITS}
