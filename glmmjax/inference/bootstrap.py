"""Bootstrap distributions of a model's estimates: simulated responses, resampled residuals, or resampled groups.

Many replicates are fitted together (`many.refits`); few each by the program that the fit itself compiled, on another
response or on rows padded with weight 0 to one shape. Standard errors, and with them half of a fit's evaluations, are
left out.

Sources: Davison & Hinkley 1997, Bootstrap Methods and their Application, section 3.8 (groups), chapter 5 (intervals);
Bates et al. 2015, J. Stat. Softw. 67(1), section 5.2 (parametric); Carpenter, Goldstein & Rasbash 2003, J. R. Stat.
Soc. C 52 (residuals scaled to sigma).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import DataError, NotSupportedError
from ..compiling.entry import entry
from ..families import LOG_PHI_MAX
from ..fit import optimise as opt
from ..fit.batch import Many
from ..fit.glmm import GeneralisedProblem
from ..fit.lmm import LinearProblem
from ..fit.problem import FAR, Problem, searched
from ..many.refits import BATCH_FROM, LEAST_INFORMATION, fit_levels, fit_rows, information_by_cluster
from ..model.covariance import natural_of
from ..model.design import design_arrays
from ..report.progress import progress
from ..report.table import Block, Shown, of_frame
from .profile import standard_focals

if TYPE_CHECKING:
    from ..results import MixedModel

KINDS = ("parametric", "semiparametric", "groups")
INTERVALS = ("percentile", "basic", "normal")


@checked()
@dataclass(frozen=True, repr=False)
class Bootstrap(Shown):
    """Replicates as returned by `MixedModel.bootstrap`.

    Attributes:
        kind, seed: as asked for. frame: (nsim, statistics) values of the replicates; rows of failed refits are NaN.
        observed: the statistics of the fit. failed: numbers of the replicates whose refit did not converge, whose
            coefficients ran off (a separated response; those that do in the fit are NaN throughout), or whose levels do
            not tell some fixed effect.
        singular: how many of the others had a standard deviation below 1e-4.
    """

    kind: str
    seed: Any
    frame: pd.DataFrame
    observed: pd.Series
    failed: tuple[int, ...]
    singular: int

    @property
    def good(self) -> pd.DataFrame:
        """The replicates that converged."""
        return self.frame.drop(index=list(self.failed))

    def confint(self, level: float = 0.95, kind: str = "percentile") -> pd.DataFrame:
        """Intervals from the replicates that converged, columns as R's.

        Args:
            kind: "percentile"; "basic", the percentiles reflected at the estimate; "normal", about the
                estimate less the bias.
        """
        if kind not in INTERVALS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, INTERVALS))}, got {kind!r}")
        values, tail = self.good, 0.5 * (1.0 - level)
        low, high = (  # interpolated where neighbours are finite
            values.quantile(q).fillna(values.quantile(q, interpolation="nearest")) for q in (tail, 1.0 - tail)
        )
        if kind == "basic":
            low, high = 2.0 * self.observed - high, 2.0 * self.observed - low
        elif kind == "normal":
            middle = 2.0 * self.observed - values.mean()
            half = NormalDist().inv_cdf(1.0 - tail) * values.std(ddof=1)
            low, high = middle - half, middle + half
        return pd.DataFrame({f"{100.0 * tail:g} %": low, f"{100.0 * (1.0 - tail):g} %": high})

    def summary(self) -> pd.DataFrame:
        """observed, bias, std_error and median by statistic."""
        values = self.good
        return pd.DataFrame(
            {
                "observed": self.observed,
                "bias": values.mean() - self.observed,
                "std_error": values.std(ddof=1),
                "median": values.median(),
            }
        )

    def _report(self, page: bool) -> Sequence[Block]:
        out: list[Block] = [f"{self.kind.capitalize()} bootstrap, {len(self.frame)} replicates (seed {self.seed})"]
        out.append(of_frame(self.summary(), ".5g"))
        if self.failed:
            out.append(f"{len(self.failed)} refits did not converge or ran off, and are left out")
        if self.singular:
            out.append(f"{self.singular} refits were singular")
        return out


def bootstrap(
    model: MixedModel,
    nsim: int = 1000,
    seed: Any = 0,
    kind: str = "parametric",
    statistic: Callable[[MixedModel], Any] | None = None,
    batched: bool | None = None,
) -> Bootstrap:
    """Bootstrap distribution of the estimates, by refits of the compiled program.

    Args:
        nsim: replicates. seed: of NumPy's generator.
        kind: "parametric" simulates random effects and responses; "semiparametric" (linear models) keeps the
            conditional modes and resamples residuals, scaled to sigma; "groups" resamples the levels of the
            grouping factor.
        statistic: of a fitted model, a number, array or Series; default standard deviations, correlations,
            sigma and fixed effects, which is much faster.
        batched: fit replicates together by the programs of `glmmjax.fit_many`, some ten times as fast once these
            are compiled (or found in the cache); None does so from 1,000 replicates on.

    Returns:
        `Bootstrap`: `frame`, `summary()`, `confint(level, kind="percentile"|"basic"|"normal")`; refits that
        failed are counted and kept apart.
    """
    if isinstance(nsim, bool) or not isinstance(nsim, (int, np.integer)) or nsim < 1:
        raise ValueError(f"nsim must be a positive integer, got {nsim!r}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if statistic is not None:
        return _of_statistic(model, int(nsim), seed, kind, statistic)
    names = [f.name for f in standard_focals(model)]
    observed = natural_values(model)
    start = {"theta": model._estimates.theta, "phi": model._estimates.phi}
    if not model.is_linear:
        start["beta"] = model._estimates.beta
    own = np.isin(model._data.x_names, model.separated)  # what runs off in the fit does in its replicates, too
    control = model._spec.control
    limits = opt.Limits(control.tol, control.max_evaluations, False)
    levels, deficient = _draw_levels(model, int(nsim), seed) if kind == "groups" else (None, np.zeros(int(nsim), bool))
    if nsim >= BATCH_FROM if batched is None else batched:
        if levels is not None:
            fits = fit_levels(model, levels, limits, start)
        else:
            fits = fit_rows(model, "y", draw_responses(model, int(nsim), seed, kind), int(nsim), limits, start)
        out, good = many_values(model, fits), fits.converged
        off = np.isinf(np.diagonal(fits.vcov, axis1=1, axis2=2)) & fits.separated[:, None]
        good = good & ~(off & ~own).any(axis=1)
        singular = fits.singular
    else:
        if levels is not None:
            problems = _of_groups(model, levels)
        else:
            problems = (model._problem.with_rows("y", y) for y in draw_responses(model, int(nsim), seed, kind))
        out, good, singular = _in_turn(model, problems, int(nsim), start, limits, own)
    good &= ~deficient
    out[~good] = np.nan
    out[:, len(names) - own.size + np.flatnonzero(own)] = np.nan
    frame = pd.DataFrame(out, columns=names)
    failed = tuple(np.flatnonzero(~good).tolist())
    return Bootstrap(kind, seed, frame, pd.Series(observed, names), failed, int((singular & good).sum()))


@entry
def _in_turn(
    model: MixedModel,
    problems: Iterator[Problem],
    count: int,
    start: dict[str, np.ndarray],
    limits: opt.Limits,
    own: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, values) of `standard_focals`; (B,) which converged, no column run off but `own`; and which are singular."""
    out = np.full((count, len(standard_focals(model))), np.nan)
    good, singular = np.zeros(count, bool), np.zeros(count, bool)
    for i, problem in enumerate(progress(problems, "bootstrap", count)):
        problem, found, separation = searched(problem, start, limits)
        theta, beta, sigma, phi = natural_parameters(problem, found)
        good[i] = found.status == opt.CONVERGED
        if separation is not None:
            good[i] &= not (separation.columns & ~own).any()
        out[i] = _values(model, theta, beta, sigma, phi)
        inner = np.asarray(found.x)
        singular[i] = any(t.structure.singular(inner[t.theta]) for t in problem.original.terms)
    return out, good, singular


def many_values(model: MixedModel, fits: Many) -> np.ndarray:
    """(B, values) of `standard_focals`."""
    columns = [natural_of(fits.theta, fits.sigma, [t.structure for t in model._design.terms])]
    if model.is_linear:
        columns.append(fits.sigma)
    return np.column_stack([*columns, fits.phi, fits.beta])


def natural_parameters(problem: Problem, found: opt.Found) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """theta, beta, sigma, phi in the user's units."""
    x, at = np.array(found.x), problem.layout.at.log_phi
    if problem.family.limit:  # a search towards the limit ends far out
        far = x[at] > np.log(FAR * max(1.0, float(problem.original.y.max())))
        x[at] = np.where(far, LOG_PHI_MAX, x[at])
    theta, beta, phi = problem.natural(x, found.carry)
    return theta, beta, problem.sigma(found.carry), phi


def natural_values(model: MixedModel) -> np.ndarray:
    """Standard deviations, correlations, sigma, dispersions and fixed effects, as `standard_focals` names them."""
    e = model._estimates
    return _values(model, e.theta, e.beta, model.sigma, e.phi)


def _values(model: MixedModel, theta: np.ndarray, beta: np.ndarray, sigma: float, phi: np.ndarray) -> np.ndarray:
    """Standard deviations, correlations, sigma, dispersions and fixed effects, in the order of `standard_focals`."""
    natural = natural_of(theta, sigma, [t.structure for t in model._design.terms])
    return np.array([*natural, *([sigma] if model.is_linear else []), *phi, *beta])


def draw_responses(model: MixedModel, nsim: int, seed: Any, kind: str) -> Iterator[np.ndarray]:
    """Responses (n,) on the scale of the design, drawn in blocks."""
    from .simulate import as_response

    rng = np.random.default_rng(seed)
    if kind == "semiparametric":
        if not model.is_linear:
            raise NotSupportedError("kind='semiparametric' resamples the residuals of a linear model; use 'parametric'")
        root = np.sqrt(np.asarray(model._design.weights))
        fitted = np.asarray(model.fitted)
        residuals = root * (np.asarray(model._design.y) - fitted)
        residuals = residuals - residuals.mean()
        residuals *= model.sigma / np.sqrt(np.mean(residuals**2))  # shrunken as they are, sigma would come out small
        for _ in range(nsim):
            yield fitted + rng.choice(residuals, residuals.size) / root
        return
    block = max(1, min(nsim, 10_000_000 // max(model.nobs, 1), 200))
    done = 0
    while done < nsim:
        size = min(block, nsim - done)
        drawn = model.simulate(size, rng)
        for name in drawn:
            yield np.ascontiguousarray(as_response(model, drawn[name]), dtype=float)
        done += size


def _draw_levels(model: MixedModel, nsim: int, seed: Any) -> tuple[np.ndarray, np.ndarray]:
    """(nsim, m) levels of the only grouping factor, with replacement, and which draws leave out all levels that tell
    some fixed effect; these are replaced by the data themselves."""

    design = model._design
    if len(design.z) != 1:
        raise NotSupportedError(
            f"kind='groups' resamples the levels of one grouping factor, the model has {len(design.z)} "
            f"({', '.join(model.ngrps)}); use 'parametric'"
        )
    m, p = design.n_levels[0], design.p
    draws = np.random.default_rng(seed).integers(0, m, (nsim, m))
    deficient = np.zeros(nsim, bool)
    if p:
        parts = information_by_cluster(np.asarray(design.X), np.asarray(design.level[0]), m)
        for i, draw in enumerate(draws):
            deficient[i] = np.linalg.eigvalsh(parts[draw].sum(axis=0))[0] < LEAST_INFORMATION
    draws[deficient] = np.arange(m)
    return draws, deficient


def _of_groups(model: MixedModel, draws: np.ndarray) -> Iterator[Problem]:
    """Designs of drawn levels, each draw a level of its own; rows padded to one number by weight 0."""
    design = model._design
    level, m = np.asarray(design.level[0]), design.n_levels[0]
    members = [np.flatnonzero(level == j) for j in range(m)]
    size = max(int(np.array([r.size for r in members])[d].sum()) for d in draws)
    for draw in draws:
        rows = np.concatenate([members[j] for j in draw])
        own = np.repeat(np.arange(m, dtype=np.int32), [members[j].size for j in draw])
        pad = size - rows.size
        rows = np.concatenate([rows, np.full(pad, rows[0])])
        own = np.concatenate([own, np.zeros(pad, np.int32)])
        weights = np.asarray(design.weights)[rows]
        weights[size - pad :] = 0.0
        terms = [(np.asarray(design.z[0])[rows][:, t.columns], own, t.structure) for t in design.terms]
        made = design_arrays(
            np.asarray(design.y)[rows], np.asarray(design.X)[rows], terms, weights, np.asarray(design.offset)[rows]
        )
        problem = model._problem
        if isinstance(problem, LinearProblem):
            yield LinearProblem(made, problem.REML, False)
        else:
            assert isinstance(problem, GeneralisedProblem)
            yield GeneralisedProblem(made, problem.family, problem.nAGQ, problem.hessian)


def _of_statistic(
    model: MixedModel, nsim: int, seed: Any, kind: str, statistic: Callable[[MixedModel], Any]
) -> Bootstrap:
    """Replicates of a user's function of whole models."""
    if kind == "groups":
        raise ValueError("a statistic is of a model with the fit's rows: use kind='parametric' or 'semiparametric'")

    def named(value: Any) -> pd.Series:
        if isinstance(value, pd.Series):
            return value.astype(float)
        array = np.atleast_1d(np.asarray(value, float))
        return pd.Series(array, [f"t{j + 1}" for j in range(array.size)] if array.size > 1 else ["statistic"])

    observed = named(statistic(model))
    rows, failed, singular = [], [], 0
    for i, y in enumerate(progress(draw_responses(model, nsim, seed, kind), "bootstrap")):
        m = refitted(model, y)
        if m is None or not m.converged:
            failed.append(i)
            rows.append(pd.Series(np.nan, observed.index))
            continue
        singular += m.is_singular
        rows.append(named(statistic(m)))
    return Bootstrap(kind, seed, pd.DataFrame(rows).reset_index(drop=True), observed, tuple(failed), singular)


def refitted(model: MixedModel, y: np.ndarray) -> MixedModel | None:
    """The fit to a simulated response, without its warnings; None where it cannot be fitted (a constant)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return model.refit(y)
        except DataError:
            return None


def refit_many(model: MixedModel, responses: Any) -> pd.DataFrame:
    """The same model fitted to each column of `responses` (n, B), without recompilation.

    Returns:
        One row per column: standard deviations, correlations, sigma and fixed effects, their standard errors
        ("se_" + name), loglik, converged, singular.
    """
    table = model._data.on_rows(responses, "responses", "have")
    table = table if isinstance(table, pd.DataFrame) else pd.DataFrame(np.asarray(table))
    names = [f.name for f in standard_focals(model)]
    rows = []
    for i in progress(range(table.shape[1]), "refits"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said in the columns
            try:
                m = model.refit(table.iloc[:, i])
            except DataError as error:
                raise DataError(f"response {table.columns[i]!r}: {error}") from None
        values = dict(zip(names, natural_values(m), strict=True))
        errors = {f"se_{k}": v for k, v in m.bse.items()}
        rows.append({**values, **errors, "loglik": m.loglik, "converged": m.converged, "singular": m.is_singular})
    return pd.DataFrame(rows, index=pd.Index(list(table), name="response"))
