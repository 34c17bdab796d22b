"""The source that this process runs. Imported first of all, so that a change on disk after that is seen."""

from __future__ import annotations

import os
from functools import cache

_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def _state() -> dict[str, tuple[int, ...]]:
    """What tells whether a source file was written since: a change time cannot be set by anyone."""
    found: dict[str, tuple[int, ...]] = {}
    for folder, folders, files in os.walk(_FOLDER):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith((".py", ".pyc", ".so", ".pyd")):
                path = os.path.join(folder, name)
                s = os.stat(path)
                found[path] = (s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)
    return found


def _now() -> dict[str, tuple[int, ...]] | None:
    try:
        return _state() or None
    except OSError:
        return None


_at_import = _now()


def source_digest() -> str | None:
    """Digest of this package's source; None where that is not on disk, or no longer what it was at import.

    Modules are imported when they are first used, so that from then on nobody knows what this process runs.
    """
    if _at_import is None or _now() != _at_import:
        return None
    return _digest()


@cache
def _digest() -> str | None:
    import hashlib

    digest = hashlib.sha256()
    try:
        for path in sorted(_at_import or {}):
            with open(path, "rb") as file:
                content = file.read()
            digest.update(f"{os.path.relpath(path, _FOLDER)} {len(content)}\n".encode() + content)
    except OSError:
        return None
    return digest.hexdigest() if _now() == _at_import else None  # not written while it was read
