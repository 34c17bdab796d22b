"""Single fits of generalised models: glmmjax, lme4, glmmTMB, glmm and gpboost on the same data in the same run."""

from __future__ import annotations

from . import peers, report
from .cases import GLMM_FITS
from .fits import compared, ours
from .measure import Record, Settings, Suite


def run(name: str, settings: Settings) -> list[Record]:
    """All systems on one case, one process after the other."""
    case = GLMM_FITS[name]
    systems = (ours, peers.lme4, peers.glmmtmb, peers.glmm, peers.gpboost)
    return compared(name, [record for system in systems for record in system(case, settings)])


LONG = tuple(name for name, case in GLMM_FITS.items() if case.long)
SUITE = Suite("glmm_fits", "Single fits of generalised mixed models", tuple(GLMM_FITS), run, report.fits, LONG)
