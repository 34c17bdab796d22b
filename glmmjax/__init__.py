"""Differentiable generalised linear mixed models in JAX.

    import glmmjax as gj
    m = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", gj.datasets.load("cbpp"))
    print(m.summary())

Names are imported when first used, so that ``import glmmjax`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import _loaded  # noqa: F401

if TYPE_CHECKING:
    from . import _parse
    from . import datasets as datasets
    from . import families as families
    from . import links as links
    from . import plots as plots
    from ._anova import anova as anova
    from ._control import Control as Control
    from ._covariance import Diagonal as Diagonal
    from ._covariance import Unstructured as Unstructured
    from ._design import Design as Design
    from ._design import design_arrays as design_arrays
    from ._drop import add1 as add1
    from ._drop import drop1 as drop1
    from ._errors import DataError as DataError
    from ._errors import FormulaError as FormulaError
    from ._exact_test import ExactTest as ExactTest
    from ._exact_test import exact_test as exact_test
    from ._fit import Estimates as Estimates
    from ._fit_design import DesignFit as DesignFit
    from ._fit_design import fit_design as fit_design
    from ._fit_many import ManyFits as ManyFits
    from ._fit_many import fit_many as fit_many
    from ._glmer import design as design
    from ._glmer import glmer as glmer
    from ._glmer import glmer_setup as glmer_setup
    from ._lmer import lmer as lmer
    from ._lmer import lmer_setup as lmer_setup
    from ._lmlist import lm_list as lm_list
    from ._objective import laplace_deviance as laplace_deviance
    from ._parse import parse as parse
    from ._pirls import pirls as pirls
    from ._pls import lmm_deviance as lmm_deviance
    from ._pls import pls as pls
    from ._pool import pool as pool
    from ._quadrature import agq_deviance as agq_deviance
    from ._quadrature import gauss_hermite as gauss_hermite
    from ._simulate import parameter_template as parameter_template
    from ._simulate import simulate as simulate
    from ._simulated_tests import bootstrap_test as bootstrap_test
    from ._simulated_tests import power as power
    from ._steps import ConvergenceWarning as ConvergenceWarning
    from ._steps import DevianceFunction as DevianceFunction
    from ._steps import ModelSetup as ModelSetup
    from ._steps import deviance_function as deviance_function
    from ._steps import make_model as make_model
    from ._steps import optimise as optimise
    from ._structure import Structure as Structure
    from ._structure import structure as structure
    from .links import Link as Link
    from .results import MixedModel as MixedModel
    from .results import VarCorr as VarCorr

    update_formula = _parse.update

#: public name -> (module, name there); None for the module itself
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "glmer": ("_glmer", "glmer"),
    "lmer": ("_lmer", "lmer"),
    "glmer_setup": ("_glmer", "glmer_setup"),
    "lmer_setup": ("_lmer", "lmer_setup"),
    "deviance_function": ("_steps", "deviance_function"),
    "optimise": ("_steps", "optimise"),
    "make_model": ("_steps", "make_model"),
    "ModelSetup": ("_steps", "ModelSetup"),
    "DevianceFunction": ("_steps", "DevianceFunction"),
    "Estimates": ("_fit", "Estimates"),
    "fit_design": ("_fit_design", "fit_design"),
    "DesignFit": ("_fit_design", "DesignFit"),
    "fit_many": ("_fit_many", "fit_many"),
    "ManyFits": ("_fit_many", "ManyFits"),
    "lm_list": ("_lmlist", "lm_list"),
    "design": ("_glmer", "design"),
    "design_arrays": ("_design", "design_arrays"),
    "laplace_deviance": ("_objective", "laplace_deviance"),
    "agq_deviance": ("_quadrature", "agq_deviance"),
    "gauss_hermite": ("_quadrature", "gauss_hermite"),
    "pirls": ("_pirls", "pirls"),
    "lmm_deviance": ("_pls", "lmm_deviance"),
    "pls": ("_pls", "pls"),
    "pool": ("_pool", "pool"),
    "bootstrap_test": ("_simulated_tests", "bootstrap_test"),
    "exact_test": ("_exact_test", "exact_test"),
    "ExactTest": ("_exact_test", "ExactTest"),
    "power": ("_simulated_tests", "power"),
    "anova": ("_anova", "anova"),
    "drop1": ("_drop", "drop1"),
    "add1": ("_drop", "add1"),
    "simulate": ("_simulate", "simulate"),
    "parameter_template": ("_simulate", "parameter_template"),
    "structure": ("_structure", "structure"),
    "Structure": ("_structure", "Structure"),
    "Control": ("_control", "Control"),
    "Design": ("_design", "Design"),
    "Unstructured": ("_covariance", "Unstructured"),
    "Diagonal": ("_covariance", "Diagonal"),
    "Link": ("links", "Link"),
    "MixedModel": ("results", "MixedModel"),
    "VarCorr": ("results", "VarCorr"),
    "FormulaError": ("_errors", "FormulaError"),
    "DataError": ("_errors", "DataError"),
    "ConvergenceWarning": ("_steps", "ConvergenceWarning"),
    "parse": ("_parse", "parse"),
    "update_formula": ("_parse", "update"),
    "datasets": ("datasets", None),
    "families": ("families", None),
    "links": ("links", None),
    "plots": ("plots", None),
}

__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("glmmjax")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'glmmjax' has no attribute {name!r}")
    module_name, attribute = _PUBLIC[name]
    module = importlib.import_module(f".{module_name}", __name__)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
