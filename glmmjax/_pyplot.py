"""matplotlib where a picture is asked for; it is an extra, and heavy to import."""

from __future__ import annotations

from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, or one sentence on how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: python -m pip install 'glmmjax[plots]'") from error
    return plt
