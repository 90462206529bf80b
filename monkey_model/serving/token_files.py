"""Visual tokens on disk: in which numbers, in which files, and what of a run is done.

A folder of results holds files of one picture each, or shards of many, and a list of what is done::

    manifest.jsonl     {"settings": {...}}, then {"id", "file", "error"} for each picture
    photo.jpg.safetensors, or tokens-00000.safetensors, or tokens-00000.parquet

Every file is there whole or not at all, and a line of the list follows its file. A picture that
could not be read has a line with the reason, and in a shard a row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from monkey_model.files import (
    WriteError,
    atomic,
    json_lines,
    list_problems,
    need_extra,
    parse_json,
    writing,
)
from monkey_model.inputs.fetch import shown
from monkey_model.inputs.picture_lists import Picture

#: What of the tokens is kept; by default all, in the encoder's dtype.
STORES = ("bf16", "fp16", "fp8", "int8", "pooled")
SHARD_FORMATS = ("safetensors", "parquet")

_CASTS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What the largest value of a token becomes: int8 is symmetric, float8_e4m3fn ends at 448.
_SCALED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
# Names that safetensors has for dtypes.
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_ROW_GROUP_BYTES = 2**26
# Of one path: another picture's may well be written.
_PATH_ERRORS = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EILSEQ, errno.EINVAL)


@dataclass(frozen=True)
class Row:
    """What came of a picture: tokens, or an error.

    Args:
        picture: which one.
        size: (height, width) in pixels of the decoded picture, None where it could not be read.
        tokens: [crops_per_image * n_queries, output_dim] on the CPU, or None.
        error: why there are none.
    """

    picture: Picture
    size: tuple[int, int] | None = None
    tokens: Tensor | None = None
    error: str | None = None


# ---- numbers ------------------------------------------------------------------------------------


def pack(tokens: Tensor, store: str | None) -> dict[str, Tensor]:
    """What is stored of tokens [T, D]: ``tokens``, and for ``fp8`` and ``int8`` a ``scale`` [T, 1].

    - None: as they are. ``bf16``, ``fp16``: cast; beyond 65504, fp16 is infinite.
    - ``int8``, ``fp8``: divided by a float32 scale for each token, so that its largest value is 127
      or 448, and rounded. ``tokens * scale`` gives them back.
    - ``pooled``: [D] float32, the mean over all tokens of the picture.
    """
    if store is None:
        return {"tokens": tokens.contiguous()}
    if store == "pooled":
        return {"tokens": tokens.float().mean(0)}
    if store in _CASTS:
        return {"tokens": tokens.to(_CASTS[store]).contiguous()}
    dtype, largest = _SCALED[store]
    wide = tokens.float()
    scale = wide.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    scaled = wide / scale
    return {"tokens": (scaled.round() if dtype == torch.int8 else scaled).to(dtype), "scale": scale}


def unpack(stored: Mapping[str, Tensor]) -> Tensor:
    """The tokens that :func:`pack` stored, in float32 where they were scaled."""
    if "scale" in stored:
        return stored["tokens"].float() * stored["scale"]
    return stored["tokens"]


def weights_mark(encoder: nn.Module) -> str:
    """A short hash that tells an encoder's weights from others, from the first values of each."""
    digest = hashlib.blake2b(digest_size=8)
    for name, value in encoder.state_dict().items():
        sample = value.detach().flatten()[:64].to("cpu", torch.float64)
        digest.update(f"{name}{list(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


# ---- what is done -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A file to write, and its pictures."""

    path: Path
    pictures: Sequence[Picture]


def _list_path(folder: Path, share: tuple[int, int] | None) -> Path:
    suffix = "" if share is None else f"-{share[0]}-of-{share[1]}"
    return folder / f"manifest{suffix}.jsonl"


def check_unused(folder: Path, *, resume: bool, share: tuple[int, int] | None) -> None:
    """Raise a ValueError if the folder holds results that this run is not to go on with.

    The other shares of the same run may be at work in it.
    """
    shares = range(share[1] if share else 0)
    others = {_list_path(folder, (i, share[1])) for i in shares if share and i != share[0]}
    found = sorted(set(folder.glob("manifest*.jsonl")) - others)
    if found and not resume:
        raise ValueError(
            f"{folder} holds results already ({found[0].name}); go on with them by --resume, or "
            "choose another --out"
        )


class Manifest:
    """What of a run is done, as a list on disk that only grows, a line at a time.

    Args:
        folder: of the results.
        settings: what the results were made with. Results of others do not go into one folder.
        share: (i, n) where this process does the i-th of n shares, each of which has its own list.

    Raises:
        OSError: the folder or a list cannot be read or written.
        ValueError: a list that is none, or of other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        *,
        share: tuple[int, int] | None = None,
    ) -> None:
        self.folder = folder
        self.settings = dict(settings)
        self.path = _list_path(folder, share)
        #: What is done, by id.
        self.records: dict[str, dict[str, Any]] = {}
        self._own: dict[str, dict[str, Any]] = {}
        self._is_whole = False  # our own list, to which lines can be added
        for path in sorted(folder.glob("manifest*.jsonl")):
            records = self._read(path)
            self.records.update(records)
            if path == self.path:
                self._own = records

    def _read(self, path: Path) -> dict[str, dict[str, Any]]:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the last line may have been cut off
        if path == self.path:
            self._is_whole = whole == content != b""
        records: dict[str, dict[str, Any]] = {}
        for number, record in json_lines(whole):
            if (
                number == 1
                and isinstance(record, dict)
                and isinstance(record.get("settings"), dict)
            ):
                self._check_settings(path, record["settings"])
            elif number > 1 and isinstance(record, dict) and isinstance(record.get("id"), str):
                records[record["id"]] = record
            else:
                raise ValueError(f"{path}, line {number} is not of a list of what is done")
        return records

    def _check_settings(self, path: Path, found: Mapping[str, Any]) -> None:
        # Where the weights lie does not matter; which ones they are does.
        names = sorted((self.settings.keys() | found.keys()) - {"checkpoint"})
        other = [
            f"{name} {found.get(name)!r}, not {self.settings.get(name)!r}"
            for name in names
            if found.get(name) != self.settings.get(name)
        ]
        if other:
            raise ValueError(
                f"{path} is of other settings: {list_problems(other)}. Choose another --out"
            )

    def left(self, parts: Sequence[Part]) -> list[Part]:
        """The parts that are not done, or whose file is not whole any more.

        Raises:
            ValueError: a part that holds other pictures, or in another order.
        """
        by_file: dict[str, list[str]] = {}
        for record in self.records.values():
            if record.get("file") is not None:
                by_file.setdefault(record["file"], []).append(record["id"])
        return [part for part in parts if not self._is_done(part, by_file)]

    def _is_done(self, part: Part, by_file: Mapping[str, list[str]]) -> bool:
        ids = [picture.id for picture in part.pictures]
        name = self._name(part.path)
        there = by_file.get(name, [])
        if there != ids[: len(there)]:
            raise ValueError(
                f"{self.folder / name} holds other pictures than this run would put there: the "
                "list of pictures has changed. Choose another --out"
            )
        listed = all(id in self.records for id in ids)
        if listed and not there and len(ids) == 1:
            return True  # an error, which has no file
        return listed and len(there) == len(ids) and is_whole(part.path)

    def errors(self, parts: Sequence[Part]) -> int:
        """How many of the parts' pictures are done, and have an error."""
        records = (self.records.get(picture.id, {}) for part in parts for picture in part.pictures)
        return sum(record.get("error") is not None for record in records)

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.folder)

    def begin(self, left: Sequence[Part]) -> None:
        """Take what ``left`` is about to do off the list."""
        again = {picture.id for part in left for picture in part.pictures}
        if self._is_whole and not again & self._own.keys():
            return
        lines: list[Mapping[str, Any]] = [{"settings": self.settings}]
        lines += [record for id, record in self._own.items() if id not in again]
        with atomic(self.path, shared=False) as name, open(name, "wb") as file:
            for line in lines:
                file.write(_json_line(line))

    def add(self, rows: Sequence[tuple[str, str | None]], path: Path | None) -> None:
        """The pictures (id, error) of a file that is whole now; an error alone has no file."""
        name = None if path is None else self._name(path)
        lines = (_json_line({"id": id, "file": name, "error": error}) for id, error in rows)
        # Unbuffered: one call of the system appends all of it.
        with writing(self.path), open(self.path, "ab", buffering=0) as file:
            file.write(b"".join(lines))


def _json_line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value) + "\n").encode()


def is_whole(path: Path) -> bool:
    """Whether a file of results is there and has all its bytes."""
    if path.suffix == ".parquet":
        parquet = need_extra("pyarrow.parquet", "parquet", "Parquet")
        with suppress(OSError, ValueError):  # ArrowInvalid is one
            parquet.read_metadata(path)
            return True
        return False
    with suppress(OSError, SafetensorError), safe_open(path, "pt"):
        return True
    return False


# ---- files --------------------------------------------------------------------------------------


def write_files(
    rows: Iterator[Row],
    parts: Sequence[Part],
    manifest: Manifest | None,
    *,
    store: str | None,
    metadata: Mapping[str, str],
    on_written: Callable[[str], None],
    on_problem: Callable[[str, str], None],
) -> None:
    """A safetensors file for each picture.

    Args:
        rows: of the parts' pictures, in order.
        parts: of one picture each.
        manifest: the list to add to, if there is one.
        store: of :func:`pack`.
        metadata: for every file.
        on_written: called with a line about each file.
        on_problem: called with a picture's id and what is wrong with it, or its file's name.

    Raises:
        WriteError: the disk is full, or the like: no file can be written.
    """
    for row, part in zip(rows, parts, strict=True):
        error, id = row.error, row.picture.id
        if row.tokens is not None and row.size is not None:
            about = {"image": shown(id), "decoded_size": "x".join(map(str, row.size)), **metadata}
            packed = pack(row.tokens, store)
            try:
                with atomic(part.path, shared=False) as file:
                    save_file(packed, file, about)
            except WriteError as problem:
                if not _is_of_this_path(problem):
                    raise
                error = f"the tokens of {id} cannot be written: {problem}"
            else:
                shape = " x ".join(map(str, packed["tokens"].shape))
                on_written(f"{shown(id)}: {shape} visual tokens -> {shown(str(part.path))}")
        if error is not None:
            on_problem(id, error)
        if manifest is not None:
            manifest.add([(id, error)], part.path if error is None else None)


def _is_of_this_path(error: BaseException) -> bool:
    cause = error.__cause__
    return isinstance(cause, OSError) and cause.errno in _PATH_ERRORS


def write_shards(
    rows: Iterator[Row],
    parts: Sequence[Part],
    manifest: Manifest,
    *,
    store: str | None,
    on_written: Callable[[str], None],
    on_problem: Callable[[str, str], None],
) -> None:
    """Shards of many pictures, written as the rows come: no shard is held in memory.

    A safetensors shard has ``tokens`` [pictures with tokens, ...], for ``fp8`` and ``int8``
    ``scale``, and ``rows``: bytes of JSON, a list of ``{"id", "error", "decoded_size", "index"}``
    with a picture's index in ``tokens``. Parquet has :func:`parquet_columns`. The settings are in
    the metadata.

    The arguments and errors are those of :func:`write_files`.
    """
    for part in parts:
        shard: _Shard
        done: list[tuple[str, str | None]] = []
        with atomic(part.path, shared=False) as name, open(name, "wb") as file:
            kind = _ParquetShard if part.path.suffix == ".parquet" else _SafetensorsShard
            shard = kind(file, manifest.settings, store)
            for row in islice(rows, len(part.pictures)):
                shard.add(row)
                done.append((row.picture.id, row.error))
                if row.error is not None:
                    on_problem(row.picture.id, row.error)
            shard.finish()
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that there is no room
        manifest.add(done, part.path)
        on_written(f"{len(done)} pictures -> {shown(str(part.path))}")


def _size_text(row: Row) -> str | None:
    return None if row.size is None else "x".join(map(str, row.size))


class _SafetensorsShard:
    """Tokens go to the file as they come; what else there is, and the header, at the end."""

    def __init__(self, file: BinaryIO, settings: Mapping[str, Any], store: str | None) -> None:
        self._file, self._store = file, store
        self._metadata = {"settings": json.dumps(settings)}
        self._rows: list[dict[str, Any]] = []
        self._scales: list[Tensor] = []
        self._tokens: Tensor | None = None  # the first, for shape and dtype
        self._count = 0
        # Room for three tensors of the longest numbers.
        self._room = 8 + len(json.dumps({"__metadata__": self._metadata})) + 1024
        self._room += -self._room % 8
        file.write(b" " * self._room)

    def add(self, row: Row) -> None:
        about = {"id": row.picture.id, "error": row.error, "decoded_size": _size_text(row)}
        index = None
        if row.tokens is not None:
            packed = pack(row.tokens, self._store)
            index, self._count = self._count, self._count + 1
            self._tokens = packed["tokens"][:0] if self._tokens is None else self._tokens
            self._shape = list(packed["tokens"].shape)
            self._file.write(bytes_of(packed["tokens"]))
            if "scale" in packed:
                self._scales.append(packed["scale"])
        self._rows.append({**about, "index": index})

    def finish(self) -> None:
        end = self._file.tell() - self._room
        header: dict[str, Any] = {"__metadata__": self._metadata}

        def entry(name: str, dtype: torch.dtype, shape: list[int], start: int, stop: int) -> None:
            offsets = [start, stop]
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": offsets}

        if self._tokens is not None:
            entry("tokens", self._tokens.dtype, [self._count, *self._shape], 0, end)
        if self._scales:
            scales = torch.stack(self._scales)
            self._file.write(bytes_of(scales))
            entry("scale", scales.dtype, list(scales.shape), end, end + scales.nbytes)
            end += scales.nbytes
        rows = json.dumps(self._rows).encode()
        self._file.write(rows)
        entry("rows", torch.uint8, [len(rows)], end, end + len(rows))
        text = json.dumps(header).encode().ljust(self._room - 8)
        self._file.seek(0)
        self._file.write(len(text).to_bytes(8, "little") + text)


def bytes_of(tensor: Tensor) -> memoryview:
    """Little-endian, row by row."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def parquet_columns(rows: Sequence[Row], store: str | None) -> dict[str, list[Any]]:
    """Rows as columns of plain values, each row complete in itself.

    ``id``, ``error``, ``height``, ``width``, ``dtype`` (as safetensors writes it), ``shape``,
    ``tokens`` and ``scale`` (bytes, little-endian, row by row; ``scale`` is float32 [T, 1]).
    """
    columns: dict[str, list[Any]] = {name: [] for name in (
        "id", "error", "height", "width", "dtype", "shape", "tokens", "scale"
    )}  # fmt: skip
    for row in rows:
        packed = {} if row.tokens is None else pack(row.tokens, store)
        tokens, scale = packed.get("tokens"), packed.get("scale")
        height, width = row.size or (None, None)
        for name, value in (
            ("id", row.picture.id),
            ("error", row.error),
            ("height", height),
            ("width", width),
            ("dtype", None if tokens is None else _NAMES[tokens.dtype]),
            ("shape", None if tokens is None else list(tokens.shape)),
            ("tokens", None if tokens is None else bytes_of(tokens).tobytes()),
            ("scale", None if scale is None else bytes_of(scale).tobytes()),
        ):
            columns[name].append(value)
    return columns


def parquet_schema() -> Any:
    """Of :func:`parquet_columns`."""
    pyarrow = need_extra("pyarrow", "parquet", "Parquet")
    return pyarrow.schema([
        ("id", pyarrow.string()),
        ("error", pyarrow.string()),
        ("height", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("dtype", pyarrow.string()),
        ("shape", pyarrow.list_(pyarrow.int64())),
        ("tokens", pyarrow.large_binary()),
        ("scale", pyarrow.large_binary()),
    ])  # fmt: skip


class _ParquetShard:
    """Rows go to the file in groups of some tens of MB."""

    def __init__(self, file: BinaryIO, settings: Mapping[str, Any], store: str | None) -> None:
        parquet = need_extra("pyarrow.parquet", "parquet", "Parquet")
        self._schema = parquet_schema().with_metadata({"settings": json.dumps(settings)})
        # Tokens do not get smaller.
        self._writer = parquet.ParquetWriter(
            file, self._schema, compression="none", use_dictionary=["dtype"]
        )
        self._store = store
        self._rows: list[Row] = []
        self._bytes = 0

    def add(self, row: Row) -> None:
        self._rows.append(row)
        self._bytes += 0 if row.tokens is None else row.tokens.nbytes
        if self._bytes >= _ROW_GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        import pyarrow

        columns = parquet_columns(self._rows, self._store)
        self._writer.write_table(pyarrow.table(columns, schema=self._schema))
        self._rows, self._bytes = [], 0

    def finish(self) -> None:
        if self._rows:
            self._write()
        self._writer.close()


_Shard: TypeAlias = _SafetensorsShard | _ParquetShard


def read_tokens(path: str | Path) -> Iterator[tuple[str, Tensor | None, str | None]]:
    """The id, the tokens (see :func:`unpack`) and the error of each picture of a file or folder.

    Args:
        path: a file or folder that ``monkey encode`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    path = Path(path)
    if path.is_dir():
        yield from _read_folder(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        yield from _read_safetensors(path)


def _read_folder(folder: Path) -> Iterator[tuple[str, Tensor | None, str | None]]:
    lists = sorted(folder.glob("manifest*.jsonl"))
    if not lists:
        raise ValueError(f"{folder} must hold what monkey encode wrote; it has no manifest.jsonl")
    files: dict[str, None] = {}
    for path in lists:
        for number, record in json_lines(path.read_bytes()):
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is not of a list of what is done")
            if "settings" in record:
                continue
            if record["file"] is None:
                yield record["id"], None, record["error"]
            else:
                files[record["file"]] = None
    named = sorted(folder / name for name in files)
    for path in named or sorted(folder.glob("*.parquet")):  # Ray names its files itself
        yield from read_tokens(path)


def _read_parquet(path: Path) -> Iterator[tuple[str, Tensor | None, str | None]]:
    parquet = need_extra("pyarrow.parquet", "parquet", "Parquet")
    with parquet.ParquetFile(path) as file:
        if file.schema_arrow.names != parquet_schema().names:
            raise ValueError(f"{path} must hold what monkey encode wrote")
        for batch in file.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                if row["tokens"] is None:
                    yield row["id"], None, row["error"]
                    continue
                stored = {"tokens": tensor_of(row["tokens"], _DTYPES[row["dtype"]], row["shape"])}
                if row["scale"] is not None:
                    stored["scale"] = tensor_of(row["scale"], torch.float32, [-1, 1])
                yield row["id"], unpack(stored), None


def tensor_of(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """What :func:`bytes_of` took apart."""
    return torch.frombuffer(bytearray(data), dtype=dtype).view(*shape)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor | None, str | None]]:
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            if "rows" not in names:
                stored = {name: file.get_tensor(name) for name in names}
                yield (file.metadata() or {})["image"], unpack(stored), None
                return
            for row in parse_json(file.get_tensor("rows").numpy().tobytes()):
                index = row["index"]
                if index is None:
                    yield row["id"], None, row["error"]
                else:
                    stored = {
                        name: file.get_slice(name)[index] for name in names & {"tokens", "scale"}
                    }
                    yield row["id"], unpack(stored), None
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} must hold what monkey encode wrote: {error}") from None
