"""The programs in ``examples/``, each run as its docstring says, on a tiny checkpoint."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.tiny import SPAN, tiny_config

EXAMPLES = Path(__file__).parents[1] / "examples"
RAN = {"encode_folder.py", "drop_in.py", "finetune_ten_pictures.py"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("examples") / "checkpoint")


@pytest.fixture
def example(checkpoint, monkeypatch, capsys):
    """Runs an example with arguments, and returns what it printed."""

    def run(name, *arguments):
        command = [name, *map(str, arguments), "--checkpoint", str(checkpoint)]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == RAN


def test_encode_folder(example, tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.new("RGB", (60, 40 + number), "green").save(tmp_path / "pictures" / f"{number}.png")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    example("encode_folder.py", tmp_path / "pictures", tmp_path / "out", "--batch-size", 2)
    shapes = {p.name: load_file(p)["tokens"].shape for p in (tmp_path / "out").iterdir()}
    assert shapes == {
        f"{number}.png.safetensors": (SPAN, tiny_config().hidden_size) for number in range(3)
    }


def test_drop_in(example, tmp_path):
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "a.png")
    printed = example("drop_in.py", tmp_path / "a.png")
    assert printed.startswith(f"[1, {SPAN}, {tiny_config().hidden_size}]")
    assert float(printed.rsplit(" ", 1)[1]) < 1e-5


def test_finetune_ten_pictures(example, tmp_path):
    printed = example("finetune_ten_pictures.py", tmp_path / "out", "--steps", 2)
    assert "LLM LoRA" in printed
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 10
    assert {path.name for path in (tmp_path / "out" / "run").iterdir()} >= {"model", "loss.png"}
