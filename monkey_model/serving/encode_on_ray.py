"""``monkey encode --ray``: one machine's decoding and encoding, on the processes of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from monkey_model.inputs.picture_lists import Picture, picture_of, plain
from monkey_model.serving.encode_files import (
    UNREADABLE,
    Decoded,
    EncoderSource,
    Outcome,
    Output,
    PictureEncoder,
    PictureReader,
)
from monkey_model.serving.on_ray import connect, model_actors, run_on_ray
from monkey_model.serving.token_files import (
    Manifest,
    Row,
    bytes_of,
    parquet_columns,
    parquet_schema,
    tensor_of,
)


def decode_table(table: Any, reader: PictureReader) -> Any:
    """``height``, ``width``, ``shape``, ``pixels`` and ``error`` of a table's items."""
    import pyarrow

    rows = []
    for row in table.to_pylist():
        about: dict[str, Any] = {**row, "height": None, "width": None, "shape": None}
        try:
            decoded = reader.decode(picture_of(row["id"], row["item"]))
        except UNREADABLE as error:
            rows.append({**about, "pixels": None, "error": str(error)})
            continue
        about |= {"height": decoded.size[0], "width": decoded.size[1]}
        about |= {"shape": list(decoded.pixels.shape)}
        rows.append({**about, "pixels": bytes_of(decoded.pixels).tobytes(), "error": None})
    schema = pyarrow.schema([
        ("id", pyarrow.string()),
        ("item", pyarrow.string()),
        ("height", pyarrow.int32()),
        ("width", pyarrow.int32()),
        ("shape", pyarrow.list_(pyarrow.int64())),
        ("pixels", pyarrow.large_binary()),
        ("error", pyarrow.string()),
    ])  # fmt: skip
    return pyarrow.Table.from_pylist(rows, schema)


class EncodingActor:
    """Holds an encoder, and makes rows of results of decoded ones.

    Args:
        source: which encoder.
        device: such as ``"cuda"``: the one GPU that Ray lets the process see.
        store: of :func:`monkey_model.serving.token_files.pack`.
    """

    def __init__(self, source: EncoderSource, device: str, store: str | None) -> None:
        self.encoder = PictureEncoder(source.load(torch.device(device)))
        self.store = store

    def __call__(self, table: Any) -> Any:
        import pyarrow

        dtype = torch.float32 if self.encoder.device.device.type == "cpu" else torch.uint8
        rows, good = [], []
        for row in table.to_pylist():
            picture = picture_of(row["id"], row["item"])
            if row["pixels"] is None:
                rows.append(Row(picture, error=row["error"]))
                continue
            size = (row["height"], row["width"])
            good.append(Decoded(size, tensor_of(row["pixels"], dtype, row["shape"])))
            rows.append(Row(picture, size))
        if good:
            tokens = iter(self.encoder.tokens(self.encoder.crops(good)).cpu())
            rows = [
                row if row.error is not None else Row(row.picture, row.size, next(tokens))
                for row in rows
            ]
        return pyarrow.table(parquet_columns(rows, self.store), schema=parquet_schema())


def encode_on_ray(
    source: EncoderSource,
    pictures: Sequence[Picture],
    output: Output,
    *,
    address: str,
    device: torch.device,
    models: int | None = None,
    batch_size: int = 1,
    reading: Mapping[str, bool],
    on_ready: Callable[[int], None] = lambda models: None,
) -> Outcome:
    """Encode pictures on a Ray cluster, into Parquet as :mod:`token_files` has it.

    Args:
        source: which encoder. It is loaded here once, for its settings, and by every actor.
        pictures: with ids of their own, and sources that every machine of the cluster sees.
        output: a folder that every machine sees; ``shard_size`` is the least number of rows in a
            file. With ``resume`` the pictures that it has are left out.
        address: of :func:`monkey_model.serving.on_ray.connect`.
        device: ``cuda`` for a GPU for each model, or ``cpu``.
        models: actors that hold one; by default one for each GPU of the cluster, or one on a CPU.
        batch_size: pictures in one pass.
        reading: allow_urls and fast_decode of :class:`PictureReader`.
        on_ready: called with the number of models before the work starts.

    Raises:
        ImportError: Ray is not installed.
        OSError: the folder cannot be written.
        RuntimeError: a model, or Ray, fails.
        ValueError: no cluster at the address, fewer GPUs than models, an encoder that cannot be
            loaded, or results of other settings.
    """
    ray = connect(address)
    on_gpus = device.type == "cuda"
    actors = model_actors(ray, models, on_gpus)
    encoder = PictureEncoder(source.load(torch.device("cpu")), **reading)
    settings = {**encoder.settings(source.origin, output), "shard_size": None, "writer": "ray"}
    Manifest(output.path, settings).begin([])
    reader = PictureReader(encoder.encoder.crop_settings, device, **reading, pin=False)
    del encoder
    on_ready(actors)

    def prepare(table: Any) -> Any:
        return decode_table(table, reader)

    def write(dataset: Any) -> None:
        dataset.write_parquet(
            str(output.path.absolute()), min_rows_per_file=output.shard_size, compression="none"
        )

    run_on_ray(
        ray,
        [(picture.id, plain(picture)) for picture in pictures],
        prepare,
        EncodingActor,
        (source, device.type, output.store),
        write,
        state=output.path.absolute() / ".monkey-ray",
        actors=actors,
        on_gpus=on_gpus,
        batch_size=batch_size,
    )
    return Outcome(len(pictures), failed_ids(output.path, pictures), 0)


def failed_ids(folder: Path, pictures: Sequence[Picture]) -> list[str]:
    """The pictures that have an error.

    Raises:
        RuntimeError: one that is not there, or twice.
    """
    import pyarrow.parquet

    errors: dict[str, str | None] = {}
    for path in sorted(folder.glob("*.parquet")):
        table = pyarrow.parquet.read_table(path, columns=["id", "error"])
        for row in table.to_pylist():
            if row["id"] in errors:
                raise RuntimeError(f"{path} has {row['id']!r}, which another file has, too")
            errors[row["id"]] = row["error"]
    missing = sum(picture.id not in errors for picture in pictures)
    if missing:
        raise RuntimeError(f"{folder} lacks {missing} of {len(pictures)} pictures")
    return [picture.id for picture in pictures if errors[picture.id] is not None]
