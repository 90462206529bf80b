"""``monkey evaluate``: answers, scores and pages; resuming, shards; what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from monkey_model.commands.__main__ import app
from monkey_model.evaluation import evaluate, records
from monkey_model.evaluation.datasets import DATA_SETS
from monkey_model.evaluation.metrics import METRICS
from monkey_model.serving.answer import Answerer, Question
from tests.helpers.checkpoint import COLOURS, write_checkpoint, write_data

QUESTIONS = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("evaluate") / "checkpoint")


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return Answerer.from_pretrained(checkpoint, max_new_tokens=6, template="{} Answer: ")


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Pictures, and ``data.jsonl``: what upstream's format has."""
    write_data(tmp_path)
    colours = [COLOURS[number % len(COLOURS)] for number in range(QUESTIONS)]
    write_lines(
        tmp_path / "data.jsonl",
        [
            {
                "image": f"{colour}.png",
                "question": f"Colour {number}?",
                "answer": [colour, colour.upper()],
                "question_id": 10 * number,
            }
            for number, colour in enumerate(colours)
        ],
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def run(*arguments, code=0):
    done = CliRunner().invoke(app, ["evaluate", *(str(argument) for argument in arguments)])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def ask(checkpoint):
    """``monkey evaluate`` of the checkpoint on data.jsonl, into the folder ``out``."""

    def ask(*arguments, out="out", code=0):
        return run(
            "--data", "data.jsonl", "--metric", "anls", "--metric", "containment",
            "--checkpoint", checkpoint, "--out", out, "--max-new-tokens", 6,
            "--device", "cpu", *arguments, code=code,
        )  # fmt: skip

    return ask


def page_data(path):
    text = path.read_text(encoding="utf-8")
    assert "http://" not in text and "https://" not in text  # nothing to fetch
    return json.loads(
        text.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    )


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_model_is_scored(ask, answerer, folder):
    done = ask("--batch-size", 4)
    given = [
        answerer.answer([Question(line["question"], (str(folder / line["image"]),))])[0]
        for line in lines(folder / "data.jsonl")
    ]
    written = lines(folder / "out" / "records.jsonl")
    assert [line["answer"] for line in written] == given
    assert [line["id"] for line in written] == list(range(0, 10 * QUESTIONS, 10))

    content = json.loads((folder / "out" / "scores.json").read_text())
    references = [line["answer"] for line in lines(folder / "data.jsonl")]
    for name, score in content["scores"].items():
        expected = METRICS[name].scores(given, references)
        assert [line["scores"][name] for line in written] == expected
        assert score["mean"] == pytest.approx(sum(expected) / QUESTIONS)
    assert list(content["scores"]) == ["anls", "containment"]
    assert content["counts"] == {"records": QUESTIONS, "pictures": len(COLOURS)}
    assert content["settings"]["prompt"] == "{} Answer: "
    assert {"torch", "transformers", "monkey-vision"} < set(content["versions"])
    assert "│ anls        │" in done.stdout and "│ containment │" in done.stdout

    page = page_data(folder / "out" / "worst.html")
    assert [case["question"] for case in page["cases"]] == [line["question"] for line in written]
    assert all(case["pictures"][0]["src"].startswith("data:image/jpeg") for case in page["cases"])


def test_resumed_and_in_shards_the_scores_are_the_same(ask, checkpoint, folder, monkeypatch):
    ask()
    expected = (folder / "out" / "scores.json").read_text()
    answers = (folder / "out" / "answers.jsonl").read_bytes().splitlines(keepends=True)

    (folder / "again").mkdir()
    (folder / "again" / "settings.json").write_bytes(
        (folder / "out" / "settings.json").read_bytes()
    )
    (folder / "again" / "answers.jsonl").write_bytes(b"".join(answers[:3]) + answers[3][:25])
    asked = []
    monkeypatch.setattr(
        Answerer, "answer",
        lambda self, questions, *rest, answer=Answerer.answer:
            asked.extend(q.id for q in questions) or answer(self, questions, *rest),
    )  # fmt: skip
    ask(out="again")
    assert asked == [30, 40, 50]
    assert (folder / "again" / "scores.json").read_text() == expected
    assert (folder / "again" / "answers.jsonl").read_bytes() == b"".join(answers)

    for shard in ("1/3", "0/3", "2/3"):
        asked.clear()
        done = ask("--shard", shard, out="shards")
        assert asked == [10 * int(shard[0]), 10 * (int(shard[0]) + 3)]
        assert not (folder / "shards" / "scores.json").exists() and "│" not in done.stdout
    asked.clear()
    ask(out="shards")
    assert asked == []
    assert (folder / "shards" / "scores.json").read_text() == expected


KILLED = """
import os, signal, sys
from monkey_model.commands.__main__ import main
from monkey_model.serving.answer import Answerer

answer, calls = Answerer.answer, []

def killed(self, *arguments):
    calls.append(1)
    if len(calls) == 3:  # in the middle of writing an answer
        with open("out/answers.jsonl", "ab") as file:
            file.write(b'{"id": 20, "ima')
        os.kill(os.getpid(), signal.SIGKILL)
    return answer(self, *arguments)

Answerer.answer = killed
main()
"""


@pytest.mark.slow
def test_killed_and_resumed_the_scores_are_the_same(ask, checkpoint, folder):
    arguments = [
        "evaluate", "--data", "data.jsonl", "--metric", "anls", "--metric", "containment",
        "--checkpoint", str(checkpoint), "--out", "out", "--max-new-tokens", "6", "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (folder / "out" / "answers.jsonl").read_bytes().count(b"\n") == 2
    assert not (folder / "out" / "scores.json").exists()
    ask()
    ask(out="whole")
    for name in ("scores.json", "records.jsonl", "answers.jsonl"):
        assert (folder / "out" / name).read_text() == (folder / "whole" / name).read_text()


def test_chat_and_the_words_around_a_question(ask, folder):
    ask("--chat", "--prompt", "{} In one word. Answer: ")
    asked = [line["question"] for line in lines(folder / "out" / "answers.jsonl")]
    assert asked[0] == "Colour 0? In one word."


def test_a_folder_keeps_the_answers_of_one_thing(ask, folder):
    ask()
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    done = ask("--max-new-tokens", 5, code=2)
    assert "out has another evaluation's answers: max_new_tokens is 6 there and 5 here" in (
        done.stderr
    )
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == before
    text = (folder / "data.jsonl").read_text()
    (folder / "data.jsonl").write_text(text.replace("Colour 5?", "Colour?"))
    assert "out has another evaluation's answers: data_sha256 is " in ask(code=2).stderr
    (folder / "copy.jsonl").write_text(text)
    (folder / "copy.jsonl").replace("data.jsonl")
    (folder / "out" / "settings.json").unlink()
    assert "out has answers (answers.jsonl), but no settings.json" in ask(code=2).stderr


def test_a_folder_without_answers_is_taken(checkpoint, folder):
    """What went wrong before the first answer does not stand in the way."""
    arguments = ("--data", "data.jsonl", "--metric", "anls", "--out", "out", "--device", "cpu")
    done = run(*arguments, "--checkpoint", "nowhere", code=2)
    assert "checkpoint must be a directory; got nowhere" in done.stderr
    (folder / "empty").mkdir()
    done = run(*arguments, "--checkpoint", "empty", code=2)
    assert "checkpoint has no config.json" in done.stderr
    assert (folder / "out" / "settings.json").exists()
    run(*arguments, "--checkpoint", checkpoint, "--max-new-tokens", 3)
    settings = json.loads((folder / "out" / "scores.json").read_text())["settings"]
    assert settings["checkpoint"] == str(checkpoint)


# ---- predictions ---------------------------------------------------------------------------------


def predictions(kind):
    answers = ["Red", "gren", "", "white", "x", "green"]
    if kind == "ask":
        return "answers.jsonl", [
            {"id": 10 * i, "images": [], "question": f"Colour {i}?", "answer": answer}
            for i, answer in enumerate(answers)
        ]
    return "answers.json", [
        {"image_path": "x", kind: 10 * i, "answer": answer, "annotation": ["x"]}
        for i, answer in enumerate(answers)
    ]


@pytest.mark.parametrize("kind", ["ask", "question_id", "questionId"])
def test_predictions_are_scored_without_a_model_or_pictures(kind, folder):
    name, content = predictions(kind)
    path = folder / name
    write_lines(path, content) if kind == "ask" else path.write_text(json.dumps(content))
    for colour in COLOURS:
        (folder / f"{colour}.png").unlink()
    run("--data", "data.jsonl", "--metric", "anls", "--predictions", name, "--out", "out")
    scored = lines(folder / "out" / "records.jsonl")
    assert [line["scores"]["anls"] for line in scored] == [1, 4 / 5, 0, 1, 0, 1]
    page = page_data(folder / "out" / "worst.html")
    assert page["bars"][0] == 2 and page["bars"][-1] == 3 and sum(page["bars"]) == QUESTIONS
    assert [case["id"] for case in page["cases"]] == ["20", "40", "10"]  # those that are wrong
    assert "No such file" in page["cases"][0]["pictures"][0]["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1].update(id=11), "line 2 answers 11, which the data does not ask"),
        (lambda lines: lines[1].update(id=0), "line 2 answers 0 again"),
        (
            lambda lines: lines[1].update(question="What?"),
            "line 2 answers 'What?', but 10 asks 'Colour 1?'",
        ),
        (lambda lines: lines[1].pop("answer"), "line 2 must have an 'answer' and a 'question_id'"),
        (lambda lines: lines[1].update(answer=3), "line 2 must have an 'answer' and a 'question"),
        (lambda lines: lines.pop(4), "must answer every question; it lacks 40"),
    ],
)
def test_predictions_of_something_else(change, message, folder):
    name, content = predictions("ask")
    change(content)
    write_lines(folder / name, content)
    done = run("--data", "data.jsonl", "--metric", "anls", "--predictions", name, "--out", "out",
               code=2)  # fmt: skip
    assert message in done.stderr and done.stderr.startswith("Error: ")
    assert not (folder / "out").exists()


# ---- data ----------------------------------------------------------------------------------------


def write_vqa(folder, **change):
    questions = [
        {"image_id": number, "question_id": f"q{number}", "question": "What colour?"}
        for number in range(3)
    ]
    annotations = [
        {
            "question_id": f"q{number}",
            "answers": [{"answer": colour, "answer_id": i} for i in range(10)],
        }
        for number, colour in enumerate(COLOURS[:3])
    ]
    for name, value in change.items():
        annotations[1][name] = value
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return (
        "--data", "questions.json", "--annotations", "annotations.json",
        "--image-pattern", "val/COCO_{image_id:04}.jpg", "--metric", "vqa_accuracy",
    )  # fmt: skip


def test_vqas_own_files(folder):
    write_vqa(folder)
    found = records.read_records(
        "questions.json", annotations="annotations.json", image_root="pictures",
        image_pattern="val/COCO_{image_id:04}.jpg",
    )  # fmt: skip
    assert [record.id for record in found] == ["q0", "q1", "q2"]
    assert found[1].question.images == (os.path.join("pictures", "val/COCO_0001.jpg"),)
    assert found[2].references == ("blue",) * 10


def test_numbers_of_lines_where_ids_repeat(folder):
    content = [{**line, "question_id": "a"} for line in lines(folder / "data.jsonl")]
    write_lines(folder / "data.jsonl", content)
    with pytest.raises(ValueError, match=r"line 2: 'question_id' 'a' must differ .* of line 1;"):
        records.read_records("data.jsonl")
    numbered = records.read_records("data.jsonl", number_lines=True)
    assert [record.id for record in numbered] == list(range(1, QUESTIONS + 1))


def test_a_data_set_has_its_prompt_and_files(answerer, checkpoint, folder):
    """VizWiz: the prompt that upstream asks with, and the pictures' paths from the root."""
    data = folder / "data" / "vizwiz"
    data.mkdir(parents=True)
    write_lines(
        data / "vizwiz_val.jsonl",
        [{"image": "red.png", "question": "Colour?", "question_id": 7, "answer": "unused"}],
    )
    annotation = {"question_id": 7, "answers": [{"answer": "red"}] * 10}
    (data / "vizwiz_val_annotations.json").write_text(json.dumps({"annotations": [annotation]}))
    assert "data/vizwiz/vizwiz_val.jsonl" in run("--list", "--root", folder).stdout
    run("vizwiz_val", "--root", folder, "--checkpoint", checkpoint, "--out", "out",
        "--device", "cpu", "--max-new-tokens", 6)  # fmt: skip
    (answer,) = lines(folder / "out" / "answers.jsonl")
    asking = Answerer(
        answerer.model, answerer.processor, max_new_tokens=6,
        template=DATA_SETS["vizwiz_val"].prompt,
    )  # fmt: skip
    question = Question("Colour?", (str(folder / "red.png"),))
    assert asking.prompt(question) == (
        "<img></img> Colour? When the provided information is insufficient, respond with "
        '"unanswerable". Answer: '
    )
    assert answer["answer"] == asking.answer([question])[0]
    content = json.loads((folder / "out" / "scores.json").read_text())
    assert list(content["scores"]) == ["vqa_accuracy_upstream", "vqa_accuracy"]


def test_the_other_sets_are_asked_as_upstream_asks(answerer):
    assert len(DATA_SETS) == 14 and {*DATA_SETS["gqa_testdev"].metrics} <= {*METRICS}
    assert answerer.prompt(Question("Colour?", ("x",))) == "<img></img>Colour? Answer: "


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": "gone.png"}, "pictures are missing: id 10: {folder}gone.png"),
        ({"answer": 3}, "line 2: 'answer' must be a string, or a list of them; got 3"),
        ({"answer": []}, "line 2: 'answer' must be a string, or a list of them; got []"),
        ({"answer": ["a", ""]}, "metric containment does not fit the data: id 10: needs refe"),
        ({"question_id": 1.5}, "line 2: 'id' must be a string or an integer; got 1.5"),
        ({"question": None}, "line 2: 'question' must be a string; got None"),
    ],
)
def test_bad_records_are_named(change, message, ask, folder):
    content = lines(folder / "data.jsonl")
    content[1].update(change)
    write_lines(folder / "data.jsonl", content)
    assert message.format(folder="") in ask(code=2).stderr
    assert not (folder / "out" / "scores.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "data set must be one of estvqa_test, docvqa_test, "),
        (("docvqa_test", "--prompt", "{}"), "--prompt is for --data; docvqa_test has its own"),
        (("docvqa_test",), "No such file or directory: 'data/docvqa/test_ans.jsonl'"),
        (("--data", "data.jsonl"), "--data needs a --metric (--list has them)"),
        (("--data", "data.jsonl", "--metric", "bleu"), "--metric must be one of vqa_accuracy, "),
        (
            ("--data", "data.jsonl", "--metric", "vqa_accuracy"),
            "metric vqa_accuracy does not fit the data: id 0: needs the answers of 4 people or "
            "more (VQA has 10); got 2; id 10: ",
        ),
        (("--data", "data.jsonl", "--metric", "anls", "--prompt", "x"), "--prompt must have a pla"),
        (
            ("--data", "data.jsonl", "--metric", "anls", "--shard", "3/2"),
            "--shard must be I/N with",
        ),
        (
            ("--data", "data.jsonl", "--metric", "anls", "--image-pattern", "x"),
            "image_pattern is for VQA's *.json questions",
        ),
        (
            ("--data", "data.jsonl", "--metric", "anls", "--out", "empty.jsonl"),
            "--out must be a folder; got the file empty.jsonl",
        ),
        (("--data", "data.json", "--metric", "anls"), "data.json must hold a JSON object; got li"),
        (("--data", "empty.jsonl", "--metric", "anls"), "empty.jsonl must have a question; it has"),
    ],
)
def test_bad_arguments(arguments, message, checkpoint, folder):
    (folder / "empty.jsonl").touch()
    done = run("--out", "out", *arguments, "--checkpoint", checkpoint, "--device", "cpu", code=2)
    assert message in done.stderr and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            {"question_id": "q9"},
            (),
            "question 1: the annotations must have its 'question_id'; they",
        ),
        ({"answers": []}, (), "annotations.json, annotation 1 must have a 'question_id' and 'ans"),
        ({}, ("--image-pattern", "{picture}.jpg"), "image_pattern must fit the questions, whose"),
        ({}, ("--metric", "cider_x"), "--metric must be one of"),
    ],
)
def test_bad_annotations_are_named(change, arguments, message, checkpoint, folder):
    done = run(*write_vqa(folder, **change), *arguments, "--checkpoint", checkpoint,
               "--out", "out", code=2)  # fmt: skip
    assert message in done.stderr


def test_what_cannot_be_read_is_not_scored(ask, folder):
    (folder / "green.png").write_bytes(b"no picture")
    done = ask(code=1)
    assert "Error: id 10: " in done.stderr and "Error: id 50: " in done.stderr
    assert "Error: 2 of 6 questions were not answered" in done.stderr
    assert not (folder / "out" / "scores.json").exists()


def test_a_page_is_written_whole_or_not_at_all(folder, monkeypatch):
    name, content = predictions("ask")
    write_lines(folder / name, content)
    replace = os.replace

    def full(source, target):
        if str(target).endswith("worst.html"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    done = run("--data", "data.jsonl", "--metric", "anls", "--predictions", name, "--out", "out",
               code=2)  # fmt: skip
    assert "worst.html cannot be written: [Errno 28]" in done.stderr
    assert {path.name for path in (folder / "out").iterdir()} == {"settings.json", "records.jsonl"}


def test_mean_and_error():
    assert evaluate.mean_and_error([0.5]) == {"mean": 0.5, "standard_error": None}
    found = evaluate.mean_and_error([0, 1, 1, 0])
    assert found["mean"] == 0.5 and found["standard_error"] == pytest.approx((1 / 3) ** 0.5 / 2)


def test_a_package_that_is_missing_is_one_line(checkpoint, folder, monkeypatch):
    def load(*arguments, **settings):
        raise ImportError("4bit needs bitsandbytes")

    monkeypatch.setattr("monkey_model.commands.evaluate.load_answerer", load)
    done = run("--data", "data.jsonl", "--metric", "anls", "--checkpoint", checkpoint,
               "--out", "out", "--device", "cpu", code=2)  # fmt: skip
    assert "Error: 4bit needs bitsandbytes\n" in done.stderr
