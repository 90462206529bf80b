"""Encoding on a Ray cluster."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from monkey_model.commands.__main__ import app
from monkey_model.serving import on_ray
from monkey_model.serving.encode_files import (
    EncoderSource,
    Output,
    PictureEncoder,
    encode_files,
    plan_parts,
)
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.killed_encoder import list_of
from tests.helpers.ray_driver import ACTOR_DIES, DRIVER_DIES

PICTURES = 300


def test_addresses_that_cannot_be_reached():
    with pytest.raises(ValueError, match="--ray must be local, auto, HOST:PORT or ray://HOST:PORT"):
        on_ray.connect("somewhere")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
        with pytest.raises(ValueError, match=f"no Ray cluster can be reached at --ray {address}"):
            on_ray.connect(address)


def test_errors_of_the_command_come_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 3)).save("a.png")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for options, message in (
        (["--ray", f"127.0.0.1:{port}"], "no Ray cluster can be reached at --ray 127.0.0.1:"),
        (["--ray", "auto", "--device", "cuda:1"], "--device must be cpu or cuda with --ray"),
        (["--ray", "auto", "--shard", "0/2"], "--shard, --preview and --workers do not go with"),
        (["--models", "2"], "--models needs --ray"),
    ):
        done = CliRunner().invoke(app, ["encode", "a.png", *options])
        assert done.exit_code == 2 and message in done.output, done.output
    assert not list(tmp_path.glob("tokens*/*"))


class Cluster:
    """What model_actors asks a cluster."""

    def __init__(self, **resources: float) -> None:
        self.cluster_resources = lambda: resources


@pytest.mark.parametrize(
    ("resources", "asked", "on_gpus", "count"),
    [
        ({"GPU": 8.0, "CPU": 64.0}, None, True, 8),
        ({"GPU": 8.0, "CPU": 64.0}, 3, True, 3),
        ({"CPU": 4.0}, None, False, 1),
        ({"CPU": 4.0}, 3, False, 3),
    ],
)
def test_models_are_as_many_as_gpus_or_as_asked(resources, asked, on_gpus, count):
    assert on_ray.model_actors(Cluster(**resources), asked, on_gpus) == count


@pytest.mark.parametrize(
    ("resources", "asked", "on_gpus", "message"),
    [
        ({"GPU": 4.0}, 8, True, "8 models need a GPU each; the Ray cluster has 4"),
        ({}, None, True, "1 models need a GPU each; the Ray cluster has 0"),
        ({"CPU": 2.0}, 2, False, "2 models need a CPU each; the Ray cluster has 1 beside 1 for"),
    ],
)
def test_more_models_than_the_cluster_has_room_for(resources, asked, on_gpus, message):
    with pytest.raises(ValueError, match=message):
        on_ray.model_actors(Cluster(**resources), asked, on_gpus)


def rows(folder: Path) -> dict[str, dict]:
    found = {}
    for path in folder.glob("*.parquet"):
        for row in pq.read_table(path).to_pylist():
            assert row["id"] not in found, f"{row['id']} twice"
            found[row["id"]] = row
    return found


@pytest.mark.slow
def test_killed_processes_lose_and_double_nothing(tmp_path):
    """A model's process dies twice, and the driver once; then the run is started again."""
    from ray.cluster_utils import Cluster

    folder, flags, out = (tmp_path / name for name in ("pictures", "flags", "out"))
    folder.mkdir()
    flags.mkdir()
    for number in range(PICTURES):
        path = folder / f"p{number:03d}.png"
        if number % 20 == 7:
            path.write_bytes(b"nothing")
        else:
            Image.new("RGB", (40, 30), (number % 256, 100, number // 2)).save(path)
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    cluster = Cluster()
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=3, include_dashboard=False)
        driver = [sys.executable, "-m", "tests.helpers.ray_driver", cluster.address]
        command = [*driver, folder, out, checkpoint, flags]
        killed = subprocess.run(command, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    finally:
        cluster.shutdown()
    assert {path.name for path in flags.iterdir()} == {*ACTOR_DIES, DRIVER_DIES}
    assert done.stdout.splitlines()[-1] == f"{PICTURES} {PICTURES // 20}", done.stdout

    # Byte for byte what one machine makes of them.
    output = Output(tmp_path / "one", shard_size=50, shard_format="parquet")
    parts = plan_parts(list_of(folder), output)
    source = EncoderSource(checkpoint, torch.float32)
    encoder = PictureEncoder(source.load(torch.device("cpu")))
    encode_files(encoder, parts, output, origin=source.origin)
    found, expected = rows(out), rows(tmp_path / "one")
    assert len(expected) == PICTURES
    assert found == expected
