"""Conditional modes of the random effects, and their conditional covariances."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from ..algebra.bordered import selected_inverse
from ..algebra.linalg import eliminate, penalised
from ..compiling.entry import entry
from ..families import Family
from ..model.basis import inverse_of_lower
from ..model.design import Design
from ..model.parameters import Parameters
from ..objective.laplace import products_at
from ..objective.pirls import Blocked

if TYPE_CHECKING:
    from ..results import MixedModel


@partial(jax.jit, static_argnames=("family", "hessian"))
def _conditional_covariances(params: Parameters, u: Blocked, design: Design, family: Family, hessian: str) -> Blocked:
    """Lambda (L L')^-1 Lambda' per level, (m, k, k) per block."""
    blocks, T = products_at(params, u, design, family, hessian)
    H = penalised(blocks, T, design.plan)
    inverse = selected_inverse(eliminate(H, design.plan), H, design.plan)
    return tuple(jnp.einsum("ij,mjk,lk->mil", t, v, t) for t, v in zip(T, inverse.diagonal, strict=True))


@entry
def ranef(model: MixedModel, condVar: bool = False) -> dict[str, Any]:
    """Conditional modes of the random effects.

    Returns:
        dict: grouping factor -> DataFrame (levels x columns of all its terms). With `condVar`, each
        frame's ``attrs["condVar"]`` holds the conditional covariances (levels, k, k), sigma^2
        included (Bates et al. 2015, eq. 58-59).
    """
    out: dict[str, pd.DataFrame] = {}
    for group, indices in model._by_group().items():
        columns: list[str] = []
        for i in indices:
            columns += model._data.terms[i].names
        values = np.concatenate([model._b[i] for i in indices], axis=1)
        index = pd.Index(model._data.terms[indices[0]].levels, name=group)
        out[group] = pd.DataFrame(values, index=index, columns=columns)
    if condVar:
        inner = _conditional_covariances(*model._internal, model.family, model._spec.hessian)
        outer = [inverse_of_lower(L) for L in model._scaled[1].basis.L]
        blocks = [half @ np.asarray(V) @ half.T for half, V in zip(outer, inner, strict=True)]
        for group, indices in model._by_group().items():
            terms = [model._design.terms[i] for i in indices]
            pick = np.concatenate([np.arange(t.first, t.first + t.structure.k) for t in terms])
            cov = blocks[terms[0].block][:, pick][:, :, pick]
            out[group].attrs["condVar"] = model.sigma**2 * cov
    return out


def ranef_frame(model: MixedModel) -> pd.DataFrame:
    """Tidy conditional modes: grpvar, term, grp, condval, condsd (lme4's as.data.frame(ranef(m)))."""
    parts = []
    for group, frame in model.ranef(condVar=True).items():
        sds = np.sqrt(np.einsum("mkk->mk", frame.attrs["condVar"]))
        for j, term in enumerate(frame.columns):
            parts.append(
                pd.DataFrame(
                    {
                        "grpvar": group,
                        "term": term,
                        "grp": frame.index.to_numpy(),
                        "condval": frame.iloc[:, j].to_numpy(),
                        "condsd": sds[:, j],
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def coef(model: MixedModel) -> dict[str, pd.DataFrame]:
    """Per grouping factor, fixed effects plus conditional modes of each level (lme4's coef)."""
    out = {}
    for group, effects in model.ranef().items():
        names = list(model._data.x_names) + [c for c in effects.columns if c not in model._data.x_names]
        frame = pd.DataFrame(0.0, index=effects.index, columns=names)
        frame += model.fixef.reindex(names).fillna(0.0)
        for j, name in enumerate(effects.columns):
            frame[name] += effects.iloc[:, j]
        out[group] = frame
    return out
