# SPDX-License-Identifier: Apache-2.0
"""Protocols of published benchmarks: everything that decides a figure, under one name.

A figure can stand beside a published one only if question, generation, reading, normalizer, threshold and aggregation
are the same. `PROTOCOLS` has them by benchmark and name; the first of a benchmark is its default. Prompts have the
fields {question}, {hint}, {statement}, {expr}, {text}, {history}, {options_lines} ("A. x" in lines), {options_round}
("(a) x (b) y"), {options}, for phrases of a sentence {before} and {phrase}, and for OCR tokens {ocr_tokens} and
{first_ocr_tokens} (at most 30).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lionjax.core.types import UserError

ANSWER_FORMS = ("generate", "rank_mean", "rank_sum", "yes_probability")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked and scored.

    `answer_form`: "generate", "rank_mean" or "rank_sum" (candidates by the mean or the sum of their token losses) or
    "yes_probability" (P(yes) against P(no)). `reader`: how the answer is read, `normalizer`: what is done to answers
    and references before they are compared, `threshold`: of an IoU, `padded`: boxes are fractions of the image padded
    to a square. `sentence_prompt`: the prompt of ReasonSeg's long queries, if it is another; `ocr_prompt`: that of
    questions with OCR tokens. `aggregation` and `note` are words for the report. Published figures are in
    `published_figures.py`, by benchmark and protocol.
    """

    name: str
    prompt: str = "{question}"
    max_new_tokens: int = 16
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    answer_form: str = "generate"
    reader: str = "text"
    normalizer: str = "none"
    threshold: str = ""
    padded: bool = False
    aggregation: str = "mean over questions"
    note: str = ""
    sentence_prompt: str = ""
    ocr_prompt: str = ""

    def __post_init__(self):
        if self.answer_form not in ANSWER_FORMS:
            raise ValueError(f"answer_form is {self.answer_form!r}; choose one of {', '.join(ANSWER_FORMS)}")

    def to_json(self) -> dict[str, Any]:
        """The fields for report.json."""
        return dataclasses.asdict(self)


CIDER = "corpus CIDEr-D, document frequencies of the evaluated references"
SHORT_LLAVA = "{question}\nAnswer the question using a single word or phrase."
LETTER_LLAVA = "{options_lines}\nAnswer with the option's letter from the given choices directly."
OCR_LLAVA = "{question}\nReference OCR token: {ocr_tokens}\nAnswer the question using a single word or phrase."
OCR_LAVIS = "OCR tokens: {first_ocr_tokens}. Question: {question} Short answer:"
SHORT_BLIP2 = "Question: {question} Short answer:"
INSTRUCTBLIP_SHORT = {"prompt": "Question: {question} Short Answer:", "num_beams": 5, "max_new_tokens": 10}
INSTRUCTBLIP_SHORT |= {"min_new_tokens": 1, "length_penalty": -1.0}
LION_NOTE = "LION's question is not public; this is InstructBLIP's"
LMMS_CAPTION = "Provide a one-sentence caption for the provided image."
LAVIS_CAPTION = {"prompt": "A short image caption.", "num_beams": 5, "min_new_tokens": 10, "max_new_tokens": 80}
BLIP2_CAPTION = {"prompt": "a photo of", "num_beams": 5, "max_new_tokens": 30}


def _caption_protocols() -> tuple[Protocol, ...]:
    return (
        Protocol("official", LMMS_CAPTION, 64, normalizer="ptb", aggregation=CIDER),
        Protocol("lavis", normalizer="ptb", aggregation=CIDER, **LAVIS_CAPTION),
        Protocol("blip2", normalizer="ptb", aggregation=CIDER, **BLIP2_CAPTION),
        Protocol("lmms", LMMS_CAPTION, 64, normalizer="ptb", aggregation=CIDER),
        Protocol(
            "lion", "Please describe the image using a single short sentence.", 64, normalizer="ptb", aggregation=CIDER
        ),
    )


def _vqa_protocols(normalizer: str) -> tuple[Protocol, ...]:
    """Open answers: as the official scorer compares them, asked in four ways."""
    return (
        Protocol("official", SHORT_LLAVA, normalizer=normalizer),
        Protocol("lavis", normalizer=normalizer, **INSTRUCTBLIP_SHORT),
        Protocol("blip2", SHORT_BLIP2, 10, num_beams=5, normalizer=normalizer),
        Protocol("llava", SHORT_LLAVA, 128, normalizer=normalizer),
        Protocol("lmms", SHORT_LLAVA, 16, normalizer="evalai", note="lmms-eval reads with EvalAI's"),
        Protocol("lion", normalizer=normalizer, note=LION_NOTE, **INSTRUCTBLIP_SHORT),
        Protocol(
            "minigpt_v2",
            "[vqa] Based on the image, respond to this question with a short answer: {question}",
            20,
            normalizer=normalizer,
        ),
    )


REC_NOTE = "every sentence is a question; RefCOCO's images are of COCO train2014, which many models have seen"
REC_LMMS = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of the "
    "region this sentence describes: {expr}"
)
REC_VLMEVALKIT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{expr}</ref>"
REC = (
    Protocol(
        "shikra",
        "Where is {expr}? Answer with its box.",
        64,
        reader="strict",
        threshold="> 0.5",
        note=f"Shikra draws one of 54 questions; exactly one box without blanks, another answer is a miss; {REC_NOTE}",
    ),
    Protocol(
        "shikra_padded",
        "Where is {expr}? Answer with its box.",
        64,
        reader="strict",
        threshold="> 0.5",
        padded=True,
        note=f"as shikra, for answers in fractions of the padded square, as Shikra's own files have them; {REC_NOTE}",
    ),
    Protocol(
        "nextchat",
        "Where is {expr}?",
        64,
        reader="lenient",
        threshold="> 0.5",
        note="NExT-Chat's paper reads the box at the true answer's tokens (teacher_forced); a text is read freely",
    ),
    Protocol(
        "lion",
        "In the image <image>, can you locate {expr} and let me know its coordinates?",
        64,
        reader="lenient",
        threshold="> 0.5",
        note="the reading of LION's evaluation is not public",
    ),
    Protocol(
        "minigpt_v2",
        "[refer] give me the location of {expr}",
        32,
        reader="hundredths",
        threshold="> 0.5",
        note="MiniGPT-v2 asks up to 20 times again where --resample is set; here every question is asked once",
    ),
    Protocol(
        "kosmos2",
        "<grounding><phrase>{expr}</phrase>",
        64,
        reader="location_tokens",
        threshold=">= 0.5",
        note="greedy, without repeated 3-grams; the first box",
    ),
    Protocol("lmms", REC_LMMS, 64, reader="first_box", threshold=">= 0.5", note="unreadable: [0,0,0,0]"),
    Protocol("vlmevalkit", REC_VLMEVALKIT, 64, reader="normalized_box", threshold=">= 0.5"),
)
POPE = (
    Protocol("official", reader="pope", note="everything without no or not in the first sentence is yes"),
    Protocol("llava", SHORT_LLAVA, 128, reader="pope"),
    Protocol("shikra", reader="answer_sentence"),
    Protocol("lmms", SHORT_LLAVA, 128, reader="whole_answer", note="'No.' is neither yes nor no"),
    Protocol("vlmevalkit", SHORT_LLAVA, 128, reader="one_word"),
)
MME_SUM = "sum over tasks of accuracy and of images with both answers right, in percent"
MME = (
    Protocol("official", reader="mme", aggregation=MME_SUM),
    Protocol("llava", SHORT_LLAVA, 128, reader="mme", aggregation=MME_SUM),
)
VIZWIZ_HINT = "When the provided information is insufficient, respond with 'Unanswerable'."
VIZWIZ_LLAVA = "{question}\n" + VIZWIZ_HINT + "\nAnswer the question using a single word or phrase."
VIZWIZ = (
    Protocol("official", VIZWIZ_LLAVA, normalizer="evalai", note="asked with 'Unanswerable'"),
    Protocol("llava", VIZWIZ_LLAVA, 128, normalizer="evalai", note="asked with 'Unanswerable'"),
    Protocol("lavis", normalizer="evalai", note="asked without 'Unanswerable'", **INSTRUCTBLIP_SHORT),
    Protocol(
        "minigpt4",
        "[vqa] Based on the image, respond to this question with a short answer: {question}",
        20,
        normalizer="exact",
        note="min(1, n / 3) of all ten references, not normalized",
    ),
)
AOKVQA = (
    Protocol("official", SHORT_LLAVA, normalizer="exact", aggregation="direct answers without the difficult questions"),
    Protocol("lavis", normalizer="exact", aggregation="direct answers of all questions", **INSTRUCTBLIP_SHORT),
    Protocol(
        "lion",
        normalizer="exact",
        aggregation="direct answers of all questions",
        note=f"{LION_NOTE}; whether the difficult ones count neither",
        **INSTRUCTBLIP_SHORT,
    ),
)
GQA = (
    Protocol("official", SHORT_LLAVA, normalizer="exact"),
    Protocol("lavis", normalizer="vqa_both", **INSTRUCTBLIP_SHORT),
    Protocol("llava", SHORT_LLAVA, 128, reader="lower_case_without_dot", normalizer="exact"),
    Protocol("lmms", SHORT_LLAVA, normalizer="case_and_marks"),
    Protocol("lion", normalizer="vqa_both", note=LION_NOTE, **INSTRUCTBLIP_SHORT),
)
RANKED_OPTIONS = "Question: {question} Options: {options_round}. Short answer:"
ICONQA = (
    Protocol(
        "lavis",
        RANKED_OPTIONS,
        answer_form="rank_mean",
        note="ranked candidates; not comparable with generated answers",
    ),
    Protocol("lion", RANKED_OPTIONS, answer_form="rank_mean", note=LION_NOTE),
    Protocol("blip2", RANKED_OPTIONS, answer_form="rank_sum", note="ranked by the sum of the token losses"),
    Protocol("generate", LETTER_LLAVA, note="generated and matched; not comparable with ranked candidates"),
)
VSR_PROMPT = "Based on the image, is this statement true or false? {statement} Answer:"
VSR = (
    Protocol("official", VSR_PROMPT, 8, reader="first_word"),
    Protocol("lavis", VSR_PROMPT, 8, answer_form="rank_mean", reader="first_word"),
    Protocol("lion", VSR_PROMPT, 8, answer_form="rank_mean", reader="first_word", note=LION_NOTE),
    Protocol("vlmevalkit", VSR_PROMPT, 8, reader="one_word"),
)
VISDIAL_PROMPT = "Dialog history: {history}\nQuestion: {question} Short answer:"
VISDIAL_NOTE = "equal scores share their mean rank"
VISDIAL = (
    Protocol("official", VISDIAL_PROMPT, answer_form="rank_mean", note=VISDIAL_NOTE),
    Protocol("lavis", VISDIAL_PROMPT, answer_form="rank_mean", note=VISDIAL_NOTE),
    Protocol("lion", VISDIAL_PROMPT, answer_form="rank_mean", note=f"{VISDIAL_NOTE}; {LION_NOTE}"),
)
SCIENCEQA = (
    Protocol("llava", LETTER_LLAVA, 128, reader="choice_letter"),
    Protocol(
        "lavis",
        "Context: {hint} Question: {question} Options: {options_round}. Answer:",
        answer_form="rank_mean",
        reader="choice_letter",
    ),
)
MMBENCH = (
    Protocol(
        "lmms",
        LETTER_LLAVA,
        128,
        reader="option",
        aggregation="mean over questions, of which every rotation must be right",
        note="read without a language model; an unclear answer is wrong",
    ),
    Protocol(
        "vlmevalkit",
        "Hint: {hint}\nQuestion: {question}\nOptions:\n{options}\n"
        "Please select the correct answer from the options above. \n",
        128,
        reader="option",
        aggregation="mean over questions, of which every rotation must be right",
        note="exact_matching; an unclear answer is Z and wrong",
    ),
)
SEED = (
    Protocol("llava", LETTER_LLAVA, 128, reader="exact_letter"),
    Protocol("official", "{question}", answer_form="rank_mean", reader="exact_letter", note="ranks the four answers"),
)
HATEFUL_MEMES = (
    Protocol(
        "lavis",
        'This is an image with: "{text}" written on it. Is it hateful? Answer:',
        answer_form="yes_probability",
        aggregation="AUROC of P(yes)",
    ),
)
OCR_NOTE = "published figures are with OCR tokens; --answers OCR_FILE adds them to the prompt"
TEXTVQA = (
    Protocol("official", SHORT_LLAVA, normalizer="evalai", note="asked without OCR tokens"),
    Protocol("llava", SHORT_LLAVA, 128, normalizer="evalai", note=OCR_NOTE, ocr_prompt=OCR_LLAVA),
    Protocol("lavis", normalizer="evalai", note=OCR_NOTE, ocr_prompt=OCR_LAVIS, **INSTRUCTBLIP_SHORT),
)
DOCVQA = (Protocol("lmms", SHORT_LLAVA, 32, normalizer="anls", aggregation="mean of the best reference, 0 below 0.5"),)
OCRVQA = (Protocol("official", SHORT_LLAVA, 32, normalizer="lower_case"),)
MASKS = (
    Protocol(
        "lisa",
        "Can you segment the {expr} in this image?",
        64,
        sentence_prompt="{expr} Please output segmentation mask.",
        aggregation="gIoU, and cIoU over all sentences at the image's size",
        note="LISA's released 7B checkpoint has 67 cIoU on RefCOCO val, its paper 74.1 (issue 74)",
    ),
    Protocol("nextchat", "Segment {expr}.", 64, aggregation="exactly one mask, else an empty one; cIoU"),
)
ENTITIES = (
    Protocol(
        "kosmos2",
        "<grounding> {before}<phrase> {phrase}</phrase>",
        64,
        threshold=">= 0.5",
        note="the model is told the words before each phrase; coordinates as they stand",
    ),
    Protocol(
        "alone",
        "Where is {phrase}? Answer with its box.",
        64,
        threshold=">= 0.5",
        note="each phrase is asked without its sentence; not comparable with Kosmos-2's figures",
    ),
)
REG = (
    Protocol("kosmos2", "It is", 64, normalizer="ptb", aggregation="CIDEr against all sentences"),
    Protocol("nextchat", "What is in {expr}?", 64, normalizer="ptb", aggregation="one reference"),
)
LLAVA_BENCH = (
    Protocol(
        "official",
        "{question}",
        1024,
        aggregation="ratio of the means in percent, unreadable replies as -1",
        note="figures of different judges do not compare",
    ),
    Protocol("readable", "{question}", 1024, aggregation="readable replies"),
)
OWL_EVAL = (Protocol("official", "{question}", 512, aggregation="answers that people rated A or B"),)

PROTOCOLS: Mapping[str, tuple[Protocol, ...]] = {
    "coco_karpathy": _caption_protocols(),
    "flickr30k": _caption_protocols(),
    "textcaps": _caption_protocols(),
    "nocaps": _caption_protocols(),
    "vqav2": _vqa_protocols("vqa"),
    "okvqa": _vqa_protocols("vqa"),
    "aokvqa": AOKVQA,
    "gqa": GQA,
    "iconqa": ICONQA,
    "vsr": VSR,
    "visdial": VISDIAL,
    "vizwiz": VIZWIZ,
    "textvqa": TEXTVQA,
    "ocrvqa": OCRVQA,
    "docvqa": DOCVQA,
    "scienceqa": SCIENCEQA,
    "hateful_memes": HATEFUL_MEMES,
    "rec": REC,
    "res": MASKS,
    "reason_seg": MASKS,
    "flickr30k_entities": ENTITIES,
    "reg": REG,
    "pope": POPE,
    "mme": MME,
    "mmbench": MMBENCH,
    "seed": SEED,
    "llava_bench": LLAVA_BENCH,
    "owleval": OWL_EVAL,
}


def get_protocol(benchmark: str, name: str = "") -> Protocol:
    """A protocol of a benchmark by its name; the first one without a name, and as "official" where none is called so.

    Raises UserError for an unknown name.
    """
    known = {protocol.name: protocol for protocol in PROTOCOLS[benchmark]}
    known.setdefault("official", PROTOCOLS[benchmark][0])
    if name and name not in known:
        raise UserError(f"{benchmark} has no protocol {name!r}; choose one of {', '.join(known)}")
    return known[name] if name else PROTOCOLS[benchmark][0]
