"""The page in the browser. A `Demo` describes the fields of a page; `Page` builds it and handles its events.

The page needs two things of a model: `tokenizer`, and `stream_generate` as `MetaModel` has it. It is built with
Gradio, downloads nothing and sends no usage reports.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accessory.data.image_tokens import without_tag
from accessory.data.images import open_image
from accessory.errors import AccessoryError, MissingExtraError
from accessory.server.page_sampling import sampling_fields, sampling_of
from accessory.server.page_text import plain, without_html
from accessory.server.uploads import LARGEST, Uploads

if TYPE_CHECKING:
    import gradio as gr  # at run time, import_gradio imports it

log = logging.getLogger(__name__)

Message = dict[str, str]  # keys: role, content; the first one may have image, a path
Upload = dict[str, Any]  # Gradio's description of a file; has the key path
AT_ONCE = 32  # answers; Gradio has a thread for each, and 8 more for all the rest
SHOW_EVERY = 0.05  # seconds; drawing the page for every token would slow a fast model down
SYSTEM_FONT = ("system-ui", "sans-serif")
MONO_FONT = ("ui-monospace", "monospace")
# Gradio's own greys have too little contrast on white.
READABLE = {
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_300",
    "block_info_text_color": "*body_text_color_subdued",
    "block_label_text_color": "*neutral_600",
    "block_title_text_color": "*neutral_700",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
}
CSS = """
footer { display: none !important; }
.about p, .status p { margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
.status { min-height: 1.5em; }
#output [data-testid=user] img { max-height: 160px; width: auto; }
#output .message-buttons { display: none; }  /* of images: one would send them to Gradio's forum */
"""


@dataclass(frozen=True)
class Ask:
    """The prompt and the stop strings for the model. `tidy` turns its text into the answer shown."""

    prompt: str | list[int]
    stops: Sequence[str] = ()
    tidy: Callable[[str], str] = str


@dataclass(frozen=True)
class Demo:
    """Describes one of the pages.

    chat: the page shows a dialogue, whose rounds can be undone; otherwise each question is independent.
    images: a question may be about an image; a dialogue has its image from the beginning.
    below, settings: take the tokenizer and make the fields below the question and among the settings.
    ask: takes the tokenizer, the messages (the last one is the question) and the values of those fields, in that order.
    """

    title: str
    about: str
    chat: bool
    settings: Callable[[Any], list[Any]]
    ask: Callable[..., Ask]
    below: Callable[[Any], list[Any]] = lambda tokenizer: []
    images: bool = False


def import_gradio() -> Any:
    """Import Gradio with its usage reports switched off. MissingExtraError where it is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError("the pages need Gradio: pip install 'mixtral-accessory[demo]'") from error
    globals()["gr"] = gradio  # Gradio evaluates the annotations of its callbacks, to find those that take the request
    return gradio


class Page:
    """The built page (`blocks`) and its current answers.

    The model writes the answers of `AT_ONCE` visitors at once; others wait in a queue. An answer ends early when its
    visitor presses Stop or leaves.
    """

    def __init__(self, demo: Demo, model: Any, about_model: str, max_seq_len: int) -> None:
        self.gr = import_gradio()
        self.demo, self.model, self.max_seq_len = demo, model, max_seq_len
        self._stops: dict[str, threading.Event] = {}  # one for each visitor who waits for an answer
        self._uploads = Uploads()
        self.blocks = self._build(about_model)

    def launch(self, host: str, port: int, share: bool) -> tuple[str, str | None]:
        """Serve in threads. Returns the address, and the public one or None. OSError when the port is in use."""
        _, url, public = self.blocks.launch(
            server_name=host, server_port=port, share=share, quiet=True, prevent_thread_lock=True, **self._style()
        )
        return url, public

    def application(self) -> Any:
        """The page as an ASGI application for a server that somebody else runs. It needs the server's lifespan."""
        from fastapi import FastAPI

        return self.gr.mount_gradio_app(FastAPI(openapi_url=None), self.blocks, "/", **self._style())

    def _style(self) -> dict[str, Any]:
        theme = self.gr.themes.Default(font=SYSTEM_FONT, font_mono=MONO_FONT).set(**READABLE)
        return {
            "theme": theme, "css": CSS, "show_error": True, "ssr_mode": False, "run_history": False,
            "footer_links": [], "pwa": False, "max_file_size": LARGEST,
        }  # fmt: skip

    def close(self) -> None:
        for stop in list(self._stops.values()):
            stop.set()
        if (server := getattr(self.blocks, "server", None)) is not None:
            server.force_exit = True  # does not wait for browsers to close their connections …
            logging.getLogger("uvicorn.error").disabled = True  # … and prints no traceback about that
        self.blocks.close(verbose=False)
        self._uploads.close()

    # ------------------------------------------------------------------ what is on the page

    def _build(self, about_model: str) -> gr.Blocks:
        gr, demo = self.gr, self.demo
        with gr.Blocks(title=demo.title, analytics_enabled=False, fill_height=demo.chat, fill_width=True) as blocks:
            self.history = gr.State([])
            gr.Markdown(f"# {demo.title}\n{demo.about}")
            gr.Markdown(about_model, elem_id="model", elem_classes="about")
            with gr.Row():
                with gr.Column(scale=3, min_width=320):
                    if demo.chat:
                        # No copy buttons: they would copy the output of `without_html` instead of the text.
                        self.output = gr.Chatbot(
                            label="Dialogue", elem_id="output", height="55vh", feedback_options=None, buttons=[]
                        )
                    self.question = gr.Textbox(
                        label="Message" if demo.chat else "Question", elem_id="question", lines=1, max_lines=10,
                        placeholder="Enter sends, Shift+Enter begins a new line", autofocus=True,
                    )  # fmt: skip
                    own = demo.below(self.model.tokenizer)
                    with gr.Row():
                        self.send = gr.Button("Send", variant="primary", elem_id="send", min_width=60)
                        self.stop = gr.Button("Stop", interactive=False, elem_id="stop", min_width=60)
                        self.undo = gr.Button("Undo", visible=demo.chat, elem_id="undo", min_width=60)
                        self.clear = gr.Button("Clear", elem_id="clear", min_width=60)
                    if not demo.chat:
                        self.output = gr.Textbox(
                            label="Answer", elem_id="output", lines=10, max_lines=30, interactive=False,
                            buttons=["copy"],
                        )  # fmt: skip
                    self.status = gr.Markdown("", elem_id="status", elem_classes="status")
                with gr.Column(scale=1, min_width=260):
                    self.image = self._image_box() if demo.images else None
                    own += demo.settings(self.model.tokenizer)
                    drawn = sampling_fields(gr, self.max_seq_len, list(getattr(self.model, "adapters", ())))
                    self._drawing = len(drawn)
            self._wire([*drawn, *own])
            blocks.unload(self._leave)
        return blocks

    def _image_box(self) -> Any:
        return self.gr.Image(
            label="Image", elem_id="image", type="filepath", sources=["upload", "clipboard"], height=220, buttons=[],
            placeholder="Drop or choose an image; a question may also do without",
        )  # fmt: skip

    def _wire(self, fields: list[Any]) -> None:
        """Connect the events. preprocess=False: Gradio checks that an image was uploaded, but does not decode it.
        Otherwise it would decode without our limits and show its own error messages."""
        gr = self.gr
        asked = [self.send.click, self.question.submit]
        view = [self.history, self.output, self.question, self.status, self.send, self.stop, self.undo, self.clear]
        image = [] if self.image is None else [self.image]
        view += image
        begun = gr.on(
            asked, self._begin, [self.history, self.question, *image], view,
            queue=False, show_progress="hidden", api_visibility="private", preprocess=False,
        )  # fmt: skip
        begun.then(
            self._answer, [self.history, *fields], view,
            concurrency_limit=AT_ONCE, concurrency_id="model", show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        self._on(self.stop.click, self._stop, None, None)
        self._on(self.undo.click, self._undo, [self.history], view)
        self._on(self.clear.click, self._clear, None, view)
        if self.demo.chat:  # Gradio's dialogue has its own clear button
            self._on(self.output.clear, self._clear, None, view)
        if self.image is not None:
            # In a queue, because `gr.Warning` needs one. "always_last": Gradio drops no image that follows quickly.
            gr.on(
                [self.image.upload, self.image.clear], self._look, [self.history, self.image], view,
                concurrency_limit=2, trigger_mode="always_last", show_progress="hidden", api_visibility="private",
                preprocess=False,
            )  # fmt: skip

    def _on(self, event: Any, function: Callable[..., Any], inputs: Any, outputs: Any) -> None:
        event(function, inputs, outputs, queue=False, show_progress="hidden", api_visibility="private")

    def _view(
        self, history: list[Message], status: str, *, busy: bool = False, question: str | None = None
    ) -> dict[Any, Any]:
        """The new values of everything on the page. `question`: the text of its box; None leaves the box unchanged."""
        gr = self.gr
        shown: Any = [_shown(message) for message in history]
        if not self.demo.chat:
            shown = next((m["content"] for m in history if m["role"] == "assistant"), "")
        view = {self.history: history, self.output: shown, self.status: status}
        view |= {button: gr.Button(interactive=not busy) for button in (self.send, self.undo, self.clear)}
        view[self.stop] = gr.Button(interactive=busy, variant="stop" if busy else "secondary")
        if question is not None:
            view[self.question] = question
        return view

    # ------------------------------------------------------------------ what happens on it

    def _look(self, history: list[Message], upload: Upload | None, request: gr.Request) -> dict[Any, Any]:
        """An image was chosen or removed: check it at once, and say what it means for the dialogue."""
        image, of_dialogue = _file(upload), _image_of(history)
        self._uploads.need(str(request.session_hash), image, of_dialogue)
        if image is not None:
            try:
                open_image(image)
            except AccessoryError as error:
                self._warn(error, image)  # the file stays for now: the browser may still be fetching it
                return {self.image: None, self.status: "No image"}
        if self.demo.chat and history and image != of_dialogue:
            about = "without an image" if image is None else "about this image"
            return {self.status: f"The next message begins a new dialogue, {about}"}
        return {self.status: ""}

    def _begin(
        self, history: list[Message], question: str, request: gr.Request, upload: Upload | None = None
    ) -> dict[Any, Any]:
        """Runs at once, before the queue: show the question, and make Stop work from now on."""
        visitor, image = str(request.session_hash), _file(upload)
        question = question if image is None else without_tag(question)
        if visitor in self._stops:
            return {self.status: "Still answering; press Stop to ask something else"}
        if not question.strip() and (self.demo.chat or image is None):  # an image alone asks for a caption
            return {self.status: "Nothing was asked"}
        self._stops[visitor] = threading.Event()
        self._uploads.need(visitor, image)
        before = _rounds(history) if self.demo.chat else []
        if image != _image_of(before):
            before = []
        asked = {"role": "user", "content": question}
        if image is not None and not before:
            asked["image"] = image
        # Without a dialogue, the question stays in its box, so that it can be changed and asked again.
        return self._view(
            [*before, asked], "Waiting for the model …", busy=True, question="" if self.demo.chat else None
        )

    def _answer(self, history: list[Message], request: gr.Request, *fields: Any) -> Iterator[dict[Any, Any]]:
        if not history or history[-1]["role"] != "user":  # nothing was asked
            yield {self.status: self.gr.skip()}
            return
        visitor = str(request.session_hash)
        stop = self._stops.get(visitor, threading.Event())
        before, question = history[:-1], history[-1]["content"]
        started = time.monotonic()
        try:
            text = ""
            for text in self._stream(history, fields, stop):
                yield self._view([*history, _reply(text)], "Writing …", busy=True)
            how = "Stopped after" if stop.is_set() else "Answered in" if text else "An empty answer in"
            status = f"{how} {time.monotonic() - started:.1f} s"
            self._stops.pop(visitor, None)
            if stop.is_set() and not text:  # there is no answer, so the round is dropped
                yield self._view(before, status, question=question)
            else:
                yield self._view([*history, _reply(text)], status)
        except Exception as error:
            expected = isinstance(error, AccessoryError | NotImplementedError)
            if not expected:
                log.exception("an answer failed")
            self._stops.pop(visitor, None)
            yield self._view(before, "Not answered", question=question)
            self._warn(error if expected else f"{type(error).__name__}: {error}", _image_of(history))
        finally:
            self._stops.pop(visitor, None)

    def _stream(self, history: list[Message], fields: Sequence[Any], stop: threading.Event) -> Iterator[str]:
        """Yield the answer so far, at most once in `SHOW_EVERY` seconds; the last one always comes."""
        how, stops = sampling_of(fields[: self._drawing])
        own, max_gen_len = fields[self._drawing :], how["max_gen_len"]
        ask = self.demo.ask(self.model.tokenizer, history, *own)
        image = _image_of(history)
        self._warn_of_cut(ask, max_gen_len, 0 if image is None else getattr(self.model, "image_words", 0))
        stream = self.model.stream_generate(
            ask.prompt, **how, additional_stop_symbols=[*ask.stops, *stops], cancelled=stop.is_set,
            **({} if image is None else {"image": image}),
        )  # fmt: skip
        try:
            text, shown = "", 0.0
            for item in stream:
                text = ask.tidy(item["text"])
                if (now := time.monotonic()) - shown >= SHOW_EVERY:
                    shown = now
                    yield text
            yield text
        finally:
            stream.close()  # also when the visitor has left, so that the model works for the others alone

    def _warn(self, problem: Exception | str, image: str | None) -> None:
        """Show a note of one line. Gradio's own error would replace the dialogue by the word "Error"."""
        words = str(problem)
        if image is not None:  # show the name under which it was uploaded
            words = words.replace(image, Path(image).name)
        self.gr.Warning(plain(words), duration=None)

    def _warn_of_cut(self, ask: Ask, max_gen_len: Any, image_tokens: int) -> None:
        tokenizer, room = self.model.tokenizer, self.max_seq_len - (max_gen_len or 0) - image_tokens
        ids = ask.prompt
        if isinstance(ids, str):
            ids = tokenizer.encode(ids, bos=tokenizer.add_bos, special=True)
        if 0 < room < len(ids):
            self.gr.Warning(
                f"The prompt has {len(ids)} tokens, but beside an answer of {max_gen_len} only {room} fit into "
                f"{self.max_seq_len}: its beginning is left out."
            )

    def _stop(self, request: gr.Request) -> None:
        if (stop := self._stops.get(str(request.session_hash))) is not None:
            stop.set()  # `_answer` then shows that it was stopped

    def _leave(self, request: gr.Request) -> None:
        visitor = str(request.session_hash)
        if (stop := self._stops.pop(visitor, None)) is not None:
            stop.set()
        self._uploads.leave(visitor)

    def _undo(self, history: list[Message]) -> dict[Any, Any]:
        rounds = _rounds(history)
        if not rounds:
            return self._view([], "Nothing to take back")
        return self._view(rounds[:-2], "", question=rounds[-2]["content"])

    def _clear(self, request: gr.Request) -> dict[Any, Any]:
        if str(request.session_hash) in self._stops:
            self._stop(request)
            return {self.status: self.gr.skip()}
        self._uploads.need(str(request.session_hash))
        empty = {} if self.image is None else {self.image: None}
        return self._view([], "", question="") | empty


def _rounds(history: list[Message]) -> list[Message]:
    """The history without a last question that has no answer, because its visitor had left."""
    return history[: len(history) // 2 * 2]


def _file(upload: Upload | None) -> str | None:
    return None if upload is None else upload["path"]


def _image_of(history: list[Message]) -> str | None:
    """The image file of a dialogue or of a single question."""
    return history[0].get("image") if history else None


def _shown(message: Message) -> dict[str, Any]:
    """A message in the form that Gradio's dialogue takes."""
    text = without_html(message["content"])
    if "image" not in message:
        return {"role": message["role"], "content": text}
    return {"role": message["role"], "content": [{"path": message["image"], "alt_text": "The image"}, text]}


def _reply(text: str) -> Message:
    return {"role": "assistant", "content": text}
