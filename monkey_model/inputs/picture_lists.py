"""Many pictures: which ones there are, and what each is called in the results.

A picture is listed by a path, or by its place in a larger file, and read when its turn comes: a
list of a million takes some 300 MB.
"""

from __future__ import annotations

import glob
import json
import os
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from monkey_model.files import json_lines, need_extra, read_text
from monkey_model.inputs.fetch import SCHEME
from monkey_model.inputs.picture_files import MAX_FILE_BYTES

#: Endings of the files that are taken from a folder or tar as pictures.
ENDINGS = (
    *(".jpg", ".jpeg", ".mpo", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".pbm", ".ico", ".avif"),
)

#: Of a column of pictures in one row group of Parquet, which is read as a whole.
MAX_ROW_GROUP_BYTES = 2**31


@dataclass(frozen=True, slots=True)
class FilePart:
    """Some bytes of a file: a member of a tar."""

    path: str
    offset: int
    size: int

    def read(self) -> bytes:
        if self.size > MAX_FILE_BYTES:
            message = f"must have at most MAX_FILE_BYTES = {MAX_FILE_BYTES}; got {self.size}"
            raise ValueError(f"a member of {self.path!r} {message}")
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) < self.size:
            raise ValueError(f"{self.path!r} ends inside a member")
        return data


@dataclass(frozen=True, slots=True)
class ParquetCell:
    """A value of a Parquet file: a picture's bytes, alone or as ``{"bytes", "path"}``."""

    path: str
    column: str
    row_group: int
    row: int

    def read(self) -> bytes | str:
        # Neighbours are read one after the other, by several threads: the row group is kept.
        with _LOCK:
            column = _row_group(self.path, self.column, self.row_group)
        value = column[self.row].as_py()
        if isinstance(value, dict):
            data, path = value.get("bytes"), value.get("path")
            value = data or (path and os.path.join(os.path.dirname(self.path), path))
        if not value:
            place = f"row {self.row} of row group {self.row_group}"
            raise ValueError(f"{self.path!r} has no picture in {self.column!r}, {place}")
        return value


_LOCK = threading.Lock()


@lru_cache(maxsize=2)
def _row_group(path: str, column: str, number: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        return file.read_row_group(number, columns=[column]).column(0)


Source: TypeAlias = str | FilePart | ParquetCell


@dataclass(frozen=True, slots=True)
class Picture:
    """One of many pictures.

    Args:
        id: what results call it; no other picture of a run has the same.
        source: a path or an address, or where in a file it is.
        name: a path under which its results are stored where each picture has a file.
    """

    id: str
    source: Source
    name: str

    def read(self) -> str | bytes:
        """What :func:`monkey_model.inputs.images.load_image` takes.

        Raises:
            OSError, ValueError: the file that holds it cannot be read.
        """
        return self.source if isinstance(self.source, str) else self.source.read()


def plain(picture: Picture) -> dict[str, Any]:
    """A picture as JSON can say it to another process, without its id."""
    source = picture.source
    if isinstance(source, str):
        path = source if SCHEME.match(source) else os.path.abspath(source)
        return {"name": picture.name, "path": path}
    kind = "part" if isinstance(source, FilePart) else "cell"
    return {"name": picture.name, kind: {**asdict(source), "path": os.path.abspath(source.path)}}


def picture_of(id: str, text: str) -> Picture:
    """The picture that :func:`plain` put into words."""
    item = json.loads(text)
    if "path" in item:
        return Picture(id, item["path"], item["name"])
    source = FilePart(**item["part"]) if "part" in item else ParquetCell(**item["cell"])
    return Picture(id, source, item["name"])


def list_pictures(
    arguments: Sequence[str], *, recursive: bool = False, lines: Iterable[bytes] | None = None
) -> list[Picture]:
    """The pictures that a command's arguments name.

    Args:
        arguments: each a picture's path or address; a folder; a pattern such as ``*.jpg``, if there
            is no file of that name; a tar in WebDataset's layout (``*.tar``); or ``-`` for the
            paths in ``lines``.
        recursive: take the pictures (by their :data:`ENDINGS`) in folders, and in the folders in
            those; hidden ones are left out.
        lines: one path or address in each, instead of standard input.

    Raises:
        OSError: a folder or tar that cannot be read.
        ValueError: a folder without ``recursive``, or without pictures; a pattern that matches
            nothing; ``-`` twice; the errors of :func:`list_tar` and :func:`check_ids`.
    """
    if arguments.count("-") > 1:
        raise ValueError("- (standard input) must be given once")
    pictures: list[Picture] = []
    for argument in arguments:
        if argument == "-":
            stream = sys.stdin.buffer if lines is None else lines
            paths = (os.fsdecode(line.rstrip(b"\r\n")) for line in stream)
            pictures += [_by_path(path) for path in paths if path]
        elif SCHEME.match(argument):
            pictures.append(_by_path(argument))
        elif os.path.isdir(argument):
            if not recursive:
                raise ValueError(f"{argument} is a folder; take the pictures in it by --recursive")
            pictures += _in_folder(argument)
        elif glob.has_magic(argument) and not os.path.lexists(argument):
            found = sorted(glob.glob(argument, recursive=True))
            if not found:
                raise ValueError(f"{argument} matches no file")
            found = ["./-" if path == "-" else path for path in found]
            pictures += list_pictures(found, recursive=recursive)
        elif argument.endswith(".tar"):
            pictures += list_tar(argument)
        else:
            pictures.append(_by_path(argument))
    check_ids(pictures)
    return pictures


def _by_path(path: str) -> Picture:
    return Picture(path, path, os.path.basename(path) or path)


def _in_folder(folder: str) -> list[Picture]:
    def stop(error: OSError) -> None:
        raise error

    pictures = []
    for place, folders, files in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                path = os.path.join(place, name)
                pictures.append(Picture(path, path, os.path.relpath(path, folder)))
    if not pictures:
        raise ValueError(f"{folder} holds no picture")
    return pictures


def list_tar(path: str) -> list[Picture]:
    """The pictures of a tar in WebDataset's layout; a picture's id is its name without the ending.

    Nothing is unpacked: each picture is read from its place in the file.

    Raises:
        OSError: it cannot be read.
        ValueError: no tar, or a compressed one; a name that leads outside; a link; no picture.
    """
    pictures = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if is_outside(member.name):
                    raise ValueError(f"{path} must hold paths inside it; got {member.name!r}")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise ValueError(f"{path} must hold plain files; {member.name!r} is none")
                folder, name = os.path.split(member.name)
                key, _, ending = name.partition(".")
                if f".{ending}".lower().endswith(ENDINGS) and key:
                    part = FilePart(path, member.offset_data, member.size)
                    pictures.append(Picture(os.path.join(folder, key), part, member.name))
    except tarfile.TarError as error:
        raise ValueError(f"{path} must be an uncompressed tar: {error}") from None
    if not pictures:
        raise ValueError(f"{path} holds no picture")
    return pictures


def is_outside(name: str) -> bool:
    """Whether a name, taken as a path in some folder, leads out of it, or nowhere."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts


def list_manifests(
    files: Sequence[Path], *, column: str = "image", id_column: str | None = None
) -> list[Picture]:
    """The pictures that JSONL and Parquet files list.

    Args:
        files: ``*.jsonl``, or ``*.parquet``, which needs the extra ``parquet``.
        column: of paths, relative ones to the file's folder, or addresses; of Parquet also of the
            pictures' bytes, or of ``{"bytes", "path"}``, as datasets stores pictures.
        id_column: of strings or integers. By default an id is the path, or, of bytes,
            ``FILE:ROW``.

    Raises:
        ImportError: Parquet without pyarrow.
        OSError: a file that cannot be read.
        ValueError: neither of the two; a column that is not there, or holds something else;
            the errors of :func:`check_ids`.
    """
    pictures: list[Picture] = []
    for file in files:
        if file.suffix == ".jsonl":
            pictures += _in_jsonl(file, column, id_column)
        elif file.suffix == ".parquet":
            pictures += _in_parquet(file, column, id_column)
        else:
            raise ValueError(f"a manifest must be a .jsonl or .parquet file; got {file}")
    check_ids(pictures)
    return pictures


def _in_jsonl(file: Path, column: str, id_column: str | None) -> Iterator[Picture]:
    for number, record in json_lines(read_text(file)):
        place = f"{file}, line {number}"
        if not isinstance(record, dict):
            why = f": {record}" if isinstance(record, ValueError) else ""
            raise ValueError(f"{place} must be a JSON object{why}")
        values = []
        for name in (column, id_column):
            if name is not None and name not in record:
                raise ValueError(f"{place} must have {name!r}; got {sorted(record)}")
            values.append(record.get(name))
        if not (values[0] and isinstance(values[0], str)):
            raise ValueError(f"{place} must have a path in {column!r}; got {values[0]!r:.60}")
        yield _listed(file, place, values[0], values[1])


def _in_parquet(file: Path, column: str, id_column: str | None) -> Iterator[Picture]:
    parquet = need_extra("pyarrow.parquet", "parquet", "Parquet")
    import pyarrow

    types = pyarrow.types
    try:
        content = parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file} must be Parquet: {error}") from None
    with content:
        schema = content.schema_arrow
        for name in (column, id_column):
            if name is not None and name not in schema.names:
                raise ValueError(f"{file} must have a column {name!r}; got {schema.names}")
        kind = schema.field(column).type
        of_paths = types.is_string(kind) or types.is_large_string(kind)
        of_bytes = types.is_binary(kind) or types.is_large_binary(kind) or types.is_struct(kind)
        if not (of_paths or of_bytes):
            raise ValueError(f"{file} must have paths or bytes in {column!r}; got {kind}")
        wanted = [column] * of_paths + [id_column] * (id_column is not None)
        row = 0
        for group in range(content.num_row_groups):
            rows = content.metadata.row_group(group).num_rows
            if of_bytes:
                _check_row_group(file, content.metadata.row_group(group), column)
            table = content.read_row_group(group, columns=wanted).to_pydict() if wanted else {}
            for place in range(rows):
                where = f"{file}, row {row}"
                given = None if id_column is None else table[id_column][place]
                if id_column is not None and given is None:
                    raise ValueError(f"{where} must have an id in {id_column!r}; got none")
                if of_paths:
                    yield _listed(file, where, table[column][place], given)
                else:
                    cell = ParquetCell(str(file), column, group, place)
                    yield _listed(
                        file, where, cell, f"{file.name}:{row}" if given is None else given
                    )
                row += 1


def _check_row_group(file: Path, group: Any, column: str) -> None:
    parts = (group.column(number) for number in range(group.num_columns))
    size = sum(part.total_uncompressed_size for part in parts
               if part.path_in_schema.split(".")[0] == column)  # fmt: skip
    if size > MAX_ROW_GROUP_BYTES:
        raise ValueError(
            f"{file} must have row groups of at most MAX_ROW_GROUP_BYTES = {MAX_ROW_GROUP_BYTES} "
            f"in {column!r}, as each is read as a whole; got {size}: write it with a smaller "
            "row_group_size"
        )


def _listed(file: Path, place: str, source: Any, name: Any) -> Picture:
    if source is None or source == "":
        raise ValueError(f"{place} must have a path; got none")
    if name is not None and type(name) not in (str, int):
        raise ValueError(f"{place} must have a string or an integer as id; got {name!r:.60}")
    if isinstance(source, str) and not SCHEME.match(source):
        path = str(file.parent / source)
        inside = os.path.basename(source) if is_outside(source) else source
        return Picture(
            path if name is None else str(name), path, inside if name is None else str(name)
        )
    if name is None:
        return _by_path(source)
    return Picture(str(name), source, str(name))


def check_ids(pictures: Iterable[Picture]) -> None:
    """Raise a ValueError where two pictures have the same id, or one has none that can be kept."""
    seen: set[str] = set()
    for picture in pictures:
        if picture.id in seen:
            raise ValueError(
                f"each picture must have an id of its own; got {picture.id!r} twice (a manifest's "
                "ids come from --id-column)"
            )
        seen.add(picture.id)
