"""Files: read as UTF-8 or JSON with errors that say what is wrong, written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import importlib
import json
import logging
import os
import pickle
import re
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)


def check_directory(name: str, path: str | Path) -> None:
    """Raise a FileNotFoundError, which calls ``path`` by ``name``, if it is no directory."""
    # transformers would look for it on the Hub.
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{name} must be a directory; got {path}")


def check_file(name: str, path: str | Path) -> None:
    """Raise a FileNotFoundError, which calls ``path`` by ``name``, if it is no regular file."""
    if not os.path.isfile(path):  # a pipe could have no end, and wait for its writer
        raise FileNotFoundError(f"{name} must be a file; got {path}")


def check_pickle_allowed(name: str, path: Path, allow_pickle: bool) -> None:
    """Raise a ValueError, which calls what ``path`` belongs to by ``name``, if it is not asked for.

    Where a directory has safetensors, its pickles are not looked at.
    """
    if not allow_pickle:
        raise ValueError(
            f"{name} {path.parent} holds only pickles ({path.name}), which can run code; "
            "pass allow_pickle=True (--allow-pickle) to read them"
        )


#: What ``torch.load(weights_only=True)`` raises for a file that it cannot read, or will not.
UNREADABLE_PICKLE = (pickle.UnpicklingError, RuntimeError, EOFError, ValueError)


def unreadable_pickle(path: str | Path) -> ValueError:
    """In place of torch's own message, which says how to load the file unsafely."""
    return ValueError(
        f"{path} is no readable weights file: it is damaged, or holds something else than "
        "tensors, which is not loaded"
    )


def sha256_of(file: IO[bytes]) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal; it is never in memory as a whole."""
    digest = hashlib.sha256()
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


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


def parse_json(text: str | bytes) -> Any:
    """The value that ``text`` holds, if every reader of JSON would find the same one.

    Args:
        text: JSON; bytes are UTF-8, with or without a byte order mark.

    Raises:
        ValueError: no UTF-8, no JSON, a key that an object has twice, an integer of more digits
            than Python reads, or lists and objects nested deeper than it can follow.
    """
    text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    with _nesting_named():
        return _DECODER.decode(text)


def parse_json_array(text: str) -> list[Any]:
    """The array that ``text``, which begins with its bracket, holds.

    Raises:
        ValueError: the errors of :func:`parse_json`, with the place.
    """
    try:
        return parse_json(text)
    except json.JSONDecodeError:  # says the place itself
        raise
    except ValueError as error:
        number, line = _bad_element(text)
        raise ValueError(f"element {number} (line {line}): {error}") from None


def _bad_element(text: str) -> tuple[int, int]:
    """Number and line of the element that :func:`parse_json` refuses; all before it are good."""
    start, number = text.index("[") + 1, 0
    while True:
        start += len(_SPACE.match(text, start)[0])  # type: ignore[index] # matches nothing, too
        try:
            with _nesting_named():
                _, end = _DECODER.raw_decode(text, start)
            comma = text.index(",", end)
        except ValueError:
            return number, text.count("\n", 0, start) + 1
        start, number = comma + 1, number + 1


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {twice[:60]!r} twice")
    return content


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # Python's limit, which keeps an attacker from a conversion of hours
        raise ValueError(f"an integer has {len(digits)} digits, too many to be read") from None


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_SPACE = re.compile(r"[ \t\r\n]*")


@contextmanager
def _nesting_named() -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise ValueError("lists and objects are nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a file of JSON holds.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no object, or the errors of :func:`parse_json`.
    """
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(content).__name__}")
    return content


def json_lines(text: str | bytes) -> Iterator[tuple[int, Any]]:
    """Number (from 1) and content of each line of JSONL that is not blank.

    A line that :func:`parse_json` refuses has its ValueError as content.
    """
    # Not splitlines: JSON strings may hold U+2028 and other line ends of Unicode.
    lines: Sequence[str | bytes] = text.split("\n") if isinstance(text, str) else text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, parse_json(line)
            except ValueError as error:
                yield number, error


def list_problems(problems: Sequence[str], limit: int = 20, separator: str = "; ") -> str:
    """The first ``limit`` of them, and how many more there are."""
    more = [f"and {len(problems) - limit} more"] if len(problems) > limit else []
    return separator.join([*problems[:limit], *more])


#: What the messages of torch's file writer have in common.
_TORCH_WRITER = re.compile("PytorchStreamWriter|inline_container|iostream")


class WriteError(OSError):
    """A file or directory that cannot be written, named, and why."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails inside for want of space, or for another reason of the system's, names ``path``.

    A full disk is an OSError of Python's, a SafetensorError, and a RuntimeError of torch's writer.
    Other RuntimeErrors, such as memory or a collective that fails, have nothing to do with a disk.

    Raises:
        WriteError: one of them.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        from safetensors import SafetensorError  # no need of those who read, or encode alone

        reason = " ".join(str(error).split())
        of_torch = isinstance(error, RuntimeError) and _TORCH_WRITER.search(reason)
        if not (of_torch or isinstance(error, (OSError, SafetensorError))):
            raise
        if of_torch:  # it does not say why
            with suppress(OSError):
                reason += f" ({shutil.disk_usage(path.parent).free >> 20:,} MiB are free there)"
        raise WriteError(f"{path} cannot be written: {reason}") from error


def make_public(path: str | Path) -> None:
    """Give a file the usual permissions, as the user's umask has them."""
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def flush(directory: Path) -> None:
    """Wait until all files of a directory are on the disk.

    A network file system may have room in memory alone, and say only now that the disk is full.
    """
    for path in directory.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def take_lock(path: Path, wanted: str, where: Path) -> int:
    """Lock a file, which is made if it is not there; it says who holds it.

    The lock ends with the process, however that ends. Where the file system has no locks, a warning
    says so.

    Args:
        path: of the file.
        wanted: what has to be so, in the error: ``"output_dir must have no other run"``.
        where: what is written to, in the error.

    Returns:
        A file descriptor, for :func:`release_lock`.

    Raises:
        OSError: the file cannot be made or written.
        ValueError: another process holds the lock.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        _hold(file, wanted, where)
        # Its last holder may have removed the file since: that is a lock for nobody.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                break
        os.close(file)
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return file


def _hold(file: int, wanted: str, where: Path) -> None:
    import fcntl  # encoding alone runs where there is none

    try:
        # Not flock: the workers of a data loader would inherit it, and outlive a killed run.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            logger.warning(
                "%s is on a file system without locks (%s): make sure that nothing else writes "
                "there",
                where,
                error.strerror,
            )
            return
        holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"{wanted}; {holder} is writing to {where}") from None
        raise


def release_lock(path: Path, file: int) -> None:
    """Give back what :func:`take_lock` returned, and remove its file."""
    with suppress(OSError):  # a disk that has gone away has no lock to remove
        os.unlink(path)
    os.close(file)


@contextmanager
def atomic(path: Path, keep: bool = True, *, shared: bool = True) -> Iterator[str]:
    """A temporary name to write to, renamed to ``path`` at the end: whole, or not there.

    Args:
        path: where it is to be.
        keep: False to see whether it could be written, and leave nothing.
        shared: False where no other process writes ``path``: the name is the same every time, so
            that what a killed process left is written over.

    Raises:
        WriteError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if shared:
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=".monkey-", suffix=path.suffix)
            os.close(handle)
        else:
            name = str(path.with_name(f".monkey-{path.name}"))
            open(name, "wb").close()
        try:
            yield name
            if not keep:
                os.unlink(name)
                return
            make_public(name)  # mkstemp's is private
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

    Raises:
        WriteError: it cannot be written. What was at ``path`` stays.
    """
    # Names that are nobody else's, and the same in all processes.
    unfinished, old = (path.with_name(f".monkey-{path.name}.{w}") for w in ("unfinished", "old"))
    with writing(path):
        if write:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            unfinished.mkdir(parents=True)
        try:
            yield unfinished
            if write:
                for file in unfinished.rglob("*"):
                    if file.is_file():
                        make_public(file)  # safetensors' are private
                flush(unfinished)
                if path.is_dir():
                    shutil.rmtree(old, ignore_errors=True)
                    os.replace(path, old)
                os.replace(unfinished, path)
                shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            if write:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


def need_extra(module: str, extra: str, what: str) -> Any:
    """An optional package's module.

    Args:
        module: such as ``pyarrow.parquet``.
        extra: of this package, which brings it.
        what: needs it, in the error.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f'{what} needs {package}: pip install "monkey-vision[{extra}]" ({error})'
        raise ImportError(message) from None
