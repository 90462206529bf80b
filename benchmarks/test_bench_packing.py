"""A training step of a language model on short conversations: in rows of their own, and packed.

The same conversations each time, so the same loss and gradients. Rows of their own are padded to
the longest of their batch: "rows" takes them as they come, "library" sorted by length and a quarter
at a time, as transformers' group_by_length does at best. "ours" takes a packed sequence at a time.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import assert_same
from benchmarks.timing import measure
from benchmarks.workloads import DEVICE, FASTEST, SCALE
from monkey_model.configuration_qwen import QWenConfig
from monkey_model.modeling_qwen import QWenLMHeadModel
from monkey_model.training.conversations import IGNORED, ConversationCollator
from monkey_model.training.packing import pack

CONVERSATIONS, CAPACITY = (16, 1024) if SCALE == "real" else (8, 256)
WIDTH, VOCABULARY = (512, 8192) if SCALE == "real" else (64, 128)


@pytest.fixture(scope="module")
def model():
    """Four blocks of a language model: in proportion, between its head and its attention."""
    torch.manual_seed(0)
    config = QWenConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=4,
        num_attention_heads=WIDTH // 64,
        kv_channels=64,
        intermediate_size=5 * WIDTH // 2,
        seq_length=CAPACITY,
    )
    return QWenLMHeadModel(config).to(DEVICE, getattr(torch, FASTEST)).train()


def conversations():
    """Most of tens of tokens, a few of hundreds: as questions about pictures' text are."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(CONVERSATIONS, generator=generator)
    lengths = (64 * (0.8 * spread).exp()).long().clamp(8, CAPACITY // 2).tolist()
    for length in lengths:
        ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
        labels = [IGNORED] * (length // 2) + ids[length // 2 :]
        yield {"input_ids": ids, "labels": labels, "images": (), "where": ""}


@pytest.mark.parametrize("provider", ["rows", "library", "ours, packed"])
def test_training_step(benchmark, model, provider):
    records = list(conversations())
    lengths = [len(record["input_ids"]) for record in records]
    collate = ConversationCollator(0, None)
    by_length = sorted(records, key=lambda record: len(record["input_ids"]))
    quarter = CONVERSATIONS // 4
    packs = [[records[i] for i in members] for members in pack(lengths, CAPACITY)]
    batches = {
        "rows": [collate(records)],
        "library": [collate(by_length[i : i + quarter]) for i in range(0, len(records), quarter)],
        "ours, packed": [collate([members]) for members in packs],
    }
    batches = {
        name: [{key: value.to(DEVICE) for key, value in batch.items()} for batch in given]
        for name, given in batches.items()
    }
    learned = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches["rows"])

    def step(given):
        model.zero_grad(set_to_none=True)
        losses = []
        for batch in given:
            loss = model(**batch, use_cache=False, num_items_in_batch=learned).loss
            loss.backward()
            losses.append(loss.detach())
        return [sum(losses), *(parameter.grad for parameter in model.parameters())]

    positions = {
        name: sum(b["input_ids"].numel() for b in given) for name, given in batches.items()
    }
    benchmark.extra_info["positions"] = positions[provider]
    benchmark.group = (
        f"training step, {CONVERSATIONS} conversations, {sum(lengths)} tokens: {FASTEST}"
    )
    takes = {name: lambda _, given=given: step(given) for name, given in batches.items()}
    measure(benchmark, takes, provider, [None], check=assert_same)
