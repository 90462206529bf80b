"""Monkey for vLLM: this package's encoder before vLLM's own Qwen2.

A picture's bytes go through this package's decoder and image processor, so that the encoder sees
the crops of ``monkey ask``, bit for bit. vLLM keeps its span in the prompt, ``<img>``, 1280 times
``<imgpad>`` and ``</img>``, which the tokenizer has written already.

Text, scheduling, caches of prompts and pictures (by the hash of their bytes), LoRA, guided decoding
and the server are vLLM's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.model_executor.models.vision import run_dp_sharded_vision_model
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)

from monkey_model.checkpoint import PREFIX
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.inputs.prompts import IMAGE_END, IMAGE_START
from monkey_model.serving.export import BLOCK, COMPUTED, qwen2_config, qwen2_parts
from monkey_model.serving.vllm import check_length, check_processor
from monkey_model.visual import VisionTransformer


class _Images(ImageProcessorItems):
    """Pixels from ``vllm_pictures``, or the bytes of what vLLM has decoded by its own rules."""

    def _unwrap(self, item: Any) -> Any:
        if not isinstance(item, MediaWithBytes):
            return item
        return item.media if isinstance(item.media, np.ndarray) else item.original_bytes


class _Parser(MultiModalDataParser):
    def _parse_image_data(self, data: Any) -> _Images | None:
        if data is None:
            return None
        return _Images(list(data) if isinstance(data, (list, tuple)) else [data])


class MonkeyProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the model's pictures."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        model = ctx.model_config
        self.image_processor = MonkeyImageProcessor.from_pretrained(
            model.model, revision=model.revision
        )
        check_processor(self.get_hf_config(), self.image_processor, model.model)

    @property
    def image_span(self) -> int:
        """Positions between ``<img>`` and ``</img>``."""
        return self.image_processor.crop_settings.image_span

    def get_hf_config(self) -> MonkeyConfig:
        return self.ctx.get_hf_config(MonkeyConfig)

    def get_data_parser(self) -> _Parser:
        return _Parser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {"text_kwargs": set(), "images_kwargs": set()}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        return {"image": self.image_span}


class MonkeyDummyInputs(BaseDummyInputsBuilder[MonkeyProcessingInfo]):
    """Pictures to measure memory on: each has as many tokens as any other."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return f"{IMAGE_START}{IMAGE_END}" * mm_counts.get("image", 0)

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> dict[str, Any]:
        height, width = self.info.image_processor.crop_settings.canvas_size
        count = mm_counts.get("image", 0)
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count)}


class MonkeyMultiModalProcessor(BaseMultiModalProcessor[MonkeyProcessingInfo]):
    """Pictures to crops, and their spans in the prompt."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        if settings := self.info.ctx.get_merged_mm_kwargs(hf_kwargs):
            raise ValueError(
                "mm_processor_kwargs must be empty, as a checkpoint says how its pictures are cut; "
                f"got {', '.join(sorted(settings))}"
            )
        # As the processor makes them, float32: the encoder casts them, as in `monkey ask`.
        return self.info.image_processor(hf_data["images"])

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        start = self.info.get_hf_config().visual["image_start_id"]
        end, pad = start + 1, start + 2
        span = [start, *[pad] * self.info.image_span, end]
        # The tokenizer has written the span: only its places are to be found.
        replacement = PromptUpdateDetails.select_token_id(span, embed_token_id=pad)
        return [PromptReplacement(modality="image", target=span, replacement=replacement)]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _lora_names() -> dict[re.Pattern[str], str]:
    """LoRA keeps c_attn whole, as vLLM does: ``qkv_proj``."""
    names = {}
    for ours, theirs in BLOCK.items():
        if ".c_attn." in ours:
            theirs = ("self_attn.qkv_proj.weight",)
        pattern = re.compile(rf"^transformer\.h\.(\d+)\.{re.escape(_module(ours))}\.")
        names[pattern] = rf"language_model.model.layers.\1.{_module(theirs[0])}."
    return names


def _check_head_size(model: nn.Module, size: int) -> None:
    """On a CPU vLLM does not ask whether its attention has the heads of a model."""
    for module in model.modules():
        if isinstance(module, Attention) and not module.attn_backend.supports_head_size(size):
            sizes = ", ".join(map(str, module.attn_backend.get_supported_head_sizes()))
            raise ValueError(
                f"kv_channels must be a head size of vLLM's {module.attn_backend.get_name()}, "
                f"{sizes}; got {size}"
            )


@MULTIMODAL_REGISTRY.register_processor(
    MonkeyMultiModalProcessor, info=MonkeyProcessingInfo, dummy_inputs=MonkeyDummyInputs
)
class MonkeyForVllm(nn.Module, SupportsLoRA, SupportsMultiModal, SupportsPP):
    """A published or fine-tuned Monkey checkpoint.

    With tensor parallelism each rank has the whole encoder, and its share of a step's pictures.

    Raises:
        ValueError: a model that vLLM's Qwen2 cannot express; heads that its attention has not; a
            max_model_len beyond the length up to which the two are the same.
    """

    supports_encoder_tp_data = True
    packed_modules_mapping = {  # noqa: RUF012
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_regex=_lora_names())

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        self.config = config = model_config.hf_config
        check_length(config, model_config.max_model_len)
        language = qwen2_config(config, dtype=model_config.dtype)
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            self.visual = VisionTransformer.from_config(config.visual)
            self.visual.to(vllm_config.device_config.device, model_config.dtype)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model: Any = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=language,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=language.architectures,
            )
        _check_head_size(self.language_model, config.kv_channels)
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        if modality != "image":
            raise ValueError(f"modality must be image; got {modality}")
        return f"{IMAGE_START}{IMAGE_END}"

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", tower_model="visual"
        )

    def embed_multimodal(self, **kwargs: Any) -> Tensor | list[Tensor]:
        """Visual tokens [images, image_span, hidden_size] of a step's pictures, in one batch.

        Args:
            kwargs: ``pixel_values`` [images, crops_per_image, 3, crop_size, crop_size].
        """
        images = kwargs.get("pixel_values")
        if images is None:
            return []
        if get_tensor_model_parallel_world_size() == 1:
            return self._encode(images)
        return run_dp_sharded_vision_model(images, self._encode)

    def _encode(self, images: Tensor) -> Tensor:
        tokens = self.visual.encode_crops(images.flatten(0, 1))
        return tokens.view(len(images), -1, tokens.shape[-1])

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        if intermediate_tensors is not None:
            inputs_embeds = None
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(self._renamed(weights))

    def _renamed(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        tied = self.config.tie_word_embeddings
        for name, tensor in weights:
            if name.startswith(PREFIX):
                yield f"visual.{name.removeprefix(PREFIX)}", tensor
            elif not name.endswith(COMPUTED) and not (tied and name == "lm_head.weight"):
                for theirs, part in qwen2_parts(name, tensor):
                    yield f"language_model.{theirs}", part
