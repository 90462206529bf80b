"""Where a model looks: the resampler's and the language model's attention, back on the picture.

A query of the resampler reads patches of its crop (A [heads, Nq, N], rows sum to 1); a word of an
answer reads visual tokens (a [tokens]). Multiplied, ``a @ A`` says how much of a word's attention
comes from which patch. That is attention, not explanation: a patch token has seen its whole crop in
the ViT, and attention is only one of the ways that a network moves what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from monkey_kernels import extract_crops, place
from monkey_model.crop_settings import CropSettings
from monkey_model.inputs.images import ImageSource, load_crops, load_image
from monkey_model.inputs.spans import find_spans, mask_spans
from monkey_model.serving.answer import Answerer, Question
from monkey_model.serving.crop_pictures import canvas_pixels
from monkey_model.transformers_compat import CACHE
from monkey_model.visual import VisionTransformer

# Words of an answer whose attention, of all layers and heads, is in memory at a time.
_ROWS = 16

# Bytes of the longest character in UTF-8, so tokens that may have to come together to show one.
_LONGEST_CHARACTER = 4


class Frame(NamedTuple):
    """A rectangle in pixels of the picture, which it may leave."""

    top: float
    left: float
    height: float
    width: float


@dataclass(frozen=True)
class Answer:
    """An answer, and what each word of it attended to.

    Args:
        question: what was asked.
        words: the tokens of the answer as text; those of one character together.
        attention: [words, crops * queries] on the CPU, shares of the attention of the position
            that chose the word, mean of all layers and heads; what is missing to 1 went to text.
    """

    question: str
    words: list[str]
    attention: Tensor


@dataclass(frozen=True)
class Look:
    """What an encoder made of one picture, all on the CPU.

    Args:
        picture: uint8 [H, W, 3].
        crops: [crops, 3, crop_size, crop_size], normalised.
        settings: how the crops were cut.
        adapters: of each crop, None for none.
        weights: [crops, heads, queries, patches] of the resampler; rows sum to 1.
        tokens: [crops, queries, width], the visual tokens.
        answer: if a question was asked.
    """

    picture: Tensor
    crops: Tensor
    settings: CropSettings
    adapters: list[int | None]
    weights: Tensor
    tokens: Tensor
    answer: Answer | None = None

    @property
    def frame(self) -> Frame:
        """Where the canvas lies on the picture."""
        height, width = self.picture.shape[:2]
        return canvas_frame(height, width, self.settings)

    @property
    def side(self) -> int:
        """Patches along a side of a crop."""
        return math.isqrt(self.weights.shape[-1])

    def centres(self) -> Tensor:
        """[crops, queries, 2]: y and x, in the picture's pixels, of the centre of mass of what each
        query reads, mean of all heads."""
        return self.weights.mean(1) @ patch_centres(self.frame, self.settings.grid, self.side)


@torch.inference_mode()
def look(encoder: VisionTransformer, image: ImageSource) -> Look:
    """Encode a picture and keep where the encoder looked.

    Args:
        encoder: in eval mode.
        image: as :func:`monkey_model.inputs.images.load_image` takes it.

    Raises:
        TypeError, ValueError, OSError: a picture that cannot be read, or the errors of
            :meth:`VisionTransformer.encode_crops` and of :meth:`Resampler.attention_weights`.
    """
    picture = load_image(image)
    adapters = encoder.adapter_index()
    crops = load_crops([picture], device="cpu", **encoder.crop_settings.cutting)
    with _recorded(encoder) as (patches, tokens):
        encoder.encode_crops(crops)
    return Look(
        picture=picture,
        crops=crops,
        settings=encoder.crop_settings,
        adapters=adapters,
        weights=_weights(encoder, patches),
        tokens=torch.cat(tokens).float().cpu(),
    )


@torch.inference_mode()
def look_and_ask(answerer: Answerer, image: ImageSource, question: str) -> Look:
    """Ask about a picture, and keep where the encoder and the language model looked.

    Args:
        answerer: its image processor says how the crops are cut.
        image: as in :func:`look`.
        question: what to ask.

    Raises:
        TypeError, ValueError, OSError: the errors of :func:`look` and of :meth:`Answerer.answer`;
            or a language model whose attention gives no weights.
    """
    picture = load_image(image)
    encoder: VisionTransformer = answerer.model.transformer.visual
    asked = Question(question, (picture,))
    pixels = answerer.read_images(asked)
    with _recorded(encoder) as (patches, tokens):
        prompt, output = answerer.generate([asked], [pixels])
    return Look(
        picture=picture,
        crops=pixels[0][0].float().cpu(),
        settings=answerer.processor.image_processor.crop_settings,
        adapters=encoder.adapter_index(),
        weights=_weights(encoder, patches),
        tokens=torch.cat(tokens).float().cpu(),
        answer=_answer(answerer, question, prompt, output),
    )


@contextmanager
def _recorded(encoder: VisionTransformer) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """What goes into the resampler and what comes out of the encoder, call by call."""
    patches: list[Tensor] = []
    tokens: list[Tensor] = []
    hooks = [
        encoder.attn_pool.register_forward_pre_hook(lambda _, inputs: patches.append(inputs[0])),
        encoder.register_forward_hook(lambda module, inputs, output: tokens.append(output)),
    ]
    try:
        yield patches, tokens
    finally:
        for hook in hooks:
            hook.remove()


def _weights(encoder: VisionTransformer, patches: list[Tensor]) -> Tensor:
    return torch.cat([encoder.attn_pool.attention_weights(x).float().cpu() for x in patches])


def _answer(answerer: Answerer, question: str, prompt: Tensor, output: Any) -> Answer:
    """The words of the one answer in ``output``, and their attention to the visual tokens."""
    tokenizer, config = answerer.processor.tokenizer, answerer.model.config
    length = prompt.shape[1]
    ids = output.sequences[0, length:].tolist()
    ends = (tokenizer.eod_id, tokenizer.im_end_id)
    ids = ids[: next((i for i, id in enumerate(ids) if id in ends), None)]
    span = answerer.processor.image_processor.crop_settings.image_span
    spans = find_spans(prompt, config.visual["image_start_id"], span)
    columns = mask_spans(spans, prompt)[0].nonzero()[:, 0]
    # The first row is the prompt's last token, which chose the first word.
    rows = output.sequences[:, length - 1 : length - 1 + len(ids)]
    attention = _attention(answerer.model, getattr(output, CACHE), rows, length - 1, columns)

    words: list[str] = []
    merged: list[Tensor] = []
    pending: list[int] = []
    for number, id in enumerate(ids):
        pending.append(id)
        text = tokenizer.decode(pending)
        partial = text.endswith("\ufffd") and len(pending) < _LONGEST_CHARACTER
        if not partial or number == len(ids) - 1:
            words.append(text)
            merged.append(attention[number + 1 - len(pending) : number + 1].mean(0))
            pending = []
    return Answer(question, words, torch.stack(merged) if merged else attention)


def _attention(model: Any, cache: Any, rows: Tensor, past: int, columns: Tensor) -> Tensor:
    """How positions attend to ``columns``: [rows, columns] on the CPU, mean of layers and heads.

    Args:
        model: the language model.
        cache: of a sequence that holds all of these positions, but perhaps the last.
        rows: the ids [1, rows] of the positions from ``past`` on.
        past: position of the first row.
        columns: positions.
    """
    before = model.config._attn_implementation
    cache.crop(past - cache.get_seq_length())
    found = [torch.zeros(0, len(columns))]
    # The fused attentions never hold their weights.
    model.set_attn_implementation("eager")
    try:
        for part in rows.split(_ROWS, dim=1):
            outputs = model(
                input_ids=part,
                use_cache=True,
                output_attentions=True,
                logits_to_keep=1,
                **{CACHE: cache},
            )
            layers = [weights for weights in outputs.attentions or () if weights is not None]
            if len(layers) != model.config.num_hidden_layers:
                raise ValueError(
                    "question needs a language model that gives its attention weights; "
                    f"{type(model).__name__} with attention {before!r} gives none, in 'eager' too"
                )
            mean = torch.stack([weights[0].float().mean(0) for weights in layers]).mean(0)
            found.append(mean[:, columns].cpu())
    finally:
        model.set_attn_implementation(before)
    return torch.cat(found)


def canvas_frame(height: int, width: int, settings: CropSettings) -> Frame:
    """Where the canvas lies on a picture of this size.

    With fit ``"stretch"`` it is the picture, with ``"crop"`` the part that is read, with ``"pad"``
    the picture and the bars beside it.
    """
    rows, columns = settings.canvas_size
    source, target = place(height, width, (rows, columns), settings.fit)
    y, x = source.height / target.height, source.width / target.width  # of a canvas pixel
    return Frame(source.top - target.top * y, source.left - target.left * x, rows * y, columns * x)


def crop_frames(frame: Frame, grid: tuple[int, int]) -> list[Frame]:
    """Where each crop of a canvas at ``frame`` lies; the global one is all of it."""
    rows, columns = grid
    height, width = frame.height / rows, frame.width / columns
    local = [
        Frame(frame.top + row * height, frame.left + column * width, height, width)
        for row in range(rows)
        for column in range(columns)
    ]
    return [*local, frame]


def patch_centres(frame: Frame, grid: tuple[int, int], side: int) -> Tensor:
    """[crops, side * side, 2]: y and x of the middle of each patch, in the picture's pixels."""
    step = (torch.arange(side) + 0.5) / side
    unit = torch.cartesian_prod(step, step)
    return torch.stack([
        unit * torch.tensor([crop.height, crop.width]) + torch.tensor([crop.top, crop.left])
        for crop in crop_frames(frame, grid)
    ])  # fmt: skip


def stitch(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [R*C + 1, side * side] of all crops to one of the local crops, [R*side, C*side]."""
    side = math.isqrt(maps.shape[1])
    local = maps[: grid[0] * grid[1]].view(*grid, side, side)
    return local.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def carry_back(attention: Tensor, weights: Tensor) -> Tensor:
    """Attention to visual tokens, [words, crops * queries], to the patches that those read.

    Args:
        attention: shares of a word's attention.
        weights: [crops, heads, queries, patches] of the resampler.

    Returns:
        [words, crops, patches], with the sums of ``attention``.
    """
    crops, _, queries, _ = weights.shape
    return torch.einsum(
        "wcq,cqp->wcp", attention.view(len(attention), crops, queries), weights.mean(1)
    )


def token_colours(tokens: Tensor) -> Tensor:
    """The first three principal components of visual tokens as red, green and blue.

    Args:
        tokens: [crops, queries, width].

    Returns:
        uint8 [crops, queries, 3]. Each component runs from 0 at its 1st percentile to 255 at its
        99th; a component without variance is 128.
    """
    flat = tokens.flatten(0, 1).double()
    flat = flat - flat.mean(0)
    # Of the Gram matrix [tokens, tokens]: the covariance, [width, width], is larger.
    values, vectors = torch.linalg.eigh(flat @ flat.T)
    vectors = vectors.flip(1)[:, :3]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    scores = vectors * largest.sign()  # the sign of an eigenvector is no one's choice
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99], dtype=scores.dtype), dim=0)
    real = values.flip(0)[:3] > 1e-12 * values.sum().clamp(min=1e-30)
    scaled = (scores - low) / (high - low).clamp(min=1e-30) * 255
    colours = torch.where(real, scaled, 128.0).round().clamp(0, 255).to(torch.uint8)
    missing = 3 - colours.shape[1]
    return F.pad(colours, (0, missing), value=128).view(*tokens.shape[:2], 3)


def canvas_as(look: Look, **changes: Any) -> Tensor:
    """The canvas, uint8 [H, W, 3], that other settings (interpolation, fit) make of the picture."""
    settings = replace(look.settings, **changes)
    crops = extract_crops([look.picture], **settings.cutting)
    return canvas_pixels(crops, settings.grid)


def largest_difference(one: Tensor, other: Tensor, size: int) -> tuple[int, int]:
    """Top and left of the square window in which two pictures [H, W, 3] differ most."""
    difference = (one.float() - other.float()).abs().mean(-1)[None, None]
    step = max(1, size // 4)
    pooled = F.avg_pool2d(difference, size, step)[0, 0]
    row, column = divmod(int(pooled.argmax()), pooled.shape[1])
    return row * step, column * step
