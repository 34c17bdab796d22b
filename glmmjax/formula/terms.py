"""A right-hand side -> its terms, as R's `terms.formula` expands them (src/library/stats/src/model.c)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import or_
from typing import NoReturn

from .syntax import Binary, Call, Const, Node, Num, Paren, Str, Unary, base_name, deparse, fail_at, strip_parens


@dataclass(frozen=True)
class Term:
    """One term of a linear predictor, e.g. `a:log(x)`: the set of its variables, in the variables' order."""

    variables: tuple[Node, ...]

    @cached_property
    def label(self) -> str:
        return ":".join(deparse(v) for v in self.variables)

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class Terms:
    """A right-hand side after expansion, as R's terms object.

    `variables` are in order of first appearance; `codes` are the terms as bit sets over them (bit i is the
    variable i), sorted by degree, then appearance.
    """

    variables: tuple[Node, ...]
    codes: tuple[int, ...]
    intercept: bool
    offsets: tuple[Node, ...]

    @cached_property
    def terms(self) -> tuple[Term, ...]:
        return tuple(Term(tuple(self.variables[i] for i in bits(code))) for code in self.codes)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(t.label for t in self.terms)

    @cached_property
    def active(self) -> list[int]:
        """The variables that the terms are made of, by number; others are in offsets or terms that cancel."""
        return bits(_union(self.codes))

    @cached_property
    def by_contrasts(self) -> tuple[dict[int, bool], ...]:
        """Per term: variable index -> would it, as a factor, be coded by contrasts (else by all indicators)?

        R's TermCode: contrasts iff the term without the variable is empty or contained in an earlier term.
        """
        out = []
        for t, code in enumerate(self.codes):
            pattern = {}
            for i in bits(code):
                rest = code & ~(1 << i)
                pattern[i] = rest == 0 or any(rest & ~earlier == 0 for earlier in self.codes[:t])
            out.append(pattern)
        return tuple(out)


def bits(code: int) -> list[int]:
    return [i for i in range(code.bit_length()) if code >> i & 1]


def _unique(codes: Iterable[int]) -> list[int]:
    return [c for c in dict.fromkeys(codes) if c]


class _Expander:
    """R's EncodeVars: a tree -> list of bit sets; the intercept is kept apart as R does."""

    _STRUCTURAL = frozenset("+ - * / : ^ %in%".split())

    def __init__(self, text: str) -> None:
        self.text = text
        self.index: dict[str, int] = {}
        self.nodes: list[Node] = []
        self.offset_bits = 0
        self.intercept = True
        self.parity = True

    def fail(self, node: Node, what: str, remedy: str = "") -> NoReturn:
        fail_at(self.text, node, what, remedy)

    def install(self, node: Node) -> int:
        key = deparse(node)
        if key not in self.index:
            self.index[key] = len(self.nodes)
            self.nodes.append(node)
        bit = 1 << self.index[key]
        if isinstance(node, Call) and node.func == "offset":
            self.offset_bits |= bit
        elif isinstance(node, Call) and base_name(node.func) == "offset":  # R makes it a covariate
            self.fail(node, f"{node.func}() is no offset", "write offset(...)")
        return bit

    def scan(self, node: Node) -> None:
        """Fix the order of the variables: first appearance in the text, deleted ones included."""
        if isinstance(node, Paren):
            self.scan(node.inner)
        elif isinstance(node, Unary) and node.op in "+-":
            self.scan(node.operand)
        elif isinstance(node, Binary) and node.op in self._STRUCTURAL:
            self.scan(node.left)
            if node.op != "^":
                self.scan(node.right)
        elif not isinstance(node, (Num, Const)):
            self.install(node)

    def encode(self, node: Node) -> list[int]:
        if isinstance(node, Paren):
            return self.encode(node.inner)
        if isinstance(node, Num):
            if node.value not in (0.0, 1.0):
                what = f"the number {deparse(node)} is not a term"
                self.fail(node, what, "only 0 and 1 are; use I(...) for arithmetic")
            self.intercept = (node.value == 1.0) == self.parity
            return []
        if isinstance(node, Str | Const):
            self.fail(node, f"{deparse(node)} is not a term", "terms are made of column names")
        if isinstance(node, Unary) and node.op == "+":
            return self.encode(node.operand)
        if isinstance(node, Unary) and node.op == "-":
            self.deleted(node.operand)
            return []
        if not (isinstance(node, Binary) and node.op in self._STRUCTURAL):
            return [self.install(node)]
        op = node.op
        if op == "^":
            return self.power(node)
        left = self.encode(node.left)
        if op == "-":
            gone = set(self.deleted(node.right))
            return [c for c in left if c not in gone]
        right = self.encode(node.right)
        if op == "+":
            return _unique(left + right)
        for side, codes in ((node.left, left), (node.right, right)):
            # R silently gives no term for 1*x, x:1 and the like, which would lose x
            if not codes and (op == ":" or side is node.left):
                what = f"'{deparse(side)}' has no variables for '{op}' to combine"
                self.fail(side, what, "leave it out, or use I(...) for arithmetic")
        if op == ":":
            return _unique(a | b for a in left for b in right)
        if op == "*":
            return _unique(left + right + [a | b for a in left for b in right])
        if op == "%in%":
            every = _union(right)
            return _unique(a | every for a in left)
        every = _union(left)  # op "/"
        return _unique(left + [every | b for b in right])

    def deleted(self, node: Node) -> list[int]:
        self.parity = not self.parity
        gone = self.encode(node)
        self.parity = not self.parity
        return gone

    def power(self, node: Binary) -> list[int]:
        exponent = strip_parens(node.right)
        if not isinstance(exponent, Num) or exponent.value != int(exponent.value) or exponent.value < 1:
            self.fail(node.right, "the power of a term must be a whole number >= 1", "use I(x^2) for arithmetic")
        left = self.encode(node.left)
        out = left
        for _ in range(min(int(exponent.value), len(left) + 1) - 1):
            out = _unique(a | b for a in out for b in left)
        return out


def _union(codes: Iterable[int]) -> int:
    return reduce(or_, codes, 0)


def expand(node: Node, text: str = "", response: Node | None = None) -> Terms:
    """Expand `+ - * : ^ %in% / 0 1` exactly as R's terms.formula."""
    text = text or deparse(node)
    coder = _Expander(text)
    coder.scan(node)
    every = coder.encode(node)
    live_offsets = _union(every) & coder.offset_bits
    codes = sorted((c for c in every if not c & coder.offset_bits), key=int.bit_count)
    if response is not None:
        key = deparse(response)
        used = _union(codes)
        if key in coder.index and used >> coder.index[key] & 1:
            where = coder.nodes[coder.index[key]]
            fail_at(text, where, f"the response '{key}' is also a term on the right", "remove it there")
    offsets = tuple(v for i, v in enumerate(coder.nodes) if live_offsets >> i & 1)
    return Terms(tuple(coder.nodes), tuple(codes), coder.intercept, offsets)
