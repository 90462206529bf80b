"""Files: read as UTF-8 or JSONL, and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_directory(name: str, path: str | Path) -> None:
    """Raise a FileNotFoundError, which calls ``path`` by ``name``, if it is no directory."""
    # transformers would look for it on the Hub.
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{name} must be a directory; got {path}")


def read_text(path: Path) -> str:
    """A file of UTF-8, with or without a byte order mark.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8: {error}") from None


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and content, or error, of each line of JSONL that is not blank."""
    # Not splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                yield number, error


@contextmanager
def atomic(path: Path, keep: bool = True) -> Iterator[str]:
    """A temporary name to write to, renamed to ``path`` at the end: whole, or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".monkey-", suffix=path.suffix)
    os.close(handle)
    try:
        yield name
        if not keep:
            os.unlink(name)
            return
        # mkstemp's file is private; what the user asked for has the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


@contextmanager
def atomic_directory(path: Path, write: bool = True) -> Iterator[Path]:
    """A temporary name for a directory, which takes the place of ``path`` at the end.

    Args:
        path: where it is to be.
        write: False in the processes that take part in writing without owning the directory: they
            get the name, and move nothing.
    """
    unfinished, old = (path.with_name(f"{path.name}.{what}") for what in ("unfinished", "old"))
    if write:
        shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
        unfinished.mkdir(parents=True)
    yield unfinished
    if write:
        if path.is_dir():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(unfinished, path)
        shutil.rmtree(old, ignore_errors=True)
