"""R model formulas: text -> syntax tree with positions -> terms and random-effects bars.

Written by hand, not on top of `formulae`: it has no `||`, `^`, `%in%` or `.`, its codings and column names
are not R's, it gives no positions for error messages, and importing it costs 0.25 s.

The grammar and the expansion of terms follow R's `terms.formula` (src/library/stats/src/model.c); bars follow
lme4's `findbars`, `expandDoubleVerts` and `expandSlash`. No NumPy here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NoReturn

from .._arguments import checked, text
from .._errors import FormulaError
from .deep import deep

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


# What the evaluator (`evaluate.py`) can compute; here, so that an unknown function is an error with a caret.
FUNCTIONS = frozenset(
    """I abs as.character as.factor as.integer as.logical as.numeric bs C c cbind ceiling center cos cut exp
    expm1 factor floor ifelse interaction is.na log log10 log1p log2 max mean median min ns offset ordered
    pmax pmin poly relevel round scale sd sin sqrt tan tanh""".split()
)
STRUCTURES = ("us", "diag")  # covariance wrappers around a bar that are available
SMOOTHS = frozenset(["s", "te", "ti", "t2"])

# binding powers, R's order (?Syntax); `^` is right-associative, all others left
_POWER = {
    "~": 10,
    "|": 20,
    "||": 20,
    "&": 30,
    "&&": 30,
    "==": 50,
    "!=": 50,
    "<": 50,
    ">": 50,
    "<=": 50,
    ">=": 50,
    "+": 60,
    "-": 60,
    "*": 70,
    "/": 70,
    "%in%": 80,
    "%%": 80,
    "%/%": 80,
    ":": 90,
    "^": 110,
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


class _Parser:
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

    def expression(self, power: int, inside: str = "") -> Node:
        left = self.prefix(inside)
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
            right = self.expression(bind - 1 if op == "^" else bind, inside)
            left = Binary(op, left, right, start=left.start, end=right.end)

    def prefix(self, inside: str) -> Node:
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
            inner = self.expression(0, "(")
            end = self.close(token)
            return Paren(inner, start=token.start, end=end)
        if token.text in ("+", "-", "!", "~"):
            power = {"!": _NOT, "~": _POWER["~"]}.get(token.text, _SIGN)
            if self.peek() is None:
                self.fail(token, f"the formula ends after {token.text!r}", "a term must follow")
            operand = self.expression(power, inside)
            return Unary(token.text, operand, start=token.start, end=operand.end)
        if token.text in ("|", "||"):
            self.fail(token, f"there is nothing before '{token.text}'", "write (1 | group) for a random intercept")
        self.fail(token, f"a term is missing before {token.text!r}")

    def close(self, opened: _Token) -> int:
        token = self.peek()
        if token is None:
            self.fail(opened, "this '(' is never closed", "add the closing ')'")
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
            nxt = self.peek()
            if nxt is None:
                self.fail(opened, "this '(' is never closed", "add the closing ')'")
            if nxt.text == ")" and nxt.kind == "op" and not args:
                break
            key = None
            after = self.tokens[self.at + 1] if self.at + 1 < len(self.tokens) else None
            if nxt.kind in ("name", "quoted", "str") and after is not None and after.text == "=":
                key = nxt.text if nxt.kind == "name" else nxt.text[1:-1]
                self.at += 2
                if self.peek() is None:
                    self.fail(opened, "this '(' is never closed", "add the closing ')'")
            args.append((key, self.expression(0, name)))
            nxt = self.peek()
            if nxt is None:
                self.fail(opened, "this '(' is never closed", "add the closing ')'")
            if nxt.text == ",":
                self.at += 1
                continue
            break
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


def walk(node: Node) -> Iterator[Node]:
    """The node and all below it, left to right."""
    yield node
    if isinstance(node, Unary):
        yield from walk(node.operand)
    elif isinstance(node, Binary):
        yield from walk(node.left)
        yield from walk(node.right)
    elif isinstance(node, Paren):
        yield from walk(node.inner)
    elif isinstance(node, Call):
        for _, arg in node.args:
            yield from walk(arg)


@lru_cache(maxsize=4096)
def names_in(node: Node) -> tuple[str, ...]:
    """Names of the variables in an expression, in order of first appearance; functions are not among them."""
    found: dict[str, None] = {}
    _collect_names(node, found)
    return tuple(found)


def _collect_names(node: Node, found: dict[str, None]) -> None:
    if isinstance(node, Name):
        found[node.name] = None
    elif isinstance(node, Call):
        for i, (_, arg) in enumerate(node.args):
            # C(f, sum): the contrast is a word, not a column
            if base_name(node.func) == "C" and i != coded_factor(node) and isinstance(arg, Name):
                continue
            _collect_names(arg, found)
    elif isinstance(node, Unary):
        _collect_names(node.operand, found)
    elif isinstance(node, Binary):
        _collect_names(node.left, found)
        _collect_names(node.right, found)
    elif isinstance(node, Paren):
        _collect_names(node.inner, found)


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


def _has_bar(node: Node) -> bool:
    """A structural bar: not one inside a call, where `|` is logical or."""
    if isinstance(node, Binary):
        return node.op in ("|", "||") or _has_bar(node.left) or _has_bar(node.right)
    if isinstance(node, Unary):
        return _has_bar(node.operand)
    if isinstance(node, Paren):
        return _has_bar(node.inner)
    return isinstance(node, Call) and _bar_call(node) is not None


def _bar_call(node: Call) -> Binary | None:
    """The bar inside `us(x | g)`; None where `|` is logical or, as in `I(a | b)`."""
    if base_name(node.func) in FUNCTIONS - {"exp"} or len(node.args) == 0:
        return None
    inner = strip_parens(node.args[0][1])
    return inner if isinstance(inner, Binary) and inner.op in ("|", "||") else None


# ----------------------------------------------------------------------------------------------------- terms


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
        fail(self.text, node.start, what, remedy, node.end)

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
                self.fail(
                    node,
                    f"the number {deparse(node)} is not a term",
                    "only 0 and 1 are; use I(...) for arithmetic",
                )
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


def _union(codes: Sequence[int]) -> int:
    total = 0
    for c in codes:
        total |= c
    return total


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
            fail(
                text,
                where.start,
                f"the response '{key}' is also a term on the right",
                "remove it there",
                where.end,
            )
    offsets = tuple(v for i, v in enumerate(coder.nodes) if live_offsets >> i & 1)
    return Terms(tuple(coder.nodes), tuple(codes), coder.intercept, offsets)


# ------------------------------------------------------------------------------------------------------ bars


@dataclass(frozen=True)
class Bar:
    """One random-effects term after expansion.

    `lhs | group`. Where a `||` has been taken apart, `whole` is its full left-hand side, `part` says which
    term of it this is (0 = intercept), and each column of that part is a scalar term of its own.
    """

    lhs: Node
    group: Node
    whole: Node | None = None
    part: int | None = None

    @cached_property
    def group_name(self) -> str:
        return deparse(self.group)

    @cached_property
    def terms(self) -> Terms:
        """Of `whole` for a part of a `||`, otherwise of `lhs`."""
        return expand(self.lhs if self.whole is None else self.whole)

    def __str__(self) -> str:
        return f"({deparse(self.lhs)} | {self.group_name})"


def _expand_group(node: Node) -> list[Node]:
    """`a/b/c` -> c:(b:a), b:a, a (lme4's order and names)."""
    node = strip_parens(node)
    if isinstance(node, Binary) and node.op == "/":
        outer = _expand_group(node.left)
        inner = strip_parens(node.right)
        return [Binary(":", inner, outer[0], start=node.start, end=node.end), *outer]
    return [node]


def _check_group(node: Node, text: str, outermost: bool = True) -> None:
    """Fail unless lme4 could read the grouping factor: `/` between factors is outermost, or the left of such a one."""
    node = strip_parens(node)
    if isinstance(node, Binary) and node.op == "/":
        if not outermost:
            what = f"'{deparse(node)}' in parentheses or beside ':' is not a grouping factor"
            fail(text, node.start, what, "write nested factors as a/b/c and combinations as a:b", node.end)
        _check_group(node.left, text, not isinstance(node.left, Paren))
        _check_group(node.right, text, False)
        return
    if isinstance(node, Binary) and node.op == ":":
        _check_group(node.left, text, False)
        _check_group(node.right, text, False)
        return
    if isinstance(node, Binary) and node.op in ("|", "||"):
        fail(text, node.start, "a bar inside a bar", "each random-effects term has one '|': (x | g)", node.end)
    if isinstance(node, Name) and node.name != ".":
        return
    if isinstance(node, Call) and not _has_bar(node):
        return
    remedy = "use a column, a:b, a/b or factor(a)"
    if isinstance(node, Binary) and node.op in ("+", "*"):
        remedy = "write one term per factor, (1 | a) + (1 | b), or a:b for their combinations"
    fail(text, node.start, f"'{deparse(node)}' is not a grouping factor", remedy, node.end)


def _bars_of(node: Binary, text: str, independent: bool) -> list[Bar]:
    """Expand one `lhs | group` or `lhs || group`."""
    lhs = node.left
    if _has_bar(lhs):
        fail(text, lhs.start, "a bar inside a bar", "each random-effects term has one '|': (x | g)", lhs.end)
    _check_group(node.right, text)
    for inner in walk(lhs):
        if isinstance(inner, Name) and inner.name == ".":
            fail(text, inner.start, "'.' cannot be used in a random-effects term", "name the columns")
    terms = expand(lhs, text)
    if terms.offsets:
        where = terms.offsets[0]
        fail(
            text,
            where.start,
            "offset() cannot stand in a random-effects term",
            "move it out of the bar",
            where.end,
        )
    if not terms.intercept and not terms.codes:
        fail(
            text,
            lhs.start,
            "this random-effects term has no columns",
            "write (1 | g) or (0 + x | g)",
            lhs.end,
        )
    groups = _expand_group(node.right)
    if not independent:
        return [Bar(lhs, g) for g in groups]
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
    def _split(self) -> tuple[tuple[tuple[str, Node], ...], tuple[tuple[Binary, bool], ...]]:
        """(signed fixed summands, bars with their independence), bars removed by `- (1 | g)` taken out."""
        fixed: list[tuple[str, Node]] = []
        bars: list[tuple[Binary, bool]] = []
        todo = list(_pieces(self.rhs))
        while todo:
            sign, node = todo.pop(0)
            inner = strip_parens(node)
            found: tuple[Binary, bool] | None = None
            if isinstance(inner, Binary) and inner.op in ("|", "||"):
                if inner is node:
                    example = f"(1 {inner.op} {deparse(inner.right)})"
                    self._fail(inner, "a random-effects term needs parentheses around it", f"write e.g. {example}")
                found = (inner, inner.op == "||")
            elif isinstance(inner, Call) and (wrapped := _bar_call(inner)) is not None:
                found = (wrapped, self._structure(inner) == "diag" or wrapped.op == "||")
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
                    self._fail(
                        node,
                        "a random-effects term can only be added with '+'",
                        "take it out of this product",
                    )
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
        text = self.text or str(self)
        fail(text, node.start, what, remedy, node.end)

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
        return tuple(bar for node, independent in self._split[1] for bar in _bars_of(node, text, independent))

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
        bars = [_bar_text(node, independent) for node, independent in self._split[1]]
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
        return _rebuild(self.response, substitute(self.rhs, {".": tree if len(rest) == 1 else Paren(tree)}))


def _same_bar(a: tuple[Binary, bool], b: tuple[Binary, bool]) -> bool:
    return a[1] == b[1] and a[0].left == b[0].left and a[0].right == b[0].right


def _bar_text(node: Binary, independent: bool) -> str:
    return f"({deparse(node.left)} {'||' if independent else '|'} {deparse(node.right)})"


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


def _rebuild(response: Node | None, rhs: Node) -> Formula:
    """A formula of new trees, parsed once more so that positions belong to its own text."""
    return parse(str(Formula(response, rhs)))


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


@deep
@lru_cache(maxsize=512)
def _parse(text: str) -> Formula:
    tree = _Parser(text).parse()
    tildes = [n for n in walk(tree) if isinstance(n, Binary | Unary) and n.op == "~"]
    if not tildes:
        fail(text, 0, "this formula has no '~'", "write response ~ terms, e.g. y ~ x + (1 | group)", tree.end)
    if len(tildes) > 1 or tildes[0] is not tree:
        outer = tree if tree in tildes else tildes[0]
        at = text.find("~", text.find("~") + 1) if len(tildes) > 1 else outer.start
        fail(text, max(at, 0), "a formula has one '~', at the top", "write response ~ terms")
    assert isinstance(tree, Binary | Unary)
    response = strip_parens(tree.left) if isinstance(tree, Binary) else None
    rhs = tree.right if isinstance(tree, Binary) else tree.operand
    out = Formula(response, rhs, text)
    if response is not None:
        if isinstance(response, Num | Str | Const):
            fail(
                text,
                response.start,
                f"{deparse(response)} cannot be a response",
                "name a column",
                response.end,
            )
        if _has_bar(response):
            fail(
                text,
                response.start,
                "a bar cannot stand in the response",
                "move it to the right of '~'",
                response.end,
            )
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
    tree = _Parser(text).parse()
    _check_calls(Formula(None, tree, text), tree)
    return tree


@checked(change=text)
@deep
def update(formula: str | Formula, change: str) -> Formula:
    """R's update.formula: `.` in `change` stands for the old side; bars can be removed, `. ~ . - (1 | herd)`.

    The result is simplified as R does: fixed terms by degree, then random-effects terms, then offsets.
    """
    old = parse(formula)
    tree = _Parser(change).parse()
    if isinstance(tree, Binary) and tree.op == "~":
        new_response: Node | None = tree.left
        rhs = tree.right
    elif isinstance(tree, Unary) and tree.op == "~":
        new_response, rhs = None, tree.operand
    else:
        fail(change, 0, "the change of a formula needs a '~'", "write e.g. . ~ . + x")
    if new_response is None:
        response = old.response
    else:
        values = {} if old.response is None else {".": old.response}
        response = substitute(new_response, values)
    combined = Formula(response, substitute(rhs, {".": Paren(old.rhs)}))
    return simplify(parse(str(combined)))


def simplify(formula: Formula) -> Formula:
    """The formula with its terms written out: no products, powers or removals."""
    terms = formula.fixed_terms
    parts = list(terms.labels)
    parts += [_bar_text(node, independent) for node, independent in formula._split[1]]
    parts += [deparse(o) for o in terms.offsets]
    if not terms.intercept:
        text = " + ".join(parts) + " - 1" if parts else "0"
    else:
        text = " + ".join(parts) if terms.labels or len(parts) > len(terms.offsets) else " + ".join(["1", *parts])
    lhs = "" if formula.response is None else deparse(formula.response)
    return parse(f"{lhs} ~ {text}".strip())


def is_nested(a: Any, b: Any) -> bool:
    """Whether each level of `a` occurs within one level of `b` only (two arrays of equal length)."""
    left, right = list(a), list(b)
    if len(left) != len(right):
        raise ValueError(f"the two factors differ in length: {len(left)} and {len(right)}")
    seen: dict[Any, Any] = {}
    return all(seen.setdefault(x, y) == y for x, y in zip(left, right, strict=True))
