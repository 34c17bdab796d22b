"""Standard deviations and correlations with delta-method standard errors."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from ..compiling.entry import entry
from ..model.parameters import Layout
from .bootstrap import natural_values
from .likelihood import Likelihood
from .profile import standard_focals

if TYPE_CHECKING:
    from ..results import MixedModel


@partial(jax.jit, static_argnames=("layout",))
def _transformed_jacobian(x: Array, layout: Layout) -> Array:
    """Derivatives of log standard deviations, Fisher's z of correlations, log sigma or log dispersions."""

    def transformed(v: Array) -> Array:
        point = layout.natural(v)
        out = []
        for term, cov in zip(layout.terms, point.cov, strict=True):
            natural = term.structure.natural(cov)
            for (a, b), value in zip(term.structure.entries(), natural, strict=True):
                out.append(jnp.log(value) if a == b else jnp.arctanh(value))
        out += [jnp.log(point.sigma)] if layout.has_sigma else list(jnp.log(point.phi))
        return jnp.stack(out)

    return jax.jacfwd(transformed)(x)


@entry
def sdcor_table(model: MixedModel) -> pd.DataFrame:
    """Standard deviations, correlations, sigma and dispersions with delta-method standard errors.

    Returns:
        By name: estimate, std_error; "transformed" (its log, or Fisher's z of a correlation), its standard error,
        and "scale" ("log" or "z"). NaN errors where the estimate is on its boundary.
    """
    focals = standard_focals(model)
    count = len(focals) - model._design.p
    values = natural_values(model)[:count]
    correlation = np.zeros(count, bool)
    entries = [a != b for term in model._design.terms for a, b in term.structure.entries()]
    correlation[: len(entries)] = entries
    likelihood = Likelihood(model, model.REML)
    joint = model._joint_covariance
    joint = np.where(np.isfinite(joint), joint, 0.0)  # what has no finite variance is a value of its own

    J = np.asarray(_transformed_jacobian(likelihood.x, likelihood.layout))
    with np.errstate(all="ignore"):
        transformed = np.where(correlation, np.arctanh(np.clip(values, -1.0, 1.0)), np.log(values))
        error = np.sqrt(np.einsum("ij,jk,ik->i", J, joint, J))
        error = np.where(np.isfinite(transformed), error, np.nan)
        slope = np.where(correlation, 1.0 - values**2, values)
    return pd.DataFrame(
        {
            "estimate": values,
            "std_error": slope * error,
            "transformed": transformed,
            "transformed_error": error,
            "scale": np.where(correlation, "z", "log"),
        },
        index=[f.name for f in focals[:count]],
    )
