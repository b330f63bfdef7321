# SPDX-License-Identifier: Apache-2.0
"""Prompts of the released systems: the texts between special ids are those of the systems' own code."""

import dataclasses
import json

import pytest
import shared_data
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lionjax.core.prompt_formats import SYSTEM_FORMATS
from lionjax.core.types import UserError
from lionjax.data import tokenizer, whole_prompt
from lionjax.data.chat import PromptFormat
from lionjax.data.processor_config import ProcessorConfig
from lionjax.data.prompt import PromptBuilder

IMAGE = -200
Q, A = "What is in the image?", "Two cats."
HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
USER = HUMAN.replace("curious human", "curious user").replace("human's", "user's")
LLAMA_2 = (
    "[INST] <<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n"
)
MPT = "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
OWL = (
    "The following is a conversation between a curious human and AI assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
# What each system's own code writes for one question: texts, and in brackets special tokens; <image> is the image.
PROMPTS = {
    "llava_v0": [f"{HUMAN}###Human: ", "<image>", f"\n{Q}###Assistant:"],
    "llava_v1": [f"{HUMAN} USER: ", "<image>", f"\n{Q} ASSISTANT:"],
    "vicuna_v1": [f"{USER} USER: ", "<image>", f"\n{Q} ASSISTANT:"],
    "llava_llama_2": [LLAMA_2, "<image>", f"\n{Q} [/INST]"],
    "mpt": [
        *("[<|im_start|>]", f"system\n{MPT}", "[<|im_end|>]", "[<|im_start|>]", "user\n", "<image>", f"\n{Q}"),
        *("[<|im_end|>]", "[<|im_start|>]", "assistant\n"),
    ],
    "blip2_opt": [Q],
    "blip2": [Q],
    "instructblip": [Q],
    "minigpt4": ["###Human: <Img>", "<image>", f"</Img> {Q} ###Assistant: "],
    "mplug_owl": [f"{OWL}\nHuman: ", "<image>", f"\nHuman: {Q}\nAI: "],
    "shikra": [f"{USER} USER:", "[<im_start>]", "[<im_patch>]", "[<im_end>]", f"{Q} ASSISTANT:"],
    "nextchat": [f"{USER} USER:", "[<im_start>]", *["[<im_patch>]"] * 3, "[<im_end>]", f"{Q} ASSISTANT:"],
    "kosmos2": ["[<image>]", "<image>", "[</image>]", f" {Q}"],
}
# What follows for an answer and a second question.
SECOND = {
    "llava_v0": f" {A}###Human: And?###Assistant:",
    "llava_v1": f" {A}[</s>]USER: And? ASSISTANT:",
    "vicuna_v1": f" {A}[</s>]USER: And? ASSISTANT:",
    "llava_llama_2": f" {A} [</s>][<s>][INST] And? [/INST]",
    "mpt": f"{A}[<|im_end|>][<|im_start|>]user\nAnd?[<|im_end|>][<|im_start|>]assistant\n",
    "minigpt4": f"{A}###Human: And? ###Assistant: ",
    "mplug_owl": f"{A}[</s>]\nHuman: And?\nAI: ",
    "shikra": f" {A}[</s>]USER: And? ASSISTANT:",
    "nextchat": f" {A}[</s>]USER: And? ASSISTANT:",
}
SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_patch>", "<im_end>", "<image>", "</image>"),
    *("<at>", "<boxes>"),
)


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A tokenizer whose tokens are single characters, so that ids show every space; <s> begins a text."""
    folder = tmp_path_factory.mktemp("characters")
    letters = sorted({*map(chr, range(32, 127)), "\n"})
    vocab = {piece: k for k, piece in enumerate(["<unk>", *letters])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    return str(folder)


def builder(name: str, folder: str, **fields) -> PromptBuilder:
    system = dict(SYSTEM_FORMATS[name].processor) | ({"num_image_tokens": 3} if name == "nextchat" else {})
    spliced = "{image}" in system["prompt_template"] and not system.get("num_image_tokens")
    config = ProcessorConfig(tokenizer=folder, reader="decoder", image_token=IMAGE if spliced else None, **system)
    lengths = {"max_prompt_tokens": 2000, "max_target_tokens": 500}
    return PromptBuilder(dataclasses.replace(config, **(lengths | fields)))


def pieces_of(prompt: PromptBuilder, ids) -> list[str]:
    """Texts between special ids, special tokens in brackets, and <image>."""
    pieces: list[str] = []
    in_text = False
    for token_id in ids:
        known = prompt.tokenizer.added_tokens.get(token_id)
        if token_id == IMAGE or known:
            pieces.append("<image>" if token_id == IMAGE else f"[{known}]")
        else:
            text = prompt.tokenizer.backend.id_to_token(token_id)
            pieces[len(pieces) - in_text :] = [pieces[-1] + text if in_text else text]
        in_text = not (token_id == IMAGE or known)
    return pieces


def text_of(prompt: PromptBuilder, ids) -> str:
    """All of `pieces_of` as one text, without brackets."""
    return without_brackets("".join(pieces_of(prompt, ids)))


def without_brackets(text: str) -> str:
    return text.replace("[", "").replace("]", "")


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_what_the_systems_own_code_writes(name, characters):
    prompt = builder(name, characters)
    ids, target, *_ = prompt.build_example(f" {Q} ", None)
    assert pieces_of(prompt, ids) == ["[<s>]", *PROMPTS[name]] and not target
    assert ids == prompt.encode_prompt(Q)


@pytest.mark.parametrize("name", SECOND)
def test_a_second_question_follows_the_first_answer_in_training_and_in_a_chat(name, characters):
    prompt = builder(name, characters)
    turns = PromptFormat("", ((Q, A),))
    ids, target, loss_mask, *_ = prompt.build_example("And?", "Yes", prompt_format=turns)
    assert pieces_of(prompt, ids) == ["[<s>]", *PROMPTS[name]]
    end = SYSTEM_FORMATS[name].processor.get("answer_end") or "</s>"
    space = " " if SECOND[name].startswith(" ") else ""
    assert text_of(prompt, target) == without_brackets(f"{SECOND[name]}{space}Yes{end}")
    learned = [k for k, flag in zip(target, loss_mask) if flag]
    assert text_of(prompt, learned) == f"{space}{A}{end}{space}Yes{end}"
    chat, *_ = prompt.build_example("And?", None, prompt_format=turns)
    num_last = len(prompt.build_example(Q, "Yes")[1])
    assert chat == [*ids, *target[: len(target) - num_last]]


@pytest.mark.parametrize("name", sorted(SECOND))
def test_a_prompt_in_its_template_is_not_wrapped_again(name, characters):
    prompt = builder(name, characters)
    wanted = prompt.encode_prompt(Q)
    template = prompt.config.prompt_template
    mark = "<ImageHere>" if prompt.config.num_image_tokens else "<image>"
    assert prompt.encode_prompt(template.replace("{image}", mark).replace("{question}", Q)) == wanted
    assert prompt.encode_prompt("<s>" + template.replace("{image}", mark * 4).replace("{question}", Q)) == wanted
    assert prompt.encode_prompt(f"{mark}\n{Q}") == wanted  # a mark alone, as LLaVA's own scripts accept


def test_a_prompt_in_the_template_keeps_its_own_first_sentence_and_gets_the_image_that_it_lacks(characters):
    prompt = builder("vicuna_v1", characters)
    short = ["[<s>]", "USER: ", "<image>", f"\n{Q} ASSISTANT:"]
    assert pieces_of(prompt, prompt.encode_prompt(f"USER: <image>\n{Q} ASSISTANT:")) == short
    assert pieces_of(prompt, prompt.encode_prompt(f"USER: {Q} ASSISTANT:")) == short
    asked = pieces_of(prompt, prompt.encode_prompt("Is USER: a word?"))
    assert asked[-1] == "\nIs USER: a word? ASSISTANT:" and asked[1].startswith(USER)
    with pytest.raises(UserError, match="only a mark of the image"):
        prompt.encode_prompt("<image>")


def test_a_special_token_that_a_user_spells_is_text(characters):
    prompt = builder("mpt", characters)
    ids = prompt.encode_prompt("Is <|im_end|> here? </s>")
    plain = prompt.encode_prompt(Q)
    for token in ("<|im_end|>", "</s>"):
        token_id = prompt.tokenizer.token_to_id(token)
        assert ids.count(token_id) == plain.count(token_id)


def test_captions_and_text_only_rows_keep_their_ends_and_long_answers_have_none(characters):
    prompt = builder("vicuna_v1", characters)
    ids, target, mask, *_ = prompt.build_example(Q, A, prompt_format=PromptFormat("plain"))
    assert pieces_of(prompt, ids) == ["[<s>]", "<image>"] and pieces_of(prompt, target) == [f"{A}\n"] and all(mask)
    ids, target, *_ = prompt.build_example(Q, A, prompt_format=PromptFormat("told"))
    assert pieces_of(prompt, ids) == ["[<s>]", f"{USER} USER: {Q} ASSISTANT:"]
    short = builder("vicuna_v1", characters, max_target_tokens=4)
    _, target, mask, _, num_cut = short.build_example(Q, A)
    full = prompt.build_example(Q, A).target_ids
    assert pieces_of(short, target) == [" Two"] and mask == [1] * 4 and num_cut == len(full) - 4
    exact = builder("vicuna_v1", characters, max_target_tokens=len(full)).build_example(Q, A)
    assert exact.target_ids == full and exact.num_cut == 0
    lacks_one = builder("vicuna_v1", characters, max_target_tokens=len(full) - 1).build_example(Q, A)
    assert lacks_one.target_ids == full[:-1] and lacks_one.num_cut == 1
    turns = PromptFormat("", ((Q, A),))
    whole = prompt.build_example(Q, A, prompt_format=turns)
    cut = builder("vicuna_v1", characters, max_target_tokens=len(full) + 3).build_example(Q, A, prompt_format=turns)
    assert cut.target_ids == whole.target_ids[: len(full) + 3] and cut.loss_mask == whole.loss_mask[: len(full) + 3]
    with pytest.raises(UserError, match="2 turns take"):
        short.build_example(Q, A, prompt_format=PromptFormat("", ((Q, A),), True))
    with pytest.raises(UserError, match="the prompt 'What is"):
        builder("vicuna_v1", characters, max_prompt_tokens=9).build_example(Q, A)
    with pytest.raises(UserError, match="has no tag prompt"):
        ProcessorConfig(prompt_tokenization="whole")


def test_an_encoder_reads_the_whole_prompt_and_its_end_token(characters):
    prompt = builder("instructblip", characters, reader="encoder")
    ids, target, mask, *_ = prompt.build_example(Q, A)
    assert pieces_of(prompt, ids) == ["[<s>]", Q, "[</s>]"]
    assert pieces_of(prompt, target) == [A, "[</s>]"] and mask == [1] * len(target)


def test_boxes_as_tokens_are_cut_out_of_the_text(characters):
    prompt = builder("nextchat", characters, box_format="embeddings", max_boxes=4)
    box = "[0.100,0.200,0.300,0.400]"
    ids, target, _, boxes, _ = prompt.build_example(f"What is at {box}, there?", f"A cat {box}.")
    assert pieces_of(prompt, ids)[-4:] == ["What is at", "[<at>]", "[<boxes>]", ", there? ASSISTANT:"]
    assert pieces_of(prompt, target) == [" A cat", "[<at>]", "[<boxes>]", ".", "[</s>]"]
    assert len(boxes) == 2


# Special tokens come from the tokenizer's own files


def saved(folder, backend, **files) -> str:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def letters(*special: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({piece: k for k, piece in enumerate([*special, "a", "b"])}, []))
    backend.add_special_tokens(list(special))
    return backend


def test_start_end_and_padding_are_those_of_the_files_not_of_a_spelling(tmp_path):
    backend = letters("<unk>", "<s>", "</s>", "<pad>", "[stop]")
    folder = saved(
        tmp_path,
        backend,
        tokenizer_config={"bos_token": "</s>", "add_bos_token": True, "eos_token": {"content": "[stop]"}},
        special_tokens_map={"pad_token": "<pad>", "eos_token": "<s>"},
    )
    known = tokenizer.load(folder, from_files=True)
    assert (known.bos_ids, known.eos_id, known.pad_id) == ([2], 4, 3)
    spelled = tokenizer.load(folder)
    assert (spelled.bos_ids, spelled.eos_id) == ([1], 2)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"tokenizer_config": {"eos_token": "b", "bos_token": "a"}}, ([], "b", "b")),
        ({"tokenizer_config": {"eos_token": "b", "bos_token": "a", "add_bos_token": True}}, (["a"], "b", "b")),
        ({"config": {"text_config": {"eos_token_id": 1, "pad_token_id": 0}}}, ([], "b", "a")),
        ({"config": {"eos_token_id": 0}, "generation_config": {"eos_token_id": [1, 0]}}, ([], "b", "b")),
    ],
)
def test_a_tokenizer_of_no_known_kind_is_read_by_its_files(files, wanted, tmp_path):
    known = tokenizer.load(saved(tmp_path, letters(), **files))
    name = known.backend.id_to_token
    assert ([name(k) for k in known.bos_ids], name(known.eos_id), name(known.pad_id)) == wanted


@pytest.mark.parametrize(("ids", "start"), [({}, "<s>"), ({"bos_token_id": 2}, "</s>")])
def test_a_tokenizer_json_alone_of_a_known_kind_begins_with_the_start_token(ids, start, tmp_path):
    known = tokenizer.load(saved(tmp_path, letters("<unk>", "<s>", "</s>"), config=ids), from_files=True)
    assert known.bos_ids == [known.token_to_id(start)] and known.eos_id == 2


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path):
    with pytest.raises(UserError, match="names an end token"):
        tokenizer.load(saved(tmp_path, letters()))


# Real tokenizers

REAL = shared_data.ROOT / "tokenizers"


def opt_folder(folder) -> str:
    """GPT-2's byte-pair encoding with OPT's settings."""
    vocab = json.loads((REAL / "gpt2_encoder.json").read_text(encoding="utf-8"))
    merges = [tuple(x.split()) for x in (REAL / "gpt2_vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] if x]
    vocab |= {token: len(vocab) + k for k, token in enumerate(("<s>", "<pad>", "</s>"))}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<pad>", "</s>"])
    settings = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    return saved(folder, backend, tokenizer_config=settings | {"tokenizer_class": "GPT2Tokenizer"})


def llama_folder(folder, legacy: bool) -> str:
    """Mistral's SentencePiece model, of LLaMA's kind; `legacy` marks the start of each part of a text."""
    pieces, _ = tokenizer.parse_sentencepiece_model((REAL / "mistral_v1_tokenizer.model").read_bytes())
    vocab = {piece: k for k, (piece, _) in enumerate(pieces)}
    merges = []
    for piece in vocab:
        cuts = ((piece[:k], piece[k:]) for k in range(1, len(piece)))
        merges += [(vocab[piece], a, b) for a, b in cuts if a in vocab and b in vocab]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [(a, b) for _, a, b in sorted(merges)], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.add_special_tokens(["<unk>", "<s>", "</s>", AddedToken("<image>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return saved(folder, backend, tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})


@shared_data.needs("tokenizers/gpt2_encoder.json", "tokenizers/gpt2_vocab.bpe")
def test_opt_prompts_and_captions_are_tokenized_as_lavis_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = opt_folder(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    ids = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    merges = [tuple(pair) for pair in model["merges"]]
    theirs = transformers.GPT2Tokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True, **ids)
    prompt = builder("blip2_opt", folder)
    for text in (Q, "Question: how many?  Answer:", "a photo of", "naïve 12.5 %"):
        assert prompt.encode_prompt(text) == theirs(text).input_ids
    start = theirs.convert_tokens_to_ids("</s>")
    ids, target, *_ = prompt.build_example(Q, "two cats", prompt_format=PromptFormat("plain"))
    assert [*ids, *target] == theirs("two cats\n").input_ids and ids == [start]
    ids, target, *_ = prompt.build_example("a photo of", "two cats")
    assert [*ids, *target] == theirs("a photo of two cats\n").input_ids and len(target) == 3
    assert target[-1:] == theirs("\n", add_special_tokens=False).input_ids


@pytest.mark.slow
@shared_data.needs("tokenizers/mistral_v1_tokenizer.model")
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name", ["llava_v0", "vicuna_v1", "llava_llama_2", "minigpt4", "mplug_owl"])
def test_llama_prompts_are_tokenized_as_the_originals_do(name, legacy, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = llama_folder(tmp_path, legacy)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    prompt = builder(name, folder)
    for question in (Q, "naïve\n 12.5 %: [0.100,0.200]?"):
        text = prompt.config.prompt_template.replace("{question}", question)
        chunks = [theirs(chunk).input_ids for chunk in text.split("{image}")]
        wanted = [*chunks[0], *(k for chunk in chunks[1:] for k in (IMAGE, *chunk[1:]))]
        assert prompt.encode_prompt(question) == wanted
        # transformers' own LLaVA has <image> in the vocabulary and tokenizes the text at once.
        image = theirs.convert_tokens_to_ids("<image>")
        spliced = builder(name, folder, image_token=image)
        assert spliced.encode_prompt(question) == theirs(text.replace("{image}", "<image>")).input_ids
    ids, target, mask, *_ = prompt.build_example(Q, A)
    if name == "vicuna_v1":
        whole = prompt.config.prompt_template.replace("{question}", Q).split("{image}")[1] + f" {A}</s>"
        behind = ids[ids.index(IMAGE) + 1 :]
        assert [*behind, *target] == theirs(whole, add_special_tokens=False).input_ids and all(mask)


@shared_data.needs("tokenizers/t5_cc_all.32000.100extra.model")
def test_lions_tag_prompt_and_question_are_tokenized_as_one_text():
    prompt = PromptBuilder(ProcessorConfig(tokenizer=str(REAL / "t5_cc_all.32000.100extra.model")))
    text = "According to <extra_id_0>, you are allowed to use or partially use the following tags: [red ring, star]. "
    wanted = prompt.tokenizer.encode(f"{text}{Q}", parse_special=True)
    assert prompt.encode_prompt(Q, ("red ring", "star")) == [*wanted, 1] and 32099 in wanted


def test_text_only_templates_have_no_trace_of_the_image():
    for name, system in SYSTEM_FORMATS.items():
        if name != "lion":
            fields = system.processor
            text = whole_prompt.text_only_template(fields["prompt_template"], fields["followup_template"])
            assert "mage" not in text.replace("the image", "") and text.count("{question}") == 1, name
