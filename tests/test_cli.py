"""The command line: fits on bundled sets and files, JSON, and one line with status 2 for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import assert_close, load_data, reference_model

import glmmjax
from glmmjax import _ahead, _steps, datasets
from glmmjax._cli import main

CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"


def fit_json(capsys, *args):
    assert main(["fit", *args, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out)


def fails(capsys, *args):
    """The one line on standard error of a call that must end with status 2."""
    try:
        status = main(list(args))
    except SystemExit as exit:  # argparse
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("glmmjax") and captured.err.count("\n") == 1
    return captured.err


# -------------------- fits
def test_fit_prints_the_summary(capsys):
    assert main(["fit", CBPP, "cbpp", "--family", "binomial"]) == 0
    captured = capsys.readouterr()
    expected = glmmjax.glmer(CBPP, load_data("cbpp"), family="binomial").summary()
    assert captured.out == f"{expected}\n"
    assert captured.err == ""


def test_json_agrees_with_the_reference(capsys):
    got, reference = fit_json(capsys, CBPP, "cbpp", "--family", "binomial"), reference_model("cbpp_nagq1")
    r = reference["results"]
    assert (got["formula"], got["family"], got["link"], got["nAGQ"]) == (CBPP, "binomial", "logit", 1)
    assert_close([got["logLik"], got["AIC"], got["BIC"]], [r["logLik"], r["AIC"], r["BIC"]], atol=1e-6)
    assert_close(got["objective"], r["minus2logLik"], atol=1e-6)
    assert [row["term"] for row in got["fixef"]] == r["fixef"]["names"]
    estimate, se = ([row[k] for row in got["fixef"]] for k in ("estimate", "std_error"))
    assert_close(estimate, r["fixef"]["values"], rtol=1e-5, what="fixed effects")
    assert_close(se, r["se"], rtol=1e-4, what="standard errors")
    statistic = [row["statistic"] for row in got["fixef"]]
    assert_close(statistic, np.divide(estimate, se), rtol=1e-10, what="z values")
    assert all(0.0 < row["p_value"] < 0.01 for row in got["fixef"])
    (row,) = got["VarCorr"]
    assert (row["grp"], row["var1"], row["var2"]) == ("herd", "(Intercept)", None)
    assert_close([row["vcov"], row["sdcor"]], [0.412499750805561, 0.64226143493562], rtol=1e-5)
    assert_close(got["theta"], r["theta"]["values"], rtol=1e-5)
    assert got["ngrps"] == {"herd": 15} and got["nobs"] == 56
    assert got["converged"] is True and got["singular"] is False and got["messages"] == []
    assert got["evaluations"] > 0


def test_options_reach_the_fit(capsys):
    trials = ["prop ~ period + (1 | herd)", "cbpp", "--weights", "size"]
    assert_close(fit_json(capsys, *trials)["logLik"], -92.0262818713233, atol=1e-6)
    probit = fit_json(capsys, CBPP, "CBPP", "--link", "probit")
    assert probit["link"] == "probit"
    assert_close(probit["logLik"], reference_model("cbpp_probit")["results"]["logLik"], atol=1e-5)
    joint = fit_json(capsys, *trials, "--nAGQ", "0")
    assert joint["nAGQ"] == 0
    estimates = [row["estimate"] for row in joint["fixef"]]
    assert_close(estimates, reference_model("cbpp_nagq0")["results"]["fixef"]["values"], rtol=1e-6)


@pytest.mark.parametrize("ending", ["csv", "csv.gz", "parquet"])
def test_files(capsys, tmp_path, ending):
    """From a file, herd and period are integers: factor() in the fixed effects, nothing for the group."""
    path = tmp_path / f"data.{ending}"
    plain = load_data("cbpp").astype({"herd": int, "period": int}).drop(columns=["obs"])
    plain.to_parquet(path) if ending == "parquet" else plain.to_csv(path, index=False)
    formula = CBPP.replace("period", "factor(period)")
    got = fit_json(capsys, formula, str(path), "--family", "binomial")
    assert_close(got["logLik"], -92.0262818713233, atol=1e-6)
    assert got["fixef"][1]["term"] == "factor(period)2"


def test_bad_models_get_one_line(capsys):
    assert "herd" in fails(capsys, "fit", "incidence ~ (1 | hird)", "cbpp", "--family", "poisson")
    fails(capsys, "fit", "incidence ~ period + (1 | herd", "cbpp", "--family", "poisson")
    fails(capsys, "fit", "incidence ~ period", "cbpp", "--family", "poisson")
    fails(capsys, "fit", "size ~ period + (1 | herd)", "cbpp", "--family", "binomial")
    assert "poisson" in fails(capsys, "fit", CBPP, "cbpp", "--family", "poison")
    fails(capsys, "fit", CBPP, "cbpp", "--nAGQ", "-1")


# -------------------- what needs no fit
@pytest.fixture
def stub(monkeypatch):
    """Stand-ins for a fit that record their arguments and return a model of fixed numbers."""
    calls = []
    terms = pd.Index(["(Intercept)", "x"])
    rows = pd.DataFrame(
        {"grp": ["g", "Residual"], "var1": ["(Intercept)", np.nan], "var2": [None, None]}
        | {"vcov": [4.0, np.nan], "sdcor": [2.0, np.inf]}
    )
    model = SimpleNamespace(
        fixef=pd.Series([1.5, -2.0], terms),
        coefficients=lambda ddf: pd.DataFrame(
            {
                "estimate": [1.5, -2.0],
                "std_error": [0.5, np.nan],
                "statistic": [3.0, np.nan],
                "p_value": [0.003, np.nan],
            },
            terms,
        ),
        is_linear=False,
        sigma=1.0,
        nAGQ=1,
        family=SimpleNamespace(name="binomial", link=SimpleNamespace(name="logit")),
        VarCorr=lambda: SimpleNamespace(to_frame=lambda: rows),
        loglik=np.float64(-10.0),
        aic=26.0,
        bic=np.nan,
        objective=20.0,
        theta=np.array([2.0]),
        ngrps={"g": np.int64(3)},
        nobs=np.int64(56),
        converged=np.True_,
        is_singular=np.False_,
        fit_stats=SimpleNamespace(evaluations=7),
        summary=lambda ddf: "the summary",
    )

    def setup(formula, data, **options):
        calls.append(("glmer", formula, len(data), options))
        return "setup"

    def fit(made):
        assert made == "setup"
        warnings.warn("the fit is\n singular", UserWarning, stacklevel=2)
        warnings.warn("the fit is\n singular", UserWarning, stacklevel=2)
        warnings.warn("old interface", DeprecationWarning, stacklevel=2)
        return model

    monkeypatch.setattr(glmmjax, "glmer_setup", setup, raising=False)
    monkeypatch.setattr(_steps, "fit", fit)
    monkeypatch.setattr(_ahead, "fit_for_summary", fit)
    return calls


def test_arguments_are_handed_on(capsys, stub):
    options = ["--link", "cauchit", "--nAGQ", "0", "--weights", "size", "--offset", "prop"]
    assert main(["fit", CBPP, "cbpp", *options]) == 0
    assert main(["fit", CBPP, "cbpp", "--family", "poisson(sqrt)"]) == 0
    given = {"weights": "size", "offset": "prop"}
    assert stub == [
        ("glmer", CBPP, 56, {"family": "binomial(cauchit)", "nAGQ": 0, **given}),
        ("glmer", CBPP, 56, {"family": "poisson(sqrt)", "nAGQ": 1, "weights": None, "offset": None}),
    ]


def test_warnings_go_to_standard_error_once(capsys, stub):
    assert main(["fit", CBPP, "cbpp"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "the summary\n"
    assert captured.err == "glmmjax: warning: the fit is singular\n"


def test_json_has_null_where_there_is_no_number(capsys, stub):
    got = fit_json(capsys, CBPP, "cbpp")
    assert got["messages"] == ["the fit is singular"]
    assert got["BIC"] is None and got["logLik"] == -10.0
    empty = {"std_error": None, "statistic": None, "df": None, "p_value": None}
    assert got["fixef"][1] == {"term": "x", "estimate": -2.0, **empty}
    assert got["fixef"][0]["p_value"] == 0.003
    assert got["VarCorr"][1] == {"grp": "Residual", "var1": None, "var2": None, "vcov": None, "sdcor": None}
    assert got["ngrps"] == {"g": 3} and got["converged"] is True and got["evaluations"] == 7
    assert set(got) == set(
        "formula family link nAGQ REML sigma logLik AIC BIC objective fixef VarCorr theta ngrps nobs converged "
        "singular evaluations messages".split()
    )


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, datasets.UnknownDatasetError])
def test_errors_of_bad_input_are_one_line(capsys, monkeypatch, error):
    def setup(*args, **options):
        raise error("column x:\n  what was found")

    monkeypatch.setattr(glmmjax, "glmer_setup", setup, raising=False)
    assert fails(capsys, "fit", CBPP, "cbpp") == "glmmjax: column x: what was found\n"


def test_other_errors_are_not_hidden(monkeypatch):
    def setup(*args, **options):
        raise RuntimeError("a fault of the program")

    monkeypatch.setattr(glmmjax, "glmer_setup", setup, raising=False)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["fit", CBPP, "cbpp"])


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["fit", CBPP, "cbp"], "Did you mean 'cbpp'"),
        (["fit", CBPP, "absent.csv"], "no such file: absent.csv"),
        (["fit", CBPP, "absent.txt"], "absent.txt does not exist: DATA ends in .csv"),
        (
            ["fit", CBPP, "cbpp", "--weights", "sise"],
            "--weights: cbpp has no column 'sise'; it has herd, inc",
        ),
        (["fit", CBPP, "cbpp", "--offset", "log(size)"], "--offset: cbpp has no column 'log(size)'"),
        (["fit", CBPP, "cbpp", "--family", "binomial(logit)", "--link", "probit"], "link is given twice"),
        (["fit", CBPP, "cbpp", "--nAGQ", "many"], "invalid int value: 'many'"),
        (["fit", CBPP], "required: DATA"),
        (["fit", CBPP, "cbpp", "--famly", "poisson"], "unrecognized arguments: --famly"),
        (["fitt"], "invalid choice: 'fitt'"),
        ([], "required: COMMAND"),
    ],
)
def test_bad_arguments(capsys, stub, args, reason):
    assert reason in fails(capsys, *args)
    assert stub == []


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.csv", b"", "cannot be read as CSV: No columns"),
        ("ragged.csv", b"a,b\n1,2\n1,2,3\n", "cannot be read as CSV"),
        ("bytes.csv", b"a,b\n\xff\xfe,1\n", "cannot be read as CSV"),
        ("bad.csv.gz", b"a,b\n1,2\n", "cannot be read as CSV"),
        ("bad.parquet", b"a,b\n1,2\n", "cannot be read as Parquet"),
        ("data.xlsx", b"", "data.xlsx is not a file that can be read: DATA ends in .csv"),
    ],
)
def test_bad_files(capsys, stub, tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert reason in fails(capsys, "fit", CBPP, str(tmp_path / name))
    assert stub == []


def test_datasets_lists_all(capsys):
    assert main(["datasets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == datasets.names()
    assert next(line for line in lines if line.startswith("insteval")).split()[1] == "73421"


def test_version(capsys):
    from importlib.metadata import PackageNotFoundError, version

    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    try:
        expected = version("glmmjax")
    except PackageNotFoundError:
        expected = "(not installed)"
    assert capsys.readouterr().out == f"glmmjax {expected}\n"


def test_help_needs_nothing_heavy():
    code = (
        "import sys\n"
        "from glmmjax._cli import main\n"
        "try:\n"
        "    main(['fit', '--help'])\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0\n"
        "heavy = {'jax', 'pandas', 'scipy', 'matplotlib', 'optax'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "factor(x)" in done.stdout and "--nAGQ" in done.stdout


@pytest.mark.parametrize(("arguments", "status"), [(["datasets"], 0), (["fit", "--help"], 0), (["fit", "y ~ x"], 2)])
def test_the_command_leaves_at_once_with_all_said(arguments, status):
    command = [sys.executable, "-m", "glmmjax._cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    said = done.stderr if status else done.stdout
    assert said.endswith("\n") and ("verbagg" in said or "factor(x)" in said or "required: DATA" in said)


def test_a_reader_that_stops_is_no_error():
    command = f"{sys.executable} -m glmmjax._cli datasets | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stdout == "n" and done.stderr == ""
