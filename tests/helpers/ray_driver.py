"""``monkey encode --ray`` as a driver whose processes are killed at given pictures.

    python -m tests.helpers.ray_driver ADDRESS PICTURES OUT CHECKPOINT FLAGS

A model's process dies when it meets one of ACTOR_DIES for the first time, and kills the driver when
it meets DRIVER_DIES for the first time. FLAGS is a folder that remembers what has happened.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

from monkey_model.serving import encode_on_ray
from monkey_model.serving.encode_files import EncoderSource, Output
from tests.helpers.killed_encoder import list_of

ACTOR_DIES, DRIVER_DIES = ("p040.png", "p090.png"), "p150.png"


class MortalActor(encode_on_ray.EncodingActor):
    def __init__(self, source, device, store, flags: str, driver: int) -> None:
        super().__init__(source, device, store)
        self.flags, self.driver = Path(flags), driver

    def __call__(self, table):
        for id in table["id"].to_pylist():
            flag = self.flags / id
            if id in (*ACTOR_DIES, DRIVER_DIES) and not flag.exists():
                flag.touch()
                os.kill(os.getpid() if id in ACTOR_DIES else self.driver, signal.SIGKILL)
        return super().__call__(table)


def main() -> None:
    address, folder, out, checkpoint, flags = sys.argv[1:]
    run = encode_on_ray.run_on_ray

    def run_mortal(ray, items, prepare, model, arguments, write, **options):
        run(ray, items, prepare, MortalActor, (*arguments, flags, os.getpid()), write, **options)

    encode_on_ray.run_on_ray = run_mortal
    outcome = encode_on_ray.encode_on_ray(
        EncoderSource(Path(checkpoint), torch.float32),
        list_of(Path(folder)),
        Output(Path(out), shard_size=1, shard_format="parquet", resume=True),
        address=address,
        device=torch.device("cpu"),
        models=2,
        reading={},
    )
    print(outcome.pictures, len(outcome.failed))


if __name__ == "__main__":
    main()
