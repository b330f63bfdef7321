# SPDX-License-Identifier: Apache-2.0
"""ZeroCap with the tiny models of a golden's folder, and where it differs from the released code."""

import dataclasses
import itertools

import numpy as np
import pytest
from golden import assert_close
from golden_guidance import GuidedGolden, prompts

from lionjax.inference import zerocap
from lionjax.inference.zerocap import ZeroCapConfig, combine_images

BOS_TEXT = "<|endoftext|>"


class ZeroCapGolden(GuidedGolden):
    """A folder of ZeroCap's: `run` a case."""

    def __init__(self, folder):
        super().__init__(folder, bos_token_id="bos", eos_token_id="end")
        self.tower = self.text_tower()
        self.results = {}  # of the whole cases

    def embed_texts(self, texts) -> np.ndarray:
        t, length = self.config["clip_tokens"], self.config["clip"]["text"]["max_positions"]
        ids = np.full((len(texts), length), t["pad"])
        for row, text in zip(ids, texts):
            own = [t["characters"].index(c) + t["first_character_id"] for c in text.strip()][: length - 2]
            row[: len(own) + 2] = [t["bos"], *own, t["eos"]]
        return self.tower(ids)

    def candidate_texts(self, context, candidates) -> list[str]:
        before = self.decode(context).replace(BOS_TEXT, "")
        return [before + self.decode([token]) for token in candidates]

    def image_E(self, case: str) -> np.ndarray:
        """The embedding of a case's images together, by transformers' vision tower, divided by its norm."""
        torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
        v = self.config["clip"]["vision"]
        config = transformers.CLIPVisionConfig(
            **self.tower_sizes("vision"), image_size=v["image_size"], patch_size=v["patch_size"]
        )
        tower = transformers.CLIPVisionModelWithProjection(config).eval()
        tower.load_state_dict({k: torch.tensor(v) for k, v in self.clip.items() if k in tower.state_dict()})
        s = self.config["cases"][case]
        with torch.no_grad():
            image_NE = tower(torch.tensor(self.arrays["images"][s["images"]])).image_embeds.numpy()
        image_E = combine_images(image_NE, s["weights"] or [1.0])
        return image_E / np.linalg.norm(image_E)

    def settings(self, case: str, **changes) -> ZeroCapConfig:
        s, tokens = self.config["settings"] | self.config["cases"][case]["mods"], self.config["tokens"]
        return ZeroCapConfig(
            max_new_tokens=s["target_seq_length"],
            num_beams=self.config["cases"][case]["beam"],
            num_iterations=s["num_iterations"],
            num_candidates=self.config["top_size"],
            temperature=s["clip_loss_temperature"],
            image_weight=s["clip_scale"],
            fluency_weight=s["ce_scale"],
            step_size=s["stepsize"],
            norm_power=s["grad_norm_factor"],
            fusion=s["fusion_factor"],
            normalization="batch",
            repetition_penalty=s["repetition_penalty"],
            repetition_window=self.config["repetition_window"],
            end_token_ids=(tokens["end"],),
            first_end_penalty=self.config["start_factor"],
            end_factor=s["end_factor"],
            forbidden_token_ids=tuple(self.arrays["forbidden_tokens"].tolist()),
            forbidden_penalty=s["forbidden_factor"],
            finished_token_id=tokens["finished_beams_add"],
        )

    def run(self, case: str, code=zerocap, count: int | None = None, **changes):
        """(`count` first steps, captions of the last) of a case; `code`: the module, or a mutation of it."""
        is_whole = code is zerocap and count is None and not changes
        if is_whole and case in self.results:
            return self.results[case]
        context = self.arrays[f"{case}.context_ids"][0].tolist()
        image_BE = self.arrays[f"{case}.image_features"]
        config = dataclasses.replace(self.settings(case), **changes)
        given = (prompts([context], len(context)), image_BE, self.embed_texts, self.candidate_texts, config)
        steps = list(itertools.islice(code.zerocap(self.model, self.params, *given), count))
        (captions,) = code.rank_captions(steps[-1].beams, image_BE, self.embed_texts, self.decode)
        if is_whole:
            self.results[case] = steps, captions
        return steps, captions

    def compare(self, case: str, code=zerocap, count: int | None = None):
        """{name: value} of the first steps of a case, under the golden's names."""
        steps, captions = self.run(case, code, count)
        return self._of_steps(case, steps) | self._of_captions(case, steps, captions)

    def complaints(self, case: str, found: dict) -> set[str]:
        """Names of the values that differ from the released code's, of those that the golden has."""
        differing = set()
        for name, mine in found.items():
            theirs = self.arrays.get(f"{case}.{name}")
            if theirs is None:
                continue
            try:
                assert mine.shape == theirs.shape, f"{name}: {mine.shape}, the original {theirs.shape}"
                if name.endswith("ids"):
                    np.testing.assert_array_equal(mine, theirs)
                else:
                    assert_close(mine, theirs, name, 2e-4 if name.endswith(("deltas", "clip_target")) else 1e-4)
            except AssertionError:
                differing.add(name)
        return differing

    def _of_steps(self, case: str, steps) -> dict:
        found = {}
        for number, step in enumerate(steps):
            found[f"step{number}.context_ids"] = np.array(step.contexts)
            found[f"step{number}.p0"] = np.exp(step.unshifted_RV)
            found[f"step{number}.probs"] = np.exp(step.log_prob_RV)
            found[f"step{number}.logits_before_edit"] = step.logits_RV
            found[f"step{number}.logits_after_edit"] = step.edited_logits_RV
            if not step.iterations:
                continue
            first, each = step.iterations[0], step.iterations
            found[f"step{number}.shifted_probs"] = np.exp([one.log_prob_RV for one in each])
            found[f"step{number}.clip_losses"] = np.array([one.image_loss_R for one in each])
            found[f"step{number}.ce_losses"] = np.array([one.fluency_loss_R for one in each])
            sums = np.array([one.image_loss_R + one.fluency_loss_R for one in each])
            found[f"step{number}.losses"] = sums.sum(axis=1)
            found[f"step{number}.top_ids"] = np.asarray(first.token_ids_RK)
            found[f"step{number}.clip_target"] = first.target_RK
            length = len(step.contexts[0]) - 1
            deltas = np.array([np.stack(one.shift, axis=1) for one in each])
            prompt = self.arrays[f"{case}.context_ids"].shape[1]
            # The prompt's last token is read behind the slots of the prompt, of which the last stays free.
            slots = [*range(prompt - 1), *range(prompt, length + 1)]
            assert not np.delete(deltas, slots, axis=5).any(), "free slots have a shift"
            found[f"step{number}.deltas"] = deltas[..., slots, :]
        return found

    def _of_captions(self, case: str, steps, captions) -> dict:
        beams = steps[-1].beams
        context = self.arrays[f"{case}.context_ids"]
        ids = np.concatenate([np.repeat(context, len(beams.ids_RM), axis=0), beams.ids_RM], axis=1)
        return {
            "output_ids": ids,
            "mean_log_prob": np.array([caption.mean_log_prob for caption in captions]),
            "clip_similarity": np.array([caption.similarity for caption in captions]),
        }
