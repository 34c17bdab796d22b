"""Random designs from a seed: formulas, families, settings and tables, the same for R and for this package.

Designs are drawn in few shapes, because a program is compiled for each: `STRUCTURES` lists them, and everything else
(formulas with the same numbers of columns, types of columns, values, scales, weights, offsets, missing values, true
parameters) is drawn on top. Designs of one grouping factor have their rows and levels inside one bucket of
`glmmjax.model.buckets`; the rows of designs of several factors are those of their structure, shuffled and
relabelled.

Random numbers are integers, uniforms and normals of PCG64, whose streams NumPy keeps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

Generator = np.random.Generator

#: left-hand sides of bars by their number of columns: formula and the variable that bears the slope
LEFT = {
    1: (("1", None), ("1", None), ("1", None), ("0 + x", "x")),
    2: (
        *(("x", "x"), ("x", "x"), ("b", "b"), ("d", "d"), ("0 + d", "d")),
        *(("log(u)", "u"), ("1 + I(z^2)", "z"), ("0 + x + z", "x"), ("sqrt(u)", "u")),
    ),
    3: (("f", "f"), ("0 + f", "f"), ("x + z", "x"), ("poly(x, 2)", "x"), ("x + d", "x"), ("b + z", "z")),
}
#: fixed parts by their number of columns
FIXED = {
    1: ("1",),
    2: ("x", "b", "log(u)", "d", "0 + d", "I(x^2)", "i", "sqrt(u)", "I(x > 0)", "x + I(2 * x)"),
    3: (
        *("x + z", "x + I(x^2)", "poly(x, 2)", "f", "x + b", "log(u) + i", "x + d", "0 + f", "i + b"),
        *("scale(x) + z", "x / d", "poly(x, 2, raw = TRUE)", "x + z + I(x - z)", "sqrt(u) + b"),
    ),
    4: (
        *("x * d", "f + x", "x * b", "poly(x, 2) + d", "poly(x, 3)", "x * z", "f + b", "d + log(u) + i"),
        *("d / x", "f:x", "scale(u) * z", "f + d - 1"),
    ),
    6: ("f * x", "f * d", "poly(x, 2) * d", "x * z + f", "f + x + b + i", "f / z"),
}
#: random parts: bars as (grouping, columns, one of "|", "||", "+"); levels of the factors they name
RANDOM = {
    "one": ((("g", 1, "|"),), {}),
    "slope": ((("g", 2, "|"),), {}),
    "diagonal": ((("g", 2, "||"),), {}),
    "three": ((("g", 3, "|"),), {}),
    "crossed": ((("g", 1, "|"), ("h", 1, "|")), {"g": 14, "h": 6}),
    "crossed slope": ((("g", 2, "|"), ("h", 1, "|")), {"g": 15, "h": 7}),
    "crossed slopes": ((("g", 2, "|"), ("h", 2, "|")), {"g": 16, "h": 8}),
    "nested": ((("a/c", 1, "|"),), {"a": 7, "c": 4}),
    "nested slope": ((("a", 2, "|"), ("a:c", 1, "|")), {"a": 8, "c": 3}),
    "diagonal crossed": ((("g", 2, "||"), ("h", 1, "|")), {"g": 13, "h": 6}),
    "three factors": ((("g", 1, "|"), ("h", 1, "|"), ("k", 1, "|")), {"g": 17, "h": 9, "k": 5}),
    "nested and crossed": ((("a/c", 1, "|"), ("h", 1, "|")), {"a": 6, "c": 4, "h": 5}),
}


@dataclass(frozen=True)
class Structure:
    """What decides the compiled programs of a design.

    Attributes:
        family: as R writes it, "gaussian" for lmer; `{k}` stands for a number that is drawn.
        nAGQ: 0, 1 or points of quadrature. REML: of lmer.
        random: key of `RANDOM`. p: columns of the fixed part.
        rows: most rows of the bucket (n lies in its last eighth), and n itself with several factors.
        levels: most levels of the bucket, for one factor.
        frozen: whether it is among those of the frozen answers.
    """

    family: str
    random: str
    p: int
    nAGQ: int = 1
    REML: bool = False
    rows: int = 256
    levels: int = 20
    frozen: bool = False

    @property
    def name(self) -> str:
        kind = "reml" if self.REML else f"nAGQ={self.nAGQ}"
        return f"{self.family} {kind} {self.random} p={self.p} n={self.rows}"


def _structures() -> tuple[Structure, ...]:
    found: list[Structure] = []

    def add(family: str, random: str, p: int, frozen: bool = False, **rest: Any) -> None:
        found.append(Structure(family, random, p, frozen=frozen, **rest))

    for i, (random, p) in enumerate(
        zip(RANDOM, (3, 4, 2, 4, 3, 4, 2, 3, 4, 3, 1, 3), strict=True),
    ):
        add("gaussian", random, p, REML=True, frozen=i in (0, 1, 2, 3, 4, 6, 8, 10))
        add("gaussian", random, 2 if p == 3 else p, frozen=i in (1, 3, 5, 9, 11), rows=192)
        add("binomial", random, p, frozen=i in (0, 1, 2, 3, 5, 7, 10))
        add("poisson", random, p if i % 2 else 2, frozen=i in (0, 1, 4, 8))
    add("gaussian", "slope", 6, REML=True, rows=96, levels=10)
    add("gaussian", "one", 1, REML=True, rows=64, levels=8)
    for link in ("probit", "cloglog", "cauchit"):
        for random, p in (("one", 3), ("slope", 2), ("crossed", 3)):
            add(f"binomial({link})", random, p, frozen=random == "slope" or link == "probit" and random == "crossed")
    for family, first, second in (("binomial(log)", 2, 2), ("poisson(identity)", 2, 2), ("poisson(sqrt)", 3, 4)):
        add(family, "one", first, frozen=True)
        add(family, "slope", second, frozen="sqrt" in family)
        add(family, "crossed", second)
    for random, p in (("one", 3), ("slope", 3), ("crossed", 3), ("nested", 2)):
        add("nbinom2", random, p, frozen=random in ("one", "slope"))
        add("negative.binomial({k})", random, p, frozen=random == "one")
    for random, p, nAGQ in (("one", 3, 5), ("one", 4, 11)):  # lme4 has quadrature for one random effect
        add("binomial", random, p, nAGQ=nAGQ, frozen=nAGQ == 5)
    add("poisson", "one", 3, nAGQ=9, frozen=True)
    add("binomial(cloglog)", "one", 3, nAGQ=7)
    add("poisson(sqrt)", "one", 2, nAGQ=7)
    add("negative.binomial({k})", "one", 2, nAGQ=6)
    for random, p in (("one", 4), ("slope", 3), ("crossed slope", 3), ("nested", 2)):
        add("binomial", random, p, nAGQ=0, frozen=random in ("one", "crossed slope"))
        add("poisson", random, p, nAGQ=0, frozen=random == "slope")
    add("binomial(probit)", "one", 2, nAGQ=0)
    add("binomial", "slope", 6, rows=384, levels=28)
    add("binomial", "one", 3, rows=64, levels=10)
    add("poisson", "one", 2, rows=64, levels=10)
    return tuple(found)


STRUCTURES = _structures()
FROZEN = tuple(s for s in STRUCTURES if s.frozen)


@dataclass(frozen=True, eq=False)
class Design:
    """One model to be fitted: formula, settings and table.

    Attributes:
        seed: all of it follows from the seed (and from whether frozen structures only are drawn).
        kind: what is special about the data ("plain", "singular", "strong", "scaled", "shifted").
        formula, family, nAGQ, REML: as the structure has them, with names and numbers filled in.
        weights, offset: names of columns, or None.
        data: the table; types of columns differ between designs.
    """

    seed: int
    structure: Structure
    kind: str
    formula: str
    family: str
    weights: str | None
    offset: str | None
    data: pd.DataFrame

    def to_json(self) -> str:
        """One line for `answers.R`: values to the last bit, levels of factors in their order."""
        columns: dict[str, Any] = {}
        for name, column in self.data.items():
            values = [None if pd.isna(v) else v.item() if hasattr(v, "item") else v for v in column]
            entry: dict[str, Any] = {"values": values}
            if isinstance(column.dtype, pd.CategoricalDtype):
                entry |= {"levels": [str(v) for v in column.cat.categories], "ordered": bool(column.cat.ordered)}
                entry["values"] = [None if v is None else str(v) for v in values]
            columns[str(name)] = entry
        family, _, rest = self.family.partition("(")
        inside = rest.rstrip(")")
        link = inside if family in ("binomial", "poisson") and inside else None
        shape = float(inside) if family == "negative.binomial" else None
        s = self.structure
        record = {"seed": self.seed, "formula": self.formula, "family": family, "link": link, "shape": shape}
        record |= {"nAGQ": s.nAGQ, "REML": s.REML, "weights": self.weights, "offset": self.offset, "columns": columns}
        return json.dumps(record)


def draw(seed: int, frozen: bool = False) -> Design:
    """The design of a seed: same seed, same design, on every machine.

    Args:
        frozen: only structures whose answers are frozen.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    structures = FROZEN if frozen else STRUCTURES
    at = int(rng.integers(len(structures)))
    structure = structures[at]
    kind = _pick(rng, ("plain", "plain", "plain", "singular", "singular", "strong", "scaled", "shifted"))
    if kind == "strong" and "sqrt" in structure.family:
        kind = "plain"  # linear predictors below 0 are another branch of the link, which is R's only
    bars, sizes = RANDOM[structure.random]
    rows = _rows(structure, rng, sizes)
    n = len(next(iter(rows.values())))
    family = structure.family.format(k=_pick(rng, ("0.5", "1", "2.5", "10")))

    x, z = rng.normal(size=n), rng.uniform(size=n)
    if rng.uniform() < 0.25:  # constant within the levels of a factor
        first = rows[next(iter(rows))]
        x = rng.normal(size=first.max() + 1)[first]
    base = {
        "x": x,
        "z": z * 2.0 - 1.0,
        "u": np.exp(0.7 * rng.normal(size=n)),
        "b": rng.uniform(size=n) < 0.4,
        "i": rng.integers(0, 5, size=n),
        "d": rng.integers(0, 2, size=n),
        "f": rng.integers(0, 3, size=n),
    }
    if rng.uniform() < 0.5:  # alternating designs, where a factor varies within every level
        base["d"], base["f"] = np.arange(n) % 2, np.arange(n) % 3
    fixed = _pick(rng, FIXED[structure.p])
    left = {bar: _pick(rng, LEFT[bar[1]] if bar[2] == "|" else (("x", "x"), ("z", "z"))) for bar in bars}
    terms = [_bar(bar, *left[bar], rng) for bar in bars]
    if rng.uniform() < 0.3:
        terms = [terms[i] for i in rng.permutation(len(terms))]

    eta = _predictor(structure, kind, family, rng, fixed, base, rows, left)
    if kind == "strong":
        eta = _separated(seed, formula_names=_names(fixed), family=family, base=base, eta=eta)
    table: dict[str, Any] = {}
    lhs, weights = _response(structure, family, rng, eta, table)
    offset = None
    formula = f"{lhs} ~ {fixed} + {' + '.join(terms)}"
    if rng.uniform() < 0.2 and family not in ("binomial(log)", "poisson(identity)"):
        table["off"] = 0.3 * rng.normal(size=n) + (2.0 if rng.uniform() < 0.3 else 0.0)
        if rng.uniform() < 0.5:
            formula += " + offset(off)"
        else:
            offset = "off"
    scale, shift = {"x": 1.0, "z": 1.0, "u": 1.0}, {"x": 0.0, "z": 0.0, "u": 0.0}
    if kind == "scaled":
        scale = {v: 10.0 ** float(rng.integers(-4, 5)) for v in scale}
    elif kind == "shifted":
        shift = {v: 10.0 ** float(rng.integers(0, 6)) for v in ("x", "z")} | {"u": 0.0}
    for name in base:
        if name in _names(formula):
            values = base[name]
            if name in scale:
                values = values * scale[name] + shift[name]
            table[name] = _typed(name, values, rng)
    for name, levels in rows.items():
        table[name] = _labelled(name, levels, rng)
    data = pd.DataFrame(table)
    if len(bars) == 1 and structure.random != "nested" and rng.uniform() < 0.25:
        data = _with_holes(data, formula, rng)
    return Design(seed, structure, kind, formula, family, weights, offset, data)


def _pick(rng: Generator, options: Any) -> Any:
    return options[int(rng.integers(len(options)))]


def _names(formula: str) -> set[str]:
    return set("".join(c if c.isalnum() or c == "_" else " " for c in formula).split())


def _rows(structure: Structure, rng: Generator, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """Level of every row, per factor: free inside the bucket for one factor, else those of the structure, shuffled."""
    if not sizes:
        m = structure.levels - int(rng.integers(0, max(1, structure.levels // 8)))
        n = structure.rows - int(rng.integers(0, structure.rows // 16))
        uneven = rng.uniform(size=m) ** (2.0 if rng.uniform() < 0.5 else 0.0) + 0.05
        edges = np.cumsum(uneven) / uneven.sum()
        level = np.searchsorted(edges, rng.uniform(size=n)).clip(max=m - 1)
        level[: 3 * m] = np.tile(np.arange(m), 3)  # no empty ones, whatever rows are dropped
        return {"g": level}
    own = np.random.Generator(np.random.PCG64(1 + STRUCTURES.index(structure)))
    n = structure.rows
    rows = {}
    for name, m in sizes.items():
        level = (own.uniform(size=n) ** 1.5 * m).astype(int)
        level[: 2 * m] = np.tile(np.arange(m), 2)
        if name == "c":  # every level of c in every level of a
            level[: 7 * 8] = np.arange(7 * 8) // 8 % m
            rows["a"][: 7 * 8] = np.arange(7 * 8) % sizes["a"]
        rows[name] = level
    order = rng.permutation(n)
    return {name: rng.permutation(level.max() + 1)[level[order]] for name, level in rows.items()}


def _bar(bar: tuple[str, int, str], lhs: str, _: str | None, rng: Generator) -> str:
    group, _k, how = bar
    if how == "||" and rng.uniform() < 0.5:
        return f"(1 | {group}) + (0 + {lhs} | {group})"
    return f"({lhs} {how} {group})"


def _standard(values: np.ndarray) -> np.ndarray:
    v = np.asarray(values, float)
    return (v - v.mean()) / (v.std() or 1.0)


def _predictor(
    structure: Structure,
    kind: str,
    family: str,
    rng: Generator,
    fixed: str,
    base: dict[str, np.ndarray],
    rows: dict[str, np.ndarray],
    left: dict[Any, tuple[str, str | None]],
) -> np.ndarray:
    """True linear predictor (n,): a start, effects of the variables of the formula, effects of the levels."""
    narrow = family in ("binomial(log)", "poisson(identity)")
    start = {"binomial(log)": -1.4, "poisson(identity)": 6.0, "poisson(sqrt)": 5.0, "gaussian": 1.0}.get(family, 0.3)
    eta = np.full(len(base["x"]), start)
    strength = (0.12 if narrow else 0.5) * (2.5 if kind == "strong" and not narrow else 1.0)
    for name in sorted(_names(fixed) & set(base)):
        eta = eta + strength * rng.normal() * _standard(base[name])
    sd = 0.1 if narrow else _pick(rng, (0.3, 0.6, 1.0)) * (2.5 if kind == "strong" else 1.0)
    sd *= {"poisson(identity)": 5.0}.get(family, 1.0)
    for (group, _k, _how), (_lhs, slope) in left.items():
        parts = group.replace("/", ":").split(":")
        for name in (parts[0], group) if "/" in group else (group,):
            level = _interaction([rows[p] for p in name.replace("/", ":").split(":")])
            m = int(level.max()) + 1
            gone = kind == "singular" and rng.uniform() < 0.6
            effect = rng.normal(size=m)
            eta = eta + (0.0 if gone else sd) * effect[level]
            if slope is not None:
                own = rng.normal(size=m) + (effect if kind == "singular" and rng.uniform() < 0.4 else 0.0)
                flat = kind == "singular" and rng.uniform() < 0.6
                eta = eta + (0.0 if flat else 0.5 * sd) * own[level] * _standard(base[slope])
    return eta


def _separated(
    seed: int, formula_names: set[str], family: str, base: dict[str, np.ndarray], eta: np.ndarray
) -> np.ndarray:
    """In some designs one level of a fixed factor has successes, or counts of zero, only."""
    rng = np.random.Generator(np.random.PCG64(10**9 + seed))
    factors = sorted(formula_names & {"b", "d", "f"})
    open_ended = (
        family.startswith(("binomial", "nbinom2", "negative")) and family != "binomial(log)" or family == "poisson"
    )
    if not factors or not open_ended or rng.uniform() < 0.5:
        return eta
    far = 40.0 if family.startswith("binomial") else -40.0
    return np.where(base[_pick(rng, factors)] == 1, far, eta)


def _interaction(levels: list[np.ndarray]) -> np.ndarray:
    """Levels of the combinations that occur."""
    code = levels[0]
    for more in levels[1:]:
        code = code * (more.max() + 1) + more
    return np.unique(code, return_inverse=True)[1].reshape(-1)


def _response(
    structure: Structure, family: str, rng: Generator, eta: np.ndarray, table: dict[str, Any]
) -> tuple[str, str | None]:
    """Left-hand side of the formula and the column of weights; the response is put into the table."""
    n = len(eta)
    name, _, link = family.rstrip(")").partition("(")
    if name == "gaussian":
        y = eta + _pick(rng, (0.3, 1.0)) * rng.normal(size=n)
        if rng.uniform() < 0.15:
            y = y * 10.0 ** float(rng.integers(-3, 4)) + 10.0 ** float(rng.integers(0, 5))
        table["y"] = y
        if rng.uniform() < 0.25:
            table["w"] = 0.2 + 3.0 * rng.uniform(size=n)
            return "y", "w"
        return "y", None
    if name == "binomial":
        p = {
            "": special.expit,
            "probit": special.ndtr,
            "cloglog": lambda e: -np.expm1(-np.exp(e)),
            "cauchit": lambda e: 0.5 + np.arctan(e) / np.pi,
            "log": lambda e: np.exp(np.minimum(e, -0.05)),
        }[link](eta)
        how = _pick(rng, ("bernoulli", "bernoulli", "text", "cbind", "weights"))
        if how in ("bernoulli", "text"):
            y = rng.uniform(size=n) < p
            if how == "text":
                table["y"] = np.where(y, "yes", "no")
            else:
                table["y"] = y if rng.uniform() < 0.3 else y.astype(int)
            return "y", None
        size = rng.integers(1, 9, size=n)
        s = (rng.uniform(size=(n, 8)) < p[:, None]) @ np.ones(8, int)
        s = np.minimum(s, size)
        if how == "cbind":
            table["s"], table["t"] = s, size - s
            return "cbind(s, t)", None
        table["y"], table["w"] = s / size, size
        return "y", "w"
    mean = {"identity": lambda e: np.maximum(e, 0.2), "sqrt": np.square}.get(link, lambda e: np.exp(np.minimum(e, 5.0)))
    mu = mean(eta)
    if name in ("nbinom2", "negative.binomial"):
        shape = int(_pick(rng, (1, 2, 4)))
        mu = mu * np.square(rng.normal(size=(n, 2 * shape))).mean(axis=1)
    table["y"] = _poisson(mu, rng.uniform(size=n))
    if rng.uniform() < 0.15:
        table["w"] = rng.integers(1, 4, size=n) if rng.uniform() < 0.5 else 0.3 + 2.0 * rng.uniform(size=n)
        return "y", "w"
    return "y", None


def _poisson(mu: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Counts by inversion, so that they follow from the stream of uniforms."""
    count, term = np.zeros(len(mu), int), np.exp(-mu)
    total = term.copy()
    for k in range(1, 2000):
        more = uniform > total
        if not more.any():
            break
        count = count + more
        term = term * mu / k
        total = total + term
    return count


def _typed(name: str, values: np.ndarray, rng: Generator) -> Any:
    """A column of one of the types that tables have."""
    if name == "f":
        labels = np.array(["lo", "mid", "top"])[values]
        how = _pick(rng, ("text", "category", "unused", "ordered"))
        if how == "text":
            return labels
        levels = {"category": ["mid", "lo", "top"], "unused": ["lo", "mid", "none", "top"]}.get(
            how, ["lo", "mid", "top"]
        )
        return pd.Categorical(labels, categories=levels, ordered=how == "ordered")
    if name == "d":
        labels = np.array(["B", "a"])[values]
        return labels if rng.uniform() < 0.6 else pd.Categorical(labels, categories=["B", "a"])
    return values


def _labelled(name: str, level: np.ndarray, rng: Generator) -> Any:
    """Levels of a grouping factor as integers, text, fractions or a category with levels that do not occur."""
    how = _pick(rng, ("integers", "text", "fractions", "category"))
    if how == "integers":
        return 1000 + 7 * level
    if how == "fractions":
        return level + 0.5
    labels = np.array([f"{name}{v}" for v in range(int(level.max()) + 1)])
    if how == "text":
        return labels[level]
    return pd.Categorical(labels[level], categories=[*labels[::-1], "nobody"])


def _with_holes(data: pd.DataFrame, formula: str, rng: Generator) -> pd.DataFrame:
    """Some values missing in some columns, never in integers or truth values (those columns cannot have any)
    nor where R refuses them."""
    data = data.copy()
    for name in data.columns:
        column = data[name]
        holes = np.flatnonzero(rng.uniform(size=len(data)) < 0.02)
        holes = holes[holes >= 60]
        if (
            column.dtype.kind not in "iub"
            and ("poly" not in formula or name not in ("x", "z"))
            and holes.size
            and rng.uniform() < 0.5
        ):
            data.loc[holes, name] = None if column.dtype.kind != "f" else np.nan
    return data
