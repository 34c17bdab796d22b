"""Methods that are functions of modules imported when they are first asked for."""

from __future__ import annotations

import inspect
import pydoc
import subprocess
import sys
from typing import Any

import pytest

import glmmjax as gj
from glmmjax._methods import Method


def shifted(model: Any, level: float = 0.5, *rest: int, width: float = 2.0) -> tuple[Any, ...]:
    """The object and what it was given."""
    return model, level, rest, width


def owner() -> tuple[type, list[int]]:
    loaded: list[int] = []

    def load() -> Any:
        loaded.append(1)
        return shifted

    return type("Owner", (), {"moved": Method(load)}), loaded


def test_a_method_is_loaded_once_and_then_an_ordinary_one() -> None:
    kind, loaded = owner()
    assert not loaded
    one = kind()
    assert one.moved(0.25, 3, width=1.0) == (one, 0.25, (3,), 1.0)
    assert kind.moved(one) == one.moved() == (one, 0.5, (), 2.0)
    assert type("Under", (kind,), {})().moved(0.1)[1] == 0.1
    assert len(loaded) == 1 and inspect.isfunction(vars(kind)["moved"])


def test_an_override_may_call_it() -> None:
    kind, _ = owner()

    class Under(kind):  # type: ignore[misc, valid-type]
        def moved(self, level: float = 0.1) -> Any:
            return super().moved(level)

    assert Under().moved(0.75)[1] == Under().moved(0.75)[1] == 0.75


def test_it_has_the_functions_signature_and_docstring() -> None:
    kind, _ = owner()
    assert str(inspect.signature(kind.moved)) == (
        "(self, level: 'float' = 0.5, *rest: 'int', width: 'float' = 2.0) -> 'tuple[Any, ...]'"
    )
    assert str(inspect.signature(kind().moved)).startswith("(level:")
    assert kind.moved.__doc__ == shifted.__doc__ and kind.moved.__qualname__ == "Owner.moved"
    assert shifted.__name__ == "shifted" and not hasattr(shifted, "__signature__")  # the function is as it was


def test_its_arguments_are_checked() -> None:
    kind, _ = owner()
    with pytest.raises(ValueError, match="level must be"):
        kind().moved(1.5)
    with pytest.raises(TypeError, match="moved has no argument 'widht'; did you mean 'width'"):
        kind().moved(widht=1.0)
    with pytest.raises(TypeError, match="it takes level, rest, width$"):
        kind().moved(zzz=1.0)


def test_help_has_every_public_method_of_a_model() -> None:
    text = pydoc.plain(pydoc.render_doc(gj.MixedModel))
    for name in (n for n in dir(gj.MixedModel) if not n.startswith("_")):
        member = inspect.getattr_static(gj.MixedModel, name)
        assert name in text and (member.__doc__ or "").strip(), name
        if inspect.isfunction(member):
            assert next(iter(inspect.signature(member).parameters)) == "self" and member.__name__ == name


def test_importing_results_imports_no_answer_but_the_class_it_shows() -> None:
    code = "import sys, glmmjax.results; print([m for m in sys.modules if m.startswith('glmmjax.inference.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['glmmjax.inference.varcorr']"
