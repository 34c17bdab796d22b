"""The command line `glmmjax`: fit a model to a file or to a bundled data set.

Exit status 0, or 2 with one line on standard error where the input is at fault. Everything heavy is imported
inside the functions, so that `--help` is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import pandas as pd

    from .results import MixedModel

_CSV = (".csv", ".csv.gz")
#: Seldom enough: imports and tracing make many objects that stay, and looking through them took a twentieth.
GC_THRESHOLDS = 200_000, 20, 20
_PARQUET = (".parquet", ".pq")

_FIT_HELP = """\
FORMULA is R's, as lme4 reads it: "y ~ x + (1 | group)", "cbind(successes, failures) ~ x + (x | group)".
DATA is a file (.csv, .csv.gz, .parquet) or the name of a bundled data set (see `glmmjax datasets`).
Integer columns of a CSV file stay numbers: write factor(x) in the formula to use x as a factor
(grouping factors, right of |, need no factor())."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """Print the installed version; looked up only when asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            found = version("glmmjax")
        except PackageNotFoundError:
            found = "(not installed)"
        print(f"glmmjax {found}")
        parser.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="glmmjax", description="Mixed models in JAX, with lme4's formula language.", allow_abbrev=False
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    fit = commands.add_parser(
        "fit",
        help="fit a model and print its summary",
        description=_FIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fit.add_argument("formula", metavar="FORMULA", help="model formula, in quotes")
    fit.add_argument("data", metavar="DATA", help="CSV or Parquet file, or a bundled data set")
    fit.add_argument(
        "--family",
        default="binomial",
        help='family of the response, as R writes it: binomial, "binomial(probit)", poisson, gaussian (a linear mixed '
        "model), ... (default: binomial)",
    )
    fit.add_argument("--link", help="link function, such as probit or log (default: the family's)")
    fit.add_argument(
        "--nAGQ",
        type=int,
        default=1,
        metavar="N",
        help="quadrature points per random effect; 1: Laplace approximation (default), 0: faster and rougher",
    )
    fit.add_argument(
        "--REML",
        action=argparse.BooleanOptionalAction,
        help="fit a linear mixed model by REML (default) or maximum likelihood",
    )
    fit.add_argument(
        "--ddf",
        choices=("satterthwaite", "kenward-roger"),
        help="degrees of freedom and p-values of a linear mixed model (default: none, t values only)",
    )
    fit.add_argument("--weights", metavar="COL", help="column of prior weights (trials, for proportions)")
    fit.add_argument("--offset", metavar="COL", help="column added to the linear predictor")
    fit.add_argument("--json", action="store_true", help="print one JSON object instead of the summary")
    fit.set_defaults(run=_fit)

    sets = commands.add_parser(
        "datasets",
        help="list the bundled data sets",
        description="List the bundled data sets.",
        allow_abbrev=False,
    )
    sets.set_defaults(run=_datasets)
    return parser


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _read(data: str) -> pd.DataFrame:
    """A file by its ending, else a bundled data set by its name.

    Raises:
        FileNotFoundError: no such file.
        ValueError: neither a known ending nor a bundled data set, or a file that cannot be read.
    """
    lower = data.lower()
    if not lower.endswith(_CSV + _PARQUET):
        if Path(data).name != data or Path(data).suffix or Path(data).exists():
            kind = "is not a file that can be read" if Path(data).exists() else "does not exist"
            raise ValueError(f"{data} {kind}: DATA ends in {', '.join(_CSV + _PARQUET)}, or is a bundled data set")
        from glmmjax import datasets

        return datasets.load(data)
    if not Path(data).exists():
        raise FileNotFoundError(f"no such file: {data}")
    import pandas as pd

    if lower.endswith(_CSV):
        try:
            return pd.read_csv(data)
        except (ValueError, OSError, EOFError) as error:  # parsing, encoding, compression
            raise ValueError(f"{data} cannot be read as CSV: {error}") from error
    try:
        return pd.read_parquet(data)
    except ImportError:
        raise ValueError("reading Parquet needs pyarrow: python -m pip install 'glmmjax[parquet]'") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{data} cannot be read as Parquet: {error}") from error


def _family(args: argparse.Namespace) -> str:
    family: str = args.family
    if args.link is None:
        return family
    if "(" in family:
        raise ValueError(f"the link is given twice: --family {family} and --link {args.link}")
    return f"{family}({args.link})"


def _fit(args: argparse.Namespace) -> None:
    family = _family(args)
    data = _read(args.data)
    for option in ("weights", "offset"):
        column = getattr(args, option)
        if column is not None and column not in data.columns:
            have = ", ".join(map(str, data.columns))
            raise ValueError(f"--{option}: {args.data} has no column {column!r}; it has {have}")

    import glmmjax as gj
    from glmmjax import _ahead, _steps

    linear = gj.families.get(family).linear
    if not linear and (args.REML is not None or args.ddf is not None):
        raise ValueError("--REML and --ddf are for linear mixed models: add --family gaussian")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        columns = {"weights": args.weights, "offset": args.offset}
        if linear:
            setup = gj.lmer_setup(args.formula, data, REML=args.REML is not False, **columns)
        else:
            setup = gj.glmer_setup(args.formula, data, family=family, nAGQ=args.nAGQ, **columns)
        model = _steps.fit(setup) if args.json else _ahead.fit_for_summary(setup)
        report = None if args.json else str(model.summary(ddf=args.ddf))
        # Warnings about the fit, once each; other libraries' deprecations are not the user's concern.
        messages = list(dict.fromkeys(_one_line(str(w.message)) for w in caught if _concerns_user(w.category)))
        record = _record(model, args, messages) if args.json else None
    if record is not None:
        print(json.dumps(record, indent=2, allow_nan=False))
        return
    print(report)
    for message in messages:
        print(f"glmmjax: warning: {message}", file=sys.stderr)


def _concerns_user(category: type[Warning]) -> bool:
    return not issubclass(category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ResourceWarning))


def _number(x: Any) -> float | None:
    """A float for JSON; None where there is no finite number (JSON has no NaN)."""
    value = math.nan if x is None else float(x)
    return value if math.isfinite(value) else None


def _numbers(values: Iterable[Any]) -> list[float | None]:
    return [_number(x) for x in values]


def _text(x: Any) -> str | None:
    """A string for JSON; None for the missing second variable of a variance row."""
    return x if isinstance(x, str) else None


def _record(model: MixedModel, args: argparse.Namespace, messages: list[str]) -> dict[str, Any]:
    """Everything that `--json` prints. Numbers without a finite value are null."""
    terms = [str(term) for term in model.fixef.index]
    table = model.coefficients(args.ddf)
    columns = ("estimate", "std_error", "statistic", "df", "p_value")
    fixed = [dict(zip(columns, (_number(row.get(c)) for c in columns), strict=True)) for _, row in table.iterrows()]
    variances = model.VarCorr().to_frame()
    return {
        "formula": args.formula,
        "family": model.family.name,
        "link": model.family.link.name,
        "nAGQ": model.nAGQ,
        "logLik": _number(model.loglik),
        "AIC": _number(model.aic),
        "BIC": _number(model.bic),
        "objective": _number(model.objective),
        "REML": model.REML if model.is_linear else None,
        "sigma": _number(model.sigma),
        "fixef": [{"term": term, **row} for term, row in zip(terms, fixed, strict=True)],
        "VarCorr": [
            {
                "grp": _text(row.grp),
                "var1": _text(row.var1),
                "var2": _text(row.var2),
                "vcov": _number(row.vcov),
                "sdcor": _number(row.sdcor),
            }
            for row in variances.itertuples(index=False)
        ],
        "theta": _numbers(model.theta),
        "ngrps": {str(group): int(n) for group, n in dict(model.ngrps).items()},
        "nobs": int(model.nobs),
        "converged": bool(model.converged),
        "singular": bool(model.is_singular),
        "evaluations": int(model.fit_stats.evaluations),
        "messages": messages,
    }


def _datasets(args: argparse.Namespace) -> None:
    from glmmjax import datasets

    infos = [datasets.describe(name) for name in datasets.names()]
    width = max(len(info.name) for info in infos)
    print(f"{'name':<{width}}  {'rows':>5}  columns  what")
    for info in infos:
        print(f"{info.name:<{width}}  {info.rows:>5}  {len(info.columns):>7}  {info.title}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with `argv` (default: the process's arguments); returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, OSError) as error:  # FormulaError and DataError are ValueErrors
        print(f"glmmjax: {_one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def script() -> NoReturn:
    """The installed command: `main`, then out at once, as taking JAX's devices down takes a sixth of the whole."""
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as in `| head`
        status = 1
    except SystemExit as error:  # of argparse, which has written what there is to say
        status = int(error.code or 0)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    script()
