"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_directory(name: str, path: str | Path) -> None:
    """Raise a FileNotFoundError, which calls ``path`` by ``name``, if it is no directory."""
    # transformers would look for it on the Hub.
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{name} must be a directory; got {path}")


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
