"""Visual tokens on disk: numbers, shards, what is done, and what a killed run leaves."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from monkey_model.inputs.picture_lists import Picture
from monkey_model.serving.encode_files import Output, PictureEncoder, encode_files, plan_parts
from monkey_model.serving.token_files import (
    STORES,
    is_whole,
    pack,
    read_tokens,
    unpack,
)
from tests.helpers.killed_encoder import BAD, PICTURES, list_of, write_pictures
from tests.helpers.tiny import tiny_encoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of tests.helpers.killed_encoder."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def expected(folder):
    """The tokens of each picture, one by one."""
    encoder = tiny_encoder()
    with torch.inference_mode():
        return {
            picture.id: None if picture.id in BAD else encoder.encode_images([picture.source])[0]
            for picture in list_of(folder)
        }


def encode(folder: Path, out: Path, pictures=None, encoder=None, **output):
    output = Output(out, **output)
    pictures = list_of(folder) if pictures is None else pictures
    parts = plan_parts(pictures, output)
    events = []
    outcome = encode_files(
        PictureEncoder(encoder or tiny_encoder()),
        parts,
        output,
        origin="a test",
        batch_size=3,
        on_written=events.append,
    )
    return outcome, events


def check(out: Path, expected, store=None) -> None:
    """Every id once, with its tokens or its error."""
    rows = list(read_tokens(out))
    assert sorted(id for id, _, _ in rows) == sorted(expected)
    for id, tokens, error in rows:
        if id in BAD:
            assert tokens is None and "not a readable image" in error
        else:
            assert error is None
            assert torch.equal(tokens, unpack(pack(expected[id], store)))


# ---- numbers ------------------------------------------------------------------------------------


def test_what_is_stored_is_near_the_tokens():
    tokens = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 5
    tokens[3] = 0
    largest = tokens.abs().amax(1, keepdim=True)
    for store, step in (("bf16", 2**-8), ("fp16", 2**-11), ("fp8", 2**-4)):
        error = (unpack(pack(tokens, store)).float() - tokens).abs()
        # Half a unit of the last place, or, below the smallest normal number, of a fixed step.
        assert (error <= tokens.abs() * step + largest * 2**-15).all(), store
    error = (unpack(pack(tokens, "int8")) - tokens).abs()
    assert (error <= largest / 254 * 1.0001).all()
    assert torch.equal(pack(tokens, "pooled")["tokens"], tokens.mean(0))
    assert pack(tokens, None)["tokens"] is tokens
    bytes_of = {
        store: sum(value.nbytes for value in pack(tokens, store).values()) for store in STORES
    }
    assert bytes_of == {"bf16": 16384, "fp16": 16384, "fp8": 8448, "int8": 8448, "pooled": 512}


# ---- shards -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "shard_format"),
    [
        *((store, "safetensors") for store in (None, *STORES)),
        (None, "parquet"),
        ("int8", "parquet"),
    ],
)
def test_shards_hold_every_picture_and_every_error(folder, expected, tmp_path, store, shard_format):
    outcome, events = encode(folder, tmp_path, shard_size=5, store=store, shard_format=shard_format)
    assert (outcome.pictures, sorted(outcome.failed)) == (PICTURES, sorted(BAD))
    check(tmp_path, expected, store)
    shards = sorted(path.name for path in tmp_path.glob("tokens-*"))
    assert shards == [f"tokens-{n:05d}.{shard_format}" for n in range(3)]
    assert [event.split(" ")[0] for event in events] == ["5", "5", "2"]


def test_a_shard_is_plain_safetensors(folder, tmp_path):
    """As someone reads it who has this project's documentation, and not its code."""
    encode(folder, tmp_path, shard_size=PICTURES, store="int8")
    with safe_open(tmp_path / "tokens-00000.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["settings"])
        rows = json.loads(bytes(file.get_tensor("rows").tolist()))
        tokens, scale = file.get_tensor("tokens"), file.get_tensor("scale")
    assert settings["store"] == "int8" and settings["checkpoint"] == "a test"
    assert tokens.shape == (PICTURES - len(BAD), 20, 128) and tokens.dtype == torch.int8
    assert scale.shape == (PICTURES - len(BAD), 20, 1)
    assert [row["id"] for row in rows] == [picture.id for picture in list_of(folder)]
    assert [row["index"] for row in rows if row["id"] in BAD] == [None] * len(BAD)
    good = [row for row in rows if row["id"] not in BAD]
    assert [row["index"] for row in good] == list(range(len(good)))
    assert good[0]["decoded_size"] == "30x40"


def test_a_shard_of_bad_pictures_alone(tmp_path):
    pictures = [Picture(name, str(tmp_path / name), name) for name in ("a", "b")]
    for shard_format in ("safetensors", "parquet"):
        out = tmp_path / shard_format
        outcome, _ = encode(tmp_path, out, pictures, shard_size=2, shard_format=shard_format)
        assert outcome.failed == ["a", "b"]
        assert [(id, tokens) for id, tokens, _ in read_tokens(out)] == [("a", None), ("b", None)]


def test_shares_together_are_the_whole(folder, expected, tmp_path):
    """Shards byte for byte; the metadata of other files are in no order."""
    for name, options in (("files", {}), ("shards", {"shard_size": 4})):
        one, three = tmp_path / f"{name}-1", tmp_path / f"{name}-3"
        encode(folder, one, **options)
        for i in (2, 0, 1):
            encode(folder, three, share=(i, 3), **options)
        check(three, expected)
    shards = {path.name: path.read_bytes() for path in one.glob("tokens-*")}
    assert len(shards) == 3
    assert shards == {path.name: path.read_bytes() for path in three.glob("tokens-*")}


# ---- what is done -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"shard_size": 4}, {"shard_size": 4, "shard_format": "parquet"}]
)
def test_resuming_does_what_is_missing_or_torn(folder, expected, tmp_path, options):
    encode(folder, tmp_path, **options)
    outcome, events = encode(folder, tmp_path, resume=True, **options)
    assert not events and (outcome.failed, outcome.failed_before) == ([], len(BAD))
    files = sorted(
        path for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".parquet")
    )
    files[0].unlink()
    with open(files[1], "r+b") as file:
        file.truncate(files[1].stat().st_size // 2)
    lines = (tmp_path / "manifest.jsonl").read_bytes()
    (tmp_path / "manifest.jsonl").write_bytes(lines[:-5])  # as a full disk cuts it off
    outcome, events = encode(folder, tmp_path, resume=True, **options)
    assert len(events) in (2, 3)
    check(tmp_path, expected)
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()[1:]
    assert sorted(json.loads(line)["id"] for line in lines) == sorted(expected)


def test_another_number_of_processes_may_go_on(folder, expected, tmp_path):
    encode(folder, tmp_path, shard_size=4, share=(0, 2))
    _, events = encode(folder, tmp_path, shard_size=4, resume=True)
    assert len(events) == 1  # the other share's
    check(tmp_path, expected)


def test_more_pictures_may_be_added_at_the_end(folder, expected, tmp_path):
    pictures = list_of(folder)
    encode(folder, tmp_path, pictures[:6], shard_size=4)
    _, events = encode(folder, tmp_path, shard_size=4, resume=True)
    assert len(events) == 2  # the first of three is whole
    check(tmp_path, expected)


def test_results_that_are_not_gone_on_with(folder, tmp_path):
    pictures = list_of(folder)
    encode(folder, tmp_path, shard_size=5)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"holds results already .* --resume"):
        encode(folder, tmp_path, shard_size=5)
    with pytest.raises(ValueError, match="holds other pictures than this run would put there"):
        encode(folder, tmp_path, pictures[::-1], shard_size=5, resume=True)
    for message, options in (
        ("store 'as computed', not 'int8'", {"shard_size": 5, "store": "int8"}),
        ("shard_size 5, not 6", {"shard_size": 6}),
        ("weights '[0-9a-f]{16}', not", {"shard_size": 5, "encoder": tiny_encoder(seed=1)}),
        ("fit 'stretch', not 'pad'", {"shard_size": 5, "encoder": tiny_encoder(fit="pad")}),
    ):
        with pytest.raises(ValueError, match=f"is of other settings: {message}"):
            encode(folder, tmp_path, resume=True, **options)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_files_of_several_runs_may_share_a_folder(folder, expected, tmp_path):
    """Of the same settings: as a loop over pictures leaves them."""
    pictures = list_of(folder)
    encode(folder, tmp_path, pictures[:6])
    encode(folder, tmp_path, pictures[4:])
    check(tmp_path, expected)
    with pytest.raises(ValueError, match="is of other settings"):
        encode(folder, tmp_path, store="bf16")


def test_a_list_of_something_else_stays_as_it_is(folder, tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"name": "a web app"}\n')
    with pytest.raises(ValueError, match="line 1 is not of a list of what is done"):
        encode(folder, tmp_path)
    assert (tmp_path / "manifest.jsonl").read_text() == '{"name": "a web app"}\n'


@pytest.mark.parametrize(
    ("output", "names", "message"),
    [
        ({"share": (3, 3)}, ["a"], "--shard must be I/N with I from 0 to N - 1; got 3/3"),
        ({"shard_size": 0}, ["a"], "shard_size must be"),
        ({"store": "int4"}, ["a"], "store must be one of bf16, fp16, fp8, int8, pooled"),
        ({}, ["../a"], "must have a name inside --out; got '../a'"),
        ({}, ["/a"], "must have a name inside --out; got '/a'"),
        ({}, ["x", "x"], "would be written over the tokens of"),
        (
            {"shard_size": 2, "shard_format": "parquet"},
            ["\udce9"],
            "the id of a picture in Parquet",
        ),
    ],
)
def test_outputs_that_are_refused_before_any_work(tmp_path, output, names, message):
    pictures = [Picture(f"{name}{n}", "x.png", name) for n, name in enumerate(names)]
    with pytest.raises(ValueError, match=message):
        plan_parts(pictures, Output(tmp_path / "out", **output))
    assert not (tmp_path / "out").exists()


def test_what_is_not_whole(tmp_path):
    for name in ("a.safetensors", "a.parquet"):
        assert not is_whole(tmp_path / name)
        (tmp_path / name).write_bytes(b"PAR1")
        assert not is_whole(tmp_path / name)
    with pytest.raises(ValueError, match="must hold what monkey encode wrote"):
        list(read_tokens(tmp_path / "a.safetensors"))
    with pytest.raises(ValueError, match="must hold what monkey encode wrote"):
        list(read_tokens(tmp_path))


# ---- a killed run -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("shard_format", "moments"), [("safetensors", 20), ("parquet", 6)])
def test_a_run_may_be_killed_at_any_moment(folder, expected, tmp_path, shard_format, moments):
    """See tests.helpers.killed_encoder: each run is killed at one; another goes on to the end."""
    helper = [sys.executable, "-m", "tests.helpers.killed_encoder"]
    arguments = [folder, tmp_path, shard_format, str(moments)]
    done = subprocess.run([*helper, *arguments], capture_output=True, text=True, check=True)
    runs = json.loads(done.stdout)
    assert len(runs) == moments
    for run in runs:
        assert run["torn"] == [], run
        check(Path(run["out"]), expected)
        left = [path.name for path in Path(run["out"]).iterdir() if path.name.startswith(".")]
        assert left == [], run
    assert {run["whole_when_killed"] for run in runs} >= {0, 1, 2}


@pytest.mark.parametrize("shard_format", ["safetensors", "parquet"])
def test_a_full_disk_leaves_whole_files(folder, expected, tmp_path, shard_format):
    """The second shard finds no room; with room again, the run goes on."""
    options = {"shard_size": 5, "shard_format": shard_format}
    room = 4 * expected["p00.png"].nbytes + 5_000  # the first holds four pictures and an error
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        with pytest.raises(OSError, match=r"tokens-00001\.\w+ cannot be written: .*File too large"):
            encode(folder, tmp_path, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["manifest.jsonl", f"tokens-00000.{shard_format}"]
    assert is_whole(tmp_path / names[1])
    encode(folder, tmp_path, resume=True, **options)
    check(tmp_path, expected)
