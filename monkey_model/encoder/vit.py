"""The blocks of the ViT under upstream's names: attention, MLP, and the adapters beside them.

Their tensors are [N, crops, E], as upstream's; inside, each works on the transposed view
[crops, N, E], which is contiguous where :class:`monkey_model.visual.VisionTransformer` calls them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from monkey_kernels import add_layer_norm, self_attention
from monkey_kernels.checks import check_divides
from monkey_model.encoder.crop_adapters import (
    AdapterBank,
    AdapterSelection,
    adapter_bank,
    with_adapters,
)
from monkey_model.gradient_checkpointing import check_not_reentrant

#: Blocks between two inputs that gradient checkpointing keeps. The kept inputs and what the blocks
#: in between keep while they are run again are smallest together at 2 to 4 of 48 blocks.
CHECKPOINT_EVERY = 2


def embed_patches(conv: nn.Module, crops: Tensor) -> Tensor:
    """``conv``, a convolution whose stride is its kernel, of crops [N, 3, H, W]: a row per patch.

    Returns:
        [N, patches, width], row by row of the crop.
    """
    # Wrapped, or offloaded and brought by its call alone: it has to run as it is.
    if type(conv) is not nn.Conv2d or conv.weight.is_meta:
        return conv(crops).flatten(2).transpose(1, 2)
    # Patches do not overlap, so the convolution is one plain product, 2.6x (float32) to 8x
    # (bfloat16) as fast on a CPU as the convolution.
    patch = conv.weight.shape[-1]
    rows, columns = crops.shape[2] // patch, crops.shape[3] // patch
    patches = crops.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    return F.linear(patches, conv.weight.flatten(1))


def _needs_gradient(x: Tensor, modules: nn.Module) -> bool:
    """Whether backward will come by here: nothing is kept for blocks below all that trains."""
    return torch.is_grad_enabled() and (
        x.requires_grad or any(p.requires_grad for p in modules.parameters())
    )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does to its weight, and nobody watches."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    # accelerate sets another forward on the module that it offloads.
    return type(module) is kind and not hooks and "forward" not in vars(module)


def _add_and_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``x + branch``, and ``norm`` of it."""
    # torch.compile makes one kernel of the two by itself.
    if _is_plain(norm, nn.LayerNorm) and not torch.compiler.is_compiling():
        weight, bias = cast(nn.LayerNorm, norm).weight, cast(nn.LayerNorm, norm).bias
        tensors = (branch, weight, bias)
        if all(t is not None and (t.dtype, t.device) == (x.dtype, x.device) for t in tensors):
            return add_layer_norm(x, branch, weight, bias, eps=cast(nn.LayerNorm, norm).eps)
    x = x + branch
    return x, norm(x)


def _has_gelu_epilogue(x: Tensor) -> bool:
    """Whether a product on this device applies GELU to its sums before it rounds them.

    cuBLASLt and hipBLASLt do. Their GELU is the tanh approximation, up to 5e-4 off. In half
    precision that is less than what rounding the sums first costs, so the error of the two together
    falls (by a third in bfloat16); in float32 it would rise.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    no_backward = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return x.device.type == "cuda" and half and no_backward


class _Recomputing(nn.Module):
    """A module that keeps the inputs of its parts for backward and computes the rest again."""

    def __init__(self) -> None:
        super().__init__()
        self.recompute = True

    def _adapted(
        self,
        base: Callable[[Tensor], Tensor],
        x: Tensor,
        adapters: AdapterBank,
        selection: AdapterSelection,
    ) -> Tensor:
        """:func:`with_adapters`, of which ``x`` alone is kept."""
        plain = selection is None or len(adapters) == 0
        if plain and isinstance(base, nn.Linear):
            return base(x)  # by itself it keeps no more
        if not (self.recompute and _needs_gradient(x, self)):
            return with_adapters(base, x, adapters, selection)
        return checkpoint(
            with_adapters,
            base,
            x,
            adapters,
            selection,
            use_reentrant=False,
            preserve_rng_state=self.training,  # for the adapters' dropout
        )


class VisualAttention(_Recomputing):
    """Self-attention with a packed projection and per-crop adapters; [N, crops, E], as upstream.

    The packed projection is head-major: each head's q, k and v lie side by side, so all three are
    strided views that ``F.scaled_dot_product_attention`` reads where they are.

    Args:
        embed_dim: width E.
        num_heads: heads; divides E.
        lora_repeat_num: number of adapters.

    Raises:
        ValueError: num_heads does not divide embed_dim, or kdim or vdim is another width.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        lora_repeat_num: int = 4,
    ) -> None:
        super().__init__()
        check_divides("num_heads", num_heads, "embed_dim", embed_dim)
        for name, dim in (("kdim", kdim), ("vdim", vdim)):
            if dim not in (None, embed_dim):
                raise ValueError(
                    f"{name} must be embed_dim, {embed_dim} (self-attention); got {dim}"
                )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        # Upstream ignores `bias` too: its checkpoints have both biases.
        self.in_proj = nn.Linear(embed_dim, 3 * embed_dim)
        self.in_proj_lora = adapter_bank(lora_repeat_num, embed_dim, 3 * embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj_lora = adapter_bank(lora_repeat_num, embed_dim, embed_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        idx: AdapterSelection = None,
    ) -> Tensor:
        """``query`` is [N, crops, E], ``key`` and ``value`` are it or None; returns its shape.

        ``attn_mask`` is added to the scores: [N, N], or [crops * heads or 1, N, N].

        Raises:
            ValueError: key or value is another tensor than query.
        """
        if not (key is None or key is query) or not (value is None or value is query):
            raise ValueError("key and value must be the tensor query itself (self-attention)")
        x = query.transpose(0, 1)
        packed = self._adapted(self.in_proj, x, self.in_proj_lora, idx)
        heads = packed.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        q, k, v = heads.chunk(3, dim=-1)
        if attn_mask is not None and attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads if len(attn_mask) > 1 else 1))
        if attn_mask is None:
            context = self_attention(q, k, v)
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        context = context.transpose(1, 2).flatten(2)
        out = self._adapted(self.out_proj, context, self.out_proj_lora, idx)
        return out.transpose(0, 1)


class VisualAttentionBlock(_Recomputing):
    """Pre-norm transformer block; its third adapter bank reads the residual before ``ln_2``.

    Args:
        d_model: width.
        n_head: attention heads.
        mlp_ratio: hidden width of the MLP over d_model.
        act_layer: makes the activation.
        norm_layer: makes the LayerNorms.
        is_cross_attention: kept for upstream's signature; only False works, there as here.
        lora_repeat_num: number of adapters of each projection.
    """

    def __init__(
        self,
        d_model: int,
        n_head: int,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        is_cross_attention: bool = False,
        lora_repeat_num: int = 4,
    ) -> None:
        super().__init__()
        if is_cross_attention:
            raise ValueError("is_cross_attention must be False: only self-attention is supported")
        mlp_width = int(d_model * mlp_ratio)
        self.ln_1 = norm_layer(d_model)
        self.ln_2 = norm_layer(d_model)
        self.attn = VisualAttention(d_model, n_head, lora_repeat_num=lora_repeat_num)
        self.mlp = nn.Sequential(
            OrderedDict(
                c_fc=nn.Linear(d_model, mlp_width),
                gelu=act_layer(),
                c_proj=nn.Linear(mlp_width, d_model),
            )
        )
        self.mlp_lora = adapter_bank(lora_repeat_num, d_model, d_model, r=32)

    def attention(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        idx: AdapterSelection = None,
    ) -> Tensor:
        """The attention alone, [N, crops, d_model]; ``k_x`` and ``v_x`` default to ``q_x``."""
        # They go on as None: ZeRO-3 gives a module a new tensor for each that it is called with.
        mask = None if attn_mask is None else attn_mask.to(q_x.dtype)
        return self.attn(q_x, k_x, v_x, attn_mask=mask, idx=idx)

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        idx: AdapterSelection = None,
    ) -> Tensor:
        """[N, crops, d_model] to the same; ``k_x`` and ``v_x`` are unused, as upstream."""
        x = q_x.transpose(0, 1)
        # A LayerNorm copies rows that do not follow each other.
        normed = self.ln_1(x).transpose(0, 1)
        branch = self.attention(normed, attn_mask=attn_mask, idx=idx).transpose(0, 1)
        if _needs_gradient(branch, self):
            # The sum alone is kept, and its LayerNorm computed again, unless everything is kept.
            out = self._adapted(self._mlp, x + branch, self.mlp_lora, idx)
        else:
            x, normed = _add_and_norm(x, branch, self.ln_2)
            out = with_adapters(partial(self._mlp, normed=normed), x, self.mlp_lora, idx)
        return out.transpose(0, 1)

    def _mlp(self, x: Tensor, normed: Tensor | None = None) -> Tensor:
        """``x`` and the MLP of ``normed``, which is ``ln_2`` of ``x``."""
        normed = self.ln_2(x) if normed is None else normed
        return x + self._run_mlp(normed)

    def _run_mlp(self, x: Tensor) -> Tensor:
        """``mlp`` of ``x``, GELU in the first product's epilogue where there is one."""
        c_fc, gelu, c_proj = cast(Any, self.mlp)
        plain = (
            _has_gelu_epilogue(x)
            and _is_plain(self.mlp, nn.Sequential)
            and _is_plain(gelu, nn.GELU)
            and _is_plain(c_fc, nn.Linear)
            and c_fc.weight.dtype == x.dtype
            and not is_traceable_wrapper_subclass(c_fc.weight)  # quantised or sharded
        )
        if not plain:
            return self.mlp(x)
        rows = x.flatten(0, -2)
        hidden = torch._addmm_activation(c_fc.bias, rows, c_fc.weight.T, use_gelu=True)
        return c_proj(hidden.view(*x.shape[:-1], -1))


class TransformerBlock(nn.Module):
    """The stack of blocks (upstream's name)."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        lora_repeat_num: int = 4,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.blocks_compiled = False
        # The two names that transformers' gradient_checkpointing_enable looks for and sets.
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Tensor] = partial(
            checkpoint, use_reentrant=False
        )
        self.resblocks = nn.ModuleList(
            VisualAttentionBlock(
                width,
                heads,
                mlp_ratio,
                act_layer=act_layer,
                norm_layer=norm_layer,
                lora_repeat_num=lora_repeat_num,
            )
            for _ in range(layers)
        )

    def gradient_checkpointing_enable(self, settings: dict[str, Any] | None = None) -> None:
        """In training, keep only every second block's input and compute the rest again in backward.

        This comes on top of :meth:`recompute`, and takes about a third more time for a step.

        Args:
            settings: for ``torch.utils.checkpoint.checkpoint``, as in transformers.

        Raises:
            ValueError: ``use_reentrant=True``, with which frozen inputs leave the adapters without
                a gradient.
        """
        settings = {"use_reentrant": False, **(settings or {})}
        check_not_reentrant(settings)
        self._gradient_checkpointing_func = partial(checkpoint, **settings)
        self.gradient_checkpointing = True

    def recompute(self, enabled: bool = True) -> None:
        """Keep less for backward (the default), or keep everything.

        Where it is enabled, a block keeps its packed projection and four tensors of the width,
        0.22 of what upstream's form keeps; LayerNorm, GELU and adapters, and the MLP's first
        product, are computed again in backward: about a sixth more arithmetic.
        """
        for block in self.resblocks:
            block.recompute = block.attn.recompute = enabled  # type: ignore[union-attr,assignment]

    def compile(self, **kwargs: Any) -> None:
        """Compile one block, and run all of them with it (regional compilation).

        The blocks compile at their first call; crops of no adapter, of mixed adapters, and the
        first two batch sizes make a graph each, further ones none.

        Args:
            kwargs: for ``torch.compile``, over ``fullgraph=True``.
        """
        for block in self.resblocks:
            block.compile(**{"fullgraph": True, **kwargs})
        self.blocks_compiled = True

    def _norm_weight(self) -> Tensor:
        # A LayerNorm is never quantised; upstream asks c_fc, which under 4-bit is uint8.
        return cast(VisualAttentionBlock, self.resblocks[0]).ln_1.weight  # type: ignore[return-value]

    def get_cast_dtype(self) -> torch.dtype:
        """The dtype that the blocks compute in."""
        return self._norm_weight().dtype

    def get_cast_device(self) -> torch.device:
        """The device of the first block."""
        return self._norm_weight().device

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, idx: AdapterSelection = None
    ) -> Tensor:
        """[N, crops, width] -> [N, crops, width]."""
        recompute = self.gradient_checkpointing and self.training
        step = CHECKPOINT_EVERY if recompute else self.layers
        for start in range(0, self.layers, step):
            blocks = self.resblocks[start : start + step]
            if recompute and _needs_gradient(x, blocks):
                x = self._gradient_checkpointing_func(_run, blocks, x, attn_mask, idx)
            else:
                x = _run(blocks, x, attn_mask, idx)
        return x


def _run(
    blocks: nn.ModuleList, x: Tensor, attn_mask: Tensor | None, idx: AdapterSelection
) -> Tensor:
    for block in blocks:
        x = block(x, attn_mask=attn_mask, idx=idx)
    return x
