# SPDX-License-Identifier: Apache-2.0
"""Gradio demo for notebooks: chat about an image, give a box by two clicks, view predicted boxes and masks.

`build_demo` returns the gradio Blocks. `lionjax demo` serves the page of `web_page.py` instead.
"""

import dataclasses  # no `from __future__ import annotations`: gradio reads the annotations of its callbacks
from collections.abc import Sequence

from PIL import Image

from lionjax.core.types import UserError
from lionjax.data import box_text, images
from lionjax.data.regions import ImageRegions
from lionjax.evaluation.report import plots
from lionjax.inference import tagger
from lionjax.inference.model import Answer, Model

# System fonts, for the theme with which the demo is launched, so that the page loads nothing from the network.
THEME_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The chat about one image, and the clicked corners of the next question's box."""

    turns: tuple[tuple[str, str], ...] = ()  # (question, answer)
    corners: tuple[Point, ...] = ()  # at most two, (x, y) in 0..1

    @property
    def box(self) -> tuple[float, float, float, float] | None:
        """The box x0 y0 x1 y1 in 0..1; None with fewer than two corners."""
        if len(self.corners) < 2:
            return None
        (x0, x1), (y0, y1) = (sorted(edges) for edges in zip(*self.corners))
        return x0, y0, x1, y1

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns in gradio's chat message format."""
        return [
            {"role": role, "content": text} for turn in self.turns for role, text in zip(("user", "assistant"), turn)
        ]


def add_click(conversation: Conversation, size: tuple[int, int], click: Sequence[float]) -> Conversation:
    """The conversation with a clicked corner added; a third click starts a new box.

    `click` is (x, y) in pixels of an image of `size` (width, height). A second corner on the same row or column as the
    first is ignored.
    """
    corner = tuple(min(max(pixel / edge, 0.0), 1.0) for pixel, edge in zip(click, size))
    previous = conversation.corners if len(conversation.corners) == 1 else ()
    is_degenerate = any(abs(a - b) * edge < 1 for other in previous for a, b, edge in zip(corner, other, size))
    return dataclasses.replace(conversation, corners=previous if is_degenerate else (*previous, corner))


def respond(
    model: Model,
    conversation: Conversation,
    image: Image.Image,
    prompt: str,
    tags: Sequence[str] = (),
    use_history: bool = True,
    regions: ImageRegions | None = None,
) -> tuple[Conversation, Answer]:
    """The conversation with the new turn, and the model's answer about the image and the clicked box.

    With `use_history`, previous turns are part of the prompt. `regions`: what a refiner found in the image before.
    Raises UserError for invalid prompts or tags.
    """
    (answer,) = model.answer(
        [image],
        [prompt],
        boxes=[[conversation.box]] if conversation.box else None,
        tags=[tags] if tags else None,
        history=[conversation.turns] if use_history and conversation.turns else None,
        **({} if regions is None else {"regions": [regions]}),
    )
    return Conversation((*conversation.turns, (prompt, answer.text))), answer


def render_image(image: Image.Image, conversation: Conversation, answer: Answer | None = None) -> Image.Image:
    """The image with the clicked corner or box, and with the answer's boxes and masks."""
    overlays = [plots.Overlay(conversation.box, color=plots.QUERY_COLOR)] if conversation.box else []
    if len(conversation.corners) == 1:
        ((x, y),) = conversation.corners
        overlays = [plots.Overlay((x - 0.01, y - 0.01, x + 0.01, y + 0.01), color=plots.QUERY_COLOR)]
    if answer is not None:
        overlays += plots.answer_overlays(answer.boxes, answer.masks, answer.phrases)
    return plots.draw_overlays(image, overlays)


def describe_regions(regions: ImageRegions | None) -> str:
    """What a refiner found in an image, as lines: tags, then name, score and numbers of each box."""
    if regions is None:
        return ""
    lines = [
        f"{name} ({score:.2f}): {', '.join(map(box_text.coordinate_text, box))}"
        for name, score, box in zip(regions.names, regions.scores, regions.boxes)
    ]
    return "\n".join([f"Tags: {', '.join(regions.tags) or 'none'}", *(lines or ["No box"])])


def build_demo(
    model: Model,
    title: str = "lionjax",
    examples: Sequence[Sequence[str]] = (),
    image_tagger: tagger.Tagger | None = None,
):
    """The demo as gradio Blocks.

    `examples` are [image path, question] lists. `image_tagger` fills in the tags of a new image. Raises UserError if
    gradio is not installed.
    """
    gr = _import_gradio()
    config = model.processor.config
    reads_regions = bool(config.region_width)

    on_submit, on_click, on_image_change = _callbacks(gr, model, image_tagger)
    with gr.Blocks(analytics_enabled=False, title=title) as blocks:
        gr.Markdown(f"# {title}")
        talk, found = gr.State(Conversation()), gr.State()
        with gr.Row():
            with gr.Column():
                file = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label="Image (click two corners to ask about a box)",
                )
                annotated = gr.Image(interactive=False, format="png", label="Blue: your box. Other colors: predictions")
            with gr.Column():
                chat = gr.Chatbot(label="Chat", feedback_options=None, render_markdown=False)
                prompt = gr.Textbox(label="Question", placeholder="What color is the circle?")
                words = gr.Textbox(label="Tags, comma-separated", visible=config.use_tags, placeholder="circle, star")
                seen = gr.Textbox(label="Found by the refiner", interactive=False, visible=reads_regions)
                remembers = gr.Checkbox(bool(config.followup_template), label="Include previous turns in the prompt")
                with gr.Row():
                    send = gr.Button("Send", variant="primary")
                    clear = gr.Button("Clear")
        if examples:
            gr.Examples([list(example) for example in examples], [file, prompt], label="Examples")
        submit_io = {"inputs": [talk, file, prompt, words, remembers], "outputs": [talk, chat, annotated, prompt]}
        reset_io = {"inputs": [file], "outputs": [talk, chat, annotated, words]}
        if reads_regions:
            submit_io = {"inputs": [*submit_io["inputs"], found], "outputs": [*submit_io["outputs"], seen]}
            reset_io["outputs"] += [found, seen]
        gr.on([send.click, prompt.submit], on_submit, **submit_io, api_name="ask")
        file.select(on_click, [talk, file], [talk, annotated], api_visibility="private")
        file.change(on_image_change, **reset_io, api_visibility="private")
        clear.click(on_image_change, **reset_io, api_name="begin")
    return blocks


def _callbacks(gr, model: Model, image_tagger: tagger.Tagger | None):
    """The functions of the page: (question sent, image clicked, image changed)."""
    reads_regions = bool(model.processor.config.region_width)

    # The parameter names are those of the HTTP API.
    def on_submit(talk, file, prompt, words, remembers, found=None):
        if file is None or not prompt.strip():
            raise gr.Error("Choose an image and enter a question.", print_exception=False)
        tags = [tag.strip() for tag in words.split(",") if tag.strip()]
        found_file, regions = found or (None, None)
        regions = regions if found_file == file else None  # not those of the image before
        try:
            image = images.open_image(file)
            conversation, answer = respond(model, talk, image, prompt.strip(), tags, remembers, regions)
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        shown = (conversation, conversation.messages, render_image(image, talk, answer), "")
        return (*shown, describe_regions(answer.regions)) if reads_regions else shown

    def on_click(talk, file, event: gr.SelectData):
        image = images.open_image(file)
        conversation = add_click(talk, image.size, event.index)
        return conversation, render_image(image, conversation)

    def on_image_change(file):
        """A new image starts a new conversation."""
        try:
            tags = image_tagger.tag([images.open_image(file)])[0].tags if image_tagger and file else ()
            regions = model.refine([images.open_image(file)])[0] if reads_regions and model.refine and file else None
        except UserError as error:
            raise gr.Error(str(error), print_exception=False) from error
        shown = (Conversation(), [], file, ", ".join(tags))
        return (*shown, (file, regions), describe_regions(regions)) if reads_regions else shown

    return on_submit, on_click, on_image_change


def _import_gradio():
    try:
        import gradio
    except ImportError as error:
        raise UserError('the demo needs gradio; install it with `pip install "lionjax[demo]"`') from error
    return gradio
