"""Runs of ``encode_files`` with shards, killed by SIGKILL at moments that are counted, not timed.

    python -m tests.helpers.killed_encoder PICTURES OUT FORMAT MOMENTS

A moment is the n-th time that the writing thread is about to write bytes, or to open, rename or
remove a file. Each run is a fork of this process, which has imported everything and started no
thread. It prints JSON: for each run where it wrote, how many shards were whole when it was killed,
and which were not.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

import pyarrow.parquet  # noqa: F401 # once, before the forks
from PIL import Image

from monkey_model.inputs.picture_lists import Picture
from monkey_model.serving import token_files
from monkey_model.serving.encode_files import Output, PictureEncoder, encode_files, plan_parts
from monkey_model.serving.token_files import is_whole
from tests.helpers.tiny import tiny_encoder

PICTURES, SHARD = 12, 5
BAD = ("p03.png", "p11.png")


def write_pictures(folder: Path) -> Path:
    for number in range(PICTURES):
        name = f"p{number:02d}.png"
        if name in BAD:
            (folder / name).write_bytes(b"nothing")
        else:
            Image.new("RGB", (40, 30), (number * 20, 100, 250 - number * 20)).save(folder / name)
    return folder


def list_of(folder: Path) -> list[Picture]:
    return [Picture(path.name, str(path), path.name) for path in sorted(folder.glob("*.png"))]


class Moments:
    """Counts moments, and kills this process at one of them."""

    def __init__(self, last: int | None) -> None:
        self.count, self.last = 0, last

    def __call__(self, *_: object) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, out: Path) -> None:
        def audit(event: str, arguments: tuple) -> None:
            if event in ("open", "os.rename", "os.remove") and str(out) in str(arguments[0]):
                self()

        sys.addaudithook(audit)
        for name in ("bytes_of", "_json_line"):
            setattr(token_files, name, self._before(getattr(token_files, name)))

    def _before(self, function):
        def called(*arguments):
            self()
            return function(*arguments)

        return called


def run(folder: Path, out: Path, shard_format: str, last: int | None) -> int:
    """Exit status of a run in a fork, or minus the signal; its moments are in ``out``.count."""
    child = os.fork()
    if child == 0:
        try:
            moments = Moments(last)
            moments.watch(out)
            output = Output(out, shard_size=SHARD, shard_format=shard_format, resume=out.exists())
            parts = plan_parts(list_of(folder), output)
            encode_files(PictureEncoder(tiny_encoder()), parts, output, origin="a test")
            out.with_suffix(".count").write_text(str(moments.count))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    folder, base, shard_format = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    assert run(folder, base / "whole", shard_format, None) == 0
    moments = int((base / "whole.count").read_text())
    results = []
    for last in sorted(random.Random(0).sample(range(1, moments), int(sys.argv[4]))):
        out = base / f"killed-at-{last}"
        assert run(folder, out, shard_format, last) == -signal.SIGKILL
        shards = list(out.glob("tokens-*"))
        torn = [path.name for path in shards if not is_whole(path)]
        assert run(folder, out, shard_format, None) == 0
        results.append({"out": str(out), "last": last, "of": moments, "torn": torn,
                        "whole_when_killed": len(shards) - len(torn)})  # fmt: skip
    print(json.dumps(results))


if __name__ == "__main__":
    main()
