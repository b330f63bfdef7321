# SPDX-License-Identifier: Apache-2.0
"""The models of `released_folders` with tokenizers of the released kinds: LLaMA's, OPT's, T5's, BERT's and XLM-R's."""

from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from released_folders import KOSMOS, LLAMA, OPT, SIDE, model_of
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = (
    "USER: ASSISTANT: What is in the picture? Where is the red star? Describe the image in detail.\n",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, ",
    "and polite answers to the user's questions. Question: how many cats are there? Answer: two\n",
    "###Human: ###Assistant:",
)
SYSTEMS = ("llava", "blip2_opt", "instructblip", "instructblip_t5")


def llama_tokenizer(**settings):
    """A LLaMA tokenizer of transformers with a small vocabulary: words begin with an underline, bytes as fallback."""
    import transformers

    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text.replace("\n", "") for text in TEXTS], trainer)
    vocab, merges = _vocab_and_merges(backend)
    return transformers.LlamaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, pad_token="<unk>", **settings)


def opt_tokenizer():
    """OPT's tokenizer of transformers, GPT-2's byte-pair encoding with </s> as start and end, on a small vocabulary."""
    import transformers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    vocab, merges = _vocab_and_merges(backend)
    ids = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    return transformers.GPT2Tokenizer(vocab=vocab, merges=merges, add_bos_token=True, **ids)


def bert_tokenizer():
    """BERT's tokenizer of transformers, with letters and a few words."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyz?.,:'"]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{x}" for x in letters), "what", "is", "the"]
    return transformers.BertTokenizer(vocab={piece: k for k, piece in enumerate(pieces)}, do_lower_case=True)


def t5_tokenizer():
    """T5's tokenizer of transformers, a Unigram model with letters and a few words."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyzADQUW?.,:'"]
    words = ["▁", *(f"▁{word}" for word in ("the", "is", "what", "cats", "picture", "star"))]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -1.0 - 0.01 * k) for k, piece in enumerate((*words, *letters))]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=2)


def save_kosmos2(folder: Path):
    """(model, processor) of a tiny Kosmos-2 with XLM-R's kind of tokenizer, saved into `folder`."""
    import transformers

    letters = [*"abcdefghijklmnopqrstuvwxyzADQUWI?.,:'0123456789[]-"]
    words = ["▁", *(f"▁{word}" for word in ("the", "is", "What", "cats", "An", "image", "of", "star"))]
    words += [f"▁word{k}" for k in range(12)]  # the ids behind <unk> stand for the image's 64 tokens
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(piece, -1.0 - 0.01 * k) for k, piece in enumerate((*words, *letters))]
    tokenizer = transformers.XLMRobertaTokenizer(vocab=pieces)
    image_processor = transformers.CLIPImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor = transformers.Kosmos2Processor(image_processor, tokenizer)
    model = model_of("kosmos2", KOSMOS | {"vocab_size": len(tokenizer)})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def _vocab_and_merges(backend) -> tuple[dict, list]:
    import json

    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


TOKEN_IDS = {"llama": {"bos_token_id": 1, "pad_token_id": 0}, "opt": {"bos_token_id": 2, "pad_token_id": 1}}
T5 = {
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}


def text_config(kind: str, vocab_size: int, eos) -> dict:
    """A language model of two blocks; `eos` is its end token or several."""
    if kind == "t5":
        return T5 | {"vocab_size": vocab_size}
    config = OPT if kind == "opt" else LLAMA
    return config | TOKEN_IDS[kind] | {"vocab_size": vocab_size, "eos_token_id": eos}


def save(name: str, folder: Path, seed: int = 0, end_token=None):
    """(model, processor) of transformers, saved into `folder`: see `SYSTEMS`."""
    import torch
    import transformers

    size = {"height": SIDE, "width": SIDE}
    if name == "llava":
        tokenizer = llama_tokenizer()
        tokenizer.add_tokens([tokenizers.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
        processor = transformers.LlavaProcessor(
            transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    else:
        if name == "instructblip":
            tokenizer = llama_tokenizer(bos_token="</s>", unk_token="</s>")
        else:
            tokenizer = opt_tokenizer() if name == "blip2_opt" else t5_tokenizer()
        image_processor = transformers.BlipImageProcessorPil(size=size)
        if name == "blip2_opt":
            processor = transformers.Blip2Processor(image_processor, tokenizer, num_query_tokens=3)
            newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
            end_token = newline if end_token is None else end_token
        else:
            processor = transformers.InstructBlipProcessor(
                image_processor, tokenizer, bert_tokenizer(), num_query_tokens=3
            )
    kind = {"blip2_opt": "opt", "instructblip_t5": "t5"}.get(name, "llama")
    text = text_config(kind, len(tokenizer), 2 if end_token is None else end_token)
    system = name.removesuffix("_opt").removesuffix("_t5")
    model = model_of(system, text, tokenizer.convert_tokens_to_ids("<image>"), seed)
    if name == "instructblip_t5":  # a T5 of small weights gives one token whatever it reads
        for key, parameter in model.language_model.named_parameters():
            parameter.data.copy_(0.8 * torch.randn_like(parameter) + ("norm" in key))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Random pictures of the models' size, so that no resizing differs."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]
