"""The language of R's model formulas: text -> syntax tree with positions -> text, with R's precedences and spacing.

Written by hand, not on top of `formulae`: it has no `||`, `^`, `%in%` or `.`, its codings and column names
are not R's, it gives no positions for error messages, and importing it costs 0.25 s. No NumPy here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NoReturn

from .._errors import FormulaError

# ---------------------------------------------------------------------------------------------- syntax tree


@dataclass(frozen=True)
class Node:
    """Base of the tree; `start` and `end` are positions in the text and do not take part in equality."""

    start: int = field(default=0, compare=False, repr=False, kw_only=True)
    end: int = field(default=0, compare=False, repr=False, kw_only=True)

    def __str__(self) -> str:
        return deparse(self)


@dataclass(frozen=True)
class Name(Node):
    name: str


@dataclass(frozen=True)
class Num(Node):
    value: float
    integer: bool = False  # written with R's suffix L


@dataclass(frozen=True)
class Str(Node):
    value: str


@dataclass(frozen=True)
class Const(Node):
    """TRUE, FALSE or NULL (None)."""

    value: bool | None


@dataclass(frozen=True)
class Unary(Node):
    op: str
    operand: Node


@dataclass(frozen=True)
class Binary(Node):
    op: str
    left: Node
    right: Node


@dataclass(frozen=True)
class Paren(Node):
    inner: Node


@dataclass(frozen=True)
class Call(Node):
    """A function call; `args` holds (argument name or None, value)."""

    func: str
    args: tuple[tuple[str | None, Node], ...]


# binding powers, R's order (?Syntax); `^` is right-associative, all others left
_POWER = {
    op: power
    for power, ops in {
        10: "~",
        20: "| ||",
        30: "& &&",
        50: "== != < > <= >=",
        60: "+ -",
        70: "* /",
        80: "%in% %% %/%",
        90: ":",
        110: "^",
    }.items()
    for op in ops.split()
}
_NOT, _SIGN = 40, 100  # prefix `!` and prefix `+ -`

_SPACED = frozenset("~ | || & && == != < > <= >= + - * %in%".split())  # R's deparse: `a * b` but `a/b`, `a^2`, `a:b`


# ------------------------------------------------------------------------------------------------- tokenizer

_IDENT = r"(?:[^\W\d]|\.(?!\d))[\w.]*"
_TOKEN = re.compile(
    rf"""(?P<space>\s+)
    | (?P<num>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?L?)
    | (?P<name>{_IDENT}(?:::{_IDENT})?)
    | (?P<str>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    | (?P<quoted>`[^`]+`)
    | (?P<op>%in%|%%|%/%|\*\*|<=|>=|==|!=|&&|\|\||[-+*/^:~(),=!&|<>])
    """,
    re.VERBOSE,
)
_NAME_ONLY = re.compile(_IDENT + rf"(?:::{_IDENT})?\Z")
_KEYWORDS: dict[str, bool | None] = {"TRUE": True, "True": True, "FALSE": False, "False": False, "NULL": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'", "`": "`"}


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


def fail(text: str, start: int, what: str, remedy: str = "", end: int | None = None) -> NoReturn:
    """Raise a FormulaError of three lines: what is wrong and the remedy, the formula, a caret below."""
    line = re.sub(r"\s", " ", text)
    lead = ""
    if len(line) > 110:  # a long formula: show the neighbourhood
        cut = max(0, start - 60)
        lead = "..." if cut else ""
        line, start = line[cut : cut + 110], start - cut
        end = None if end is None else end - cut
    width = max(1, (end or start + 1) - start)
    first = what if not remedy else f"{what}; {remedy}"
    raise FormulaError(f"{first}\n  {lead}{line}\n  {' ' * (len(lead) + start)}{'^' * min(width, 40)}")


def fail_at(text: str, node: Node | _Token, what: str, remedy: str = "") -> NoReturn:
    """`fail` with the carets below a part of the text."""
    fail(text, node.start, what, remedy, node.end)


def _tokenize(text: str) -> list[_Token]:
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            char = text[at]
            if char in "\"'":
                fail(text, at, "this string is never closed", f"add the closing {char}")
            if char == "`":
                fail(text, at, "this backquoted name is never closed", "add the closing `")
            hint = {
                "[": "indexing is not available: make the column in the data first",
                "$": "name columns of the data directly",
                "%": "the operators with % are %in%, %% and %/%",
            }.get(char, "quote unusual column names with backticks: `my column`")
            fail(text, at, f"unexpected character {char!r} in the formula", hint)
        kind = str(match.lastgroup)
        if kind != "space":
            tokens.append(_Token(kind, match.group(), at, match.end()))
        at = match.end()
    return tokens


# ---------------------------------------------------------------------------------------------------- parser


class Parser:
    """Pratt parser: `expression(power)` reads as far as operators bind more tightly than `power`."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = _tokenize(text)
        self.at = 0

    def peek(self) -> _Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def fail(self, token: _Token | None, what: str, remedy: str = "") -> NoReturn:
        start = token.start if token else len(self.text.rstrip())
        fail(self.text, start, what, remedy, token.end if token else None)

    def parse(self) -> Node:
        if not self.tokens:
            raise FormulaError("the formula is empty; write e.g. y ~ x + (1 | group)")
        node = self.expression(0)
        token = self.peek()
        if token is not None:
            self.unexpected(token)
        return node

    def unexpected(self, token: _Token) -> NoReturn:
        if token.text == ")":
            self.fail(token, "this ')' closes nothing", "remove it or add the opening '('")
        if token.text == "=":
            self.fail(token, "'=' is not an operator of formulas", "separate response and terms with '~'")
        if token.text == ",":
            self.fail(token, "unexpected ','", "join terms with '+'")
        self.fail(token, f"an operator is missing before {token.text!r}", "join terms with '+'")

    def expression(self, power: int) -> Node:
        left = self.prefix()
        while True:
            token = self.peek()
            if token is None or token.kind != "op":
                return left
            op = "^" if token.text == "**" else token.text
            bind = _POWER.get(op, -1)
            if bind <= power:
                return left
            self.at += 1
            if bind == _POWER["=="] and isinstance(left, Binary) and _POWER[left.op] == bind:
                self.fail(token, "comparisons cannot be chained", "write e.g. (0 < x) & (x < 1)")
            nxt = self.peek()
            if op in ("|", "||") and (nxt is None or nxt.text in (")", ",")):
                self.fail(token, f"the grouping factor after '{op}' is missing", "write e.g. (1 | group)")
            if op == "~" and nxt is None:
                self.fail(token, "the right-hand side after '~' is missing", "write e.g. y ~ x + (1 | group)")
            right = self.expression(bind - 1 if op == "^" else bind)
            left = Binary(op, left, right, start=left.start, end=right.end)

    def prefix(self) -> Node:
        token = self.peek()
        if token is None:
            last = self.tokens[-1]
            self.fail(last, f"the formula ends after {last.text!r}", "a term must follow")
        self.at += 1
        span: dict[str, int] = {"start": token.start, "end": token.end}
        if token.kind == "num":
            value = float(token.text.rstrip("L"))
            return Num(value, token.text.endswith("L") and value.is_integer(), **span)  # R reads 1.5L as 1.5
        if token.kind == "str":
            unknown = next((m for m in re.finditer(r"\\(.)", token.text) if m.group(1) not in _ESCAPES), None)
            if unknown is not None:
                self.fail(token, f"'{unknown.group()}' in a string is not available", "write the character itself")
            return Str(re.sub(r"\\(.)", lambda m: _ESCAPES[m.group(1)], token.text[1:-1]), **span)
        if token.kind in ("name", "quoted"):
            quoted = token.kind == "quoted"
            name = token.text[1:-1] if quoted else token.text
            nxt = self.peek()
            if nxt is not None and nxt.text == "(" and nxt.kind == "op":
                return self.call(name, token)
            if not quoted and name in _KEYWORDS:
                return Const(_KEYWORDS[name], **span)
            return Name(name, **span)
        if token.text == "(":
            inner = self.expression(0)
            end = self.close(token)
            return Paren(inner, start=token.start, end=end)
        if token.text in ("+", "-", "!", "~"):
            power = {"!": _NOT, "~": _POWER["~"]}.get(token.text, _SIGN)
            if self.peek() is None:
                self.fail(token, f"the formula ends after {token.text!r}", "a term must follow")
            operand = self.expression(power)
            return Unary(token.text, operand, start=token.start, end=operand.end)
        if token.text in ("|", "||"):
            self.fail(token, f"there is nothing before '{token.text}'", "write (1 | group) for a random intercept")
        self.fail(token, f"a term is missing before {token.text!r}")

    def inside(self, opened: _Token) -> _Token:
        """The next token, which an open parenthesis must have."""
        token = self.peek()
        if token is None:
            self.fail(opened, "this '(' is never closed", "add the closing ')'")
        return token

    def close(self, opened: _Token) -> int:
        token = self.inside(opened)
        if token.text != ")":
            self.unexpected(token)
        self.at += 1
        return token.end

    def call(self, name: str, token: _Token) -> Node:
        opened = self.peek()
        assert opened is not None
        self.at += 1
        args: list[tuple[str | None, Node]] = []
        while True:
            nxt = self.inside(opened)
            if nxt.text == ")" and nxt.kind == "op" and not args:
                break
            key = None
            after = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
            if nxt.kind in ("name", "quoted", "str") and after is not None and after.text == "=":
                key = nxt.text if nxt.kind == "name" else nxt.text[1:-1]
                self.at += 2
                self.inside(opened)
            args.append((key, self.expression(0)))
            if self.inside(opened).text != ",":
                break
            self.at += 1
        end = self.close(opened)
        return Call(name, tuple(args), start=token.start, end=end)


# --------------------------------------------------------------------------------------------------- deparse


def format_number(value: float) -> str:
    """A number as R's deparse writes it: 15 significant digits, fixed unless scientific is shorter."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Inf" if value > 0 else "-Inf"
    if value == 0:
        return "0"
    for digits in range(1, 16):
        text = f"{value:.{digits - 1}e}"
        if float(text) == value or digits == 15:
            break
    mantissa, exponent = text.split("e")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    exp10 = int(exponent)
    scientific = f"{mantissa}e{'-' if exp10 < 0 else '+'}{abs(exp10):02d}"
    n_digits = len(mantissa.replace("-", "").replace(".", ""))
    fixed = f"{value:.{max(0, n_digits - 1 - exp10)}f}"
    return fixed if len(fixed) <= len(scientific) else scientific


def quote_name(name: str) -> str:
    """Backquote a name that is not one token of the grammar."""
    return name if _NAME_ONLY.match(name) and name not in _KEYWORDS else f"`{name}`"


def _power_of(node: Node) -> int:
    if isinstance(node, Binary):
        return _POWER[node.op]
    if isinstance(node, Unary):
        return {"!": _NOT, "~": _POWER["~"]}.get(node.op, _SIGN)
    return 1000


@lru_cache(maxsize=4096)
def deparse(node: Node) -> str:
    """The tree as text with R's spacing; the names of coefficients are made of this."""
    if isinstance(node, Name):
        return quote_name(node.name)
    if isinstance(node, Num):
        return f"{int(node.value)}L" if node.integer else format_number(node.value)
    if isinstance(node, Str):
        body = node.value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
        return f'"{body}"'
    if isinstance(node, Const):
        return {True: "TRUE", False: "FALSE", None: "NULL"}[node.value]
    if isinstance(node, Paren):
        return f"({deparse(node.inner)})"
    if isinstance(node, Call):
        args = [deparse(a) if k is None else f"{quote_name(k)} = {deparse(a)}" for k, a in node.args]
        return f"{quote_name(node.func)}({', '.join(args)})"
    if isinstance(node, Unary):
        text = deparse(node.operand)
        return f"{node.op}({text})" if _power_of(node.operand) < _power_of(node) else node.op + text
    if isinstance(node, Binary):
        # parentheses written by the user are Paren nodes; these are for trees made here, e.g. c:(b:a)
        power, left, right = _POWER[node.op], deparse(node.left), deparse(node.right)
        right_assoc = node.op == "^"
        if _power_of(node.left) < power + right_assoc:
            left = f"({left})"
        if _power_of(node.right) < power + (not right_assoc) and not isinstance(node.right, Unary):
            right = f"({right})"
        return f"{left} {node.op} {right}" if node.op in _SPACED else f"{left}{node.op}{right}"
    raise TypeError(f"not a formula node: {node!r}")


def children(node: Node) -> tuple[Node, ...]:
    """What stands directly below a node, left to right."""
    if isinstance(node, Unary):
        return (node.operand,)
    if isinstance(node, Binary):
        return node.left, node.right
    if isinstance(node, Paren):
        return (node.inner,)
    return tuple(arg for _, arg in node.args) if isinstance(node, Call) else ()


def walk(node: Node, below: Callable[[Node], tuple[Node, ...]] = children) -> Iterator[Node]:
    """The node and all below it, left to right."""
    todo = [node]
    while todo:
        node = todo.pop()
        yield node
        todo.extend(reversed(below(node)))


@lru_cache(maxsize=4096)
def names_in(node: Node) -> tuple[str, ...]:
    """Names of the variables in an expression, in order of first appearance; functions are not among them."""
    return tuple(dict.fromkeys(n.name for n in walk(node, _columns_below) if isinstance(n, Name)))


def _columns_below(node: Node) -> tuple[Node, ...]:
    """`children` without the contrast of C(f, sum), which is a word, not a column."""
    if not isinstance(node, Call) or base_name(node.func) != "C":
        return children(node)
    factor = coded_factor(node)
    return tuple(arg for i, (_, arg) in enumerate(node.args) if i == factor or not isinstance(arg, Name))


def coded_factor(node: Call) -> int | None:
    """Which argument of C(object, contr, ...) is the factor: the one named so, else the first without a name."""
    keys = [key for key, _ in node.args]
    wanted = "object" if "object" in keys else None
    return keys.index(wanted) if wanted in keys else None


def base_name(func: str) -> str:
    """`splines::bs` -> `bs`, `np.log` -> `log`."""
    func = func.rsplit("::", 1)[-1]
    return func[3:] if func.startswith("np.") else func[6:] if func.startswith("numpy.") else func


def strip_parens(node: Node) -> Node:
    while isinstance(node, Paren):
        node = node.inner
    return node


def substitute(node: Node, values: dict[str, Node]) -> Node:
    """Replace names by trees, in calls too."""
    if isinstance(node, Name):
        return values.get(node.name, node)
    if isinstance(node, Unary):
        return replace(node, operand=substitute(node.operand, values))
    if isinstance(node, Binary):
        return replace(node, left=substitute(node.left, values), right=substitute(node.right, values))
    if isinstance(node, Paren):
        inner = substitute(node.inner, values)
        return inner if isinstance(inner, Paren) else replace(node, inner=inner)
    if isinstance(node, Call):
        return replace(node, args=tuple((k, substitute(a, values)) for k, a in node.args))
    return node
