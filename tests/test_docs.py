"""The README's code and the notebooks run as written."""

import asyncio
import re
import textwrap
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^( *)```python\n(.*?)^ *```", (ROOT / "README.md").read_text(), re.M | re.S)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("block", [textwrap.dedent(code) for _, code in BLOCKS], ids=lambda b: b.split("\n")[0][:30])
def test_readme_code_runs(block: str) -> None:
    scope: dict[str, object] = {}
    exec("import glmmjax as gj\n" + block, scope)
    if "m" in scope:
        assert scope["m"].converged  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GLMMJAX_CACHE", jax.config.jax_compilation_cache_dir)  # kept between runs, too
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # compiled as a user's programs are
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are stripped before commit"
    client = NotebookClient(notebook, timeout=300, kernel_name="python3")
    asyncio.run(client.async_execute())
