"""A comparison of two models as one HTML page: heat maps of the tokens, changed answers, scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np

from monkey_model.evaluation.compare import TokenDistances
from monkey_model.evaluation.metrics import METRICS
from monkey_model.serving import page

_LONGEST_SIDE = 480  # of a picture on the page, in pixels
_PICTURES = 24  # whose own maps are on the page


def build_compare_page(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    distances: TokenDistances | None,
    answers: Mapping[str, Any] | None,
    most: int,
) -> str:
    """The page as HTML.

    Args:
        a: settings of A, as they are shown.
        b: those of B.
        distances: of the tokens.
        answers: what :func:`monkey_model.evaluation.compare.compare_answers` gives.
        most: changed answers to show.
    """
    names = [
        name
        for name in {**a, **b}
        if not name.endswith("_sha256") and (a.get(name), b.get(name)) != (None, None)
    ]
    data = {
        "settings": [
            {"name": name, "a": _text(a.get(name)), "b": _text(b.get(name))} for name in names
        ],
        "palette": matplotlib.colormaps["inferno"](np.arange(256), bytes=True)[:, :3].tolist(),
        "tokens": None if distances is None else _tokens(distances),
        "answers": None if answers is None else _answers(answers, most),
    }
    return page.build_page("evaluation", "compare.html", data)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _tokens(distances: TokenDistances) -> dict[str, Any]:
    summary = distances.summary()
    measures = {"relative_l2": distances.relative_l2, "cosine": distances.cosine}
    return {
        "grid": distances.grid,
        "labels": distances.labels,
        "side": math.isqrt(distances.relative_l2.shape[-1]),
        "pictures": len(distances.pictures),
        "summary": {name: summary[name] for name in ("relative_l2", "cosine", "by_crop")},
        "mean": {name: _short(values.mean(0).tolist()) for name, values in measures.items()},
        "each": [
            {
                **page.picture(path, _LONGEST_SIDE),
                **{name: _short(values[number].tolist()) for name, values in measures.items()},
                "total": summary["by_picture"][number]["relative_l2"],
            }
            for number, path in enumerate(distances.pictures[:_PICTURES])
        ],
    }


def _short(rows: list[list[float]]) -> list[list[float]]:
    """As few digits as a map needs."""
    return [[float(f"{value:.4g}") for value in row] for row in rows]


def _answers(answers: Mapping[str, Any], most: int) -> dict[str, Any]:
    changed = [
        {**one, "id": str(one["id"]), "images": [page.picture(i, _LONGEST_SIDE) for i in images]}
        for one in answers["changed"][:most]
        for images in [one["images"]]
    ]
    best = {name: METRICS[name].best if name in METRICS else 1.0 for name in answers["scores"]}
    return {**answers, "changed": changed, "count": len(answers["changed"]), "best": best}
