"""Markdown of a benchmark run, and README's copy of it.

``python -m benchmarks.report`` rewrites the block of README.md that names a run; a test fails while
the two differ, so that no figure there is typed by hand.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r"(<!-- benchmark run: (\S+) -->\n)(.*?)(<!-- end of benchmark run -->)", re.S)


def _error(info: dict[str, Any]) -> str:
    if "relative L2 against upstream" in info:
        return f"{info['relative L2 against upstream']:.1e} relative L2"
    if "share of values off" in info:
        return f"{100 * info['share of values off']:.2f} % of values off"
    return ""


def render(path: Path) -> str:
    """A table with a row for each provider: how much faster than the group's baseline, its error.

    The baseline, "upstream" where a group has it, else its slowest provider, has no row. There are
    no times on a CPU, only ratios: times of a shared machine are nobody's measure.
    """
    run = json.loads(path.read_text())
    machine = run["machine_info"]
    where = machine["gpu"] or f"{machine['cpu']['brand_raw']}, {machine['cpu']['threads']} threads"
    groups: dict[str, list[dict[str, Any]]] = {}
    for benchmark in run["benchmarks"]:
        groups.setdefault(benchmark["group"], []).append(benchmark)
    lines = [
        f"{where}; torch {machine['torch']}, Triton {machine['triton']}; commit "
        f"{run['commit_info']['id'][:7]}, {run['datetime'][:10]}.",
        "",
        "| what | provider | speed | against upstream's result |",
        "|---|---|---|---|",
    ]
    for group, members in groups.items():
        medians = {m["params"]["provider"]: m["stats"]["median"] for m in members}
        baseline = "upstream" if "upstream" in medians else max(medians, key=medians.__getitem__)
        for member in members:
            provider = member["params"]["provider"]
            if provider == baseline:
                continue
            speed = f"{medians[baseline] / medians[provider]:.2f}x {baseline}"
            lines.append(f"| {group} | {provider} | {speed} | {_error(member['extra_info'])} |")
    return "\n".join(lines) + "\n"


def updated(readme: str) -> str:
    """``readme`` with every block rendered from the run that it names."""
    return _BLOCK.sub(lambda m: m[1] + render(ROOT / m[2]) + m[4], readme)


if __name__ == "__main__":
    README = ROOT / "README.md"
    README.write_text(updated(README.read_text()))
