"""One first fit as the command makes it, stage by stage: prints seconds by stage and operations by program as JSON.

Nothing is imported before its stage begins, so that the interpreter's start is all that is missing.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

seconds: dict[str, float] = {}
operations: dict[str, int] = {}


class Clock:
    """Adds what a block takes to a stage, less what was added inside it."""

    inside = 0.0

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def __enter__(self) -> None:
        self.before, Clock.inside = Clock.inside, 0.0
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.start
        seconds[self.stage] = seconds.get(self.stage, 0.0) + took - Clock.inside
        Clock.inside = self.before + took


def main() -> None:
    model, data = sys.argv[1:]
    with Clock("import numpy, pandas"):
        import numpy  # noqa: F401
        import pandas  # noqa: F401
    with Clock("import jax"):
        import jax
    with Clock("import glmmjax"):
        import glmmjax as gj

        make = gj.glmer_setup, gj.lmer_setup
        from glmmjax._ahead import fit_for_summary
        from glmmjax.compiling import programs
    from benchmarks.cases import FITS

    case = FITS[model]
    with Clock("read data"):
        table = gj.datasets.load(data)
    watch_compiler(jax)
    load = programs.load

    def timed(name: str) -> Any:
        with Clock("load programs"):
            return load(name)

    programs.load = timed
    with Clock("design, fit, and the rest"):
        linear = case.REML is not None
        m = fit_for_summary(make[linear](case.formula, table, case.REML if linear else case.family))
    with Clock("summary"):
        str(m.summary())
    print(json.dumps({"seconds": seconds, "operations": operations}))


def watch_compiler(jax: Any) -> None:
    """Count time that JAX reports, which with two programs at a time is more than passes."""
    names = {
        "/jax/core/compile/jaxpr_trace_duration": "(tracing)",
        "/jax/core/compile/jaxpr_to_mlir_module_duration": "(lowering)",
        "/jax/core/compile/backend_compile_duration": "(compiling, of both cores)",
    }

    def listen(event: str, duration: float, **_: Any) -> None:
        if event in names:
            seconds[names[event]] = seconds.get(names[event], 0.0) + duration

    jax.monitoring.register_event_duration_secs_listener(listen)
    lowered = jax.stages.Lowered.compile

    def compiled(self: Any, *args: Any, **kwargs: Any) -> Any:
        text = self.as_text()
        name = text.split("module @", 1)[1].split()[0] if "module @" in text else "program"
        operations[name] = text.count(" = ")
        return lowered(self, *args, **kwargs)

    jax.stages.Lowered.compile = compiled


if __name__ == "__main__":
    main()
