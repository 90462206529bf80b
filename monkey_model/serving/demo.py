"""``monkey demo``: a page with a picture, a talk about it, boxes, and the crops that are seen.

The page trusts no visitor. A picture is decoded by :mod:`monkey_model.inputs`, not by gradio;
what a visitor writes opens no file; what the model writes is shown as plain text. A visitor's talk
is kept here, not in the page, and one event at a time reaches the model.
"""

from __future__ import annotations

import html
import os
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from monkey_model.chat import prompt_ids, window_size
from monkey_model.inputs.boxes import draw_boxes
from monkey_model.inputs.fetch import SCHEME, shown
from monkey_model.inputs.images import load_image
from monkey_model.inputs.prompts import GROUNDING
from monkey_model.serving.answer import Answerer, Question
from monkey_model.serving.crop_pictures import draw_crops

if TYPE_CHECKING:
    import gradio

#: What upstream's demo asks for a caption.
CAPTION = "Generate the detailed caption in English:"
#: Largest upload, in bytes.
MAX_UPLOAD = 32 * 2**20
MAX_LETTERS = 4000  # of a question: more than any window has room for beside a picture

SAMPLES = Path(__file__).parents[1] / "samples"

_SHOWN = 1280  # longest side of the picture on the page, in pixels
_EMPTY = "(The model wrote nothing.)"

_CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
#talk [aria-label="Share"] { display: none; } /* it would upload to a hub */
#note { border-left: 3px solid var(--color-accent); padding-left: 12px; }
"""


class Turn(NamedTuple):
    """What a visitor wrote, as a query for the model, its reply, and a file with boxes drawn."""

    text: str
    query: str
    reply: str
    boxed: Path | None = None


@dataclass(frozen=True)
class Talk:
    """What one visitor has: a picture, and what was said about it.

    Attributes:
        picture: at most 1280 pixels a side, for the page.
        crops: the model's view, [1, crops_per_image, 3, crop_size, crop_size].
        turns: the first query holds the picture's span.
    """

    picture: Image.Image | None = None
    crops: torch.Tensor | None = None
    turns: tuple[Turn, ...] = ()


class Demo:
    """What happens behind the page, without the page.

    Args:
        answerer: the model.
        folder: for pictures of boxes.
    """

    def __init__(self, answerer: Answerer, folder: str | os.PathLike[str]) -> None:
        self.answerer = answerer
        self.folder = Path(folder)
        visual = answerer.model.transformer.visual
        self.grid, self.adapters = visual.crop_settings.grid, visual.adapter_index()
        # gradio's queue has one place for the model, but lets go of a reply that was stopped before
        # its thread has ended.
        self.one_at_a_time = threading.Lock()

    def begin(self, path: str | os.PathLike[str]) -> Talk:
        """A talk about the picture in a file.

        Raises:
            OSError, ValueError: it cannot be read.
        """
        # Its bytes, since errors call a file by its path.
        pixels = load_image(Path(path).read_bytes())
        picture = Image.fromarray(pixels.numpy())
        picture.thumbnail((_SHOWN, _SHOWN))
        (crops,) = self.answerer.read_images(Question("", (pixels,)))
        return Talk(picture, crops)

    def draw_crops(self, talk: Talk) -> Image.Image:
        """What the model sees of a talk's picture."""
        assert talk.crops is not None
        return draw_crops(talk.crops[0], self.grid, self.adapters)

    def reply(
        self, talk: Talk, text: str, kind: str, warn: Callable[[str], None] = lambda message: None
    ) -> Iterator[Talk]:
        """The talk with one more turn, as the reply grows; at the end with its boxes drawn.

        Args:
            talk: with a picture.
            text: what the visitor wrote.
            kind: ``"talk"``: the next turn, in ChatML; ``"question"`` and ``"caption"``: upstream's
                prompts for one question, which the model reads alone.
            warn: called with what is wrong with the boxes that the model wrote.

        Raises:
            RuntimeError: memory, or a backend.
            ValueError: no picture, no text or too much of it, or a talk that is too long.
        """
        if talk.picture is None or talk.crops is None:
            raise ValueError("Choose a picture first.")
        text = text.strip()
        if not text:
            raise ValueError("Write a question first.")
        if len(text) > MAX_LETTERS:
            raise ValueError(f"A question may have at most {MAX_LETTERS} letters; got {len(text)}.")
        tokenizer = self.answerer.processor.tokenizer
        plain = tokenizer.escape(text, keep=GROUNDING)
        picture = [] if talk.turns else [{"image": ""}]
        query = tokenizer.from_list_format([*picture, {"text": plain}])
        with self.one_at_a_time:
            reply = ""
            for reply in self._texts(talk, talk.crops, query, plain, kind):
                yield replace(talk, turns=(*talk.turns, Turn(text, query, reply)))
        try:
            boxes = tokenizer._fetch_all_box_with_ref(reply)
        except ValueError as error:
            return warn(str(error))
        if boxes:
            boxed = self.folder / f"{uuid.uuid4().hex}.webp"
            draw_boxes(talk.picture, boxes).save(boxed)
            yield replace(talk, turns=(*talk.turns, Turn(text, query, reply, boxed)))

    def _texts(
        self, talk: Talk, crops: torch.Tensor, query: str, plain: str, kind: str
    ) -> Iterator[str]:
        answerer = self.answerer
        if kind != "talk":
            prompt = f"<img></img> {plain} " + ("Answer: " if kind == "question" else "")
            return answerer.stream(prompt, [crops], tags=True)
        tokenizer = answerer.processor.tokenizer
        history = [(turn.query, turn.reply) for turn in talk.turns]
        window = window_size(answerer.model.generation_config)
        ids = prompt_ids(tokenizer, query, history, max_window_size=window)
        if tokenizer.img_start_id not in ids:
            raise ValueError(
                f"This talk has outgrown the model's window of {window} tokens, and its picture "
                "with it: begin a new one."
            )
        return answerer.model.chat_stream(
            tokenizer,
            query,
            history,
            max_window_size=window,
            pixel_values=crops.to(answerer.model.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=answerer.max_new_tokens,
        )


def build_page(demo: Demo, note: str) -> gradio.Blocks:
    """The page, as gradio's blocks.

    Args:
        demo: what happens behind it.
        note: Markdown below the title: which model this is.
    """
    import gradio as gr

    def message(error: object) -> str:
        return html.escape(shown(str(error)), quote=False)  # gradio reads it as HTML

    def failed(error: object) -> gr.Error:
        return gr.Error(message(error), print_exception=False)

    def warn(problem: str) -> None:
        gr.Warning(message(f"The boxes cannot be drawn: {problem}"))

    def messages(talk: Talk) -> list[dict[str, Any]]:
        """What the talk's window shows; a model's words are text there, though it takes HTML."""
        said: list[dict[str, Any]] = []
        for turn in talk.turns:
            texts = ("user", turn.text), ("assistant", turn.reply or _EMPTY)
            for role, text in texts:
                content: Any = {"type": "text", "text": html.escape(text, quote=False)}
                said.append({"role": role, "content": content})
            if turn.boxed is not None:
                content = gr.Image(str(turn.boxed), show_label=False, buttons=["fullscreen"])
                said.append({"role": "assistant", "content": content})
        return said

    def begin(path: str | os.PathLike[str]) -> tuple[Any, ...]:
        try:
            talk = demo.begin(path)
        except (OSError, TypeError, ValueError) as error:
            raise failed(f"{Path(path).name}: {error}") from None
        return talk, talk.picture, demo.draw_crops(talk), gr.Accordion(visible=True), []

    def example(number: int) -> tuple[Any, ...]:
        return begin(samples[number])

    def turn(talk: Talk, text: str, kind: str) -> Iterator[tuple[Any, ...]]:
        try:
            for grown in demo.reply(talk, text, kind, warn):
                yield grown, messages(grown), ""
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            yield talk, messages(talk), text
            raise failed(error) from None

    def chat(talk: Talk, text: str) -> Iterator[tuple[Any, ...]]:
        yield from turn(talk, text, "talk")

    def question(talk: Talk, text: str) -> Iterator[tuple[Any, ...]]:
        yield from turn(talk, text, "question")

    def caption(talk: Talk) -> Iterator[tuple[Any, ...]]:
        for grown, said, _ in turn(talk, CAPTION, "caption"):
            yield grown, said

    def clear(talk: Talk) -> tuple[Any, ...]:
        return replace(talk, turns=()), []

    samples = sorted(map(str, SAMPLES.iterdir()))
    # Hourly, what is older than a day.
    with gr.Blocks(title="Monkey", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        talk = gr.State(Talk())
        gr.Markdown("# Monkey")
        gr.Markdown(note, elem_id="note")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                picture = gr.Image(label="Picture", interactive=False, buttons=["fullscreen"])
                upload = gr.File(
                    label="Another picture", file_types=["image"], height=150, type="filepath"
                )
                examples = gr.Dataset(
                    label="Examples",
                    components=[gr.Image(visible=False)],
                    samples=[[sample] for sample in samples],
                    type="index",
                )
            with gr.Column(scale=3, min_width=300):
                chatbot = gr.Chatbot(
                    label="Talk",
                    elem_id="talk",
                    height=480,
                    placeholder="Choose a picture, then ask about it.",
                    buttons=["copy"],
                    render_markdown=False,
                    group_consecutive_messages=False,
                    feedback_options=None,
                )
                box = gr.Textbox(
                    show_label=False,
                    placeholder="Write to the model about the picture",
                    max_length=MAX_LETTERS,
                    submit_btn=True,
                    lines=1,
                )
                with gr.Row():
                    ask = gr.Button("Question", size="sm", min_width=80)
                    describe = gr.Button("Caption", size="sm", min_width=80)
                    stop = gr.Button("Stop", size="sm", min_width=80)
                gr.Markdown(
                    "Enter sends the next turn of a talk, in ChatML. *Question* and *Caption* send "
                    f"upstream's prompts, `... Answer:` and `{CAPTION}`, which the published "
                    "checkpoints were trained on; the model reads them without the turns before."
                )
        with gr.Accordion("What the model sees", visible=False) as seen:
            crops = gr.Image(show_label=False, interactive=False, buttons=["fullscreen"])

        one: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        said = [talk, chatbot, box]
        running: Any = [
            box.submit(chat, [talk, box], said, api_name="chat", **one),
            ask.click(question, [talk, box], said, api_name="question", **one),
            describe.click(caption, [talk], [talk, chatbot], api_name="caption", **one),
        ]
        begun = [talk, picture, crops, seen, chatbot]
        # Before what else they do, which would wait for the reply of the talk that they end.
        for ends in (upload.upload, examples.click, chatbot.clear, stop.click):
            ends(None, cancels=running, api_visibility="private")
        upload.upload(begin, [upload], begun, api_name="picture", **one).then(
            lambda: None, None, [upload], api_visibility="private"
        )
        examples.click(example, [examples], begun, api_name="example", **one)
        chatbot.clear(clear, [talk], [talk, chatbot], api_name="clear", **one)
    for block in page.blocks.values():
        _fetch_nothing(block)
    return page


def _fetch_nothing(block: Any) -> None:
    """Refuse a web address in place of an upload, which gradio would fetch."""
    move = block.async_move_resource_to_block_cache

    async def refuse(path: Any) -> Any:
        if SCHEME.match(str(path)):
            import gradio as gr

            raise gr.Error("Upload the picture: nothing is fetched.", print_exception=False)
        return await move(path)

    block.async_move_resource_to_block_cache = refuse


@contextmanager
def serving(answerer: Answerer, note: str, host: str, port: int) -> Iterator[str]:
    """The page's address, while it is served. What was uploaded goes when it ends.

    Args:
        answerer, note: of the page.
        host, port: where it listens.

    Raises:
        OSError: the port is in use.
    """
    with tempfile.TemporaryDirectory(prefix="monkey-demo-") as folder:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = folder  # read when a component is made, and later
        page = build_page(Demo(answerer, folder), note)
        try:
            _, address, _ = page.queue(max_size=64).launch(
                server_name=f"[{host}]" if ":" in host else host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=MAX_UPLOAD,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                css=_CSS,
            )
            yield address
        finally:
            page.close(verbose=False)
            del os.environ["GRADIO_TEMP_DIR"]
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
