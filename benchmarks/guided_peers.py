# SPDX-License-Identifier: Apache-2.0
"""MAGIC and ZeroCap written with torch and transformers, as quick as their steps allow, for the benchmark.

Both keep the cache of keys and values, read all candidates in one batch, and pad texts to the longest of a batch. With
`remember` ZeroCap embeds no text twice in a search, as the released code does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers

from lionjax.inference.guidance import GuidanceConfig
from lionjax.inference.zerocap import ZeroCapConfig


@dataclasses.dataclass
class Peer:
    """A GPT-2 and a CLIP of transformers; `encode` maps texts to ids with start and end, `decode` ids to a text."""

    gpt2: transformers.GPT2LMHeadModel
    clip: transformers.CLIPModel
    encode: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    num_texts: int = 0  # embedded so far

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings of norm 1; in batches of 512."""
        parts = []
        with torch.no_grad():
            for start in range(0, len(texts), 512):
                rows = self.encode(texts[start : start + 512])
                longest = max(map(len, rows))
                end = self.clip.config.text_config.eos_token_id
                ids = torch.tensor([row + [end] * (longest - len(row)) for row in rows])
                found = self.clip.text_model(input_ids=ids)
                parts.append(self.clip.text_projection(found.pooler_output))
        self.num_texts += len(texts)
        text = torch.cat(parts)
        return text / text.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def magic(self, prompt: Sequence[int], image_E: np.ndarray, config: GuidanceConfig) -> list[int]:
        """The new tokens of MAGIC for one image."""
        k, alpha, beta = config.num_candidates, config.degeneration_penalty, config.image_weight
        image_E, scale = torch.tensor(image_E), float(self.clip.logit_scale.exp())
        out = self.gpt2(torch.tensor([list(prompt)]), use_cache=True, output_hidden_states=True)
        cache, logits_V, states = out.past_key_values, out.logits[0, -1], out.hidden_states[-1][0]
        states = states / states.norm(dim=-1, keepdim=True)
        chosen: list[int] = []
        for number in range(config.max_new_tokens):
            prob_K, token_K = logits_V.softmax(dim=-1).topk(k)
            cache.batch_repeat_interleave(k)
            out = self.gpt2(token_K[:, None], past_key_values=cache, use_cache=True, output_hidden_states=True)
            cache, state_KD = out.past_key_values, out.hidden_states[-1][:, 0]
            state_KD = state_KD / state_KD.norm(dim=-1, keepdim=True)
            penalty_K = (state_KD @ states.T).amax(dim=1)
            score_K = (1 - alpha) * prob_K - alpha * penalty_K
            if beta:
                texts = [self.decode([*chosen, token][-config.max_text_tokens :]) for token in token_K.tolist()]
                score_K = score_K + beta * (scale * self.embed_texts(texts) @ image_E).softmax(dim=0)
            best = int(score_K.argmax())
            chosen.append(int(token_K[best]))
            if number + 1 < config.max_new_tokens:
                cache.batch_select_indices(torch.tensor([best]))
                logits_V, states = out.logits[best, 0], torch.cat([states, state_KD[best : best + 1]])
        return chosen

    def zerocap(
        self, prompt: Sequence[int], image_E: np.ndarray, config: ZeroCapConfig, remember: bool = False, on_token=None
    ) -> list[list[int]]:
        """The new tokens of ZeroCap's beams, without forbidden tokens; `on_token` is called after each."""
        image_E, contexts = torch.tensor(image_E), [list(prompt)]
        known: dict[str, float] | None = {} if remember else None
        with torch.no_grad():
            cache = self.gpt2(torch.tensor([list(prompt[:-1])]), use_cache=True).past_key_values
        context = [(layer.keys, layer.values) for layer in cache.layers]
        score_R, length_R, done_R = torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.bool)
        for number in range(config.max_new_tokens):
            last = torch.tensor([[row[-1]] for row in contexts])
            with torch.no_grad():
                plain_RV, cache = self._read(last, context)
            unshifted_RV = plain_RV.log_softmax(dim=-1)
            logits_RV = self._shifted(last, context, unshifted_RV, contexts, image_E, config, known)
            log_prob_RV = self._fused(
                plain_RV if logits_RV is None else logits_RV, unshifted_RV, contexts, config, number
            )
            log_prob_RV[done_R] = -torch.inf
            log_prob_RV[done_R, config.finished_token_id] = 0.0
            length_R = length_R + (~done_R)
            mean = (score_R[:, None] + log_prob_RV) / length_R[:, None]
            mean_R, index_R = mean.flatten().topk(config.num_beams)
            parent_R, token_R = index_R // plain_RV.shape[1], index_R % plain_RV.shape[1]
            length_R = length_R[parent_R]
            score_R = mean_R * length_R
            contexts = [[*contexts[parent], token] for parent, token in zip(parent_R.tolist(), token_R.tolist())]
            done_R = done_R[parent_R] | torch.isin(token_R, torch.tensor(config.end_token_ids, dtype=torch.long))
            context = [(layer.keys[parent_R], layer.values[parent_R]) for layer in cache.layers]
            if on_token is not None:
                on_token()
            if bool(done_R.all()):
                break
        return [row[len(prompt) :] for row in contexts]

    def _read(self, last: torch.Tensor, context):
        """Logits (R, V) of the next token, and the cache with the last one."""
        cache = transformers.DynamicCache()
        for layer, (key, value) in enumerate(context):
            cache.update(key, value, layer)
        out = self.gpt2(last, past_key_values=cache, use_cache=True)
        return out.logits[:, -1], out.past_key_values

    def _shifted(self, last, context, unshifted_RV, contexts, image_E, config: ZeroCapConfig, known):
        """Logits (R, V) after the gradient steps; None without any."""
        if not config.num_iterations:
            return None
        flat = [part for pair in context for part in pair]
        shifts = [torch.zeros_like(part) for part in flat]

        def logits_of(shifts):
            moved = [part + shift for part, shift in zip(flat, shifts)]
            return self._read(last, list(zip(moved[::2], moved[1::2])))[0]

        for _ in range(config.num_iterations):
            leaves = [shift.requires_grad_(True) for shift in shifts]
            log_prob_RV = logits_of(leaves).log_softmax(dim=-1)
            token_RK = log_prob_RV.detach().topk(config.num_candidates, dim=1).indices
            target_RK = (self._cosines(contexts, token_RK, image_E, known) / config.temperature).softmax(dim=1)
            image_loss = -(target_RK * log_prob_RV.gather(1, token_RK)).sum()
            fluency = (log_prob_RV.exp() * (log_prob_RV - unshifted_RV)).sum()
            loss = config.image_weight * image_loss + config.fluency_weight * fluency
            with torch.no_grad():
                shifts = [
                    shift.detach()
                    - config.step_size
                    * grad
                    / (grad.flatten(1).norm(dim=1)[:, None, None, None] + 1e-15) ** config.norm_power
                    for shift, grad in zip(leaves, torch.autograd.grad(loss, leaves))
                ]
        with torch.no_grad():
            return logits_of(shifts)

    def _cosines(self, contexts, token_RK, image_E, known) -> torch.Tensor:
        texts = [self.decode([*row, token]) for row, tokens in zip(contexts, token_RK.tolist()) for token in tokens]
        if known is None:
            return (self.embed_texts(texts) @ image_E).reshape(token_RK.shape)
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known |= dict(zip(new, (self.embed_texts(new) @ image_E).tolist()))
        return torch.tensor([known[text] for text in texts]).reshape(token_RK.shape)

    def _fused(self, logits_RV, unshifted_RV, contexts, config: ZeroCapConfig, number: int) -> torch.Tensor:
        """Log-probabilities of both distributions together, each row's summing to 1."""
        edited_RV = logits_RV.clone()
        factor = config.end_factor if number else 1 / config.first_end_penalty
        for row, ids in zip(edited_RV, contexts):
            edits = [(i, 1 / config.repetition_penalty) for i in set(ids[-config.repetition_window :])]
            for i, f in (*edits, *((i, factor) for i in config.end_token_ids)):
                row[i] = row[i] * f if row[i] > 0 else row[i] / f
        fused_RV = config.fusion * edited_RV.log_softmax(dim=-1) + (1 - config.fusion) * unshifted_RV
        return fused_RV.log_softmax(dim=-1)
