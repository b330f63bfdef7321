# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for lmms-eval and VLMEvalKit with just the interface that lionjax uses, and a scripted model."""

import dataclasses
import sys
import types
from pathlib import Path

from lionjax.inference.sampling import GenerationConfig

RUN_SCRIPT = """
import sys
from vlmeval.config import supported_VLM
model = supported_VLM[sys.argv[sys.argv.index("--model") + 1]]()
message = [dict(type="image", value=sys.argv[-1]), dict(type="text", value="one"), dict(type="text", value="two")]
print(model.generate(message, dataset="MMBench"), sys.argv[1:-1])
"""


class Scripted:
    """A model whose answers repeat the prompt and the width of the image; keeps what it was asked."""

    def __init__(self, reads_images=True, reply=lambda prompt, image: f"{prompt} {image.width}."):
        self.vlm = types.SimpleNamespace(info=types.SimpleNamespace(reads_images=reads_images))
        self.calls, self.reply = [], reply

    def generation_config(self, category):
        return GenerationConfig(max_new_tokens=99 if category == "image_level" else 64)

    def answer(self, images, prompts, generation_config=None, **options):
        self.calls.append((list(prompts), generation_config, [image.size for image in images], options))
        return [types.SimpleNamespace(text=self.reply(*pair)) for pair in zip(prompts, images)]

    def complete(self, prompts, generation_config=None):
        self.calls.append((list(prompts), generation_config, None, {}))
        return [types.SimpleNamespace(text=f" {prompt}\n") for prompt in prompts]

    def candidate_losses(self, images, prompts, candidates, mean=False):
        assert mean
        return [[float(len(text)) for text in some] for some in candidates]


@dataclasses.dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class LmmsModel:
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict = 0, 1, {}


class ChatMessages:
    """Messages of dicts as objects, as pydantic makes them."""

    def __init__(self, messages):
        self.messages = [
            types.SimpleNamespace(
                role=message["role"], content=[types.SimpleNamespace(**part) for part in message["content"]]
            )
            for message in messages
        ]

    def extract_media(self):
        parts = [part for message in self.messages for part in message.content]
        return tuple([part.url for part in parts if part.type == kind] for kind in ("image", "video", "audio"))


class BaseModel:
    """VLMEvalKit's base class: `generate` hands a message to `generate_inner`."""

    def generate(self, message, dataset=None):
        return self.generate_inner(message, dataset)


def module(monkeypatch, name: str, **names):
    made = types.ModuleType(name)
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)


def install_lmms_eval(monkeypatch):
    """Put the stand-in for lmms-eval where `import lmms_eval` finds it, and load our classes anew."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        module(monkeypatch, name)
    module(monkeypatch, "lmms_eval.api.model", lmms=LmmsModel)
    module(monkeypatch, "lmms_eval.protocol", ChatMessages=ChatMessages)
    module(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    monkeypatch.delitem(sys.modules, "lionjax.pipelines.serving.lmms_models", raising=False)


def install_vlmevalkit(monkeypatch, folder: Path) -> Path:
    """Put the stand-in for VLMEvalKit into sys.modules; returns its run.py, which lies beside the package."""
    (folder / "vlmeval" / "vlm").mkdir(parents=True)
    (folder / "run.py").write_text(RUN_SCRIPT)
    module(monkeypatch, "vlmeval")
    module(monkeypatch, "vlmeval.vlm", __file__=str(folder / "vlmeval" / "vlm" / "__init__.py"))
    module(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    module(monkeypatch, "vlmeval.config", supported_VLM={})
    return folder / "run.py"
