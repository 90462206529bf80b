"""Two encoders, or models, side by side: how far their tokens are apart, which answers changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from monkey_model.checkpoint import load_visual
from monkey_model.crop_settings import CropSettings
from monkey_model.evaluation.evaluate import RECORDS, SCORES, Answered, mean_and_error
from monkey_model.files import json_lines, list_problems, read_json
from monkey_model.serving.answer import Answerer
from monkey_model.serving.crop_pictures import crop_labels
from monkey_model.visual import VisionTransformer

# ---- Tokens -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One of the two, loaded.

    Args:
        encoder: its encoder.
        cut: the crops [crops, 3, S, S] of a picture, as this side reads it.
        answerer: of a whole model.
    """

    encoder: VisionTransformer
    cut: Callable[[str], Tensor]
    answerer: Answerer | None = None

    @torch.inference_mode()
    def tokens(self, picture: str) -> Tensor:
        """Visual tokens [crops, queries, width] on the CPU, in the encoder's dtype.

        Raises:
            OSError, ValueError: a picture that cannot be read; tokens that are not finite.
        """
        tokens = self.encoder.encode_crops(self.cut(picture)).cpu()
        if not tokens.isfinite().all():
            raise ValueError(f"the tokens of {picture} are not finite")
        return tokens


def open_side(
    checkpoint: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    whole: bool,
    allow_pickle: bool = False,
    cutting: Mapping[str, str] = MappingProxyType({}),
    **settings: Any,
) -> Side:
    """Load one of the two.

    Args:
        checkpoint: directory, also of an adapter that fine-tuning wrote.
        device: to run on.
        dtype: of weights and arithmetic.
        whole: whether to load the language model, too; an adapter needs it.
        allow_pickle: as in :func:`monkey_model.checkpoint.load_model`.
        cutting: ``interpolation`` and ``fit``, where they are not the checkpoint's.
        settings: of :meth:`Answerer.from_pretrained`.

    Raises:
        OSError, ValueError: a checkpoint that is not there, or not whole; settings that do not
            exist.
    """
    CropSettings(**dict[str, Any](cutting))  # says what is wrong with them
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "allow_pickle": allow_pickle}
    if not whole and not Path(checkpoint, "adapter_config.json").is_file():
        encoder = load_visual(checkpoint, **{**loading, **cutting})
        return Side(encoder, lambda picture: encoder.extract_crops([picture]))
    answerer = Answerer.from_pretrained(checkpoint, **loading, **settings)
    process = answerer.processor.image_processor
    for name, value in cutting.items():
        setattr(process, name, value)
    return Side(
        answerer.model.transformer.visual,
        lambda picture: process([picture])["pixel_values"].flatten(0, 1),
        answerer,
    )


@dataclass(frozen=True)
class TokenDistances:
    """How far the tokens of two encoders are apart.

    Args:
        pictures: what they encoded.
        labels: of an image's crops.
        grid: (rows, columns) of local crops.
        relative_l2: [pictures, crops, queries], |a - b| / |a| of each token.
        cosine: [pictures, crops, queries], 1 - cosine of the angle between the two tokens.
        crop_l2: [pictures, crops], |a - b| / |a| of a crop's tokens together.
        picture_l2: [pictures], of all the picture's tokens.
    """

    pictures: Sequence[str]
    labels: Sequence[str]
    grid: tuple[int, int]
    relative_l2: Tensor
    cosine: Tensor
    crop_l2: Tensor
    picture_l2: Tensor

    def summary(self) -> dict[str, Any]:
        """For JSON: of all, by crop, by position (mean of the pictures) and by picture."""
        pictures: list[dict[str, Any]] = []
        for number, path in enumerate(self.pictures):
            crop, query = divmod(int(self.relative_l2[number].argmax()), self.relative_l2.shape[-1])
            pictures.append(
                {
                    "picture": path,
                    "relative_l2": float(self.picture_l2[number]),
                    "cosine": float(self.cosine[number].mean()),
                    "farthest": {
                        "crop": crop,
                        "query": query,
                        "relative_l2": float(self.relative_l2[number, crop, query]),
                    },
                }
            )
        return {
            "relative_l2": float(self.picture_l2.mean()),
            "cosine": float(self.cosine.mean()),
            "by_crop": [
                {
                    "crop": label,
                    "relative_l2": float(self.crop_l2[:, crop].mean()),
                    "largest_relative_l2": float(self.crop_l2[:, crop].max()),
                    "cosine": float(self.cosine[:, crop].mean()),
                }
                for crop, label in enumerate(self.labels)
            ],
            "by_position": {
                "relative_l2": self.relative_l2.mean(0).tolist(),
                "cosine": self.cosine.mean(0).tolist(),
            },
            "by_picture": pictures,
        }


def token_distances(
    pictures: Sequence[str],
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    grid: tuple[int, int],
    adapters: Sequence[int | None],
) -> TokenDistances:
    """Distances of the tokens of the same pictures.

    Args:
        pictures: their names.
        a: tokens [crops, queries, width] of each, the ones to measure from.
        b: those of the other encoder.
        grid: (rows, columns) of local crops.
        adapters: of each crop, for their names.

    Raises:
        ValueError: the encoders cut pictures, or query crops, in different ways.
    """
    measured = []
    for picture, one, other in zip(pictures, a, b, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                "A and B must have the same number of crops, queries and channels; "
                f"{picture} has tokens {list(one.shape)} and {list(other.shape)}"
            )
        one, other = one.double(), other.double()
        apart, length = (one - other).norm(dim=-1), one.norm(dim=-1)
        cosine = 1 - torch.cosine_similarity(one, other, dim=-1)
        measured.append(
            (
                _ratio(apart, length),
                cosine.clamp(min=0),  # rounding
                _ratio(apart.norm(dim=-1), length.norm(dim=-1)),
                _ratio(apart.norm(), length.norm()),
            )
        )
    labels = crop_labels(grid, adapters)
    return TokenDistances(pictures, labels, grid, *map(torch.stack, zip(*measured, strict=True)))


def _ratio(apart: Tensor, length: Tensor) -> Tensor:
    return apart / length.clamp(min=1e-30)


# ---- Answers ------------------------------------------------------------------------------------


def read_evaluation(folder: Path) -> tuple[dict[str, Any], Answered]:
    """The settings and answers of a folder that :func:`write_results` wrote.

    Raises:
        OSError: a file cannot be read.
        ValueError: it holds something else.
    """
    settings = read_json(folder / SCORES).get("settings")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / SCORES} must have an object 'settings'")
    lines: dict[str | int, dict[str, Any]] = {}
    path = folder / RECORDS
    for number, line in json_lines(path.read_bytes()):
        if not isinstance(line, dict) or not {
            "id", "question", "images", "answer", "references", "scores"
        } <= set(line):  # fmt: skip
            raise ValueError(f"{path}, line {number} must be a record of monkey evaluate")
        lines[line["id"]] = line
    if not lines:
        raise ValueError(f"{path} must have a record; it has none")

    def column(key: str) -> dict[str | int, Any]:
        return {name: line[key] for name, line in lines.items()}

    metrics = next(iter(lines.values()))["scores"]
    scores = {metric: {name: line["scores"][metric] for name, line in lines.items()}
              for metric in metrics}  # fmt: skip
    return settings, Answered(
        column("question"), column("answer"), column("references"), scores, column("images")
    )


def compare_answers(a: Answered, b: Answered) -> dict[str, Any]:
    """Scores side by side, and the answers that changed, those that became worse first.

    Raises:
        ValueError: the two answered different questions; the message names one.
    """
    problems = [f"only one of them has {name!r}" for name in a.answers.keys() ^ b.answers.keys()]
    problems += [
        f"{name!r} asks {a.questions[name]!r} and {b.questions[name]!r}"
        for name in a.answers
        if name in b.answers and a.questions[name] != b.questions[name]
    ]
    problems += [
        f"{name!r} has other right answers"
        for name in a.answers
        if name in b.answers and list(a.references[name]) != list(b.references[name])
    ]
    if problems:
        raise ValueError(f"A and B must answer the same questions: {list_problems(problems, 3)}")
    metrics = [metric for metric in a.scores if metric in b.scores]
    scores: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        pairs = [(a.scores[metric][name], b.scores[metric][name]) for name in a.answers]
        difference = mean_and_error([other - one for one, other in pairs])
        scores[metric] = {
            "a": math.fsum(one for one, _ in pairs) / len(pairs),
            "b": math.fsum(other for _, other in pairs) / len(pairs),
            "difference": difference["mean"],
            "standard_error": difference["standard_error"],
            "better": sum(other > one for one, other in pairs),
            "worse": sum(other < one for one, other in pairs),
        }
    changed: list[dict[str, Any]] = [
        {
            "id": name,
            "question": a.questions[name],
            "images": list(a.images[name]),
            "references": list(a.references[name]),
            "a": a.answers[name],
            "b": b.answers[name],
            "scores": {metric: [a.scores[metric][name], b.scores[metric][name]]
                       for metric in metrics},
        }
        for name in a.answers
        if a.answers[name] != b.answers[name]
    ]  # fmt: skip
    if metrics:
        changed.sort(key=lambda one: one["scores"][metrics[0]][1] - one["scores"][metrics[0]][0])
    return {"questions": len(a.answers), "scores": scores, "changed": changed}
