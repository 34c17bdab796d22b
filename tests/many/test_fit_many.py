"""`fit_many` against one fit at a time: hundreds of random datasets, bad ones among them."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import scipy.stats

import glmmjax as gj
from glmmjax import _fit_many as fit_many
from glmmjax.compiling import programs
from glmmjax.families import Custom, get
from glmmjax.fit import lanes

FORMULA = "y ~ x + (1 | g)"
#: rows and levels: few shapes, as every one is another program for the single fits
SHAPES = ((6, 30), (8, 44), (5, 23))


def response(rng: np.random.Generator, eta: np.ndarray, family: str) -> np.ndarray:
    if family == "poisson":
        return rng.poisson(np.exp(eta)).astype(float)
    if family == "binomial":
        return rng.binomial(1, 1.0 / (1.0 + np.exp(-eta))).astype(float)
    return eta + rng.normal(size=eta.size)


def one(rng: np.random.Generator, family: str, shape: tuple[int, int]) -> pd.DataFrame:
    m, n = shape
    # unbalanced, every level there; always the same, so that all tests need the same programs
    g = np.concatenate([np.arange(m), np.random.default_rng(n).integers(0, m, n - m)])
    x = rng.normal(size=n) * rng.choice([0.1, 1.0, 30.0])
    sd = rng.choice([0.0, 0.4, 1.0])
    eta = 0.4 + 0.4 * x / x.std() + sd * rng.normal(size=m)[g]
    return pd.DataFrame({"y": response(rng, eta, family), "x": x, "g": g})


def table(family: str, B: int, seed: int) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    parts = [one(rng, family, SHAPES[i % len(SHAPES)]).assign(id=f"d{i}") for i in range(B)]
    return pd.concat(parts, ignore_index=True)


def single(data: pd.DataFrame, family: str, formula: str = FORMULA, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if family == "gaussian":
            return gj.lmer(formula, data, **settings)
        return gj.glmer(formula, data, family, **settings)


def compare(many: gj.ManyFits, name, model, tolerance: float = 1e-6) -> None:
    """A fit of many against the same one alone."""
    row = many.fits.loc[name]
    own = many.frame[many.frame["dataset"] == name].set_index("term")
    assert list(own.index) == list(model.fixef.index)
    assert row["logLik"] == pytest.approx(model.loglik, abs=1e-8)
    assert row["nobs"] == model.nobs
    np.testing.assert_allclose(own["estimate"], model.fixef, rtol=tolerance, atol=tolerance)
    # Hessians are differences, with steps from each search's own metric; where theta is nearly 0 the deviance is nearly
    # quartic in it, and differences see that in the fifth digit
    loose = 1e-4 if 0.0 < np.abs(model.theta).min() < 0.05 else 3.0 * tolerance
    np.testing.assert_allclose(own["std_error"], model.bse, rtol=loose, atol=1e-6)
    if not (model.is_linear and row["singular"]):  # Satterthwaite's df leave out directions without curvature
        np.testing.assert_allclose(own["p_value"], model.pvalues, rtol=1e-3, atol=1e-5)
    sds = row[[c for c in many.fits if c.startswith("sd_")]].to_numpy(float)
    expected = np.concatenate([block.sd for block in model.VarCorr()])
    np.testing.assert_allclose(sds[~np.isnan(sds)], expected, rtol=1e-4, atol=1e-5)
    assert row["singular"] == model.is_singular
    assert (row["status"] == "converged") == model.converged


@pytest.mark.parametrize(("family", "B"), [("poisson", 150), ("gaussian", 150)])
def test_same_numbers_as_single_fits(family, B):
    data = table(family, B, seed=1)
    many = gj.fit_many(FORMULA, data, family, by="id")
    assert len(many) == B
    compared = 0
    for name, part in data.groupby("id", sort=False):
        if many.fits.loc[name, "status"] == "separated" or not np.ptp(part["y"]):
            continue
        compare(many, name, single(part, family))
        compared += 1
    assert compared > 0.8 * B


def bad_table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    parts = [one(rng, "poisson", SHAPES[0]).assign(id=i) for i in range(14)]
    parts[1]["y"] = 2.0
    parts[3].loc[4, "x"] = np.inf
    parts[4] = parts[4].iloc[:1]
    parts[6]["g"] = 0
    parts[7]["y"] = np.nan
    parts[8].loc[2, "y"] = -1.0
    parts[9]["x"] = 1.0  # aliased with the intercept
    parts[10].loc[[0, 5, 9], "y"] = np.nan
    parts[11]["y"] = np.where(parts[11]["x"] > 0, 3.0, 0.0)  # separated for a log link
    parts[12].loc[3, "y"] = 1.5
    return pd.concat(parts, ignore_index=True)


def test_bad_datasets_are_reported_and_harm_no_other():
    data = bad_table()
    many = gj.fit_many(FORMULA, data, "poisson", by="id")
    expected = {1: "constant", 3: "infinite", 4: "constant", 6: "one level", 7: "no rows", 8: "negative", 12: "count"}
    for i, text in expected.items():
        assert many.fits.loc[i, "status"] == "error"
        assert text in many.fits.loc[i, "message"]
        with pytest.raises((gj.DataError, gj.FormulaError)) as error:  # the sentence of the single fit
            single(data[data["id"] == i], "poisson")
        assert many.fits.loc[i, "message"] == str(error.value)
    assert set(many.failed.index) == {*expected, *many.fits.index[many.fits["status"] == "separated"]}
    assert not set(expected) & set(many.frame["dataset"])
    for i in (0, 2, 5, 9, 10, 13):
        compare(many, i, single(data[data["id"] == i], "poisson"))
    assert list(many.frame[many.frame["dataset"] == 9]["term"]) == ["(Intercept)"]
    alone = gj.fit_many(FORMULA, data[data["id"].isin([0, 2, 5, 10, 13])], "poisson", by="id")
    pd.testing.assert_frame_equal(
        alone.coef, many.coef.loc[alone.coef.index], check_exact=False, rtol=1e-9, check_names=False
    )


def test_all_bad_raises_the_first_reason():
    data = table("poisson", 3, 0).assign(y=1.0)
    with pytest.raises(gj.DataError, match="constant"):
        gj.fit_many(FORMULA, data, "poisson", by="id")


def test_independent_of_order_and_chunks(monkeypatch):
    data = table("gaussian", 60, seed=5)
    whole = gj.fit_many(FORMULA, data, by="id", workers=2)
    order = np.random.default_rng(0).permutation(len(data))
    shuffled = gj.fit_many(FORMULA, data.iloc[order], by="id", workers=1)
    monkeypatch.setattr(lanes, "BLOCK_TURNS", 1)
    monkeypatch.setattr(lanes, "CPU_LANES", 4)
    small = gj.fit_many(FORMULA, data, by="id", workers=2)
    for other in (shuffled, small):
        table_ = other.fits.loc[whole.fits.index]
        np.testing.assert_allclose(table_["logLik"], whole.fits["logLik"], rtol=1e-12)
        np.testing.assert_allclose(other.coef.loc[whole.coef.index], whole.coef, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(small.fits["evaluations"], whole.fits["evaluations"])


def test_nothing_is_compiled_twice():
    data = table("poisson", 20, seed=6)
    gj.fit_many(FORMULA, data, "poisson", by="id")
    before = lanes.compilations
    gj.fit_many(FORMULA, data.assign(y=data["y"].to_numpy()[::-1]), "poisson", by="id")
    assert lanes.compilations == before


def design(n: int = 44, m: int = 8, seed: int = 0) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"x": rng.normal(size=n), "g": np.concatenate([np.arange(m), rng.integers(0, m, n - m)])})


def responses(data: pd.DataFrame, B: int, family: str = "poisson") -> np.ndarray:
    rng = np.random.default_rng(11)
    u = 0.6 * rng.normal(size=(data["g"].max() + 1, B))
    eta = 0.5 + 0.4 * data["x"].to_numpy()[:, None] + u[data["g"]]
    return np.stack([response(rng, e, family) for e in eta.T], axis=1)


def test_responses_of_one_design():
    data = design()
    Y = responses(data, 24)
    Y[:, 3], Y[2, 4], Y[:, 5], Y[5:9, 6], Y[0, 7] = 1.0, np.inf, np.nan, np.nan, -3.0
    names = [f"gene{i}" for i in range(24)]
    many = gj.fit_many("~ x + (1 | g)", data, "poisson", y=pd.DataFrame(Y, columns=names))
    assert list(many.failed.index) == ["gene3", "gene4", "gene5", "gene7"]
    for name, text in (("gene3", "constant"), ("gene4", "infinite"), ("gene5", "no values"), ("gene7", "negative")):
        assert text in many.fits.loc[name, "message"]
        assert name in many.fits.loc[name, "message"]
    for i in (0, 6, 8, 23):  # gene6 has missing values
        compare(many, names[i], single(data.assign(y=Y[:, i]), "poisson"))
    model = many.fit("gene8")
    assert model.formula.startswith("gene8 ~")
    compare(many, "gene8", model)
    assert model.fit_stats.evaluations < 4

    sparse = gj.fit_many("~ x + (1 | g)", data, "poisson", y=scipy.sparse.csr_matrix(np.abs(np.nan_to_num(Y[:, 8:]))))
    np.testing.assert_allclose(sparse.coef, many.coef.iloc[8:], rtol=1e-12)
    named = gj.fit_many("unused ~ x + (1 | g)", data, "poisson", y=Y[:, 8:])
    np.testing.assert_allclose(named.coef, many.coef.iloc[8:], rtol=1e-12)
    frame = pd.DataFrame({n: pd.arrays.SparseArray(Y[:, i], fill_value=0.0) for i, n in enumerate(names) if i >= 8})
    np.testing.assert_allclose(gj.fit_many("~ x + (1 | g)", data, "poisson", y=frame).coef, many.coef.iloc[8:])


def test_weights_and_offsets_by_response():
    data = design()
    Y = responses(data, 6)
    rng = np.random.default_rng(0)
    weights, offset = rng.integers(1, 3, Y.shape).astype(float), 0.2 * rng.normal(size=Y.shape)
    many = gj.fit_many("~ x + (1 | g)", data, "poisson", y=Y, weights=weights, offset=offset)
    for i in (0, 5):
        own = {"weights": weights[:, i], "offset": offset[:, i]}
        compare(many, i, single(data.assign(y=Y[:, i]), "poisson", **own))
        compare(many, i, many.fit(i))
    shared = gj.fit_many("~ x + (1 | g)", data.assign(w=2.0), "poisson", y=Y, weights="w", offset=offset[:, 0])
    own = {"weights": np.full(len(data), 2.0), "offset": offset[:, 0]}
    compare(shared, 3, single(data.assign(y=Y[:, 3]), "poisson", **own))


def test_trials_weights_and_offsets_by_dataset():
    rng = np.random.default_rng(2)
    data = table("poisson", 9, seed=9)
    data["n"] = rng.integers(1, 6, len(data))
    data["s"] = rng.binomial(data["n"], 0.4)
    data["o"] = 0.3 * rng.normal(size=len(data))
    many = gj.fit_many("cbind(s, n - s) ~ x + offset(o) + (1 | g)", data, "binomial", by="id")
    for name in ("d0", "d4"):
        part = data[data["id"] == name]
        compare(many, name, single(part, "binomial", "cbind(s, n - s) ~ x + offset(o) + (1 | g)"))
    share = gj.fit_many("s / n ~ x + (1 | g)", data, "binomial", by="id", weights="n", offset=data["o"].to_numpy())
    np.testing.assert_allclose(share.coef, many.coef, rtol=1e-8)


@pytest.mark.parametrize(
    ("family", "formula", "settings"),
    [
        ("gaussian", "y ~ x + (x | a) + (1 | a:b) + (1 | c)", {"REML": False}),  # nested and crossed
        ("poisson", "y ~ x + (x | a)", {"nAGQ": 0}),
        ("binomial", "y ~ x + (1 | a)", {"nAGQ": 5, "control": {"exact": True}}),
    ],
)
def test_structures_and_approximations(family, formula, settings):
    rng = np.random.default_rng(4)
    parts = []
    for i in range(6):
        n = 60 + 2 * (i % 2)
        a = np.concatenate([np.arange(8), rng.integers(0, 8, n - 8)])
        b, c = rng.integers(0, 2, n), rng.integers(0, 3, n)
        x = rng.normal(size=n)
        eta = 0.3 + 0.5 * x + (0.6 * rng.normal(size=8))[a] + (0.5 * rng.normal(size=3))[c]
        parts.append(pd.DataFrame({"id": i, "x": x, "a": a, "b": b, "c": c, "y": response(rng, eta, family)}))
    data = pd.concat(parts, ignore_index=True)
    many = gj.fit_many(formula, data, family, by="id", **settings)
    for i in (0, 2):
        compare(many, i, single(data[data["id"] == i], family, formula, **settings), 3e-6)


def test_custom_family_with_dispersion():
    import jax.numpy as jnp
    from jax.scipy.special import gammaln

    def logpdf(y, eta, aux):
        k = aux["k"]
        log_mix = jnp.logaddexp(eta, jnp.log(k))
        return gammaln(y + k) - gammaln(k) - gammaln(y + 1) + y * (eta - log_mix) + k * (jnp.log(k) - log_mix)

    family = Custom(logpdf, "log", {"k": 1.0})
    data = table("poisson", 6, seed=12)
    data["y"] = (
        np.random.default_rng(0).negative_binomial(1.5, 1.5 / (1.5 + np.exp(0.8 + 0.1 * data["y"]))).astype(float)
    )
    many = gj.fit_many(FORMULA, data, family, by="id")
    part = data[data["id"] == "d0"]
    model = single(part, family)
    compare(many, "d0", model, 1e-5)
    assert many.fits.loc["d0", "k"] == pytest.approx(float(np.asarray(model.phi)[0]), rel=1e-3)


def test_transforms_learn_from_each_dataset():
    data = table("gaussian", 6, seed=13)
    many = gj.fit_many("y ~ scale(x) + (1 | g)", data, by="id")
    for name in ("d0", "d4"):
        compare(many, name, single(data[data["id"] == name], "gaussian", "y ~ scale(x) + (1 | g)"))


def test_factors_with_missing_levels():
    rng = np.random.default_rng(14)
    data = table("gaussian", 6, seed=14)
    data["f"] = rng.choice(["a", "b", "c"], len(data))
    data = data[~((data["id"] == "d3") & (data["f"] == "a"))]
    many = gj.fit_many("y ~ f + (1 | g)", data, by="id")
    for name in ("d0", "d3"):
        compare(many, name, single(data[data["id"] == name], "gaussian", "y ~ f + (1 | g)"))
    assert list(many.coef) == ["(Intercept)", "fb", "fc"]
    assert np.isnan(many.coef.loc["d3", "fb"])
    with pytest.raises(gj.DataError, match="different sets of columns"):
        _ = many.arrays


def test_results_file_is_continued(tmp_path, monkeypatch):
    data, path = table("poisson", 24, seed=15), tmp_path / "fits.parquet"
    whole = gj.fit_many(FORMULA, data, "poisson", by="id")
    ran, original = [], fit_many._fit

    def interrupted(model, stack, engine, members, limits):
        if ran:
            raise KeyboardInterrupt
        ran.append(members)
        return original(model, stack, engine, members, limits)

    monkeypatch.setattr(lanes, "BLOCK_TURNS", 1)
    monkeypatch.setattr(lanes, "CPU_LANES", 8)
    monkeypatch.setattr(fit_many, "_fit", interrupted)
    with pytest.warns(UserWarning, match="interrupted"):
        part = gj.fit_many(FORMULA, data, "poisson", by="id", results=path, workers=1)
    assert (part.fits["status"] == "not run").sum() == 16
    done: list[int] = []

    def counted(model, stack, engine, members, limits):
        done.extend(members)
        return original(model, stack, engine, members, limits)

    monkeypatch.setattr(fit_many, "_fit", counted)
    rest = gj.fit_many(FORMULA, data, "poisson", by="id", results=path)
    assert sorted(done) == sorted(set(range(24)) - set(ran[0]))
    pd.testing.assert_frame_equal(rest.frame, whole.frame, check_exact=False, rtol=1e-9)
    again = gj.fit_many(FORMULA, data, "poisson", by="id", results=path)
    assert len(done) == 16
    pd.testing.assert_frame_equal(again.frame, rest.frame)
    more = pd.concat([data, data[data["id"] == "d0"].assign(id="new")])
    later = gj.fit_many(FORMULA, more, "poisson", by="id", results=path)
    assert len(done) == 17
    assert later.fits["logLik"]["new"] == pytest.approx(later.fits["logLik"]["d0"], abs=1e-9)
    pd.testing.assert_frame_equal(
        later.frame[later.frame["dataset"] != "new"].drop(columns="p_adjusted"), again.frame.drop(columns="p_adjusted")
    )
    with pytest.raises(gj.DataError, match="another model: formula was y ~ x"):
        gj.fit_many("y ~ 1 + (1 | g)", data, "poisson", by="id", results=path)
    path.write_text("not a table")
    with pytest.raises(gj.DataError, match="no Parquet file"):
        gj.fit_many(FORMULA, data, "poisson", by="id", results=path)


def scaled(k: float) -> Custom:
    return Custom(lambda y, eta, aux: y * eta - k * jnp.exp(eta / k), "log")


def test_results_of_something_else_are_refused(tmp_path) -> None:
    """Every part that a number depends on: taken up as it was, refused where it has changed, with what differs."""
    data, path = table("poisson", 3, seed=15), tmp_path / "fits.parquet"
    w, ones = np.tile([1.0, 2.0], len(data))[: len(data)], np.ones(len(data))
    given = {"weights": ones, "offset": 0.0 * ones, "contrasts": None, "control": None}

    def run(data=data, family="poisson", formula=FORMULA, **changes):
        return gj.fit_many(formula, data, family, by="id", results=path, **{**given, **changes})

    first = run()
    pd.testing.assert_frame_equal(run().frame, first.frame)
    other = "other data in 'd0': its response, columns, groups, weights, offset or contrasts differ"
    relabelled = data.assign(g=(data["g"] + 1) % 5)
    for match, changes in {
        other: {"data": data.assign(y=data["y"].to_numpy()[::-1])},
        f"{other}; remove": {"data": data.assign(x=data["x"] + 1.0)},
        f"{other}; remove it": {"data": relabelled},
        f"{other}; remove it or": {"weights": w},
        f"{other}; remove it or name": {"offset": 0.1 * w},
        "the dataset 'd0', which is not there now": {"data": data[data["id"] != "d0"], **dict.fromkeys(given)},
        "control tol was 1e-10, and is 1e-06": {"control": {"tol": 1e-6}},
        "control max_evaluations was 500, and is 7": {"control": {"max_evaluations": 7}},
        "nAGQ was 1, and is 0": {"nAGQ": 0},
        "hessian was expected, and is observed": {"hessian": "observed"},
        "family was poisson .log., and is nbinom2": {"family": "nbinom2"},
    }.items():
        with pytest.raises(gj.DataError, match=match):
            run(**changes)
    path.unlink()
    sums = run(data.assign(f=np.where(data["x"] > 0, "a", "b")), formula="y ~ f + (1 | g)")
    assert sums.names == first.names
    with pytest.raises(gj.DataError, match=other):
        run(data.assign(f=np.where(data["x"] > 0, "a", "b")), formula="y ~ f + (1 | g)", contrasts={"f": "sum"})
    path.unlink()
    mine = run(family=scaled(2.0))
    pd.testing.assert_frame_equal(run(family=scaled(2.0)).frame, mine.frame)
    with pytest.raises(gj.DataError, match="functions of the family, or what they use, have changed"):
        run(family=scaled(3.0))
    with open(__file__) as file, pytest.raises(gj.DataError, match="cannot tell this family"):
        run(family=Custom(lambda y, eta, aux: y * eta - jnp.exp(eta) + 0.0 * file.fileno(), "log"))


def test_digests_of_responses(tmp_path) -> None:
    data, path = table("gaussian", 1, seed=3), tmp_path / "fits.parquet"
    y = data["y"].to_numpy()
    first = gj.fit_many("~ x + (1 | g)", data, y=np.column_stack([y, y + data["x"]]), results=path)
    more = gj.fit_many("~ x + (1 | g)", data, y=np.column_stack([y, y + data["x"], y**2]), results=path)
    pd.testing.assert_series_equal(more.fits["logLik"][:2], first.fits["logLik"])
    for changes in ({"y": np.column_stack([y, y, y])}, {"data": data.assign(x=data["x"] ** 2)}):
        arguments = {"data": data, "y": np.column_stack([y, y + data["x"], y**2]), **changes}
        with pytest.raises(gj.DataError, match="other data in"):
            gj.fit_many("~ x + (1 | g)", results=path, **arguments)


def test_programs_are_kept_whole(tmp_path, monkeypatch):
    (tmp_path / "programs").mkdir()
    monkeypatch.setattr(programs, "directory", lambda: tmp_path / "programs")
    data = table("gaussian", 12, seed=21)

    def fit() -> tuple[pd.DataFrame, int]:
        programs.forget()
        before = lanes.compilations
        many = gj.fit_many(FORMULA, data, by="id", ddf=None)
        return many.coef, lanes.compilations - before

    first, made = fit()
    assert made == 2
    (file,) = (tmp_path / "programs").iterdir()
    again, made = fit()
    assert made == 0
    pd.testing.assert_frame_equal(again, first)
    file.write_bytes(file.read_bytes()[:1000])  # cut short: compiled and written again
    again, made = fit()
    assert made == 2
    pd.testing.assert_frame_equal(again, first)
    assert programs.load(file.name, jax.local_devices()[:1]) is not None
    assert programs.text_of(get("binomial(probit)")) == "Binomial(link probit)"
    assert programs.text_of(Custom(lambda y, eta, aux: -((y - eta) ** 2), "identity")) is None
    monkeypatch.setattr(programs, "directory", lambda: file / "below a file")
    again, made = fit()
    assert made == 2
    pd.testing.assert_frame_equal(again, first)


def test_false_discoveries_are_controlled():
    data = design()
    Y = responses(data.assign(x=0.0), 400, "gaussian")
    many = gj.fit_many("~ x + (1 | g)", data, y=Y)
    rows = many.frame[many.frame["term"] == "x"]
    # under the null p-values are uniform: 400 of them, three standard errors
    assert (rows["p_value"] < 0.05).mean() == pytest.approx(0.05, abs=3 * np.sqrt(0.05 * 0.95 / 400))
    assert (rows["p_adjusted"] < 0.05).sum() <= 1
    assert many.arrays["vcov"].shape == (400, 2, 2)
    np.testing.assert_allclose(many.arrays["beta"], many.coef)


def test_single_precision():
    data = table("poisson", 30, seed=16)
    double = gj.fit_many(FORMULA, data, "poisson", by="id")
    half = gj.fit_many(FORMULA, data, "poisson", by="id", dtype="float32")
    both = double.fits.index[(double.fits["status"] == "converged") & (half.fits["status"] == "converged")]
    assert len(both) == 30
    z = (half.coef - double.coef).loc[both] / double.std_error.loc[both]
    assert np.abs(z).max().max() < 1e-4  # as the docstring says
    inner = both[double.fits.loc[both, "sd_(Intercept)|g"] > 0.1]
    ratio = half.std_error.loc[inner] / double.std_error.loc[inner]
    assert np.abs(ratio - 1.0).max().max() < 5e-3
    assert str(get("poisson")) in str(half)


def test_text_and_html():
    many = gj.fit_many(FORMULA, bad_table(), "poisson", by="id")
    text = str(many)
    assert "14 fits of" in text and "7 error" in text and "in .failed" in text
    assert "<table" in many._repr_html_()
    assert {"p < .05", "median"} <= set(many.summary().columns)
    expected = ["dataset", "term", "estimate", "std_error", "statistic", "p_value", "p_adjusted", "status", "message"]
    assert list(many.frame)[:9] == expected
    with pytest.raises(KeyError, match="no dataset 99"):
        many.fit(99)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "either by=.*or y="),
        ({"by": "nope"}, "no column 'nope'"),
        ({"by": "id", "adjust": "fdr"}, "adjust must be one of"),
        ({"by": "id", "dtype": "float16"}, "dtype must be"),
        ({"by": "id", "ddf": "kr"}, "ddf must be"),
        ({"by": "id", "device": "tpu"}, "no device 'tpu'"),
        ({"by": "id", "famly": "poisson"}, "did you mean 'family'"),
    ],
)
def test_bad_arguments(arguments, text):
    data = table("poisson", 3, seed=0)
    with pytest.raises((ValueError, TypeError), match=text):
        gj.fit_many(FORMULA, data, "poisson", **arguments)


def test_bad_responses():
    data = design()
    with pytest.raises(gj.DataError, match="transpose"):
        gj.fit_many("~ x + (1 | g)", data, "poisson", y=np.ones((5, len(data))))
    with pytest.raises(gj.DataError, match="in columns"):
        gj.fit_many("~ x + (1 | g)", data, "poisson", y=np.ones(len(data)))
    with pytest.raises(gj.DataError, match="not numeric"):
        gj.fit_many("~ x + (1 | g)", data, "poisson", y=pd.DataFrame({"a": ["u"] * len(data)}))
    missing = data.assign(id=[None] + ["a"] * (len(data) - 1), y=1.0)
    with pytest.raises(gj.DataError, match="missing values"):
        gj.fit_many(FORMULA, missing, "poisson", by="id")


def test_responses_whose_rows_do_not_tell_the_model() -> None:
    """Missing values, or weights of 0, that leave one level, dependent columns, a level per row, or an exact fit."""
    rng = np.random.default_rng(6)
    g = np.repeat(np.arange(12), 20)
    data = pd.DataFrame({"x": rng.normal(size=240), "f": np.where(g < 6, "a", "b"), "g": g})
    y = 1 + data["x"] + rng.normal(size=12)[g] + rng.normal(size=240)
    exact = 2.0 * data["x"] + 1.0
    responses = pd.DataFrame(
        {
            "all": y,
            "most": y.where(rng.random(240) > 0.2),
            "one level": y.where(g == 11),
            "one f": y.where(g < 6),
            "level per row": y.where(np.arange(240) % 20 == 0),
            "exact": exact,
            "exact in part": exact.where(g > 2),
        }
    )
    many = gj.fit_many("~ x + f + (1 | g)", data, y=responses)
    for name in ("all", "most"):
        model = single(data.assign(y=responses[name]), "gaussian", "y ~ x + f + (1 | g)")
        assert many.fits["logLik"][name] == pytest.approx(model.loglik, abs=1e-8)
    assert list(many.fits["status"]) == ["converged"] * 2 + ["error"] * 5
    for name, text in {
        "one level": "grouping factor 'g' has only one level ('11'); it needs at least 2",
        "one f": "linearly dependent in the rows of the response 'one f'",
        "level per row": "grouping factor 'g' has 12 levels for 12 rows",
        "exact": "response exact is fitted exactly by the fixed effects",
        "exact in part": "response exact in part is fitted exactly",
    }.items():
        assert text in many.fits["message"][name]
        assert name not in many.coef.index or many.coef.loc[name].isna().all()
    weights = np.ones((240, 2))
    weights[g != 11, 1] = 0.0
    two = gj.fit_many("~ x + f + (1 | g)", data, y=np.column_stack([y, y]), weights=weights)
    assert list(two.fits["status"]) == ["converged", "error"] and "only one level ('11')" in two.fits["message"][1]


@pytest.mark.parametrize(
    ("control", "said"),
    [({"optimizer": "newton"}, "one optimizer"), ({"check_singular": "error"}, "check_singular='error' is for single")],
)
def test_settings_without_use_are_refused(control, said) -> None:
    data = gj.datasets.load("cbpp")
    with pytest.raises(ValueError, match=f"control: .*{said}"):
        gj.fit_many("~ period + (1 | herd)", data, "poisson", y=data[["incidence"]], control=control)
