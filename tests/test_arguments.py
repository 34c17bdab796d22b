"""Every argument of every public function is used, or refused with a sentence of the package's own that names it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import load_data

import glmmjax as gj

PACKAGE = Path(gj.__file__).parent
CBPP = "cbind(incidence, size - incidence) ~ period + (1 | herd)"
SLEEP = "Reaction ~ Days + (1 | Subject)"
ODD = {
    "type": object(),
    "length": np.zeros(3),
    "nan": float("nan"),
    "name": "no such thing",
    "integer keys": {0: 1.0},
}
#: values that have a meaning after all
MEANT = {
    ("fit_many", "results", "name"),  # a path
    ("Link", "name", "name"),
    ("generalised.integrands", "z", "length"),  # points
    *((f"Profile.{a}", b, kind) for a, b in (("zeta", "value"), ("value", "zeta")) for kind in ("length", "nan")),
}


@cache
def generalised() -> gj.MixedModel:
    return gj.glmer(CBPP, load_data("cbpp"))


@cache
def linear() -> gj.MixedModel:
    return gj.lmer(SLEEP, load_data("sleepstudy"))


def functions() -> dict[str, tuple[Callable[..., Any], dict[str, Any]]]:
    """Public functions by name, with the arguments of a valid call."""
    cbpp, sleep = load_data("cbpp"), load_data("sleepstudy")
    g, m = generalised(), linear()
    setup, design = gj.glmer_setup(CBPP, cbpp), gj.design(CBPP, cbpp)
    deviance = gj.deviance_function(setup)
    family, flat = gj.families.Binomial(), gj.design(SLEEP, sleep)
    at = {"theta": g.theta, "beta": g.beta, "design": design, "family": family}
    arrays = {"y": design.y, "X": design.X, "terms": [(np.ones(56), np.arange(56) % 15)]}
    out: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
        "glmer": (gj.glmer, {"formula": CBPP, "data": cbpp}),
        "lmer": (gj.lmer, {"formula": SLEEP, "data": sleep}),
        "glmer_setup": (gj.glmer_setup, {"formula": CBPP, "data": cbpp}),
        "lmer_setup": (gj.lmer_setup, {"formula": SLEEP, "data": sleep}),
        "deviance_function": (gj.deviance_function, {"setup": setup}),
        "optimise": (gj.optimise, {"deviance": deviance}),
        "make_model": (gj.make_model, {"deviance": deviance, "at": gj.optimise(deviance)}),
        "fit_many": (gj.fit_many, {"formula": SLEEP, "data": sleep, "y": sleep[["Reaction"]].to_numpy()}),
        "lm_list": (gj.lm_list, {"formula": "Reaction ~ Days | Subject", "data": sleep}),
        "design": (gj.design, {"formula": CBPP, "data": cbpp}),
        "design_arrays": (gj.design_arrays, arrays),
        "laplace_deviance": (gj.laplace_deviance, at),
        "agq_deviance": (gj.agq_deviance, {**at, "nAGQ": 3}),
        "pirls": (gj.pirls, at),
        "lmm_deviance": (gj.lmm_deviance, {"theta": m.theta, "design": flat}),
        "pls": (gj.pls, {"theta": m.theta, "design": flat}),
        "fit_design": (gj.fit_design, {"design": design}),
        "gauss_hermite": (gj.gauss_hermite, {"k": 3}),
        "pool": (gj.pool, {"fits": [m, m]}),
        "bootstrap_test": (gj.bootstrap_test, {"smaller": m, "larger": m, "nsim": 2}),
        "exact_test": (gj.exact_test, {"model": m, "nsim": 10}),
        "power": (gj.power, {"model": m, "test": "Days", "nsim": 2}),
        "anova": (gj.anova, {"model": m}),
        "drop1": (gj.drop1, {"model": g}),
        "add1": (gj.add1, {"model": g, "scope": "size"}),
        "simulate": (gj.simulate, {"formula": SLEEP, "newdata": sleep, "params": {"beta": [1.0, 1.0], "theta": [1.0]}}),
        "parameter_template": (gj.parameter_template, {"formula": SLEEP, "newdata": sleep}),
        "structure": (gj.structure, {"model_or_design": g}),
        "parse": (gj.parse, {"formula": CBPP}),
        "update_formula": (gj.update_formula, {"formula": CBPP, "change": ". ~ . + size"}),
        "Control": (gj.Control, {}),
        "Link": (gj.Link, {"name": "mine", "inverse": jax.numpy.exp}),
        "Custom": (gj.families.Custom, {"logpdf": lambda y, eta, aux: y * eta - jax.numpy.exp(eta), "link": "log"}),
        "Binomial": (gj.families.Binomial, {}),
        "Poisson": (gj.families.Poisson, {}),
        "Gaussian": (gj.families.Gaussian, {}),
        "NegativeBinomial": (gj.families.NegativeBinomial, {}),
        "families.get": (gj.families.get, {"family": "poisson"}),
        "links.get": (gj.links.get, {"link": "log"}),
        "datasets.load": (gj.datasets.load, {"name": "cbpp"}),
        "datasets.describe": (gj.datasets.describe, {"name": "cbpp"}),
    }
    needed = {
        "wald_test": {"L": "Days = 0"},
        "score_test": {"covariates": np.arange(180.0)},
        "marginal_means": {"by": "Days"},
        "getME": {"name": "X"},
        "refit": {"newresp": m.getME("y")},
        "refit_many": {"responses": np.stack([m.getME("y")], axis=1)},
        "update": {"formula": ". ~ ."},
        "bootstrap": {"nsim": 2},
        "confint": {"nsim": 2},
    }
    for name in list(vars(gj.MixedModel)):
        if inspect.isfunction(getattr(gj.MixedModel, name)) and not name.startswith("_"):
            for model, prefix in ((m, "linear"), (g, "generalised")):
                if prefix == "linear" or name in ("residuals", "vcov", "predict", "integrands", "quadrature_error"):
                    if name not in ("integrands", "quadrature_error", "plot_integrands") or prefix == "generalised":
                        out[f"{prefix}.{name}"] = getattr(model, name), dict(needed.get(name, {}))
    for name in PICTURES:
        out[name] = getattr(gj.plots, name), {"models" if name == "coefficients" else "model": g}
    out["rootogram"] = gj.plots.rootogram, {"model": counts()}
    several = gj.fit_many(SLEEP, sleep, y=sleep[["Reaction"]].to_numpy())
    results: list[Any] = [m.bootstrap(3), g.marginal_means("period"), deviance, several, m.profile("sigma")]
    results += [gj.lm_list("Reaction ~ Days | Subject", sleep), m.influence("Subject"), gj.structure(m)]
    x = {"x": deviance.start}
    first = {
        "DevianceFunction.pack": {"theta": g.theta, "beta": g.beta},
        **dict.fromkeys((f"DevianceFunction.{n}" for n in ("unpack", "gradient", "value_and_grad", "hessian")), x),
        "Profile.zeta": {"name": "sigma", "value": 30.0},
        "Profile.value": {"name": "sigma", "zeta": 0.0},
        "ManyFits.fit": {"name": several.names[0]},
        "Structure.L_at": {"theta": m.theta},
    }
    for result in results:
        for name in methods(type(result)):
            out[name] = getattr(result, name.rpartition(".")[2]), first.get(name, {})
    return out


#: functions of gj.plots
PICTURES = [name for name, f in vars(gj.plots).items() if inspect.isfunction(f) and f.__module__ == "glmmjax.plots"]
PICTURES = [name for name in PICTURES if not name.startswith("_")]


@cache
def counts() -> gj.MixedModel:
    cbpp = load_data("cbpp")
    return gj.glmer("incidence ~ period + (1 | herd)", cbpp, "poisson")


def methods(kind: type) -> list[str]:
    """Public methods of a class of the package that take arguments, as Class.method."""
    own = {n: getattr(k, n) for k in kind.__mro__ if k.__module__.startswith("glmmjax") for n in list(vars(k))}
    found = [n for n, f in own.items() if inspect.isfunction(f) and not n.startswith("_")]
    return [f"{kind.__name__}.{n}" for n in found if len(inspect.signature(own[n]).parameters) > 1]


def cases() -> Iterator[tuple[str, str, str]]:
    for name, (function, _) in functions().items():
        known = inspect.signature(function).parameters
        for argument, parameter in known.items():
            if parameter.kind is not parameter.VAR_KEYWORD:
                for kind in ODD:
                    if (name, argument, kind) not in MEANT:
                        yield name, argument, kind


def offence(function: Callable[..., Any], given: dict[str, Any], argument: str, value: Any) -> str | None:
    """What is wrong with how a function takes a value; None if it refuses it in a sentence that names the argument."""
    parameter = inspect.signature(function).parameters[argument]
    arguments = {k: v for k, v in given.items() if k != argument}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if parameter.kind is parameter.VAR_POSITIONAL:
                function(*arguments.values(), value)
            else:
                function(**{**arguments, argument: value})
    except (TypeError, ValueError, NotImplementedError, KeyError) as error:
        text = str(error)
        last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if not last.is_relative_to(PACKAGE):
            return f"raised in {last.name}: {type(error).__name__}: {text[:90]}"
        words = {argument, argument.rstrip("s"), ODD["name"], *SAID.get(argument, ())}
        if not any(word.lower() in text.lower() for word in words):
            return f"does not name it: {text[:110]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "taken"


#: how sentences call an argument
SAID = {
    "newresp": ("response",), "data": ("column",), "newdata": ("column", "data"), "y": ("response",),
    "formula": ("'~'",), "change": ("'~'",), "models": ("fitted models",), "rhs": ("hypothes",), "x": ("point",),
    "L": ("hypothes", "fixed effect"),
    "at": ("point",), "model_or_design": ("model",), "start": ("point",), "names": ("'~'",), "name": ("dataset",),
    "theta": ("covariance parameters",),
}  # fmt: skip


def test_every_argument_is_used_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An odd value ends in a sentence of the package that names the argument, not in NumPy's, Python's or JAX's."""
    monkeypatch.chdir(tmp_path)  # an odd name may be that of a file
    every = functions()
    wrong = []
    for name, argument, kind in cases():
        function, given = every[name]
        found = offence(function, given, argument, ODD[kind])
        if found is not None:
            wrong.append(f"{name}({argument}={kind}): {found}")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_every_public_function() -> None:
    """What takes arguments and is not there is a container, a class of errors, or a structure of one number."""
    there = {name.rpartition(".")[2] for name in functions()}
    rest = {name for name in gj.__all__ if callable(getattr(gj, name)) and name not in there}
    assert rest == {
        *("ModelSetup", "DevianceFunction", "Estimates", "DesignFit", "ManyFits", "ExactTest", "Structure", "Design"),
        *("Unstructured", "Diagonal", "MixedModel", "FormulaError", "DataError", "ConvergenceWarning"),
    }
    assert {name.rpartition(".")[2] for name in methods(gj.MixedModel)} <= there | {"plot_integrands"}
    assert set(PICTURES) <= there


#: Classes that are met in results but are not for users' calls, and those whose methods are the arithmetic of traced
#: code, on arrays of any shape.
INNER = {"ModelData", "Problem", "Basis", "Scaling", "Separation"}
ARITHMETIC = {"Family", "Link", "Unstructured", "Diagonal"}


def test_the_table_has_every_method_of_results() -> None:
    """Those of all classes that annotations of public functions, methods, properties and fields lead to."""
    classes: dict[str, type] = {}
    for module in pkgutil.walk_packages(gj.__path__, "glmmjax."):
        for name, kind in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(kind) and kind.__module__ == module.name and not name.startswith("_"):
                classes.setdefault(name, kind)
    left = [kind.__name__ if inspect.isclass(kind) else returned(kind) for kind in map(gj.__getattr__, gj.__all__)]
    left += map(returned, (getattr(gj.plots, name) for name in PICTURES))
    met: set[str] = set()
    while left:
        for name in set(re.findall(r"\w+", left.pop())) & classes.keys() - met - INNER - ARITHMETIC:
            met.add(name)
            for part in classes[name].__mro__:
                if part.__module__.startswith("glmmjax"):
                    left += [returned(getattr(part, n)) for n in list(vars(part)) if not n.startswith("_")]
                    left += [str(t) for n, t in vars(part).get("__annotations__", {}).items() if not n.startswith("_")]
    assert {"Bootstrap", "Profile", "Influence", "ManyFits", "LmList", "AnovaTable", "VarCorr", "Pooled"} <= met
    there = functions()
    found = [name for kind in met - {"MixedModel", "Formula"} for name in methods(classes[kind])]
    assert not [name for name in found if name not in there]


def returned(member: Any) -> str:
    """The annotation of what a function or property returns."""
    f = member.fget if isinstance(member, property) else getattr(member, "func", member)
    return str(getattr(f, "__annotations__", {}).get("return", ""))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda m: m.confint(levle=0.9), "confint has no argument 'levle'; did you mean 'level'"),
        (lambda m: m.predict(nwdata=None), "predict has no argument 'nwdata'; did you mean 'newdata'"),
        (lambda m: gj.drop1(m, tst="Chisq"), "drop1 has no argument 'tst'; did you mean 'test'"),
        (lambda m: m.update(". ~ .", nagq=1), "update has no argument 'nagq'; did you mean 'nAGQ'"),
        (lambda m: gj.Control(tolerance=1.0), "Control has no argument 'tolerance'"),
    ],
)
def test_misspelt_arguments(call: Callable[[gj.MixedModel], Any], match: str) -> None:
    with pytest.raises(TypeError, match=match):
        call(generalised())


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95, "0.95", True, None, np.nan, np.array([0.9, 0.95])])
def test_levels_are_inside_the_unit_interval(level: Any) -> None:
    m = generalised()
    for call in (m.confint, m.tidy, lambda level: m.marginal_means("period", level=level)):
        with pytest.raises(ValueError, match="level must be between 0 and 1"):
            call(level=level)


@pytest.mark.parametrize("nsim", [0, -3, 2.5, "10", True, np.nan, [3]])
def test_numbers_of_simulations_are_positive_integers(nsim: Any) -> None:
    m = generalised()
    for call in (m.simulate, m.bootstrap, lambda nsim: gj.power(m, "period2", nsim)):
        with pytest.raises(ValueError, match="nsim must be a positive integer"):
            call(nsim=nsim)
    assert m.simulate(np.int64(2)).shape == (56, 2)


@pytest.mark.parametrize("seed", [-1, 0.5, "1", True, object()])
def test_seeds(seed: Any) -> None:
    with pytest.raises(ValueError, match="seed must be a non-negative integer or a NumPy generator"):
        generalised().simulate(seed=seed)


def test_vectors_of_another_length_are_refused() -> None:
    """A gather would take the first of them, silently."""
    design, family = gj.design(CBPP, load_data("cbpp")), gj.families.Binomial()
    m = generalised()
    for theta, beta, match in ((np.ones(3), m.beta, "theta must have shape"), (m.theta, np.ones(2), "beta must have")):
        with pytest.raises(ValueError, match=match):
            gj.laplace_deviance(theta, beta, design, family)
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(lambda t, b: gj.pirls(t, b, design, family).u, theta, beta)
    flat = gj.design(SLEEP, load_data("sleepstudy"))
    for function in (gj.lmm_deviance, gj.pls):
        with pytest.raises(ValueError, match=r"theta must have shape \(1,\), got \(2,\)"):
            function(np.ones(2), flat)


def test_traced_data_are_sent_to_the_pure_layer() -> None:
    data = load_data("cbpp")

    def inside(x: Any) -> Any:
        return gj.glmer("incidence ~ x + (1 | herd)", {"incidence": data["incidence"], "x": x, "herd": data["herd"]})

    for transformed in (jax.jit(inside), jax.grad(inside), jax.vmap(inside)):
        with pytest.raises(TypeError, match="data is traced .* gj.fit_design"):
            transformed(np.ones(56))
    with pytest.raises(TypeError, match="newresp is traced"):
        jax.jit(generalised().refit)(np.ones(56))
    with pytest.raises(TypeError, match="y is traced"):
        jax.jit(lambda y: gj.design_arrays(y, np.ones((6, 1)), [(np.ones(6), np.arange(6) % 3)]))(np.ones(6))
