# SPDX-License-Identifier: Apache-2.0
"""Compiled programs in the run folder: a restarted run reads them, others are left alone."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lionjax.training import compiled_programs


@pytest.fixture(autouse=True)
def no_cache_is_configured(monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, 0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def computed(workdir) -> int:
    """Run a program as a fresh process would; the number of programs read from the cache."""
    hits = []

    def listen(event, **_):
        if event.endswith("cache_hits"):
            hits.append(event)

    jax.clear_caches()
    jax.monitoring.register_event_listener(listen)
    with compiled_programs.cached_in(workdir):
        jax.block_until_ready(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((3, 3))))
    jax.monitoring.unregister_event_listener(listen)
    return len(hits)


def test_a_restart_reads_the_programs_of_the_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert computed(tmp_path) == 0
    assert computed(tmp_path) > 0
    assert jax.config.jax_compilation_cache_dir is None


def test_programs_of_another_version_are_removed_and_compiled_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    computed(tmp_path)
    (folder,) = (tmp_path / "compiled").iterdir()
    other = folder.rename(folder.with_name("jax-0.1.0-cpu"))
    assert computed(tmp_path) == 0
    assert folder.is_dir() and not other.exists()


def test_a_cut_program_is_compiled_anew(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    computed(tmp_path)
    for file in (tmp_path / "compiled").rglob("*-cache"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert computed(tmp_path) == 0


@pytest.mark.parametrize("devices, configured", [(8, None), (1, "elsewhere")])
def test_several_cpu_devices_and_a_configured_cache_are_left_alone(tmp_path, monkeypatch, devices, configured):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    jax.config.update("jax_compilation_cache_dir", configured and str(tmp_path / configured))
    computed(tmp_path)
    assert not (tmp_path / "compiled").exists()
