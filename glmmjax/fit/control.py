"""Settings of a fit, every one named and checked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from .._arguments import flag, mapping, number, unknown_argument, whole

CHECKS = ("warn", "ignore", "error")
OPTIMIZERS = ("auto", "bfgs", "newton", "cobyqa")


@dataclass(frozen=True, init=False)
class Control:
    """How a model is fitted.

    Args:
        optimizer: "auto" (for glmer BFGS, for lmer Newton steps with the average information; exact
            gradients, one compiled program), "bfgs", "newton" (exact Hessians),
            "cobyqa" (derivative-free, SciPy 1.14 or newer), or an optax gradient transformation such as
            ``optax.lbfgs()``.
        tol: converged when (1/2) g'H^-1 g, the expected further decrease of the deviance, is below it.
        max_evaluations: of deviance and gradient, those for the final Hessian not counted.
        exact: final Hessian by automatic differentiation instead of central differences of the exact
            gradient. It is a second program to compile (seconds) that runs about three times faster,
            which pays when a model is refitted often.
        check_grad: "warn", "ignore" or "error" if the fit did not converge.
        check_singular: the same for singular fits.
        check_rank: "message" (drop aliased columns of X and say so), "warn", "silent" or "error".

    Raises:
        TypeError: unknown name (the message has the nearest valid one). ValueError: value out of range.
    """

    optimizer: Any = "auto"
    tol: float = 1e-10
    max_evaluations: int = 500
    exact: bool = False
    check_grad: str = "warn"
    check_singular: str = "warn"
    check_rank: str = "message"

    def __init__(self, **settings: Any) -> None:
        known = [f.name for f in fields(self)]
        for name, value in settings.items():
            if name not in known:
                raise unknown_argument(name, known, "Control")
            object.__setattr__(self, name, value)
        if isinstance(self.optimizer, str) and self.optimizer not in OPTIMIZERS:
            near = difflib.get_close_matches(self.optimizer, OPTIMIZERS, 1, 0.3)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"optimizer {self.optimizer!r} is not known; {hint}use one of {', '.join(OPTIMIZERS)} or an optax "
                "gradient transformation"
            )
        if not isinstance(self.optimizer, str) and not (
            hasattr(self.optimizer, "init") and hasattr(self.optimizer, "update")
        ):
            raise ValueError("optimizer must be a name or an optax gradient transformation")
        number(self.tol, "tol", 0.0, 1.0)
        whole(self.max_evaluations, "max_evaluations", 1)
        flag(self.exact, "exact")
        for name in ("check_grad", "check_singular"):
            if getattr(self, name) not in CHECKS:
                raise ValueError(f"{name} must be one of {', '.join(CHECKS)}, got {getattr(self, name)!r}")
        if self.check_rank not in ("message", "warn", "silent", "error"):
            raise ValueError(f"check_rank must be 'message', 'warn', 'silent' or 'error', got {self.check_rank!r}")


def as_control(control: Control | dict[str, Any] | None) -> Control:
    """A Control from what users give: None, a dict, or a Control."""
    if control is None:
        return Control()
    if isinstance(control, dict):
        return Control(**mapping(control, "control"))
    if not isinstance(control, Control):
        raise TypeError(f"control must be a gj.Control or a dict, got {type(control).__name__}")
    return control
