# SPDX-License-Identifier: Apache-2.0
"""Speed of MAGIC and ZeroCap beside the same algorithms in torch and transformers, with the same random weights.

python -m benchmarks.guided --tokenizers DIR [--tokens 16] [--beams 5] [--turns 3] [--zerocap-turns 2] [--write]

GPT-2 small and CLIP ViT-B/32, float32, one image, MAGIC with 45 candidates, ZeroCap with 5 gradient steps and 512
candidates for its first two tokens: the second is counted 14 times for a caption of 15, which ours makes with 5 beams.
DIR has the published vocabularies `gpt2_encoder.json`, `gpt2_vocab.bpe` and `clip_bpe_simple_vocab_16e6.txt.gz`. The
sides take turns in one process; medians are compared, of the clock and of the processor. `--write` puts the tables into
benchmarks/results/guided.md. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results" / "guided.md"
GOALS = {"magic": 1.5, "zerocap": 1.0, "caption": 10.0}
PROMPT = "Image of a"
CAPTION_TOKENS = 15  # of ZeroCap


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16, help="of a caption by MAGIC")
    parser.add_argument("--beams", type=int, default=5, help="of the comparison of ZeroCap")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--zerocap-turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    return parser.parse_args(argv)


def torch_models(gpt2_sizes: dict | None = None, clip_sizes: dict | None = None):
    """(GPT-2, CLIP) of transformers with random weights that learn nothing."""
    import torch
    import transformers

    torch.manual_seed(0)
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**gpt2_sizes or {})).eval()
    clip_sizes = clip_sizes or {"text_config": {"bos_token_id": 49406, "eos_token_id": 49407}}
    clip = transformers.CLIPModel(transformers.CLIPConfig(**clip_sizes)).eval()
    for model in (gpt2, clip):
        model.requires_grad_(False)
    with torch.no_grad():  # as they begin, all texts have nearly one embedding and all words one probability
        for name, weight in (*gpt2.named_parameters(), *clip.text_model.named_parameters()):
            weight += 0.02 * torch.randn_like(weight) if "ln" not in name else 0
    return gpt2, clip


def write_tokenizers(source: Path, gpt2: Path, clip: Path) -> None:
    """The published vocabularies under the names of the models' folders."""
    (gpt2 / "vocab.json").write_bytes((source / "gpt2_encoder.json").read_bytes())
    (gpt2 / "merges.txt").write_bytes((source / "gpt2_vocab.bpe").read_bytes())
    from lionjax.data.contrastive_tokenizers import openai_clip_backend

    backend = openai_clip_backend(source / "clip_bpe_simple_vocab_16e6.txt.gz")
    backend.save(str(clip / "tokenizer.json"))
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (clip / "tokenizer_config.json").write_text(json.dumps(names | {"unk_token": "<|endoftext|>"}))


class Sides:
    """The same GPT-2 and CLIP on both sides, one image, and the searches to time."""

    def __init__(self, gpt2, clip, write: Callable[[Path, Path], None]):
        import lionjax
        from benchmarks.guided_peers import Peer
        from lionjax.inference import dual_encoder

        with tempfile.TemporaryDirectory() as folder:
            folders = Path(folder) / "gpt2", Path(folder) / "clip"
            for model, own in zip((gpt2, clip), folders):
                model.save_pretrained(own)
            write(*folders)
            self.model, self.encoder = lionjax.load(folders[0]), dual_encoder.load(folders[1])
            self.encoder = dataclasses.replace(self.encoder, params=_copied(self.encoder.params))
            self.model = dataclasses.replace(
                self.model, engine=dataclasses.replace(self.model.engine, params=_copied(self.model.params))
            )
        tokens, clip_tokens = self.model.processor.tokenizer, self.encoder.tokenizer
        self.prompt = [tokens.eos_id, *tokens.encode(PROMPT)]

        def encode(texts):
            rows = clip_tokens.backend.encode_batch([str(text) for text in texts], add_special_tokens=False)
            room = clip.config.text_config.max_position_embeddings
            return [clip_tokens.truncate_and_add_special(row.ids, room) for row in rows]

        def decode(ids):
            return tokens.decode([i for i in ids if i != tokens.eos_id], keep_special=True)

        self.decode, self.peer = decode, Peer(gpt2, clip, encode, decode)
        rng = np.random.default_rng(0)
        image_E = rng.normal(size=self.encoder.config.embed_dim).astype(np.float32)
        self.image_E = image_E / np.linalg.norm(image_E)
        self.num_texts = 0

    def batch(self):
        from benchmarks.text_t5 import text_batch

        return text_batch([self.prompt], np.ones((1, len(self.prompt)), np.int32))

    def embed_texts(self, texts):
        self.num_texts += len(texts)
        return self.encoder.embed_candidates(texts)

    def magic(self, config) -> list[int]:
        from lionjax.inference.guidance import guided_search

        scorer = self.encoder.embedding_scorer(self.image_E[None])
        given = (self.batch(), config, scorer, self.decode)
        return [int(step.chosen_ids_B[0]) for step in guided_search(self.model.vlm, self.model.params, *given)]

    def zerocap(self, config, on_token=None) -> list[list[int]]:
        from lionjax.inference.zerocap import zerocap

        def candidate_texts(context, candidates):
            before = [i for i in context if i != self.prompt[0]]
            return self.model.processor.tokenizer.backend.decode_batch([[*before, i] for i in candidates])

        given = (self.batch(), self.image_E[None], self.embed_texts, candidate_texts, config)
        beams = None
        for step in zerocap(self.model.vlm, self.model.params, *given):
            beams = step.beams.ids_RM.tolist()
            if on_token is not None:
                on_token()
        return beams


def _copied(tree):
    """The arrays of a nested dict on the device, not mapped from a file."""
    import jax

    return jax.tree.map(lambda leaf: jax.device_put(np.array(leaf)), tree)


@dataclasses.dataclass
class Times:
    """Seconds by the clock and of the processor, and what has been embedded and chosen."""

    clock: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)
    num_texts: int = 0
    chosen: object = None

    @property
    def medians(self) -> tuple[float, float]:
        return statistics.median(self.clock), statistics.median(self.processor)

    def caption_seconds(self) -> tuple[float, float]:
        """Of a caption by ZeroCap, from the first and second tokens of each turn."""
        turns = np.array([self.clock, self.processor]).reshape(2, -1, 2)
        first, second = np.median(turns, axis=1).T
        return tuple(first + (CAPTION_TOKENS - 1) * second)


def measure(times: Times, call: Callable) -> None:
    """Add the seconds of each part of a call, which calls back after each part."""
    starts = [(time.perf_counter(), time.process_time())]
    times.chosen = call(lambda: starts.append((time.perf_counter(), time.process_time())))
    clock, processor = np.diff(np.array(starts), axis=0).T.tolist()
    times.clock += clock
    times.processor += processor


def time_magic(sides: Sides, config, turns: int) -> dict[str, Times]:
    """Times of a caption by side, with the tokens that it chose."""
    calls = {
        "transformers": lambda: sides.peer.magic(sides.prompt, sides.image_E, config),
        "lionjax": lambda: sides.magic(config),
    }
    short = dataclasses.replace(config, max_new_tokens=2)
    sides.peer.magic(sides.prompt, sides.image_E, short)  # warm
    sides.magic(config)  # compiled
    found = {name: Times() for name in calls}
    for _ in range(turns):
        for name, call in calls.items():

            def run(done, call=call):
                result = call()
                done()
                return result

            measure(found[name], run)
            print(name, found[name].clock, found[name].processor, flush=True)
    return found


def time_zerocap(sides: Sides, config, turns: int) -> dict[str, Times]:
    """Times of the first and second token of each turn by side, texts embedded, and the beams."""
    image = (sides.prompt, sides.image_E, config)
    calls = {
        "transformers": lambda done: sides.peer.zerocap(*image, on_token=done),
        "transformers, each text once": lambda done: sides.peer.zerocap(*image, remember=True, on_token=done),
        "lionjax": lambda done: sides.zerocap(config, done),
    }
    sides.zerocap(config)  # compiled
    found = {name: Times() for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            before = sides.num_texts + sides.peer.num_texts
            measure(found[name], call)
            found[name].num_texts = sides.num_texts + sides.peer.num_texts - before
            print(name, found[name].clock, found[name].processor, found[name].num_texts, flush=True)
    return found


def equal(found: dict[str, Times]) -> str:
    return "equal" if found["transformers"].chosen == found["lionjax"].chosen else "NOT equal"


def tables(magic: dict[str, Times], num_tokens: int, zerocap: dict[str, Times], beams: int, own: Times) -> str:
    """The tables of results, with the goals. `own`: ZeroCap here with the released number of beams."""
    header = "s a caption | of the processor | against transformers | of the processor"
    lines = [f"| MAGIC | tokens/s | {header} |", "|---|---|---|---|---|---|"]
    base = magic["transformers"].medians
    for name, times in magic.items():
        clock, processor = times.medians
        ratios = f"{base[0] / clock:.2f}x | {base[1] / processor:.2f}x"
        lines.append(f"| {name} | {num_tokens / clock:.2f} | {clock:.1f} | {processor:.1f} | {ratios} |")
    lines += ["", f"Goal {GOALS['magic']}x. The {num_tokens} tokens of both sides are {equal(magic)}.", ""]
    lines += [f"| ZeroCap, {beams} beam{'s' * (beams > 1)} | texts embedded | {header} |", "|---|---|---|---|---|---|"]
    base = zerocap["transformers"].caption_seconds()
    for name, times in zerocap.items():
        clock, processor = times.caption_seconds()
        ratios = f"{base[0] / clock:.2f}x | {base[1] / processor:.2f}x"
        lines.append(f"| {name} | {times.num_texts:,} | {clock:.0f} | {processor:.0f} | {ratios} |")
    clock, processor = own.caption_seconds()
    magic_clock, magic_processor = (s * 16 / num_tokens for s in magic["lionjax"].medians)
    lines += [
        "",
        f"Goal {GOALS['zerocap']}x. The beams of both sides are {equal(zerocap)}.",
        "",
        f"Here a caption of 16 tokens by MAGIC takes {magic_clock:.1f} s ({magic_processor:.1f} s of the processor), "
        f"one of 15 by ZeroCap\nwith 5 beams {clock:.0f} s ({processor:.0f} s): {clock / magic_clock:.0f}x, of the "
        f"processor {processor / magic_processor:.0f}x (goal {GOALS['caption']:.0f}x).",
    ]
    return "\n".join(lines)


def heading(args, load: float) -> str:
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    command = f"python -m benchmarks.guided --tokenizers DIR --tokens {args.tokens} --beams {args.beams}"
    turns = f"--turns {args.turns} --zerocap-turns {args.zerocap_turns} --write"
    lines = (
        "# MAGIC and ZeroCap against torch and transformers",
        "",
        f"GPT-2 small and CLIP ViT-B/32, random weights, float32, one image, {args.threads} threads. MAGIC: 45 "
        "candidates. ZeroCap:",
        "5 gradient steps, 512 candidates, the first two tokens, of which the second counts 14 times for a caption.",
        f"Load average {load:.0f} before the run, so only ratios count, most of all those of the processor's seconds;",
        f"torch's threads wait passively. Medians of {args.turns} and {args.zerocap_turns} alternating turns. Date: "
        f"{datetime.date.today()}. Commit: {commit}.",
        f"Peer: torch {torch.__version__}, transformers {transformers.__version__}, `benchmarks/guided_peers.py`.",
        "",
        f"`JAX_PLATFORMS=cpu {command}",
        f"{turns}`",
    )
    return "\n".join(lines) + "\n"


def main(argv=None) -> None:
    args, load = arguments(argv), os.getloadavg()[0]
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # else torch's threads spend a loaded machine's time waiting
    import torch

    from lionjax.inference.guidance import GuidanceConfig
    from lionjax.inference.zerocap import ZeroCapConfig

    torch.set_num_threads(args.threads)
    sides = Sides(*torch_models(), lambda *folders: write_tokenizers(args.tokenizers, *folders))
    magic = time_magic(sides, GuidanceConfig(args.tokens, 45), args.turns)
    end = sides.model.processor.tokenizer.encode(".")[0]
    config = ZeroCapConfig(2, args.beams, end_token_ids=(end,))
    zerocap = time_zerocap(sides, config, args.zerocap_turns)
    own, released = Times(), dataclasses.replace(config, num_beams=5)
    if args.beams != 5:
        sides.zerocap(released)  # compiled
    measure(own, lambda done: sides.zerocap(released, done))
    text = tables(magic, args.tokens, zerocap, args.beams, own)
    print(text)
    if args.write:
        RESULTS.write_text(f"{heading(args, load)}\n{text}\n")


if __name__ == "__main__":
    main()
