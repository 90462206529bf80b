"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from monkey_model.checkpoint import PREFIX
from monkey_model.commands.__main__ import app
from monkey_model.serving.token_files import read_tokens
from tests.helpers.checkpoint import write_data
from tests.helpers.golden import load_golden
from tests.helpers.numerics import relative_l2
from tests.helpers.tiny import VISUAL, tiny_encoder

SAMPLE = str(files("monkey_model") / "samples" / "harbour.jpg")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``monkey ARGUMENTS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, result.output
        return result.output

    return run


@pytest.fixture
def checkpoint(tmp_path):
    golden = load_golden()
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"visual": golden.config}))
    state = {PREFIX + name: tensor for name, tensor in golden.state.items()}
    save_file(state, directory / "model.safetensors")
    return directory


def read(path):
    with safe_open(path, "pt") as file:
        return file.get_tensor("tokens"), file.metadata()


def picture(path, colour="red"):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (40, 30), colour).save(path)
    return path


def test_sample_without_a_checkpoint(run, tmp_path):
    output = run("encode", SAMPLE, "--preview", "crops.png")
    assert "1280 x 512 visual tokens -> tokens.safetensors" in output
    assert "These tokens carry no meaning" in output
    assert "harbour.jpg -> crops.png" in output
    tokens, metadata = read("tokens.safetensors")
    assert tokens.shape == (1280, 512) and torch.isfinite(tokens).all()
    assert metadata["decoded_size"] == "960x1280"
    assert metadata["checkpoint"] == "none: random weights"
    with Image.open("crops.png") as preview:
        assert preview.size == (3 * 464 + 32, 2 * 500 + 16)
        # Where a tile is pasted, the picture's own pixels show.
        with Image.open(SAMPLE) as sample:
            expected = sample.resize((896, 896), Image.Resampling.BILINEAR).getpixel((100, 100))
        shown = preview.getpixel((16 + 100, 16 + 36 + 100))
        assert max(abs(a - b) for a, b in zip(shown, expected, strict=True)) <= 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crops.png", "tokens.safetensors"]
    # The seeded stand-in is the same every time.
    run("encode", SAMPLE, "--out", "again.safetensors")
    assert torch.equal(read("again.safetensors")[0], tokens)


def test_checkpoint_tokens_are_the_encoders(run, checkpoint):
    golden = load_golden()
    output = run("encode", *golden.images, "--checkpoint", checkpoint, "--out", "made/tokens")
    assert "no meaning" not in output
    for row, name in enumerate(("A_image0.jpg", "A_image1.png")):
        tokens, metadata = read(f"made/tokens/{name}.safetensors")
        assert relative_l2(tokens[::2], golden.tokens_every_2nd[row]) <= 2e-5
        assert metadata["interpolation"] == "bicubic" and metadata["grid"] == "2x2"


def test_options(run, tmp_path):
    path = picture(tmp_path / "a.png")
    run("encode", path, "--grid", "1x3", "--fit", "pad", "--interpolation", "bicubic",
        "--dtype", "bfloat16", "--device", "cpu", "--out", "x.safetensors")  # fmt: skip
    tokens, metadata = read("x.safetensors")
    assert tokens.shape == (4 * 256, 512) and tokens.dtype == torch.bfloat16
    assert (metadata["grid"], metadata["fit"]) == ("1x3", "pad")
    assert metadata["interpolation"] == "bicubic"


def test_fast_decode(run, tmp_path):
    Image.effect_noise((2000, 2400), 90).resize((4000, 4800)).save(tmp_path / "large.jpg")
    run("encode", "large.jpg", "--out", "exact.safetensors")
    run("encode", "large.jpg", "--fast-decode", "--out", "fast.safetensors")
    exact, fast = read("exact.safetensors"), read("fast.safetensors")
    assert (exact[1]["decoded_size"], fast[1]["decoded_size"]) == ("4800x4000", "1200x1000")
    assert (exact[1]["fast_decode"], fast[1]["fast_decode"]) == ("false", "true")
    assert 0 < relative_l2(fast[0], exact[0]) < 0.2


def test_one_bad_image_among_many(run, tmp_path):
    good = [picture(tmp_path / f"{name}.png", name) for name in ("red", "green", "blue")]
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no picture")
    missing = tmp_path / "missing.jpg"
    images = [good[0], bad, good[1], missing, good[2]]
    output = run("encode", *images, "--batch-size", "2", code=1)
    assert "bad.jpg' is not a readable image" in output
    assert "missing.jpg" in output and "2 of 5 images were not encoded" in output
    names = sorted(path.name for path in (tmp_path / "tokens").glob("*.safetensors"))
    assert names == ["blue.png.safetensors", "green.png.safetensors", "red.png.safetensors"]
    # Batching changes nothing.
    run("encode", good[2], "--out", "alone.safetensors")
    together, alone = read("tokens/blue.png.safetensors")[0], read("alone.safetensors")[0]
    torch.testing.assert_close(together, alone)


def test_nothing_is_half_written(run, tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise KeyboardInterrupt

    path = picture(tmp_path / "a.png")
    (tmp_path / "tokens.safetensors").write_bytes(b"an earlier run")
    monkeypatch.setattr("monkey_model.serving.token_files.save_file", interrupted)
    run("encode", path, code=130)
    assert (tmp_path / "tokens.safetensors").read_bytes() == b"an earlier run"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "tokens.safetensors"]


def test_shards_of_a_folder_are_resumed(run, tmp_path, checkpoint):
    for name in ("red", "green", "blue"):
        picture(tmp_path / "in" / f"{name}.png", name)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    command = ["encode", "-r", "in", "--checkpoint", checkpoint, "--shard-size", "3",
               "--store", "int8"]  # fmt: skip
    output = run(*command, code=1)
    assert "3 pictures -> tokens/tokens-00000.safetensors" in output
    assert "1 of 4 images were not encoded: in/bad.jpg" in output
    rows = {id: (tokens, error) for id, tokens, error in read_tokens("tokens")}
    assert sorted(rows) == [
        f"in/{name}" for name in ("bad.jpg", "blue.png", "green.png", "red.png")
    ]
    assert "not a readable image" in rows["in/bad.jpg"][1]
    assert "go on with them by --resume" in run(*command, code=2)
    output = run(*command, "--resume", code=1)
    assert "pictures ->" not in output
    assert "1 of 4 images were not encoded: 1 in earlier runs" in output
    output = run(*command[:-1], "bf16", "--resume", code=2)
    assert "store 'int8', not 'bf16'" in output


def test_a_manifest_is_encoded_in_shares(run, tmp_path, checkpoint):
    for name in ("red", "green", "blue"):
        picture(tmp_path / "in" / f"{name}.png", name)
    lines = [{"file": f"{name}.png", "key": name} for name in ("red", "green", "blue")]
    (tmp_path / "in" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = ["encode", "--manifest", "in/list.jsonl", "--checkpoint", checkpoint]
    assert "line 1 must have 'image'" in run(*command, code=2)
    command += ["--column", "file", "--id-column", "key"]
    run(*command, "--shard", "0/2")
    run(*command, "--shard", "1/2")
    assert sorted(id for id, _, _ in read_tokens("tokens")) == ["blue", "green", "red"]
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == ["blue.safetensors", "green.safetensors", "manifest-0-of-2.jsonl",
                     "manifest-1-of-2.jsonl", "red.safetensors"]  # fmt: skip
    for wrong in ("2/2", "1", "x/2"):
        assert "--shard must be I/N" in run(*command, "--shard", wrong, code=2)
    assert "give IMAGE... or --manifest" in run(*command, "in/red.png", code=2)
    assert "give IMAGE... or --manifest" in run("encode", code=2)


def test_usage_errors(run, tmp_path, checkpoint):
    a = picture(tmp_path / "a.png")
    (tmp_path / "b").mkdir()
    b = picture(tmp_path / "b" / "a.png")
    assert "would be written over the tokens of" in run("encode", a, b, code=2)
    assert "or a folder" in run("encode", a, b, "--out", "x.safetensors", code=2)
    assert "or a folder" in run("encode", a, "--out", "x.pt", code=2)
    assert "--preview must be a .png file" in run("encode", a, "--preview", "x.jpg", code=2)
    assert "ROWSxCOLUMNS" in run("encode", a, "--grid", "", code=2)
    assert "ROWSxCOLUMNS" in run("encode", a, "--grid", "2", code=2)
    assert "ROWSxCOLUMNS" in run("encode", a, "--grid", "0x2", code=2)
    assert "must be a directory; got nowhere" in run("encode", a, "--checkpoint", "nowhere", code=2)
    assert "allow_urls is False" in run("encode", "https://example.com/a.png", code=1)
    many = run("encode", a, "--checkpoint", checkpoint, "--grid", "3x3", code=2)
    assert "9 local crops but there are 4 adapters" in many
    for device in ("nonsense", "meta", "cuda:99"):
        output = run("encode", a, "--device", device, code=2)
        assert f"--device {device} cannot be used" in output
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_input_is_written_over(run, tmp_path):
    a = picture(tmp_path / "a.png")
    before = a.read_bytes()
    output = run("encode", a, "--preview", tmp_path / "b" / ".." / "a.png", code=2)
    assert "the preview would be written over the image" in output
    assert a.read_bytes() == before


def test_nothing_is_written_into_the_checkpoint(run, checkpoint, tmp_path):
    a, weights = picture(tmp_path / "a.png"), checkpoint / "model.safetensors"
    before = weights.read_bytes()
    for out in (weights, tmp_path / "x" / ".." / "checkpoint" / "tokens"):
        output = run("encode", a, "--checkpoint", checkpoint, "--out", out, code=2)
        assert "would be written into the checkpoint" in output
    assert weights.read_bytes() == before and not (checkpoint / "tokens").exists()


def test_names_are_printed_without_what_a_terminal_obeys(run, tmp_path):
    a = picture(tmp_path / "a\x1b[31m.png")
    assert "a\\x1b[31m.png: 1280 x 512 visual tokens" in run("encode", a)
    output = run("encode", tmp_path / "b\x1b]0;x\x07.png", code=1)
    assert "\x1b]0" not in output and "b\\x1b]0;x\\x07.png" in output


def test_outputs_that_cannot_be_written(run, tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "b.png")
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    output = run("encode", a, b, "--out", "file", code=2)
    assert "the output cannot be written" in output
    output = run("encode", a, b, "--out", "file/tokens", code=2)
    assert "the output cannot be written" in output
    output = run("encode", a, "--out", "folder.safetensors", code=1)
    assert "a.png cannot be written" in output
    # A name that has no room for the ending: reported, and the others are encoded.
    long = picture(tmp_path / ("x" * 250 + ".png"))
    output = run("encode", long, a, code=1)
    assert "1 of 2 images were not encoded" in output
    names = sorted(path.name for path in (tmp_path / "tokens").iterdir())
    assert names == ["a.png.safetensors", "manifest.jsonl"]


def test_a_full_disk_is_one_line(run, tmp_path):
    a = picture(tmp_path / "a.png")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        output = run("encode", a, code=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    errors = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "tokens.safetensors cannot be written" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_names_are_no_markup(run, tmp_path):
    strange = ["[red]x[/red].png", "q[/x].png", ":smile:.png", os.fsdecode(b"caf\xe9.png")]
    images = [picture(tmp_path / name) for name in strange]
    output = run("encode", *images, "--preview", "[bold]p[/].png")
    for name in [*strange[:3], "caf\\xe9.png", "-> [bold]p[/].png"]:
        assert name in output
    assert len(list((tmp_path / "tokens").glob("*.safetensors"))) == 4
    assert (tmp_path / "[bold]p[" / "].png").exists()


def test_passwords_are_not_shown(run):
    output = run("encode", "https://alice:secret@127.0.0.1/a.png", "--allow-urls", code=1)
    assert "***@127.0.0.1" in output and "secret" not in output


def test_backend_from_the_environment(run, tmp_path, monkeypatch):
    a = picture(tmp_path / "a.png")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("MONKEY_KERNELS_BACKEND", "triton")
    if not torch.cuda.is_available():
        assert "'triton' was requested" in run("encode", a, "--device", "cpu", code=2)
    assert "MONKEY_KERNELS_BACKEND: triton" in run("doctor")
    monkeypatch.setenv("MONKEY_KERNELS_BACKEND", "quick")
    assert "must be one of auto, triton, torch" in run("encode", a, code=2)
    assert "must be one of auto, triton, torch" in run("doctor", code=2)


def test_pickle_checkpoint(run, tmp_path):
    encoder = tiny_encoder()
    directory = tmp_path / "pickled"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"visual": VISUAL}))
    state = {PREFIX + name: tensor for name, tensor in encoder.state_dict().items()}
    torch.save(state, directory / "pytorch_model.bin")
    a = picture(tmp_path / "a.png")
    assert "--allow-pickle" in run("encode", a, "--checkpoint", directory, code=2)
    run("encode", a, "--checkpoint", directory, "--allow-pickle")
    assert read("tokens.safetensors")[0].shape == (20, 128)


def test_doctor(run):
    output = run("doctor")
    assert f"{torch.__version__}" in output
    assert "extract_crops" in output and "resampler_attention" in output


def test_version(run):
    assert run("--version") == f"monkey-vision {version('monkey-vision')}\n"


def test_demo_checkpoint_is_for_every_command(run, tmp_path):
    """As the README tells a newcomer."""
    output = run("demo-checkpoint", "made/demo")
    assert "whose answers carry no meaning -> made/demo" in output
    names = {path.name for path in Path("made/demo").iterdir()}
    assert names >= {"config.json", "model.safetensors", "qwen.tiktoken", "tokenizer_config.json"}
    assert not [name for name in names if name.startswith(".")]
    run("encode", SAMPLE, "--checkpoint", "made/demo", "--device", "cpu")
    assert read("tokens.safetensors")[0].shape == (1280, 128)
    device = ("--device", "cpu", "--max-new-tokens", "2")
    assert run("ask", SAMPLE, "What?", "--checkpoint", "made/demo", *device).strip()
    write_data(tmp_path / "data", 2)
    run("finetune", "--checkpoint", "made/demo", "--data", "data/data.json", "--output-dir", "run",
        "--set", "training.use_cpu=true", "--set", "training.max_steps=1",
        "--set", "training.dataloader_num_workers=0")  # fmt: skip
    run("merge", "run/model", "--checkpoint", "made/demo", "--out", "merged")
    run("ask", SAMPLE, "What?", "--checkpoint", "run/model", *device)
    # The same every time, and nothing is written over.
    (tmp_path / "again").mkdir()
    run("demo-checkpoint", "again")
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("again", "made/demo")]
    assert weights[0] == weights[1]
    for taken in ("again", "again/config.json"):
        output = run("demo-checkpoint", taken, code=2)
        assert f"Error: DIRECTORY must not exist yet, or be empty; got {taken}\n" in output


def test_help_and_completion_are_quick():
    """Without torch: a blocked import would fail."""
    program = (
        "import sys; sys.modules['torch'] = None; sys.argv = ['monkey', 'encode', '--help']\n"
        "from monkey_model.commands.__main__ import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "--checkpoint" in done.stdout
    words = {"_MONKEY_COMPLETE": "complete_bash", "COMP_WORDS": "monkey demo", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program.replace("'encode', '--help'", "")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **words},
    )
    assert done.stdout.split() == ["demo", "demo-checkpoint"]
