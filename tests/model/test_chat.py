"""Talks: upstream's prompt, the same reply from ``chat``, ``chat_stream`` and ``generate``."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from monkey_model.chat import prompt_ids
from monkey_model.training.peft_presets import lora_config
from tests.helpers.checkpoint import tiny_processor
from tests.helpers.tiny import SPAN, tiny_model

GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_processor(tmp_path_factory.mktemp("chat")).tokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    Image.new("RGB", (60, 40), "red").save(folder / "r.png")
    Image.new("RGB", (40, 60), "blue").save(folder / "b.png")
    return folder


@pytest.fixture
def model(pictures):
    model = tiny_model()
    model.transformer.image_root = pictures
    return model


def say(model, *ids):
    """Make the model write these ids, whatever it is asked."""
    script = list(ids)

    def scripted(module, args, logits):
        logits[:, -1] = 0
        logits[:, -1, script.pop(0)] = 9

    model.lm_head.register_forward_hook(scripted)


def text_of(tokenizer, query, history=(), system="You are a helpful assistant."):
    """A talk as text, from upstream's description."""
    talk = f"<|im_start|>system\n{system}<|im_end|>"
    for asked, reply in history:
        talk += f"\n<|im_start|>user\n{asked}<|im_end|>\n"
        talk += f"<|im_start|>assistant\n{reply}<|im_end|>" if reply is not None else ""
    return f"{talk}\n<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"


# ---- the prompt ---------------------------------------------------------------------------------


def test_prompt(tokenizer):
    history = [
        ("<img>r.png</img>\nWhat?", "A <ref>square</ref><box>(1,2),(3,4)</box>"),
        ("And?", None),
    ]
    for talk in ([], history[:1]):
        expected = tokenizer.encode(text_of(tokenizer, "the image", talk, "the system"))
        assert prompt_ids(tokenizer, "the image", talk, "the system") == expected
    # Of a query without a reply upstream writes both line ends, and encodes them one by one.
    before, after = text_of(tokenizer, "the image", history, "the system").split("\n\n")
    expected = [id_ for text in (before, "\n", "\n", after) for id_ in tokenizer.encode(text)]
    assert prompt_ids(tokenizer, "the image", history, "the system") == expected


def test_prompt_is_the_chat_templates(tokenizer):
    history = [("the image", "image is"), ("Answer:", "the")]
    messages = [
        {"role": role, "content": text}
        for turn in (*history, ("user", ""))
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ][:-1]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompt_ids(tokenizer, "user", history) == expected


def test_a_message_is_encoded_on_its_own(tokenizer):
    """As upstream: line ends that begin a message do not merge with the one before them."""
    assert "\n\n" in tokenizer.decode([tokenizer.encode("\n\n")[0]])
    ids = prompt_ids(tokenizer, "\nx", [("\ny", "\nz")], "\ns")
    newline = tokenizer.encode("\n")
    for role, text in (("system", "\ns"), ("user", "\ny"), ("assistant", "\nz"), ("user", "\nx")):
        message = [*tokenizer.encode(role), *newline, *tokenizer.encode(text), tokenizer.im_end_id]
        assert any(ids[start : start + len(message)] == message for start in range(len(ids)))


def test_what_is_special_in_a_message(tokenizer):
    """Pictures and grounding in a query and the system's message; ChatML nowhere."""
    text = "<|im_end|><|im_start|><|endoftext|><|extra_0|><ref>a</ref>"
    plain = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
    usual = [prompt_ids(tokenizer, "", [("", "")], "").count(id_) for id_ in plain]
    ids = prompt_ids(tokenizer, text, [(text, text)], text)
    assert [ids.count(id_) for id_ in plain] == usual
    assert ids.count(tokenizer.special_tokens["<|extra_0|>"]) == 0
    assert ids.count(tokenizer.ref_start_id) == ids.count(tokenizer.ref_end_id) == 4

    picture = "<img>r.png</img>"
    ids = prompt_ids(tokenizer, picture, [(picture, picture)], picture)
    assert ids.count(tokenizer.img_start_id) == 3  # not that of the reply
    escaped = tokenizer.escape(picture)
    assert tokenizer.img_start_id not in prompt_ids(tokenizer, escaped, [(escaped, "")])
    # What a model left open ends no talk.
    assert prompt_ids(tokenizer, "x", [("y", "<img>")])


def test_the_window_leaves_out_the_oldest_turns(tokenizer):
    history = [("the image", "one"), ("<img>r.png</img>", "two"), ("three", None)]
    system = len(tokenizer.encode(text_of(tokenizer, "", (), "s").split("\n<|im_start|>user")[0]))
    sizes = [
        len(prompt_ids(tokenizer, "q", history[start:], "s"))
        - len(prompt_ids(tokenizer, "q", history[start + 1 :], "s"))
        for start in range(len(history))
    ]
    assert sizes[1] > SPAN
    for kept in range(len(history) + 1):
        newest = history[len(history) - kept :]
        # A window of exactly what is there is one too small, as upstream.
        window = system + sum(sizes[len(history) - kept :]) + 1
        assert prompt_ids(tokenizer, "q", history, "s", window) == prompt_ids(
            tokenizer, "q", newest, "s"
        )
        if kept:
            fewer = prompt_ids(tokenizer, "q", newest[1:], "s")
            assert prompt_ids(tokenizer, "q", history, "s", window - 1) == fewer


def test_a_picture_that_does_not_fit_hides_older_turns(tokenizer):
    """As upstream: no gap in the history."""
    history = [("the", "image"), ("<img>r.png</img>", "a"), ("user", "b")]
    ids = prompt_ids(tokenizer, "q", history, "s", SPAN)
    assert ids == prompt_ids(tokenizer, "q", history[2:], "s")


@pytest.mark.parametrize(
    "talk, error, message",
    [
        ({"query": None}, TypeError, "query must be a string; got NoneType"),
        ({"system": 3}, TypeError, "system must be a string; got int"),
        (
            {"history": [("a", "b"), ("c",)]},
            TypeError,
            r"history\[1\] must be a pair .*got \('c',\)",
        ),
        ({"history": ["ab"]}, TypeError, r"history\[0\] must be a pair .*got 'ab'"),
        (
            {"history": [(("p",), None)]},
            TypeError,
            r"history\[0\]\[0\] must be a string; got tuple",
        ),
        ({"history": [("a", 1)]}, TypeError, r"history\[0\]\[1\] must be a string; got int"),
        ({"query": "<img>"}, ValueError, "query: text must have an </img> after the <img>"),
        ({"max_window_size": 0}, ValueError, "max_window_size must be positive; got 0"),
        (
            {"stream": True},
            ValueError,
            "stream must not be given, as chat_stream streams; got True",
        ),
        ({"stop_words_ids": [[]]}, ValueError, r"stop_words_ids must hold lists of ids.*got \[\]"),
        ({"stop_words_ids": [["a"]]}, ValueError, r"stop_words_ids must hold.*got \['a'\]"),
        (
            {"generation_config": GenerationConfig.from_dict({"chat_format": "raw"})},
            ValueError,
            "generation_config.chat_format must be 'chatml', .*got 'raw'",
        ),
    ],
    ids=str,
)
def test_errors(model, tokenizer, talk, error, message):
    history = talk.get("history", [])
    before = list(history)
    with pytest.raises(error, match=message):
        model.chat(tokenizer, **{"query": "q", "history": history, **talk})
    assert history == before
    if "stream" not in talk:  # and when it is called, not when it is read
        with pytest.raises(error, match=message):
            model.chat_stream(tokenizer, **{"query": "q", "history": None, **talk})


# ---- the reply ----------------------------------------------------------------------------------


def test_upstreams_demo(model, tokenizer, pictures, tmp_path):
    """Two turns with pictures, and the boxes of the last reply, as upstream's README has it."""
    box = "<ref>it</ref><box>(100,100),(900,900)</box>"
    replies = tokenizer.encode("the image"), tokenizer.encode(box)
    say(model, *replies[0], tokenizer.im_end_id, *replies[1], tokenizer.eod_id)
    query = tokenizer.from_list_format([{"image": "r.png"}, {"text": "What is this?"}])
    response, history = model.chat(tokenizer, query=query, history=None)
    assert response == "the image"
    response, history = model.chat(tokenizer, "Where is it?", history=history)
    assert response == box
    assert history == [(query, "the image"), ("Where is it?", response)]
    image = tokenizer.draw_bbox_on_latest_picture(response, history, image_root=pictures)
    image.save(tmp_path / "1.jpg")
    assert Image.open(tmp_path / "1.jpg").size == (60, 40)


def test_talk_of_several_turns_equals_generate_and_stream(model, tokenizer):
    """Each turn is what ``generate`` says to the whole talk, and what the stream ends with."""
    history = None
    queries = ["<img>r.png</img>What?", "And <img>b.png</img>?", "So?"]
    for number, query in enumerate(queries):
        talk = [] if history is None else list(history)
        ids = torch.tensor([tokenizer.encode(text_of(tokenizer, query))])
        ids = torch.tensor([prompt_ids(tokenizer, query, talk)])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), **GREEDY, use_cache=False,
            eos_token_id=[tokenizer.im_end_id, tokenizer.im_start_id], pad_token_id=0,
        )[0, ids.shape[1] :]  # fmt: skip
        texts = list(model.chat_stream(tokenizer, query, history, **GREEDY))
        reply, history = model.chat(tokenizer, query, history, **GREEDY)
        assert reply and reply == tokenizer.decode(expected).strip()
        assert texts[-1] == reply
        assert len(texts) in (len(expected), len(expected) + 1)
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        assert history == [*talk, (query, reply)]
        assert [asked for asked, _ in history] == queries[: number + 1]


def test_the_history_matters(model, tokenizer):
    alone, _ = model.chat(tokenizer, "So?", None, **GREEDY)
    after, _ = model.chat(tokenizer, "So?", [("<img>r.png</img>", "the")], **GREEDY)
    other, _ = model.chat(tokenizer, "So?", [("<img>b.png</img>", "the")], **GREEDY)
    window, _ = model.chat(
        tokenizer, "So?", [("<img>b.png</img>", "the")], max_window_size=SPAN, **GREEDY
    )
    assert len({alone, after, other}) == 3
    assert window == alone


def test_history_in_place_or_not(model, tokenizer):
    history = []
    reply, same = model.chat(tokenizer, "q", history, **GREEDY)
    assert same is history == [("q", reply)]
    _, same = model.chat(tokenizer, "r", history, append_history=False, **GREEDY)
    assert same is history == [("q", reply)]
    list(model.chat_stream(tokenizer, "r", history, **GREEDY))
    assert history == [("q", reply)]


def test_where_a_reply_ends(model, tokenizer):
    """At the end of the message or of the text; its length cuts nothing that was written."""
    hello = tokenizer.encode("the image")
    another = tokenizer.special_tokens["<|extra_0|>"]
    for end in (tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id, another):
        model = tiny_model()
        model.generation_config.eos_token_id = another
        say(model, *hello, end)
        assert model.chat(tokenizer, "q", None)[0] == "the image"
    model = tiny_model()
    say(model, *hello)
    assert model.chat(tokenizer, "q", None, max_new_tokens=len(hello))[0] == "the image"


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_words(model, tokenizer, streamed):
    """They end the reply and belong to it; the caller's list stays."""
    written = tokenizer.encode("the image user image")
    words = [tokenizer.encode("is"), written[1:-1]]
    before = [list(word) for word in words]
    assert len(words[1]) > 1
    say(model, *written)
    settings = {"stop_words_ids": words, "max_new_tokens": len(written)}
    if streamed:
        reply = list(model.chat_stream(tokenizer, "q", None, **settings))[-1]
    else:
        reply, _ = model.chat(tokenizer, "q", None, **settings)
    assert reply == tokenizer.decode(written[:-1]) and words == before


def test_settings_of_generation(model, tokenizer):
    """Given ones go before the model's own; the model's are left as they were."""
    model.generation_config.update(do_sample=True, max_new_tokens=5, top_k=1)
    before = model.generation_config.to_dict()

    def count(**settings):
        texts = list(
            model.chat_stream(tokenizer, "q", None, logits_processor=[letters_alone], **settings)
        )
        assert (
            texts[-1]
            == model.chat(tokenizer, "q", None, logits_processor=[letters_alone], **settings)[0]
        )
        return len(texts)

    letters = tokenizer.convert_tokens_to_ids(list("abcdefghijklm"))

    def letters_alone(input_ids, scores):
        return torch.full_like(scores, -1e9).index_copy(
            1, torch.tensor(letters), scores[:, letters]
        )

    assert count() == 5
    assert count(max_new_tokens=3) == 3
    assert count(generation_config=GenerationConfig(max_new_tokens=4, do_sample=False)) == 4
    assert model.generation_config.to_dict() == before

    class Twice(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] >= length + 2])

    length = len(prompt_ids(tokenizer, "q"))
    assert count(stopping_criteria=StoppingCriteriaList([Twice()])) == 2


@pytest.mark.parametrize("given, cached", [({}, True), ({"use_cache": False}, False)], ids=str)
def test_replies_are_cached_whatever_the_config_says(model, tokenizer, given, cached):
    model.config.use_cache = model.generation_config.use_cache = False  # as published
    lengths = []
    handle = model.transformer.h[0].register_forward_pre_hook(
        lambda module, args: lengths.append(args[0].shape[1])
    )
    model.chat(tokenizer, "q", None, do_sample=False, min_new_tokens=3, max_new_tokens=3, **given)
    handle.remove()
    assert (lengths[1:] == [1, 1]) == cached


def test_512_tokens_where_no_one_says_how_many(model, tokenizer):
    seen = []
    model.generate = lambda **inputs: seen.append(inputs) or inputs["input_ids"]
    model.chat(tokenizer, "q", None)
    model.chat(tokenizer, "q", None, max_length=100)
    assert [inputs["generation_config"].max_new_tokens for inputs in seen] == [512, None]


def test_image_root_holds(model, tokenizer, tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    for ask in (model.chat, lambda *args: list(model.chat_stream(*args))):
        with pytest.raises(ValueError, match="path must be a relative one inside image_root"):
            ask(tokenizer, "<img>../x.png</img>", None)
        with pytest.raises(ValueError, match="allow_urls is False"):
            ask(tokenizer, "<img>http://a/b</img>", None)


def test_with_lora(model, tokenizer):
    import peft

    expected = model.chat(tokenizer, "q", None, **GREEDY)
    wrapped = peft.get_peft_model(model, lora_config(model)).eval()
    assert wrapped.chat(tokenizer, "q", None, **GREEDY) == expected


# ---- the stream ---------------------------------------------------------------------------------


def test_a_character_of_several_tokens_comes_whole(tokenizer):
    model = tiny_model()
    bytes_ = tokenizer.encode("\U0001f412")
    assert len(bytes_) == 4
    say(model, *tokenizer.encode("a"), *bytes_, *tokenizer.encode("b"))
    texts = list(model.chat_stream(tokenizer, "q", None, max_new_tokens=6))
    assert texts == ["a", "a", "a", "a", "a\U0001f412", "a\U0001f412b"]
    # One that stays broken is in the reply, as in chat's.
    model = tiny_model()
    say(model, *tokenizer.encode("a"), *bytes_[:2])
    assert list(model.chat_stream(tokenizer, "q", None, max_new_tokens=3))[-1] == "a\ufffd"


def test_an_empty_reply_is_a_text(tokenizer):
    model = tiny_model()
    say(model, tokenizer.im_end_id)
    assert list(model.chat_stream(tokenizer, "q", None)) == [""]


def test_errors_of_generation_come_out_of_the_stream(model, tokenizer):
    before = threading.active_count()
    stream = model.chat_stream(tokenizer, "<img>none.png</img>", None)
    with pytest.raises(ValueError, match="No such file"):
        next(stream)
    with pytest.raises(ValueError, match="num_return_sequences must be 1 for a stream; got 2"):
        list(model.chat_stream(tokenizer, "q", None, do_sample=True, num_return_sequences=2))
    with pytest.raises(ValueError, match="beam"):
        list(model.chat_stream(tokenizer, "q", None, num_beams=2))
    assert threading.active_count() == before


def test_a_closed_stream_stops_the_model(model, tokenizer):
    before = threading.active_count()
    calls = []
    handle = model.lm_head.register_forward_pre_hook(lambda *args: calls.append(1))
    stream = model.chat_stream(
        tokenizer, "q", None, do_sample=False, min_new_tokens=100_000, max_new_tokens=100_000
    )
    assert calls == []  # nothing runs before it is asked for
    next(stream)
    stream.close()
    assert threading.active_count() == before
    stopped = len(calls)
    handle.remove()
    assert 0 < stopped < 100_000
