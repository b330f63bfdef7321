# SPDX-License-Identifier: Apache-2.0
"""The package is built in floors, and imports only go down. Reads the source; runs none of it.

A new file must be put on a floor below, or the test fails: say where it lives.
"""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lionjax"

FLOORS = (
    # 0: what all agree on
    "class_tags interfaces params sharding config weight_rows scaling.libtpu scaling.topologies scaling.programs "
    "convert.plan convert.tables convert.files convert.write",
    # 1: made in this order, each may use those before it
    "losses layers kernels attention adapters",
    # 2: these do not know each other; systems introduce them
    "vision vision.vit vision.sam vision.sam_masks vision.swin vision.ram vision.grounding_dino "
    "language language.decoder language.decoder_names language.t5 language.bert "
    "bridges bridges.projectors bridges.qformer bridges.latents heads",
    # 3: systems, and the conversion of whole ones
    "systems systems.prefix systems.prefix_names systems.flamingo systems.blip2 systems.lion systems.lyrics "
    "systems.nextchat convert convert.conversion convert.coverage convert.folders convert.originals "
    "convert.published convert.owl convert.kosmos convert.flamingo convert.nextchat convert.experts "
    "convert.bert convert.lora convert.prefix convert.systems convert.verify convert.runs convert.surgery "
    "convert.card convert.towers convert.placed convert.orbax convert.delta convert.lavis convert.peers",
    # 4
    "data data.drawing data.scenes data.scene_source data.scene_builder data.expressions data.wordings "
    "data.places data.turns data.tasks data.told data.pictures data.squares data.tokenizer data.tiny_tokenizer "
    "data.texts data.processors data.table data.annotations data.coco data.scienceqa data.built data.built_writer "
    "data.sources data.preparing data.beam_writer "
    "data.examples data.inspection data.pipeline training training.distributed training.stages "
    "training.start training.feature_files training.features training.journal training.fingerprints "
    "training.checkpoints training.refused training.loop training.backbones scores search generate answering "
    "evaluation evaluation.metrics evaluation.captions evaluation.answers evaluation.scoring "
    "evaluation.benchmarks evaluation.few_shot evaluation.goodput evaluation.report plots",
    # 5: where everything meets
    "model tagger scaling scaling.plans scaling.compiled scaling.apart scaling.search scaling.command convert.command "
    "cli agents demo __main__ training.language_backbone training.vision_backbone training.mask_backbone "
    "training.place_backbone",
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names.split()}
# A package stands on the floor of what it offers: `from lionjax.convert import from_torch` needs floor 3.
FOLDERS = {name.split(".")[0] for name in FLOOR if "." in name}
# But each module of a package loads its __init__, which may therefore load only what the lowest of them may.
GROUND = {f: min(FLOOR[name] for name in FLOOR if name.startswith(f + ".")) for f in FOLDERS}

# The only steps sideways that the floors themselves do not allow: (who, whom).
SIDEWAYS = {
    ("language.decoder_names", "language.decoder"),
    ("convert.systems", "convert.owl"),
    ("convert.systems", "convert.kosmos"),
    ("convert.systems", "convert.flamingo"),
    ("convert.owl", "convert.prefix"),
    ("convert.owl", "convert.published"),
    ("convert.owl", "systems"),
    ("convert.kosmos", "convert.prefix"),
    ("convert.kosmos", "convert.published"),
    ("convert.kosmos", "convert.towers"),
    ("convert.kosmos", "systems"),
    ("convert.flamingo", "convert.published"),
    ("convert.flamingo", "convert.towers"),
    ("convert.flamingo", "systems"),
    ("convert.conversion", "convert.coverage"),
    ("convert.conversion", "convert.folders"),
    ("convert.conversion", "convert.orbax"),
    ("convert.conversion", "convert.originals"),
    ("convert.conversion", "convert.published"),
    ("convert.conversion", "convert.surgery"),
    ("convert.conversion", "convert.systems"),
    ("convert.coverage", "convert.published"),
    ("convert.folders", "convert.orbax"),
    ("convert.folders", "convert.systems"),
    ("convert.originals", "convert.card"),
    ("convert.originals", "convert.folders"),
    ("convert.originals", "convert.lora"),
    ("convert.originals", "convert.published"),
    ("convert.originals", "convert.systems"),
    ("systems.prefix", "systems.prefix_names"),
    ("training.vision_backbone", "training.language_backbone"),  # whose words it is aligned with
    ("training.place_backbone", "training.language_backbone"),  # which learns a word more
    ("convert.placed", "convert.coverage"),
    ("convert.placed", "convert.folders"),
    ("convert.placed", "convert.systems"),
    ("convert.placed", "convert.orbax"),
    ("convert.surgery", "convert.card"),
    ("convert.card", "convert.lora"),
    ("convert.runs", "systems"),
    ("convert.verify", "convert.lora"),
    ("convert.verify", "convert.runs"),
    ("convert.verify", "convert.peers"),
    ("convert.peers", "systems"),
    ("convert.verify", "convert.published"),
    ("convert.verify", "convert.systems"),
    ("convert.systems", "convert.lora"),
    ("convert.systems", "convert.published"),
    ("convert.systems", "convert.nextchat"),
    ("convert.systems", "convert.experts"),
    ("convert.systems", "convert.bert"),
    ("convert.systems", "convert.prefix"),
    ("convert.systems", "convert.lavis"),
    ("convert.systems", "convert.delta"),
    ("convert.lavis", "convert.prefix"),
    ("convert.lavis", "convert.published"),
    ("convert.lavis", "convert.towers"),
    ("convert.lavis", "systems"),
    ("convert.prefix", "convert.published"),
    ("convert.prefix", "convert.towers"),
    ("convert.systems", "convert.towers"),
    ("convert.towers", "convert.published"),
    ("convert.prefix", "systems"),
    ("convert.experts", "convert.published"),
    ("convert.surgery", "convert.experts"),
    ("convert.bert", "convert.published"),
    ("convert.nextchat", "convert.published"),
    ("convert.nextchat", "systems"),
    ("convert.systems", "systems"),  # it builds the system that a checkpoint holds
    ("vision.ram", "vision.swin"),
    ("search", "scores"),
    ("generate", "scores"),
    ("generate", "search"),
    ("answering", "data"),  # questions in words become batches
    ("answering", "generate"),
    ("answering", "scores"),
    ("evaluation", "answering"),
    ("evaluation", "data"),  # the questions
    ("evaluation", "generate"),
    ("evaluation", "search"),
    ("evaluation", "scores"),
    ("evaluation", "plots"),
}
# The tiny backbones are trained with heads of their own, which are then thrown away.
KNOW_FLAX = {"sharding", *(f"training.{part}_backbone" for part in ("language", "vision", "place"))}
KNOW_NO_SYSTEM = {"data", "training", "evaluation", "scores", "search", "generate", "answering"}
ORIGINALS = {"torch", "transformers", "tensorflow"}  # only conversion knows that they exist
MODELS_OF_ELSEWHERE = {"jax", "flax", "optax", "orbax"}  # data hands numpy arrays to whoever reads


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str, source: str):
    """Each import of a source text: (full dotted name, stands inside a function)."""
    tree = ast.parse(source)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                here = ["lionjax", *module.split(".")]
                up = node.level - (module in FOLDERS)  # a package's own dot is the package
                start = ".".join([*here[: len(here) - up], *filter(None, [node.module])])
            yield from ((f"{start}.{alias.name}", id(node) in inside) for alias in node.names)


def ours(name: str) -> str | None:
    """The module of ours that a dotted name lies in: 'lionjax.vision.vit.ViT' is in 'vision.vit'."""
    parts = name.split(".")
    if parts[0] != "lionjax":
        return None
    if parts[1:] == ["load"]:
        return "model"
    parts = parts[1:]
    while parts and ".".join(parts) not in FLOOR and ".".join(parts) not in FILES:
        parts.pop()
    return ".".join(parts)


def may_step_sideways(module: str, target: str) -> bool:
    floor, folder, other = FLOOR[module], module.split(".")[0], target.split(".")[0]
    if SIDEWAYS & {(who, whom) for who in (module, folder) for whom in (target, other)}:
        return True
    if module == other:
        return True  # a package offers what its modules make
    if floor == 1:
        order = FLOORS[1].split()
        return order.index(target) < order.index(module)
    if floor in (2, 3):  # a file that was split in two keeps its first word
        return folder == other and module.split("_")[0] == target.split("_")[0]
    return floor in (0, 5) or folder == other


def complaints(module: str, source: str) -> list[str]:
    """What a module imports that it may not, each as a sentence."""
    if module not in FLOOR:
        return [f"{module} is on no floor: say where it lives, in FLOORS of {Path(__file__).name}"]
    folder, found = module.split(".")[0], []
    for name, inside in imports(module, source):
        floor = FLOOR[module] if inside else GROUND.get(module, FLOOR[module])
        root, target = name.split(".")[0], ours(name)
        if root == "flax" and module not in KNOW_FLAX and floor not in (1, 2, 3):
            found.append(f"{module} imports {name}; only sharding and floors 1 to 3 know flax")
        if root in ORIGINALS and not (inside and folder == "convert"):
            found.append(f"{module} imports {name}; only convert may, and inside a function")
        if folder == "data" and root in MODELS_OF_ELSEWHERE:
            found.append(f"{module} imports {name}; data makes numpy arrays and knows no model")
        if not target or target == module or target not in FLOOR:
            continue  # from elsewhere, or from a file that has its own complaint
        if folder == "data" and FLOOR[target] > 0 and target.split(".")[0] != "data":
            found.append(f"{module} imports {target}; data knows only floor 0")
        elif folder in KNOW_NO_SYSTEM and target.split(".")[0] == "systems":
            found.append(f"{module} imports {target}; it knows System of interfaces, no system")
        elif FLOOR[target] > floor:
            found.append(f"{module} (floor {floor}) imports {target} (floor {FLOOR[target]}) above it")
        elif FLOOR[target] == floor and not may_step_sideways(module, target):
            found.append(f"{module} imports {target}, its neighbour on floor {floor}")
    return found


@pytest.mark.parametrize("module", [name for name in FILES if name])
def test_every_module_imports_only_what_lies_below_it(module):
    assert complaints(module, FILES[module].read_text()) == []


def test_no_two_modules_import_each_other():
    graph = {
        module: {ours(name) for name, _ in imports(module, path.read_text())} - {None, "", module}
        for module, path in FILES.items()
        if module
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError with the cycle
    assert "interfaces" in graph["params"], "the reader of imports saw nothing"


@pytest.mark.parametrize(
    "module, source",
    [
        ("interfaces", "def f():\n    from lionjax import cli"),
        ("layers", "from lionjax.attention import Attention"),
        ("vision.vit", "from lionjax.language import t5"),
        ("vision.vit", "from lionjax.vision.swin import Swin"),
        ("vision.vit", "from . import swin"),
        ("systems.lion", "import lionjax.systems.nextchat"),
        ("systems.lion", "from lionjax.training import loop"),
        ("training.loop", "from ..systems.lion import Lion"),
        ("training.loop", "from lionjax.evaluation import metrics"),
        ("evaluation.benchmarks", "from lionjax import load"),
        ("data.tasks", "import jax.numpy as jnp"),
        ("data.tasks", "from lionjax.layers import Dense"),
        ("config", "from flax import linen"),
        ("training.stages", "import flax.linen as nn"),
        ("generate", "def f():\n    import torch"),
        ("scaling.plans", "def f():\n    import torch"),
        ("convert", "import torch"),
        ("convert.files", "import torch"),
        ("convert.plan", "from lionjax.convert import systems"),
        ("convert.plan", "def f():\n    from lionjax.convert import from_torch"),
        ("convert.owl", "from lionjax.convert import from_torch"),
        ("convert.owl", "from lionjax.convert.lora import merged"),
        ("convert.systems", "from lionjax.convert import command"),
        ("training.start", "from lionjax.scaling import plans"),
        ("scaling.programs", "from . import plans"),
        ("convert", "from lionjax.convert.originals import from_torch"),
        ("scaling", "from .plans import plan"),
        ("helpers", ""),
    ],
)
def test_a_forbidden_import_is_seen(module, source):
    assert len(complaints(module, source)) == 1


@pytest.mark.parametrize(
    "module, source",
    [
        ("attention", "from lionjax.layers import Dense"),
        ("vision.swin_tags", ""),
        ("vision.swin", "import flax.linen as nn\nfrom lionjax import attention"),
        ("systems.lion", "from lionjax.vision import vit\nfrom lionjax.interfaces import Batch"),
        ("evaluation.benchmarks", "from lionjax import generate, search\nfrom . import metrics"),
        ("data.tasks", "import numpy as np\nfrom lionjax.data import scenes"),
        ("convert.files", "def f():\n    import torch"),
        ("convert", "def f():\n    from lionjax.convert.originals import from_torch"),
        ("convert", "from lionjax.convert.plan import Form"),
        ("training.start", "from lionjax.convert.files import open_weights\nfrom lionjax import convert"),
        ("sharding", "from lionjax.scaling import topologies"),
        ("cli", "from lionjax import __version__, load"),
    ],
)
def test_a_proper_import_is_not_complained_of(module, source, monkeypatch):
    monkeypatch.setitem(FLOOR, "vision.swin_tags", 2)
    assert complaints(module, source) == []


def test_importing_the_package_loads_nothing_heavy():
    heavy = "torch tensorflow tensorflow_datasets grain transformers jax flax matplotlib numpy"
    code = f"import sys, lionjax.convert, lionjax.scaling; print([m for m in {heavy.split()} if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr


def test_load_and_convert_come_with_their_first_use_and_other_names_are_refused():
    code = "import lionjax; print(lionjax.convert.from_torch, lionjax.load, lionjax.__version__)\nlionjax.lode"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "from_torch" in said.stdout and "load" in said.stdout
    assert "lionjax has no attribute 'lode'" in said.stderr


@pytest.mark.parametrize("package", ["convert", "scaling"])
def test_a_package_gives_each_name_that_it_offers_and_refuses_others(package):
    loaded = importlib.import_module(f"lionjax.{package}")
    assert all(callable(getattr(loaded, name)) or name.isupper() for name in loaded.__all__)
    with pytest.raises(AttributeError, match=f"lionjax.{package} has no attribute 'lode'"):
        _ = loaded.lode
