# SPDX-License-Identifier: Apache-2.0
"""What the goldens of MAGIC and ZeroCap share: a tiny GPT-2, and a tiny CLIP by transformers that scores texts."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.text_t5 import text_batch
from lionjax import convert
from lionjax.models.language import decoder_weights
from lionjax.models.language.decoder import GPT2
from lionjax.models.vlm.text_lm import TextLM


class GuidedGolden:
    """A folder's language model with its parameters, and the text tower of its CLIP."""

    def __init__(self, folder, **token_ids):
        self.config = json.loads((folder / "config.json").read_text())
        self.arrays = dict(np.load(folder / "arrays.npz"))
        weights = load_file(folder / "weights.safetensors")
        g = self.config["gpt2"]
        language = dataclasses.replace(
            GPT2,
            vocab_size=g["vocab_size"],
            width=g["width"],
            mlp_dim=g["mlp_width"],
            depth=g["layers"],
            num_heads=g["heads"],
            num_kv_heads=g["heads"],
            head_dim=g["width"] // g["heads"],
            max_positions=g["max_positions"],
            norm_eps=g["layer_norm_eps"],
            **{field: self.config["tokens"][name] for field, name in token_ids.items()},
        )
        self.model = TextLM(language)
        state = {k.removeprefix("gpt2."): v for k, v in weights.items() if k.startswith("gpt2.")}
        self.params = convert.params_from_state_dict(decoder_weights.gpt2_weight_map(language), state)
        self.clip = {k.removeprefix("clip."): v for k, v in weights.items() if k.startswith("clip.")}

    def decode(self, ids) -> str:
        return "".join(self.config["tokens"]["pieces"][i] for i in ids)

    def tower_sizes(self, tower: str) -> dict:
        """Fields that the config of a CLIP's text or vision tower has in transformers."""
        sizes = self.config["clip"][tower]
        return {
            "hidden_size": sizes["width"],
            "intermediate_size": sizes["mlp_width"],
            "num_hidden_layers": sizes["layers" if tower == "text" else "depth"],
            "num_attention_heads": sizes["heads"],
            "hidden_act": sizes["activation"],
            "layer_norm_eps": sizes["layer_norm_eps"],
            "projection_dim": self.config["clip"]["projection_dim"],
        }

    def text_tower(self):
        """The function from padded ids and their mask to embeddings, as they are, by transformers."""
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        t, ids = self.config["clip"]["text"], self.config["clip_tokens"]
        config = transformers.CLIPTextConfig(
            **self.tower_sizes("text"),
            vocab_size=t["vocab_size"],
            max_position_embeddings=t["max_positions"],
            eos_token_id=ids["eos"],
            bos_token_id=ids["bos"],
        )
        tower = transformers.CLIPTextModelWithProjection(config).eval()
        found = tower.load_state_dict({k: torch.tensor(v) for k, v in self.clip.items() if k in tower.state_dict()})
        assert not found.missing_keys

        def embed(ids, mask=None):
            with torch.no_grad():
                mask = None if mask is None else torch.tensor(mask)
                return tower(input_ids=torch.tensor(ids), attention_mask=mask).text_embeds.numpy()

        return embed


def prompts(rows, length: int):
    """A batch of prompts, padded on the right."""
    ids_BL = np.array([row + [0] * (length - len(row)) for row in rows])
    return text_batch(ids_BL, np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows]))
