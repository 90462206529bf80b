"""Configuration of the language model, QWen-7B, under upstream's field names."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from monkey_kernels.checks import check_int, check_number


class QWenConfig(PreTrainedConfig):
    """Upstream's fields and defaults.

    Args:
        vocab_size: rows of the embedding.
        hidden_size: width; must be num_attention_heads * kv_channels.
        num_hidden_layers: blocks.
        num_attention_heads: heads.
        emb_dropout_prob: dropout of the embeddings in training.
        attn_dropout_prob: dropout of the attention weights in training.
        layer_norm_epsilon: of the RMS norms.
        initializer_range: standard deviation of new weights.
        max_position_embeddings: positions that the model is meant for; limits nothing.
        kv_channels: width of a head.
        rotary_pct: share of a head's channels that are rotated.
        rotary_emb_base: base of the rotary frequencies.
        use_dynamic_ntk: whether inference on prompts longer than seq_length stretches the rotary
            frequencies.
        use_logn_attn: whether inference scales queries beyond seq_length by the log of their
            position.
        seq_length: tokens that the model was trained on; upstream has it in every config file.
        intermediate_size: twice the hidden width of the MLP.
        no_bias: whether every projection but c_attn goes without a bias.
        scale_attn_weights, bf16, fp16, fp32, use_flash_attn: read and saved for upstream's config
            files. Scores are always scaled, as upstream; what the weights are cast to is ``dtype``,
            and which attention runs is ``attn_implementation``.

    Raises:
        TypeError: a field is no number that must be one.
        ValueError: a number out of its range, hidden_size is not num_attention_heads * kv_channels,
            intermediate_size is odd, or more than one of bf16, fp16 and fp32 is set.

    Source: upstream ``monkey_model/configuration_qwen.py``.
    """

    model_type = "qwen"
    # Without annotation: that would make it a field.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 8192
    scale_attn_weights: bool = True
    use_cache: bool = True
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    kv_channels: int = 128
    rotary_pct: float | int = 1.0
    rotary_emb_base: float | int = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_flash_attn: bool | str = "auto"
    seq_length: int = 2048
    intermediate_size: int = 22016
    no_bias: bool = True
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            check_int(name, getattr(self, name), least=1, most=2**24)  # beyond, torch overflows
        if self.hidden_size != self.num_attention_heads * self.kv_channels:
            raise ValueError(
                "hidden_size must be num_attention_heads * kv_channels, "
                f"{self.num_attention_heads} * {self.kv_channels}; got {self.hidden_size}"
            )
        for name in ("layer_norm_epsilon", "rotary_emb_base"):
            check_number(name, getattr(self, name), 0, above=True)
        check_number("rotary_pct", self.rotary_pct, 0, most=1, above=True)
        check_number("initializer_range", self.initializer_range, 0)
        for name in ("emb_dropout_prob", "attn_dropout_prob"):
            check_number(name, getattr(self, name), 0, most=1)
        if self.seq_length < 2:
            raise ValueError(f"seq_length must be at least 2; got {self.seq_length}")
        if self.intermediate_size % 2:
            raise ValueError(f"intermediate_size must be even; got {self.intermediate_size}")
        if self.bf16 + self.fp16 + self.fp32 > 1:
            raise ValueError(
                "at most one of bf16, fp16 and fp32 can be true; got "
                f"bf16={self.bf16}, fp16={self.fp16}, fp32={self.fp32}"
            )
        super().__post_init__(**kwargs)


AutoConfig.register(QWenConfig.model_type, QWenConfig)
