"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def unfinished(directory: Path) -> Path:
    """Where ``directory`` is written, for :func:`finish`; without what a broken run left there."""
    place = directory.with_name(f"{directory.name}.unfinished")
    shutil.rmtree(place, ignore_errors=True)
    return place


def finish(directory: Path) -> None:
    """Give ``directory`` its name, in the place of an older one."""
    old = directory.with_name(f"{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.is_dir():
        os.replace(directory, old)
    os.replace(directory.with_name(f"{directory.name}.unfinished"), directory)
    shutil.rmtree(old, ignore_errors=True)
