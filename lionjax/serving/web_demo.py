# SPDX-License-Identifier: Apache-2.0
"""A web page to talk to a model: chat about a picture, point at things with two clicks, see boxes and masks drawn.

The page is for the machine it runs on. `page` gives it as gradio's Blocks, for notebooks and other servers.
"""

import dataclasses  # no annotations as strings here: gradio reads those of what it calls
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from lionjax.core.files import read_jsonl
from lionjax.core.types import UserError
from lionjax.data import images
from lionjax.evaluation.report import plots
from lionjax.inference import tagger
from lionjax.inference.loading import load, with_prompt_length
from lionjax.inference.model import Answer, Model

EXAMPLES_PER_BENCHMARK = 3  # shown of each benchmark that a run has answered
# Fonts of the reader's own machine, so that the page loads nothing from elsewhere.
THEME_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said of a picture, (question, answer) each, and the corners pointed at for the next, x y in 0..1."""

    turns: tuple[tuple[str, str], ...] = ()
    corners: tuple[Point, ...] = ()

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """x0 y0 x1 y1 once there are two corners."""
        if len(self.corners) < 2:
            return None
        (x0, x1), (y0, y1) = (sorted(edges) for edges in zip(*self.corners))
        return x0, y0, x1, y1

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns as gradio's chat has them."""
        return [
            {"role": role, "content": text} for turn in self.turns for role, text in zip(("user", "assistant"), turn)
        ]


def add_click(conversation: Conversation, size: tuple[int, int], click: Sequence[float]) -> Conversation:
    """The talk after a click at a pixel of a picture (width, height): a first corner, or the one opposite to it."""
    corner = tuple(min(max(at / edge, 0.0), 1.0) for at, edge in zip(click, size))
    first = conversation.corners if len(conversation.corners) == 1 else ()
    flat = any(abs(a - b) * edge < 1 for other in first for a, b, edge in zip(corner, other, size))
    return dataclasses.replace(conversation, corners=first if flat else (*first, corner))


def respond(
    model: Model,
    conversation: Conversation,
    image: Image.Image,
    prompt: str,
    tags: Sequence[str] = (),
    use_history: bool = True,
) -> tuple[Conversation, Answer]:
    """The model's answer about the picture and about what was pointed at, and the talk with it.

    `remembers`: what was said before is part of the prompt. Raises UserError for what cannot be asked.
    """
    (answer,) = model.answer(
        [image],
        [prompt],
        boxes=[[conversation.box]] if conversation.box else None,
        tags=[tags] if tags else None,
        history=[conversation.turns] if use_history and conversation.turns else None,
    )
    return Conversation((*conversation.turns, (prompt, answer.text))), answer


def render_image(image: Image.Image, conversation: Conversation, answer: Answer | None = None) -> Image.Image:
    """The picture with what was pointed at, and with the answer's boxes and masks."""
    marks = [plots.Overlay(conversation.box, color=plots.QUERY_COLOR)] if conversation.box else []
    if len(conversation.corners) == 1:
        ((x, y),) = conversation.corners
        marks = [plots.Overlay((x - 0.01, y - 0.01, x + 0.01, y + 0.01), color=plots.QUERY_COLOR)]
    if answer is not None:
        marks += [plots.Overlay(box, color=plots.PREDICTION_COLOR) for box in answer.boxes]
        marks += [plots.Overlay(mask=mask, color=plots.PREDICTION_COLOR) for mask in answer.masks]
    return plots.draw_overlays(image, marks)


def run_examples(folder: Path) -> list[list[str]]:
    """[picture, question] that a run has been asked, some of each benchmark; none of other folders."""
    found = []
    for file in sorted((folder / "evaluation").glob("*.jsonl")):
        lines = [one for one in read_jsonl(file) if "image" in one and not one.get("question_boxes")]
        lines = [one for one in lines if (file.parent / one["image"]).is_file()]
        found += [[str(file.parent / one["image"]), one["question"]] for one in lines[:EXAMPLES_PER_BENCHMARK]]
    return found


def build_demo(
    model: Model,
    title: str = "lionjax",
    examples: Sequence[Sequence[str]] = (),
    image_tagger: tagger.Tagger | None = None,
):
    """The page as gradio's Blocks. `shown`: examples, [picture, question] each. `names` fills in the tags.

    Raises UserError where gradio is not installed.
    """
    gr = _import_gradio()
    config = model.processor.config

    def answered(talk, file, prompt, words, remembers):
        if file is None or not prompt.strip():
            raise gr.Error("Choose a picture and write a question.", print_exception=False)
        words = [word.strip() for word in words.split(",") if word.strip()]
        try:
            picture = images.open_image(file)
            after, answer = respond(model, talk, picture, prompt.strip(), words, remembers)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return after, after.messages, render_image(picture, talk, answer), ""

    def clicked(talk, file, event: gr.SelectData):
        picture = images.open_image(file)
        talk = add_click(talk, picture.size, event.index)
        return talk, render_image(picture, talk)

    def changed(file):
        """Another picture begins another talk."""
        try:
            named = image_tagger.tag([images.open_image(file)])[0].tags if image_tagger and file else ()
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        return Conversation(), [], file, ", ".join(named)

    with gr.Blocks(analytics_enabled=False, title=title) as blocks:
        gr.Markdown(f"# {title}")
        talk = gr.State(Conversation())
        with gr.Row():
            with gr.Column():
                file = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Picture. Two clicks on it point at a box",
                )
                seen = gr.Image(interactive=False, format="png", label="Blue: pointed at. Orange: answered")
            with gr.Column():
                chat = gr.Chatbot(label="Talk", feedback_options=None, render_markdown=False)
                prompt = gr.Textbox(label="Question", placeholder="What color is the circle?")
                words = gr.Textbox(
                    label="Tags, with commas between", visible=config.use_tags, placeholder="circle, star"
                )
                remembers = gr.Checkbox(bool(config.followup_template), label="Goes on from what was said before")
                with gr.Row():
                    send = gr.Button("Ask", variant="primary")
                    clear = gr.Button("Begin anew")
        if examples:
            gr.Examples([list(one) for one in examples], [file, prompt], label="Asked before")
        asked = {"inputs": [talk, file, prompt, words, remembers], "outputs": [talk, chat, seen, prompt]}
        gr.on([send.click, prompt.submit], answered, **asked, api_name="ask")
        file.select(clicked, [talk, file], [talk, seen], api_visibility="private")
        begun = {"inputs": [file], "outputs": [talk, chat, seen, words]}
        file.change(changed, **begun, api_visibility="private")
        clear.click(changed, **begun, api_name="begin")
    return blocks


def serve(
    folder: Path, host: str = "127.0.0.1", port: int = 7860, tagger_folder: Path | None = None, prompt_length: int = 256
) -> None:
    """Load a model and serve its page until Ctrl-C. Raises UserError where the port is taken.

    `prompt_length`: tokens that a prompt may have with the talk before it, at least as many as in training.
    """
    gr = _import_gradio()  # before a model is read for nothing
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"no page can be served at {host}:{port} ({error.strerror}); choose another --port"
            ) from error
    names = None if tagger_folder is None else tagger.load(tagger_folder)
    model = load(folder)
    longest = max(prompt_length, model.processor.config.max_prompt_tokens)
    blocks = build_demo(with_prompt_length(model, longest), f"lionjax: {folder.name}", run_examples(folder), names)
    blocks.launch(
        server_name=host,
        server_port=port,
        allowed_paths=[str(folder.resolve())],
        footer_links=[],
        theme=gr.themes.Base(**THEME_FONTS),
        share=False,
        quiet=True,
        show_error=True,
        prevent_thread_lock=True,
    )
    print(f"http://{host}:{port} shows {folder}; Ctrl-C ends it", file=sys.stderr)
    blocks.block_thread()


def _import_gradio():
    try:
        import gradio
    except ImportError as error:
        raise UserError('the page wants gradio; install it with `pip install "lionjax[demo]"`') from error
    return gradio
