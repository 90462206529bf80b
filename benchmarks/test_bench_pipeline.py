"""JPEG files to files of visual tokens: decoding, encoding and writing side by side.

    pytest benchmarks/test_bench_pipeline.py --benchmark-only
    python -m benchmarks.test_bench_pipeline PLOT.png [PICTURES]

The second draws the memory of a run over many photos.

In one group the encoder only waits, as the host does while a GPU works: what can be had is the time
of the larger part alone, decoding on all cores or encoding. In the other the small encoder that
stands in without a checkpoint works on the same cores as the decoders.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.timing import measure
from benchmarks.workloads import DEVICE, PHOTO_SIZES, SCALE, photo
from monkey_model.crop_settings import CropSettings
from monkey_model.inputs.images import load_image
from monkey_model.inputs.picture_lists import Picture
from monkey_model.serving.encode_files import (
    Decoded,
    Output,
    PictureEncoder,
    PictureReader,
    encode_files,
    encode_pictures,
    plan_parts,
    seeded_encoder,
)
from monkey_model.serving.pipeline import Device, default_workers

COUNT = 48 if SCALE == "real" else 3
SECONDS = 0.028  # an image on an H100: 20.8 TFLOP at 800 TFLOP/s, and what is beside it
DISTINCT = 4


class WaitingEncoder:
    """In place of :class:`PictureEncoder`: pictures are decoded, and cost a GPU's time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.device = Device(torch.device("cpu"))
        self.reader = PictureReader(CropSettings(), torch.device("cuda"), pin=False)
        self.encoder = SimpleNamespace(crop_settings=CropSettings())

    def crops(self, batch: Sequence[Decoded]) -> Tensor:
        return torch.empty(len(batch))

    def tokens(self, crops: Tensor) -> Tensor:
        time.sleep(self.seconds * len(crops))
        return torch.zeros(len(crops), 1280, 64)


@functools.cache
def pictures() -> list[Picture]:
    """Of 12 MP, as a camera names them."""
    folder = Path(tempfile.mkdtemp(prefix="monkey-photos-"))
    for number in range(COUNT):
        file = folder / f"{number:04d}.jpg"
        if number < DISTINCT:
            pixels = photo(*PHOTO_SIZES["4000x3000"], seed=number).numpy()
            Image.fromarray(pixels).save(file, "JPEG", quality=90)
        else:
            file.hardlink_to(folder / f"{number % DISTINCT:04d}.jpg")
    return [Picture(file.name, str(file), file.name) for file in sorted(folder.iterdir())]


def decode_alone(_) -> None:
    with ThreadPoolExecutor(default_workers()) as pool:
        for _ in pool.map(lambda picture: load_image(picture.read()), pictures()):
            pass


def encode_alone(_) -> None:
    time.sleep(SECONDS * COUNT)


def one_after_the_other(_) -> None:
    for picture in pictures():
        load_image(picture.read())
        time.sleep(SECONDS)


def pipelined(_) -> None:
    encode_pictures(WaitingEncoder(), pictures(), lambda rows: [None for _ in rows] and None)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's encoder does not only wait")
@pytest.mark.parametrize("provider", ["the larger part alone", "one after the other", "ours"])
def test_waiting_encoder(benchmark, provider):
    decode_alone(None)  # makes the files, and has them read
    start = time.perf_counter()
    decode_alone(None)
    larger = decode_alone if time.perf_counter() - start > SECONDS * COUNT else encode_alone
    providers = {
        "the larger part alone": larger,
        "one after the other": one_after_the_other,
        "ours": pipelined,
    }
    benchmark.group = f"{COUNT} 12 MP JPEGs, an encoder that waits 28 ms for each"
    benchmark.extra_info["larger part"] = larger.__name__.split("_")[0]
    measure(benchmark, providers, provider, [None])


@pytest.mark.parametrize("provider", ["one after the other", "ours"])
def test_small_encoder(benchmark, provider, tmp_path):
    """Into a file for each picture. The first is ``monkey encode`` as it was without a pipeline."""
    encoder = seeded_encoder(DEVICE, torch.float32)

    @torch.inference_mode()
    def sequential(_) -> None:
        for picture in pictures():
            tokens = encoder.encode_images([picture.source])[0]
            save_file({"tokens": tokens.cpu().contiguous()}, tmp_path / f"{picture.name}.x")

    def ours(_) -> None:
        output = Output(tmp_path)
        parts = plan_parts(pictures(), output)
        encode_files(PictureEncoder(encoder), parts, output, origin="a benchmark")

    benchmark.group = f"{COUNT} 12 MP JPEGs to files, the small encoder"
    measure(benchmark, {"one after the other": sequential, "ours": ours}, provider, [None])


def memory_over_a_run(count: int) -> tuple[list[float], list[float]]:
    """Pictures done and the process's resident MiB, all through a run that writes shards."""
    page = os.sysconf("SC_PAGE_SIZE")
    done: list[float] = []
    resident: list[float] = []
    finished = threading.Event()
    progress = [0]

    def watch() -> None:
        while not finished.wait(0.2):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            done.append(progress[0])
            resident.append(pages * page / 2**20)

    def count_up(number: int, waited: float) -> None:
        progress[0] += number

    class Encoder(WaitingEncoder):
        """Tokens of real size."""

        def tokens(self, crops: Tensor) -> Tensor:
            time.sleep(self.seconds * len(crops))
            return torch.zeros(len(crops), 1280, 4096, dtype=torch.bfloat16)

        def settings(self, origin: str, output: Output) -> dict[str, str]:
            return {}

    encoder = Encoder()
    encoder.encoder.adapter_index = lambda: []
    many = [
        Picture(str(number), picture.source, str(number))
        for number, picture in zip(range(count), pictures() * count, strict=False)
    ]
    with tempfile.TemporaryDirectory() as folder:
        output = Output(Path(folder), shard_size=100, store="pooled")
        thread = threading.Thread(target=watch)
        thread.start()
        try:
            encode_files(
                encoder, plan_parts(many, output), output, origin="memory", on_done=count_up
            )
        finally:
            finished.set()
            thread.join()
    return done, resident


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    done, resident = memory_over_a_run(count)
    half = len(resident) // 2
    print(f"MiB at most: {max(resident[:half]):.0f} in the first half, {max(resident[half:]):.0f} "
          f"in the second")  # fmt: skip
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(done, resident)
    axes.set(xlabel="12 MP photos done", ylabel="resident memory, MiB", ylim=0)
    axes.set_title(f"{default_workers()} decoding threads, tokens of real size, shards of 100")
    figure.savefig(sys.argv[1], dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
