"""Asking: one question, a file of them, resuming, and what cannot be answered."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import sys

import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from monkey_model.commands.__main__ import app
from monkey_model.commands.loading import Quantization
from monkey_model.serving.answer import Answerer, Question, answer_file, read_questions, unanswered
from monkey_model.serving.picture_cache import PictureCache
from monkey_model.training.config import QUANTIZATIONS
from monkey_model.training.peft_model import MonkeyPeftModel
from monkey_model.training.peft_presets import lora_config
from tests.helpers.checkpoint import COLOURS, write_checkpoint, write_data


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("ask") / "checkpoint")


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return Answerer.from_pretrained(checkpoint, max_new_tokens=8)


@pytest.fixture
def pictures(tmp_path):
    write_data(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, ["ask", *(str(argument) for argument in arguments)])
        assert done.exit_code == code, done.output
        return done

    return run


def write_lines(path, *records):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in records))
    return path


def answers(path):
    return {record["id"]: record["answer"] for record in map(json.loads, path.open())}


def test_a_backend_that_cannot_run_is_one_error(checkpoint, pictures, run, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("MONKEY_KERNELS_BACKEND", "triton")
    picture = pictures / "red.png"
    done = run(picture, "Colour?", "--checkpoint", checkpoint, "--device", "cpu", code=2)
    assert done.stderr.splitlines()[-1].startswith("Error: backend 'triton' was requested for")


def test_one_question_is_upstreams_prompt(answerer, checkpoint, pictures, run):
    """The path in the ids, opened by the model, and `` Answer: `` at the end, as upstream asks."""
    path = pictures / "red.png"
    path.rename(pictures / "r")  # the tiny span has room for few bytes
    tokenizer = answerer.processor.tokenizer
    answerer.model.transformer.image_root = pictures
    inputs = tokenizer("<img>r</img> What? Answer: ", return_tensors="pt")
    ids = answerer.model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=1, do_sample=False,
        eos_token_id=[tokenizer.eod_id, tokenizer.im_end_id], pad_token_id=tokenizer.eod_id,
    )  # fmt: skip
    expected = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert expected.strip()
    assert answerer.answer([Question("What?", (str(pictures / "r"),))]) == [expected.strip()]
    done = run(pictures / "r", "What?", "--checkpoint", checkpoint, "--max-new-tokens", "8",
               "--device", "cpu")  # fmt: skip
    assert done.stdout.strip() == expected.strip()


def test_special_tokens_in_a_question_are_text(answerer):
    tokenizer = answerer.processor.tokenizer
    question = Question("<img>x</img><|im_end|> <ref>it</ref>?", ("picture",))
    ids = tokenizer(answerer.prompt(question)).input_ids
    assert ids.count(tokenizer.img_start_id) == 1 and tokenizer.im_end_id not in ids
    assert tokenizer.ref_start_id in ids  # the words of grounding keep their meaning
    answerer = Answerer(answerer.model, answerer.processor, chat=True)
    ids = tokenizer(answerer.prompt(question)).input_ids
    assert ids.count(tokenizer.img_start_id) == 1
    assert ids.count(tokenizer.im_end_id) == 2  # of system and user
    assert ids.count(tokenizer.im_start_id) == 3


def test_a_batch_is_answered_as_one_by_one(answerer, pictures):
    images = [str(pictures / f"{colour}.png") for colour in COLOURS]
    questions = [
        Question("Colour?", (images[0],)),
        Question("And which of these two is the brighter one?", (images[1], images[2])),
        Question("Hello", ()),
        Question("x", (Image.open(images[3]),)),
    ]
    one_by_one = [answerer.answer([question])[0] for question in questions]
    assert answerer.answer(questions) == one_by_one and len(set(one_by_one)) > 1


def test_a_stream_ends_with_the_answer(answerer, pictures):
    """Text by text, and with the tags of boxes where they are asked for."""
    question = Question("Colour?", (str(pictures / "red.png"),))
    prompt, images = answerer.prompt(question), answerer.read_images(question)
    texts = list(answerer.stream(prompt, images))
    assert texts[-1] == answerer.answer([question])[0] and len(texts) > 2
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))

    tokenizer = answerer.processor.tokenizer
    script = [*tokenizer.encode("<ref>it</ref><box>(1,2),(3,4)</box>"), tokenizer.im_end_id]

    def scripted(module, args, logits):
        logits[:, -1] = 0
        logits[:, -1, written.pop(0)] = 9

    handle = answerer.model.lm_head.register_forward_hook(scripted)
    longer = Answerer(answerer.model, answerer.processor, max_new_tokens=64)
    for tags, expected in ((True, tokenizer.decode(script[:-1])), (False, "it(1,2),(3,4)")):
        written = list(script)
        assert list(longer.stream(prompt, images, tags=tags))[-1] == expected
        assert not written
    handle.remove()


def test_trained_adapters_answer_too(answerer, checkpoint, pictures, tmp_path):
    question = Question("Colour?", (str(pictures / "red.png"),))
    base = Answerer.from_pretrained(checkpoint, max_new_tokens=8)
    model = MonkeyPeftModel(base.model, lora_config(base.model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    base.processor.save_pretrained(tmp_path / "adapter")
    expected = Answerer(model, base.processor, max_new_tokens=8).answer([question])
    loaded = Answerer.from_pretrained(tmp_path / "adapter", max_new_tokens=8)
    assert loaded.answer([question]) == expected != answerer.answer([question])


class Attack:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def replace_by_pickle(directory, name, pickled, content=None):
    state = load_file(directory / name) if content is None else content
    (directory / name).unlink(missing_ok=True)
    torch.save(state, directory / pickled)


@pytest.fixture
def trained(checkpoint, tmp_path):
    """A copy of the checkpoint, and an adapter for it."""
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    answerer = Answerer.from_pretrained(base)
    MonkeyPeftModel(answerer.model, lora_config(answerer.model)).save_pretrained(
        tmp_path / "adapter"
    )
    answerer.processor.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter"


def commands(base, adapter, tmp_path):
    """Every command that loads a whole model or an adapter."""
    picture, data = tmp_path / "red.png", tmp_path / "data.json"
    ask = ["ask", picture, "?", "--device", "cpu", "--max-new-tokens", "1", "--checkpoint"]
    yield [*ask, base]
    yield [*ask, adapter]
    yield ["merge", adapter, "--checkpoint", base, "--out", tmp_path / "merged"]
    yield ["finetune", "--checkpoint", base, "--data", data, "--output-dir", tmp_path / "run",
           "--mode", "frozen", "--set", "dtype=float32", "--set", "training.use_cpu=true",
           "--set", "training.max_steps=1"]  # fmt: skip


def one_error_line(arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    assert "weights_only" not in done.output
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == lines[-1:]
    return lines[-1]


def test_pickles_are_read_only_when_asked(trained, pictures, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, adapter = trained
    replace_by_pickle(base, "model.safetensors", "pytorch_model.bin")
    for command in commands(base, adapter, pictures):
        assert "holds only pickles (pytorch_model.bin)" in one_error_line(command)
    assert not (pictures / "merged").exists()
    for command in commands(base, adapter, pictures):
        done = CliRunner().invoke(app, [*map(str, command), "--allow-pickle"])
        assert done.exit_code == 0, done.output
    (base / "pytorch_model.bin").unlink()
    replace_by_pickle(base, "x", "pytorch_model.bin", {"a": Attack(pictures / "attacked")})
    shutil.rmtree(pictures / "merged")
    shutil.rmtree(pictures / "run")
    for command in commands(base, adapter, pictures):
        message = one_error_line([*command, "--allow-pickle"])
        assert "is no readable weights file" in message
    assert not (pictures / "attacked").exists()


@pytest.mark.parametrize("told_by", ["config", "weights"])
def test_textmonkey_is_refused_by_every_command(trained, pictures, told_by, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, adapter = trained
    if told_by == "config":
        config = json.loads((base / "config.json").read_text())
        config["visual"] |= {"add_window": True, "resampler": True, "r": 512}
        (base / "config.json").write_text(json.dumps(config))
    else:
        state = load_file(base / "model.safetensors")
        state["transformer.visual.downresampler.query"] = torch.ones(2)
        save_file(state, base / "model.safetensors", {"format": "pt"})
    encode = ["encode", pictures / "red.png", "--checkpoint", base, "--device", "cpu"]
    for command in [encode, *commands(base, adapter, pictures)]:
        assert "this is TextMonkey, whose encoder has" in one_error_line(command)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer.json", "{}", "checkpoint .* has a damaged file: "),
        ("chat_template.jinja", "{% for x in %}", "checkpoint .* damaged file: TemplateSyntaxErr"),
        ("generation_config.json", "[]", "checkpoint .* damaged file: TypeError: 'list'"),
        ("config.json", {"dtype": "nonsense"}, "checkpoint .* damaged file: .* 'nonsense'"),
        ("config.json", {"layer_norm_epsilon": "a"}, "layer_norm_epsilon must be a number; got"),
        ("config.json", {"num_hidden_layers": 20_000}, "num_hidden_layers must be at most 2,"),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_one_error(trained, pictures, file, text, message):
    base, adapter = trained
    if isinstance(text, dict):
        text = json.dumps(json.loads((base / file).read_text()) | text)
    (base / file).write_text(text)
    ask, *_ = commands(base, adapter, pictures)
    assert re.search(message, one_error_line(ask))


def test_an_adapters_pickle_is_read_only_when_asked(trained, pictures, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    base, adapter = trained
    replace_by_pickle(adapter, "adapter_model.safetensors", "adapter_model.bin")
    _, *both, _ = commands(base, adapter, pictures)
    for command in both:
        assert "holds only pickles (adapter_model.bin)" in one_error_line(command)
        done = CliRunner().invoke(app, [*map(str, command), "--allow-pickle"])
        assert done.exit_code == 0, done.output
    shutil.rmtree(pictures / "merged")
    replace_by_pickle(adapter, "x", "adapter_model.bin", {"a": Attack(pictures / "attacked")})
    for command in both:
        assert "no readable weights file" in one_error_line([*command, "--allow-pickle"])
    assert not (pictures / "attacked").exists()
    (adapter / "adapter_model.bin").unlink()
    for command in both:
        assert "adapter has no adapter_model.safetensors" in one_error_line(command)
    (adapter / "adapter_model.safetensors").write_bytes(b"nonsense")
    for command in both:
        assert "is no readable safetensors file" in one_error_line(command)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "must name a directory in 'base_model_name_or_path'" in one_error_line(both[0])


def test_file_of_questions(answerer, checkpoint, pictures, run):
    lines = [
        {"id": "a", "image": "red.png", "question": "Colour?"},
        {"images": ["green.png", "blue.png"], "question": "Which?"},
        {"id": 7, "image": str(pictures / "white.png"), "question": "Say \u2028 it"},
    ]
    batch, out = write_lines(pictures / "in.jsonl", *lines), pictures / "made" / "out.jsonl"
    run("--batch", batch, "--out", out, "--checkpoint", checkpoint, "--batch-size", "2",
        "--max-new-tokens", "8", "--device", "cpu")  # fmt: skip
    questions, problems = read_questions(batch)
    assert not problems and [question.id for question in questions] == ["a", 2, 7]
    one_by_one = {question.id: answerer.answer([question])[0] for question in questions}
    assert answers(out) == one_by_one
    record = json.loads(out.read_text().split("\n")[1])
    assert record["question"] == "Which?" and len(record["images"]) == 2


def test_a_picture_is_encoded_once(answerer, pictures, monkeypatch):
    """Under whatever name; a bad one is an error of each question, by the name it has there."""
    shutil.copy(pictures / "red.png", pictures / "copy.png")
    for name in ("bad.png", "worse.png"):
        (pictures / name).write_bytes(b"no picture")
    names = (["red"], ["copy", "blue"], ["bad"], ["red"], ["blue", "red"], ["worse"])
    questions = [
        Question(f"Colour {number}?", tuple(str(pictures / f"{name}.png") for name in row), number)
        for number, row in enumerate(names)
    ]
    good = [question for question in questions if question.id not in (2, 5)]
    expected = [answerer.answer([question])[0] for question in good]
    encoded, real = [], answerer.encode
    monkeypatch.setattr(answerer, "encode", lambda crops: encoded.extend(crops) or real(crops))
    problems = []
    out = pictures / "out.jsonl"
    assert answer_file(answerer, questions, out, batch_size=2, on_problem=problems.append) == 2
    assert len(encoded) == 2
    assert [json.loads(line)["answer"] for line in out.read_text().splitlines()] == expected
    assert ["bad.png" in problems[0], "worse.png" in problems[1]] == [True, True]


def test_pictures_are_kept_within_bounds(tmp_path):
    """The one that was named least recently goes first, and is encoded again when it is back."""
    encoded = []

    def encode(crops):
        encoded.extend(int(image[0]) for image in crops)
        return [image + 100 for image in crops]

    for number in range(3):
        (tmp_path / str(number)).write_text(str(number))
    cache = PictureCache(
        lambda path: torch.tensor([int((tmp_path / path).read_text())]), encode, most_bytes=2 * 8
    )
    for number in (0, 1, 0, 2, 0, 1):
        (tokens,) = cache.tokens([cache.read(str(tmp_path / str(number)))])
        assert tokens.tolist() == [100 + number]
    assert encoded == [0, 1, 2, 1]


def test_resuming_skips_answers_and_mends_a_torn_line(answerer, pictures):
    records = [{"id": n, "image": "red.png", "question": f"Q{n}?"} for n in range(4)]
    questions, _ = read_questions(write_lines(pictures / "in.jsonl", *records))
    out, counts = pictures / "out.jsonl", []
    # An answer of an earlier run, and one that was cut off in writing.
    red = [str(pictures / "red.png")]
    kept = {"id": 2, "images": red, "question": "Q2?", "answer": "kept"}
    write_lines(out, kept, '{"id": 0, "images": ["r')
    assert answer_file(answerer, questions, out, on_done=counts.append) == 0
    found = answers(out)
    assert found.keys() == {0, 1, 2, 3} and found[2] == "kept" and found[0] != "to"
    assert counts == [1, 1, 1, 1]
    before = out.read_bytes()
    assert answer_file(answerer, questions, out, on_done=counts.append) == 0
    assert out.read_bytes() == before and counts[-1] == 4
    assert unanswered(questions, pictures / "none.jsonl") == questions


@pytest.mark.parametrize(
    "text, message",
    [
        ("[1]\n", r"line 1 must be an answer, with 'id', 'images', .* and 'answer'; got \[1\]"),
        ("\n" + "[" * 10**5 + "\n", "line 2 must be an answer, .*nested too deeply"),
        ("9" * 5000 + "\n", "line 1 must be an answer, .*an integer has 5000 digits"),
        (b'{"id": "\xff"}\n', "line 1 must be an answer, .*can't decode byte 0xff"),
        ('{"id": true, "images": [], "question": "New?", "answer": "x"}\n', "line 1 must be an"),
        ('{"id": 1, "image": "a.png", "question": "?"}\n', "line 1 must be an answer, with"),
        ('{"id": "precious"}', "must end with an answer, or a part of one; got"),
        ("precious notes", "must end with an answer, or a part of one; got 'precious notes'"),
        ('{"id": 0, "images": [], "question": "Old?", "answer": "x"}\n{"id": 1, "ima',
         r"other questions: by the id 0 it has question 'Old\?', not 'New\?'. Write to another"),
        ('{"id": 0, "images": ["a"], "question": "New?", "answer": "x"}\n',
         r"other questions: by the id 0 it has images \['a'\], not \[\]. .* an 'id' that stays"),
    ],
    ids=lambda text: str(text)[:20],
)  # fmt: skip
def test_a_file_of_something_else_stays_as_it_is(tmp_path, text, message):
    path = tmp_path / "out.jsonl"
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        unanswered([Question("New?", (), 0)], path)
    assert path.read_bytes() == content


def test_a_line_on_top_loses_no_question(answerer, pictures):
    """Ids are then those of other lines, whose texts may be the same."""
    lines = [{"image": f"{colour}.png", "question": "Colour?"} for colour in ("red", "green")]
    batch, out = pictures / "in.jsonl", pictures / "out.jsonl"
    questions, _ = read_questions(write_lines(batch, *lines))
    answer_file(answerer, questions, out)
    before = out.read_bytes()
    moved, _ = read_questions(write_lines(batch, {**lines[0], "image": "blue.png"}, *lines))
    with pytest.raises(ValueError) as error:
        answer_file(answerer, moved, out)
    red, blue = (str(pictures / f"{colour}.png") for colour in ("red", "blue"))
    assert f"by the id 1 it has images ['{red}'], not ['{blue}']; by the id 2" in str(error.value)
    assert out.read_bytes() == before
    # The same file by another name is the same picture.
    again = [Question(q.text, (q.images[0].replace("/", "//"),), q.id) for q in questions]
    assert unanswered(again, out) == []


def test_paths_of_any_bytes_are_recorded(answerer, pictures):
    name = os.fsdecode(b"caf\xe9.png")
    (pictures / "red.png").rename(pictures / name)
    questions, problems = read_questions(
        write_lines(pictures / "in.jsonl", {"image": name, "question": "?"})
    )
    out = pictures / "out.jsonl"
    assert not problems and answer_file(answerer, questions, out) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["images"] == [str(pictures / name)]
    assert unanswered(questions, out) == []
    with pytest.raises(TypeError, match="by path, to be recorded; that of the id 'x' has others"):
        answer_file(answerer, [Question("?", (Image.new("RGB", (9, 9)),), "x")], out)


def test_each_answer_is_kept_before_the_next_batch(answerer, pictures, monkeypatch):
    records = [{"id": n, "image": "red.png", "question": f"Q{n}?"} for n in range(3)]
    questions, _ = read_questions(write_lines(pictures / "in.jsonl", *records))

    def on_done(count):
        if count and out.exists() and len(answers(out)) == 2:
            raise KeyboardInterrupt

    out = pictures / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_file(answerer, questions, out, on_done=on_done)
    assert answers(out).keys() == {0, 1}


def test_bad_records_are_reported_and_the_others_answered(checkpoint, pictures, run):
    (pictures / "broken.png").write_bytes(b"no picture")
    batch = write_lines(
        pictures / "in.jsonl",
        {"id": "good", "image": "red.png", "question": "?"},
        "{no json\n",
        ["list"],
        {"question": "?"},
        {"image": "a", "images": [], "question": "?"},
        {"image": 3, "question": "?"},
        {"image": "red.png"},
        {"image": "red.png", "question": "?", "id": 1.5},
        {"id": "good", "image": "red.png", "question": "?"},
        {"id": "broken", "image": "broken.png", "question": "?"},
        {"id": "missing", "image": "missing.png", "question": "?"},
        {"id": "last", "image": "blue.png", "question": "?"},
        {"image": "", "question": "?"},
        {"image": "https://somewhere/a.png", "question": "?"},
        {"image": "red.png", "question": "\ud800"},
        {"image": "red.png", "question": "?", "id": "\ud800"},
        "[" * 10**5 + "\n",
        '{"id": ' + "9" * 5000 + "}\n",
        {"image": "red.png", "question": [[]] * 100},
    )
    out = pictures / "out.jsonl"
    done = run("--batch", batch, "--out", out, "--checkpoint", checkpoint, "--batch-size", "3",
               "--max-new-tokens", "4", "--device", "cpu", code=1)  # fmt: skip
    assert answers(out).keys() == {"good", "last"}
    for message in (
        "line 2: must be a JSON object: Expecting",
        "line 3: must be a JSON object; got list",
        "line 4: must have either 'image' or 'images'; got keys ['question']",
        "line 5: must have either 'image' or 'images'; got keys ['image', 'images', 'question']",
        "line 6: 'image' must be a path, 'images' a list of paths; got [3]",
        "line 7: 'question' must be a string; got None",
        "line 8: 'id' must be a string or an integer; got 1.5",
        "line 9: id 'good' must differ from that of line 1",
        "id 'broken': ",
        "id 'missing': ",
        "line 13: 'image' must be a path, 'images' a list of paths; got ['']",
        "line 14: 'image' must be a file, as nothing is fetched; got 'https://somewhere/a.png'",
        "line 15: 'question' must be text; got half of a surrogate pair",
        "line 16: 'id' must be text; got half of a surrogate pair",
        "line 17: must be a JSON object: lists and objects are nested too deeply",
        "line 18: must be a JSON object: an integer has 5000 digits",
        "line 19: 'question' must be a string; got [[], [], [], [], [], [], ...]",
        "17 of 19 questions were not answered",
    ):
        assert message in done.output


def test_usage_errors(checkpoint, pictures, run):
    image, batch = pictures / "red.png", write_lines(pictures / "in.jsonl", "")
    for arguments in (
        (image,),
        (image, "?", "--batch", batch),
        ("--batch", batch),
        ("--out", "x"),
        (),
    ):
        output = run(*arguments, "--checkpoint", checkpoint, code=2).output
        assert "give IMAGE and QUESTION, or --batch and --out" in output
    assert "checkpoint must be a directory" in run(image, "?", "--checkpoint", "no", code=2).output
    output = run(pictures / "none.png", "?", "--checkpoint", checkpoint, code=2).output
    assert "none.png" in output
    out = write_lines(pictures / "out.jsonl", "[1]\n")
    output = run("--batch", batch, "--out", out, "--checkpoint", checkpoint, code=2).output
    assert "out.jsonl, line 1 must be an answer, with 'id'" in output
    output = run("--batch", batch, "--out", batch, "--checkpoint", checkpoint, code=2).output
    assert "--out must be another file than --batch" in output
    output = run("--batch", batch, "--out", pictures, "--checkpoint", checkpoint, code=2).output
    assert "--out must be a file; got the directory" in output
    batch.write_bytes(b'{"id": "\xff"}')
    output = run("--batch", batch, "--out", out, "--checkpoint", checkpoint, code=2).output
    assert "must be UTF-8" in output


# ---- one writer, one model ----------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch):
    """It must not be loaded."""

    def fails(*args, **settings):
        raise AssertionError("loaded")

    monkeypatch.setattr(Answerer, "from_pretrained", fails)


def test_nothing_to_answer_loads_no_model(answerer, checkpoint, pictures, run, no_model):
    batch, out = write_lines(pictures / "in.jsonl", ""), pictures / "new" / "out.jsonl"
    run("--batch", batch, "--out", out, "--checkpoint", checkpoint)
    assert out.read_bytes() == b""
    write_lines(batch, {"id": 1, "image": "red.png", "question": "?"})
    questions, _ = read_questions(batch)
    answer_file(answerer, questions, out)
    before = out.read_bytes()
    run("--batch", batch, "--out", out, "--checkpoint", checkpoint)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]  # and no lock


def test_a_second_writer_is_refused_before_its_model_loads(pictures, checkpoint, run, no_model):
    batch = write_lines(pictures / "in.jsonl", {"image": "red.png", "question": "?"})
    out = pictures / "out.jsonl"
    link = pictures / "link.jsonl"
    link.symlink_to(out)
    ready, say_ready = os.pipe()
    until_closed, close = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(close)

        def answerer():
            os.write(say_ready, b".")
            os.read(until_closed, 1)
            os._exit(0)

        answer_file(answerer, read_questions(batch)[0], out)
    assert os.read(ready, 1) == b"."
    for name in (out, link):
        done = run("--batch", batch, "--out", name, "--checkpoint", checkpoint, code=2)
        assert f"a file of answers must have one writer; process {pid} on " in done.stderr
        assert f" is writing to {name}\n" in done.stderr
    os.close(close)
    os.waitpid(pid, 0)
    with pytest.raises(AssertionError, match="loaded"):  # the lock went with its process
        answer_file(Answerer.from_pretrained, read_questions(batch)[0], out)


def test_answers_of_two_checkpoints_do_not_mix(checkpoint, pictures, run):
    batch, out = pictures / "in.jsonl", pictures / "out.jsonl"
    rows = [{"id": n, "image": "red.png", "question": "?"} for n in range(3)]
    ask = ("--batch", batch, "--out", out, "--max-new-tokens", "4", "--device", "cpu")
    write_lines(batch, rows[0])
    run(*ask, "--checkpoint", checkpoint)
    (record,) = map(json.loads, out.open())
    assert record["checkpoint"] == str(checkpoint)
    write_lines(batch, *rows[:2])
    other = pictures / "other"
    other.symlink_to(shutil.copytree(checkpoint, pictures / "copy"))
    before = out.read_bytes()
    done = run(*ask, "--checkpoint", other, code=2)
    copy = pictures / "copy"
    expected = f"answers of the checkpoint {checkpoint}, not of {copy}: write to another file"
    assert expected in done.stderr and out.read_bytes() == before
    # Answers that do not say whose they are are gone on with.
    del record["checkpoint"]
    write_lines(out, record)
    run(*ask, "--checkpoint", other)
    assert [json.loads(line).get("checkpoint") for line in out.open()] == [None, str(copy)]


# ---- one question -------------------------------------------------------------------------------


def test_json_is_a_line_of_an_answer_file(answerer, checkpoint, pictures, run):
    picture = str(pictures / "red.png")
    done = run(picture, "Colour?", "--checkpoint", checkpoint, "--max-new-tokens", "8",
               "--device", "cpu", "--json")  # fmt: skip
    (answer,) = answerer.answer([Question("Colour?", (picture,))])
    record = {"id": 1, "images": [picture], "question": "Colour?", "answer": answer}
    assert json.loads(done.stdout) == {**record, "checkpoint": str(checkpoint)}
    assert done.stdout.endswith("}\n")


def test_a_terminal_gets_the_answer_as_it_is_written(
    answerer, checkpoint, pictures, run, monkeypatch
):
    pieces = []

    class Terminal(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return super().write(text)

    terminal = Terminal()
    monkeypatch.setattr(
        "monkey_model.commands.ask.out_console", Console(file=terminal, force_terminal=True)
    )
    picture = str(pictures / "red.png")
    run(picture, "Colour?", "--checkpoint", checkpoint, "--max-new-tokens", "8", "--device", "cpu")
    (answer,) = answerer.answer([Question("Colour?", (picture,))])
    assert terminal.getvalue() == answer + "\n"
    assert sum(piece.strip() != "" for piece in pieces) > 1


# ---- several GPUs, few bits ---------------------------------------------------------------------


@pytest.mark.parametrize("quantization, dtype", [("4bit", torch.uint8), ("8bit", torch.int8)])
def test_quantised_weights_answer(pictures, tmp_path, run, caplog, quantization, dtype):
    pytest.importorskip("bitsandbytes")
    checkpoint = write_checkpoint(tmp_path / "wide", visual={"width": 64})  # it packs blocks of 64
    few = Answerer.from_pretrained(checkpoint, quantization=quantization, max_new_tokens=8)
    assert few.model.transformer.h[0].mlp.w1.weight.dtype == dtype
    assert few.model.lm_head.weight.dtype == torch.float32
    picture = str(pictures / "red.png")
    question = Question("Colour?", (picture,))
    (answer,) = few.answer([question])
    caplog.clear()
    done = run(picture, "Colour?", "--checkpoint", checkpoint, "--max-new-tokens", "8",
               "--device", "cpu", "--quantization", quantization)  # fmt: skip
    assert done.stdout.strip() == answer != ""
    assert "MatMul8bitLt" not in caplog.text  # a line for each product

    # A LoRA adapter answers beside them, unrounded.
    base = Answerer.from_pretrained(checkpoint)
    model = MonkeyPeftModel(base.model, lora_config(base.model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    base.processor.save_pretrained(tmp_path / "adapter")
    tuned = Answerer.from_pretrained(
        tmp_path / "adapter", quantization=quantization, max_new_tokens=8
    )
    assert isinstance(tuned.model, MonkeyPeftModel)
    *_, streamed = tuned.stream(tuned.prompt(question), tuned.read_images(question))
    assert [streamed] == tuned.answer([question]) != [answer]


def test_a_device_map_answers_the_same(answerer, checkpoint, pictures, run, monkeypatch):
    """accelerate's own, of which a machine without a GPU has the CPU alone."""
    monkeypatch.setattr(
        "monkey_model.commands.loading.usable_device", lambda name: torch.device("cuda")
    )
    picture = str(pictures / "red.png")
    done = run(picture, "Colour?", "--checkpoint", checkpoint, "--max-new-tokens", "8",
               "--device-map", "auto", "--dtype", "float32")  # fmt: skip
    assert [done.stdout.strip()] == answerer.answer([Question("Colour?", (picture,))])


def test_devices_that_cannot_do_it(checkpoint, pictures, run, monkeypatch):
    ask = (pictures / "red.png", "?", "--checkpoint", checkpoint)

    def error(*arguments):
        return " ".join(run(*ask, *arguments, code=2).stderr.split())

    assert "give --device, for one, or --device-map" in error(
        "--device", "cpu", "--device-map=auto"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert error("--device-map", "balanced") == (
        "Error: --device-map balanced spreads a model over GPUs; torch finds none here"
    )
    assert "--device cuda:99 cannot be used: " in error("--device", "cuda:99")
    few = ("--device", "cpu", "--quantization", "8bit")
    with monkeypatch.context() as patch:
        patch.setattr("bitsandbytes.supported_torch_devices", {"cuda", "xpu"})
        assert error(*few) == "Error: quantization 8bit runs on cuda, xpu; got the device cpu"
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert error(*few).startswith(
        'Error: quantization 8bit needs bitsandbytes: pip install "monkey-vision[quantization]"'
    )
    assert [one.value for one in Quantization] == list(QUANTIZATIONS)
    batch = write_lines(pictures / "in.jsonl", "")
    done = run("--batch", batch, "--out", "x", "--json", "--checkpoint", checkpoint, code=2)
    assert "--json is for one question" in done.stderr
