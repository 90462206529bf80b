"""Conversation files: what is read, how it is tokenised, and what is said of a bad record."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from monkey_model.training.conversations import (
    IGNORED,
    ConversationCollator,
    ConversationDataset,
    RecordErrors,
    encode_conversation,
    read_conversations,
)
from tests.helpers.checkpoint import tiny_processor
from tests.helpers.tiny import SPAN
from tests.helpers.vocabulary import Upstream

IMAGE = "<img>a.png</img>"


def record(*turns, **extra):
    roles = ("user", "assistant")
    values = [{"from": roles[n % 2], "value": value} for n, value in enumerate(turns)]
    return {"id": "r0", "conversations": values, **extra}


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    Image.new("RGB", (20, 50), "blue").save(tmp_path / "b.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    return tmp_path


@pytest.fixture
def write(folder):
    def write(*records, name="data.json"):
        path = folder / name
        if name.endswith("l"):
            lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
            path.write_text("\n".join(lines) + "\n")
        else:
            path.write_text(json.dumps(list(records)))
        return path

    return write


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_reads_records_in_order(write, folder, name):
    path = write(
        record(f"{IMAGE} What? Answer: ", "Red."),
        record("Hello", "Hi", f"{IMAGE}<img>{folder}/b.png</img>Which?", "Both\u2028of them"),
        name=name,
    )
    first, second = read_conversations(path)
    assert first.turns == (f"{IMAGE} What? Answer: ", "Red.")
    assert first.images == (str(folder / "a.png"),)
    assert second.images == (str(folder / "a.png"), str(folder / "b.png"))
    assert second.turns[3] == "Both\u2028of them"
    assert first.where == ("record 0 (id 'r0')" if name == "data.json" else "line 1 (id 'r0')")


def test_image_root(write, folder):
    (folder / "pictures").mkdir()
    (folder / "a.png").rename(folder / "pictures" / "a.png")
    path = write(record(IMAGE, "Red."))
    with pytest.raises(RecordErrors, match=r"image '.*/a.png' cannot be read: No such file"):
        read_conversations(path)
    (conversation,) = read_conversations(path, image_root=folder / "pictures")
    assert conversation.images == (str(folder / "pictures" / "a.png"),)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["no object"], "must be an object; got list"),
        ({"id": 7}, r"\(id 7\): 'conversations' must be a list of turns; got keys \['id'\]"),
        ({"conversations": "x"}, "'conversations' must be a list of turns; got str"),
        (record(), "must hold pairs of a user's and an assistant's turn; got 0 turns"),
        (record("a", "b", "c"), "must hold pairs of .*; got 3 turns"),
        ({"conversations": ["a", "b"]}, r"conversations\[0\] must be an object; got str"),
        (
            {"conversations": [{"value": "a"}, {"from": "assistant", "value": "b"}]},
            r"conversations\[0\]\['from'\] must be 'user'; got keys \['value'\]",
        ),
        (
            {"conversations": [{"from": "user", "value": "a"}] * 2},
            r"conversations\[1\]\['from'\] must be 'assistant'; got 'user'",
        ),
        (
            {"conversations": [{"from": "user"}, {"from": "assistant", "value": "b"}]},
            r"conversations\[0\]\['value'\] must be a string; got keys \['from'\]",
        ),
        (record("a", 3), r"conversations\[1\]\['value'\] must be a string; got int"),
        (record("a", "\ud83d"), r"\[1\]\['value'\] must be text; got half of a surrogate pair"),
        (record("<img>a.png", "b"), "must close each <img> with </img>; got <img>$"),
        (record("a.png</img>", "b"), "must close each <img> with </img>; got </img>$"),
        (record("<img><img>a.png</img></img>", "b"), "got <img> <img> </img> </img>$"),
        (record("<img> </img>", "b"), "must name a file in each <img>...</img>; got ' '"),
        (record("<img>http://u:pw@x.org/a.png</img>", "b"), r"not URLs; got 'http://\*\*\*@x.org"),
        (record("a", IMAGE), r"\[1\]\['value'\] must hold no <img>: images belong to the user"),
        (record("<img>no.png</img>", "b"), "image '.*no.png' cannot be read: No such file"),
        (record("<img>broken.png</img>", "b"), "broken.png' cannot be read: it is damaged, or not"),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_bad_record(write, name, bad, message):
    path = write(record("good", "one"), bad, name=name)
    where = "record 1" if name == "data.json" else "line 2"
    with pytest.raises(RecordErrors, match=f"(?s)data.jsonl?: 1 of 2 records are bad\n  {where}.*"
                       + message):  # fmt: skip
        read_conversations(path)


def test_all_bad_records_are_listed_up_to_a_limit(write):
    path = write(*[record("a")] * 5, "{no json", record("<img>no.png</img>", "b"), name="d.jsonl")
    with pytest.raises(RecordErrors) as caught:
        read_conversations(path, max_errors=3)
    assert len(caught.value.problems) == 7
    assert "line 6 must be a JSON object: Expecting" in caught.value.problems[5]
    assert str(caught.value).endswith("and 4 more") and str(caught.value).count("\n") == 4


def test_files_that_are_no_conversations(folder):
    path = folder / "data.json"
    for content, message in (
        (b"[{]", "must be a JSON array: Expecting"),
        (b'{"data": []}', "must be a JSON array of records, or .*; got one object with keys data$"),
        (b'{"id": 1,\n"conversations": []}', "; got one object with keys id, conversations$"),
        (b"{}", "; got one object with keys none$"),
        (
            b'[{},\n\n {"a": [{"b": 1, "b": 2}]}]',
            r"element 1 \(line 3\): an object has the key 'b' t",
        ),
        (b"[[1, 2]\n,\n%s]" % (b"9" * 5000), r"element 1 \(line 3\): an integer has 5000 digits"),
        (
            b"[1, " + b"[" * 100_000,
            r"element 1 \(line 1\): lists and objects are nested too deeply",
        ),
        (b"[]", "must hold at least one conversation; got none"),
        (b" \n", "must hold at least one conversation; got none"),
        (b'{"id": "\xff"}', "must be UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_conversations(path)
    with pytest.raises(FileNotFoundError):
        read_conversations(folder / "none.json")


def test_json_that_python_reads_its_own_way_is_a_bad_record(write):
    bad = ('{"id": "a", "id": "b"}', "[" * 100_000, f'{{"id": {"9" * 5000}}}')
    path = write(record("good", "one"), *bad, name="d.jsonl")
    with pytest.raises(RecordErrors, match="3 of 4 records are bad") as caught:
        read_conversations(path)
    for number, (problem, reason) in enumerate(
        zip(caught.value.problems, ("the key 'id' twice", "nested too", "5000 digits"), strict=True)
    ):
        assert problem.startswith(f"line {number + 2} must be a JSON object: ")
        assert reason in problem and len(problem) < 200


def test_images_are_opened_only_when_asked(write):
    path = write(record("<img>no.png</img>", "b"))
    assert len(read_conversations(path, check_images=False)) == 1


def test_ids_and_labels_are_upstreams(write, folder, tmp_path):
    """User's ids, answer's ids, end of text; nothing in between, and only answers are labelled."""
    tok = tiny_processor(tmp_path).tokenizer
    path = write(record(f"{IMAGE} What? Answer: ", "the image", "<box>(1,2)</box>", "image"))
    (conversation,) = read_conversations(path)
    input_ids, labels = encode_conversation(conversation, tok, 100)
    image = [tok.img_start_id, *b"a.png", *[tok.img_pad_id] * (SPAN - 5), tok.img_end_id]
    upstream = Upstream(SPAN)
    question = upstream.encode(f"{IMAGE} What? Answer: ")
    assert question[: SPAN + 2] == image
    again = upstream.encode("<box>(1,2)</box>")
    assert (again[0], again[-1]) == (tok.box_start_id, tok.box_end_id)
    first, second = upstream.encode("the image"), upstream.encode("image")
    eod = upstream.special["<|endoftext|>"]
    assert input_ids == [*question, *first, eod, *again, *second, eod]
    masked = [IGNORED] * len(question), [IGNORED] * len(again)
    assert labels == [*masked[0], *first, eod, *masked[1], *second, eod]


def test_too_long(write, tmp_path):
    tok = tiny_processor(tmp_path).tokenizer
    path = write(record("xyz " + IMAGE, "A" * 10, "zz", "B" * 10))
    (conversation,) = read_conversations(path)
    whole, labels = encode_conversation(conversation, tok, 1000)
    length, image_end = len(whole), 4 + SPAN + 2
    assert encode_conversation(conversation, tok, length)[0] == whole
    message = f"{length} tokens exceed model_max_length, {length - 1}$"
    with pytest.raises(ValueError, match=message):
        encode_conversation(conversation, tok, length - 1)
    # Cutting is asked for, keeps images whole, and leaves something to learn.
    for limit in (length - 1, image_end + 1):
        cut = encode_conversation(conversation, tok, limit, truncate_text=True)
        assert cut == (whole[:limit], labels[:limit])
    for truncate in (True, False):
        message = f"model_max_length, {image_end - 1}, and the last image ends at token {image_end}"
        with pytest.raises(ValueError, match=message):
            encode_conversation(conversation, tok, image_end - 1, truncate_text=truncate)
    with pytest.raises(ValueError, match="and no answer begins before it"):
        encode_conversation(conversation, tok, image_end, truncate_text=True)


def test_the_data_set_checks_every_length(write, tmp_path):
    tok = tiny_processor(tmp_path).tokenizer
    path = write(record("q", "short"), record("q", "long" * 20), record("q", "longer" * 20))
    dataset = ConversationDataset(read_conversations(path), tok, 40)
    with pytest.raises(RecordErrors) as caught:
        dataset.check(path)
    problems = caught.value.problems
    assert [problem.split(":")[0] for problem in problems] == [
        "record 1 (id 'r0')",
        "record 2 (id 'r0')",
    ]
    assert "tokens exceed model_max_length, 40" in problems[0]
    with pytest.raises(ValueError, match="max_length must be positive; got 0"):
        ConversationDataset([], tok, 0)


def test_batch(write, folder, tmp_path):
    both = tiny_processor(tmp_path)
    tok, processor = both.tokenizer, both.image_processor
    path = write(record(f"{IMAGE}<img>b.png</img>?", "a"), record("no image", "bc"))
    dataset = ConversationDataset(read_conversations(path), tok, 100)
    batch = ConversationCollator(tok.eod_id, processor)([dataset[1], dataset[0]])
    lengths = [len(dataset[1]["input_ids"]), len(dataset[0]["input_ids"])]
    assert batch["input_ids"].shape == (2, lengths[1])
    assert batch["attention_mask"].sum(1).tolist() == lengths
    # Padding is on the right, and nothing but padding is out of the attention's sight.
    assert batch["attention_mask"][0].tolist() == [1] * lengths[0] + [0] * (lengths[1] - lengths[0])
    assert (batch["input_ids"][0, lengths[0] :] == tok.eod_id).all()
    assert (batch["labels"][0, lengths[0] :] == IGNORED).all()
    assert batch["labels"][0, : lengths[0]].tolist() == dataset[1]["labels"]
    # The end of text that ends an answer is learned.
    assert batch["labels"][0, lengths[0] - 1] == tok.eod_id
    images = [Image.open(folder / name) for name in ("a.png", "b.png")]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected) and len(expected) == 2
    assert "pixel_values" not in ConversationCollator(tok.eod_id, processor)([dataset[1]])


def test_an_image_damaged_behind_its_header_names_its_record(write, folder, tmp_path):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[:45])
    path = write(record("q", "a"), record("<img>cut.png</img>", "b"))
    tok = tiny_processor(tmp_path).tokenizer
    dataset = ConversationDataset(read_conversations(path), tok, 100)
    with pytest.raises(ValueError, match=r"record 1 \(id 'r0'\): .*cut.png"):
        ConversationCollator(tok.eod_id, tiny_processor(tmp_path).image_processor)([dataset[1]])
