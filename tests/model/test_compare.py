"""``monkey compare``: tokens by crop and position, answers that changed, scores side by side."""

from __future__ import annotations

import json
import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from monkey_model import load_visual
from monkey_model.commands.__main__ import app
from monkey_model.evaluation.compare import token_distances
from monkey_model.serving.answer import Answerer, Question
from monkey_model.training.peft_model import MonkeyPeftModel
from monkey_model.training.peft_presets import lora_config
from tests.helpers.checkpoint import COLOURS, write_checkpoint, write_data
from tests.helpers.tiny import CROPS, QUERIES
from tests.model.test_evaluate import lines, page_data, write_lines


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("compare") / "checkpoint")


@pytest.fixture(scope="module")
def other(checkpoint, tmp_path_factory):
    """The same, with other adapters of crop 1 in the ViT, and another last layer."""
    folder = write_checkpoint(tmp_path_factory.mktemp("compare") / "other")
    (file,) = checkpoint.glob("*.safetensors")
    state = load_file(file)
    generator = torch.Generator().manual_seed(0)
    for name, value in state.items():
        if "_lora.1." in name or name == "lm_head.weight":
            state[name] = torch.randn(value.shape, generator=generator).to(value)
    assert any("_lora.1." in name for name in state)
    save_file(state, folder / file.name, {"format": "pt"})
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_data(tmp_path)
    Image.linear_gradient("L").resize((70, 40)).convert("RGB").save(tmp_path / "ramp.png")
    questions = [
        {"image": f"{colour}.png", "question": "Colour?", "answer": colour, "question_id": colour}
        for colour in COLOURS
    ]
    write_lines(tmp_path / "data.jsonl", questions)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def run(*arguments, code=0):
    done = CliRunner().invoke(app, ["compare", *(str(argument) for argument in arguments)])
    assert done.exit_code == code, done.output
    return done


def result(folder):
    return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))


def test_distances_by_hand():
    a = torch.zeros(CROPS, QUERIES, 4)
    a[..., 0] = 2
    b = a.clone()
    b[1, 2, 1] = 2  # 45 degrees, |a - b| = |a|
    b[4] *= 1.5  # no angle, half of |a|
    found = token_distances(["x"], [a], [b], (2, 2), [0, 1, 2, 3, None])
    expected = torch.zeros(CROPS, QUERIES)
    expected[1, 2], expected[4] = 1, 0.5
    torch.testing.assert_close(found.relative_l2[0].float(), expected)
    expected[1, 2], expected[4] = 1 - 0.5**0.5, 0
    torch.testing.assert_close(found.cosine[0].float(), expected)
    summary = found.summary()
    assert [one["relative_l2"] for one in summary["by_crop"]] == [0, 0.5, 0, 0, 0.5]
    assert summary["relative_l2"] == pytest.approx((2 / 20) ** 0.5)
    assert summary["by_picture"][0]["farthest"] == {"crop": 1, "query": 2, "relative_l2": 1}
    assert summary["by_crop"][4]["crop"] == "crop 4 (global): no adapter"
    with pytest.raises(ValueError, match=r"x has tokens \[5, 4, 4\] and \[5, 4, 3\]"):
        token_distances(["x"], [a], [b[..., :3]], (2, 2), [0, 1, 2, 3, None])


def test_two_settings_of_an_encoder(checkpoint, folder):
    done = run(checkpoint, checkpoint, "ramp.png", "red.png", "--b", "interpolation=bilinear",
               "--device", "cpu", "--out", "out")  # fmt: skip
    found = result(folder / "out")
    with torch.inference_mode():
        one, other = (
            load_visual(checkpoint, interpolation=how).encode_images(["ramp.png"])[0]
            for how in ("bicubic", "bilinear")
        )
    ramp, red = found["tokens"]["by_picture"]
    assert ramp["relative_l2"] == pytest.approx(float((one - other).norm() / one.norm()), rel=1e-4)
    assert red["relative_l2"] < 1e-6 < ramp["relative_l2"]  # a picture of one colour
    assert found["b"]["interpolation"] == "bilinear" and "interpolation" not in found["a"]
    assert found["answers"] is None and "│ crop 4 (global)" in done.stdout
    page = page_data(folder / "out" / "comparison.html")
    assert page["tokens"]["side"] ** 2 == QUERIES and len(page["tokens"]["each"]) == 2
    assert page["tokens"]["each"][0]["src"].startswith("data:image/jpeg")


def test_two_models(checkpoint, other, folder):
    done = run(checkpoint, other, "--data", "data.jsonl", "--metric", "containment", "--device",
               "cpu", "--max-new-tokens", 6, "--out", "out")  # fmt: skip
    found = result(folder / "out")
    by_crop = [crop["relative_l2"] for crop in found["tokens"]["by_crop"]]
    assert by_crop[1] > 0.01 and by_crop[0] == by_crop[2] == by_crop[3] == by_crop[4] == 0

    answers = []
    for directory in (checkpoint, other):
        answerer = Answerer.from_pretrained(directory, max_new_tokens=6, template="{} Answer: ")
        answers.append(
            {c: answerer.answer([Question("Colour?", (f"{c}.png",))])[0] for c in COLOURS}
        )
    changed = {one["id"]: (one["a"], one["b"]) for one in found["answers"]["changed"]}
    assert changed == {
        c: (answers[0][c], answers[1][c]) for c in COLOURS if answers[0][c] != answers[1][c]
    }
    assert changed and f"{len(changed)} of {len(COLOURS)} answers changed" in done.stdout
    scores = found["answers"]["scores"]["containment"]
    assert scores["difference"] == scores["b"] - scores["a"]
    assert len(lines(folder / "out" / "b" / "answers.jsonl")) == len(COLOURS)


def test_before_and_after_fine_tuning_with_adapters(checkpoint, folder):
    """An adapter of peft's: the encoder is that of the merged model."""
    base = Answerer.from_pretrained(checkpoint)
    model = MonkeyPeftModel(base.model, lora_config(base.model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_pool.modules_to_save" in name and name.endswith("weight"):
                parameter.normal_(std=0.3)
    model.save_pretrained(folder / "adapter")
    base.processor.save_pretrained(folder / "adapter")
    run(checkpoint, "adapter", "ramp.png", "--device", "cpu", "--out", "out")
    merged = Answerer.from_pretrained(folder / "adapter").model.transformer.visual
    with torch.inference_mode():
        one, other = (
            encoder.encode_images(["ramp.png"])[0] for encoder in (load_visual(checkpoint), merged)
        )
    expected = float((one - other).norm() / one.norm())
    found = result(folder / "out")["tokens"]["relative_l2"]
    assert found == pytest.approx(expected, rel=1e-4) and found > 0


def test_quantisation(checkpoint, folder):
    """Of the blocks' weights; the rest of the encoder is not quantised."""
    run(checkpoint, checkpoint, "ramp.png", "--b", "quantization=8bit", "--device", "cpu",
        "--out", "out")  # fmt: skip
    found = result(folder / "out")
    assert found["b"]["quantization"] == "8bit"
    assert 1e-4 < found["tokens"]["relative_l2"] < 0.1


@pytest.fixture
def evaluations(folder):
    """Two folders of monkey evaluate."""
    for name, answers in (
        ("one", ["red", "gren", "x", "white"]),
        ("two", ["red", "green", "", ""]),
    ):
        content = [{"question_id": c, "answer": a} for c, a in zip(COLOURS, answers, strict=True)]
        (folder / "predictions.json").write_text(json.dumps(content))
        done = CliRunner().invoke(
            app,
            ["evaluate", "--data", "data.jsonl", "--metric", "anls", "--metric", "exact",
             "--predictions", "predictions.json", "--out", name],
        )  # fmt: skip
        assert done.exit_code == 0, done.output
    return folder


def test_two_evaluations(evaluations):
    done = run("one", "two", "--out", "out")
    found = result(evaluations / "out")
    assert found["tokens"] is None
    assert found["answers"]["scores"]["anls"] == {
        "a": pytest.approx((1 + 0.8 + 0 + 1) / 4),
        "b": pytest.approx((1 + 1 + 0 + 0) / 4),
        "difference": pytest.approx(-0.2),
        "standard_error": pytest.approx((0.88 / 3 / 4) ** 0.5),
        "better": 1,
        "worse": 1,
    }
    assert [one["id"] for one in found["answers"]["changed"]] == ["white", "blue", "green"]
    assert "3 of 4 answers changed" in done.stdout
    page = page_data(evaluations / "out" / "comparison.html")
    assert page["answers"]["count"] == 3 and page["tokens"] is None


def test_evaluations_of_other_questions(evaluations):
    path = evaluations / "two" / "records.jsonl"
    before = path.read_text()
    path.write_text(before.replace('"question": "Colour?"', '"question": "What?"', 1))
    assert "'red' asks 'Colour?' and 'What?'" in run("one", "two", "--out", "out", code=2).stderr
    path.write_text("".join(before.splitlines(keepends=True)[1:]))
    assert "only one of them has 'red'" in run("one", "two", "--out", "out", code=2).stderr
    path.write_text('{"id": 1}\n')
    assert "line 1 must be a record of monkey evaluate" in (
        run("one", "two", "--out", "out", code=2).stderr
    )
    assert not (evaluations / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ramp.png",), "A and B must differ, in a checkpoint or in a setting (--a, --b)"),
        (("ramp.png", "--b", "fit"), "--b must be NAME=VALUE, NAME one of interpolation, fit, dty"),
        (("ramp.png", "--a", "grid=2"), "--a must be NAME=VALUE, NAME one of interpolation, fit"),
        (("ramp.png", "--a", "dtype=int8"), "--a dtype must be one of float32, float16, bfloat16"),
        (("ramp.png", "--b", "fit=zoom"), "B: fit must be one of "),
        (("ramp.png", "--b", "quantization=2bit"), "B: quantization must be "),
        (("--b", "fit=pad"), "give PICTURES, or --data with some"),
        (("gone.png", "--b", "fit=pad"), "gone.png"),
        (("ramp.png", "--b", "fit=pad", "--metric", "anls"), "--metric needs --data"),
        (
            ("--data", "data.jsonl", "--metric", "vqa_accuracy", "--b", "fit=pad"),
            "metric vqa_accuracy does not fit the data: id 'red': ",
        ),
    ],
)
def test_bad_arguments(arguments, message, checkpoint, folder):
    done = run(checkpoint, checkpoint, *arguments, "--out", "out", "--device", "cpu", code=2)
    assert message in done.stderr.replace("\n", " ")
    assert not (folder / "out" / "comparison.html").exists()


def test_both_are_looked_for_first(checkpoint, folder):
    done = run(checkpoint, "nowhere", "red.png", "--out", "out", code=2)
    assert "Error: B must be a directory; got nowhere" in done.stderr and "Encod" not in done.stderr


def test_the_page_is_written_whole_or_not_at_all(evaluations, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("comparison.html"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    done = run("one", "two", "--out", "out", code=2)
    assert "comparison.html cannot be written: [Errno 28]" in done.stderr
    assert list((evaluations / "out").iterdir()) == []
