"""matplotlib where a picture is asked for; it is an extra, and heavy to import."""

from __future__ import annotations

from typing import Any

import numpy as np

from .._arguments import shown


def pyplot() -> Any:
    """matplotlib.pyplot, or one sentence on how to get it."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plots need matplotlib: python -m pip install 'glmmjax[plots]'") from error
    return plt


def given_axes(ax: Any, count: int) -> np.ndarray:
    """(count,) axes of the user's own."""
    axes = np.asarray(ax, object).reshape(-1)
    if axes.size != count:
        raise ValueError(f"ax must hold {count} axes, one per panel; got {axes.size}")
    for one in axes:
        if not hasattr(one, "get_xlim"):
            raise TypeError(f"ax must hold matplotlib axes, got {shown(one)}")
    return axes
