# SPDX-License-Identifier: Apache-2.0
"""What holds for every test; it is read before anything imports jax."""

import gc
import os
import re
import signal
import sys
from pathlib import Path

import pytest

# Helpers assert as well; pytest shows what differs only in modules that it has rewritten.
pytest.register_assert_rewrite(*(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py")))

import compile_flags

# A shell that starts the tests in the background has Ctrl-C ignored, and so would everything they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Eight virtual devices on the CPU, so that meshes are real ones. On a busy machine they wait for each other for
# long; XLA would end the process after 40 seconds. They share a pool of threads, by itself one a device, in which
# exchanges that wait for a device can leave that device no thread to come with: hence a larger pool.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "32")
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=280 "
    + compile_flags.XLA_FLAGS,
)
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Without the Python lines of each operation a program for several devices compiles in four fifths of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Photographs, annotations and real tokenizers are no part of the project; where a machine has
# them beside the checkout, the tests that need them run.
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "data"
if BESIDE.is_dir():
    os.environ.setdefault("LIONJAX_DATA", str(BESIDE))


@pytest.fixture(scope="module", autouse=True)
def programs_go_with_their_file():
    """Drop what a file of tests compiled: each program holds maps of memory, of which a process may have 65,530 by
    Linux' own limit. A process that kept those of all files was seen with half of that, and one has crashed in XLA."""
    yield
    if jax := sys.modules.get("jax"):
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a run of a tiny LION that has ended; a file's own copy, which its tests may write to."""
    import small_lion

    folder = tmp_path_factory.mktemp("runs") / "run"
    small_lion.finished(folder, small_lion.experiment())
    return folder


@pytest.fixture(scope="module")
def finished_model(finished_run):
    """The model of `finished_run`."""
    import lionjax

    return lionjax.load(finished_run)


def pytest_collection_modifyitems(items):
    """Mark the tests that want shared data, so that `-m shared_data` runs only these.

    An address in a test's name differs in each process, so that several could not share the tests: it is refused.
    """
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} has an address in its name; give its parameters ids")
        if any("$LIONJAX_DATA" in str(mark.kwargs.get("reason")) for mark in item.iter_markers("skipif")):
            item.add_marker("shared_data")


def pytest_collection_finish():
    """Let garbage collection pass over what all files imported, and come less often: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_terminal_summary(terminalreporter):
    """Say at the end what did not run for want of what is no part of the project.

    Reports of worker processes arrive here as well, so it is the same under pytest-xdist.
    """
    skipped = terminalreporter.stats.get("skipped", [])
    peers, data = without_peers(skipped), without_data(skipped)
    if not peers and not data:
        return
    terminalreporter.section("not compared")
    if peers:
        terminalreporter.line(peers)
    if data:
        terminalreporter.line(f"{len(data)} skipped for want of shared data ($LIONJAX_DATA):")
        for name in data:
            terminalreporter.line(f"  {name}")


def reason_of(report) -> str:
    """Why a test, or a whole file of tests, was skipped."""
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


def without_peers(skipped) -> str:
    """One line about what was skipped because torch or transformers is missing, or ""."""
    lacking = re.compile(r"could not import '(torch|transformers)\b")
    found = [report for report in skipped if lacking.search(reason_of(report))]
    files = sorted({report.nodeid for report in found if "::" not in report.nodeid})
    tests = sum("::" in report.nodeid for report in found)
    if not found:
        return ""
    whole = f" and {len(files)} whole files ({', '.join(files)})" if files else ""
    return f"{tests} tests{whole} skipped for want of torch or transformers"


def without_data(skipped) -> list[str]:
    """Names of the tests that were skipped because shared data is missing."""
    return sorted({r.nodeid for r in skipped if "$LIONJAX_DATA" in reason_of(r)})
