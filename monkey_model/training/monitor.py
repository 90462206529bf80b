"""What a run shows while it goes on: how fast it is, what it waits for, and what the model answers.

Nothing here draws a random number or changes the model's mode: a run that is watched is the run.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from monkey_model.files import writing
from monkey_model.inputs.images import load_image
from monkey_model.training.conversations import Conversation, encode_conversation
from monkey_model.training.token_cache import TokenCache

#: Answers to ``sample_data``, a line for each, beside the checkpoints.
SAMPLES = "samples.jsonl"
MOST_SAMPLES = 100  # more of them is an evaluation

_SHOWN_SIDE = 448  # pixels of the longer side of a picture in TensorBoard


class Speed:
    """Throughput of steps, and the share of their time that they waited for their data.

    A step is from the demand for its batches to its last optimizer update; evaluation and saving do
    not count.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._began: float | None = None
        self._clear()

    def _clear(self) -> None:
        self._elapsed = self._waited = 0.0
        self._counts: Tensor | int = 0  # conversations, tokens, images: on the device, unread

    def start(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A step begins, on batches from here: the iterator to take them from."""
        if self._began is None:
            self._began = self._clock()
        while True:
            asked = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._waited += self._clock() - asked
            self._counts = self._counts + count(batch)
            yield batch

    def stop(self) -> None:
        """The step has ended."""
        if self._began is not None:
            self._elapsed += self._clock() - self._began
            self._began = None

    def report(self, accelerator: Accelerator) -> dict[str, float]:
        """What all processes did since the last report, which all of them have to ask for.

        Returns:
            ``samples_per_second`` (conversations), ``tokens_per_second`` and ``images_per_second``
            of all processes together; ``waiting_share``, 0 to 1, their mean;
            ``peak_memory_gib`` of the largest: the device's, or on a CPU the process's.
        """
        device = accelerator.device
        times = torch.tensor([self._elapsed, self._waited, peak_memory(device)], device=device)
        counts = torch.as_tensor(self._counts, device=device).expand(3)
        rows = accelerator.gather(torch.cat([counts.float(), times])[None])
        samples, tokens, images, elapsed, waited, _ = rows.mean(0).tolist()
        self._clear()
        if not elapsed:
            return {}
        values = {
            "samples_per_second": samples * len(rows) / elapsed,
            "tokens_per_second": tokens * len(rows) / elapsed,
            "images_per_second": images * len(rows) / elapsed,
            "waiting_share": waited / elapsed,
            "peak_memory_gib": rows[:, 5].max().item() / 2**30,
        }
        return {name: float(f"{value:.4g}") for name, value in values.items()}


def count(batch: Mapping[str, Tensor]) -> Tensor:
    """Conversations, tokens that are no padding, and images of a batch, [3], on its device."""
    ids = batch["input_ids"]
    if "position_ids" in batch:  # packed: -1 is padding
        positions = batch["position_ids"]
        samples, tokens = (positions == 0).sum(), (positions >= 0).sum()
    else:
        samples, tokens = ids.new_tensor(len(ids)), batch["attention_mask"].sum()
    images = batch.get("pixel_values", batch.get("visual_tokens", ()))
    return torch.stack([samples, tokens, ids.new_tensor(len(images))])


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on a GPU; elsewhere, that the process has taken."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class SampleAnswers(TrainerCallback):
    """Answers the same few questions, greedily, at each evaluation.

    The question of a conversation is all before its last answer. Answers go to :data:`SAMPLES` in
    ``output_dir``, a line each, and to TensorBoard, with their pictures, where the run reports to
    it. Every process answers every question, so that a model that is sharded over them can.

    Args:
        conversations: up to :data:`MOST_SAMPLES`.
        processor: of the model.
        max_length: in tokens, of a question and its answer.
        max_new_tokens: of an answer.

    Raises:
        ValueError: too many conversations, or one that is too long, named.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        max_length: int,
        max_new_tokens: int,
    ) -> None:
        if len(conversations) > MOST_SAMPLES:
            raise ValueError(
                f"sample_data must hold at most {MOST_SAMPLES} conversations, which are answered "
                f"at each evaluation; got {len(conversations)}"
            )
        self.conversations = conversations
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.accelerator: Accelerator | None = None
        self.boards: Sequence[TensorBoardCallback] = ()
        self._cache: TokenCache | None = None
        self._shown = False
        self._prompts = []
        for each in conversations:
            question = Conversation(each.where, each.turns[:-1], each.images)
            try:
                ids, _ = encode_conversation(
                    question, processor.tokenizer, max_length - max_new_tokens
                )
            except ValueError as error:
                raise ValueError(
                    f"sample_data: {each.where}: {error} less sample_tokens, {max_new_tokens}"
                ) from None
            self._prompts.append(ids)

    def attach(self, trainer: Any, cache: TokenCache | None) -> None:
        """Use a Trainer's precision and its TensorBoard, and the tokens of ``cache``, if any.

        A model that ZeRO-3 has sharded has whole weights only where training has run them.
        """
        self._cache = cache
        self.accelerator = trainer.accelerator
        callbacks = trainer.callback_handler.callbacks
        self.boards = [each for each in callbacks if isinstance(each, TensorBoardCallback)]

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by every process."""
        model: nn.Module = kwargs["model"]
        training = model.training
        model.eval()
        answers = [self._answer(model, args.device, n) for n in range(len(self._prompts))]
        model.train(training)
        if not state.is_world_process_zero:
            return
        self.write(Path(str(args.output_dir), SAMPLES), state, answers)
        for board in self.boards:
            if board.tb_writer is not None:
                self._show(board.tb_writer, state.global_step, answers)

    @torch.no_grad()
    def _answer(self, model: Any, device: torch.device, number: int) -> str:
        conversation, ids = self.conversations[number], self._prompts[number]
        tokenizer = self.processor.tokenizer
        input_ids = torch.tensor([ids], device=device)
        inputs: dict[str, Any] = {"input_ids": input_ids}
        if images := list(conversation.images):
            try:
                if self._cache is not None:
                    tokens = torch.stack([self._cache.read(image) for image in images])
                    inputs["visual_tokens"] = tokens.to(device)
                else:
                    pixels = self.processor.image_processor(images)["pixel_values"]
                    inputs["pixel_values"] = pixels.to(device)
            except (OSError, ValueError) as error:
                raise ValueError(f"sample_data: {conversation.where}: {error}") from error
        assert self.accelerator is not None
        with self.accelerator.autocast():
            output = model.generate(
                **inputs,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                num_beams=1,
                use_cache=True,
                max_new_tokens=self.max_new_tokens,
                pad_token_id=tokenizer.eod_id,
                eos_token_id=[tokenizer.eod_id, tokenizer.im_end_id],
            )
        new = output[0, len(ids) :].tolist()
        return str(tokenizer.decode(new, skip_special_tokens=True)).strip()

    def write(self, path: Path, state: TrainerState, answers: Sequence[str]) -> None:
        """Append a line for each answer.

        Raises:
            WriteError: they cannot be written.
        """
        lines = [
            json.dumps(
                {
                    "step": state.global_step,
                    "record": conversation.where,
                    "question": "".join(conversation.turns[:-1]),
                    "images": list(conversation.images),
                    "expected": conversation.turns[-1],
                    "answer": answer,
                },
                ensure_ascii=False,
            )
            for conversation, answer in zip(self.conversations, answers, strict=True)
        ]
        with writing(path):
            # A run that was killed as it wrote has left half a line.
            whole = not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")
            with open(path, "a", encoding="utf-8") as file:
                file.write("" if whole else "\n")
                file.write("\n".join(lines) + "\n")

    def _show(self, writer: Any, step: int, answers: Sequence[str]) -> None:
        for number, (conversation, answer) in enumerate(
            zip(self.conversations, answers, strict=True)
        ):
            # As code, in which Markdown finds nothing to format, however it is indented.
            rows = (
                ("question", "".join(conversation.turns[:-1])),
                ("expected", conversation.turns[-1]),
                ("answer", answer),
            )
            text = "\n\n".join(f"{name}\n\n    " + t.replace("\n", "\n    ") for name, t in rows)
            writer.add_text(f"samples/{number}", text, step)
            if not self._shown:  # they stay the same
                for place, image in enumerate(conversation.images):
                    writer.add_image(f"samples/{number}.{place}", _small(image), step)
        self._shown = True
        writer.flush()


def _small(image: str) -> Tensor:
    """A picture [3, H, W] uint8, its longer side at most ``_SHOWN_SIDE`` pixels."""
    pixels = load_image(image).permute(2, 0, 1)
    scale = min(1.0, _SHOWN_SIDE / max(pixels.shape[1:]))
    size = [max(1, round(side * scale)) for side in pixels.shape[1:]]
    shrunk = F.interpolate(pixels[None].float(), size=size, mode="bilinear", antialias=True)
    return shrunk[0].round().clamp(0, 255).to(torch.uint8)
