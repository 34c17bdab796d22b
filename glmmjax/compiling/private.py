"""Folders and files of one user's own: what others could have written is not read, as what is read is executed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

#: First bytes of a file, which the digest of the rest follows.
MAGIC = b"glmmjax 1\n"


def private_folder(*parts: Path | str) -> Path | None:
    """A folder below another, made where it is not there (0700, whatever the umask).

    None where it cannot be, and where it or the one above (parts[0]) belongs to somebody else or others may write to
    it. The last folder, where it is below another, is closed to others' reading as well.
    """
    path = Path(parts[0])
    try:
        _make(path)
        if not _is_own(os.stat(path), stat.S_ISDIR):
            return None
        for part in parts[1:]:
            path = path / part
            _make(path)
            found = os.lstat(path)
            if not _is_own(found, stat.S_ISDIR):
                return None
            if os.name == "posix" and found.st_mode & 0o077:
                os.chmod(path, 0o700)
    except (OSError, ValueError):
        return None
    return path


def _make(path: Path) -> None:
    """Make a folder and those above it that are missing, each for its owner alone."""
    if not os.path.lexists(path):
        _make(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.mkdir(path, 0o700)
            os.chmod(path, 0o700)  # a umask may have taken the owner's rights


def _is_own(found: os.stat_result, kind: Callable[[int], bool]) -> bool:
    """Whether it is of this kind, this user's, and nobody else's to write."""
    if not kind(found.st_mode):
        return False
    if not hasattr(os, "geteuid"):  # access is not said by modes
        return True
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def read(path: Path) -> bytes | None:
    """What `write` wrote; None where it is not there, damaged, a link, or others could have written it."""
    flags = os.O_RDONLY
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # where the system has them
        flags |= getattr(os, name, 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            if not _is_own(os.fstat(file.fileno()), stat.S_ISREG):
                return None
            content = file.read()
    except (OSError, ValueError):
        return None
    start = len(MAGIC) + hashlib.sha256().digest_size
    body = content[start:]
    return body if content[:start] == MAGIC + hashlib.sha256(body).digest() else None


def write(path: Path, body: bytes) -> None:
    """Write a file that its owner alone can read, whole or not at all.

    Raises:
        OSError: the disk is full, the folder cannot be written, or a folder is in the file's place.
    """
    descriptor, part = tempfile.mkstemp(dir=path.parent)  # 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(MAGIC + hashlib.sha256(body).digest() + body)
        os.replace(part, path)
    except OSError:
        os.unlink(part)
        raise


def prune(folder: Path, most: int) -> None:
    """Delete the oldest files until `most` are left."""
    files = []
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):
            if entry.is_file(follow_symlinks=False):
                files.append((entry.stat(follow_symlinks=False).st_mtime, entry.path))
    for _, path in sorted(files)[: max(len(files) - most, 0)]:
        with contextlib.suppress(OSError):
            os.unlink(path)
