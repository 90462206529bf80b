"""The fenced blocks of the project's pages, and a runner for them.

Every block names its language. ``sh``, ``python``, ``yaml`` and ``json`` are run or read; ``text``
is what a program prints. A comment on the line before a block says what is special about it:

    <!-- file: recipe.yaml -->   the block is that file, there before anything of its page runs
    <!-- command: NAME -->       .ci/run takes the line from the page and runs it
    <!-- not run: WHY -->        it cannot run in a test; its syntax is still checked
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from monkey_model.commands.__main__ import app

ROOT = Path(__file__).parents[2]
LANGUAGES = ("sh", "python", "yaml", "json", "text")
MARKERS = ("file", "command", "not run")
# What a page leaves to the defaults or to a GPU, and a test cannot.
ON_A_CPU = ["dtype=float32", "training.use_cpu=true", "training.max_steps=1"]


@dataclass(frozen=True)
class Snippet:
    page: str
    line: int  # of its first line of code, from 1
    language: str
    code: str
    marker: str  # one of MARKERS, or ""
    note: str  # what the marker says

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    return sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[!.]*/README.md")})


def snippets(text: str, page: str) -> list[Snippet]:
    found = []
    fence = re.compile(
        r"(?:^[ ]*<!-- ([\w ]+): ([^\n]*) -->\n)?^([ ]*)```(\w*)\n(.*?)^\3```$", re.M | re.S
    )
    for match in fence.finditer(text):
        marker, note, _, language, code = match.groups("")
        line = text.count("\n", 0, match.start(5)) + 1
        snippet = Snippet(page, line, language, textwrap.dedent(code), marker, note)
        assert language in LANGUAGES, f"{snippet}: language {language!r}, not one of {LANGUAGES}"
        assert not marker or marker in MARKERS, f"{snippet}: {marker!r} is not one of {MARKERS}"
        found.append(snippet)
    fences = len(re.findall(r"^\s*```", text, re.M))
    assert fences == 2 * len(found), f"{page}: {fences} fences, but {len(found)} blocks"
    return found


def check_syntax(snippet: Snippet) -> None:
    code = snippet.code
    if snippet.language == "python":
        compile(code, str(snippet), "exec")
    elif snippet.language == "sh":
        done = subprocess.run(["bash", "-n"], input=code, capture_output=True, text=True)
        assert not done.stderr, f"{snippet}: {done.stderr}"
    elif snippet.language == "yaml":
        yaml.safe_load(code)
    elif snippet.language == "json":
        try:
            json.loads(code)
        except json.JSONDecodeError:  # or JSONL
            for line in code.splitlines():
                json.loads(line)


def run_command(snippet: Snippet, command: list[str]) -> None:
    """``monkey ...`` and ``python examples/...``, in this process."""
    if command[0] == "monkey":
        arguments = command[1:]
        if arguments[0] == "finetune":
            arguments += [word for setting in ON_A_CPU for word in ("--set", setting)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, f"{snippet}: {shlex.join(command)}\n{done.output}"
    elif command[0] == "python" and command[1].startswith("examples/"):
        before, sys.argv = sys.argv, command[1:]
        try:
            runpy.run_path(str(ROOT / command[1]), run_name="__main__")
        finally:
            sys.argv = before
    else:
        raise AssertionError(
            f"{snippet}: {command[0]} is not run by the tests; say so on the line before the "
            "block: <!-- not run: WHY -->"
        )


def run(found: list[Snippet], names: dict[str, Any]) -> None:
    """The blocks of one page in the current folder, in order; ``names`` are Python's."""
    for snippet in found:
        check_syntax(snippet)
        if snippet.marker == "file":
            Path(snippet.note).write_text(snippet.code)
    for snippet in found:
        if snippet.marker:
            continue
        if snippet.language == "python":
            code = snippet.code.replace('"cuda"', '"cpu"')
            # The blank lines give a traceback the page's line numbers.
            exec(compile("\n" * (snippet.line - 1) + code, snippet.page, "exec"), names)
        elif snippet.language == "sh":
            for line in snippet.code.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                while words:
                    end = words.index("&&") if "&&" in words else len(words)
                    run_command(snippet, words[:end])
                    words = words[end + 1 :]
