"""Stand-ins in upstream's layout: the names, the sequential encoder, the loop over crops.

What someone has who keeps their own upstream model object. The LLM is only a stand-in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from tests.helpers.stock_visual import VisionTransformer
from tests.helpers.tiny import END, IMG, PAD, QUERIES, SPAN, VOCAB

VISUAL = {
    "image_size": 896,
    "patch_size": 14,
    "width": 16,
    "layers": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "n_queries": QUERIES,
    "output_dim": 128,
}


class Attention(nn.Module):
    """Stand-in: projections of upstream's names, no attention."""

    def __init__(self, width):
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x):
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return self.c_proj(torch.tanh(q + k) * v.cumsum(1))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.w1 = nn.Linear(width, 2 * width, bias=False)
        self.w2 = nn.Linear(width, 2 * width, bias=False)
        self.c_proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * F.silu(self.w2(x)))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.RMSNorm(width)
        self.attn = Attention(width)
        self.ln_2 = nn.RMSNorm(width)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class StockTransformer(nn.Module):
    def __init__(self, visual, blocks):
        super().__init__()
        width = visual["output_dim"]
        self.wte = nn.Embedding(VOCAB, width)
        self.h = nn.ModuleList(Block(width) for _ in range(blocks))
        self.ln_f = nn.RMSNorm(width)
        self.visual = VisionTransformer(**visual)

    def read_images(self, input_ids):
        """[images, 5 * n_queries, width], from the paths inside the ids."""
        paths = []
        for row, start in (input_ids == IMG).nonzero().tolist():
            span = input_ids[row, start + 1 : start + 1 + SPAN].tolist()
            paths.append(bytes(span[: span.index(PAD)]).decode())
        windows, images_448 = self.visual.encode(paths)
        tokens, idx = [], 0
        for row in windows:
            for crop in row:
                tokens.append(self.visual(crop, idx=idx))
                idx += 1
        return torch.cat([*tokens, self.visual(images_448)], dim=1)

    def forward(self, input_ids):
        x = self.wte(input_ids)
        if (input_ids == IMG).any():
            images = self.read_images(input_ids).to(x.dtype)
            x = x.clone()
            starts = (input_ids == IMG).nonzero().tolist()
            for image, (row, start) in zip(images, starts, strict=True):
                x[row, start + 1 : start + 1 + SPAN] = image
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class StockModel(nn.Module):
    """Upstream's layout, seeded; no adapter is a no-op."""

    def __init__(self, blocks=2, seed=0, **visual):
        torch.manual_seed(seed)
        super().__init__()
        self.config = PretrainedConfig(visual={**VISUAL, **visual})
        self.transformer = StockTransformer(self.config.visual, blocks)
        self.lm_head = nn.Linear(self.config.visual["output_dim"], VOCAB, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.endswith(("lora_b.weight", "lora_scale")):
                    parameter.normal_(std=0.5)

    def forward(self, input_ids, labels=None):
        logits = self.lm_head(self.transformer(input_ids))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def image_ids(path: str) -> Tensor:
    """A prompt [1, N] with one image, its path in the ids as bytes."""
    data = [*str(path).encode()]
    span = data + [PAD] * (SPAN - len(data))
    return torch.tensor([[1, IMG, *span, END, 5, 6, 7]])
