"""Numbers as R writes them: each function makes texts of equal form of a column of numbers, or one of one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

LEGEND = "Signif. codes:  0 '***' 0.001 '**' 0.01 '*' 0.05 '.' 0.1 ' ' 1"


def signif(values: np.ndarray, digits: int) -> list[str]:
    """R's format(): common decimals so that every value shows `digits` significant ones (at most 15)."""
    values = np.asarray(values, float)
    finite = values[np.isfinite(values)]
    need = 0
    for v in finite:
        if v == 0.0:
            continue
        text = f"{abs(v):.{digits - 1}e}"
        mantissa, exponent = text.split("e")
        significant = len(mantissa.replace(".", "").rstrip("0")) or 1
        need = max(need, significant - 1 - int(exponent))
    need = min(max(need, 0), 15)
    return [f"{v:.{need}f}" if np.isfinite(v) else "NaN" if np.isnan(v) else f"{v:f}".title() for v in values]


def r_format(values: Any, digits: int) -> list[str]:
    """R's format() of a vector: as many decimals as the number that needs most of them for `digits` significant
    digits, trailing zeros apart; all in scientific notation if that is narrower. NaN is empty."""
    array = np.asarray(values, float).reshape(-1)
    left = right = mantissa = 0
    large = False
    for v in array[np.isfinite(array)]:
        text, power = f"{abs(v):.{digits - 1}e}".split("e")
        exponent = int(power) if v else 0
        significant = max(len(text.replace(".", "").rstrip("0")), 1)
        left = max(left, max(exponent, 0) + 1 + (v < 0))
        right = max(right, significant - exponent - 1)
        mantissa = max(mantissa, significant - 1)
        large = large or abs(exponent) >= 100
    fixed = left + (right + 1 if right else 0)
    scientific = (array < 0).any() + 1 + (mantissa + 1 if mantissa else 0) + 4 + large
    style = f".{right}f" if fixed <= scientific else f".{mantissa}e"
    return ["" if np.isnan(v) else f"{v:{style}}" for v in array]


def r_pvalues(p: Any, digits: int = 4) -> list[str]:
    """R's format.pval of a vector; NaN is empty."""
    p = np.asarray(p, float).reshape(-1)
    tiny, eps = p < np.finfo(float).eps, np.finfo(float).eps
    power = np.floor(np.log10(np.where(p > 0.0, p, 1e-50)))
    plain = (power >= -3) | ((power == -4) & (digits > 1))
    out = np.full(p.size, "", dtype=object)
    for group in (plain & ~tiny, ~plain & ~tiny):
        if group.any():
            out[group] = r_format(p[group], digits)
    if tiny.any():
        fewer, space = max(1, digits - 2), " "
        widest = max((len(t) for t in out[~tiny]), default=0)
        if widest:
            fewer = max(1, widest - 7) if 1 < fewer and fewer + 6 > widest else fewer
            space = "" if fewer == 1 and widest <= 6 else " "
        out[tiny] = f"<{space}{r_format([eps], fewer)[0]}"
    return out.tolist()


def p_text(p: float) -> str:
    """R's format.pval."""
    if np.isnan(p):
        return "NaN"
    if p < 2e-16:
        return "<2e-16"
    return f"{p:.3g}" if p < 1e-3 else f"{p:.5f}".rstrip("0").rstrip(".")


def stars(p: float) -> str:
    """R's significance codes."""
    for bound, mark in ((0.001, "***"), (0.01, "**"), (0.05, "*"), (0.1, ".")):
        if p < bound:
            return mark
    return ""


def legend(marks: Iterable[str]) -> list[str]:
    """Lines below a table that say what its stars mean; none where it has no stars."""
    return ["---", LEGEND] if any(marks) else []


def abbreviate(name: str, length: int) -> str:
    """Shorten as R's abbreviate does: drop lower-case vowels, then lower-case letters, from the end."""
    chars = list(name)
    for drop in ("aeiou", "abcdefghijklmnopqrstuvwxyz"):
        i = len(chars) - 1
        while len(chars) > length and i > 0:
            if chars[i] in drop and chars[i - 1] not in " .:":
                del chars[i]
            i -= 1
    return "".join(chars)[:length]
