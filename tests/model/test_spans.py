"""Image spans: what is refused, and with which words; paths in prompts stay where they may be."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from monkey_model.inputs.spans import find_spans, mask_spans
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from tests.helpers.golden import DATA
from tests.helpers.tiny import (
    CROPS,
    END,
    IMG,
    PAD,
    QUERIES,
    SIDE,
    left_pad,
    pixels,
    span,
    tiny_model,
)

LENGTH = CROPS * QUERIES


@pytest.fixture
def model() -> MonkeyLMHeadModel:
    return tiny_model()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: root/a.jpg, b.png above it, and a link out of root."""
    (tmp_path / "root").mkdir()
    shutil.copy(DATA / "A_image0.jpg", tmp_path / "root" / "a.jpg")
    shutil.copy(DATA / "A_image0.jpg", tmp_path / "b.jpg")
    (tmp_path / "root" / "out.jpg").symlink_to(tmp_path / "b.jpg")
    (tmp_path / "root" / "in.jpg").symlink_to("a.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_spans_are_found_row_by_row():
    batch = left_pad([[1, *span(), 2, *span()], [3], [*span(), 4]])
    spans = find_spans(batch["input_ids"], IMG, LENGTH)
    assert [(s.row, s.number, s.start, s.end) for s in spans] == [
        (0, 0, 2, 22),
        (0, 1, 25, 45),
        (2, 0, 24, 44),
    ]
    assert torch.equal(mask_spans(spans, batch["input_ids"]), batch["input_ids"] == PAD)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2], [IMG, 3]], "row 1 of input_ids must have an </img> for each <img>; got 1 <img> "
         "and 0 </img>"),
        ([[1, END]], "row 0 of input_ids must have .* got 0 <img> and 1 </img>"),
        ([[*span(), IMG]], "got 2 <img> and 1 </img>"),
        ([[1, IMG, PAD, PAD, END]], r"image 0 of row 0 of input_ids must have 20 positions between "
         r"<img> and </img>; got 2 \(from 1 to 4\)"),
        ([[*span()], [*span(), IMG, *[PAD] * 21, END]], "image 1 of row 1 of input_ids must have "
         "20 positions .* got 21"),
        ([[END, *[PAD] * 20, IMG]], "image 0 of row 0 .* got -22"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("generating", [False, True])
def test_spans_that_do_not_pair(model, rows, message, generating):
    batch = left_pad(rows)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, max_new_tokens=1) if generating else model(**batch)


@pytest.mark.parametrize(
    ("rows", "images", "message"),
    [
        ([span(), span()], 1, r"pixel_values must be \[2, 5, 3, 28, 28\], an image for each of 2 "
         r"spans in input_ids; got \[1, 5, 3, 28, 28\]"),
        ([span()], 2, r"an image for each of 1 spans in input_ids; got \[2, 5"),
        ([[1, 2]], 1, r"an image for each of 0 spans in input_ids; got \[1, 5"),
    ],
)  # fmt: skip
def test_another_number_of_images(model, rows, images, message):
    with pytest.raises(ValueError, match=message):
        model(**left_pad(rows), pixel_values=pixels(images))


@pytest.mark.parametrize("shape", [(5, 3, SIDE, SIDE), (1, 4, 3, SIDE, SIDE), (1, 5, 3, 14, 14)])
def test_another_shape_of_images(model, shape):
    with pytest.raises(ValueError, match=r"pixel_values must be \[1, 5, 3, 28, 28\]"):
        model(torch.tensor([span()]), pixel_values=torch.zeros(shape))


def test_ids_or_embeddings(model):
    ids = torch.tensor([[1, 2]])
    embeds = model.get_input_embeddings()(ids)
    for transformer in (model, model.transformer):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            transformer(ids, inputs_embeds=embeds)
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            transformer()
    with pytest.raises(ValueError, match="visual_mask and visual_tokens must be given together"):
        model.transformer(ids, visual_mask=torch.zeros(1, 2, dtype=torch.bool))


def test_path_in_the_ids_equals_its_pixels(model, folder):
    """Also a path that fills its span, and one in another script."""
    crops = model.transformer.visual.extract_crops(["b.jpg"])[None]
    with torch.no_grad():
        expected = model(torch.tensor([span()]), pixel_values=crops).logits
        for path in ("b.jpg", "./" * 7 + "/b.jpg", "猫.jpg"):
            shutil.copy("b.jpg", path) if path == "猫.jpg" else None
            assert len(path.encode()) <= LENGTH
            assert torch.equal(model(torch.tensor([span(path)])).logits, expected)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "image 1 of row 0 of input_ids holds no path, and there are no pixel_values"),
        ("none.jpg", "image 1 of row 0 of input_ids cannot be read: .*No such file"),
        ("text.jpg", "image 1 of row 0 of input_ids cannot be read: .*text.jpg"),
        ("root", "image 1 of row 0 of input_ids cannot be read: .*directory"),
        ("file:///b.jpg", "image 1 of row 0 of input_ids cannot be read: source must be a path"),
        ("http://a.io/b.jpg", "cannot be read: source is a URL, and allow_urls is False"),
    ],
)
def test_a_picture_that_cannot_be_read(model, folder, path, message):
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([[*span("b.jpg"), *span(path)]]))


@pytest.mark.parametrize("ids", [[255, 254], [104, 105, 299]])
def test_what_is_no_path(model, ids):
    row = span()
    row[1 : 1 + len(ids)] = ids
    with pytest.raises(
        ValueError, match=r"image 0 of row 0 .* must hold the UTF-8 bytes of a path"
    ):
        model(torch.tensor([row]))


def test_a_url_is_fetched_only_where_the_model_says_so(model, monkeypatch):
    picture = (DATA / "A_image0.jpg").read_bytes()
    monkeypatch.setattr("monkey_model.inputs.images.fetch", lambda *args: picture)
    ids = torch.tensor([span("http://a.io/b.jpg")])
    crops = model.transformer.visual.extract_crops([picture])[None]
    for root in (None, "/nowhere"):
        model.transformer.image_root = root
        with pytest.raises(ValueError, match="source is a URL, and allow_urls is False"):
            model(ids)
    model.transformer.allow_urls = True
    with torch.no_grad():
        expected = model(torch.tensor([span()]), pixel_values=crops).logits
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("path", ["a.jpg", "./a.jpg", "in.jpg", "x/../a.jpg"])
def test_paths_inside_the_root(model, folder, path):
    model.transformer.image_root = folder / "root"
    model(torch.tensor([span(path)]))


@pytest.mark.parametrize("path", ["../b.jpg", "out.jpg", "/etc/hosts", "../root2/a.jpg", ""])
def test_paths_that_leave_the_root(model, folder, path):
    (folder / "root2").mkdir()
    shutil.copy("b.jpg", "root2/a.jpg")
    model.transformer.image_root = folder / "root"
    message = "holds no path" if not path else "must be a relative one inside image_root"
    with pytest.raises(ValueError, match=f"image 0 of row 0 of input_ids .*{message}"):
        model(torch.tensor([span(path)]))


@pytest.mark.parametrize("path", ["loop.jpg", "loop.jpg/a.jpg"])
def test_links_that_lead_to_each_other(model, folder, path):
    (folder / "root" / "loop.jpg").symlink_to("pool.jpg")
    (folder / "root" / "pool.jpg").symlink_to("loop.jpg")
    model.transformer.image_root = folder / "root"
    message = f"image 0 of row 0 .* path must not lead into a loop of links; got '{path}'"
    with pytest.raises(ValueError, match=message):
        model(torch.tensor([span(path)]))


def test_a_pipe_inside_the_root(model, folder):
    """Opening it would wait for a writer."""
    os.mkfifo(folder / "root" / "pipe.jpg")
    model.transformer.image_root = folder / "root"
    with pytest.raises(ValueError, match=r"image 0 of row 0 .*pipe\.jpg' must be a regular file"):
        model(torch.tensor([span("pipe.jpg")]))


def test_an_absolute_path_inside_the_root_is_absolute(model, folder):
    model.transformer.image_root = "/"
    with pytest.raises(ValueError, match="must be a relative one inside image_root"):
        model(torch.tensor([span("/etc/hosts")]))


def test_neither_setting_is_part_of_a_checkpoint(model, tmp_path):
    """What a prompt may reach is for whoever runs the model to say, not for a file."""
    model.transformer.allow_urls, model.transformer.image_root = True, "/somewhere"
    model.config.allow_urls, model.config.image_root = True, "/somewhere"
    model.save_pretrained(tmp_path)
    again = MonkeyLMHeadModel.from_pretrained(tmp_path)
    assert again.transformer.allow_urls is False
    assert again.transformer.image_root is None
