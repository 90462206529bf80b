"""README's figures are those of the committed results, and its links lead somewhere."""

from __future__ import annotations

import re

import pytest

from benchmarks import record
from benchmarks.record import ROOT, newest_runs


@pytest.fixture(scope="module")
def runs():
    return newest_runs()


@pytest.mark.parametrize("page", record.PAGES, ids=lambda page: page.parent.name)
def test_figures_come_from_the_committed_results(page, runs):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- benchmarks: ([\w ]+) -->", text)
    assert (
        blocks
        == {
            ROOT: ["headline"],
            ROOT / "benchmarks": ["targets", "tables", "ahead of time"],
        }[page.parent]
    )
    assert record.updated(text, runs) == text, "run python -m benchmarks.record"
    tampered = re.sub(r"\d\.\d\dx", "9.99x", text)
    assert tampered != text
    assert record.updated(tampered, runs) == text


@pytest.mark.parametrize("page", record.PAGES, ids=lambda page: page.parent.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (page.parent / link).exists(), link
