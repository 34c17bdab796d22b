"""`ManyFits`: the tables of many fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .._arguments import checked
from .._errors import DataError
from ..fit import optimise as opt
from ..fit.batch import Many
from ..model.covariance import natural_of, numbered, structure_of
from ..report.table import Block, Shown, of_frame
from .data import Labels
from .multiple import adjusted
from .partial import Piece
from .sources import Model, Source

if TYPE_CHECKING:
    from ..results import MixedModel

CONVERGED, NOT_CONVERGED, SEPARATED, ERROR, NOT_RUN = "converged", "not converged", "separated", "error", "not run"


@checked("name")  # which may be of any type
class ManyFits(Shown):
    """Fits of one model to many datasets, as returned by `fit_many`.

    Attributes:
        names: of the datasets. elapsed: seconds that the fits took, compilation included.
        frame: one row per dataset and fixed effect. fits: one row per dataset.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        pieces: list[Piece],
        errors: dict[int, str],
        adjust: str,
        elapsed: float,
        single: Callable[[Model, str, Any, Any, dict[str, Any]], MixedModel],
    ) -> None:
        self._model, self._source, self._adjust, self._single = model, source, adjust, single
        self._pieces = sorted(pieces, key=lambda p: int(p.ids[0]))
        self._errors, self.elapsed = errors, elapsed
        self.names = source.names

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def fits(self) -> pd.DataFrame:
        """One row per dataset, indexed by its name.

        status ("converged", "not converged", "separated", "error", "not run") and message, singular, nobs, logLik
        (of REML fits minus half the criterion), evaluations (of deviance and gradient), decrement (expected further
        decrease of the deviance), sigma and dispersions, standard deviations and correlations of the random effects
        (NaN where a dataset has no such parameter).
        """
        B = len(self)
        status = np.full(B, NOT_RUN, object)
        message = np.full(B, "", object)
        columns: dict[str, np.ndarray] = {}

        def put(name: str, ids: np.ndarray, values: np.ndarray) -> None:
            columns.setdefault(name, np.full(B, np.nan))[ids] = values

        singular = np.zeros(B, bool)
        for name in ("nobs", "logLik", "evaluations", "decrement"):
            columns[name] = np.full(B, np.nan)
        for piece in self._pieces:
            ids, fits = piece.ids, piece.fits
            status[ids] = np.where(fits.converged, CONVERGED, NOT_CONVERGED)
            for i in np.flatnonzero(~fits.converged):
                message[ids[i]] = opt.MESSAGES[int(fits.status[i])]
            flat = fits.flat & ~fits.singular & fits.converged
            message[ids[flat]] = "the data do not determine all parameters"
            limit = np.isinf(fits.phi).any(axis=1) & fits.converged & ~flat
            message[ids[limit]] = f"no overdispersion: the {self._model.family.limit} limit"
            status[ids[piece.separated]] = SEPARATED
            for i in np.flatnonzero(piece.separated):
                off = [n for n, v in zip(piece.labels.x, np.diag(fits.vcov[i]), strict=True) if np.isinf(v)]
                message[ids[i]] = f"the response is separated: {', '.join(off)} run{'' if len(off) > 1 else 's'} off"
            singular[ids] = fits.singular
            put("nobs", ids, piece.rows)
            put("logLik", ids, -0.5 * fits.objective)
            put("evaluations", ids, fits.evaluations)
            put("decrement", ids, fits.decrement)
            if self._model.linear:
                put("sigma", ids, fits.sigma)
            for j, name in enumerate(self._model.family.phi_names):
                put(name, ids, fits.phi[:, j])
            for name, values in standard_deviations(piece.labels, fits):
                put(name, ids, values)
        for number, text in self._errors.items():
            status[number], message[number], singular[number] = ERROR, text, False
            for values in columns.values():
                values[number] = np.nan
        out = pd.DataFrame({"status": status, "message": message, "singular": singular, **columns})
        for name in ("nobs", "evaluations"):
            out[name] = out[name].astype("Int64")
        out.index = pd.Index(self.names, name="dataset")
        return out

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per dataset and fixed effect.

        dataset, term, estimate, std_error, statistic, df (of gaussian models), p_value, p_adjusted (over the datasets
        whose fit converged, term by term), then the columns of `fits`.
        """
        linear = self._model.linear
        parts = []
        for piece in self._pieces:
            fits, p = piece.fits, len(piece.labels.x)
            good = np.array([int(i) not in self._errors for i in piece.ids])
            with np.errstate(invalid="ignore", divide="ignore"):
                se = np.sqrt(np.diagonal(fits.vcov, axis1=1, axis2=2))
                statistic = fits.beta / se
            values = {"estimate": fits.beta, "std_error": se, "statistic": statistic, "df": fits.df}
            flat = {name: v[good].reshape(-1) for name, v in values.items()}
            terms = np.tile(np.array(piece.labels.x, object), int(good.sum()))
            parts.append(pd.DataFrame({"id": np.repeat(piece.ids[good], p), "term": terms, **flat}))
        columns = ["id", "term", "estimate", "std_error", "statistic", "df"]
        out = pd.concat(parts) if parts else pd.DataFrame({c: [] for c in columns})
        out = out.sort_values("id", kind="stable", ignore_index=True)
        out["p_value"] = p_values(out["statistic"].to_numpy(float), out["df"].to_numpy(float), linear)
        table = self.fits
        ids = out.pop("id").to_numpy(int)
        usable = (table["status"] == CONVERGED).to_numpy()[ids]
        p_value, p_adjusted = out["p_value"].to_numpy(float), np.full(len(out), np.nan)
        for rows in out.groupby("term", sort=False).indices.values():
            mine = rows[usable[rows]]
            p_adjusted[mine] = adjusted(p_value[mine], self._adjust)
        out["p_adjusted"] = p_adjusted
        if not linear:
            out = out.drop(columns="df")
        rest = table.iloc[ids].reset_index()
        out.insert(0, "dataset", rest.pop("dataset"))
        return pd.concat([out, rest], axis=1)

    def _table(self, values: str) -> pd.DataFrame:
        return self.frame.pivot(index="dataset", columns="term", values=values).reindex(
            index=self.names, columns=list(dict.fromkeys(self.frame["term"]))
        )

    @cached_property
    def coef(self) -> pd.DataFrame:
        """Fixed effects, one row per dataset."""
        return self._table("estimate")

    @cached_property
    def std_error(self) -> pd.DataFrame:
        """Their standard errors."""
        return self._table("std_error")

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """NumPy arrays over the datasets, NaN where there is no fit.

        theta (B, n_theta), beta (B, p), vcov (B, p, p) of beta, phi (B, n_phi), sigma (B,), objective (B,).

        Raises:
            DataError: the datasets do not all have the same columns.
        """
        shapes = {(piece.labels.x, piece.labels.terms) for piece in self._pieces}
        if len(shapes) > 1:
            raise DataError(f"the datasets have {len(shapes)} different sets of columns; use frame, coef and fits")
        out: dict[str, np.ndarray] = {}
        for piece in self._pieces:
            for name in ("theta", "beta", "vcov", "phi", "sigma", "objective"):
                values = getattr(piece.fits, name)
                out.setdefault(name, np.full((len(self), *values.shape[1:]), np.nan))[piece.ids] = values
        for i in self._errors:
            for values in out.values():
                values[i] = np.nan
        return out

    @property
    def failed(self) -> pd.DataFrame:
        """Datasets without a converged fit: status and message."""
        fits = self.fits
        return fits.loc[fits["status"] != CONVERGED, ["status", "message"]]

    def fit(self, name: Any) -> MixedModel:
        """The fit of one dataset as a full model; it is made anew, from the estimates.

        Args:
            name: of the dataset.
        """
        try:
            i = self.names.index(name)
        except ValueError:
            raise KeyError(f"no dataset {name!r}; the first are {', '.join(map(repr, self.names[:5]))}") from None
        formula, data, arguments = self._source.model_arguments(i)
        model = self._model
        start: dict[str, Any] | None = None
        for piece in self._pieces:
            at = np.flatnonzero(piece.ids == i)
            if at.size and i not in self._errors and piece.fits.converged[at[0]]:
                start = {"theta": piece.fits.theta[at[0]]}
                if not model.linear:
                    start |= {"beta": piece.fits.beta[at[0]], "phi": piece.fits.phi[at[0]]}
        return self._single(model, formula, data, start, arguments)

    def summary(self) -> pd.DataFrame:
        """Quantiles of the estimates over the datasets that converged, and how many are significant at 0.05."""
        good = self.frame[self.frame["status"] == CONVERGED]
        rows = {}
        for term in dict.fromkeys(good["term"]):
            own = good[good["term"] == term]
            quantiles = own["estimate"].quantile([0.0, 0.25, 0.5, 0.75, 1.0])
            rows[term] = [
                len(own),
                *quantiles,
                own["std_error"].median(),
                int((own["p_value"] < 0.05).sum()),
                int((own["p_adjusted"] < 0.05).sum()),
            ]
        names = ["fits", "min", "25 %", "median", "75 %", "max", "median std_error", "p < .05", "p_adjusted < .05"]
        return pd.DataFrame.from_dict(rows, orient="index", columns=names)

    def _head(self) -> list[str]:
        fits, model = self.fits, self._model
        what = f"lmer ({'REML' if model.REML else 'ML'})" if model.linear else f"glmer ({model.family})"
        lines = [f"{len(self):,} fits of {model.formula}, {what}, in {self.elapsed:.3g} s"]
        counts = fits["status"].value_counts()
        lines.append(", ".join(f"{n:,} {status}" for status, n in counts.items()))
        if fits["singular"].any():
            lines.append(f"{int(fits['singular'].sum()):,} singular")
        return lines

    def _report(self, page: bool) -> Sequence[Block]:
        out: list[Block] = [*self._head(), of_frame(self.summary(), ".4g")]
        if page:
            return out
        failed = self.failed
        out += [f"  {name}: {row['status']}: {row['message']}" for name, row in failed.head(3).iterrows()]
        return out + ([f"  ... and {len(failed) - 3:,} more in .failed"] if len(failed) > 3 else [])


def standard_deviations(labels: Labels, fits: Many) -> list[tuple[str, np.ndarray]]:
    """Standard deviations and correlations (B,) of the random effects under lme4's names."""
    structures, groups = [structure_of(label) for label in labels.terms], numbered(label[0] for label in labels.terms)
    names: list[str] = []
    for structure, label, group in zip(structures, labels.terms, groups, strict=True):
        names += structure.natural_names(group, label[1])
    return list(zip(names, natural_of(fits.theta, fits.sigma, structures).T, strict=True))


def p_values(statistic: np.ndarray, df: np.ndarray, linear: bool) -> np.ndarray:
    """Two-sided, of t with `df` degrees of freedom or normal."""
    from scipy.special import ndtr, stdtr

    tail = stdtr(df, -np.abs(statistic)) if linear else ndtr(-np.abs(statistic))
    return np.asarray(2.0 * tail)
