"""Generation: a batch says what its prompts say alone, and images are encoded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.transformers_compat import CACHE
from tests.helpers.tiny import IMG, SPAN, left_pad, pixels, span, tiny_model

# One image, none, two.
PROMPTS = [[5, 6, *span(), 7], [8, 9, 10, 11], [*span(), 12, *span(), 13, 14]]
PICTURES = pixels(3)
PICTURES_OF = [PICTURES[:1], None, PICTURES[1:]]
NEW = 8


@pytest.fixture(scope="module")
def model() -> MonkeyLMHeadModel:
    return tiny_model()


def generate(model: MonkeyLMHeadModel, **settings: Any) -> Any:
    defaults = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    return model.generate(**{**defaults, **settings})


def of_batch(model: MonkeyLMHeadModel, **settings: Any) -> Tensor:
    """The new ids of all prompts in one left-padded batch."""
    batch = left_pad(PROMPTS)
    out = generate(model, **batch, pixel_values=PICTURES, **settings)
    return out[:, batch["input_ids"].shape[1] :]


def of_one(model: MonkeyLMHeadModel, row: int, **settings: Any) -> Tensor:
    """The new ids of a prompt alone."""
    ids = torch.tensor([PROMPTS[row]])
    out = generate(model, input_ids=ids, pixel_values=PICTURES_OF[row], **settings)
    return out[:, ids.shape[1] :]


def of_each(model: MonkeyLMHeadModel, **settings: Any) -> Tensor:
    return torch.cat([of_one(model, row, **settings) for row in range(len(PROMPTS))])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_left_padded_batch_equals_one_by_one(model, attention, use_cache):
    model.set_attn_implementation(attention)
    settings = {"use_cache": use_cache, "output_logits": True, "return_dict_in_generate": True}
    batch = left_pad(PROMPTS)
    together = generate(model, **batch, pixel_values=PICTURES, **settings)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        alone = generate(model, input_ids=ids, pixel_values=PICTURES_OF[row], **settings)
        assert torch.equal(together.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        for ours, expected in zip(together.logits, alone.logits, strict=True):
            torch.testing.assert_close(ours[row], expected[0], rtol=0, atol=1e-4)


def test_pictures_matter_and_in_order(model):
    batch = left_pad(PROMPTS)
    swapped = generate(model, **batch, pixel_values=PICTURES[[0, 2, 1]])[:, -NEW:]
    ours = of_batch(model)
    assert torch.equal(swapped[:2], ours[:2])
    assert not torch.equal(swapped[2], ours[2])


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "use_cache": False},
    ],
    ids=str,
)
def test_beams_equal_one_by_one(model, settings):
    ours = of_batch(model, **settings)
    assert len(ours) == len(PROMPTS) * settings.get("num_return_sequences", 1)
    assert torch.equal(ours, of_each(model, **settings))


def test_many_samples_of_prompts_with_different_image_counts(model):
    """With top_k=1 sampling has no choice, so each of the three samples is the greedy answer."""
    ours = of_batch(model, do_sample=True, top_k=1, num_return_sequences=3)
    assert torch.equal(ours, of_batch(model).repeat_interleave(3, dim=0))


def test_sampling_follows_the_seed(model):
    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return of_batch(model, do_sample=True, top_k=0, temperature=2.0, num_return_sequences=2)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_images_are_encoded_once(model, settings):
    crops: list[int] = []
    visual = model.transformer.visual
    handle = visual.register_forward_pre_hook(lambda module, args: crops.append(len(args[0])))
    try:
        of_batch(model, **settings)
    finally:
        handle.remove()
    assert sum(crops) == PICTURES.shape[0] * visual.crop_settings.crops_per_image


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_pictures_that_are_encoded_already(model, settings):
    expected = of_batch(model, **settings)
    tokens = model.transformer.visual.encode_crops(PICTURES.flatten(0, 1)).view(3, SPAN, -1)
    batch = left_pad(PROMPTS)
    out = generate(model, **batch, visual_tokens=tokens, **settings)
    assert torch.equal(out[:, batch["input_ids"].shape[1] :], expected)
    message = (
        rf"visual_tokens must be \[3, {SPAN}, 128\], an image for each of 3 spans .* got \[2, "
    )
    with pytest.raises(ValueError, match=message):
        generate(model, **batch, visual_tokens=tokens[:2])
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="need input_ids"):
        generate(model, inputs_embeds=embeddings, visual_tokens=tokens)


def test_prompt_in_chunks(model):
    """Chunks of 7 cut through the spans of 20."""
    assert torch.equal(of_batch(model, prefill_chunk_size=7), of_batch(model))


def test_static_cache(model):
    ours = of_batch(model, cache_implementation="static", disable_compile=True)
    assert torch.equal(ours, of_batch(model))


def test_prompt_lookup(model):
    ours = of_one(model, 2, prompt_lookup_num_tokens=2)
    assert torch.equal(ours, of_one(model, 2))


def test_a_later_turn_brings_its_own_picture(model):
    """The cache holds the first turn; only the second turn's picture is read."""
    first, second = PROMPTS[0], [20, *span(), 21]
    ids = torch.tensor([[*first, *second]])
    expected = generate(model, input_ids=ids, pixel_values=PICTURES[:2])
    for past in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=80)):
        turn = {"input_ids": torch.tensor([first]), "pixel_values": PICTURES[:1]}
        with torch.no_grad():
            model(**turn, past_key_values=past, use_cache=True)
        out = generate(model, input_ids=ids, pixel_values=PICTURES[1:2], **{CACHE: past})
        assert torch.equal(out, expected)


def test_a_cache_goes_by_its_new_and_its_old_name(model):
    """transformers renames the argument in 5.24; a model takes both, whatever the version."""
    ids = torch.tensor([PROMPTS[1]])
    caches = {name: DynamicCache(config=model.config) for name in ("cache", "past_key_values")}
    with torch.no_grad():
        whole = model(ids).logits
        for name, cache in caches.items():
            model(ids[:, :2], **{name: cache})
            out = model(ids[:, 2:], use_cache=True, **{name: cache})
            assert getattr(out, CACHE) is cache
            torch.testing.assert_close(out.logits, whole[:, 2:], atol=1e-5, rtol=0)
        for part in (model, model.transformer):
            with pytest.raises(ValueError, match="past_key_values and cache are two names of one"):
                part(ids, **caches)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("row", range(3))
def test_an_img_that_the_model_says_is_a_token_like_any_other(model, use_cache, row):
    def say_img(batch_id: int, ids: Tensor) -> list[int]:
        return [IMG]

    out = of_one(model, row, use_cache=use_cache, prefix_allowed_tokens_fn=say_img)
    assert out.tolist() == [[IMG] * NEW]


def test_embeddings_in_place_of_ids(model):
    ids = torch.tensor([PROMPTS[1]])
    embeds = model.get_input_embeddings()(ids)
    out = generate(model, inputs_embeds=embeds)
    assert torch.equal(out[:, -NEW:], of_one(model, 1))
    with pytest.raises(ValueError, match="pixel_values need input_ids, whose image spans say"):
        generate(model, inputs_embeds=embeds, pixel_values=PICTURES[:1])
    with pytest.raises(ValueError, match="pixel_values need input_ids, whose image spans say"):
        model(inputs_embeds=embeds, pixel_values=PICTURES[:1])


def test_decoding_compiles_to_one_graph(model):
    prompt = torch.tensor([PROMPTS[0]])
    cache = StaticCache(model.config, max_cache_len=64)
    step = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        out = model(prompt, pixel_values=PICTURES[:1], past_key_values=cache, use_cache=True)
        tokens = [out.logits[:, -1:].argmax(-1)]
        for _ in range(NEW - 1):
            out = step(tokens[-1], past_key_values=cache, use_cache=True)
            tokens.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), of_one(model, 0))


def test_text_model_compiles_to_one_graph(model):
    """Where there is no image to look for: embeddings in, or a decoder on its own."""
    ids = torch.tensor([PROMPTS[1]])
    embeds = model.get_input_embeddings()(ids).detach()
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        ours = compiled(inputs_embeds=embeds).logits
        torch.testing.assert_close(ours, model(ids).logits, rtol=0, atol=1e-5)


def test_prompts_with_images_compile(model):
    batch = left_pad(PROMPTS)
    compiled = torch.compile(model.forward, backend="aot_eager")
    with torch.no_grad():
        ours = compiled(**batch, pixel_values=PICTURES).logits
        expected = model(**batch, pixel_values=PICTURES).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(ours[real], expected[real], rtol=0, atol=1e-5)
