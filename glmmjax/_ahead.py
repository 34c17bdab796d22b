"""Fits whose summary will be wanted: its programs are loaded or compiled while those of the fit are compiled."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import numpy as np

from ._steps import DevianceFunction, ModelSetup, deviance_function, make_model, optimise
from .compiling.entry import entry
from .fit.problem import Estimates, FitStats
from .results import MixedModel


@entry
def fit_for_summary(setup: ModelSetup) -> MixedModel:
    """`_steps.fit`, with the summary's programs at hand by its end."""
    deviance = deviance_function(setup)
    deviance.problem.while_compiling = partial(_prepare_summary, deviance)
    return make_model(deviance, optimise(deviance))


def _prepare_summary(deviance: DevianceFunction) -> None:
    """Run the programs of a summary once. They are found by shapes, so that any numbers will do."""
    from .inference.approximation import LADDER, affordable, levels_at

    # an error here is one of the summary itself, too, where it is raised
    with suppress(Exception), np.errstate(all="ignore"):
        model = _at_start(deviance)
        _ = model.conditional_deviance
        if affordable(model):
            levels_at(model, LADDER[0])


def _at_start(deviance: DevianceFunction) -> MixedModel:
    """The model at theta's start, with no effects."""
    setup = deviance.setup
    design, theta = setup.design, setup.design.theta_start
    phi = np.asarray(setup.family.phi_start(), float).reshape(-1)
    u = tuple(np.zeros((m, z.shape[1])) for m, z in zip(design.n_levels, design.z, strict=True))
    P = theta.size + design.p + phi.size
    stats = FitStats(0, 0, 0, 0.0, 0, "", 0, np.zeros((0, P + 2)))
    zero, eye = np.zeros(P), np.eye(P)
    at = Estimates(theta, np.zeros(design.p), phi, u, 0.0, zero, eye, eye, True, (), stats, 1.0, np.eye(design.p))
    return MixedModel(setup.spec, setup.data, deviance.problem, at)
