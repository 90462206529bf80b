"""Upstream's conversation files to training batches: read, checked record by record, tokenised.

A file is a JSON array of records, or one record per line (JSONL)::

    {"id": "any", "conversations": [
        {"from": "user", "value": "<img>photo.jpg</img> What is this? Answer: "},
        {"from": "assistant", "value": "A harbour."}]}

The ids are those of upstream, with which the published checkpoints were trained: the texts of all
turns one after the other, nothing in between but an end-of-text token after each answer. Answers
and their end-of-text tokens carry a label, all else is ignored by the loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from monkey_kernels.checks import check_positive_int
from monkey_model.files import json_lines, list_problems, parse_json, parse_json_array, read_text
from monkey_model.inputs.fetch import SCHEME, redact
from monkey_model.inputs.picture_files import open_file, open_picture
from monkey_model.inputs.prompts import check_no_surrogates
from monkey_model.inputs.spans import find_spans, mask_spans

IGNORED = -100
ROLES = ("user", "assistant")

_IMAGE_TAGS = re.compile(r"(</?img>)")
_READERS = 16  # threads that open images: on a network file system each waits most of the time


class RecordErrors(ValueError):
    """What is wrong with the records of a file, each named."""

    def __init__(self, file: str | Path, problems: Sequence[str], records: int, limit: int) -> None:
        shown = list_problems(problems, limit, "\n  ")
        super().__init__(f"{file}: {len(problems)} of {records} records are bad\n  {shown}")
        self.problems = list(problems)


@dataclass(frozen=True)
class Conversation:
    """One checked record.

    Args:
        where: what errors call it: its line or index, and its id.
        turns: the texts, of user and assistant in turn.
        images: the files named in the user's texts, in order.
    """

    where: str
    turns: tuple[str, ...]
    images: tuple[str, ...]


def read_conversations(
    path: str | Path,
    *,
    image_root: str | Path | None = None,
    check_images: bool = True,
    max_errors: int = 20,
) -> list[Conversation]:
    """Read a file of conversations and check every record of it.

    Args:
        path: a JSON array, or JSONL; UTF-8.
        image_root: folder of relative image paths; by default the file's own.
        check_images: whether to open every image. Only its header is read: what is damaged further
            on is found when a batch is made.
        max_errors: how many bad records the error lists.

    Raises:
        OSError: the file cannot be read.
        RecordErrors: records that are no conversations, or whose images cannot be read; each with
            its line (JSONL) or index (JSON), its id and key, what was expected and what came.
        ValueError: no JSON, another form of it, or no record at all.
    """
    path = Path(path)
    root = path.parent if image_root is None else Path(image_root)
    conversations: list[Conversation] = []
    problems: list[str] = []
    for where, record in _records(path):
        if isinstance(record, ValueError):
            problems.append(f"{where} must be a JSON object: {record}")
            continue
        name = f"{where} (id {record['id']!r})" if _has_id(record) else where
        try:
            conversations.append(_conversation(name, record, root))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    count = len(conversations) + len(problems)
    if count == 0:
        raise ValueError(f"{path} must hold at least one conversation; got none")
    if check_images:
        problems += _unreadable_images(conversations)
    if problems:
        raise RecordErrors(path, problems, count, max_errors)
    return conversations


def _has_id(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("id"), (str, int))


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record stands, and the record, or why it is no JSON."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        try:
            records = parse_json_array(text)
        except ValueError as error:
            raise ValueError(f"{path} must be a JSON array: {error}") from None
        yield from ((f"record {index}", record) for index, record in enumerate(records))
        return
    _check_not_wrapped(path, text)
    yield from ((f"line {number}", record) for number, record in json_lines(text))


def _check_not_wrapped(path: Path, text: str) -> None:
    """Raise a ValueError for one object around all records: each of its lines would be an error."""
    try:
        content = parse_json(text)  # of JSONL it reads no more than the first line
    except ValueError:
        return
    lines = text.strip().count("\n") + 1
    if isinstance(content, dict) and (lines > 1 or "conversations" not in content):
        raise ValueError(
            f"{path} must be a JSON array of records, or have a record in each line; got one "
            f"object with keys {list_problems(list(content), 5, ', ') or 'none'}"
        )


def _conversation(where: str, record: Any, root: Path) -> Conversation:
    if not isinstance(record, dict):
        raise ValueError(f"must be an object; got {type(record).__name__}")
    turns = record.get("conversations")
    if not isinstance(turns, list):
        got = type(turns).__name__ if "conversations" in record else f"keys {sorted(record)}"
        raise ValueError(f"'conversations' must be a list of turns; got {got}")
    if not turns or len(turns) % 2:
        raise ValueError(
            "'conversations' must hold pairs of a user's and an assistant's turn; got "
            f"{len(turns)} turns"
        )
    texts, images = [], []
    for number, turn in enumerate(turns):
        key, role = f"conversations[{number}]", ROLES[number % 2]
        if not isinstance(turn, dict):
            raise ValueError(f"{key} must be an object; got {type(turn).__name__}")
        if turn.get("from") != role:
            got = repr(turn["from"]) if "from" in turn else f"keys {sorted(turn)}"
            raise ValueError(f"{key}['from'] must be {role!r}; got {got}")
        text = turn.get("value")
        if not isinstance(text, str):
            got = type(text).__name__ if "value" in turn else f"keys {sorted(turn)}"
            raise ValueError(f"{key}['value'] must be a string; got {got}")
        check_no_surrogates(f"{key}['value']", text)
        paths = _image_paths(f"{key}['value']", text)
        if paths and role == "assistant":
            raise ValueError(f"{key}['value'] must hold no <img>: images belong to the user")
        texts.append(text)
        images += [str(root / path) for path in paths]
    return Conversation(where, tuple(texts), tuple(images))


def _image_paths(key: str, text: str) -> list[str]:
    """The paths between ``<img>`` and ``</img>``."""
    parts = _IMAGE_TAGS.split(text)
    tags, paths = parts[1::2], parts[2::4]
    if tags != ["<img>", "</img>"] * (len(tags) // 2):
        raise ValueError(f"{key} must close each <img> with </img>; got {' '.join(tags)}")
    for path in paths:
        if not path.strip():
            raise ValueError(f"{key} must name a file in each <img>...</img>; got {path!r}")
        if SCHEME.match(path):
            raise ValueError(f"{key} must name files, not URLs; got {redact(path)!r}")
    return paths


def _unreadable_images(conversations: Iterable[Conversation]) -> list[str]:
    first_use: dict[str, str] = {}
    for conversation in conversations:
        for image in conversation.images:
            first_use.setdefault(image, conversation.where)
    with ThreadPoolExecutor(_READERS) as pool:
        reasons = pool.map(_why_unreadable, first_use)
        return [
            f"{where}: image {image!r} cannot be read: {reason}"
            for (image, where), reason in zip(first_use.items(), reasons, strict=True)
            if reason
        ]


def _why_unreadable(image: str) -> str | None:
    try:
        with open_file(image) as file:
            open_picture(file, header_only=True)
        return None
    except OSError as error:
        return error.strerror or str(error)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)


def encode_conversation(
    conversation: Conversation, tokenizer: Any, max_length: int, *, truncate_text: bool = False
) -> tuple[list[int], list[int]]:
    """Ids of a conversation and their labels, of equal length.

    Args:
        tokenizer: a :class:`monkey_model.tokenization_qwen.QWenTokenizer`.
        max_length: in tokens, of ids and labels alike.
        truncate_text: cut what is too long at its end, as upstream does, if that leaves every image
            whole and part of an answer to learn.

    Raises:
        ValueError: more than max_length tokens.
    """
    input_ids: list[int] = []
    labels: list[int] = []
    for number, text in enumerate(conversation.turns):
        ids = tokenizer(text).input_ids
        if ROLES[number % 2] == "assistant":
            ids = [*ids, tokenizer.eod_id]
            labels += ids
        else:
            labels += [IGNORED] * len(ids)
        input_ids += ids
    if len(input_ids) <= max_length:
        return input_ids, labels
    message = f"{len(input_ids)} tokens exceed model_max_length, {max_length}"
    if conversation.images:
        end = len(input_ids) - input_ids[::-1].index(tokenizer.img_end_id)
        if end > max_length:
            raise ValueError(f"{message}, and the last image ends at token {end}")
    if not truncate_text:
        raise ValueError(message)
    if all(label == IGNORED for label in labels[:max_length]):
        raise ValueError(f"{message}, and no answer begins before it")
    return input_ids[:max_length], labels[:max_length]


class ConversationDataset(Dataset[dict[str, Any]]):
    """Conversations, tokenised when asked for.

    Args:
        conversations: of :func:`read_conversations`.
        tokenizer: see :func:`encode_conversation`.
        max_length: see :func:`encode_conversation`.
        truncate_text: see :func:`encode_conversation`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        tokenizer: Any,
        max_length: int,
        *,
        truncate_text: bool = False,
    ) -> None:
        check_positive_int("max_length", max_length)
        self.conversations = conversations
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate_text = truncate_text

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """``input_ids`` and ``labels`` (lists), ``images`` (paths) and ``where``."""
        conversation = self.conversations[index]
        input_ids, labels = encode_conversation(
            conversation, self.tokenizer, self.max_length, truncate_text=self.truncate_text
        )
        return {
            "input_ids": input_ids,
            "labels": labels,
            "images": conversation.images,
            "where": conversation.where,
        }

    def check(self, file: str | Path, max_errors: int = 20) -> list[int]:
        """Tokenise everything once: better an error now than in the middle of a run.

        Returns:
            The tokens of each conversation.

        Raises:
            RecordErrors: conversations that are too long; each named.
        """
        lengths, problems = [], []
        for index, conversation in enumerate(self.conversations):
            try:
                lengths.append(len(self[index]["input_ids"]))
            except ValueError as error:
                problems.append(f"{conversation.where}: {error}")
        if problems:
            raise RecordErrors(file, problems, len(self), max_errors)
        return lengths


class ConversationCollator:
    """Conversations to one batch, padded right; runs in the data loader's workers.

    Args:
        pad_token_id: what fills ``input_ids``; upstream's is the end-of-text token.
        image_processor: a
            :class:`monkey_model.image_processing_monkey.MonkeyImageProcessor`.
    """

    def __init__(self, pad_token_id: int, image_processor: Any) -> None:
        self.pad_token_id = pad_token_id
        self.image_processor = image_processor
        self._cache: Any = None
        self._image_start_id = -1

    def read_tokens(self, cache: Any, image_start_id: int) -> None:
        """From now on read visual tokens in place of images.

        Args:
            cache: a :class:`monkey_model.training.token_cache.TokenCache` of the images.
            image_start_id: of ``<img>``.
        """
        self._cache = cache
        self._image_start_id = image_start_id

    def __call__(
        self, examples: Sequence[dict[str, Any] | list[dict[str, Any]]]
    ) -> dict[str, Tensor]:
        """A row for each example; one that is a list of examples has them one after the other.

        Returns:
            ``input_ids`` and ``labels`` [B, longest]; ``attention_mask`` [B, longest], or, where a
            row holds a list, ``position_ids`` [B, longest], which start at 0 with each conversation
            and are -1 in padding; and, if any example has an image, ``pixel_values`` [images,
            crops, 3, S, S], in the order of the spans. With visual tokens, these are in every
            batch, in place of pixels: ``visual_tokens`` [images, span, width], and their places,
            ``visual_mask`` [B, longest], so that no process ever runs the encoder.

        Raises:
            ValueError: an image, or its tokens, that cannot be read, with its record.
        """
        packed = any(isinstance(example, list) for example in examples)
        rows = [example if isinstance(example, list) else [example] for example in examples]
        length = max(sum(len(example["input_ids"]) for example in row) for row in rows)
        batch = {
            name: torch.full((len(rows), length), fill)
            for name, fill in (
                ("input_ids", self.pad_token_id),
                ("labels", IGNORED),
                ("position_ids", -1) if packed else ("attention_mask", 0),
            )
        }
        read = self._pixels if self._cache is None else self._cache.read
        images = []
        for number, row in enumerate(rows):
            end = 0
            for example in row:
                start, end = end, end + len(example["input_ids"])
                batch["input_ids"][number, start:end] = torch.tensor(example["input_ids"])
                batch["labels"][number, start:end] = torch.tensor(example["labels"])
                # Labels are shifted: no token of its own comes before a conversation's first.
                batch["labels"][number, start] = IGNORED
                if packed:
                    batch["position_ids"][number, start:end] = torch.arange(end - start)
                else:
                    batch["attention_mask"][number, start:end] = 1
                for image in example["images"]:
                    try:
                        images.append(read(image))
                    except (ValueError, OSError) as error:
                        raise ValueError(f"{example['where']}: {error}") from error
        if self._cache is not None:
            ids, (length, width) = batch["input_ids"], self._cache.shape
            batch["visual_mask"] = mask_spans(find_spans(ids, self._image_start_id, length), ids)
            batch["visual_tokens"] = (
                torch.stack(images) if images else torch.empty(0, length, width)
            )
        elif images:
            batch["pixel_values"] = torch.stack(images)
        return batch

    def _pixels(self, image: str) -> Tensor:
        return self.image_processor([image])["pixel_values"][0]
