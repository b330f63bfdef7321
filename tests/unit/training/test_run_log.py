# SPDX-License-Identifier: Apache-2.0
"""What a run writes for TensorBoard."""

import importlib
import sys

import numpy as np
import pytest

from lionjax.training import run_log

tensorboard = pytest.importorskip("tensorboardX")


def test_tensorboard_logs_are_written_without_importing_torch(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    writer = run_log._summary_writer_class()(str(tmp_path))
    writer.add_scalar("loss", np.float32(1.5), 3)
    writer.close()
    assert "torch" not in sys.modules
    (events,) = tmp_path.iterdir()
    assert b"loss" in events.read_bytes() and np.float32(1.5).tobytes() in events.read_bytes()


def test_torch_can_be_imported_after_the_tensorboard_writer(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    run_log._summary_writer_class()
    assert "torch" not in sys.modules  # neither there nor blocked
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert importlib.import_module("torch") is sys
    run_log._summary_writer_class()
    assert sys.modules["torch"] is sys  # left as it is where it was there
