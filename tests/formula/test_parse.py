"""Formulas: terms, bars, deparse and update against R and lme4; round trips; error messages with a caret."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path

import pytest

from glmmjax._errors import FormulaError
from glmmjax.formula import functions, syntax, terms
from glmmjax.formula import parse as _parse
from glmmjax.formula.parse import parse, update
from glmmjax.formula.syntax import Binary, Name, Num, Parser, Unary, deparse, format_number, strip_parens

REFERENCE = json.loads((Path(__file__).parents[1] / "reference" / "model_matrix.json").read_text())


def _tree(text: str):
    return Parser(text).parse()


# ------------------------------------------------------------------------------------------ against R


@pytest.mark.parametrize("case", REFERENCE["terms"], ids=lambda c: c["formula"])
def test_terms_are_r(case):
    f = parse(case["formula"])
    assert list(f.fixed_terms.labels) == case["labels"]
    assert f.intercept == case["intercept"]


@pytest.mark.parametrize("case", REFERENCE["update"], ids=lambda c: f"{c['formula']} | {c['change']}")
def test_update_is_r(case):
    assert str(update(case["formula"], case["change"])) == case["result"]


@pytest.mark.parametrize("case", REFERENCE["deparse"], ids=lambda c: c["text"])
def test_deparse_is_r(case):
    tree = _tree(case["text"])
    assert deparse(tree) == case["deparsed"]
    assert _tree(deparse(tree)) == tree


# lme4's findbars(), output of lme4 1.1-31; us(), diag(), `- (1 | g)`, and `(a/b)`, `a:b/c` as groups are ours; what
# lme4 calls unparseable is in MALFORMED
BARS = [
    ("y ~ (x || g)", ["(1 | g)", "(0 + x | g)"]),
    ("y ~ (0 + x || g)", ["(0 + x | g)"]),
    ("y ~ (1 || g)", ["(1 | g)"]),
    ("y ~ (x*z || g)", ["(1 | g)", "(0 + x | g)", "(0 + z | g)", "(0 + x:z | g)"]),
    ("y ~ (1 | a/b)", ["(1 | b:a)", "(1 | a)"]),
    ("y ~ (1 | a/b/c)", ["(1 | c:(b:a))", "(1 | b:a)", "(1 | a)"]),
    ("y ~ (1 | a:b/c)", ["(1 | c:(a:b))", "(1 | a:b)"]),
    ("y ~ (1 | a/b:c)", ["(1 | b:c:a)", "(1 | a)"]),
    ("y ~ (f || a/b) + (1 | a:b)", ["(1 | b:a)", "(1 | a)", "(0 + f | b:a)", "(0 + f | a)", "(1 | a:b)"]),
    ("y ~ (1 | factor(a))", ["(1 | factor(a))"]),
    ("y ~ (1 | (a/b))", ["(1 | b:a)", "(1 | a)"]),
    ("y ~ ((1 | g)) + (x + (0 + x | (h)))", ["(1 | g)", "(0 + x | h)"]),
    ("y ~ us(x | g) + diag(x | h)", ["(x | g)", "(1 | h)", "(0 + x | h)"]),
    ("y ~ (1 | g) + (1 | g)", ["(1 | g)", "(1 | g)"]),
    ("y ~ (1 | g) + (x | h) - (1 | g)", ["(x | h)"]),
    ("y ~ (-1 + x | g) + (x - 1 | g)", ["(-1 + x | g)", "(x - 1 | g)"]),
    ("y ~ (a > 2 | g)", ["(a > 2 | g)"]),
]


@pytest.mark.parametrize("text, bars", BARS, ids=[b[0] for b in BARS])
def test_bars(text, bars):
    assert [str(b) for b in parse(text).bars] == bars


# ---------------------------------------------------------------------------------------- round trips


ROUND_TRIP = [
    "cbind(incidence, size - incidence) ~ period + (1 | herd)",
    "use ~ age*ch + I(age^2) + urban + (urban | district)",
    "total.fruits ~ nutrient*amd + rack + status + (1 | popu) + (1 | gen)",
    "r2 ~ (Anger + Gender + btype + situ)^2 + (1 | id) + (1 | item)",
    "strength ~ 1 + (1 | batch/cask)",
    "Reaction ~ Days + (Days || Subject)",
    "log(y + 1) ~ poly(x, 2, raw = TRUE) + bs(z, knots = c(-1, 2)) + (0 + x | g)",
    "y ~ 0 + a:b + a %in% b - 1 + offset(log(n)) + (x*z || g/h)",
    "y ~ . - x + (1 | g)",
    "`my y` ~ `a b`*`c-d` + (`a b` | `g g`)",
    "~ x + (1 | g)",
    "y ~ a**2 + (a + b)**3 + (1 | a:b:c)",
    "y ~ I((a + b)*c) + I(-x) + I(a^-1) + (1 | c:(b:a))",
    "y ~ factor(x > 3, levels = c('TRUE', \"FALSE\")) + (1 | factor(g))",
    "y ~ diag(f | g) + us(x | h)",
    "y ~ np.log(x) + splines::bs(x, 3) + (1 | g)",
    "y ~ x %% 2 + x %/% 3 + I(x >= 1 & !z | w == 'a')",
    "y ~ pmin(x, 1e-3, 100000, 2L) + (1|g)",
    "y ~\n  x +\n  (1 | g)",
    "é ~ größe + (1 | señor.x)",
    *[c["formula"] for c in REFERENCE["mixed"]],
    *[c["formula"] for c in REFERENCE["fixed"]],
]


@pytest.mark.parametrize("text", ROUND_TRIP)
def test_round_trip(text):
    f = parse(text)
    again = parse(str(f))
    assert again == f and str(again) == str(f)
    assert [str(b) for b in again.bars] == [str(b) for b in f.bars]
    assert again.fixed == f.fixed and again.offsets == f.offsets


def test_parts():
    f = parse("log(y) ~ a*b - 1 + offset(w) + (x || g) + (1 | h)")
    assert str(f.response) == "log(y)"
    assert [t.label for t in f.fixed] == ["a", "b", "a:b"]
    assert not f.intercept
    assert [str(o) for o in f.offsets] == ["offset(w)"]
    assert f.fixed_formula() == "log(y) ~ a * b - 1 + offset(w)"
    assert f.random_formula() == "~(x || g) + (1 | h)"
    assert f.names == ("y", "a", "b", "w", "x", "g", "h")
    assert parse("~ x").response is None
    assert parse("y ~ (1 | g)").fixed_formula() == "y ~ 1"
    assert parse("y ~ x").random_formula() == "~0"
    assert parse(f) is f


def test_positions_are_kept_but_not_compared():
    tree = _tree("a + bb")
    assert (tree.start, tree.end) == (0, 6)
    assert (tree.right.start, tree.right.end) == (4, 6)
    assert tree == _tree("a   +   bb") == Binary("+", Name("a"), Name("bb"))
    assert hash(Num(1.0, start=3)) == hash(Num(1.0, start=9))


def test_precedence():
    same = [
        ("-a^2", "-(a^2)"),
        ("a:b*c", "(a:b)*c"),
        ("a*b %in% c", "a*(b %in% c)"),
        ("a + b*c:d", "a + (b*(c:d))"),
        ("a < b + c", "a < (b + c)"),
        ("!a == b", "!(a == b)"),
        ("a | b & c", "a | (b & c)"),
        ("a^b^c", "a^(b^c)"),
        ("a - b - c", "(a - b) - c"),
        ("-1:3", "(-1):3"),
        ("a^-b*c", "(a^(-b))*c"),
    ]
    for bare, grouped in same:
        assert _tree(bare) == _strip(_tree(grouped)), bare


def _strip(node):
    node = strip_parens(node)
    if isinstance(node, Binary):
        return Binary(node.op, _strip(node.left), _strip(node.right))
    if isinstance(node, Unary):
        return Unary(node.op, _strip(node.operand))
    return node


def test_dot_leaves_out_response_and_grouping_factors():
    f = parse("log(y) ~ . - k + (x | g/h)").resolve(["y", "x", "g", "h", "k", "my col"])
    assert [t.label for t in f.fixed] == ["x", "`my col`"]
    assert str(parse("y ~ . + (1 | g)").resolve(["y", "x", "g"])) == "y ~ x + (1 | g)"
    assert [t.label for t in parse("y ~ .^2").resolve(["y", "a", "b"]).fixed] == ["a", "b", "a:b"]
    with pytest.raises(FormulaError, match="stands for no column"):
        parse("y ~ . + (1 | g)").resolve(["y", "g"])


def test_update_keeps_bars_apart():
    assert str(update("y ~ a*b + (1 | g)", ". ~ . + q")) == "y ~ a + b + q + a:b + (1 | g)"
    assert str(update("y ~ a + (1 | g) + (1 | h)", ". ~ . - (1 | h)")) == "y ~ a + (1 | g)"
    assert str(update("y ~ a + offset(o)", "~ . - offset(o)")) == "y ~ a"  # R leaves the offset
    with pytest.raises(FormulaError, match="needs a '~'"):
        update("y ~ x", "+ z")


def test_the_factor_of_contrasts_is_found_wherever_it_stands():
    for text in ("C(f, sum)", "C(contr = sum, object = f)", "C(contr = sum, f)", "C(object = f, sum)"):
        assert parse(f"y ~ {text}").names == ("y", "f"), text


def test_numbers_as_r():
    cases = {
        1 / 3: "0.333333333333333",
        1e5: "1e+05",
        123456.0: "123456",
        1e-15: "1e-15",
        -2.5: "-2.5",
        0.0: "0",
    }
    assert {v: format_number(v) for v in cases} == cases


def test_every_function_the_parser_knows_is_evaluated():
    methods = {n.removeprefix("do_") for n, _ in inspect.getmembers(functions.Evaluator) if n.startswith("do_")}
    available = methods | {*functions.ELEMENTWISE, *functions.SUMMARIES, *functions.FOLDS}
    assert {n.replace(".", "_") for n in _parse.FUNCTIONS} == available


def test_no_array_library_in_the_parser():
    for module in (syntax, terms, _parse):
        tree = ast.parse(inspect.getsource(module))
        imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        imported |= {str(n.module) for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert not imported & {"numpy", "pandas", "jax"}


# --------------------------------------------------------------------------------------------- errors

# formula, what the first line says, the text the caret stands under
MALFORMED = [
    ("", "the formula is empty", None),
    ("y ~ (x + z", "this '(' is never closed", "("),
    ("y ~ log(x", "this '(' is never closed", "("),
    ("y ~ x + z)", "this ')' closes nothing", ")"),
    ("y ~", "right-hand side after '~' is missing", "~"),
    ("y ~ x +", "the formula ends after '+'", "+"),
    ("y ~ x + (1 | )", "grouping factor after '|' is missing", "|"),
    ("y ~ x + (| g)", "there is nothing before '|'; write (1 | group)", "|"),
    ("y ~ x ~ z", "a formula has one '~'", "~"),
    ("y ~ x + + )", "a term is missing before ')'", ")"),
    ("y ~ 'abc + x", "this string is never closed", "'"),
    ("y ~ `abc + x", "this backquoted name is never closed", "`"),
    ("y = x", "'=' is not an operator of formulas", "="),
    ("x + (1 | g)", "this formula has no '~'", "x + (1 | g)"),
    ("y ~ x ; z", "unexpected character ';'", ";"),
    ("y ~ x$z", "unexpected character '$'", "$"),
    ("y ~ x[1]", "indexing is not available", "["),
    ("y ~ x %o% z", "the operators with % are", "%"),
    ("y ~ foo(x)", "unknown function foo()", "foo"),
    ("y ~ lgo(x)", "did you mean log()?", "lgo"),
    ("y ~ s(x) + (1 | g)", "smooth terms such as s() are not available; use ns()", "s(x)"),
    ("y ~ (1 | (x | g))", "a bar inside a bar", "x | g"),
    ("y ~ ((1 | x) | g)", "a bar inside a bar", "(1 | x)"),
    ("y ~ (1 | g/(h/a))", "'h/a' in parentheses or beside ':' is not a grouping factor; write nested", "h/a"),
    ("y ~ (1 | g:(h/a))", "'h/a' in parentheses or beside ':'", "h/a"),
    ("y ~ (1 | (g/h):a)", "'g/h' in parentheses or beside ':'", "g/h"),
    ("y ~ (1 | (g/h)/a)", "'g/h' in parentheses or beside ':'", "g/h"),
    ("y ~ (1 | a:(b:(c/d)))", "'c/d' in parentheses or beside ':'", "c/d"),
    ("y ~ I(0 < x < 1)", "comparisons cannot be chained; write", "<"),
    ("y ~ x + stats::offset(z)", "stats::offset() is no offset; write offset(...)", "stats::offset(z)"),
    ("y ~ (1 | g) - (1 | h)", "there is no (1 | h) before it to remove", "1 | h"),
    ("y ~ (1 | g) - (x || g)", "there is no (x || g) before it to remove", "x || g"),
    (r"y ~ (x == '\x41')", r"'\x' in a string is not available", r"'\x41'"),
    ("y ~ a b", "an operator is missing before 'b'", "b"),
    ("y ~ 2 x", "an operator is missing before 'x'", "x"),
    ("y ~ a, b", "unexpected ','", ","),
    ("y ~ x | g", "needs parentheses around it; write e.g. (1 | g)", "x | g"),
    ("y ~ x + 1 | g", "needs parentheses around it; write e.g. (1 | g)", "x + 1 | g"),
    ("y ~ x * (1 | g)", "can only be added with '+'", "x * (1 | g)"),
    (
        "y ~ ar1(0 + t | g)",
        "covariance structure ar1() is not available; available: (x | g) or us",
        "ar1(0 + t | g)",
    ),
    ("y ~ us(x | g, 2)", "us() takes one argument", "2"),
    ("y ~ (1 | a + b)", "write one term per factor, (1 | a) + (1 | b)", "a + b"),
    ("y ~ (1 | 3)", "'3' is not a grouping factor", "3"),
    ("y ~ (0 | g)", "has no columns", "0"),
    ("y ~ (. | g)", "'.' cannot be used in a random-effects term", "."),
    ("y ~ (offset(x) | g)", "offset() cannot stand in a random-effects term", "offset(x)"),
    ("y ~ 2*x", "the number 2 is not a term", "2"),
    ("y ~ 'a' + x", '"a" is not a term', "'a'"),
    ("y ~ x^z", "must be a whole number >= 1", "z"),
    ("y ~ x^0", "must be a whole number >= 1", "0"),
    ("y ~ 1*x", "'1' has no variables for '*' to combine", "1"),  # R: no term at all
    ("y ~ x:1 + z", "'1' has no variables for ':' to combine", "1"),
    ("y ~ 1/x", "use I(...) for arithmetic", "1"),
    ("y ~ y + x", "the response 'y' is also a term", "y"),
    ("1 ~ x", "1 cannot be a response", "1"),
    ("(1 | g) ~ x", "a bar cannot stand in the response", "1 | g"),
    ("y ~ log(x, )", "a term is missing before ')'", ")"),
]


@pytest.mark.parametrize("text, says, under", MALFORMED, ids=[repr(m[0]) for m in MALFORMED])
def test_malformed_formulas(text, says, under):
    with pytest.raises(FormulaError) as e:
        parse(text)
    message = str(e.value)
    assert says in message.split("\n")[0]
    assert len(message.split("\n")) <= 3
    if under is not None:
        _, line, caret = message.split("\n")
        assert line == "  " + text
        at = caret.index("^")
        assert line[at : at + caret.count("^")] == under
        assert set(caret) <= {" ", "^"}


def test_caret_in_a_long_formula_stays_in_view():
    text = "y ~ " + " + ".join(f"variable{i}" for i in range(40)) + " + + ) + (1 | g)"
    with pytest.raises(FormulaError) as e:
        parse(text)
    _, line, caret = str(e.value).split("\n")
    assert len(line) < 130
    assert line[caret.index("^")] == ")"


def test_not_a_string():
    with pytest.raises(TypeError, match="must be a string such as"):
        parse(3)
