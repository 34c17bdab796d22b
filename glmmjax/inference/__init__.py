"""What is asked of a fitted model: each module answers one question, and none knows the others' callers.

Modules are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import approximation as approximation
    from . import bootstrap as bootstrap
    from . import coefficients as coefficients
    from . import getme as getme
    from . import influence as influence
    from . import likelihood as likelihood
    from . import means as means
    from . import messages as messages
    from . import modes as modes
    from . import predict as predict
    from . import profile as profile
    from . import residuals as residuals
    from . import score as score
    from . import sdcor as sdcor
    from . import simulate as simulate
    from . import summaries as summaries
    from . import summary as summary
    from . import varcorr as varcorr
    from . import wald as wald


def __getattr__(name: str) -> Any:
    try:
        return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from error
