# SPDX-License-Identifier: Apache-2.0
"""JAX's persistent compilation cache in the run folder, so that a restarted run does not compile again."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from lionjax.training import distributed

FOLDER = "compiled"


@contextlib.contextmanager
def cached_in(workdir: Path) -> Iterator[None]:
    """Context: programs that took a second or more to compile are kept in `workdir`/compiled and read from there.

    Nothing changes where a cache is configured (JAX_COMPILATION_CACHE_DIR) or switched off
    (JAX_ENABLE_COMPILATION_CACHE=false), or on several CPU devices, for which XLA has crashed in reading programs.
    Those of another version of jax or another kind of processor are removed.
    """
    is_configured = jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache
    if is_configured or (jax.default_backend() == "cpu" and jax.device_count() > 1):
        yield
        return
    folder = workdir / FOLDER / _environment_name()
    if distributed.is_main_process() and folder.parent.is_dir():
        for other in folder.parent.iterdir():
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()


def _environment_name() -> str:
    """The version of jax and, on a CPU, its instruction set: a program for another processor may crash."""
    backend = jax.default_backend()
    if backend != "cpu":
        return f"jax-{jax.__version__}-{backend}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0] if lines else "")
    return f"jax-{jax.__version__}-cpu-{hashlib.sha256(features.encode()).hexdigest()[:8]}"
