# SPDX-License-Identifier: Apache-2.0
"""The NExT-Chat golden sees mistakes that are easily made: with each of them some value or gradient is another."""

import json
import sys
import types
from pathlib import Path

import golden_nextchat
import pytest
from test_golden import assert_close, assert_same_norms, folders

from lionjax import heads
from lionjax.systems import nextchat

MISTAKES = {
    "location tokens are learned as words": (
        nextchat, "batch.loss_mask_BM * (batch.target_BM != c.location_token)", "batch.loss_mask_BM",
        {"loss_lm", "loss_total"},
    ),
    "F without its last bias": (
        heads, "self.decoder(state_BKD.astype(jnp.float32))",
        "self.decoder(state_BKD.astype(jnp.float32)) - self.decoder.variables['params']['down']['bias']",
        {"predicted_boxes", "loss_box"},
    ),
    "a stop-gradient in the cycle loss": (
        nextchat, "losses.mean_of_real(jnp.square(again_BKD - trigger_BKD), real_BK)",
        "losses.mean_of_real(jnp.square(again_BKD - jax.lax.stop_gradient(trigger_BKD)), real_BK)",
        {"stage1"},
    ),
    "the box scale off by one pixel": (
        nextchat, "box_BK4 * self.c.box_scale", "box_BK4 * (self.c.box_scale - 1)", {"sam_mask_logits"},
    ),
}  # fmt: skip


def mutated(monkeypatch, module, old: str, new: str):
    """The module's text with one thing changed, run as a module of its own."""
    text = Path(module.__file__).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {module.__name__}"
    made = types.ModuleType(f"{module.__name__}_mutated")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(text.replace(old, new), module.__file__, "exec"), made.__dict__)
    return made


def complaints(golden) -> set[str]:
    """Names of the values and of the gradient files that differ from the original's."""
    found = set()
    for name in golden.theirs.keys() & golden.ours.keys():
        try:
            assert_close(golden.ours[name], golden.theirs[name], name)
        except AssertionError:
            found.add(name)
    for stage, gradients in golden.gradients.items():
        norms = json.loads((golden.folder / f"grad_norms_{stage}.json").read_text())
        try:
            assert_same_norms(gradients, norms)
        except AssertionError:
            found.add(stage)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("folder", folders("nextchat"))
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(monkeypatch, mistake, folder):
    module, old, new, seen = MISTAKES[mistake]
    changed = mutated(monkeypatch, module, old, new)
    if module is heads:
        monkeypatch.setattr(nextchat, "Locations", changed.Locations)
    else:
        for name in ("NextChat", "NextChatModule"):
            monkeypatch.setattr(golden_nextchat, name, getattr(changed, name))
    found = complaints(golden_nextchat.compute(folder))
    assert seen <= found, f"only {sorted(found)} differ"
    assert not found & {"projector_output", "logits", "last_hidden"}, "what lies before the mistake must stay"
