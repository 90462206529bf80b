"""vLLM's plug-in: with this package installed, ``vllm serve DIR`` takes a Monkey checkpoint.

vLLM calls :func:`register` in each of its processes (entry point group ``vllm.general_plugins``),
whatever model they serve: it changes nothing for others. The model itself is in
:mod:`monkey_model.serving.vllm_model`, which vLLM imports when a config names it.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from monkey_model.checkpoint import weight_files
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.crop_settings import CropSettings
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.inputs.prompts import ENDOFTEXT, IMAGE_START, IMEND, SPECIAL_TOKENS
from monkey_model.serving.export import exact_length, qwen2_config, whole_model_config

#: As ``architectures`` in config.json names the model.
ARCHITECTURE = "MonkeyLMHeadModel"

#: The chat template that asks as upstream does, ``<img></img> QUESTION Answer: ``.
PLAIN_TEMPLATE = Path(__file__).with_name("plain.jinja")

#: Chooses, as the value of this variable, how a server reads the pictures of requests.
CONNECTOR_VARIABLE, CONNECTOR = "VLLM_MEDIA_CONNECTOR", "monkey"


def register() -> None:
    """Tell vLLM of Monkey's config, tokenizer and model."""
    from vllm import ModelRegistry
    from vllm.config import ModelConfig
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.transformers_utils import config as vllm_config

    # A class that vLLM knows is no remote code: with --trust-remote-code too, none is run.
    vllm_config._CONFIG_REGISTRY[MonkeyConfig.model_type] = MonkeyConfig
    ModelRegistry.register_model(ARCHITECTURE, "monkey_model.serving.vllm_model:MonkeyForVllm")
    # What a general plug-in has no other way to say.
    _wrap(ModelConfig, "try_get_generation_config", _with_ends)
    _wrap(PEFTHelper, "from_local_dir", _whole_adapter)
    if os.environ.get(CONNECTOR_VARIABLE) == CONNECTOR:
        from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

        from monkey_model.serving.vllm_pictures import PictureConnector

        MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(PictureConnector)


def _wrap(owner: type, name: str, wrapper: Any) -> None:
    """Put ``wrapper(original, ...)`` in the place of a method, once."""
    method = owner.__dict__[name]
    original = getattr(method, "__func__", method)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, classmethod(wrapped) if isinstance(method, classmethod) else wrapped)


def _with_ends(original: Any, model_config: Any) -> dict[str, Any]:
    """A reply ends as in ``monkey ask``; published generation configs name one end of the two."""
    fields = original(model_config)
    config = model_config.hf_config
    if isinstance(config, MonkeyConfig):
        first = config.visual["image_start_id"] - SPECIAL_TOKENS.index(IMAGE_START)
        fields["eos_token_id"] = [first + SPECIAL_TOKENS.index(end) for end in (IMEND, ENDOFTEXT)]
    return fields


def _whole_adapter(original: Any, cls: type, lora_path: str, *args: Any, **kwargs: Any) -> Any:
    """Refuse adapters that came with weights which vLLM would leave out."""
    from monkey_model.training.peft_model import BASE_WEIGHTS

    if Path(lora_path, BASE_WEIGHTS).is_file():
        raise ValueError(
            f"the adapter must hold LoRA alone; got {BASE_WEIGHTS} in {lora_path}: merge it "
            "(monkey merge), and serve what comes out"
        )
    return original(cls, lora_path, *args, **kwargs)


def check_processor(config: MonkeyConfig, processor: MonkeyImageProcessor, where: str) -> None:
    """Raise a ValueError unless the encoder reads what the image processor cuts."""
    encoder, cutter = CropSettings.from_config(config.visual), processor.crop_settings
    differ = [
        f"{name} {getattr(encoder, name)}, got {getattr(cutter, name)}"
        for name in ("grid", "crop_size", "n_queries")
        if getattr(encoder, name) != getattr(cutter, name)
    ]
    if differ:
        raise ValueError(
            f"the image processor of {where} must have the sizes of visual in config.json: "
            f"{'; '.join(differ)}"
        )


def check_length(config: MonkeyConfig, max_model_len: int) -> None:
    """Raise a ValueError if requests may become longer than vLLM can answer exactly."""
    if max_model_len > exact_length(config):
        raise ValueError(
            f"max_model_len must be at most {exact_length(config)}, where dynamic NTK and log-n "
            f"attention begin, which vLLM's Qwen2 has not; got {max_model_len}"
        )


def check_servable(checkpoint: Path, allow_pickle: bool = False) -> int:
    """Whether vLLM can serve a checkpoint, before it is started.

    Args:
        checkpoint: directory.
        allow_pickle: as in :func:`monkey_model.checkpoint.load_visual`.

    Returns:
        The pictures that fit in a request, at least 1.

    Raises:
        OSError: no such directory, or a file that is not there.
        ValueError: an adapter in place of a whole model; a model that vLLM's Qwen2 cannot express;
            an image processor of other sizes than the encoder; pickles without ``allow_pickle``.
    """
    config = whole_model_config(checkpoint)
    qwen2_config(config)
    weight_files("checkpoint", checkpoint, allow_pickle=allow_pickle)
    processor = MonkeyImageProcessor.from_pretrained(checkpoint)
    check_processor(config, processor, str(checkpoint))
    return max(1, exact_length(config) // (processor.crop_settings.image_span + 2))
