"""The resampler for inference, with its linear maps multiplied out: half the arithmetic.

With W_p = kv_proj [E, Dv], C = I - 11^T/E (takes the mean off), g and b the weight and bias of
ln_kv, and y = C W_p x, the LayerNorm is ``y / s * g + b`` with ``s^2 = |y|^2 / E + eps``. So

- K = W_k diag(g) C W_p (x / s) + [W_k (P + b) + b_k]: one product of size [E, Dv] in place of
  [E, Dv] and [E, E]; the bracket depends on the position alone;
- V = W_v diag(g) C W_p (x / s) + [W_v b + b_v]: the bracket passes through the softmax, whose rows
  sum to 1, and through W_o into the output's bias;
- s^2 = |R x|^2 + eps with R upper triangular, from the QR of C W_p / sqrt(E);
- the queries are constants, projected once.

Folded weights have to be rounded to the parameters' dtype, and that error is the same for every
token: attention averages the rounding of tokens away, but not this. It shows where tokens share a
large component, as a ViT's do. So the mean m of a crop's x / s is taken off first. In K it would
add the same score to every key, which the softmax ignores; in V it again goes straight to the
output, as (W_o W_v diag(g) C W_p) m, one row per crop and therefore cheap in float64: in float32
the order in which a BLAS adds a few huge channels and many small ones would decide on the error of
the whole. What is left has 0.2 to 0.95 times the float64 error of the unfolded form, and 1.07 times
in the worst case of the tests (a few huge channels, bfloat16).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monkey_kernels import resampler_attention

# Of the triangle R. 4 take half the time of the whole square on a CPU, 8 are hardly faster.
_NORM_BLOCKS = 4


@dataclass(frozen=True)
class FoldedResampler:
    """The constants of a resampler for crops of N tokens; see the module's docstring."""

    num_heads: int
    eps: float
    norm: Tensor  # R [Dv, Dv]
    kv_weight: Tensor  # [2E, Dv]
    query: Tensor  # [Nq, E]
    key_bias: Tensor  # [N, E]
    out_weight: Tensor  # W_o [E, E]
    out_bias: Tensor  # [E] float32 (float64 in a float64 model)
    mean_weight: Tensor  # W_o W_v diag(g) C W_p [E, Dv] float64

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens [crops, N, Dv] to visual tokens [crops, Nq, E]."""
        inverse = (self._square_norm(x) + self.eps).rsqrt()
        scaled = x * inverse  # promoted to float32
        mean = scaled.mean(dim=1, keepdim=True)
        key, value = F.linear((scaled - mean).to(x.dtype), self.kv_weight).chunk(2, dim=-1)
        key += self.key_bias
        query = self.query.to(key.dtype)  # under autocast the projections are of another dtype
        out = F.linear(
            resampler_attention(query, key, value, num_heads=self.num_heads), self.out_weight
        )
        with torch.autocast(x.device.type, enabled=False):
            bias = F.linear(mean.double(), self.mean_weight).to(mean.dtype) + self.out_bias
        return (out + bias).to(out.dtype)

    def _square_norm(self, x: Tensor) -> Tensor:
        """|R x|^2, [crops, N, 1] in float32: row blocks of R, without the zeros before them."""
        rows = x.flatten(0, 1)
        step = -(-rows.shape[1] // _NORM_BLOCKS)
        total = torch.zeros((), dtype=self.out_bias.dtype, device=x.device)
        for start in range(0, rows.shape[1], step):
            block = self.norm[start : start + step, start:]
            y = F.linear(rows[:, start:], block).to(total.dtype)
            total = total + y.square().sum(-1, keepdim=True)
        return total.unflatten(0, x.shape[:2])


def fold_resampler(
    *,
    query: Tensor,
    query_positions: Tensor,
    ln_q: nn.LayerNorm,
    kv_proj: nn.Linear,
    ln_kv: nn.LayerNorm,
    key_positions: Tensor,
    attn: nn.MultiheadAttention,
) -> FoldedResampler:
    """Multiply out the weights of a resampler in float64, which autocast leaves alone.

    Args:
        query: the learned queries [Nq, E], and query_positions: added to them after ``ln_q``.
        kv_proj: W_p, and ln_kv: with a bias.
        key_positions: P [N, E], of the tokens.
        attn: the cross-attention.
    """
    with torch.no_grad():
        dtype = query.dtype
        precise = torch.promote_types(dtype, torch.float32)
        g, b = ln_kv.weight.double(), ln_kv.bias.double()
        projection = kv_proj.weight.double()
        projection = projection - projection.mean(dim=0)
        r = torch.linalg.qr(projection / math.sqrt(attn.embed_dim), mode="r").R
        projection *= g[:, None]
        w_q, w_k, w_v = attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = (bias.double() for bias in attn.in_proj_bias.chunk(3))

        # One wide matrix at a time: in float64 each is 134 MB.
        normed = copy.deepcopy(ln_q).double()(query.double())
        projected = F.linear(normed + query_positions.double(), w_q.double(), b_q)
        wide = w_k.double()
        key_weight = wide @ projection
        key_bias = F.linear(key_positions.double() + b, wide, b_k)
        wide = w_v.double()
        value_weight = wide @ projection
        value_bias = wide @ b + b_v
        wide = attn.out_proj.weight.double()
        return FoldedResampler(
            num_heads=attn.num_heads,
            eps=ln_kv.eps,
            norm=r.to(dtype),
            kv_weight=torch.cat([key_weight, value_weight]).to(dtype),
            query=projected.to(dtype),
            key_bias=key_bias.to(dtype),
            out_weight=attn.out_proj.weight.detach(),
            out_bias=(wide @ value_bias + attn.out_proj.bias.double()).to(precise),
            mean_weight=wide @ value_weight,
        )
