"""Models that accelerate dispatches: device maps, memory limits, weights on disk between calls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload

from monkey_model.modeling_monkey import MonkeyLMHeadModel
from tests.helpers.golden import DATA
from tests.helpers.tiny import left_pad, pixels, span, tiny_model

BATCH = left_pad([[5, 6, *span(), 7], [8, 9]])
PICTURES = pixels(1)


@pytest.fixture(scope="module")
def model() -> MonkeyLMHeadModel:
    return tiny_model()


@pytest.fixture(scope="module")
def shards(model: MonkeyLMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    directory = tmp_path_factory.mktemp("shards")
    model.save_pretrained(directory, max_shard_size="300KB")
    return directory


def language(place: str) -> dict[str, str]:
    parts = ("transformer.wte", "transformer.h", "transformer.ln_f", "lm_head")
    return dict.fromkeys(parts, place)


VISUAL = "transformer.visual"
MODULES = [
    f"{VISUAL}.{part}" for part in ("conv1", "ln_pre", "transformer", "attn_pool", "ln_post")
]
IN_MEMORY = dict.fromkeys([f"{VISUAL}.positional_embedding", f"{VISUAL}.proj", *MODULES], "cpu")


def assert_same_outputs(ours: MonkeyLMHeadModel, theirs: MonkeyLMHeadModel) -> None:
    """Of a picture and of text, twice (caches are filled then), and of generation.

    An offloaded encoder calls its parts as modules: the sums are in another order.
    """
    offloaded = any(p.is_meta for p in ours.transformer.visual.parameters())
    atol = 1e-5 if offloaded else 0  # of logits up to 4
    text = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        for inputs in ({**BATCH, "pixel_values": PICTURES}, {"input_ids": text}) * 2:
            expected = theirs(**inputs).logits
            torch.testing.assert_close(ours(**inputs).logits, expected, rtol=0, atol=atol)
    settings = {**BATCH, "pixel_values": PICTURES, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(**settings), theirs.generate(**settings))


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # those of its own tensors
@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {"": "disk"},
        {**language("cpu"), VISUAL: "disk"},
        {**language("disk"), VISUAL: "cpu"},
        *({**language("cpu"), **IN_MEMORY, part: "disk"} for part in MODULES),
    ],
    ids=lambda places: (
        "auto" if places == "auto" else str([k for k in places if places[k] == "disk"])
    ),
)
def test_device_map(model, shards, tmp_path, device_map):
    """Whatever is on the disk between calls: the outputs are those of the model in memory."""
    folder = tmp_path / "offload"
    again = MonkeyLMHeadModel.from_pretrained(shards, device_map=device_map, offload_folder=folder)
    offloaded = "disk" in str(device_map)
    assert any(p.is_meta for p in again.parameters()) == offloaded
    assert_same_outputs(again, model)
    assert any(p.is_meta for p in again.parameters()) == offloaded


def test_offloaded_from_memory(model):
    """accelerate's own offload; and pictures that the encoder alone reads."""
    again = cpu_offload(tiny_model(), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in again.parameters())
    assert_same_outputs(again, model)
    visual, images = again.transformer.visual, [DATA / "A_image0.jpg"]
    expected = model.transformer.visual.encode_images(images)
    torch.testing.assert_close(visual.encode_images(images), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_memory_limits_split_between_blocks_and_the_whole_encoder(model, shards, tmp_path):
    visual = sum(p.numel() * 4 for p in model.transformer.visual.parameters())
    limits = {"max_memory": {"cpu": int(2.6 * visual)}, "offload_folder": tmp_path / "offload"}
    again = MonkeyLMHeadModel.from_pretrained(shards, device_map="auto", **limits)
    places = again.hf_device_map
    assert (places["transformer.h.0"], places["transformer.h.1"]) == ("cpu", "disk")
    assert {key: places[key] for key in places if VISUAL in key} == {VISUAL: "disk"}
    assert_same_outputs(again, model)
    again.save_pretrained(tmp_path / "saved", max_shard_size="300KB")
    saved = MonkeyLMHeadModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(saved[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_offloading_costs_no_precision(shards, tmp_path, dtype):
    """The error against float64 is at most twice that of the model in memory."""
    settings = {"dtype": dtype, "offload_folder": tmp_path / "offload"}
    reference = MonkeyLMHeadModel.from_pretrained(shards, dtype=dtype).double()
    real, errors = BATCH["attention_mask"].bool(), {}
    with torch.no_grad():
        expected = reference(**BATCH, pixel_values=PICTURES.double()).logits[real]
        for place in ("cpu", "disk"):
            again = MonkeyLMHeadModel.from_pretrained(shards, device_map={"": place}, **settings)
            assert {p.dtype for p in again.parameters()} == {dtype}
            logits = again(**BATCH, pixel_values=PICTURES).logits[real]
            assert logits.dtype == dtype
            errors[place] = (logits.double() - expected).square().mean().sqrt()
    assert 0 < errors["disk"] <= 2 * errors["cpu"]
