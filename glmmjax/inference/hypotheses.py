"""Linear hypotheses about coefficients, read from text."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np


def hypothesis_label(row: np.ndarray, names: list[str]) -> str:
    out = ""
    for w, name in zip(row, names, strict=True):
        if w:
            sign = ("-" if w < 0 else "") if not out else (" - " if w < 0 else " + ")
            out += sign + ("" if abs(w) == 1.0 else f"{abs(w):.6g}*") + name
    return out or "0"


def parse_hypotheses(text: str, names: Sequence[str]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Hypotheses in text, such as "b = 2*c, d - 1 = 0", about coefficients of these names.

    A part without "=" is tested to be 0; "a = b = c" is two hypotheses. Names are those of `fixef`, the longest that
    fits being taken; names with blanks or operators in them need no quotes.

    Returns:
        Labels, matrix (r, p) and right-hand sides (r,).

    Raises:
        ValueError: an unknown name or a product of coefficients, with the place.
    """
    reader = _Hypotheses(text, names)
    rows, rhs = reader.read()
    return [hypothesis_label(row, list(names)) for row in rows], np.array(rows), np.array(rhs)


class _Hypotheses:
    """Recursive descent; a value is a vector (p + 1,) of weights, the constant last."""

    _NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

    def __init__(self, text: str, names: Sequence[str]) -> None:
        self.text, self.names = text, names
        self.longest_first = sorted(range(len(names)), key=lambda i: -len(names[i]))
        self.at = 0

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{what} at '{self.text[self.at :].strip()[:30]}' in the hypotheses '{self.text}'")

    def next(self) -> str:
        """The next character that is not blank, "" at the end."""
        while self.at < len(self.text) and self.text[self.at] in " \t":
            self.at += 1
        return self.text[self.at] if self.at < len(self.text) else ""

    def take(self, wanted: str) -> str:
        """The next character if it is one of these, else ""."""
        found = self.next()
        if found and found in wanted:
            self.at += 1
            return found
        return ""

    def read(self) -> tuple[list[np.ndarray], list[float]]:
        rows: list[np.ndarray] = []
        rhs: list[float] = []
        while self.next():
            if self.take(",;\n"):
                continue
            sides = [self.sum()]
            while self.take("="):
                self.take("=")
                sides.append(self.sum())
            if len(sides) == 1:
                sides.append(np.zeros(len(self.names) + 1))
            for a, b in zip(sides, sides[1:], strict=False):
                rows.append((a - b)[:-1])
                rhs.append(float((b - a)[-1]))
            if self.next() and self.next() not in ",;\n":
                raise self.fail("expected '=', ',' or the end")
        if not rows:
            raise ValueError("there is no hypothesis in the text; write e.g. 'x1 = x2, x3 = 0'")
        return rows, rhs

    def sum(self) -> np.ndarray:
        total = np.zeros(len(self.names) + 1)
        sign = self.take("+-")
        while True:
            total += (-1.0 if sign == "-" else 1.0) * self.product()
            sign = self.take("+-")
            if not sign:
                return total

    def product(self) -> np.ndarray:
        value = self.factor()
        while operator := self.take("*/"):
            other = self.factor()
            if operator == "*" and not value[:-1].any():
                value, other = other, value
            if other[:-1].any() or (operator == "/" and not other[-1]):
                raise self.fail("only products with numbers and quotients by numbers are linear")
            value = value * other[-1] if operator == "*" else value / other[-1]
        return value

    def factor(self) -> np.ndarray:
        start = self.next()
        for i in self.longest_first:  # before parentheses: (Intercept)
            name = self.names[i]
            for form in (f"`{name}`", name):
                end = self.at + len(form)
                whole = not re.match(r"[\w.]", self.text[end : end + 1]) or not re.match(r"[\w.]", form[-1])
                if self.text.startswith(form, self.at) and whole:
                    self.at = end
                    out = np.zeros(len(self.names) + 1)
                    out[i] = 1.0
                    return out
        if start == "(":
            self.at += 1
            out = self.sum()
            if not self.take(")"):
                raise self.fail("expected ')'")
            return out
        number = self._NUMBER.match(self.text, self.at)
        if number is None:
            raise self.fail(f"expected a number or one of the coefficients {', '.join(self.names)}")
        self.at = number.end()
        out = np.zeros(len(self.names) + 1)
        out[-1] = float(number.group())
        return out
