"""R model formulas with lme4's bars: text -> `Formula`, with its fixed terms and its random-effects terms.

Bars follow lme4's `findbars`, `expandDoubleVerts` and `expandSlash`; `syntax.py` reads the text, `terms.py` expands
right-hand sides. No NumPy here.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from .._arguments import checked, text
from .._errors import FormulaError
from .deep import deep
from .syntax import (
    Binary,
    Call,
    Const,
    Name,
    Node,
    Num,
    Paren,
    Parser,
    Str,
    Unary,
    base_name,
    children,
    deparse,
    fail,
    fail_at,
    names_in,
    strip_parens,
    substitute,
    walk,
)
from .terms import Term, Terms, expand

# What the evaluator (`functions.py`) can compute; here, so that an unknown function is an error with a caret.
FUNCTIONS = frozenset(
    """I abs as.character as.factor as.integer as.logical as.numeric bs C c cbind ceiling center cos cut exp
    expm1 factor floor ifelse interaction is.na log log10 log1p log2 max mean median min ns offset ordered
    pmax pmin poly relevel round scale sd sin sqrt tan tanh""".split()
)
STRUCTURES = ("us", "diag")  # covariance wrappers around a bar that are available
SMOOTHS = frozenset(["s", "te", "ti", "t2"])


# ------------------------------------------------------------------------------------------------------ bars


def _bar(node: Node) -> Binary | None:
    """The node where it is a bar."""
    return node if isinstance(node, Binary) and node.op in ("|", "||") else None


def _has_bar(node: Node) -> bool:
    """A structural bar: not one inside a call, where `|` is logical or."""
    below = walk(node, lambda n: () if isinstance(n, Call) else children(n))
    return any(_bar_call(n) if isinstance(n, Call) else _bar(n) for n in below)


def _bar_call(node: Call) -> Binary | None:
    """The bar inside `us(x | g)`; None where `|` is logical or, as in `I(a | b)`."""
    if base_name(node.func) in FUNCTIONS - {"exp"} or not node.args:
        return None
    return _bar(strip_parens(node.args[0][1]))


@dataclass(frozen=True)
class Bar:
    """One random-effects term after expansion.

    `lhs | group`. Where a `||` has been taken apart, `whole` is its full left-hand side, `part` says which
    term of it this is (0 = intercept), and each column of that part is a scalar term of its own. `structure` is that of
    its covariance.
    """

    lhs: Node
    group: Node
    whole: Node | None = None
    part: int | None = None
    structure: str = "us"

    @cached_property
    def group_name(self) -> str:
        return deparse(self.group)

    @cached_property
    def terms(self) -> Terms:
        """Of `whole` for a part of a `||`, otherwise of `lhs`."""
        return expand(self.lhs if self.whole is None else self.whole)

    def __str__(self) -> str:
        return f"{'' if self.structure == 'us' else self.structure}({deparse(self.lhs)} | {self.group_name})"


def _expand_group(node: Node) -> list[Node]:
    """`a/b/c` -> c:(b:a), b:a, a (lme4's order and names)."""
    node = strip_parens(node)
    if isinstance(node, Binary) and node.op == "/":
        outer = _expand_group(node.left)
        inner = strip_parens(node.right)
        return [Binary(":", inner, outer[0], start=node.start, end=node.end), *outer]
    return [node]


def leaves(group: Node) -> list[Node]:
    """The factors whose combinations are a grouping factor: a, b, c of c:(b:a) from the left."""
    group = strip_parens(group)
    if isinstance(group, Binary) and group.op == ":":
        return leaves(group.left) + leaves(group.right)
    return [group]


def _check_group(node: Node, text: str, outermost: bool = True) -> None:
    """Fail unless lme4 could read the grouping factor: `/` between factors is outermost, or the left of such a one."""
    node = strip_parens(node)
    if isinstance(node, Binary) and node.op == "/":
        if not outermost:
            what = f"'{deparse(node)}' in parentheses or beside ':' is not a grouping factor"
            fail_at(text, node, what, "write nested factors as a/b/c and combinations as a:b")
        _check_group(node.left, text, not isinstance(node.left, Paren))
        _check_group(node.right, text, False)
        return
    if isinstance(node, Binary) and node.op == ":":
        _check_group(node.left, text, False)
        _check_group(node.right, text, False)
        return
    if _bar(node):
        fail_at(text, node, "a bar inside a bar", "each random-effects term has one '|': (x | g)")
    if isinstance(node, Name) and node.name != ".":
        return
    if isinstance(node, Call) and not _has_bar(node):
        return
    remedy = "use a column, a:b, a/b or factor(a)"
    if isinstance(node, Binary) and node.op in ("+", "*"):
        remedy = "write one term per factor, (1 | a) + (1 | b), or a:b for their combinations"
    fail_at(text, node, f"'{deparse(node)}' is not a grouping factor", remedy)


def _bars_of(node: Binary, text: str, structure: str) -> list[Bar]:
    """Expand one `lhs | group` or `lhs || group`."""
    lhs = node.left
    if _has_bar(lhs):
        fail_at(text, lhs, "a bar inside a bar", "each random-effects term has one '|': (x | g)")
    _check_group(node.right, text)
    for inner in walk(lhs):
        if isinstance(inner, Name) and inner.name == ".":
            fail(text, inner.start, "'.' cannot be used in a random-effects term", "name the columns")
    terms = expand(lhs, text)
    if terms.offsets:
        where = terms.offsets[0]
        fail_at(text, where, "offset() cannot stand in a random-effects term", "move it out of the bar")
    if not terms.intercept and not terms.codes:
        fail_at(text, lhs, "this random-effects term has no columns", "write (1 | g) or (0 + x | g)")
    groups = _expand_group(node.right)
    if structure != "diag":
        return [Bar(lhs, g, structure=structure) for g in groups]
    parts: list[tuple[int, Node]] = [(0, Num(1.0))] if terms.intercept else []
    for i, term in enumerate(terms.terms, start=1):
        tree = term.variables[0]
        for v in term.variables[1:]:
            tree = Binary(":", tree, v)
        parts.append((i, Binary("+", Num(0.0), tree)))
    return [Bar(part_lhs, g, whole=lhs, part=i) for i, part_lhs in parts for g in groups]


# --------------------------------------------------------------------------------------------------- formula


def _pieces(node: Node, sign: str = "+") -> Iterator[tuple[str, Node]]:
    """The summands of a right-hand side with their signs."""
    if isinstance(node, Binary) and node.op in "+-":
        yield from _pieces(node.left, sign)
        if node.op == "+" or not _has_bar(node.right):
            yield (sign if node.op == "+" else _flip(sign)), node.right
        else:
            yield from _pieces(node.right, _flip(sign))
    elif isinstance(node, Unary) and node.op in "+-":
        yield (sign if node.op == "+" else _flip(sign)), node.operand
    else:
        yield sign, node


def _flip(sign: str) -> str:
    return "-" if sign == "+" else "+"


@dataclass(frozen=True)
class Formula:
    """A parsed formula. Equality is that of the trees; `str` is R's deparse and parses to an equal one."""

    response: Node | None
    rhs: Node
    text: str = field(default="", compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:  # as text, which is not nested once per term
        return parse, (str(self),)

    @deep
    def __str__(self) -> str:
        return f"~{deparse(self.rhs)}" if self.response is None else f"{deparse(self.response)} ~ {deparse(self.rhs)}"

    @cached_property
    def _split(self) -> tuple[tuple[tuple[str, Node], ...], tuple[tuple[Binary, str], ...]]:
        """(signed fixed summands, bars with their structures), bars removed by `- (1 | g)` taken out."""
        fixed: list[tuple[str, Node]] = []
        bars: list[tuple[Binary, str]] = []
        todo = list(_pieces(self.rhs))
        while todo:
            sign, node = todo.pop(0)
            inner = strip_parens(node)
            found: tuple[Binary, str] | None = None
            if bar := _bar(inner):
                if bar is node:
                    example = f"(1 {bar.op} {deparse(bar.right)})"
                    self._fail(bar, "a random-effects term needs parentheses around it", f"write e.g. {example}")
                found = (bar, "diag" if bar.op == "||" else "us")
            elif isinstance(inner, Call) and (wrapped := _bar_call(inner)) is not None:
                structure = self._structure(inner)
                found = (wrapped, "diag" if wrapped.op == "||" else structure)
            if found is not None:
                if sign == "+":
                    bars.append(found)
                    continue
                left = [b for b in bars if not _same_bar(b, found)]
                if len(left) == len(bars):
                    self._fail(inner, f"there is no {_bar_text(*found)} before it to remove", "leave it out")
                bars = left
            elif _has_bar(node):
                if isinstance(inner, Binary) and inner.op in "+-":
                    todo[:0] = list(_pieces(inner, sign))
                else:
                    what = "a random-effects term can only be added with '+'"
                    self._fail(node, what, "take it out of this product")
            else:
                fixed.append((sign, node))
        return tuple(fixed), tuple(bars)

    def _structure(self, node: Call) -> str:
        if node.func not in STRUCTURES:
            if base_name(node.func) in SMOOTHS:
                self._fail(node, f"smooth terms such as {node.func}() are not available", "use ns(), bs() or poly()")
            self._fail(
                node,
                f"the covariance structure {node.func}() is not available",
                "available: (x | g) or us(x | g) unstructured, (x || g) or diag(x | g) diagonal",
            )
        if len(node.args) > 1:
            self._fail(node.args[1][1], f"{node.func}() takes one argument, lhs | group")
        return node.func

    def _fail(self, node: Node, what: str, remedy: str = "") -> NoReturn:
        fail_at(self.text or str(self), node, what, remedy)

    @cached_property
    def fixed_rhs(self) -> Node:
        """The right-hand side without bars, offsets included."""
        tree: Node | None = None
        for sign, node in self._split[0]:
            if tree is None:
                tree = node if sign == "+" else Unary("-", node, start=node.start, end=node.end)
            else:
                tree = Binary(sign, tree, node, start=tree.start, end=node.end)
        return Num(1.0) if tree is None else tree

    @cached_property
    def fixed_terms(self) -> Terms:
        """The fixed part after expansion."""
        return expand(self.fixed_rhs, self.text or str(self), self.response)

    @property
    def fixed(self) -> tuple[Term, ...]:
        return self.fixed_terms.terms

    @property
    def intercept(self) -> bool:
        return self.fixed_terms.intercept

    @property
    def offsets(self) -> tuple[Node, ...]:
        """The `offset(...)` calls."""
        return self.fixed_terms.offsets

    @cached_property
    def bars(self) -> tuple[Bar, ...]:
        """Random-effects terms after expanding `||` and `/`, in formula order."""
        text = self.text or str(self)
        return tuple(bar for node, structure in self._split[1] for bar in _bars_of(node, text, structure))

    @cached_property
    def has_dot(self) -> bool:
        return any(isinstance(n, Name) and n.name == "." for n in walk(self.fixed_rhs))

    @cached_property
    def names(self) -> tuple[str, ...]:
        """All variables the formula uses, response first."""
        parts = ([] if self.response is None else [self.response]) + [self.rhs]
        return tuple(dict.fromkeys(n for p in parts for n in names_in(p)))

    def fixed_formula(self) -> str:
        return str(replace(self, rhs=self.fixed_rhs, text=""))

    def random_formula(self) -> str:
        """One-sided formula of the random-effects terms as written; "~0" where there is none."""
        bars = [_bar_text(node, structure) for node, structure in self._split[1]]
        return "~" + (" + ".join(bars) if bars else "0")

    def resolve(self, columns: Sequence[str]) -> Formula:
        """Replace `.` by all columns that are neither in the response nor grouping factors."""
        if not self.has_dot:
            return self
        taken = set() if self.response is None else set(names_in(self.response))
        for bar in self.bars:
            taken.update(names_in(bar.group))
        rest: list[Node] = [Name(str(c)) for c in columns if str(c) not in taken]
        if not rest:
            raise FormulaError("'.' stands for no column: all are used by the response or as grouping factors")
        tree = rest[0]
        for node in rest[1:]:
            tree = Binary("+", tree, node)
        rhs = substitute(self.rhs, {".": tree if len(rest) == 1 else Paren(tree)})
        return parse(str(Formula(self.response, rhs)))  # once more, so that positions belong to its own text


def _same_bar(a: tuple[Binary, str], b: tuple[Binary, str]) -> bool:
    return a[1] == b[1] and a[0].left == b[0].left and a[0].right == b[0].right


def _bar_text(node: Binary, structure: str) -> str:
    name = "" if structure in ("us", "diag") else structure
    return f"{name}({deparse(node.left)} {'||' if structure == 'diag' else '|'} {deparse(node.right)})"


def parse(formula: str | Formula) -> Formula:
    """Parse an R formula.

    Args:
        formula: e.g. "y ~ x*f + I(x^2) + (x | g) + (1 | a/b)"; one-sided "~ x" gives response None.
    Returns:
        `Formula` with response, fixed terms, bars, offsets.
    Raises:
        FormulaError: three lines: what is wrong and the remedy, the formula, a caret under the place.
    """
    if isinstance(formula, Formula):
        return formula
    if not isinstance(formula, str):
        raise TypeError(f"the formula must be a string such as 'y ~ x + (1 | g)', not {type(formula).__name__}")
    return _parse(formula)


def _sides(tree: Binary | Unary) -> tuple[Node | None, Node]:
    """What stands left and right of a `~`."""
    return (tree.left, tree.right) if isinstance(tree, Binary) else (None, tree.operand)


@deep
@lru_cache(maxsize=512)
def _parse(text: str) -> Formula:
    tree = Parser(text).parse()
    tildes = [n for n in walk(tree) if isinstance(n, Binary | Unary) and n.op == "~"]
    if not tildes:
        fail(text, 0, "this formula has no '~'", "write response ~ terms, e.g. y ~ x + (1 | group)", tree.end)
    if len(tildes) > 1 or tildes[0] is not tree:
        outer = tree if tree in tildes else tildes[0]
        at = text.find("~", text.find("~") + 1) if len(tildes) > 1 else outer.start
        fail(text, max(at, 0), "a formula has one '~', at the top", "write response ~ terms")
    assert isinstance(tree, Binary | Unary)
    response, rhs = _sides(tree)
    response = None if response is None else strip_parens(response)
    out = Formula(response, rhs, text)
    if response is not None:
        if isinstance(response, Num | Str | Const):
            fail_at(text, response, f"{deparse(response)} cannot be a response", "name a column")
        if _has_bar(response):
            fail_at(text, response, "a bar cannot stand in the response", "move it to the right of '~'")
    out.bars  # noqa: B018  (raises on malformed bars)
    out.fixed_terms  # noqa: B018
    _check_calls(out, tree)
    return out


def _check_calls(formula: Formula, tree: Node) -> None:
    for node in walk(tree):
        if not isinstance(node, Call):
            continue
        name = base_name(node.func)
        if name in FUNCTIONS or (node.func in STRUCTURES and _bar_call(node) is not None):
            continue
        if name in SMOOTHS:
            formula._fail(node, f"smooth terms such as {name}() are not available", "use ns(), bs() or poly()")
        near = difflib.get_close_matches(name, FUNCTIONS, 1)
        hint = f"did you mean {near[0]}()?" if near else "make the column in the data first"
        fail(formula.text, node.start, f"unknown function {node.func}()", hint, node.start + len(node.func))


@deep
@lru_cache(maxsize=256)
def parse_expression(text: str) -> Node:
    """Parse an R expression that is not a formula, e.g. a `subset` or a weight."""
    tree = Parser(text).parse()
    _check_calls(Formula(None, tree, text), tree)
    return tree


@checked(change=text)
@deep
def update(formula: str | Formula, change: str) -> Formula:
    """R's update.formula: `.` in `change` stands for the old side; bars can be removed, `. ~ . - (1 | herd)`.

    The result is simplified as R does: fixed terms by degree, then random-effects terms, then offsets.
    """
    old = parse(formula)
    tree = Parser(change).parse()
    if not (isinstance(tree, Binary | Unary) and tree.op == "~"):
        fail(change, 0, "the change of a formula needs a '~'", "write e.g. . ~ . + x")
    response, rhs = _sides(tree)
    if response is None:
        response = old.response
    elif old.response is not None:
        response = substitute(response, {".": old.response})
    combined = Formula(response, substitute(rhs, {".": Paren(old.rhs)}))
    return simplify(parse(str(combined)))


def simplify(formula: Formula) -> Formula:
    """The formula with its terms written out: no products, powers or removals."""
    terms = formula.fixed_terms
    parts = list(terms.labels)
    parts += [_bar_text(node, structure) for node, structure in formula._split[1]]
    parts += [deparse(o) for o in terms.offsets]
    if not terms.intercept:
        text = " + ".join(parts) + " - 1" if parts else "0"
    else:
        text = " + ".join(parts) if terms.labels or len(parts) > len(terms.offsets) else " + ".join(["1", *parts])
    lhs = "" if formula.response is None else deparse(formula.response)
    return parse(f"{lhs} ~ {text}".strip())
