# SPDX-License-Identifier: Apache-2.0
"""A Lyrics golden as our configs and batches, and everything that we compute from it; each stage is compiled once."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import golden_grounding_dino
import jax
import jax.numpy as jnp
import numpy as np
from golden import in_one_row, llama_of, ram_of
from safetensors.numpy import load_file

from lionjax import convert
from lionjax.convert.formats import peft
from lionjax.convert.formats.lyrics import LYRICS
from lionjax.core import params as trees
from lionjax.core.types import Batch, PackedText
from lionjax.inference.generate import GenerationConfig, generate
from lionjax.models.connectors.mqformer import MQFormerConfig, regions_of
from lionjax.models.vision.grounding_dino import GroundingDino
from lionjax.models.vision.ram import Ram
from lionjax.models.vision.vit import ViTConfig
from lionjax.models.vlm.lyrics_stage1 import LyricsStage1, LyricsStage1Module
from lionjax.models.vlm.visual_prefix import VisualPrefixLM, VisualPrefixLMModule
from lionjax.nn.lora import LoraConfig

STAGE1_ONLY = ("qformer.bert.", "qformer.cls.", "vision_proj.", "text_proj.", "itm_head.", "temp")
STAGE2_ONLY = ("language_projection.", "language_model.", "qformer.embeddings.", "qformer.encoder.")


def parts_of(config: dict) -> dict:
    """Vision tower and MQ-Former, which both stages have."""
    v, q = config["vision"], config["mq_former"]
    vision = ViTConfig(
        v["image_size"], v["patch_size"], v["width"], v["depth"], v["heads"], v["mlp_width"], v["layer_norm_eps"]
    )
    queries = {"num_query_tokens": q["visual_queries"] + q["grounding_queries"]}
    mq_former = MQFormerConfig(
        q["width"],
        q["layers"],
        q["heads"],
        q["mlp_width"],
        cross_attention_frequency=q["cross_attention_every"],
        vision_width=q["vision_width"],
        vocab_size=q["vocab_size"],
        max_positions=q["max_positions"],
        num_grounding_queries=q["grounding_queries"],
        region_width=q["detection_width"],
        norm_eps=q["layer_norm_eps"],
        **queries,
    )
    return {"vision": vision, "qformer": mq_former, "vision_norm_eps": v["layer_norm_eps"]}


def stage1_of(config: dict) -> LyricsStage1:
    return LyricsStage1(
        **parts_of(config),
        embed_dim=config["projection_width"],
        label_smoothing=config["label_smoothing"],
        cls_token_id=config["tokens"]["cls"],
        decoder_start_token_id=config["tokens"]["bos"],
    )


def stage2_of(config: dict) -> VisualPrefixLM:
    language = llama_of(config["llama"], pad_token_id=config["llama"]["pad"])
    return VisualPrefixLM(
        **parts_of(config),
        language=language,
        feature_layer=-1,
        keep_class_token=True,
        projector_depth=1,
        image_token_id=None,
        torch_names="original",
    )


STAGES = {"stage1": (stage1_of, STAGE2_ONLY), "stage2": (stage2_of, STAGE1_ONLY)}
STAGE2_INPUTS = "prompt_ids prompt_mask answer_ids answer_mask input_ids attention_mask labels generate.input_ids"
INPUTS = (
    *("stage1.pack.", "stage1_intended.pack.", "stage1.msp_draws", "stage1.negative_", "stage2.qformer_"),
    *(f"stage2.{name}" for name in STAGE2_INPUTS.split()),
)


def picture_fields(arrays) -> dict:
    """The fields of a batch that both stages have."""
    rows = len(arrays["image"])
    ids = np.zeros((rows, 1), np.int32)
    texts = ("prompt_BL", "prompt_mask_BL", "question_BL", "question_mask_BL", "target_BM", "target_mask_BM")
    return dict.fromkeys((*texts, "loss_mask_BM"), ids) | {
        "image_BHWC": arrays["image"].transpose(0, 2, 3, 1),
        "region_BKD": arrays["detector.hidden_state"],
        "region_mask_BK": np.ones(arrays["detector.hidden_state"].shape[:2], bool),
        "task_B": np.zeros(rows, np.int32),
        "record_B": np.arange(rows, dtype=np.int32),
    }


def packed_of(arrays, mode: str) -> PackedText:
    """The packed text of the mode "stage1" or "stage1_intended", whose masking alone differs."""
    whole = {"ids_BL": "ids", "position_BL": "position_ids", "mask_BL": "attention_mask", "icg_label_BL": "labels_icg"}
    masked = {"masked_ids_BL": "ids_masked", "msp_label_BL": "labels_msp"}
    names = {field: f"stage1.pack.{name}" for field, name in whole.items()}
    names |= {field: f"{mode}.pack.{name}" for field, name in masked.items()}
    return PackedText(**{field: arrays[name].astype(np.int32) for field, name in names.items()})


def stage2_batch(arrays, prompt: str = "") -> Batch:
    text = {
        "question_BL": "qformer_input_ids",
        "question_mask_BL": "qformer_attention_mask",
        "prompt_BL": "prompt_ids",
        "prompt_mask_BL": "prompt_mask",
        "target_BM": "answer_ids",
        "target_mask_BM": "answer_mask",
        "loss_mask_BM": "answer_mask",
    }
    fields = {field: arrays[f"stage2.{name}"].astype(np.int32) for field, name in text.items()}
    # The original's answers begin with BOS, which its rows lack.
    fields |= {field: fields[field][:, 1:] for field in ("target_BM", "target_mask_BM", "loss_mask_BM")}
    if prompt:
        ids = arrays[f"stage2.{prompt}"].astype(np.int32)
        fields |= {"prompt_BL": ids, "prompt_mask_BL": np.ones_like(ids)}
    return Batch(**picture_fields(arrays) | fields)


@dataclasses.dataclass
class Golden:
    """What the original gives (`theirs`) and what we compute, under the same names; gradients under torch's."""

    folder: Path
    theirs: dict
    ours: dict
    gradients: dict[str, dict]  # {stage: {torch name: gradient}}


def load(folder: Path) -> tuple[dict, dict, dict]:
    """(config, arrays, weights) of a folder."""
    weights = load_file(folder / "weights.safetensors")
    return json.loads((folder / "config.json").read_text()), dict(np.load(folder / "arrays.npz")), weights


def tensors_of(weights: dict, without: tuple[str, ...], experts: bool = False) -> dict:
    """The tensors of a stage; the bias of the tower's keys, which changes no output, is 0."""
    without = without if experts else (*without, "ram.", "grounding_dino.")
    kept = {name: w for name, w in weights.items() if not name.startswith(without)}
    for name in (name for name in kept if re.fullmatch(r"vision_model\..*qkv\.bias", name)):
        query, key, value = np.split(kept[name], 3)
        kept[name] = np.concatenate([query, np.zeros_like(key), value])
    return kept


def params_of(system, weights: dict, without: tuple[str, ...]) -> dict:
    """Parameters of a stage from its tensors, those of the experts if the system has them."""
    tensors = tensors_of(weights, without, experts=system.detector is not None)
    return convert.params_from_state_dict(system.weight_map(), tensors)


def experts_of(config: dict) -> dict:
    return {"tagger": ram_of(config["ram"]), "detector": golden_grounding_dino.config_of(config["grounding_dino"])}


def compute_experts(folder: Path) -> tuple[dict, dict]:
    """(what the experts of a second stage compute, the original's arrays)."""
    config, theirs, weights = load(folder)
    system = dataclasses.replace(stage2_of(config), **experts_of(config))
    params = params_of(system, weights, STAGE1_ONLY)
    sizes = config | {"padded_size": np.max(config["image_sizes"], axis=0)}
    texts = ("detector.input_ids", "detector.attention_mask")
    inputs = golden_grounding_dino.inputs_of(sizes, theirs, "grounding_image", texts)
    detect = jax.jit(lambda *inputs: GroundingDino(system.detector).apply({"params": params["detector"]}, *inputs))
    found = detect(*inputs)
    logits = jax.jit(Ram(system.tagger).apply)({"params": params["tagger"]}, theirs["ram_image"].transpose(0, 2, 3, 1))
    names = {"pred_logits": found.logits_BQL, "pred_boxes": found.boxes_BQ4, "hidden_state": found.features_BQD}
    return {"ram.logits": logits} | {f"detector.{name}": np.asarray(x) for name, x in names.items()}, theirs


def with_torch_names(system, grads, lora_map=()) -> dict:
    names = (*system.weight_map(), *lora_map)
    return convert.state_dict_from_params(names, jax.tree.map(np.asarray, grads))


def compute_stage1(folder: Path, packed=packed_of) -> Golden:
    """Both ways of masking in one compilation; `packed`: the packed text, with a mistake in it."""
    config, theirs, weights = load(folder)
    system = stage1_of(config)
    params = params_of(system, weights, STAGE2_ONLY)
    negatives = (theirs["stage1.negative_image"], theirs["stage1.negative_text"])

    def loss_and_passes(params, batch):
        module = LyricsStage1Module(system)
        (loss, metrics), passes = (
            module.apply({"params": params}, batch, None, negatives),
            module.apply({"params": params}, batch, negatives, method=stage1_passes),
        )
        return loss, (metrics, passes)

    run = jax.jit(jax.value_and_grad(loss_and_passes, has_aux=True))
    ours, gradients = {}, {}
    for mode in ("stage1", "stage1_intended"):
        batch = Batch(**picture_fields(theirs), packed=packed(theirs, mode))
        (loss, (metrics, passes)), grads = run(params, batch)
        losses = {"loss": loss, **{f"loss_{name}": metrics[f"loss_{ours}"] for name, ours in LOSSES.items()}}
        found = {name: np.asarray(value) for name, value in (passes | losses).items()}
        ours |= {f"{mode}.{name}": value for name, value in cut_to_labels(found, batch.packed).items()}
        gradients[mode] = with_torch_names(system, grads)
    ours["vision_output"] = ours.pop("stage1.vision_output")
    return Golden(folder, theirs, ours, gradients)


LOSSES = {"itc": "contrast", "itm": "matching", "icg": "captions", "msp": "masked"}


def stage1_passes(module: LyricsStage1Module, batch: Batch, negatives) -> dict:
    """What each pass gives, under the original's names; texts are whole, and so are logits of words."""
    sources, rows = module.sources(batch), module.text_rows(batch)
    query_BQD, query_kv = module.encode_queries(sources)
    text_BLD = module.encode_text(rows)
    query_BQE, text_BE = module.project_queries(query_BQD), module.project_text(text_BLD)
    _, (image_to_text, text_to_image) = module.contrastive_loss(query_BQE, text_BE)
    triples = module.matching_triples(sources, rows, negatives)
    matched = module.encode_pairs(*triples)
    captions, masked = module.caption_states(batch, query_kv), module.masked_states(batch, query_kv)
    kv = {
        f"image.{what}.{layer}": pair[number].swapaxes(1, 2)
        for layer, pair in enumerate(keys_values_of_layers(query_kv, module.c.qformer))
        for number, what in enumerate(("key", "value"))
    }
    return kv | {
        "vision_output": sources[0],
        "image.hidden": query_BQD,
        "text.hidden": text_BLD,
        "image_features": query_BQE,
        "text_features": text_BE,
        "sim_i2t": image_to_text,
        "sim_t2i": text_to_image,
        "weights_i2t": module.negative_weights(image_to_text),
        "weights_t2i": module.negative_weights(text_to_image),
        "itm.query_hidden": matched,
        "itm.logits": module.match_logits(matched),
        "icg.hidden": captions,
        "msp.hidden": masked,
        "icg.logits": module.lm_logits(captions),
        "msp.logits": module.lm_logits(masked),
    }


def keys_values_of_layers(query_kv: dict, c: MQFormerConfig):
    """(keys, values) of each layer: scanned groups first, then the remaining layers."""
    groups = c.depth // c.cross_attention_frequency
    for layer in range(c.depth):
        group, member = divmod(layer, c.cross_attention_frequency)
        part, place = (query_kv["groups"], group) if group < groups else (query_kv["tail"], 0)
        yield tuple(leaf[place] for leaf in part[member])


def cut_to_labels(found: dict, packed: PackedText) -> dict:
    """Texts up to the longest and zero on padding; logits at the labels, row by row."""
    real_BL = packed.mask_BL.astype(bool)
    longest = real_BL.sum(1).max()
    for name in ("text", "icg", "msp"):
        found[f"{name}.hidden"] = (found[f"{name}.hidden"] * real_BL[..., None])[:, :longest]
    predicting = {"icg": packed.icg_label_BL[:, 1:] >= 0, "msp": packed.msp_label_BL >= 0}
    for name, labeled in predicting.items():
        logits = found.pop(f"{name}.logits")
        found[f"{name}.logits_at_labels"] = logits[:, : labeled.shape[1]][labeled]
    return found


def compute_stage2(folder: Path) -> Golden:
    """All in two compilations: without the adapter its B is 0, and an instruction that is masked is none."""
    config, theirs, weights = load(folder)
    system, lora_map, adapter = with_lora(folder, config)
    base = params_of(stage2_of(config), weights, STAGE1_ONLY)
    plain, adapted = trees.merge(base, jax.tree.map(np.zeros_like, adapter)), trees.merge(base, adapter)
    ours, gradients = {}, {}
    run = jax.jit(jax.value_and_grad(functools.partial(loss_and_states, system), has_aux=True))
    for name in ("instruct", "caption", "lora"):
        params = adapted if name == "lora" else plain
        batch, asked = (seen_by(name, stage2_batch(theirs, prompt)) for prompt in ("", "generate.input_ids"))
        (loss, states), grads = run(params, batch)
        found = {what: np.asarray(value) for what, value in states.items()}
        found["logits"] = in_one_row(
            found["logits"], batch.target_mask_BM, *prompt_lengths(system, batch), theirs[f"stage2.{name}.logits"]
        )
        found["generate"] = generated(system, params, asked, config)
        ours |= {f"stage2.{name}.{what}": value for what, value in found.items()} | {f"stage2.{name}.loss": loss}
        gradients[f"stage2_{name}"] = with_torch_names(system, grads, lora_map)
    queries_only = VisualPrefixLMModule(dataclasses.replace(stage2_of(config), read_instruction=False))
    alone = queries_only.apply({"params": plain}, stage2_batch(theirs), None, method="embed_image")
    return Golden(folder, theirs, ours | {"queries_alone": np.asarray(alone)[:, 0]}, gradients)


def seen_by(name: str, batch: Batch) -> Batch:
    """The batch, for "caption" with a masked instruction."""
    return dataclasses.replace(batch, question_mask_BL=batch.question_mask_BL * (name != "caption"))


def prompt_lengths(system: VisualPrefixLM, batch: Batch):
    """Lengths of image and prompt in each row, and where its answer starts."""
    image = system.qformer.num_query_tokens
    return image + batch.prompt_mask_BL.sum(1), image + batch.prompt_BL.shape[1]


def generated(system: VisualPrefixLM, params: dict, batch: Batch, config: dict) -> np.ndarray:
    ends = {"eos_token_id": config["llama"]["eos"], "pad_token_id": config["llama"]["pad"]}
    how = GenerationConfig(max_new_tokens=config["generate"]["max_new_tokens"], **ends)
    return np.asarray(generate(system, params, batch, how).ids_BM)


def with_lora(folder: Path, config: dict):
    """(the system with LoRA, the adapter's names, its parameters)."""
    letters = tuple(name[0] for name in config["lora"]["targets"])
    lora = LoraConfig(config["lora"]["r"], config["lora"]["alpha"], 0.0, letters)
    plain = stage2_of(config)
    system = dataclasses.replace(plain, language=dataclasses.replace(plain.language, lora=lora))
    lora_map = peft.lora_weight_map(system.weight_map(), LYRICS.abstract_params(system))
    return system, lora_map, convert.params_from_state_dict(lora_map, load_file(folder / "lora.safetensors"))


def loss_and_states(system: VisualPrefixLM, params: dict, batch: Batch):
    states = VisualPrefixLMModule(system).apply({"params": params}, batch, method=stage2_states)
    return system.loss(params, batch)[0], states


def stage2_states(module: VisualPrefixLMModule, batch: Batch) -> dict:
    x_BLD, mask_BL = module.embed_inputs(batch, None)
    row_BLD = jnp.concatenate([x_BLD, module.language.embed(batch.target_BM, x_BLD.dtype)], axis=1)
    row_mask_BL = jnp.concatenate([mask_BL, batch.target_mask_BM], axis=1)
    image_BPD, queries = module.vision_norm(module.encode_image(batch)), module.c.qformer.num_query_tokens
    question = (batch.question_BL, batch.question_mask_BL)
    query_BQD = module.qformer(image_BPD, *question, regions=regions_of(module.c.qformer, batch))[:, :queries]
    return {
        "logits": module.language.logits(module.language(row_BLD, row_mask_BL, batch.task_B)),
        "query_output": query_BQD,
        "language_inputs": x_BLD[:, :queries],
    }
