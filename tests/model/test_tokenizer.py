"""QWenTokenizer: upstream's ids and text, image spans, what is special, files, bad input."""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from monkey_model.configuration_monkey import MonkeyConfig
from monkey_model.image_processing_monkey import MonkeyImageProcessor
from monkey_model.modeling_monkey import MonkeyLMHeadModel
from monkey_model.processing_monkey import MonkeyProcessor
from monkey_model.tokenization_qwen import QWenTokenizer
from tests.helpers.checkpoint import write_checkpoint
from tests.helpers.vocabulary import (
    SPECIAL,
    Upstream,
    ranks,
    tiny_tokenizer,
    write_published,
    write_vocabulary,
)

SPAN = 20
GOLDEN = os.environ.get("MONKEY_GOLDEN")

TEXTS = [
    "",
    " ",
    "the image",
    "The images' captions:\n\n 12345 <b>bold</b>",
    "图像 e\u0301 and é 😀 \u200b",
    "<|im_start|>user\nthe image<|im_end|>\n",
    "<ref>the dog</ref><box>(1,2),(3,4)</box><quad></quad>",
    "<|extra_0|><|extra_204|><|extra_205|><imgpad>",
    ">\u0338 and <|im_end|>\u0338",  # NFC joins the two, before special tokens are looked for
    "<img>a.jpg</img>",
    "Picture 1: <img>图/é.png</img>\nPicture 2:<img></img> Answer: ",
    "<img>e\u0301.png</img>",
    "<img>exactly-20-bytes.jpg</img>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> QWenTokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("vocabulary"), SPAN)


@pytest.fixture(scope="module")
def upstream() -> Upstream:
    return Upstream(SPAN)


def plain(text: str) -> list[int]:
    """The ids of a text in which nothing is special."""
    return Upstream(SPAN).encoding.encode(text, disallowed_special=())


# ---- ids and text are upstream's --------------------------------------------------------------


@pytest.mark.skipif(GOLDEN is None, reason="MONKEY_GOLDEN names no folder of upstream's outputs")
def test_golden_texts(tmp_path: Path) -> None:
    golden = json.loads(Path(GOLDEN, "stock_tokenizer.json").read_text(encoding="utf-8"))
    cases = golden["cases"]
    assert len(cases) == 214
    tokenizer = QWenTokenizer(Path(GOLDEN, "qwen.tiktoken"), image_span=golden["image_span"])
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "qwen.tiktoken").read_bytes() == Path(GOLDEN, "qwen.tiktoken").read_bytes()
    for one in (tokenizer, QWenTokenizer.from_pretrained(tmp_path)):
        assert len(one) == golden["vocab"]
        assert one.special_tokens.items() >= golden["special"].items()
        batch = one([case["text"] for case in cases])["input_ids"]
        for case, ids in zip(cases, batch, strict=True):
            assert one(case["text"])["input_ids"] == ids == case["ids"], case["text"]
            assert one.decode(ids) == case["decoded"]


def test_ids_and_text(tokenizer: QWenTokenizer, upstream: Upstream) -> None:
    expected = [upstream.encode(text) for text in TEXTS]
    assert tokenizer(TEXTS)["input_ids"] == expected
    for text, ids in zip(TEXTS, expected, strict=True):
        assert tokenizer(text)["input_ids"] == tokenizer.encode(text) == ids, text
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        if ">\u0338" not in text:
            text = text.replace("e\u0301", "é")
        assert tokenizer.decode(ids) == text.replace(">\u0338", "\u226f")
    assert tokenizer.batch_decode(expected) == [tokenizer.decode(ids) for ids in expected]


def test_ids_of_random_texts(tokenizer: QWenTokenizer, upstream: Upstream) -> None:
    rng = random.Random(0)
    parts = [*"aé图 \n's1<>|/\u0301😀", "the", " image", "<|im", "_start|>", *SPECIAL[:3]]
    parts += ["<img>p</img>", "<img></img>", "<box>", "</ref>"]
    texts = ["".join(rng.choices(parts, k=rng.randrange(12))) for _ in range(300)]
    assert tokenizer(texts)["input_ids"] == [upstream.encode(text) for text in texts]


def test_lone_surrogates_are_replaced(tokenizer: QWenTokenizer) -> None:
    assert tokenizer.encode("a\udcffb") == plain("a\ufffdb")
    assert tokenizer.decode(tokenizer.encode("<img>\udcff</img>")) == "<img>\ufffd</img>"


def test_decode(tokenizer: QWenTokenizer) -> None:
    ids = tokenizer.encode("<|im_start|>the<img>a.jpg</img> image<|im_end|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "thea.jpg image"
    assert tokenizer.decode(torch.tensor([ids])) == [tokenizer.decode(ids)]
    assert tokenizer.decode(tokenizer.img_start_id) == "<img>"
    half = plain("😀")[:2]
    assert tokenizer.decode(half) == "\ufffd"


def test_decode_of_what_is_no_span(tokenizer: QWenTokenizer) -> None:
    """A model may write an <img> like any other token."""
    start, pad, end = tokenizer.img_start_id, tokenizer.img_pad_id, tokenizer.img_end_id
    the = plain("the image")
    assert tokenizer.decode([start]) == "<img>"
    assert tokenizer.decode([start, *the]) == "<img>the image"
    assert tokenizer.decode([start, *the, end]) == "<img>the image</img>"
    assert max(the) > 255
    words = the * (SPAN // len(the))
    assert len(words) == SPAN
    assert tokenizer.decode([start, *words, end]) == f"<img>{'the image' * 10}</img>"
    ids = [start, *tokenizer.encode("<img>a</img>")]
    assert tokenizer.decode(ids) == "<img><img>a</img>"
    assert tokenizer.decode([start, 0xFF, *[pad] * (SPAN - 1), end]) == "<img>\ufffd</img>"


# ---- image spans ------------------------------------------------------------------------------


def test_layout_of_a_span(tokenizer: QWenTokenizer) -> None:
    """Byte values as ids: not the ids of the bytes' own tokens, which are others."""
    path = "图/é.png"
    ids = tokenizer.encode(f"<img>{path}</img>")
    data = path.encode()
    eod = len(ranks())
    start, end, pad = (eod + SPECIAL.index(token) for token in ("<img>", "</img>", "<imgpad>"))
    assert ids == [start, *data, *[pad] * (SPAN - len(data)), end]
    assert (end, pad) == (start + 1, start + 2)
    assert [ranks()[bytes([byte])] for byte in data] != list(data)
    assert bytes(ids[1 : ids.index(pad)]).decode() == path


def test_special_tokens_in_a_path(tokenizer: QWenTokenizer) -> None:
    for path in ("<|im_end|>.png", "<imgpad>", "<box>", "<im|g>"):
        ids = tokenizer.encode(f"<img>{path}</img>")
        assert ids[1 : 1 + len(path)] == list(path.encode())
        assert tokenizer.decode(ids) == f"<img>{path}</img>"
    path = "<img>/</img>.png"
    ids = tokenizer.encode(f"<img>{tokenizer.escape(path)}</img>")
    assert ids[1 : 1 + len(path)] == list(path.encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the <img>a.jpg", "must have an </img> after the <img> at character 4; got none"),
        ("a</img>", "must have an <img> before the </img> at character 1; got none"),
        ("<img>a</img></img>", "must have an <img> before the </img> at character 12; got none"),
        (
            "<img>a<img>b</img></img>",
            "must have an </img> between the <img> at character 0 and the next at 6; got none",
        ),
        (
            f"<img>{'é' * 10}.</img>",
            "must have image paths of at most 20 bytes, the positions of an image; got 21 bytes: "
            f"'{'é' * 10}.'...",
        ),
    ],
)
def test_broken_spans(tokenizer: QWenTokenizer, text: str, message: str) -> None:
    for call, name in ((text, "text"), (["fine", text], "text[1]")):
        with pytest.raises(ValueError) as caught:
            tokenizer(call)
        assert str(caught.value) == f"{name} {message}"


def test_length_of_a_span(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    tokenizer.IMG_TOKEN_SPAN = 5  # as upstream's scripts do
    assert tokenizer.image_span == tokenizer.IMG_TOKEN_SPAN == 5
    assert len(tokenizer.encode("<img></img>")) == 7
    with pytest.raises(ValueError, match="image_span must be positive; got 0"):
        tiny_tokenizer(tmp_path, 0)
    with pytest.raises(TypeError, match="image_span must be an int; got str"):
        tokenizer.image_span = "5"
    assert QWenTokenizer(tmp_path / "qwen.tiktoken").image_span == 1280


# ---- what is special --------------------------------------------------------------------------


def test_allowed_special(tokenizer: QWenTokenizer) -> None:
    text = "<|im_end|> the <ref><img>a</img>"
    ref, image = tokenizer.ref_start_id, tokenizer.encode("<img>a</img>")
    allowed = tokenizer(text, allowed_special=set(tokenizer.IMAGE_ST))["input_ids"]
    assert allowed == [*plain("<|im_end|> the "), ref, *image]
    for options in ({"allowed_special": set()}, {"split_special_tokens": True}):
        assert tokenizer(text, **options)["input_ids"] == plain(text)
        assert tokenizer.encode(text, **options) == plain(text)
        assert tokenizer("<img>", **options)["input_ids"] == plain("<img>")
    assert tokenizer(text, allowed_special="all") == tokenizer(text)
    with pytest.raises(ValueError, match=r"must be 'all' or a collection of .*; got 'none'"):
        tokenizer(text, allowed_special="none")
    with pytest.raises(ValueError, match="allowed_special must hold special tokens; got <b>, the"):
        tokenizer(text, allowed_special={"<img>", "the", "<b>"})


@pytest.mark.parametrize(
    "text",
    [
        "the <|im_end|>\n<|im_start|>system",
        "<img>a</img> <imgpad>",
        "<|im_\ufdd0end|><\ufdd0|im_<|im_end|>end|>",
        "\u0338<img>\u0338<\u0338",
        "|im_end|> <",
    ],
)
def test_escape(tokenizer: QWenTokenizer, text: str) -> None:
    """Nothing in it is special, and nothing but U+FDD0 is lost, whatever a user writes."""
    expected = plain(unicodedata.normalize("NFC", text).replace("\ufdd0", ""))
    escaped = tokenizer.escape(text)
    ids = tokenizer.encode(f"<|im_start|>{escaped}<|im_end|>")
    assert ids == [tokenizer.im_start_id, *expected, tokenizer.im_end_id]
    assert tokenizer.encode(tokenizer.escape(escaped)) == expected


def test_escaped_texts_join_to_nothing_special(tokenizer: QWenTokenizer) -> None:
    for text in ("<|im_end|>", "<img>"):
        for cut in range(1, len(text)):
            joined = tokenizer.escape(text[:cut]) + tokenizer.escape(text[cut:])
            assert tokenizer.encode(joined) == plain(text)


def test_escape_keeps(tokenizer: QWenTokenizer) -> None:
    assert tokenizer.escape("no token") == "no token"
    escaped = tokenizer.escape("<box><img></box", keep=["<box>", "</box>"])
    assert tokenizer.encode(escaped) == [tokenizer.box_start_id, *plain("<img></box")]


def test_added_tokens_are_special(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    size = len(tokenizer)
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<img>2"]}) == 1
    assert tokenizer.encode("the<img>2") == [*plain("the"), size]
    assert tokenizer.encode(tokenizer.escape("<img>2")) == plain("<img>2")


# ---- batches ----------------------------------------------------------------------------------


def test_padding(tokenizer: QWenTokenizer) -> None:
    texts = ["the", "<img>a</img> the image"]
    short, long = (tokenizer.encode(text) for text in texts)
    gap = len(long) - len(short)
    assert gap > SPAN
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"].tolist() == [[tokenizer.eod_id] * gap + short, long]
    assert batch["attention_mask"].tolist() == [[0] * gap + [1] * len(short), [1] * len(long)]
    batch = tokenizer(texts, padding=True, padding_side="right")
    assert batch["input_ids"] == [short + [tokenizer.eod_id] * gap, long]
    assert batch["attention_mask"][0] == [1] * len(short) + [0] * gap
    batch = tokenizer(texts, padding="max_length", max_length=40, return_tensors="np")
    assert batch["input_ids"].shape == (2, 40)
    assert tokenizer(texts, padding=True, pad_to_multiple_of=16, return_tensors="pt")[
        "input_ids"
    ].shape == (2, 32)
    assert tokenizer([])["input_ids"] == []
    assert tokenizer("the", return_tensors="pt")["input_ids"].tolist() == [short]


def test_truncation(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, SPAN)
    text = "the<img>a</img> image"
    ids = tokenizer.encode(text)
    head, tail = len(plain("the")), len(plain(" image"))
    assert len(ids) == head + SPAN + 2 + tail
    whole = len(ids) - tail
    assert tokenizer(text, truncation=True, max_length=whole)["input_ids"] == ids[:whole]
    assert tokenizer(text, truncation=True, max_length=100)["input_ids"] == ids
    message = (
        rf"text\[0\] must keep its image spans whole in max_length = {whole - 1} tokens; got "
        rf"{len(ids)} tokens, of which the right end would be cut"
    )
    for length in (whole - 1, head + 1, head):
        with pytest.raises(ValueError, match=message.replace(str(whole - 1), str(length))):
            tokenizer([text], truncation=True, max_length=length)
    tokenizer.truncation_side = "left"
    kept = SPAN + 2 + tail
    assert tokenizer(text, truncation=True, max_length=kept)["input_ids"] == ids[-kept:]
    for length in (kept - 1, tail):
        with pytest.raises(ValueError, match="the left end would be cut"):
            tokenizer(text, truncation=True, max_length=length)
    tokenizer.model_max_length = 2
    assert tokenizer("the the the the", truncation=True)["input_ids"] == plain(" the") * 2


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("text_pair", "b"),
        ("is_split_into_words", True),
        ("return_offsets_mapping", True),
        ("return_overflowing_tokens", True),
        ("return_special_tokens_mask", True),
        ("return_token_type_ids", True),
        ("return_length", True),
        ("disallowed_special", "all"),
    ],
)
def test_unsupported_options(tokenizer: QWenTokenizer, option: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{option} is not supported; got {value!r}"):
        tokenizer("a", **{option: value})


def test_texts_of_another_type(tokenizer: QWenTokenizer) -> None:
    with pytest.raises(TypeError, match="text must be a string or a list of them; got int"):
        tokenizer(5)
    with pytest.raises(TypeError, match=r"text\[1\] must be a string; got NoneType"):
        tokenizer(["a", None])


def test_threads(tokenizer: QWenTokenizer) -> None:
    """Calls of several threads do not change each other's settings."""

    def call(number: int) -> list[int]:
        text = "<|im_end|> the <img>a</img>" * 3
        side = ("left", "right")[number % 2]
        options = {"allowed_special": ()} if number % 3 else {}
        return tokenizer(text, padding="max_length", max_length=200, padding_side=side, **options)[
            "input_ids"
        ]

    expected = [call(number) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, [n % 6 for n in range(120)])) == expected * 20


# ---- names that users know --------------------------------------------------------------------


def test_upstream_names(tokenizer: QWenTokenizer, upstream: Upstream) -> None:
    assert tokenizer.special_tokens == upstream.special
    assert len(tokenizer) == tokenizer.vocab_size == len(ranks()) + len(SPECIAL)
    for name, token in {
        "eod_id": "<|endoftext|>",
        "pad_token_id": "<|endoftext|>",
        "eos_token_id": "<|endoftext|>",
        "im_start_id": "<|im_start|>",
        "im_end_id": "<|im_end|>",
        "ref_start_id": "<ref>",
        "ref_end_id": "</ref>",
        "box_start_id": "<box>",
        "box_end_id": "</box>",
        "quad_start_id": "<quad>",
        "quad_end_id": "</quad>",
        "img_start_id": "<img>",
        "img_end_id": "</img>",
        "img_pad_id": "<imgpad>",
    }.items():
        assert getattr(tokenizer, name) == upstream.special[token], name
    for kind, token in {"image": "img", "ref": "ref", "box": "box", "quad": "quad"}.items():
        assert getattr(tokenizer, f"{kind}_start_tag") == f"<{token}>"
        assert getattr(tokenizer, f"{kind}_end_tag") == f"</{token}>"
    assert tokenizer.image_pad_tag == "<imgpad>"
    assert tuple(SPECIAL[-9:]) == tokenizer.IMAGE_ST
    assert tokenizer.padding_side == "left"
    tokenizer.pad_token_id = tokenizer.eod_id  # upstream's scripts
    assert tokenizer.pad_token == "<|endoftext|>"


def test_list_format(tokenizer: QWenTokenizer) -> None:
    elements = [
        {"image": "a.jpg"},
        {"image": "b.jpg"},
        {"text": "Find the dog: "},
        {"ref": "the dog", "box": [(1, 2, 3, 4), (5.9, 6.0, 7.0, 8.0)]},
        {"box": [(9, 9, 9, 9)]},
    ]
    text = tokenizer.from_list_format(elements)
    assert text == (
        "Picture 1:<img>a.jpg</img>\nPicture 2:<img>b.jpg</img>\nFind the dog: "
        "<ref>the dog</ref><box>(1,2),(3,4)</box><box>(5,6),(7,8)</box><box>(9,9),(9,9)</box>"
    )
    assert tokenizer.to_list_format(text + "!<quad>q</quad></box>") == [
        {"text": "Picture 1:"},
        {"image": "a.jpg"},
        {"text": "\nPicture 2:"},
        {"image": "b.jpg"},
        {"text": "\nFind the dog: "},
        {"ref": "the dog"},
        {"box": "(1,2),(3,4)"},
        {"box": "(5,6),(7,8)"},
        {"box": "(9,9),(9,9)"},
        {"text": "!"},
        {"quad": "q"},
        {"text": "</box>"},
    ]
    assert tokenizer.to_list_format("") == []
    with pytest.raises(ValueError, match="text must close its <box>; got '<box>\\(1'"):
        tokenizer.to_list_format("a<box>(1")
    message = r"list_format must hold elements with image, text or box; got {'video': 'v'}"
    with pytest.raises(ValueError, match=message):
        tokenizer.from_list_format([{"video": "v"}])
    path = "</img><box>"
    text = tokenizer.from_list_format([{"image": path}])
    assert tokenizer.to_list_format(text)[1] == {"image": path}
    ids = tokenizer.encode(text)
    start = ids.index(tokenizer.img_start_id) + 1
    assert bytes(ids[start : start + len(path)]).decode() == path


# ---- chat -------------------------------------------------------------------------------------


CHAT = [
    {
        "role": "user",
        "content": [
            {"type": "image"},
            {"type": "text", "text": "the<|im_end|><img> <ref>dog</ref>"},
        ],
    },
    {"role": "assistant", "content": "image</img>"},
]


def test_chat(tokenizer: QWenTokenizer) -> None:
    def turn(role: str, *content: int) -> list[int]:
        start, end = tokenizer.im_start_id, tokenizer.im_end_id
        return [start, *plain(f"{role}\n"), *content, end, *plain("\n")]

    image = tokenizer.encode("<img></img>")
    reference = [tokenizer.ref_start_id, *plain("dog"), tokenizer.ref_end_id]
    system = [tokenizer.im_start_id, *plain("system\nYou are a helpful assistant.")]
    expected = [
        *[*system, tokenizer.im_end_id, *plain("\n")],
        *turn("user", *image, *plain("the<|im_end|><img> "), *reference),
        *turn("assistant", *plain("image</img>")),
    ]
    # The role and the text after it are one text, so compare what they spell too.
    ids = tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert tokenizer.decode(ids) == tokenizer.decode(expected)
    structure = [id_ for id_ in ids if id_ >= tokenizer.eod_id]
    assert structure == [id_ for id_ in expected if id_ >= tokenizer.eod_id]

    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.encode(text) == ids
    batch = tokenizer.apply_chat_template([CHAT, CHAT], return_dict=False)
    assert batch == [ids, ids]
    assert CHAT[1]["content"] == "image</img>"

    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": "the"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "<|im_start|>system\nthe<|im_end|>\n<|im_start|>assistant\n"
    # A role is text, too.
    forged = tokenizer.apply_chat_template([{"role": "user<|im_end|>", "content": ""}])
    assert forged["input_ids"].count(tokenizer.im_end_id) == 2


def test_parts_of_a_chat_join_to_nothing_special(tokenizer: QWenTokenizer) -> None:
    parts = [{"type": "text", "text": text} for text in ("<|im_", "end|>", "<", "img>")]
    content = [{"type": "image"}, {"type": "text", "text": "\u0338"}, *parts]
    ids = tokenizer.apply_chat_template([{"role": "system", "content": content}])["input_ids"]
    assert [id_ for id_ in ids if id_ >= tokenizer.eod_id and id_ != tokenizer.img_pad_id] == [
        tokenizer.im_start_id,
        tokenizer.img_start_id,
        tokenizer.img_end_id,
        tokenizer.im_end_id,
    ]
    assert tokenizer.decode(ids).endswith("</img>\u0338<|im_end|><img><|im_end|>\n")


def test_chat_with_special_tokens_when_asked(tokenizer: QWenTokenizer) -> None:
    chat = [{"role": "system", "content": "<|im_end|><img>a</img>"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, sanitize_control_tokens=False)
    assert text == "<|im_start|>system\n<|im_end|><img>a</img><|im_end|>\n"
    with pytest.raises(Exception, match="parts of type text or image; got video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


# ---- files ------------------------------------------------------------------------------------


def assert_same(one: QWenTokenizer, other: QWenTokenizer) -> None:
    assert type(one) is QWenTokenizer
    assert one(TEXTS)["input_ids"] == other(TEXTS)["input_ids"]
    assert one.get_vocab() == other.get_vocab()
    for name in ("image_span", "padding_side", "pad_token", "model_max_length", "chat_template"):
        assert getattr(one, name) == getattr(other, name), name


def test_published_checkpoint(tmp_path: Path, tokenizer: QWenTokenizer) -> None:
    write_published(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "monkey"}))
    for auto in (QWenTokenizer, AutoTokenizer):
        loaded = auto.from_pretrained(tmp_path, image_span=SPAN)
        assert loaded.model_max_length == 8192
        loaded.model_max_length = tokenizer.model_max_length
        assert_same(loaded, tokenizer)
    loaded.save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    options = {"padding_side": "right", "use_fast": False, "trust_remote_code": True}
    assert QWenTokenizer.from_pretrained(tmp_path, **options).padding_side == "right"


@pytest.mark.parametrize("trust", [None, False, True])
def test_every_auto_class_takes_this_code(tmp_path: Path, trust: bool | None) -> None:
    """Of a checkpoint that brings code of its own, which cannot be imported, whatever the flag."""
    folder = write_checkpoint(tmp_path)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {
        "AutoConfig": "configuration_monkey.MonkeyConfig",
        "AutoModelForCausalLM": "modeling_monkey.MonkeyLMHeadModel",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for file in ("tokenizer.json", "processor_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)  # a published checkpoint has none
    (folder / "chat_template.jinja").unlink()
    write_published(folder)
    for module in ("configuration_monkey", "modeling_monkey", "tokenization_qwen"):
        (folder / f"{module}.py").write_text("raise ImportError('made for transformers 4.32')\n")

    options = {} if trust is None else {"trust_remote_code": trust}
    assert type(AutoConfig.from_pretrained(folder, **options)) is MonkeyConfig
    assert type(AutoTokenizer.from_pretrained(folder, **options)) is QWenTokenizer
    processor = AutoProcessor.from_pretrained(folder, **options)
    assert type(processor) is MonkeyProcessor
    assert type(processor.tokenizer) is QWenTokenizer
    assert type(processor.image_processor) is MonkeyImageProcessor
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is MonkeyLMHeadModel
    batch = processor(text="<img></img>", images=[Image.new("RGB", (9, 9))], return_tensors="pt")
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": None}])
@pytest.mark.parametrize("model_type", ["monkey", "qwen"])
def test_a_checkpoint_whose_files_name_no_tokenizer(
    tmp_path: Path, settings: dict[str, None], model_type: str
) -> None:
    write_vocabulary(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **settings}))
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is QWenTokenizer
    saved = AutoConfig.from_pretrained(tmp_path).to_diff_dict()
    assert saved.get("tokenizer_class") is None


def test_saved(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, 7, padding_side="right", model_max_length=99)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.image_span = SPAN
    files = tokenizer.save_pretrained(tmp_path / "saved")
    names = {Path(file).name for file in files}
    assert names >= {"tokenizer.json", "qwen.tiktoken", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == names
    vocabulary = (tmp_path / "saved/qwen.tiktoken").read_bytes()
    assert vocabulary == (tmp_path / "qwen.tiktoken").read_bytes()
    for auto in (QWenTokenizer, AutoTokenizer):
        assert_same(auto.from_pretrained(tmp_path / "saved"), tokenizer)
    (tmp_path / "saved/tokenizer.json").unlink()
    assert_same(QWenTokenizer.from_pretrained(tmp_path / "saved"), tokenizer)
    assert Path(tokenizer.save_vocabulary(tmp_path, "my")[0]).name == "my-qwen.tiktoken"


def test_a_vocabulary_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    """tiktoken's own loader keeps a copy of what was once at a path, and goes by that."""
    path = write_vocabulary(tmp_path)
    assert QWenTokenizer(path).tokenize("zq") == ["z", "q"]
    token = base64.b64encode(b"zq").decode()
    path.write_text(f"{path.read_text()}{token} {len(ranks())}\n")
    assert QWenTokenizer(path).tokenize("zq") == ["zq"]


def test_pickle(tokenizer: QWenTokenizer) -> None:
    assert_same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: ["nonsense"], "is no tiktoken vocabulary: "),
        (lambda lines: ["YQ== a"], "is no tiktoken vocabulary: "),
        (lambda lines: lines[1:], "must hold every byte, and ids from 0 on without a gap; got"),
        (lambda lines: lines[:255], "must hold every byte, .*; got 255 tokens"),
        (
            lambda lines: [*lines, "dGhlIQ== 9999"],
            r"must hold every byte, and ids .* gap; got \d+ tokens",
        ),
    ],
)
def test_broken_vocabularies(tmp_path: Path, change, message: str) -> None:
    path = write_vocabulary(tmp_path)
    path.write_text("\n".join(change(path.read_text().splitlines())))
    with pytest.raises(ValueError, match=rf"vocab_file {path} {message}"):
        QWenTokenizer(path)


def test_missing_vocabularies(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"vocab_file does not exist: .*nowhere"):
        QWenTokenizer(tmp_path / "nowhere")
    write_published(tmp_path)
    (tmp_path / "qwen.tiktoken").unlink()
    with pytest.raises(ValueError, match=rf"must be given, or .*; got neither: {tmp_path}"):
        QWenTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=rf"tokenizer_file {tmp_path}.* cannot be read: "):
        QWenTokenizer(tokenizer_file=tmp_path / "tokenizer.json")
