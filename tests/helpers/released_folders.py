# SPDX-License-Identifier: Apache-2.0
"""Tiny released folders made by transformers: weights, tokenizer, processor, chat template, generation config."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SYSTEMS = ("llava", "blip2", "instructblip", "kosmos2", "llama")
SIDE, PATCH, VOCABULARY = 28, 14, 64
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)
TEXTS = {
    "llava": "user : <image> w7 w9 assistant :",
    "blip2": "w7 w9 w12",
    "instructblip": "w7 w9 w12",
    "kosmos2": "<grounding> w7 w9",
    "llama": "w7 w9 w12",
}


LLAMA_ORDER, KOSMOS_ORDER = ("<unk>", "<s>", "</s>", "<pad>"), ("<s>", "<pad>", "</s>", "<unk>")


def tokenizer_of(num_words: int, special: tuple[str, ...] = (), first: tuple[str, ...] = LLAMA_ORDER):
    """A word tokenizer with the four tokens of `first`, w4 w5 ..., and `special` last; a text begins with `<s>`."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {token: k for k, token in enumerate(first)} | {f"w{k}": k for k in range(4, num_words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([*first, *special])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "model_type": "opt",
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "word_embed_proj_dim": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KOSMOS = {
    "vocab_size": 1088,
    "embed_dim": 16,
    "layers": 2,
    "ffn_dim": 20,
    "attention_heads": 2,
    "max_position_embeddings": 256,
}
TOWER = {
    "image_size": SIDE,
    "patch_size": PATCH,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
}
QFORMER = {
    "vocab_size": 80,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 12,
}


def model_of(name: str, text: dict | None = None, image_token: int = 50, seed: int = 0):
    """The random model in transformers, in eval mode; every weight is moved off zero and one.

    `text`: the config of the language model inside a vision-language model.
    """
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    text = dict(text or {"blip2": OPT, "kosmos2": KOSMOS}.get(name, LLAMA))
    if name == "llava":
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=TOWER | {"model_type": "clip_vision_model"},
                text_config=text,
                image_token_index=image_token,
                vision_feature_layer=-2,
                image_seq_length=4,
            )
        )
    elif name == "kosmos2":
        model = hf.Kosmos2ForConditionalGeneration(
            hf.Kosmos2Config(
                text_config=text, vision_config=dict(TOWER), latent_query_num=64
            )  # as the processor writes
        )
    elif name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}))
    else:
        prefix = "Blip2" if name == "blip2" else "InstructBlip"
        parts = {"vision_config": dict(TOWER), "qformer_config": dict(QFORMER), "text_config": text}
        config = getattr(hf, f"{prefix}Config")(**parts, num_query_tokens=3, image_token_index=image_token)
        model = getattr(hf, f"{prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
            if key.endswith("qkv.bias"):  # EVA has no bias on its keys
                parameter[len(parameter) // 3 : 2 * len(parameter) // 3] = 0
    return model.eval()


def processor_of(name: str):
    """transformers' processor of that system; a tokenizer for the text model."""
    import transformers as hf

    clip = hf.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    blip = hf.BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    if name == "llava":
        return hf.LlavaProcessor(
            clip,
            tokenizer_of(50, ("<image>",)),
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=CHAT_TEMPLATE,
        )
    if name == "blip2":
        return hf.Blip2Processor(blip, tokenizer_of(50, ("<image>",)), num_query_tokens=3)
    if name == "instructblip":
        tokenizers = tokenizer_of(50, ("<image>",)), tokenizer_of(40)
        return hf.InstructBlipProcessor(blip, *tokenizers, num_query_tokens=3)
    if name == "kosmos2":
        return hf.Kosmos2Processor(clip, tokenizer_of(40, first=KOSMOS_ORDER))
    tokenizer = tokenizer_of(50)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_released(name: str, folder: Path):
    """Save model and processor as `folder`, as transformers publishes them; returns the model."""
    model = model_of(name)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder)
    processor_of(name).save_pretrained(folder)
    return model


def save_in_earlier_layout(folder: Path) -> None:
    """Rewrite the processor files as transformers wrote them before version 5, with preprocessor_config.json apart."""
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    image_settings = settings.pop("image_processor") | {"processor_class": settings["processor_class"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(image_settings))
    file.write_text(json.dumps(settings))


def remaining_sizes(folder: Path, side: int) -> list[str]:
    """The fields of all JSON settings in a folder, as "file: path", that still are `side` pixels."""

    def fields(value, path):
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [found for key, inner in items for found in fields(inner, f"{path}.{key}")] + [path] * (value == side)

    names = ("config.json", "preprocessor_config.json", "processor_config.json")
    files = [folder / name for name in names if (folder / name).is_file()]
    return [found for file in files for found in fields(json.loads(file.read_text()), file.name)]


def auto_model(name: str, folder: Path):
    """The model of a folder, by the Auto class of its task."""
    import transformers

    auto = transformers.AutoModelForCausalLM if name == "llama" else transformers.AutoModelForImageTextToText
    return auto.from_pretrained(folder).eval()


def logits_behind_the_image(system, params, inputs: dict, their_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ours, theirs): the logits that predict the text behind the image, for the inputs of transformers' processor."""
    import jax
    import jax.numpy as jnp

    from lionjax.core.types import Batch

    ids = inputs["input_ids"][0].astype(np.int32)
    mask = inputs.get("image_embeds_position_mask")
    is_image = (ids == system.image_token_id) if mask is None else mask[0].astype(bool)
    start = int(np.argmax(is_image))
    end = start + int(is_image.sum())
    prompt, target = [*ids[:start], system.image_token_id], ids[end:]
    question = inputs.get("qformer_input_ids", np.zeros((1, 1)))[0]
    texts = [(jnp.asarray(text, jnp.int32)[None], jnp.ones((1, len(text)), jnp.int32)) for text in (prompt, question)]
    target_mask, zero = jnp.ones((1, len(target)), jnp.int32), jnp.zeros(1, jnp.int32)
    batch = Batch(
        jnp.asarray(inputs["pixel_values"].transpose(0, 2, 3, 1)),
        *(*texts[0], *texts[1], jnp.asarray(target, jnp.int32)[None], target_mask, target_mask, zero, zero),
    )
    ours = np.asarray(jax.jit(system.logits)(params, batch))[:, : len(target)]
    return ours[..., : system.language.vocab_size], their_logits[:, end - 1 : -1]


def picture(width: int = 40, height: int = 61) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def open_processor(folder: Path):
    """AutoProcessor of a folder, with the image processor that needs no torchvision."""
    import transformers

    return transformers.AutoProcessor.from_pretrained(folder)


def processed(name: str, processor) -> dict:
    """What a processor gives for a picture and a text, as arrays."""
    images = {} if name == "llama" else {"images": picture()}
    made = processor(text=TEXTS[name], **images, return_tensors="np" if name == "llama" else "pt")
    return {key: np.asarray(value) for key, value in made.items()}
