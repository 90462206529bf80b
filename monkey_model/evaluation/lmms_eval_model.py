"""Monkey for lmms-eval, whose ``--model monkey`` finds it through an entry point of this package.

Source: the ``lmms`` interface of https://github.com/EvolvingLMMs-Lab/lmms-eval, 0.7.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from monkey_kernels.checks import check_positive_int
from monkey_model.evaluation.datasets import PROMPT
from monkey_model.serving.answer import Answerer, Question

#: Of ``generation_kwargs``: what greedy answers can do without.
_OF_SAMPLING = {"temperature": (None, 0, 0.0), "do_sample": (None, False), "num_beams": (None, 1)}


def manifest() -> ModelManifest:
    """What the entry point gives lmms-eval."""
    return ModelManifest(model_id="monkey", simple_class_path=f"{__name__}.Monkey")


class Monkey(lmms):
    """A checkpoint that answers lmms-eval's requests, greedily.

    Args:
        checkpoint: directory, also of what fine-tuning wrote.
        device: to run on; where several processes run, each takes its own.
        dtype: such as ``"bfloat16"``; by default that, on the CPU float32.
        batch_size: questions at a time.
        prompt: what follows the picture, ``{}`` being a task's text.
        chat: whether to ask in ChatML.
        allow_pickle: as in :func:`monkey_model.checkpoint.load_model`.
        max_batch_size: lmms-eval's, not used.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        prompt: str = PROMPT,
        chat: bool = False,
        allow_pickle: bool = False,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = int(batch_size)
        check_positive_int("batch_size", self.batch_size)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=self.device.type == "cpu")
            self.device = self.accelerator.device
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
        if dtype is None:
            dtype = "float32" if self.device.type == "cpu" else "bfloat16"
        self.answerer = Answerer.from_pretrained(
            checkpoint,
            device=self.device,
            dtype=getattr(torch, dtype),
            allow_pickle=allow_pickle,
            chat=chat,
            template=prompt,
        )

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def world_size(self) -> int:
        return self._world_size

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers to requests, in their order.

        Raises:
            ValueError: a task that samples or searches beams; a picture that cannot be read.
        """
        answers: list[str] = []
        arguments = [request.args for request in requests]
        for (longest, ends), group in groupby(arguments, lambda one: _options(one[1])):
            same = list(group)
            self.answerer.max_new_tokens = longest
            for start in range(0, len(same), self.batch_size):
                batch = [self._question(*one) for one in same[start : start + self.batch_size]]
                answers += [_shortened(text, ends) for text in self.answerer.answer(batch)]
        return answers

    def _question(
        self,
        text: str,
        options: Any,
        pictures_of: Callable[[Any], Sequence[Any]],
        number: int,
        task: str,
        split: str,
    ) -> Question:
        pictures = pictures_of(self.task_dict[task][split][number]) or []
        return Question(text, tuple(pictures), f"{task} {number}")

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("monkey answers questions; it scores no given continuations")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        raise NotImplementedError("monkey answers one question at a time, not rounds of them")


def _options(given: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """Longest answer, and what ends one, of a task's ``generation_kwargs``."""
    for name, greedy in _OF_SAMPLING.items():
        if given.get(name) not in greedy:
            raise ValueError(f"monkey answers greedily: {name} must be {greedy[-1]}; got "
                             f"{given[name]!r} (--gen_kwargs {name}={greedy[-1]})")  # fmt: skip
    ends = given.get("until") or ()
    return int(given.get("max_new_tokens", 100)), (ends,) if isinstance(ends, str) else tuple(ends)


def _shortened(answer: str, ends: Sequence[str]) -> str:
    for end in filter(None, ends):
        answer = answer.partition(end)[0]
    return answer.strip()
