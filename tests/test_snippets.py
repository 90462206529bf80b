"""Whatever a page shows, runs: every fenced block, on a tiny checkpoint."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.helpers import snippets
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.snippets import ROOT
from tests.helpers.tiny import tiny_config, tiny_encoder, tiny_model


def code_of(page):
    return snippets.snippets(page.read_text(encoding="utf-8"), str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("snippets") / "DIR", seq_length=2048)


@pytest.fixture
def folder(checkpoint, tmp_path, monkeypatch):
    """Where the files are that the pages name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "DIR").symlink_to(checkpoint)
    (tmp_path / "monkey_model").symlink_to(ROOT / "monkey_model")  # its samples
    for name in ("photo.jpg", "scan.png", "page.png", "a.png", "b.png"):
        Image.new("RGB", (60, 40), "red").save(tmp_path / name)
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (60, 40), "green").save(tmp_path / "photos" / "green.png")
    turns = [
        {"from": "user", "value": "<img>photo.jpg</img> What is this? Answer: "},
        {"from": "assistant", "value": "A harbour."},
    ]
    records = [{"id": "1", "conversations": turns}]
    (tmp_path / "conversations.json").write_text(json.dumps(records))
    question = {"id": "a1", "image": "a.png", "question": "What is this?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(question) + "\n")
    return tmp_path


@pytest.fixture
def names():
    """What the pages' Python takes from its reader."""
    picture = Image.new("RGB", (60, 40), "blue")
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG")
    return {
        "pil_image": picture,
        "photo": picture,
        "scan": picture,
        "jpeg_bytes": jpeg.getvalue(),
        "array": np.asarray(picture),
        "user_text": "What is this?",
        "config": tiny_config(),
        "stock_state_dict": tiny_encoder().state_dict(),
        "model": tiny_model(),
    }


@pytest.mark.parametrize("page", snippets.pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_page(page, folder, names):
    snippets.run(code_of(page), names)


def test_ci_runs_the_commands():
    script = (ROOT / ".ci" / "run").read_text()
    named = [s.note for page in snippets.pages() for s in code_of(page) if s.marker == "command"]
    assert sorted(named) == sorted(set(re.findall(r"readme_command (\w+)", script)))


PAGE = """
<!-- file: a.json -->
```json
{"a": 1}
```

```python
from pathlib import Path

value = Path("a.json").read_text()
{line}
```
- in a list:
  ```sh
  monkey {command}  # as it is
  ```
"""


def test_what_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = snippets.snippets(
        PAGE.replace("{line}", "other = given").replace("{command}", "--help"), "page.md"
    )
    assert [(s.language, s.line) for s in found] == [("json", 4), ("python", 8), ("sh", 15)]
    names = {"given": 7}
    snippets.run(found, names)
    assert (names["value"], names["other"]) == ('{"a": 1}\n', 7)


@pytest.mark.parametrize(
    ("line", "command", "error", "message"),
    [
        ("1 / 0", "--help", ZeroDivisionError, "by zero"),
        ("given(", "--help", SyntaxError, "never closed"),
        ("", "--no-such-option", AssertionError, r"page.md:15: monkey --no-such-option\n"),
        ("", "--help && torchrun x", AssertionError, "page.md:15: torchrun is not run by the test"),
        ("", "doctor 'x", AssertionError, "page.md:15: bash: line"),
    ],
)
def test_what_fails(line, command, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = PAGE.replace("{line}", line).replace("{command}", command)
    with pytest.raises(error, match=message):
        snippets.run(snippets.snippets(text, "page.md"), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```\n", r"page.md:2: language '', not one of \('sh', "),
        ("<!-- skip: no -->\n```sh\nls\n```\n", r"page.md:3: 'skip' is not one of \('file', "),
        ("```sh\nls\n", "page.md: 1 fences, but 0 blocks"),
    ],
)
def test_blocks_that_nothing_checks(text, message):
    with pytest.raises(AssertionError, match=message):
        snippets.snippets(text, "page.md")


def test_blocks_that_do_not_run_are_parsed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "<!-- not run: needs a cluster -->\n```{}\n{}\n```\n"
    snippets.run(snippets.snippets(text.format("sh", "srun x"), "page.md"), {})
    for language, code in [("sh", "if"), ("python", "if"), ("json", "{"), ("yaml", "{")]:
        found = snippets.snippets(text.format(language, code), "page.md")
        with pytest.raises((AssertionError, SyntaxError, ValueError, snippets.yaml.YAMLError)):
            snippets.run(found, {})
