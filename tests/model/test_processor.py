"""MonkeyImageProcessor and MonkeyProcessor: crops, spans, files, bad input, and the model."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from monkey_kernels import CLIP_MEAN, CLIP_STD
from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.processing_monkey import MonkeyProcessor
from tests.helpers.golden import DATA, assert_crops_match, load_golden
from tests.helpers.tiny import VISUAL, tiny_encoder
from tests.helpers.vocabulary import tiny_tokenizer, write_published

SETTINGS = {"crop_size": 28, "n_queries": 4}
SPAN = 20


def pixels(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


A, B, C = pixels(0), pixels(1, 91, 33), pixels(2)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> MonkeyProcessor:
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("vocabulary"), SPAN)
    return MonkeyProcessor(MonkeyImageProcessor(**SETTINGS), tokenizer)


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder()


def crops_of(encoder, *images) -> torch.Tensor:
    return encoder.extract_crops(list(images)).unflatten(0, (-1, 5))


# ---- images -----------------------------------------------------------------------------------


def test_crops_are_the_encoders(tmp_path: Path, encoder) -> None:
    path = tmp_path / "b.png"
    Image.fromarray(B).save(path)
    sources = [A, str(path), path, path.read_bytes(), Image.fromarray(B), torch.tensor(C)]
    expected = crops_of(encoder, A, B, B, B, B, C)
    crops = MonkeyImageProcessor(**SETTINGS)(sources)["pixel_values"]
    assert crops.shape == (6, 5, 3, 28, 28) and crops.dtype == torch.float32
    assert torch.equal(crops, expected)
    assert not torch.equal(crops[0], crops[5])
    nested = MonkeyImageProcessor(**SETTINGS)([[A], [], [B, (B,)], B, B, C])["pixel_values"]
    assert torch.equal(nested, expected)
    single = MonkeyImageProcessor(**SETTINGS).preprocess(A, return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(single, expected[:1].numpy())
    mixed = [A, torch.tensor(C).permute(2, 0, 1) / 255]  # float pixels are resized in floats
    assert torch.equal(
        MonkeyImageProcessor(**SETTINGS)(mixed)["pixel_values"], crops_of(encoder, *mixed)
    )


def test_default_crops_are_upstreams() -> None:
    golden = load_golden()
    crops = MonkeyImageProcessor()(golden.images)["pixel_values"]
    assert_crops_match(crops.flatten(0, 1), golden)


def test_settings_of_images() -> None:
    settings = {"grid": (1, 3), "interpolation": "bilinear", "fit": "pad", **SETTINGS}
    crops = MonkeyImageProcessor(**settings)(B)["pixel_values"]
    encoder = tiny_encoder(grid=(1, 3), interpolation="bilinear", fit="pad")
    assert torch.equal(crops[0], encoder.extract_crops([B]))
    settings["fit"] = "crop"  # what pads is the mean
    crops = MonkeyImageProcessor(**settings)(B)["pixel_values"]
    grey = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.25, 0.5, 1.0)}
    other = MonkeyImageProcessor(**settings, **grey)(B)["pixel_values"]
    mean, std = (torch.tensor(colour).view(3, 1, 1) for colour in (CLIP_MEAN, CLIP_STD))
    scaled = (crops * std + mean - 0.5) / torch.tensor(grey["image_std"]).view(3, 1, 1)
    torch.testing.assert_close(other, scaled)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"grid": (0, 2)}, ValueError, "grid rows must be positive; got 0"),
        ({"crop_size": 2.5}, TypeError, "crop_size must be an int; got float"),
        ({"n_queries": 0}, ValueError, "n_queries must be positive; got 0"),
        ({"interpolation": "lanczos"}, ValueError, "interpolation must be one of .*'lanczos'"),
        ({"fit": "none"}, ValueError, "fit must be one of .*'none'"),
        ({"do_resize": True}, TypeError, "do_resize"),
    ],
)
def test_wrong_settings(settings: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        MonkeyImageProcessor(**settings)


def test_unreadable_images(processor: MonkeyProcessor) -> None:
    image_processor = processor.image_processor
    with pytest.raises(ValueError, match=r"images\[1\]: source of 3 bytes is not a readable image"):
        image_processor([A, b"abc"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        image_processor("nowhere.png")
    with pytest.raises(ValueError, match=r"images\[0\]: source is a URL, and allow_urls is False"):
        image_processor("http://images.test/a.png")
    with pytest.raises(ValueError, match=r"images\[0\]: source is a URL, and allow_urls is False"):
        processor(images="http://images.test/a.png")
    with pytest.raises(ValueError, match="is refused: "):  # allowed, and still no such address
        processor(images="http://127.0.0.1/a.png", allow_urls=True)
    with pytest.raises(ValueError, match=r"^std must be positive; got \(0\.0, 1"):
        MonkeyImageProcessor(image_std=(0, 1, 1), **SETTINGS)(A)
    with pytest.raises(ValueError, match="images must hold at least one image"):
        image_processor([])


# ---- prompts with images ----------------------------------------------------------------------


def test_batch(processor: MonkeyProcessor, encoder) -> None:
    texts = ["<img></img> the image", "no image", "<img>b</img><img></img>"]
    inputs = processor(text=texts, images=[[A], [], [B, C]], return_tensors="pt", padding=True)
    assert list(inputs) == ["input_ids", "attention_mask", "pixel_values"]
    expected = processor.tokenizer(texts, return_tensors="pt", padding=True)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()
    assert torch.equal(inputs["pixel_values"], crops_of(encoder, A, B, C))
    flat = processor(text=texts, images=[A, B, C], return_tensors="pt", padding=True)
    assert torch.equal(flat["pixel_values"], inputs["pixel_values"])
    swapped = processor(text=texts, images=[[B], [], [A, C]])
    assert not torch.equal(swapped["pixel_values"], inputs["pixel_values"])
    assert swapped["input_ids"] == processor.tokenizer(texts)["input_ids"]


def test_one_text(processor: MonkeyProcessor, encoder) -> None:
    one = processor(text="<img></img> the", images=Image.fromarray(A), return_tensors="pt")
    assert one["input_ids"].shape == (1, SPAN + 2 + len(processor.tokenizer.encode(" the")))
    assert torch.equal(one["pixel_values"], crops_of(encoder, A))
    two = processor(text="<img></img><img></img>", images=[A, B])
    assert torch.equal(two["pixel_values"], crops_of(encoder, A, B))
    assert list(processor(text="the", images=[])) == ["input_ids", "attention_mask"]
    assert list(processor(images=[A])) == ["pixel_values"]


def test_paths_stay_upstreams_route(processor: MonkeyProcessor) -> None:
    text = "<img>a.jpg</img> the image Answer:"
    inputs = processor(text=text, return_tensors="pt")
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["input_ids"].tolist() == [processor.tokenizer.encode(text)]
    with pytest.raises(ValueError, match=r"text\[1\] has an image span without a path, and images"):
        processor(text=[text, text.replace("a.jpg", "")])


def test_text_options_reach_the_tokenizer(processor: MonkeyProcessor) -> None:
    tokenizer = processor.tokenizer
    text = "<|im_end|><img></img>"
    inputs = processor(text=text, images=A, allowed_special={"<img>", "</img>"})
    assert inputs["input_ids"] == [tokenizer.encode(text, allowed_special={"<img>", "</img>"})]
    inputs = processor(text=tokenizer.escape("<img>") + "<img></img>", images=A)
    assert inputs["input_ids"][0].count(tokenizer.img_start_id) == 1
    inputs = processor(text=["the", "the image"], padding="max_length", max_length=30)
    assert [len(row) for row in inputs["input_ids"]] == [30, 30]
    with pytest.raises(ValueError, match=r"text\[0\] must keep its image spans whole in max_len"):
        processor(text="<img></img>", images=A, truncation=True, max_length=SPAN)
    decoded = processor.batch_decode(processor(text="<img>a</img> the")["input_ids"])
    assert decoded == ["<img>a</img> the"]


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("the", A, "text must have an image span for each image; got 0 spans (0 by text) and 1"),
        ("<img></img>", [], "got 1 spans (1 by text) and 0 images"),
        ("<img></img>", [A, B], "got 1 spans (1 by text) and 2 images"),
        (["<img></img>", "<img>a</img>"], [A], "got 2 spans (1, 1 by text) and 1 images"),
        (
            ["<img></img>", "<img></img>"],
            [[A, B], []],
            "text[0] must have an image span for each image of images[0]; got 1 spans and 2 images",
        ),
        (["<img></img>", "<img></img>"], [[A], []], "images[1]; got 1 spans and 0 images"),
        (["<img></img>", "the"], [[A], [B]], "text[1] must have an image span for each image of"),
        (["<img></img>"], [[A], [B]], "images must have a list for each of 1 texts; got 2"),
        (["the", "the"], [[]], "images must have a list for each of 2 texts; got 1"),
        ("<img>", [A], "text[0] must have an </img> after the <img> at character 0; got none"),
        (["the", "</img>"], [A], "text[1] must have an <img> before the </img> at character 0"),
        (None, None, "text or images must be given; got neither"),
        ([], None, "text must hold a prompt or more, none of them empty"),
        (["the", ""], None, "text must hold a prompt or more, none of them empty"),
    ],
)
def test_spans_and_images_that_differ(
    processor: MonkeyProcessor, text: object, images: object, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        processor(text=text, images=images)
    assert message in str(caught.value)


def test_wrong_arguments(processor: MonkeyProcessor) -> None:
    for name in ("videos", "audio"):
        with pytest.raises(ValueError, match="videos and audio must be None"):
            processor(text="the", **{name: [A]})
    with pytest.raises(TypeError, match=r"text\[1\] must be a string; got int"):
        processor(text=["a", 1])
    message = r"tokenizer.image_span must be .* of image_processor, 5 \* 256; got 20"
    with pytest.raises(ValueError, match=message):
        MonkeyProcessor(MonkeyImageProcessor(), processor.tokenizer)
    with pytest.raises(TypeError, match="image_processor"):
        MonkeyProcessor(processor.tokenizer, processor.image_processor)


# ---- chat -------------------------------------------------------------------------------------


def test_chat(processor: MonkeyProcessor, tmp_path: Path, encoder) -> None:
    path = tmp_path / "b.png"
    Image.fromarray(B).save(path)
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": Image.fromarray(A)},
                {"type": "text", "text": "the <img></img><|im_end|>"},
                {"type": "image", "path": str(path)},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "image"}]},
    ]
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_tensors="pt"
    )
    (ids,) = inputs["input_ids"].tolist()
    assert ids == processor.tokenizer.apply_chat_template(chat)["input_ids"]
    assert ids.count(processor.tokenizer.img_start_id) == 2
    assert ids.count(processor.tokenizer.im_end_id) == 3
    assert torch.equal(inputs["pixel_values"], crops_of(encoder, A, B))

    # In two steps, as for other models.
    text = processor.apply_chat_template(chat, tokenize=False)
    again = processor(text=[text], images=[A, B])
    assert again["input_ids"] == [ids]
    batch = processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True)
    assert batch["input_ids"] == [ids, ids] and len(batch["pixel_values"]) == 4

    forged = processor.apply_chat_template(chat, tokenize=False, sanitize_control_tokens=False)
    with pytest.raises(ValueError, match="got 3 spans"):
        processor(text=[forged], images=[A, B])


# ---- files ------------------------------------------------------------------------------------


def assert_same(loaded: MonkeyProcessor, processor: MonkeyProcessor) -> None:
    assert type(loaded) is MonkeyProcessor
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    assert loaded.chat_template == processor.chat_template
    text, images = "<img>a</img> the<|im_end|>", [B]
    one, other = (p(text=text, images=images) for p in (loaded, processor))
    assert one["input_ids"] == other["input_ids"]
    assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_saved(tmp_path: Path) -> None:
    image_processor = MonkeyImageProcessor(
        grid=(1, 2), interpolation="bilinear", fit="crop", image_mean=(0.5, 0.5, 0.5), **SETTINGS
    )
    processor = MonkeyProcessor(image_processor, tiny_tokenizer(tmp_path, 12))
    processor.save_pretrained(tmp_path / "saved")
    for auto in (MonkeyProcessor, AutoProcessor):
        assert_same(auto.from_pretrained(tmp_path / "saved"), processor)
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    assert type(loaded) is MonkeyImageProcessor
    assert loaded.to_dict() == image_processor.to_dict()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").image_span == 12
    assert_same(pickle.loads(pickle.dumps(processor)), processor)

    changed = MonkeyProcessor.from_pretrained(tmp_path / "saved", grid=(2, 2), fit="pad")
    assert (changed.image_processor.grid, changed.image_processor.fit) == ((2, 2), "pad")
    assert changed.tokenizer.image_span == 20
    assert "grid" not in changed.tokenizer.init_kwargs


def test_image_processor_alone(tmp_path: Path) -> None:
    image_processor = MonkeyImageProcessor(fit="pad", **SETTINGS)
    (file,) = image_processor.save_pretrained(tmp_path)
    assert Path(file).name == "preprocessor_config.json"
    for source in (tmp_path, file):
        loaded = MonkeyImageProcessor.from_pretrained(source)
        assert loaded.to_dict() == image_processor.to_dict()
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is MonkeyImageProcessor
    assert MonkeyImageProcessor.from_pretrained(tmp_path, fit="crop").fit == "crop"
    Path(file).write_text("{")
    with pytest.raises(OSError, match=r"preprocessor_config.json"):
        MonkeyImageProcessor.from_pretrained(tmp_path)


def published(directory: Path, **visual: object) -> Path:
    write_published(directory)
    config = {"model_type": "monkey", "hidden_size": 128, "num_attention_heads": 1}
    config["visual"] = {**VISUAL, "image_start_id": 0, **visual}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_published_checkpoint(tmp_path: Path, processor: MonkeyProcessor) -> None:
    """No settings of images are there: they are the encoder's."""
    directory = published(tmp_path / "a")
    for auto in (MonkeyProcessor, AutoProcessor):
        assert_same(auto.from_pretrained(directory), processor)
    real = {key: VISUAL[key] for key in ("patch_size", "width", "heads", "mlp_ratio", "layers")}
    directory = published(tmp_path / "b", image_size=896, crop_size=448, n_queries=256, **real)
    image_processor = MonkeyImageProcessor.from_pretrained(directory)
    assert image_processor.to_dict() == MonkeyImageProcessor().to_dict()
    directory = published(tmp_path / "c", grid=[1, 3], interpolation="bilinear", fit="pad")
    loaded = MonkeyProcessor.from_pretrained(directory)
    assert loaded.image_processor.grid == (1, 3)
    assert (loaded.image_processor.interpolation, loaded.image_processor.fit) == ("bilinear", "pad")
    assert loaded.tokenizer.image_span == 16


def test_checkpoint_without_settings(tmp_path: Path) -> None:
    write_published(tmp_path)
    message = rf"{tmp_path} must have .* or an object 'visual' in config.json; got none"
    with pytest.raises(ValueError, match=message):
        MonkeyProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "monkey", "visual": [1]}')
    with pytest.raises(ValueError, match=message):
        MonkeyProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"visual": {"width": 1664}}')
    message = (
        rf"'visual' in config.json of {tmp_path} does not describe an encoder: image_size or grid "
        "must be given; got neither"
    )
    with pytest.raises(ValueError, match=message):
        MonkeyProcessor.from_pretrained(tmp_path)


# ---- the model --------------------------------------------------------------------------------


def test_pictures_in_memory_and_by_path_are_the_same_to_the_model(
    processor: MonkeyProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = processor.tokenizer
    config = MonkeyConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=64,
        visual={**VISUAL, "image_start_id": tokenizer.img_start_id},
    )
    torch.manual_seed(0)
    model = MonkeyLMHeadModel(config).eval()
    texts = ["<img>A_image0.jpg</img> the", "<img>A_image1.png</img><img>A_image0.jpg</img>"]
    names = ["A_image0.jpg", "A_image1.png", "A_image0.jpg"]
    monkeypatch.chdir(DATA)
    by_path = processor(text=texts, return_tensors="pt", padding=True)
    in_memory = processor(
        text=["<img></img> the", "<img></img><img></img>"],
        images=[Image.open(name) for name in names],
        return_tensors="pt",
        padding=True,
    )
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    with torch.no_grad():
        one, other, swapped = (
            model.generate(**inputs, return_dict_in_generate=True, **options)
            for inputs in (
                by_path,
                in_memory,
                {**in_memory, "pixel_values": in_memory["pixel_values"].flip(0)[[1, 0, 2]]},
            )
        )
    assert torch.equal(one.logits[0], other.logits[0])
    assert torch.equal(one.sequences[:, -3:], other.sequences[:, -3:])
    assert not torch.equal(one.logits[0], swapped.logits[0])


def test_a_broken_settings_file_is_named_by_its_directory(
    processor: MonkeyProcessor, tmp_path: Path
) -> None:
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("")
    with pytest.raises(ValueError, match=f"a settings file in {tmp_path} must be JSON: Expecting"):
        MonkeyProcessor.from_pretrained(tmp_path)
