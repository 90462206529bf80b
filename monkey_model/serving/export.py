"""A Monkey checkpoint as what other engines load: the language model alone, as Qwen2.

QWen's blocks are Qwen2's under other names: ``c_attn`` holds q, k and v one after the other, the
gate of the MLP is ``w2`` and its other half ``w1``. What Qwen2 has not are dynamic NTK and log-n
attention, which begin beyond ``seq_length`` tokens: up to there the two are the same function.

The visual encoder is written beside it, and pictures enter by ``inputs_embeds``: its tokens take
the positions of ``<imgpad>``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, Qwen2Config

from monkey_model.checkpoint import (
    PREFIX,
    check_depth,
    check_finite,
    check_state,
    load_processor,
    read_config,
    read_weights,
)
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.configuration_qwen import QWenConfig
from monkey_model.files import atomic_directory, check_directory
from monkey_model.inputs.prompts import IMAGE_END, IMAGE_PAD, IMAGE_START
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.tokenization_qwen import QWenTokenizer

#: Of :func:`export_qwen2`'s directory: what ``load_visual`` reads.
VISUAL = "visual"

_HEAD = "lm_head.weight"
#: How names of published checkpoints end that hold no weights: they are from transformers 4.
COMPUTED = "rotary_emb.inv_freq"

# Our names outside the blocks, and Qwen2's.
_OUTSIDE = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    _HEAD: "lm_head.weight",
}
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")

#: Our names within a block, and Qwen2's. c_attn comes as its three thirds.
BLOCK = {
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
    "attn.c_attn.bias": tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w2.weight": ("mlp.gate_proj.weight",),
    "mlp.w1.weight": ("mlp.up_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}


def exact_length(config: QWenConfig) -> int:
    """Tokens, of prompt and reply together, up to which Qwen2 is the same function."""
    if config.use_dynamic_ntk or config.use_logn_attn:
        return config.seq_length
    return config.max_position_embeddings


def qwen2_config(config: QWenConfig, **settings: Any) -> Qwen2Config:
    """The language model of a Monkey as a Qwen2.

    Args:
        config: of the whole model.
        settings: of :class:`transformers.Qwen2Config` beside the model's own.

    Raises:
        ValueError: the model has what Qwen2 has not: biases beside that of c_attn, heads of which a
            part alone is rotated, or heads that cannot be rotated.
    """
    problems = []
    if not config.no_bias:
        problems.append("no_bias must be true, as only q, k and v have a bias there; got false")
    if config.rotary_pct != 1:
        problems.append(
            f"rotary_pct must be 1, as whole heads are rotated there; got {config.rotary_pct}"
        )
    if config.kv_channels % 2:
        problems.append(
            f"kv_channels must be even, as its halves are rotated; got {config.kv_channels}"
        )
    if problems:
        raise ValueError(f"the model cannot be a Qwen2: {'; '.join(problems)}")
    return Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size // 2,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        hidden_act="silu",
        max_position_embeddings=exact_length(config),
        initializer_range=config.initializer_range,
        rms_norm_eps=config.layer_norm_epsilon,
        tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_emb_base)},
        attention_dropout=config.attn_dropout_prob,
        architectures=["Qwen2ForCausalLM"],
        **settings,
    )


def qwen2_parts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A weight of a Monkey's language model by Qwen2's names: views, on its device.

    Raises:
        ValueError: no such weight in a language model that :func:`qwen2_config` accepts.
    """
    if name in _OUTSIDE:
        return [(_OUTSIDE[name], tensor)]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in BLOCK:
        raise ValueError(f"the language model has no weight {name}")
    names = [f"model.layers.{match[1]}.{theirs}" for theirs in BLOCK[match[2]]]
    return list(zip(names, tensor.chunk(len(names)), strict=True))


def qwen2_weights(state: Mapping[str, Tensor], config: QWenConfig) -> dict[str, Tensor]:
    """The weights of a Monkey's language model by Qwen2's names: views, on their device.

    Args:
        state: of the whole model, or of its language model, by upstream's names.
        config: of that model.
    """
    return {
        theirs: part
        for name, tensor in state.items()
        if not name.startswith(PREFIX) and not (name == _HEAD and config.tie_word_embeddings)
        for theirs, part in qwen2_parts(name, tensor)
    }


def whole_model_config(checkpoint: Path) -> MonkeyConfig:
    """The config of a checkpoint's whole model.

    Raises:
        OSError: no such directory, or no ``config.json`` in it.
        ValueError: an adapter in place of a whole model; a broken config.
    """
    check_directory("checkpoint", checkpoint)
    if (checkpoint / "adapter_config.json").exists():
        raise ValueError(
            f"checkpoint must be a whole model, not an adapter: {checkpoint}; merge it first "
            f"(monkey merge {checkpoint} --checkpoint DIR --out MERGED)"
        )
    read_config("checkpoint", checkpoint)
    return MonkeyConfig.from_pretrained(checkpoint)


def export_qwen2(
    checkpoint: str | Path,
    out: str | Path,
    *,
    allow_pickle: bool = False,
    max_shard_size: int | str = "2GB",
) -> Qwen2Config:
    """Write the language model as ``Qwen2ForCausalLM``, and the encoder beside it.

    ``out`` gets ``config.json``, ``generation_config.json`` (the ids that end a reply), weights,
    a fast tokenizer with the chat template, and ``visual/``, which
    :func:`monkey_model.checkpoint.load_visual` reads. Weights keep their dtypes.

    Args:
        checkpoint: directory of a whole model.
        out: appears whole or not at all; must not be there.
        allow_pickle: as in :func:`monkey_model.checkpoint.load_visual`.
        max_shard_size: of a weights file: about what is in memory at a time.

    Returns:
        The config, whose ``max_position_embeddings`` is the length up to which both models are the
        same.

    Raises:
        OSError: a directory or file that is not there, or cannot be written.
        ValueError: ``out`` exists; an adapter in place of a whole model; a model that Qwen2 cannot
            express; weights that are not the model's, of another shape, NaN or infinite; pickles
            without ``allow_pickle``; broken files.
    """
    source, target = Path(checkpoint), Path(out)
    if os.path.lexists(target):
        raise ValueError(f"OUT must not exist yet; got {out}")
    config = whole_model_config(source)
    tokenizer = load_processor(source).tokenizer
    result = qwen2_config(
        config,
        pad_token_id=tokenizer.eod_id,
        eos_token_id=[tokenizer.im_end_id, tokenizer.eod_id],
    )
    state = read_weights("checkpoint", source, allow_pickle=allow_pickle)
    state = {key: tensor for key, tensor in state.items() if not key.endswith(COMPUTED)}
    check_depth(source, config, state)
    with torch.device("meta"):
        expected = MonkeyLMHeadModel(config).state_dict()
    if config.tie_word_embeddings:
        state.pop(_HEAD, None)
        del expected[_HEAD]
    check_state(expected, state, source)
    check_finite(source, state.items())
    visual = {key: tensor for key, tensor in state.items() if key.startswith(PREFIX)}
    language = qwen2_weights(state, config)
    # Each dtype is exact in it.
    result.dtype = reduce(torch.promote_types, {tensor.dtype for tensor in language.values()})

    with atomic_directory(target) as place:
        _write_weights(place, language, max_shard_size)
        _write_weights(place / VISUAL, visual, max_shard_size)
        config.save_pretrained(place / VISUAL)
        _write_tokenizer(place, tokenizer, exact_length(config))
        GenerationConfig(
            eos_token_id=result.eos_token_id, pad_token_id=result.pad_token_id
        ).save_pretrained(place)
        # The config last: without one it is no checkpoint. Its older names are for older readers.
        older = {
            "rope_theta": float(config.rotary_emb_base),
            "torch_dtype": str(result.dtype).removeprefix("torch."),
        }
        _write_json(place / "config.json", {**json.loads(result.to_json_string()), **older})
    return result


def _write_weights(directory: Path, weights: dict[str, Tensor], max_shard_size: int | str) -> None:
    """safetensors, in shards with an index where there are several; one of them in memory."""
    directory.mkdir(exist_ok=True)
    # On the meta device: mapped tensors share the storage of their file, and would stay together.
    table = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        for name, tensor in weights.items()
    }
    split = split_torch_state_dict_into_shards(table, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        shard = {name: weights[name].clone(memory_format=torch.contiguous_format) for name in names}
        save_file(shard, directory / file, metadata={"format": "pt"})
        del shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(directory / "model.safetensors.index.json", index)


def _write_tokenizer(directory: Path, tokenizer: QWenTokenizer, length: int) -> None:
    """Files that need no code of ours: the same ids, with an image as ``<imgpad>`` throughout."""
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(f"the tokenizer must have one chat_template; got {template!r}")
    span = f"'{IMAGE_START}' + '{IMAGE_PAD}' * {tokenizer.image_span} + '{IMAGE_END}'"
    tokenizer.backend_tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": length,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        # Ours keeps the positions of an empty span, which other tokenizers know nothing of.
        "chat_template": template.replace(f"'{IMAGE_START}{IMAGE_END}'", span),
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
