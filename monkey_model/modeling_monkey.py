"""Monkey: QWen that sees. Visual tokens take the positions that a prompt keeps for them.

Pictures come as ``pixel_values``, or, upstream's way, as paths written into the token ids. Their
tokens enter by an out-of-place scatter into the embeddings, so that gradients reach the encoder
whether or not the embeddings are trained.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from monkey_model.chat import ChatMixin
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.encoder.crop_adapters import Lora_Adapter
from monkey_model.encoder.positions import get_2d_sincos_pos_embed
from monkey_model.encoder.resampler import Resampler
from monkey_model.families import family_of_keys
from monkey_model.files import list_problems
from monkey_model.inputs.images import load_image
from monkey_model.inputs.spans import ImageSpan, find_spans, locate, mask_spans, read_path
from monkey_model.modeling_qwen import QWenLMHeadModel, QWenModel, QWenPreTrainedModel
from monkey_model.transformers_compat import CACHE, one_cache
from monkey_model.visual import VisionTransformer

_NO_PLACE = "pixel_values need input_ids, whose image spans say where they go"


class MonkeyPreTrainedModel(QWenPreTrainedModel):
    """What transformers has to know of the visual encoder too."""

    config_class = MonkeyConfig
    # The encoder's position tables and `proj` are its own, so it stays on one device as a whole.
    _no_split_modules = ["QWenBlock", "VisionTransformer"]  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As :class:`QWenPreTrainedModel`'s, and no weight of the checkpoint is left out.

        Raises:
            ValueError: weights that the model has not; or QWenPreTrainedModel's errors.
            OSError: QWenPreTrainedModel's.
        """
        wanted = kwargs.pop("output_loading_info", False)
        where = pretrained_model_name_or_path
        model, info = super().from_pretrained(where, *args, **kwargs, output_loading_info=True)
        # A bare MonkeyModel has no head, and is loaded from checkpoints that have one.
        head = () if hasattr(model, "lm_head") else ("lm_head.",)
        left = sorted(key for key in info["unexpected_keys"] if not key.startswith(head))
        if left:
            raise ValueError(
                f"{where} has weights that its config's model has not{family_of_keys(left)}: "
                f"{list_problems(left, 5, ', ')}"
            )
        return (model, info) if wanted else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the constructors do it; what a checkpoint brings is left alone."""
        super()._init_weights(module)
        if isinstance(module, Lora_Adapter):
            init.ones_(module.lora_scale)
            init.kaiming_uniform_(module.lora_a.weight, a=5**0.5)
            init.zeros_(module.lora_b.weight)
        elif isinstance(module, Resampler):
            table = get_2d_sincos_pos_embed(module.embed_dim, int(module.num_queries**0.5))
            init.copy_(module.pos_embed, torch.from_numpy(table))
            init.trunc_normal_(module.query, std=0.02)
        elif isinstance(module, VisionTransformer):
            width = module.transformer.width  # the table itself may be sharded, without a shape
            init.normal_(module.positional_embedding, std=width**-0.5)
            init.normal_(module.proj, std=module.output_dim**-0.5)


class MonkeyModel(MonkeyPreTrainedModel, QWenModel):
    """Token ids and pictures to hidden states.

    Attributes:
        allow_urls: whether an http(s) address in a prompt is fetched. A prompt is untrusted input.
        image_root: directory that the paths in prompts are relative to and may not leave; None for
            the working directory and no limit.
    """

    def __init__(self, config: MonkeyConfig) -> None:
        super().__init__(config)
        self.allow_urls = False
        self.image_root: str | os.PathLike[str] | None = None
        self.visual = VisionTransformer.from_config(config.visual)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        visual_mask: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm; the other arguments are :class:`QWenModel`'s.

        Ids are searched for image spans where ``pixel_values`` are given or the cache is empty, as
        upstream does; after that ``<img>`` is a token like any other.

        Args:
            pixel_values: [images, crops_per_image, 3, crop_size, crop_size] normalised crops, as
                :func:`monkey_kernels.extract_crops` makes them, in the order of the spans in
                input_ids, row by row. Without them the spans hold paths.
            visual_mask: [B, T] bool and
            visual_tokens: [number of True, hidden_size], or [images, span, hidden_size]: what
                :meth:`encode_images` returned, in place of pixel_values; ids are then not searched.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; pixel_values without
                input_ids; or the errors of :meth:`encode_images`.
        """
        cache = one_cache(past_key_values, cache)
        if (visual_mask is None) != (visual_tokens is None):
            raise ValueError("visual_mask and visual_tokens must be given together")
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
            if visual_mask is None and (
                pixel_values is not None or _may_show_images(input_ids, cache)
            ):
                visual_mask, visual_tokens = self.encode_images(input_ids, pixel_values)
        elif input_ids is not None or inputs_embeds is None:
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        elif pixel_values is not None:
            raise ValueError(_NO_PLACE)
        if visual_mask is not None and visual_tokens is not None:
            inputs_embeds = inputs_embeds.masked_scatter(
                visual_mask[..., None].to(inputs_embeds.device), visual_tokens.to(inputs_embeds)
            )
        return super().forward(
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    @torch.compiler.disable
    def encode_images(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        visual_tokens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The positions of the image spans, and the visual tokens that belong there.

        In training a batch without a picture encodes an empty one, of a single patch per crop,
        whose tokens go nowhere: each process then uses the same parameters, as DDP, FSDP and ZeRO
        need it.

        Args:
            input_ids: [B, T].
            pixel_values: see :meth:`forward`.
            visual_tokens: [images, span, hidden_size], if the images are encoded already: then
                their positions alone are found.

        Returns:
            [B, T] bool, and [tokens, hidden_size] in the order of its True entries.

        Raises:
            ValueError: spans that :func:`find_spans` refuses; another number of images than of
                spans, or another shape; a span without a path and without its image; a path that
                leaves ``image_root``; an image that cannot be read.
        """
        visual, start_id = self.visual, self.config.visual["image_start_id"]
        settings = visual.crop_settings
        spans = find_spans(input_ids, start_id, settings.image_span)
        if visual_tokens is not None:
            shape = [len(spans), settings.image_span, self.config.hidden_size]
            if list(visual_tokens.shape) != shape:
                raise ValueError(
                    f"visual_tokens must be {shape}, an image for each of {len(spans)} "
                    f"spans in input_ids; got {list(visual_tokens.shape)}"
                )
            mask = mask_spans(spans, input_ids)
            return mask, visual_tokens.flatten(0, 1).to(mask.device)
        if pixel_values is not None:
            side = settings.crop_size
            expected = (len(spans), settings.crops_per_image, 3, side, side)
            if tuple(pixel_values.shape) != expected:
                raise ValueError(
                    f"pixel_values must be {list(expected)}, an image for each of {len(spans)} "
                    f"spans in input_ids; got {list(pixel_values.shape)}"
                )
            crops = pixel_values.flatten(0, 1)
        elif spans:
            paths = [read_path(span, input_ids, start_id) for span in spans]
            images = [self._load(span, path) for span, path in zip(spans, paths, strict=True)]
            crops = visual.extract_crops(images, device=input_ids.device)
        mask = mask_spans(spans, input_ids)
        if not spans:
            if not self.training:
                return mask, torch.empty(0, self.config.hidden_size, device=mask.device)
            patch = visual.patch_size[0]
            crops = torch.zeros(settings.crops_per_image, 3, patch, patch, device=input_ids.device)
        # In training one pass, however many images: sharded weights are gathered once per pass.
        chunk = len(crops) if self.training else None
        tokens = visual.encode_crops(crops, crop_chunk=chunk).flatten(0, 1)
        return mask, tokens.to(mask.device)  # the encoder may live on another one

    def _load(self, span: ImageSpan, path: str) -> Tensor:
        try:
            return load_image(locate(path, self.image_root), allow_urls=self.allow_urls)
        except (OSError, ValueError) as error:
            raise ValueError(f"{span} cannot be read: {error}") from error


def _may_show_images(input_ids: Tensor, cache: Cache | None) -> bool:
    """Whether these ids are the beginning of a sequence, and more than a token that follows one."""
    if input_ids.shape[1] <= 1:
        return False
    return cache is None or bool(cache.get_seq_length() == 0)


class MonkeyLMHeadModel(ChatMixin, MonkeyPreTrainedModel, QWenLMHeadModel):
    """Token ids and pictures to logits; ``generate`` takes ``pixel_values`` too."""

    transformer_class = MonkeyModel
    transformer: MonkeyModel

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_values: Tensor | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """See :meth:`MonkeyModel.forward` and :meth:`QWenLMHeadModel.forward`."""
        # All arguments are named: `generate` looks for them in this signature.
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            pixel_values=pixel_values,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[LongTensor, dict[str, Any]]:
        """Encode the prompts' images, once, and repeat each prompt with all of its own."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        encoded = model_kwargs.pop("visual_tokens", None)
        visual: dict[str, Tensor] = {}
        if model_kwargs.get("inputs_embeds") is None and input_ids is not None:
            cache = model_kwargs.get(CACHE)
            total = model_kwargs["position_ids"].shape[-1]
            fresh = total - (0 if cache is None else int(cache.get_seq_length()))
            ids = input_ids[:, -fresh:]
            mask, tokens = self.transformer.encode_images(ids, pixel_values, encoded)
            groups = tokens.split(mask.sum(1).tolist())
            mask = F.pad(mask, (total - mask.shape[1], 0))
            visual["visual_mask"] = mask.repeat_interleave(expand_size, dim=0)
            visual["visual_tokens"] = torch.cat([g for g in groups for _ in range(expand_size)])
        elif pixel_values is not None or encoded is not None:
            raise ValueError(_NO_PLACE)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(  # type: ignore[misc]
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **visual}

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: LongTensor,
        *,
        inputs_embeds: Tensor | None = None,
        visual_mask: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' own, with the visual tokens of the ids that this call runs.

        Those are all of them where there is no cache, a part while a prompt is read in chunks, and
        none after the prompt.
        """
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        cache = kwargs.get(CACHE)
        start = 0 if cache is None else int(cache.get_seq_length())
        if visual_mask is not None and visual_tokens is not None and start < visual_mask.shape[1]:
            end = start + inputs["input_ids"].shape[1]
            mask = F.pad(visual_mask, (0, max(0, end - visual_mask.shape[1])))
            order = mask.flatten().cumsum(0).view_as(mask) - 1
            inputs["visual_mask"] = mask[:, start:end]
            inputs["visual_tokens"] = visual_tokens[order[:, start:end][inputs["visual_mask"]]]
        return inputs


AutoModel.register(MonkeyConfig, MonkeyModel)
AutoModelForCausalLM.register(MonkeyConfig, MonkeyLMHeadModel)
