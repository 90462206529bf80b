"""A talk of several turns: ``model.chat`` and ``model.chat_stream``, with upstream's signatures.

A prompt is ChatML, each message encoded on its own, as upstream does. What is special in it:

- in the query, in the queries of the history and in the system's message, as upstream, the tokens
  of pictures and of grounding: ``<img>photo.jpg</img>`` in what a user wrote opens that file, in
  ``model.transformer.image_root``. :meth:`QWenTokenizer.escape` makes plain text of what is not
  trusted;
- in replies of the history the tokens of grounding alone, so that no model opens a file by its own
  words, and an ``<img>`` that it left open ends no talk (upstream reads both as pictures);
- never those of ChatML: nobody's text begins a message.

Source: upstream ``monkey_model/modeling_qwen.py`` and ``monkey_model/qwen_generation_utils.py``.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from monkey_kernels.checks import check_positive_int
from monkey_model.inputs.prompts import GROUNDING

if TYPE_CHECKING:
    from monkey_model.tokenization_qwen import QWenTokenizer

_SYSTEM = "You are a helpful assistant."
_NOT_GIVEN = object()

# Where no generation_config.json says otherwise: upstream's, and the default of `monkey ask`.
_MAX_WINDOW_SIZE = 6144
_MAX_NEW_TOKENS = 512


def prompt_ids(
    tokenizer: QWenTokenizer,
    query: str,
    history: Sequence[tuple[str, str | None]] = (),
    system: str = _SYSTEM,
    max_window_size: int = _MAX_WINDOW_SIZE,
) -> list[int]:
    """The ids of a talk up to where the assistant is to go on.

    Args:
        tokenizer: of the model.
        query: what the user says now.
        history: queries and replies before it, the oldest first. A reply may be None.
        system: the first message.
        max_window_size: the oldest turns are left out with which the system's message and the
            history would take this many tokens, or more. The query does not count.

    Raises:
        TypeError: a text that is no string, or a turn that is no pair.
        ValueError: a text that cannot be tokenised, or ``max_window_size`` is not positive.
    """
    check_positive_int("max_window_size", max_window_size)

    def encode(name: str, text: str, special: Collection[str]) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string; got {type(text).__name__}")
        try:
            return tokenizer.encode(text, allowed_special=special)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def message(
        name: str, role: str, text: str, special: Collection[str] = tokenizer.IMAGE_ST
    ) -> list[int]:
        content = encode(name, text, special)
        return [*begin(role), *content, tokenizer.im_end_id]

    def begin(role: str) -> list[int]:
        return [tokenizer.im_start_id, *tokenizer.encode(role), *newline]

    newline = tokenizer.encode("\n")
    start = message("system", "system", system)
    now = [*newline, *message("query", "user", query), *newline, *begin("assistant")]
    turns: list[list[int]] = []
    size = len(start)
    for number, turn in reversed(list(enumerate(history))):
        name = f"history[{number}]"
        if not isinstance(turn, (tuple, list)) or len(turn) != 2:
            raise TypeError(f"{name} must be a pair (query, reply); got {turn!r}")
        asked, reply = turn
        ids = [*newline, *message(f"{name}[0]", "user", asked), *newline]
        if reply is not None:
            ids += message(f"{name}[1]", "assistant", reply, GROUNDING)
        size += len(ids)
        if size >= max_window_size:
            break
        turns.append(ids)
    return [*start, *chain.from_iterable(reversed(turns)), *now]


def window_size(config: GenerationConfig) -> int:
    """The ``max_window_size`` of :func:`prompt_ids` that a model's settings ask for."""
    return getattr(config, "max_window_size", None) or _MAX_WINDOW_SIZE


class _EndsWith(StoppingCriteria):
    """Whether one of some sequences of ids has just been written."""

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        self.sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for sequence in self.sequences:
            if len(sequence) <= input_ids.shape[1]:
                end = torch.tensor(sequence, device=input_ids.device)
                done |= (input_ids[:, -len(sequence) :] == end).all(1)
        return done


class _Cancelled(StoppingCriteria):
    """Whether nobody waits for more."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class _NewIds(BaseStreamer):
    """Puts each new id into a queue."""

    def __init__(self, ids: queue.Queue[Any]) -> None:
        self.ids = ids
        self.seen_prompt = False

    def put(self, value: Tensor) -> None:
        if not self.seen_prompt:
            self.seen_prompt = True
        elif value.numel() != 1:
            raise ValueError(
                f"num_return_sequences must be 1 for a stream; got {value.numel()} sequences"
            )
        else:
            self.ids.put(value.item())

    def end(self) -> None:
        """The thread says when it is through, after an error too."""


def stream_texts(
    generate: Callable[..., Any], inputs: dict[str, Any], read: Callable[[list[int]], str]
) -> Iterator[str]:
    """What ``generate`` writes, as it grows: a text for each new token, the last of them whole.

    It runs in a thread of its own, which begins when the first text is asked for, and ends with the
    reply, or when the iterator is closed.

    Args:
        generate: of a model.
        inputs: its arguments, of one prompt.
        read: the text of new ids.
    """
    ids: queue.Queue[Any] = queue.Queue()
    cancelled = _Cancelled()
    criteria = StoppingCriteriaList([*inputs.get("stopping_criteria", ()), cancelled])
    inputs = {**inputs, "stopping_criteria": criteria, "streamer": _NewIds(ids)}

    def work() -> None:
        try:
            generate(**inputs)
            ids.put(None)
        except BaseException as error:
            ids.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        new: list[int] = []
        text = None
        while (item := ids.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            new.append(item)
            # A character of several tokens may not be whole yet.
            text = read(new).rstrip("\ufffd")
            yield text
        if (reply := read(new)) != text:
            yield reply
    finally:
        cancelled.event.set()
        thread.join()


class ChatMixin:
    """``chat`` and ``chat_stream`` for a model that has ``generate``."""

    generation_config: GenerationConfig
    device: torch.device
    generate: Any

    def chat(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: list[tuple[str, str]] | None,
        system: str = _SYSTEM,
        append_history: bool = True,
        stream: Any = _NOT_GIVEN,
        stop_words_ids: list[list[int]] | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> tuple[str, list[tuple[str, str]]]:
        """The model's reply to a query, and the history that the next query needs.

        Args:
            tokenizer: of the model.
            query: text; ``<img>path</img>`` in it, as ``tokenizer.from_list_format`` writes it, is
                a picture that the model opens.
            history: what the last call returned; None begins a talk.
            system: the message before all others.
            append_history: whether the turn is appended to ``history``, in place, as upstream.
            stream: not to be given: :meth:`chat_stream` streams.
            stop_words_ids: sequences of ids that end the reply, as its last ones.
            generation_config: in place of the model's own.
            kwargs: ``max_window_size`` (see :func:`prompt_ids`), and of ``generate``.

        Returns:
            The reply, without the token that ended it, and the history: a list of pairs (query,
            reply), the list that was given if one was.

        Raises:
            TypeError, ValueError: ``stream`` is given; stop words that are none; a
                ``generation_config.chat_format`` other than chatml; the errors of
                :func:`prompt_ids`; a picture that cannot be read.

        Source: upstream ``QWenLMHeadModel.chat``, which loses the last token of a reply that ended
        by its length, and stops at 20 tokens in all where no one says how many: here 512 new ones.
        """
        if stream is not _NOT_GIVEN:
            raise ValueError(f"stream must not be given, as chat_stream streams; got {stream!r}")
        history = [] if history is None else history
        inputs, ends = self._chat_inputs(
            tokenizer, query, history, system, stop_words_ids, generation_config, kwargs
        )
        output = self.generate(**inputs)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        reply = _read(tokenizer, new, ends)
        if append_history:
            history.append((query, reply))
        return reply, history

    def chat_stream(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: list[tuple[str, str]] | None,
        system: str = _SYSTEM,
        stop_words_ids: list[list[int]] | None = None,
        logits_processor: LogitsProcessorList | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[str]:
        """:meth:`chat`'s reply as it grows: a text for each new token, the last of them whole.

        The history is left as it is. Generation begins with the first text that is asked for, in a
        thread of its own, which ends with the reply, or when the iterator is closed.

        Args:
            logits_processor: of ``generate``.
            tokenizer, query, history, system, stop_words_ids, generation_config, kwargs: of
                :meth:`chat`.

        Raises:
            TypeError, ValueError: those of :meth:`chat`; of what ``generate`` finds, when the first
                text is asked for.

        Source: upstream ``QWenLMHeadModel.chat_stream``, whose texts lack the tags of boxes.
        """
        inputs, ends = self._chat_inputs(
            tokenizer,
            query,
            [] if history is None else history,
            system,
            stop_words_ids,
            generation_config,
            {**kwargs, "logits_processor": logits_processor},
        )
        return stream_texts(self.generate, inputs, lambda new: _read(tokenizer, new, ends))

    def _chat_inputs(
        self,
        tokenizer: QWenTokenizer,
        query: str,
        history: Sequence[tuple[str, str | None]],
        system: str,
        stop_words_ids: Sequence[Sequence[int]] | None,
        generation_config: GenerationConfig | None,
        settings: dict[str, Any],
    ) -> tuple[dict[str, Any], set[int]]:
        """The arguments of ``generate``, and the ids of which the first ends the reply."""
        stop_words = list(stop_words_ids or ())
        for words in stop_words:
            if not words or not all(isinstance(id_, int) and id_ >= 0 for id_ in words):
                raise ValueError(
                    f"stop_words_ids must hold lists of ids, none empty; got {words!r}"
                )
        config = copy.deepcopy(
            self.generation_config if generation_config is None else generation_config
        )
        settings = dict(settings)
        window = settings.pop("max_window_size", None)
        if window is None:
            window = window_size(config)
        if "use_cache" not in settings and (generation_config is None or config.use_cache is None):
            config.use_cache = True  # the published config.json, where it comes from, says false
        settings = config.update(**settings)
        if (form := getattr(config, "chat_format", None)) not in (None, "chatml"):
            raise ValueError(
                "generation_config.chat_format must be 'chatml', for a model that was trained on "
                f"talks; got {form!r}"
            )
        if config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = _MAX_NEW_TOKENS
        config.return_dict_in_generate = False
        ends = {tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id}
        if config.eos_token_id is not None:
            ends.update(torch.as_tensor(config.eos_token_id).flatten().tolist())
        config.eos_token_id = sorted(ends)
        if config.pad_token_id is None:
            config.pad_token_id = tokenizer.eod_id
        criteria = StoppingCriteriaList(settings.pop("stopping_criteria", None) or ())
        if stop_words:
            criteria.append(_EndsWith(stop_words))
        input_ids = torch.tensor(
            [prompt_ids(tokenizer, query, history, system, window)], device=self.device
        )
        return {
            **settings,
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "generation_config": config,
            "stopping_criteria": criteria,
        }, ends


def _read(tokenizer: QWenTokenizer, new: Sequence[int], ends: set[int]) -> str:
    """The text of new ids up to the first that ends a reply."""
    end = next((place for place, id_ in enumerate(new) if id_ in ends), len(new))
    return str(tokenizer.decode(list(new[:end]))).strip()
