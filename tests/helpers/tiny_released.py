# SPDX-License-Identifier: Apache-2.0
"""A tiny LLaVA, BLIP-2 over OPT and InstructBLIP as transformers saves them, with tokenizer and processor."""

from pathlib import Path

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers, trainers

TEXTS = (
    "USER: ASSISTANT: What is in the picture? Where is the red star? Describe the image in detail.\n",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, ",
    "and polite answers to the user's questions. Question: how many cats are there? Answer: two\n",
    "###Human: ###Assistant:",
)
SIDE = 28


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


def _vocab_and_merges(backend) -> tuple[dict, list]:
    import json

    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def text_config(kind: str, vocab_size: int, eos) -> dict:
    """A language model of one block; `eos` is its end token or several."""
    if kind == "opt":
        return {
            "model_type": "opt",
            "vocab_size": vocab_size,
            "hidden_size": 16,
            "word_embed_proj_dim": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 2,
            "eos_token_id": eos,
            "pad_token_id": 1,
        }
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": eos,
        "pad_token_id": 0,
    }


TOWER = {
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 14,
    "image_size": SIDE,
}
QFORMER = {
    "vocab_size": 80,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "encoder_hidden_size": 12,
}


def save(name: str, folder: Path, seed: int = 0, end_token=None):
    """(model, processor) of transformers, saved into `folder`: "llava", "blip2_opt" or "instructblip"."""
    import torch
    import transformers

    torch.manual_seed(seed)
    size = {"height": SIDE, "width": SIDE}
    if name == "llava":
        tokenizer = llama_tokenizer()
        tokenizer.add_tokens([tokenizers.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
        image_processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
        processor = transformers.LlavaProcessor(
            image_processor,
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
        config = transformers.LlavaConfig(
            vision_config=TOWER | {"model_type": "clip_vision_model"},
            text_config=text_config("llama", len(tokenizer), 2 if end_token is None else end_token),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        model = transformers.LlavaForConditionalGeneration(config)
    else:
        tokenizer = opt_tokenizer() if name == "blip2_opt" else llama_tokenizer(bos_token="</s>", unk_token="</s>")
        image_processor = transformers.BlipImageProcessorPil(size=size)
        if name == "blip2_opt":
            processor = transformers.Blip2Processor(image_processor, tokenizer, num_query_tokens=3)
            newline = tokenizer("\n", add_special_tokens=False).input_ids[0]
            end_token = newline if end_token is None else end_token
        else:
            processor = transformers.InstructBlipProcessor(
                image_processor, tokenizer, bert_tokenizer(), num_query_tokens=3
            )
        kind = "opt" if name == "blip2_opt" else "llama"
        prefix = "Blip2" if name == "blip2_opt" else "InstructBlip"
        config = getattr(transformers, f"{prefix}Config")(
            vision_config=TOWER,
            qformer_config=QFORMER,
            text_config=text_config(kind, len(tokenizer), 2 if end_token is None else end_token),
            num_query_tokens=3,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for key, bias in model.named_parameters():
        if key.endswith("qkv.bias"):  # EVA's keys have no bias
            bias.data[len(bias) // 3 : 2 * len(bias) // 3] = 0
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Random pictures of the models' size, so that no resizing differs."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]
