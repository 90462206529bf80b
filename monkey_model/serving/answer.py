"""Ask a Monkey model about pictures: one question, or a file of them that can be resumed."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from monkey_kernels.checks import check_positive_int
from monkey_model.chat import stream_texts
from monkey_model.checkpoint import load_model, load_processor
from monkey_model.files import (
    check_directory,
    json_lines,
    list_problems,
    parse_json,
    read_json,
    read_text,
    release_lock,
    take_lock,
    writing,
)
from monkey_model.inputs.fetch import SCHEME
from monkey_model.inputs.prompts import GROUNDING, check_no_surrogates
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.serving.picture_cache import PictureCache, Shown
from monkey_model.serving.pipeline import Reserve, in_batches, read_ahead
from monkey_model.training.peft_model import adapter_weights, load_peft_model
from monkey_model.training.peft_presets import quantization_config


@dataclass(frozen=True)
class Question:
    """A question about pictures.

    Args:
        text: the question.
        images: anything that :func:`monkey_model.inputs.images.load_image` takes.
        id: what an answer file calls it.
    """

    text: str
    images: tuple[Any, ...]
    id: str | int = ""


class Answerer:
    """A model and its processor, ready to answer.

    Args:
        model: a :class:`monkey_model.modeling_monkey.MonkeyLMHeadModel`, also in peft's wrapper.
        processor: of the same checkpoint.
        chat: whether questions are put in ChatML, for a model trained on it, instead of upstream's
            ``<img>...</img> QUESTION Answer: ``.
        max_new_tokens: longest answer.
        template: what follows the pictures where it is not ChatML, ``{}`` being the question.
    """

    def __init__(
        self,
        model: Any,
        processor: MonkeyProcessor,
        *,
        chat: bool = False,
        max_new_tokens: int = 512,
        template: str = " {} Answer: ",
    ) -> None:
        check_positive_int("max_new_tokens", max_new_tokens)
        self.model = model.eval()
        self.processor = processor
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        self.template = template

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        device_map: str | None = None,
        quantization: str | None = None,
        allow_pickle: bool = False,
        **settings: Any,
    ) -> Answerer:
        """Load a whole checkpoint, or what fine-tuning in mode ``"lora"`` wrote.

        Args:
            checkpoint: directory. The latter names the checkpoint that it belongs to.
            device: to run on.
            dtype: of weights and arithmetic.
            device_map: accelerate's, such as ``"auto"``, in place of ``device``.
            quantization: ``"4bit"`` or ``"8bit"``: of the weights, all but the head's, the
                resampler's and the adapters'. A LoRA adapter is then not merged.
            allow_pickle: as in :func:`monkey_model.checkpoint.load_model`, of adapters too.
            settings: chat, max_new_tokens and template.

        Raises:
            OSError, ValueError: a checkpoint that is not there, or not whole; a ``quantization``
                that cannot run.
            ImportError: a ``quantization`` without bitsandbytes.
        """
        directory = Path(checkpoint)
        check_directory("checkpoint", directory)
        loading: dict[str, Any] = {"dtype": dtype, "allow_pickle": allow_pickle}
        if quantization is not None:
            only = torch.device(device) if device_map is None else None
            loading["quantization_config"] = quantization_config(quantization, dtype, only)
        if device_map is not None or quantization is not None:
            loading["device_map"] = device_map or {"": device}
        adapter = directory / "adapter_config.json"
        if adapter.is_file():
            name = "base_model_name_or_path"
            base = read_json(adapter).get(name)
            if not isinstance(base, str):
                raise ValueError(f"{adapter} must name a directory in {name!r}; got {base!r}")
            adapter_weights(directory, allow_pickle)
            model: Any = load_model(base, f"{name} of the adapter", **loading)
            model = load_peft_model(model, directory, allow_pickle=allow_pickle)
            if quantization is None:  # it would be rounded with the weights
                model = model.merge_and_unload()
        else:
            model = load_model(directory, **loading)
        if "device_map" not in loading:
            model = model.to(device=device, dtype=dtype)
        return cls(model, load_processor(directory), **settings)

    def read_images(self, question: Question) -> list[Tensor]:
        """The crops of each picture, [1, crops_per_image, 3, crop_size, crop_size].

        Raises:
            TypeError, ValueError, OSError: a picture that cannot be read.
        """
        process = self.processor.image_processor
        return [process([image])["pixel_values"] for image in question.images]

    @torch.inference_mode()
    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """The visual tokens [1, image_span, width], on the CPU, of each of :meth:`read_images`."""
        visual = self.model.transformer.visual
        crops = torch.cat(list(images)).to(self.model.device).flatten(0, 1)
        tokens = visual.encode_crops(crops).cpu()
        return list(tokens.view(len(images), visual.crop_settings.image_span, -1).split(1))

    def prompt(self, question: Question) -> str:
        """The text for the tokenizer. Special tokens in a question are plain text but for boxes."""
        if not self.chat:
            text = self.processor.tokenizer.escape(question.text, keep=GROUNDING)
            return "<img></img>" * len(question.images) + self.template.replace("{}", text)
        parts: list[dict[str, str]] = [{"type": "image"} for _ in question.images]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]
        return self.processor.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )

    @torch.inference_mode()
    def answer(
        self, questions: Sequence[Question], images: Sequence[Sequence[Tensor]] | None = None
    ) -> list[str]:
        """Greedy answers, as one batch.

        Args:
            questions: what to answer.
            images: what :meth:`read_images` gave for each, if it was called already, or what
                :meth:`encode` made of it.

        Raises:
            TypeError, ValueError, OSError: a picture that cannot be read, or a text that cannot be
                tokenised.
        """
        prompts, output = self.generate(questions, images)
        new = output.sequences[:, prompts.shape[1] :].cpu()
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def stream(self, prompt: str, images: Sequence[Tensor], *, tags: bool = False) -> Iterator[str]:
        """The greedy answer to a prompt as it grows: a text for each token, the last one whole.

        Args:
            prompt: such as :meth:`prompt` returns.
            images: what :meth:`read_images` gave for its pictures.
            tags: whether ``<ref>``, ``<box>`` and ``<quad>`` stay in the text; the last one is
                without them what :meth:`answer` returns.

        Raises:
            ValueError: a prompt that cannot be tokenised.
        """
        tokenizer = self.processor.tokenizer
        inputs = self._inputs([prompt], images)

        def read(ids: list[int]) -> str:
            words = [id_ for id_ in ids if id_ not in inputs["eos_token_id"]]
            return str(tokenizer.decode(words, skip_special_tokens=not tags)).strip()

        return stream_texts(self.model.generate, inputs, read)

    def generate(
        self, questions: Sequence[Question], images: Sequence[Sequence[Tensor]] | None = None
    ) -> tuple[Tensor, Any]:
        """The prompts' ids [B, T], padded on the left, and all that ``model.generate`` returns.

        The arguments and errors are those of :meth:`answer`.
        """
        if images is None:
            images = [self.read_images(question) for question in questions]
        prompts = [self.prompt(question) for question in questions]
        inputs = self._inputs(prompts, [pixels for row in images for pixels in row])
        output = self.model.generate(**inputs, return_dict_in_generate=True)
        return inputs["input_ids"], output

    def _inputs(self, prompts: list[str], images: Sequence[Tensor]) -> dict[str, Any]:
        """The arguments of ``model.generate`` for a batch of prompts with these pictures."""
        tokenizer, device = self.processor.tokenizer, self.model.device
        inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
        name = "visual_tokens" if images and images[0].dim() == 3 else "pixel_values"
        return {
            **inputs.to(device),
            name: torch.cat(list(images)).to(device) if images else None,
            "use_cache": True,  # the published config.json says false
            "do_sample": False,
            "num_beams": 1,
            "min_new_tokens": 1,
            "max_new_tokens": self.max_new_tokens,
            "pad_token_id": tokenizer.eod_id,
            "eos_token_id": [tokenizer.eod_id, tokenizer.im_end_id],
        }


def read_questions(
    path: str | Path, image_root: str | Path | None = None
) -> tuple[list[Question], list[str]]:
    """The questions of a JSONL file, and what is wrong with the other lines.

    A line is ``{"image": path, "question": text}``, or ``"images"`` with a list of paths; its
    ``"id"`` (a string or a number) is by default the number of its line.

    Args:
        path: the file.
        image_root: folder of relative paths; by default the file's own.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    questions: list[Question] = []
    problems: list[str] = []
    lines: dict[str | int, int] = {}
    for number, record in json_lines(read_text(path)):
        try:
            question = read_question(record, number, root)
            if question.id in lines:
                raise ValueError(f"id {question.id!r} must differ from that of line "
                                 f"{lines[question.id]}")  # fmt: skip
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
            continue
        lines[question.id] = number
        questions.append(question)
    return questions, problems


def read_question(record: Any, name: str | int, root: Path) -> Question:
    """The question that a record ``{"image" or "images", "question", "id"}`` asks.

    Args:
        record: as :func:`monkey_model.files.parse_json` gives it, or its error.
        name: the question's id, if the record has none.
        root: folder of relative paths.

    Raises:
        ValueError: it is no such record.
    """
    if isinstance(record, ValueError):
        raise ValueError(f"must be a JSON object: {record}")
    if not isinstance(record, dict):
        raise ValueError(f"must be a JSON object; got {type(record).__name__}")
    if ("image" in record) == ("images" in record):
        raise ValueError(f"must have either 'image' or 'images'; got keys {sorted(record)}")
    images = record["images"] if "images" in record else [record["image"]]
    if not isinstance(images, list) or not all(i and isinstance(i, str) for i in images):
        raise ValueError(
            f"'image' must be a path, 'images' a list of paths; got {reprlib.repr(images)}"
        )
    for image in images:
        if SCHEME.match(image):
            raise ValueError(f"'image' must be a file, as nothing is fetched; got {image!r}")
    text = record.get("question")
    if not isinstance(text, str):
        raise ValueError(f"'question' must be a string; got {reprlib.repr(text)}")
    check_no_surrogates("'question'", text)
    name = record.get("id", name)
    if type(name) not in (str, int):
        raise ValueError(f"'id' must be a string or an integer; got {reprlib.repr(name)}")
    check_no_surrogates("'id'", str(name))
    return Question(text, tuple(str(root / image) for image in images), name)


def _is_something_else(torn: bytes) -> bool:
    """Whether a last line without its end is whole JSON all the same, and no answer."""
    try:
        return not _is_answer(parse_json(torn))
    except ValueError:
        return False


def unanswered(
    questions: Sequence[Question], path: str | Path, checkpoint: str | None = None
) -> list[Question]:
    """The questions that an answer file does not answer yet.

    A last line that was cut off in writing is removed from the file.

    Args:
        questions: with ids of their own.
        path: JSONL as :func:`answer_file` writes it; need not exist.
        checkpoint: whose answers they have to be, where they say so.

    Raises:
        OSError: the file cannot be read.
        TypeError: a question with a picture that is no path.
        ValueError: a line is no answer, is that of another checkpoint, or answers another question
            than that of its id: another text, or other pictures. The file is then left as it is.
    """
    path = Path(path)
    asked = {question.id: _recorded(question) for question in questions}
    if not path.exists():
        return list(questions)
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    torn = content[len(whole) :]
    answered = {}
    for number, record in json_lines(whole):
        if not _is_answer(record):
            got = (
                f": {record}" if isinstance(record, ValueError) else f"; got {reprlib.repr(record)}"
            )
            raise ValueError(
                f"{path}, line {number} must be an answer, with 'id', 'images', 'question' and "
                f"'answer'{got}"
            )
        whose = record.get("checkpoint", checkpoint)
        if checkpoint is not None and whose != checkpoint:
            raise ValueError(
                f"{path} has answers of the checkpoint {whose}, not of {checkpoint}: write to "
                "another file"
            )
        answered[record["id"]] = record
    begin = b'{"id": '
    if not torn.startswith(begin[: len(torn)]) or _is_something_else(torn):
        raise ValueError(
            f"{path} must end with an answer, or a part of one; got "
            f"{torn[:60].decode(errors='replace')!r}"
        )
    problems = [
        f"by the id {name!r} it has {key} {answered[name][key]!r}, not {record[key]!r}"
        for name, record in asked.items()
        if name in answered
        for key in ("question", "images")
        if not _same(key, answered[name][key], record[key])
    ]
    if problems:
        raise ValueError(
            f"{path} answers other questions: {list_problems(problems, 5)}. Write to another file, "
            "or give each question an 'id' that stays with it: without one it is the number of its "
            "line"
        )
    if torn:
        os.truncate(path, len(whole))
    return [question for question in questions if question.id not in answered]


def _recorded(question: Question) -> dict[str, Any]:
    """What an answer file says of a question."""
    try:
        images = [os.fsdecode(image) for image in question.images]
    except TypeError:
        raise TypeError(
            f"questions must name their pictures by path, to be recorded; that of the id "
            f"{question.id!r} has others"
        ) from None
    return {"id": question.id, "images": images, "question": question.text}


def _is_answer(record: Any) -> bool:
    return (
        isinstance(record, dict)
        and type(record.get("id")) in (str, int)
        and isinstance(record.get("images"), list)
        and all(isinstance(image, str) for image in record["images"])
        and isinstance(record.get("question"), str)
        and isinstance(record.get("answer"), str)
    )


def _same(key: str, old: Any, new: Any) -> bool:
    """Whether two questions, or the paths of two lists of images, are the same."""
    if key == "images" and len(old) == len(new):
        old, new = ([os.path.realpath(image) for image in images] for images in (old, new))
    return old == new


def answer_record(question: Question, answer: str, checkpoint: str | None = None) -> bytes:
    """The line of an answer file: ``{"id", "images", "question", "answer", "checkpoint"}``.

    Raises:
        TypeError: a picture that is no path.
    """
    whose = {} if checkpoint is None else {"checkpoint": checkpoint}
    record = {**_recorded(question), "answer": answer, **whose}
    # A path that is no UTF-8 has half surrogates, and JSON the same escapes.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def answer_file(
    answerer: Answerer | Callable[[], Answerer],
    questions: Sequence[Question],
    out: str | Path,
    *,
    checkpoint: str | None = None,
    batch_size: int = 1,
    on_done: Callable[[int], None] = lambda count: None,
    on_problem: Callable[[str], None] = lambda message: None,
) -> int:
    """Answer the questions that ``out`` does not answer yet, and append to it, line by line.

    Args:
        answerer: who answers, or what makes it, which is called only if something is left to do.
        questions: with ids of their own.
        out: JSONL of ``{"id", "images", "question", "answer"}``. One process at a time writes it.
        checkpoint: what the answers say whose they are, if given.
        batch_size: questions at a time.
        on_done: called with the number of questions that are through, answered or not.
        on_problem: called with what is wrong with a question that cannot be answered.

    Returns:
        How many could not be answered.

    Raises:
        OSError: ``out`` cannot be written.
        TypeError: a question with a picture that is no path.
        ValueError: it holds something else than answers, answers to other questions, or those of
            another checkpoint; or another process is writing to it.
    """
    check_positive_int("batch_size", batch_size)
    out = Path(out)
    real = Path(os.path.realpath(out))
    lock = real.with_name(f".{real.name}.lock")
    with writing(out):
        real.parent.mkdir(parents=True, exist_ok=True)
        held = take_lock(lock, "a file of answers must have one writer", out)
    try:
        left = unanswered(questions, out, checkpoint)
        on_done(len(questions) - len(left))
        if not left:
            out.touch()
            return 0
        if not isinstance(answerer, Answerer):
            answerer = answerer()
        return _answer_left(answerer, left, out, checkpoint, batch_size, on_done, on_problem)
    finally:
        release_lock(lock, held)


def _answer_left(
    answerer: Answerer,
    left: Sequence[Question],
    out: Path,
    checkpoint: str | None,
    batch_size: int,
    on_done: Callable[[int], None],
    on_problem: Callable[[str], None],
) -> int:
    failed = 0
    pictures = PictureCache(
        lambda path: answerer.read_images(Question("", (path,)))[0], answerer.encode
    )

    def read(question: Question, _: Reserve) -> list[Shown]:
        return [pictures.read(os.fsdecode(image)) for image in question.images]

    # Unbuffered: each write is one call of the system, which appends all of it.
    with open(out, "ab", buffering=0) as file:
        rows = read_ahead(left, read)
        for batch in in_batches(rows, batch_size, lambda row: row[1].exception() is None):
            asked: list[Question] = []
            shown: list[list[Shown]] = []
            for question, future in batch:
                try:
                    shown.append(future.result())
                    asked.append(question)
                except (TypeError, ValueError, OSError) as error:
                    failed += 1
                    on_problem(f"id {question.id!r}: {error}")
            if asked:
                tokens = iter(pictures.tokens([picture for row in shown for picture in row]))
                images = [[next(tokens) for _ in row] for row in shown]
                for question, answer in zip(asked, answerer.answer(asked, images), strict=True):
                    file.write(answer_record(question, answer, checkpoint))
            on_done(len(batch))
    return failed
