"""QWen, the language model under Monkey, under upstream's module names.

transformers brings masks, caches, attention kernels, RMSNorm, losses and checkpointing. This file
adds what is QWen's: the packed projection ``c_attn``, the gate on ``w1``, and two rules for
inference beyond ``seq_length`` tokens, dynamic NTK and log-n attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm as RMSNorm
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb, eager_attention_forward
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from monkey_model.configuration_qwen import QWenConfig
from monkey_model.files import list_problems, unreadable_pickle
from monkey_model.gradient_checkpointing import check_not_reentrant
from monkey_model.transformers_compat import CACHE, one_cache

# Dynamic NTK stretches on for prompts of up to 2**_NTK_LEVELS times seq_length.
_NTK_LEVELS = 16

# The loss of a checkpointed training step holds the logits of so many positions at a time: 256 rows
# of 151936 float32 values are 148 MiB.
_LOSS_CHUNK = 256


def ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """Stretch of the rotary base for each prompt, by its length: 1, 3, 7, 15, ...

    It is ``2 ** (k + 1) - 1`` for the least k >= 0 with ``length <= seq_length * 2**k``.

    Args:
        lengths: tokens of each prompt, of any shape.
        seq_length: tokens that need no stretch.

    Returns:
        float32, of the shape of lengths.
    """
    limits = seq_length * 2 ** torch.arange(_NTK_LEVELS, device=lengths.device)
    level = (lengths[..., None] > limits).sum(-1)
    return (2 ** (level + 1) - 1).float()


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions, in float32, the two halves of the channels alike.

    Holds no tensor: a prompt's ``alpha`` decides the frequencies.

    Args:
        dim: channels that are rotated.
        base: of the frequencies.
    """

    def __init__(self, dim: int, base: float = 10000) -> None:
        super().__init__()
        self.dim = dim
        self.base = base

    def forward(self, position_ids: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, T] to two [B, T, dim].

        ``alpha``: stretches (see :func:`ntk_alpha`) of rows [B], or, where a row holds several
        prompts, of positions [B, T].
        """
        alpha = alpha[:, None] if alpha.dim() == 1 else alpha
        base = self.base * alpha[..., None] ** (self.dim / (self.dim - 2))
        exponent = torch.arange(0, self.dim, 2, device=position_ids.device) / self.dim
        angle = position_ids[..., None].float() * (1.0 / base**exponent)
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


class QWenAttention(nn.Module):
    """Causal self-attention with one packed projection, in which q, k and v follow each other."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        # transformers' attention functions read these three of the module.
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=not config.no_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        query_scale: Tensor | None,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`QWenBlock.forward`; returns the output and, where computed, the weights."""
        packed = self.c_attn(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))  # [B, heads, T, dim]
        query, key = self._rotate(query, key, *position_embeddings)
        cache = kwargs.pop(CACHE)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        if query_scale is not None:
            query = query * query_scale[:, None, :, None].to(query.dtype)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        context, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attn_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.c_proj(context.flatten(2)), weights

    @staticmethod
    def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate the first channels, as many as ``cos`` has, in float32."""
        dim = cos.shape[-1]
        turned = apply_rotary_pos_emb(query[..., :dim], key[..., :dim], cos, sin)
        query, key = (
            torch.cat([new.type_as(x), x[..., dim:]], dim=-1)
            for new, x in zip(turned, (query, key), strict=True)
        )
        return query, key


class QWenMLP(nn.Module):
    """``c_proj(w1(x) * silu(w2(x)))``."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__()
        width, bias = config.intermediate_size // 2, not config.no_bias
        self.w1 = nn.Linear(config.hidden_size, width, bias=bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] to the same."""
        return self.c_proj(self.w1(hidden_states) * F.silu(self.w2(hidden_states)))


class QWenBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: QWenConfig, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[B, T, hidden_size] to the same.

        Args:
            hidden_states: [B, T, hidden_size].
            kwargs: of the attention: ``position_embeddings`` (cosines and sines [B, T, dim]),
                ``query_scale`` [B, T] or None, ``attention_mask`` as the attention function takes
                it, the cache or None, under the name :data:`CACHE`, by which transformers'
                checkpointing finds it, and what transformers passes on to that function.
        """
        attended, _ = self.attn(self.ln_1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QWenPreTrainedModel(PreTrainedModel):
    """What transformers has to know about these models."""

    config_class = QWenConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]  # noqa: RUF012
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": QWenBlock,
        "attentions": QWenAttention,
    }
    _input_embed_layer = "wte"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, but that the error names what does not fit.

        Raises:
            ValueError: a weight of another shape than the config's, unless
                ``ignore_mismatched_sizes``; or a damaged file.
            OSError: no weights, or a shard that is missing.
        """
        wanted = kwargs.pop("output_loading_info", False)
        lenient = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        where = pretrained_model_name_or_path
        try:
            loaded: Any = super().from_pretrained(where, *args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{where} has an unreadable safetensors file: {error}") from error
        except UnpicklingError:  # its message says how to load the file unsafely
            raise unreadable_pickle(f"pytorch_model*.bin of {where}") from None
        model, info = loaded
        if info["mismatched_keys"] and not lenient:
            problems = [
                f"{key} must be {list(expected)}, got {list(shape)}"
                for key, shape, expected in sorted(info["mismatched_keys"])
            ]
            raise ValueError(f"{where} does not fit its config: {list_problems(problems)}")
        return (model, info) if wanted else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (QWenAttention, QWenMLP)):
            # Each block adds two branches to the residual. This scale, GPT-2's, keeps the sum from
            # growing with depth.
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.c_proj.weight, std=std)

    def _initialize_weights(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        # transformers flags classes of users' code, as this is, and then skips each module whose
        # own tensors are all set. The owners of c_proj own no tensor, so it would skip them always:
        # the flag stays out.
        super()._initialize_weights(module)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        check_not_reentrant(getattr(gradient_checkpointing_func, "keywords", {}))
        func = partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, func, every_n_layers)


class QWenModel(QWenPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = RotaryEmbedding(
            int(config.kv_channels * config.rotary_pct), config.rotary_emb_base
        )
        self.h = nn.ModuleList(QWenBlock(config, i) for i in range(config.num_hidden_layers))
        self.ln_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the last norm.

        Args:
            input_ids: [B, T].
            attention_mask: [B, past + T], 0 where a token is padding; or a ready-made mask.
            position_ids: [B or 1, T]; by default every position counts, padding too, as upstream.
                ``generate`` leaves padding out, so that a padded prompt is as long as it is alone.
                Without attention_mask and cache, positions that do not follow each other begin
                another sequence (packing), which neither sees nor stretches those before it.
            past_key_values: earlier keys and values. The stretch of the rotary frequencies is
                decided on the first call with an empty cache and kept in the cache.
            inputs_embeds: [B, T, hidden_size], in place of input_ids.
            use_cache: whether to return a cache.
            cache: transformers' name, since 5.24, for past_key_values; either will do.
            kwargs: for transformers' attention functions and output recording.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds, a cache by both names, or
                several packed rows with flash attention, which would take each for one sequence.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        cache = one_cache(past_key_values, cache)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        sequences = None
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            count = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
            position_ids = (count + past)[None]
        elif attention_mask is None and cache is None:
            sequences = find_packed_sequence_indices(position_ids)
        if (
            sequences is not None
            and len(inputs_embeds) > 1
            and "flash" in str(self.config._attn_implementation)
        ):
            raise ValueError(
                "position_ids that start anew within a row must be of one row with flash "
                f"attention; got {len(inputs_embeds)} rows"
            )
        # With the cache that came in: with one, transformers does not look for packed sequences.
        # Without them it needs no positions, by which a traced graph would mask all the same.
        packed_ids = None if sequences is None else position_ids
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, packed_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.drop(inputs_embeds)
        alpha = self._ntk_alpha(position_ids, sequences, cache)
        position_embeddings = self.rotary_emb(position_ids, alpha)
        query_scale = self._query_scale(position_ids)
        for block in self.h:
            hidden_states = block(
                hidden_states,
                position_embeddings=position_embeddings,
                query_scale=query_scale,
                attention_mask=mask,
                position_ids=position_ids,
                use_cache=use_cache,
                **{CACHE: cache},
                **kwargs,
            )
        outputs = BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states))
        if use_cache:
            outputs[CACHE] = cache
        return outputs

    def _ntk_alpha(
        self, position_ids: Tensor, sequences: Tensor | None, cache: Cache | None
    ) -> Tensor:
        """The stretch [B or 1] of the rotary base for a prompt's keys.

        With ``sequences`` [B or 1, T], the number of the packed sequence that a position belongs
        to, each position has its own's [B or 1, T].

        The first call of a prompt decides it, and the cache keeps it beside the keys that it
        rotated. A static cache counts its tokens on the device; the choice then happens on the
        device too, and writes into memory that a CUDA graph can keep.
        """
        lengths = position_ids.amax(-1) + 1
        if sequences is not None:
            longest = torch.zeros_like(position_ids).scatter_reduce(
                1, sequences, position_ids + 1, "amax"
            )
            lengths = longest.gather(1, sequences)
        if self.config.use_dynamic_ntk and not self.training:
            alpha = ntk_alpha(lengths, self.config.seq_length)
        else:
            alpha = torch.ones_like(lengths, dtype=torch.float32)
        if cache is None:
            return alpha
        kept, past = getattr(cache, "ntk_alpha", None), cache.get_seq_length()
        if kept is None or (isinstance(past, int) and past == 0):
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(alpha)
            cache.ntk_alpha = kept = alpha  # type: ignore[attr-defined]
        elif isinstance(past, Tensor):
            kept.copy_(torch.where(past == 0, alpha, kept))
        return kept

    def _query_scale(self, position_ids: Tensor) -> Tensor | None:
        """Log-n attention's factor [B, T] of each query: log(position) / log(seq_length), or 1."""
        if self.training or not self.config.use_logn_attn:
            return None
        scale = (position_ids + 1).float().log() / math.log(self.config.seq_length)
        return scale.clamp(min=1.0)


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    """Token ids to logits."""

    transformer_class: type[QWenModel] = QWenModel
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012

    def __init__(self, config: QWenConfig) -> None:
        super().__init__(config)
        self.transformer = self.transformer_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class's name
        self.post_init()

    @can_return_tuple
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
        *,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocab_size], and the loss where labels are given.

        Args:
            labels: [B, T], the ids themselves (they are shifted here), -100 where none counts.
            logits_to_keep: the last so many positions, or the positions in a tensor; 0 for all.
            kwargs: and the other arguments: see :meth:`QWenModel.forward`. ``num_items_in_batch``
                is the divisor of the loss.

        With gradient checkpointing a training step returns the loss and no logits: it computes
        them 256 positions at a time, and again so in backward. That saves 3 GiB for 2048 tokens of
        QWen's vocabulary.
        """
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        loss, logits = None, None
        if labels is not None and self.training and self.transformer.gradient_checkpointing:
            loss = self._loss_alone(hidden_states, labels, **kwargs)
        else:
            last = isinstance(logits_to_keep, int)
            keep = slice(-logits_to_keep, None) if last else logits_to_keep
            logits = self.lm_head(hidden_states[:, keep])
            if labels is not None:
                loss = self.loss_function(
                    logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
                )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _loss_alone(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of hidden states [B, T, hidden_size]; backward keeps them and no logits."""
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
        if num_items_in_batch is None:
            num_items_in_batch = (shifted != -100).sum()

        def chunk_loss(hidden: Tensor, targets: Tensor) -> Tensor:
            return self.loss_function(
                logits=self.lm_head(hidden),
                labels=None,
                shift_labels=targets,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                **kwargs,
            )

        chunks = zip(
            hidden_states.flatten(0, 1).split(_LOSS_CHUNK), shifted.split(_LOSS_CHUNK), strict=True
        )
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks]
        return torch.stack(losses).sum()


AutoModel.register(QWenConfig, QWenModel)
AutoModelForCausalLM.register(QWenConfig, QWenLMHeadModel)
