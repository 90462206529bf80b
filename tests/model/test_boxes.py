"""Boxes in a reply: read, and drawn on the talk's last picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from monkey_model.inputs.boxes import boxes_with_refs, draw_boxes
from monkey_model.inputs.prompts import to_list_format
from tests.helpers.vocabulary import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("boxes"))


@pytest.fixture
def grey(tmp_path):
    """A picture of 400x200 pixels, called grey.png."""
    Image.new("RGB", (400, 200), "grey").save(tmp_path / "grey.png")
    return tmp_path


def painted(image, colour="grey"):
    """Columns and rows, first and last, of what is not the background."""
    changed = (np.asarray(image) != np.asarray(Image.new("RGB", (1, 1), colour))).any(-1)
    rows, columns = np.nonzero(changed)
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_boxes_with_refs(tokenizer):
    text = (
        "A <ref> dog </ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box> and "
        "<ref>cat</ref> there <box> ( 9 , 9 ) , (10,11) </box><quad>(1,1)</quad>"
    )
    assert tokenizer._fetch_all_box_with_ref(text) == [
        {"box": (1, 2, 3, 4), "ref": "dog"},
        {"box": (5, 6, 7, 8)},
        {"box": (9, 9, 10, 11)},
    ]
    assert tokenizer._fetch_all_box_with_ref("<ref>dog</ref>") == []


@pytest.mark.parametrize(
    "box",
    [
        "",
        "(1,2)",
        "(1,2),(3,4),(5,6)",
        "(a,2),(3,4)",
        "(1.5,2),(3,4)",
        "(1,2),(3," + "9" * 10 + ")",
    ],
)
def test_a_box_that_is_none(box):
    with pytest.raises(ValueError, match=r"a box must read \(x1,y1\),\(x2,y2\); got"):
        boxes_with_refs(to_list_format(f"<box>{box}</box>"))


def test_latest_picture(tokenizer):
    history = [
        ("<img>a</img>", "<img>never a reply's in the history</img>"),
        ("Picture 1:<img>b</img>\nPicture 2:<img>c</img>\n", None),
        ("no picture", "x"),
    ]
    assert tokenizer._fetch_latest_picture("y", history) == "c"
    assert tokenizer._fetch_latest_picture("y", history[:1]) == "a"
    assert tokenizer._fetch_latest_picture("<img>d</img>y", history) == "d"
    assert tokenizer._fetch_latest_picture("y", history[2:]) is None
    assert tokenizer._fetch_latest_picture("y", None) is None
    query = tokenizer.from_list_format([{"image": "<box>.png"}])
    assert tokenizer._fetch_latest_picture("", [(query, None)]) == "<box>.png"


def test_box_in_thousandths(tokenizer, grey):
    history = [("<img>grey.png</img>", None)]
    image = tokenizer.draw_bbox_on_latest_picture(
        "<box>(100,250),(600,750)</box>", history, image_root=grey
    )
    assert (image.mode, image.size) == ("RGB", (400, 200))
    assert painted(image) == (40, 50, 240, 150)
    assert image.getpixel((140, 100)) == (128, 128, 128)  # an outline
    # Where prompt and reply are one text.
    text = f"<img>{grey / 'grey.png'}</img>Where? <box>(100,250),(600,750)</box>"
    assert np.array_equal(image, tokenizer.draw_bbox_on_latest_picture(text))


@pytest.mark.parametrize(
    "box, expected",
    [
        ("(0,0),(999,999)", (0, 0, 399, 199)),
        ("(0,0),(1000,1000)", (0, 0, 399, 199)),
        ("(600,750),(100,250)", (40, 50, 240, 150)),
        ("(900,900),(999999999,999999999)", (360, 180, 399, 199)),
        ("(2000,2000),(3000,3000)", (397, 197, 399, 199)),  # as thick as a line
    ],
)
def test_any_box_can_be_drawn(box, expected):
    image = Image.new("RGB", (400, 200), "grey")
    boxes = boxes_with_refs(to_list_format(f"<box>{box}</box>"))
    assert painted(draw_boxes(image, boxes)) == expected
    assert len(image.getcolors()) == 1  # the picture itself is left alone
    draw_boxes(Image.new("RGB", (1, 1)), boxes)


def test_refs_are_written_in_the_colour_of_their_boxes():
    image = Image.new("RGB", (400, 200), "white")
    box = (500, 100, 900, 900)
    plain, named, other = (
        draw_boxes(image, boxes)
        for boxes in (
            [{"box": box}],
            [{"box": box, "ref": "dog"}],
            [{"box": (0, 0, 9, 9), "ref": ""}, {"box": box, "ref": "dog"}],
        )
    )
    corner = (360, 180)
    colours = {image.getpixel(corner) for image in (plain, named, other)}
    assert len(colours) == 3 and (255, 255, 255) not in colours
    rows, columns = np.nonzero((np.asarray(named) == 0).all(-1))  # behind the word
    assert 200 <= columns.min() < columns.max() < 300 and 20 <= rows.min() < rows.max() < 60
    written = np.asarray(named)[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert (written == named.getpixel(corner)).all(-1).any()


def test_font(tmp_path):
    image = Image.new("RGB", (400, 200), "white")
    boxes = [{"box": (100, 100, 900, 900), "ref": "dog"}]
    font = tmp_path / "font.ttf"
    font.write_bytes(ImageFont.load_default(15).font_bytes)
    assert np.array_equal(draw_boxes(image, boxes, font), draw_boxes(image, boxes))
    with pytest.raises(OSError, match="cannot open resource"):
        draw_boxes(image, boxes, tmp_path / "none.ttf")


def test_nothing_to_draw(tokenizer, grey):
    assert tokenizer.draw_bbox_on_latest_picture("<box>(1,1),(2,2)</box>") is None
    assert tokenizer.draw_bbox_on_latest_picture("x", [("<img>grey.png</img>", "")]) is None


def test_pictures_are_opened_as_the_model_opens_them(tokenizer, grey, monkeypatch):
    """image_root, allow_urls, the formats, and EXIF."""
    box = "<box>(0,0),(500,500)</box>"

    def draw(path, **settings):
        return tokenizer.draw_bbox_on_latest_picture(
            box, [(f"<img>{path}</img>", None)], **settings
        )

    for path in ("../grey.png", str(grey / "grey.png")):
        (grey / "in").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="path must be a relative one inside image_root"):
            draw(path, image_root=grey / "in")
    for url in ("http://a/b.png", "https://a/b.png"):
        with pytest.raises(ValueError, match="allow_urls is False"):
            draw(url)
        with pytest.raises(ValueError, match="allow_urls is False"):
            draw(url, image_root=grey)
    with pytest.raises(FileNotFoundError):
        draw("none.png", image_root=grey)
    Image.new("RGB", (9, 9)).save(grey / "x.eps")
    with pytest.raises(ValueError, match="not a readable image"):
        draw("x.eps", image_root=grey)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(grey / "turned.jpg", exif=exif)
    assert draw("turned.jpg", image_root=grey).size == (20, 40)
    monkeypatch.chdir(grey)
    assert draw("grey.png").size == (400, 200)
