"""Packed conversations: which go together, and that each is as it is in a row of its own."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from monkey_model.encoder.crop_adapters import Lora_Adapter
from monkey_model.training.config import FinetuneConfig
from monkey_model.training.conversations import (
    IGNORED,
    ConversationCollator,
    ConversationDataset,
    read_conversations,
)
from monkey_model.training.finetune import finetune
from monkey_model.training.packing import PackedConversations, pack
from monkey_model.training.run_directory import last_complete_checkpoint
from tests.helpers.checkpoint import COLOURS, tiny_processor, write_checkpoint, write_data
from tests.helpers.tiny import tiny_model

#: In two rows of 100: with pictures, without, of several turns, and one that begins with an answer.
PACKS = [[0, 1, 2], [3, 4]]
CONVERSATIONS = [
    ["<img>red.png</img> Colour? Answer: ", "red"],
    ["No picture", "none"],
    ["<img>green.png</img> Which? ", "green", "And <img>blue.png</img> this? ", "blue"],
    ["", "an answer to nothing"],
    ["<img>white.png</img> Colour? Answer: ", "white"],
]


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """The same conversations, a row each and packed, and whether the records were read in order."""
    folder = tmp_path_factory.mktemp("packing")
    write_data(folder, records=len(COLOURS))
    roles = ("user", "assistant")
    records = [
        {"conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(turns)]}
        for turns in CONVERSATIONS
    ]
    (folder / "data.json").write_text(json.dumps(records))
    both = tiny_processor(folder)
    dataset = ConversationDataset(read_conversations(folder / "data.json"), both.tokenizer, 100)
    collate = ConversationCollator(both.tokenizer.eod_id, both.image_processor)
    packed = PackedConversations(dataset, PACKS)
    assert len(packed) == 2
    return collate([dataset[i] for i in range(5)]), collate([packed[0], packed[1]])


def test_a_batch_of_packed_conversations(batches):
    rows, packed = batches
    lengths = rows["attention_mask"].sum(1).tolist()
    assert packed.keys() == {"input_ids", "labels", "position_ids", "pixel_values"}
    assert torch.equal(packed["pixel_values"], rows["pixel_values"])
    for number, members in enumerate(PACKS):
        start = 0
        for member in members:
            place = slice(start, start + lengths[member])
            for name in ("input_ids", "labels"):
                assert torch.equal(
                    packed[name][number, place], rows[name][member, : lengths[member]]
                )
            assert packed["position_ids"][number, place].tolist() == list(range(lengths[member]))
            start += lengths[member]
        assert (packed["position_ids"][number, start:] == -1).all()
        assert (packed["labels"][number, start:] == IGNORED).all()
    # What the Trainer divides the loss by.
    assert (packed["labels"][:, 1:] != IGNORED).sum() == (rows["labels"][:, 1:] != IGNORED).sum()


def loss_and_gradients(model, batch, **changes):
    model.zero_grad()
    count = (batch["labels"][:, 1:] != IGNORED).sum()
    loss = model(**{**batch, "num_items_in_batch": count, **changes}).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_loss_and_gradients_are_those_of_unpacked_rows(batches, dtype, attention, checkpointed):
    model = tiny_model(attn_implementation=attention).to(dtype).train()
    if checkpointed:
        model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    rows, packed = ({**b, "pixel_values": b["pixel_values"].to(dtype)} for b in batches)
    expected_loss, expected = loss_and_gradients(model, rows)
    loss, gradients = loss_and_gradients(model, packed)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    assert gradients.keys() == expected.keys() and any("visual" in name for name in gradients)
    if dtype == torch.float64:  # float32 rounds gradients of many terms that cancel further off
        for name, gradient in gradients.items():
            bound = 1e-5 * expected[name].abs().max().item()
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=bound, msg=name)
    whole, expected_whole = (
        torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, expected)
    )
    assert (whole - expected_whole).norm() <= 1e-5 * expected_whole.norm()
    # Rows that see what stands before them have another loss.
    positions = torch.arange(packed["input_ids"].shape[1])[None]
    other, _ = loss_and_gradients(model, packed, position_ids=positions)
    assert (other - expected_loss).abs() > 1e-3


def test_each_of_several_prompts_in_a_row_is_stretched_by_its_own_length():
    """Dynamic NTK and log-n attention, which work beyond seq_length tokens in eval mode."""
    model = tiny_model(seq_length=8, use_dynamic_ntk=True, use_logn_attn=True).double()
    prompts = [torch.arange(n) + n for n in (5, 20, 11)]
    with torch.no_grad():
        model.config.use_dynamic_ntk = False
        unstretched = [model(input_ids=p[None]).logits[0] for p in prompts]
        model.config.use_dynamic_ntk = True
        alone = [model(input_ids=p[None], use_cache=False).logits[0] for p in prompts]
        together = model(
            input_ids=torch.cat(prompts)[None],
            position_ids=torch.cat([torch.arange(len(p)) for p in prompts])[None],
        ).logits[0]
    # The rotation itself is computed in float32.
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(alone[1:], unstretched[1:], strict=True))


def test_flash_attention_takes_packed_prompts_in_one_row_alone():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    ids = torch.zeros(2, 4, dtype=torch.long)
    positions = torch.tensor([[0, 1, 0, 1]]).expand(2, -1)
    with pytest.raises(
        ValueError, match=r"position_ids that start anew .* of one row .* got 2 row"
    ):
        model(input_ids=ids, position_ids=positions)


def test_pack():
    assert pack([3, 9, 7, 1, 10, 2], 10) == [[0, 2], [1, 3], [4], [5]]
    assert pack([], 5) == []
    with pytest.raises(ValueError, match="lengths must be at most capacity, 5; got 6"):
        pack([2, 6], 5)
    lengths = torch.randint(1, 60, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    packs = pack(lengths, 100)
    assert sorted(index for members in packs for index in members) == list(range(500))
    sums = [sum(lengths[index] for index in members) for members in packs]
    assert max(sums) <= 100 and sum(sums) / (len(packs) * 100) > 0.95


def test_a_packed_run_is_the_unpacked_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Lora_Adapter.__init__, "__defaults__", (16, 0.0))
    checkpoint, data = write_checkpoint(tmp_path / "checkpoint"), write_data(tmp_path)
    curves = {}
    for packing, rows in ((False, 16), (True, 4)):
        training = {
            "use_cpu": True, "max_steps": 3, "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "dataloader_num_workers": 0,
            "disable_tqdm": True, "report_to": "none", "adam_epsilon": 1e-3, "warmup_steps": 0,
        }  # fmt: skip
        out = tmp_path / str(packing)
        finetune(
            FinetuneConfig(
                str(checkpoint),
                str(data),
                str(out),
                dtype="float32",
                lora={"lora_dropout": 0.0},
                packing=packing,
                model_max_length=256,
                training=training,
            )
        )
        state = json.loads((last_complete_checkpoint(out) / "trainer_state.json").read_text())
        curves[packing] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert "16 conversations are packed into " in capsys.readouterr().out
    assert len(curves[True]) == 3
    torch.testing.assert_close(curves[True], curves[False], rtol=1e-5, atol=0)
