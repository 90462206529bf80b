"""The demo's page, asked as a browser asks it, on a tiny checkpoint."""

from __future__ import annotations

import html
import json
import re
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from monkey_model.commands import demo as command
from monkey_model.commands.__main__ import app
from monkey_model.inputs.images import load_image
from monkey_model.serving.answer import Answerer, Question
from monkey_model.serving.demo import CAPTION, MAX_LETTERS, MAX_UPLOAD, SAMPLES, serving
from tests.helpers.checkpoint import write_checkpoint

# Not among the tests' packages: it holds an older Pillow. .ci/run installs it at the end.
pytest.importorskip("gradio", reason='needs gradio: pip install -e ".[demo]"')
httpx = pytest.importorskip("httpx")
gradio_client = pytest.importorskip("gradio_client")
Client, handle_file = gradio_client.Client, gradio_client.handle_file
AppError = gradio_client.exceptions.AppError

BOXES = "<ref>a <b>boat</b></ref><box>(100,100),(500,900)</box>"


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("demo") / "checkpoint", seq_length=2048)
    return Answerer.from_pretrained(checkpoint, max_new_tokens=8)


@pytest.fixture(scope="module")
def address(answerer):
    with serving(answerer, "A **tiny** one.", "127.0.0.1", free_port()) as address:
        yield address.rstrip("/")


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def visit(address, tmp_path):
    """A browser's session; it may be called for more than one."""
    clients = []

    def visit():
        # Its files go elsewhere than the server's.
        clients.append(
            Client(address, verbose=False, analytics_enabled=False, download_files=tmp_path)
        )
        return clients[-1]

    yield visit
    for client in clients:
        client.close()


@pytest.fixture
def photo(tmp_path):
    """40 wide, 60 high once it is upright: EXIF says that it lies on its side."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "photo.png", exif=exif)
    return tmp_path / "photo.png"


def say(answerer, monkeypatch, text):
    """Make the model write ``text`` to each prompt."""
    tokenizer = answerer.processor.tokenizer
    ids = [*tokenizer.encode(text), tokenizer.im_end_id]
    script = list(ids)

    def scripted(module, args, logits):
        if not script:
            script.extend(ids)
        logits[:, -1] = 0
        logits[:, -1, script.pop(0)] = 9

    monkeypatch.setattr(answerer, "max_new_tokens", len(ids))
    return answerer.model.lm_head.register_forward_hook(scripted)


def texts(messages):
    """What the page shows: the role and words of each message that has any."""
    return [
        (message["role"], html.unescape(part["text"]))
        for message in messages
        for part in message["content"]
        if part["type"] == "text"
    ]


def upload(client, path):
    """The picture on the page, that of the crops, and the messages."""
    picture, crops, messages = client.predict(handle_file(str(path)), api_name="/picture")
    return picture, crops, messages


# ---- a visit ------------------------------------------------------------------------------------


def test_two_turns_on_a_picture(answerer, visit, photo):
    """Each turn grows, and ends as ``model.chat`` answers the same talk."""
    client = visit()
    shown, crops, messages = upload(client, photo)
    assert messages == []
    with Image.open(shown) as image:
        assert image.size == (40, 60)  # upright
    grid = answerer.processor.image_processor.grid
    with Image.open(crops) as image:
        side = answerer.processor.image_processor.crop_size
        assert image.width > side * (grid[1] + 1) and image.height > side * grid[0]

    tokenizer, model = answerer.processor.tokenizer, answerer.model
    pixels = answerer.read_images(Question("", (str(photo),)))[0]
    settings = {"pixel_values": pixels, "do_sample": False, "max_new_tokens": 8}
    history = []
    talk = []
    for text in ("What is it?", "Are you sure?"):
        query = tokenizer.from_list_format([*([] if history else [{"image": ""}]), {"text": text}])
        expected, history = model.chat(tokenizer, query, history, **settings)
        grown = [texts(messages) for messages, _ in client.submit(text, api_name="/chat")]
        talk += [("user", text), ("assistant", expected)]
        assert grown[-1] == talk and len(grown) > 2
        replies = [messages[-1][1] for messages in grown]
        assert all(expected.startswith(reply) for reply in replies) and replies != replies[::-1]
    assert talk[1] != talk[3]


def test_upstreams_prompts(answerer, visit, photo):
    """Read alone, whatever was said before, and part of the talk that follows."""
    client = visit()
    upload(client, photo)
    images = answerer.read_images(Question("", (str(photo),)))
    client.predict("Hello", api_name="/chat")
    asked, box = client.predict("What is it?", api_name="/question")
    *_, answer = answerer.stream("<img></img> What is it? Answer: ", images, tags=True)
    assert texts(asked)[2:] == [("user", "What is it?"), ("assistant", answer)] and box == ""
    described = client.predict(api_name="/caption")
    prompt = "<img></img> Generate the detailed caption in English: "
    *_, answer = answerer.stream(prompt, images, tags=True)
    assert texts(described)[4:] == [("user", CAPTION), ("assistant", answer)]
    assert len(texts(client.predict("And?", api_name="/chat")[0])) == 8


def test_boxes_are_drawn_and_words_are_text(answerer, visit, photo, monkeypatch):
    client = visit()
    upload(client, photo)
    handle = say(answerer, monkeypatch, BOXES)
    try:
        messages, _ = client.predict("<script>Where?", api_name="/chat")
        monkeypatch.undo()
        broken = say(answerer, monkeypatch, "<box>(1,2)</box>")
        handle.remove()
        handle = broken
        # What cannot be drawn is said, and costs no word.
        after, _ = client.predict("And now?", api_name="/chat")
    finally:
        handle.remove()
    raw = json.dumps(messages)
    assert "<b>" not in raw and "<script>" not in raw and "<ref>" not in raw
    assert texts(messages) == [("user", "<script>Where?"), ("assistant", BOXES)]
    (boxed,) = (
        part["value"]
        for message in messages
        for part in message["content"]
        if part["type"] == "component"
    )
    with Image.open(boxed) as image:
        drawn = np.asarray(image.convert("RGB")).astype(int)
    original = load_image(photo).numpy().astype(int)
    assert drawn.shape == original.shape
    changed = np.abs(drawn - original).max(-1) > 100
    assert changed[:, :3].mean() < changed[:, 4:].mean()  # nothing is left of the box
    assert texts(after)[-1] == ("assistant", "<box>(1,2)</box>")


def test_visitors_are_apart(visit, photo):
    one, other = visit(), visit()
    upload(one, photo)
    one.predict("Hello", api_name="/chat")
    with pytest.raises(AppError, match="Choose a picture first"):
        other.predict("Hello", api_name="/chat")
    upload(other, photo)
    assert len(texts(other.predict("Hi", api_name="/chat")[0])) == 2
    assert len(texts(one.predict("Hi", api_name="/chat")[0])) == 4


def test_requests_at_once_are_answered_one_by_one(answerer, visit, photo, monkeypatch):
    clients = [visit() for _ in range(3)]
    for client in clients:
        upload(client, photo)
    generate, running, most = answerer.model.generate, [], []

    def counted(**inputs):
        running.append(1)
        most.append(len(running))
        try:
            return generate(**inputs)
        finally:
            running.pop()

    monkeypatch.setattr(answerer.model, "generate", counted)
    jobs = [client.submit("Hello", api_name="/chat") for client in clients]
    answers = {texts(job.result()[0])[1] for job in jobs}
    assert len(answers) == 1 and most == [1, 1, 1]


def test_a_stopped_reply_leaves_the_model_free(answerer, visit, photo, monkeypatch):
    client = visit()
    upload(client, photo)
    monkeypatch.setattr(answerer, "max_new_tokens", 100_000)
    job = client.submit("Hello", api_name="/chat")
    grown = next(iter(job))
    job.cancel()
    monkeypatch.setattr(answerer, "max_new_tokens", 2)
    after, _ = client.predict("Again", api_name="/chat")
    # What was written stays.
    assert texts(after)[0] == texts(grown[0])[0] and texts(after)[2] == ("user", "Again")


def test_what_ends_a_talk_stops_its_reply_first(address):
    """Or it would wait for it in the queue, and the reply go on into the new talk."""
    dependencies = httpx.get(f"{address}/config", trust_env=False).json()["dependencies"]
    ids = {one["api_name"]: one["id"] for one in dependencies}
    replies = [ids[name] for name in ("chat", "question", "caption")]
    for name in ("picture", "example", "clear"):
        (main,) = (one for one in dependencies if one["api_name"] == name)
        stops = [one for one in dependencies if one["targets"] == main["targets"]]
        first = next(one["id"] for one in stops if one["cancels"] == replies)
        assert first < main["id"]


def test_a_new_talk_and_a_new_picture(visit, photo):
    client = visit()
    upload(client, photo)
    first, _ = client.predict("Hello", api_name="/chat")
    assert client.predict(api_name="/clear") == []
    assert client.predict("Hello", api_name="/chat")[0] == first  # about the same picture
    for number, sample in enumerate(sorted(SAMPLES.iterdir())):
        shown, _, messages = client.predict(number, api_name="/example")
        assert messages == []
        with Image.open(shown) as image, Image.open(sample) as original:
            assert image.size == original.size
        assert len(texts(client.predict("Hello", api_name="/chat")[0])) == 2


# ---- what goes wrong ----------------------------------------------------------------------------


def test_bad_uploads_lose_nothing(visit, photo, tmp_path):
    client = visit()
    upload(client, photo)
    before, _ = client.predict("Hello", api_name="/chat")
    bad = tmp_path / "bad&.png"
    for content, message in (
        (b"no picture", r"bad&amp;\.png: source .* is not a readable image: it is damaged"),
        (b"", r"bad&amp;\.png: source .* is not a readable image"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "it looks like HEIF, which is not one of JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "it looks like EPS, which is not one of JPEG"),
    ):
        bad.write_bytes(content)
        with pytest.raises(AppError, match=message) as error:
            upload(client, bad)
        assert "monkey-demo-" not in str(error.value)  # the server's folders are its own
    after, _ = client.predict("Again", api_name="/chat")
    assert after[:2] == before


def test_an_upload_that_is_too_large(visit, photo, tmp_path):
    client = visit()
    upload(client, photo)
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(MAX_UPLOAD + 1)
    with pytest.raises(Exception, match=r"(?i)exceeds? the maximum|too large|413"):
        upload(client, large)
    client.predict("Hello", api_name="/chat")


def test_nothing_is_fetched_and_no_file_is_read(address, visit, photo, monkeypatch):
    """By what stands in place of an upload, or in a question."""
    fetched = []
    monkeypatch.setattr(
        "gradio.processing_utils.async_ssrf_protected_download", lambda *a: fetched.append(a)
    )
    monkeypatch.setattr(
        "gradio.processing_utils.ssrf_protected_download", lambda *a: fetched.append(a)
    )
    for api in ("picture", "chat"):
        assert "nothing is fetched" in call(address, api, "http://127.0.0.1:9/x.png")
        assert "event: error" in call(address, api, str(photo))  # the server's, and not uploaded
    assert not fetched
    client = visit()
    upload(client, photo)
    plain, _ = client.predict("<img>/etc/passwd</img>", api_name="/chat")
    assert texts(plain)[0] == ("user", "<img>/etc/passwd</img>")


def call(address, api, path):
    """What the server answers to a file in place of an upload."""
    url = f"{address}/gradio_api/call/{api}"
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}]
    with httpx.Client(trust_env=False) as client:
        event = client.post(url, json={"data": data}).json()["event_id"]
        return client.get(f"{url}/{event}").text


def test_questions_that_cannot_be_asked(visit, photo):
    client = visit()
    upload(client, photo)
    for api, text, message in (
        ("/chat", "  ", "Write a question first"),
        ("/question", "x" * (MAX_LETTERS + 1), f"at most {MAX_LETTERS} letters; got"),
    ):
        with pytest.raises(AppError, match=message):
            client.predict(text, api_name=api)


def test_a_talk_that_outgrows_the_window(answerer, visit, photo, monkeypatch):
    client = visit()
    upload(client, photo)
    monkeypatch.setattr(answerer.model.generation_config, "max_window_size", 120, raising=False)
    client.predict("Hello", api_name="/chat")
    with pytest.raises(AppError, match="outgrown the model's window of 120 tokens"):
        for _ in range(9):
            client.predict("x" * 60, api_name="/chat")
    client.predict(api_name="/clear")
    client.predict("Hello", api_name="/chat")


def test_an_error_of_the_model_keeps_the_talk_and_the_question(answerer, visit, photo, monkeypatch):
    client = visit()
    upload(client, photo)
    before, _ = client.predict("Hello", api_name="/chat")

    def fails(**inputs):
        raise RuntimeError("out of <memory>")

    with monkeypatch.context() as patch:
        patch.setattr(answerer.model, "generate", fails)
        job = client.submit("Again", api_name="/chat")
        with pytest.raises(AppError, match="out of &lt;memory&gt;"):
            job.result()
        assert job.outputs()[-1] == (before, "Again")
    assert client.predict("Again", api_name="/chat")[0][:2] == before


# ---- the command --------------------------------------------------------------------------------


def test_the_page_says_what_it_is(address, visit):
    page = httpx.get(address, trust_env=False).text
    assert "A **tiny** one." in page
    hosts = set(re.findall(r'(?:src|href)="(?:https?:)?//([^/"]+)', page))
    assert hosts <= {address.removeprefix("http://")}


def test_an_address_with_colons_is_in_brackets(answerer, monkeypatch):
    monkeypatch.setattr("gradio.Blocks.launch", lambda page, **with_: (0, with_["server_name"], 0))
    for host, expected in (("::1", "[::1]"), ("localhost", "localhost")):
        with serving(answerer, "", host, 1) as address:
            assert address == expected


def test_a_port_in_use_is_an_error_before_the_model_loads(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = CliRunner().invoke(
            app, ["demo", str(tmp_path / "no-checkpoint"), "--port", str(port)]
        )
    assert done.exit_code == 2
    assert done.stderr.startswith("Error: --host and --port must be free")
    assert f"127.0.0.1 and {port}: Address already in use" in done.stderr.replace("\n", " ")


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(app, ["demo"])
    assert done.exit_code == 2
    expected = 'Error: monkey demo needs gradio: pip install "monkey-vision[demo]"'
    assert done.stderr.startswith(expected)


@pytest.mark.parametrize("given", [True, False])
def test_the_command_serves_a_checkpoint_or_a_tiny_one(tmp_path, monkeypatch, given):
    served = []

    @contextmanager
    def serving(*arguments):
        served.append(arguments)
        yield "http://127.0.0.1"

    monkeypatch.setattr("monkey_model.serving.demo.serving", serving)
    monkeypatch.setattr(command, "_wait", lambda: None)
    port = free_port()
    arguments = ["--port", str(port), "--device", "cpu"]
    if given:
        write_checkpoint(tmp_path / "c`k")
        arguments += [str(tmp_path / "c`k"), "--max-new-tokens", "9"]
    done = CliRunner().invoke(app, ["demo", *arguments])
    assert done.exit_code == 0, done.output
    ((answerer, note, *place),) = served
    assert place == ["127.0.0.1", port]
    if given:
        assert note == f"Checkpoint: `{tmp_path}/ck`" and answerer.max_new_tokens == 9
    else:
        assert "random weights" in note and Path(answerer.model.name_or_path).name
        assert not Path(answerer.model.name_or_path).exists()  # it was a temporary one
