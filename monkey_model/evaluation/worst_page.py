"""The worst cases of an evaluation, with their pictures, as one HTML page."""

from __future__ import annotations

from collections import Counter
from typing import Any

from monkey_model.evaluation.evaluate import Scored
from monkey_model.evaluation.metrics import METRICS
from monkey_model.serving import page

_LONGEST_SIDE = 640  # of a picture on the page, in pixels; predictions can be without one
_BARS = 20


def build_worst_page(scored: Scored, title: str, about: dict[str, Any], most: int) -> str:
    """The page as HTML.

    Args:
        scored: the evaluation. Its first metric says which cases are the worst.
        title: of the page.
        about: settings, as they are shown.
        most: cases to show.
    """
    metric, values = next(iter(scored.scores.items()))
    best = METRICS[metric].best
    wrong = [number for number, value in enumerate(values) if value < best]
    wrong.sort(key=values.__getitem__)
    data = {
        "title": title,
        "about": {
            name: str(value)
            for name, value in about.items()
            if value is not None and not name.endswith("_sha256")
        },
        "scores": [
            {"name": name, "about": METRICS[name].about, "best": METRICS[name].best, **summary}
            for name, summary in scored.summary().items()
        ],
        "records": len(values),
        "bars": _bars([value / best for value in values]),
        "wrong": len(wrong),
        "cases": [_case(scored, number) for number in wrong[:most]],
    }
    return page.build_page("evaluation", "worst.html", data)


def _bars(shares: list[float]) -> list[int]:
    """How many scores there are in each of as many equal parts of 0 to 1."""
    counts = Counter(min(int(share * _BARS), _BARS - 1) for share in shares)
    return [counts[bar] for bar in range(_BARS)]


def _case(scored: Scored, number: int) -> dict[str, Any]:
    record = scored.records[number]
    return {
        "id": str(record.id),
        "question": record.question.text,
        "answer": scored.answers[number],
        "references": [
            {"text": text, "times": times} for text, times in Counter(record.references).items()
        ],
        "scores": [values[number] for values in scored.scores.values()],
        "pictures": [page.picture(str(image), _LONGEST_SIDE) for image in record.question.images],
    }
