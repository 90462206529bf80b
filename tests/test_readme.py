"""README's figures are those of the runs that it names, and its commands are single lines."""

from __future__ import annotations

import re

from benchmarks.report import ROOT, updated


def test_figures_come_from_the_committed_run():
    readme = (ROOT / "README.md").read_text()
    runs = re.findall(r"<!-- benchmark run: (\S+) -->", readme)
    assert runs and all((ROOT / run).is_file() for run in runs)
    assert updated(readme) == readme, "run python -m benchmarks.report"
    assert updated(re.sub(r"(\d)\.(\d\d)x", r"9.99x", readme)) == readme


def test_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("https://") or (ROOT / link).exists(), link
