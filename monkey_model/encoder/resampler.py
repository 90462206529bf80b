"""The resampler: learned queries that read a crop's patch tokens by one cross-attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monkey_kernels import resampler_attention
from monkey_kernels.checks import check_divides
from monkey_model.encoder.folded_resampler import FoldedResampler, fold_resampler
from monkey_model.encoder.parameter_cache import ParameterCache
from monkey_model.encoder.positions import get_2d_sincos_pos_embed, get_abs_pos, resized_positions


class Resampler(nn.Module):
    """``grid_size**2`` learned queries attend to a crop's tokens: [crops, N, kv_dim] -> queries.

    Args:
        grid_size: square root of the number of queries.
        embed_dim: width of the queries and of the attention.
        num_heads: attention heads; divides embed_dim.
        kv_dim: width of the tokens; embed_dim if None.
        norm_layer: makes the LayerNorms of queries and tokens.

    Raises:
        ValueError: num_heads does not divide embed_dim.

    Source: upstream ``monkey_model/visual.py``; Bai et al., Qwen-VL (2023).
    """

    def __init__(
        self,
        grid_size: int,
        embed_dim: int,
        num_heads: int,
        kv_dim: int | None = None,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
    ) -> None:
        super().__init__()
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        self.fold_enabled = True
        self._folded: ParameterCache[FoldedResampler] = ParameterCache()
        self._positions: ParameterCache[Tensor] = ParameterCache()
        self.num_queries = grid_size**2
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        # torch.tensor obeys the default device, from_numpy does not: a meta model holds no memory.
        table = torch.tensor(get_2d_sincos_pos_embed(embed_dim, grid_size))
        # from_pretrained(dtype=...) sets the default dtype, in which other parameters are made too.
        self.pos_embed = nn.Parameter(table.to(torch.get_default_dtype()), requires_grad=False)
        self.query = nn.Parameter(torch.zeros(self.num_queries, embed_dim))
        self.kv_proj: nn.Module = nn.Identity()
        if kv_dim is not None and kv_dim != embed_dim:
            self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q = norm_layer(embed_dim)
        self.ln_kv = norm_layer(embed_dim)
        nn.init.trunc_normal_(self.query, std=0.02)
        self.apply(self._init_weights)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def fold(self, enabled: bool = True) -> Resampler:
        """Allow (the default) or forbid the folded form of ``folded_resampler.py``.

        The folded form runs in eval mode while gradients are off, if all parts are plain modules:
        no adapter or quantised layer wraps a projection, and no hook watches one. The first such
        call builds it. A later one builds it again after a parameter has changed, moved or been
        cast, and after a call with gradients. Compiled and exported graphs use what an eager call
        has built, with the parameters of that time, until the module is moved, loaded or trained.

        Call ``fold()`` after a change that the module cannot see: a change through
        ``parameter.data``, or a change in place, inside ``torch.inference_mode()``, to a parameter
        that was made in that mode. (Outside it torch refuses such a change.) The module sees every
        ``load_state_dict``, on itself or on a module around it.
        """
        self.fold_enabled = enabled
        self._forget()
        return self

    def _forget(self) -> None:
        self._folded.drop()
        self._positions.drop()

    def _foldable(self) -> bool:
        """Whether all parts are of the classes that the fold multiplies out, without hooks."""
        return (
            self.fold_enabled
            and type(self.kv_proj) is nn.Linear
            and type(self.attn) is nn.MultiheadAttention
            # nn.MultiheadAttention itself makes its out_proj of this class.
            and type(self.attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
            and type(self.ln_kv) is nn.LayerNorm
            and self.ln_kv.bias is not None
            # A hook on a part expects a call of that part; the fold makes none.
            and not any(m._forward_hooks or m._forward_pre_hooks for m in self._parts())
        )

    def _parts(self) -> tuple[nn.Module, ...]:
        return self.kv_proj, self.attn, self.attn.out_proj, self.ln_q, self.ln_kv

    def _fold(self, tokens: int) -> FoldedResampler | None:
        """The folded form for crops of this many tokens, or None: then the plain form runs."""
        if self.training or torch.is_grad_enabled():
            # An optimizer's step may follow. A fused one changes parameters, not their versions.
            self._folded.drop()
            return None
        if not self._foldable():
            return None
        if torch.compiler.is_compiling():
            return self._folded.held(tokens)
        parameters = list(self.parameters())
        if not ParameterCache.can_watch(parameters):
            return None

        def build() -> FoldedResampler:
            return fold_resampler(
                query=self.query,
                query_positions=self.pos_embed,
                ln_q=cast(nn.LayerNorm, self.ln_q),
                kv_proj=cast(nn.Linear, self.kv_proj),
                ln_kv=cast(nn.LayerNorm, self.ln_kv),
                key_positions=get_abs_pos(self.pos_embed, tokens),
                attn=self.attn,
            )

        return self._folded.get(parameters, tokens, build)

    def train(self, mode: bool = True) -> Resampler:
        """As ``nn.Module.train``; training drops the folded form."""
        if mode:
            self._folded.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Resampler:
        self._forget()  # the module moves or is cast
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Tokens [crops, N, kv_dim] to visual tokens [crops, grid_size**2, embed_dim].

        ``attn_mask`` is that of ``nn.MultiheadAttention``: boolean (True: not allowed) or added to
        the scores, [Nq, N] or [crops * num_heads, Nq, N].
        """
        if attn_mask is None and (folded := self._fold(x.shape[1])) is not None:
            return folded(x)
        query, keys, tokens = self._attended(x)
        if type(self.attn) is not nn.MultiheadAttention:
            # Something wraps the attention as a whole: call it, and nothing in its place.
            repeated = query[:, None].expand(-1, tokens.shape[0], -1)
            keys, tokens = keys.transpose(0, 1), tokens.transpose(0, 1)
            out, _ = self.attn(repeated, keys, tokens, attn_mask=attn_mask, need_weights=False)
            return out.transpose(0, 1)
        weight, bias = self._in_proj()
        q, k, v = map(F.linear, (query, keys, tokens), weight.chunk(3), bias.chunk(3))
        if attn_mask is None:
            out = resampler_attention(q, k, v, num_heads=self.num_heads)
        else:
            out = self._masked_attention(q, k, v, attn_mask)
        return self.attn.out_proj(out)

    def attention_weights(self, x: Tensor) -> Tensor:
        """Where each query reads: softmax(q k^T / sqrt(head width)), in plain torch, not folded.

        It is what :meth:`forward`, which never holds it in memory, multiplies the values by. At
        real size it takes 32 MiB for each crop.

        Args:
            x: tokens [crops, N, kv_dim].

        Returns:
            [crops, num_heads, grid_size**2, N], at least float32; rows sum to 1.

        Raises:
            TypeError: something wraps the attention as a whole, as an adapter of peft's does.
        """
        if type(self.attn) is not nn.MultiheadAttention:
            raise TypeError(
                "attn must be a plain nn.MultiheadAttention, with what wraps it merged, to say "
                f"where it reads; got {type(self.attn).__name__}"
            )
        query, keys, _ = self._attended(x)
        weight, bias = self._in_proj()
        q, k = map(F.linear, (query, keys), weight.chunk(3)[:2], bias.chunk(3)[:2])
        q, k = (y.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for y in (q, k))
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) * q.shape[-1] ** -0.5) @ k.to(wide).transpose(-2, -1)
        return scores.softmax(dim=-1)

    def _attended(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the attention takes: queries [Nq, E], keys and values [crops, N, E]."""
        tokens = self.ln_kv(self.kv_proj(x))
        query = self.ln_q(self.query) + self.pos_embed
        keys = tokens + resized_positions(self._positions, self.pos_embed, tokens.shape[1])
        return query, keys, tokens

    def _in_proj(self) -> tuple[Tensor, Tensor]:
        """The packed projection's weight and bias, also where accelerate offloads them."""
        if self.attn.in_proj_weight.is_meta:
            from accelerate.utils import align_module_device

            # accelerate brings the weights in a call of self.attn, and no such call happens here.
            with align_module_device(self.attn):
                return self.attn.in_proj_weight, self.attn.in_proj_bias
        return self.attn.in_proj_weight, self.attn.in_proj_bias

    def _masked_attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = ~mask if mask.dtype == torch.bool else mask.to(q.dtype)
        if mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v, mask)
        return out.transpose(1, 2).flatten(2)
