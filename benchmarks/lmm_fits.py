"""Single fits of linear models: glmmjax and its peers on the same data in the same run."""

from __future__ import annotations

from . import peers, report
from .cases import LMM_FITS
from .fits import compared, ours
from .measure import Record, Settings, Suite


def run(name: str, settings: Settings) -> list[Record]:
    """All systems on one case, one process after the other."""
    case = LMM_FITS[name]
    systems = (ours, peers.lme4, peers.glmmtmb, peers.glmm, peers.mixedlm, peers.statsmodels)
    return compared(name, [record for system in systems for record in system(case, settings)])


LONG = tuple(name for name, case in LMM_FITS.items() if case.long)
SUITE = Suite("lmm_fits", "Single fits of linear mixed models", tuple(LMM_FITS), run, report.linear_fits, LONG)
