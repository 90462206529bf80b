"""Where the model looks: maps of planted cases, the page, and what the command refuses."""

from __future__ import annotations

import base64
import json
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from monkey_model.checkpoint import PREFIX
from monkey_model.commands.__main__ import app
from monkey_model.crop_settings import CropSettings
from monkey_model.modeling_qwen import QWenAttention
from monkey_model.serving import look as look_module
from monkey_model.serving import look_page
from monkey_model.serving.answer import Answerer, Question
from monkey_model.serving.look import (
    Look,
    canvas_frame,
    carry_back,
    largest_difference,
    look,
    look_and_ask,
    patch_centres,
    stitch,
    token_colours,
)
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.tiny import CROPS, QUERIES, SPAN, tiny_encoder

PIXELS = 14  # side of a patch


def brightness_reader(**settings):
    """An encoder whose queries all read the brightest patch, wherever it is.

    The ViT passes on a patch's mean brightness, as a channel and its negative (a LayerNorm leaves
    them be); keys are that channel, a hundredfold, and queries constant.
    """
    encoder = tiny_encoder(**{"layers": 1, "crop_size": 4 * PIXELS, "image_size": 8 * PIXELS,
                              "lora_repeat_num": 4, **settings})  # fmt: skip
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.conv1.weight[0] = 1 / encoder.conv1.weight[0].numel()
        encoder.conv1.weight[1] = -encoder.conv1.weight[0]
        # Beside a constant of the same size, so that the norm keeps how bright a patch is.
        encoder.positional_embedding[:, 2], encoder.positional_embedding[:, 3] = 3, -3
        encoder.ln_pre.weight.fill_(1)
        pool = encoder.attn_pool
        pool.kv_proj.weight[0, 0] = pool.kv_proj.weight[1, 1] = 1
        pool.kv_proj.weight[2, 2] = pool.kv_proj.weight[3, 3] = 1
        pool.ln_kv.weight.fill_(1)
        query, key = pool.attn.in_proj_bias[:128], pool.attn.in_proj_weight[128:256]
        query[0], key[0, 0] = 100, 10
    return encoder


# Height and width in pixels of an eighth of the canvas, on a picture [h, w].
EIGHTH = {
    "stretch": lambda h, w: (h / 8, w / 8),
    "crop": lambda h, w: (min(h, w) / 8,) * 2,
    "pad": lambda h, w: (max(h, w) / 8,) * 2,
}


@pytest.mark.parametrize("fit", EIGHTH)
@pytest.mark.parametrize("size", [(112, 112), (90, 130), (301, 200)])
def test_the_map_shows_the_patch_that_is_read(fit, size):
    """A white spot on black, a patch of the global crop wide, up and right of the middle."""
    height, width = size
    high, wide = EIGHTH[fit](height, width)
    spot_y, spot_x = height / 2 - high, width / 2 + wide
    y, x = np.mgrid[:height, :width] + 0.5
    spot = ((y - spot_y) / high) ** 2 + ((x - spot_x) / wide) ** 2 < 1
    picture = np.where(spot, 255, 0).astype(np.uint8)[..., None].repeat(3, 2)
    seen = look(brightness_reader(fit=fit, interpolation="bilinear"), picture)

    assert seen.weights.shape == (CROPS, 1, QUERIES, 16)
    maps = seen.weights.mean((1, 2))
    # The canvas has 8 x 8 patches, and the spot is rows 2, 3 and columns 4, 5: in crop 1.
    assert maps[1].view(4, 4)[2:, :2].sum() > 0.99
    assert stitch(maps, (2, 2))[2:4, 4:6].sum() > 0.99
    # The global crop has 4 x 4, and the spot is row 1, column 2.
    assert maps[4].view(4, 4)[1, 2] > 0.99
    # In the picture's pixels: on the spot, if perhaps in one of its four local patches.
    for crop, most in ((1, 0.51), (4, 0.1)):
        offset = (seen.centres()[crop] - torch.tensor([spot_y, spot_x])).abs()
        assert offset.shape == (QUERIES, 2)
        assert (offset < most * torch.tensor([high, wide]) + 1).all()  # fits round to whole pixels


def test_a_spot_elsewhere_is_read_elsewhere():
    picture = np.zeros((112, 112, 3), np.uint8)
    picture[98:, :14] = 255  # bottom left: the last row of crop 2, its first column
    weights = look(brightness_reader(), picture).weights.mean((1, 2))
    assert weights[2].argmax() == 12 and weights[2, 12] > 0.99
    assert weights[-1].argmax() == 12
    torch.testing.assert_close(weights[0], torch.full((16,), 1 / 16))  # all black


def test_canvas_on_the_picture():
    settings = {fit: CropSettings((2, 1), 50, fit=fit) for fit in ("stretch", "crop", "pad")}
    assert canvas_frame(200, 300, settings["stretch"]) == (0, 0, 200, 300)
    assert canvas_frame(200, 300, settings["crop"]) == (0, 100, 200, 100)
    # 50 columns of canvas are 300 of the picture; its 200 rows are 33 of the canvas' 100.
    top, left, height, width = canvas_frame(200, 300, settings["pad"])
    assert (left, width) == (0, 300)
    assert (top, height) == pytest.approx((-33 * 200 / 33, 100 * 200 / 33))


def test_patch_centres_are_in_crop_order():
    centres = patch_centres(canvas_frame(100, 200, CropSettings((2, 2), 28)), (2, 2), 2)
    assert centres.shape == (5, 4, 2)
    assert centres[0].tolist() == [[12.5, 25], [12.5, 75], [37.5, 25], [37.5, 75]]
    assert centres[1, 0].tolist() == [12.5, 125] and centres[2, 0].tolist() == [62.5, 25]
    assert centres[4].tolist() == [[25, 50], [25, 150], [75, 50], [75, 150]]


def test_stitching_puts_crops_where_they_were():
    canvas = torch.arange(6 * 4.0).view(6, 4)
    local = [canvas[y : y + 2, x : x + 2].flatten() for y in (0, 2, 4) for x in (0, 2)]
    assert torch.equal(stitch(torch.stack([*local, torch.full((4,), -1.0)]), (3, 2)), canvas)


def test_carrying_back_is_a_product():
    weights = torch.rand(5, 3, 4, 9).softmax(-1)
    attention = torch.rand(2, 20) / 20
    pixels = carry_back(attention, weights)
    torch.testing.assert_close(pixels.sum((1, 2)), attention.sum(1))
    expected = attention[1, 8:12] @ weights[2].mean(0)
    torch.testing.assert_close(pixels[1, 2], expected)


def test_colours_are_principal_components():
    # Three directions of falling size, so that the components are the directions themselves.
    scores = torch.rand(3, 20, 3, dtype=torch.float64) * torch.tensor([100.0, 10.0, 1.0])
    directions = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q[:3]
    colours = token_colours((scores @ directions + 5).float()).double()
    for channel in range(3):
        pair = torch.stack([colours[..., channel].flatten(), scores[..., channel].flatten()])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.9
    assert colours.amin() == 0 and colours.amax() == 255
    assert (token_colours(torch.ones(2, 4, 8)) == 128).all()  # nothing to tell apart
    assert token_colours(torch.randn(1, 1, 8)).shape == (1, 1, 3)


def test_largest_difference():
    one = torch.zeros(40, 64, 3, dtype=torch.uint8)
    other = one.clone()
    other[24:32, 40:48] = 9
    assert largest_difference(one, other, 8) == (24, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("look") / "checkpoint")


@pytest.fixture(scope="module")
def answerer(checkpoint):
    return Answerer.from_pretrained(checkpoint, max_new_tokens=20)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "<b>a & b.png"
    Image.effect_noise((60, 40), 90).convert("RGB").save(path)
    return path


def test_words_attend_as_the_model_does(answerer, picture, monkeypatch):
    """The same as one pass over prompt and answer, in which nothing is cached."""
    monkeypatch.setattr(look_module, "_LONGEST_CHARACTER", 1)  # a word for each token
    seen = look_and_ask(answerer, picture, "Colour?")
    question = Question("Colour?", (picture,))
    images = [answerer.read_images(question)]
    prompt, output = answerer.generate([question], images)
    model = answerer.model
    assert model.config._attn_implementation == "sdpa"  # as it was
    model.set_attn_implementation("eager")
    with torch.no_grad():
        whole = model(output.sequences, pixel_values=images[0][0], output_attentions=True)
    model.set_attn_implementation("sdpa")
    mean = torch.stack(whole.attentions).mean((0, 2))[0]  # [T, T]
    length = prompt.shape[1]
    start = prompt[0].tolist().index(answerer.processor.tokenizer.img_start_id) + 1
    tokens = output.sequences[0, length:].tolist()
    assert len(tokens) == 20  # more than are looked at at a time, and no end among them
    expected = mean[length - 1 : -1, start : start + SPAN]

    assert seen.answer.words == [answerer.processor.tokenizer.decode([id]) for id in tokens]
    torch.testing.assert_close(seen.answer.attention, expected)
    # And the encoder's half is that of the same picture without a question.
    alone = look(model.transformer.visual, picture)
    torch.testing.assert_close(seen.weights, alone.weights)
    torch.testing.assert_close(seen.tokens, alone.tokens)


def test_tokens_of_one_character_are_one_word(answerer, picture, monkeypatch):
    tokenizer = answerer.processor.tokenizer
    ids = tokenizer.encode("a\U0001f600b")
    assert len(ids) > 3  # the middle one in several tokens
    generate = answerer.model.generate

    def with_ids(**inputs):
        output = generate(**{**inputs, "max_new_tokens": len(ids)})
        length = inputs["input_ids"].shape[1]
        output.sequences = torch.cat(
            [inputs["input_ids"], torch.tensor([[*ids, tokenizer.eod_id]])], dim=1
        )
        assert output.sequences.shape[1] == length + len(ids) + 1
        return output

    monkeypatch.setattr(answerer.model, "generate", with_ids)
    answer = look_and_ask(answerer, picture, "Colour?").answer
    assert answer.words == ["a", "\U0001f600", "b"]
    assert answer.attention.shape == (3, SPAN)


def test_attention_without_weights_is_refused(answerer, picture, monkeypatch):
    forward = QWenAttention.forward
    monkeypatch.setattr(
        QWenAttention, "forward", lambda *args, **kwargs: (forward(*args, **kwargs)[0], None)
    )
    with pytest.raises(ValueError, match="question needs a language model that gives its atten"):
        look_and_ask(answerer, picture, "Colour?")
    assert answerer.model.config._attn_implementation == "sdpa"


def unpacked(packed):
    dtype = {"u8": np.uint8, "f4": "<f4"}[packed["type"]]
    data = zlib.decompress(base64.b64decode(packed["zlib"]))
    return torch.tensor(np.frombuffer(data, dtype).reshape(packed["shape"]).astype(np.float32))


def maps_of(quantised):
    return unpacked(quantised["values"]) * unpacked(quantised["tops"])[..., None] / 255


def data_of(page):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(data)


def assert_close_to_8_bits(quantised, expected):
    found = maps_of(quantised)
    assert found.shape == expected.shape
    step = expected.amax(-1, keepdim=True) / 255
    assert ((found - expected).abs() <= 0.51 * step + 1e-9).all()


def test_the_page_holds_the_maps(answerer, picture):
    seen = look_and_ask(answerer, picture, "</script><script>alert(1)</script>")
    page = look_page.build_page(seen, "</script><b>x", "a note")
    data = data_of(page)
    assert data["name"] == "</script><b>x" and "alert(1)</script>" in data["answer"]["question"]
    assert page.count("</script>") == 2 and page.count("<script") == 2
    assert_close_to_8_bits(data["maps"], seen.weights.mean(1))
    assert_close_to_8_bits(data["headMaps"], seen.weights)
    assert_close_to_8_bits(data["answer"]["tokens"], seen.answer.attention)
    expected = carry_back(seen.answer.attention, seen.weights)
    assert_close_to_8_bits(data["answer"]["maps"], expected)
    assert torch.equal(
        maps_of(data["whole"])[:, 0].argmax(-1), seen.weights.mean((1, 2)).argmax(-1)
    )
    torch.testing.assert_close(unpacked(data["centres"]), seen.centres())
    assert torch.equal(unpacked(data["colours"]), token_colours(seen.tokens).float())


def test_the_page_asks_nothing_of_a_network(answerer, picture):
    page = look_page.build_page(look_and_ask(answerer, picture, "Colour?"), "a", "b")
    addresses = set(re.findall(r"\bhttps?://[^\"'`\s)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place
    assert not re.search(r"<link|@import|\bsrc=\"(?!data:)|fetch\(|import\(", page)


def test_maps_of_heads_stay_in_their_budget(monkeypatch):
    weights = torch.rand(5, 4, 16, 64).softmax(-1)
    monkeypatch.setattr(look_page, "_HEAD_BYTES", 5 * 4 * 16 * 20)
    pooled = look_page._pooled(weights)
    assert pooled.shape == (5, 4, 16, 16)
    torch.testing.assert_close(pooled.sum(-1), weights.sum(-1))
    square = weights[2, 1, 3].view(8, 8)[2:4, 4:6]
    torch.testing.assert_close(pooled[2, 1, 3, 4 + 2], square.sum())


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run ``monkey look ARGUMENTS`` in an empty folder; returns what it printed, on one line."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments, code=0):
        done = CliRunner().invoke(app, ["look", *(str(argument) for argument in arguments)])
        assert done.exit_code == code, done.output
        return done.output

    run.folder = folder
    return run


def test_without_a_checkpoint_a_stand_in_says_so(run, picture):
    output = run(picture, "--out", "look.html", "--device", "cpu")
    assert "random weights (seed 0) stands in. These maps carry no meaning." in output
    data = data_of((run.folder / "look.html").read_text())
    assert "random weights" in data["note"] and data["answer"] is None
    assert data["name"] == picture.name and data["size"] == [40, 60]
    assert maps_of(data["maps"]).shape == (5, 256, 1024)
    assert [path.name for path in run.folder.iterdir()] == ["look.html"]


def test_a_question_and_the_panels_as_files(run, picture, checkpoint):
    output = run(picture, "--out", "look.html", "--png", "panels", "--question", "Colour?",
                 "--checkpoint", checkpoint, "--fit", "pad", "--interpolation", "bilinear",
                 "--max-new-tokens", "3", "--device", "cpu")  # fmt: skip
    names = ["answer.png", "crops.png", "reading.png", "resize.png", "tokens.png"]
    assert sorted(path.name for path in (run.folder / "panels").iterdir()) == names
    for name in names:
        with Image.open(run.folder / "panels" / name) as image:
            image.load()
            assert min(image.size) > 100 and name in output
    data = data_of((run.folder / "look.html").read_text())
    assert data["settings"] == {"fit": "pad", "interpolation": "bilinear"}
    # Up to three: tokens that make up one character are one word.
    assert 1 <= len(data["answer"]["words"]) <= 3 and "Checkpoint: " in data["note"]


def test_bad_input_is_one_error_and_nothing_written(run, picture, checkpoint, tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    encoder_only = tmp_path / "encoder"
    encoder_only.mkdir()
    (encoder_only / "config.json").write_text((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    visual = {name: tensor for name, tensor in weights.items() if name.startswith(PREFIX)}
    save_file(visual, encoder_only / "model.safetensors")
    page = ("--out", tmp_path / "look.html")
    crops = tmp_path / "crops.png"
    crops.write_bytes(picture.read_bytes())
    cases = {
        "bad.jpg' is not a readable image": (tmp_path / "bad.jpg", *page),
        "source cannot be opened": (tmp_path / "missing.jpg", *page),
        "--question needs --checkpoint": (picture, *page, "--question", "Why?"),
        "num_hidden_layers must be at most 0, as its weights": (
            picture,
            *page,
            "--question",
            "Why?",
            "--checkpoint",
            encoder_only,
        ),
        "--out must be in a directory that exists": (picture, "--out", tmp_path / "no" / "x.html"),
        "--out must be a file": (picture, "--out", tmp_path),
        "--out must be another file than IMAGE": (picture, "--out", picture),
        "cannot be written": (picture, "--out", "/proc/look.html"),
        "--png must be a directory": (picture, *page, "--png", tmp_path / "file"),
        "--png must be in a directory": (picture, *page, "--png", tmp_path / "no" / "panels"),
        "--png must not write over IMAGE or --out": (crops, *page, "--png", tmp_path),
        "--device nonsense cannot be used": (picture, *page, "--device", "nonsense"),
    }
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for message, arguments in cases.items():
        output = run(*arguments, code=2)
        errors = [line for line in output.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1 and message in errors[0], output
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert not list(run.folder.iterdir())


def test_the_page_is_written_whole_or_not_at_all(run, picture, checkpoint, monkeypatch):
    def interrupted(seen: Look, name: str, note: str) -> str:
        raise KeyboardInterrupt

    (run.folder / "look.html").write_text("an earlier page")
    monkeypatch.setattr(look_page, "build_page", interrupted)
    run(picture, "--out", "look.html", "--checkpoint", checkpoint, "--device", "cpu", code=130)
    assert (run.folder / "look.html").read_text() == "an earlier page"
    assert [path.name for path in run.folder.iterdir()] == ["look.html"]
