"""Differentiable generalised linear mixed models in JAX.

    import glmmjax as gj
    m = gj.glmer("cbind(incidence, size - incidence) ~ period + (1 | herd)", gj.datasets.load("cbpp"))
    print(m.summary())

Names are imported when first used, so that ``import glmmjax`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .compiling import loaded  # noqa: F401

if TYPE_CHECKING:
    from . import datasets as datasets
    from . import families as families
    from . import links as links
    from . import plots as plots
    from ._errors import ConvergenceWarning as ConvergenceWarning
    from ._errors import DataError as DataError
    from ._errors import FormulaError as FormulaError
    from ._fit_many import fit_many as fit_many
    from ._glmer import design as design
    from ._glmer import glmer as glmer
    from ._glmer import glmer_setup as glmer_setup
    from ._lmer import lmer as lmer
    from ._lmer import lmer_setup as lmer_setup
    from ._steps import DevianceFunction as DevianceFunction
    from ._steps import ModelSetup as ModelSetup
    from ._steps import deviance_function as deviance_function
    from ._steps import make_model as make_model
    from ._steps import optimise as optimise
    from .fit.control import Control as Control
    from .fit.implicit import DesignFit as DesignFit
    from .fit.implicit import fit_design as fit_design
    from .fit.problem import Estimates as Estimates
    from .formula.parse import parse as parse
    from .formula.parse import update as update_formula  # noqa: F401
    from .inference.anova import anova as anova
    from .inference.drop import add1 as add1
    from .inference.drop import drop1 as drop1
    from .inference.exact_test import ExactTest as ExactTest
    from .inference.exact_test import exact_test as exact_test
    from .inference.lmlist import lm_list as lm_list
    from .inference.pool import pool as pool
    from .inference.simulate import parameter_template as parameter_template
    from .inference.simulate import simulate as simulate
    from .inference.simulated_tests import bootstrap_test as bootstrap_test
    from .inference.simulated_tests import power as power
    from .inference.structure import Structure as Structure
    from .inference.structure import structure as structure
    from .links import Link as Link
    from .many.results import ManyFits as ManyFits
    from .model.covariance import Diagonal as Diagonal
    from .model.covariance import Unstructured as Unstructured
    from .model.design import Design as Design
    from .model.design import design_arrays as design_arrays
    from .objective.laplace import laplace_deviance as laplace_deviance
    from .objective.pirls import pirls as pirls
    from .objective.pls import lmm_deviance as lmm_deviance
    from .objective.pls import pls as pls
    from .objective.quadrature import agq_deviance as agq_deviance
    from .objective.quadrature import gauss_hermite as gauss_hermite
    from .results import MixedModel as MixedModel
    from .results import VarCorr as VarCorr

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
    "Estimates": ("fit.problem", "Estimates"),
    "fit_design": ("fit.implicit", "fit_design"),
    "DesignFit": ("fit.implicit", "DesignFit"),
    "fit_many": ("_fit_many", "fit_many"),
    "ManyFits": ("many.results", "ManyFits"),
    "lm_list": ("inference.lmlist", "lm_list"),
    "design": ("_glmer", "design"),
    "design_arrays": ("model.design", "design_arrays"),
    "laplace_deviance": ("objective.laplace", "laplace_deviance"),
    "agq_deviance": ("objective.quadrature", "agq_deviance"),
    "gauss_hermite": ("objective.quadrature", "gauss_hermite"),
    "pirls": ("objective.pirls", "pirls"),
    "lmm_deviance": ("objective.pls", "lmm_deviance"),
    "pls": ("objective.pls", "pls"),
    "pool": ("inference.pool", "pool"),
    "bootstrap_test": ("inference.simulated_tests", "bootstrap_test"),
    "exact_test": ("inference.exact_test", "exact_test"),
    "ExactTest": ("inference.exact_test", "ExactTest"),
    "power": ("inference.simulated_tests", "power"),
    "anova": ("inference.anova", "anova"),
    "drop1": ("inference.drop", "drop1"),
    "add1": ("inference.drop", "add1"),
    "simulate": ("inference.simulate", "simulate"),
    "parameter_template": ("inference.simulate", "parameter_template"),
    "structure": ("inference.structure", "structure"),
    "Structure": ("inference.structure", "Structure"),
    "Control": ("fit.control", "Control"),
    "Design": ("model.design", "Design"),
    "Unstructured": ("model.covariance", "Unstructured"),
    "Diagonal": ("model.covariance", "Diagonal"),
    "Link": ("links", "Link"),
    "MixedModel": ("results", "MixedModel"),
    "VarCorr": ("results", "VarCorr"),
    "FormulaError": ("_errors", "FormulaError"),
    "DataError": ("_errors", "DataError"),
    "ConvergenceWarning": ("_errors", "ConvergenceWarning"),
    "parse": ("formula.parse", "parse"),
    "update_formula": ("formula.parse", "update"),
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
