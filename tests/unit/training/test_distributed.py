# SPDX-License-Identifier: Apache-2.0
"""Exit codes of several processes: which errors say only that another process is gone."""

import jax
import pytest

from lionjax.training import distributed

GONE = [
    "UNAVAILABLE: failed to connect to all addresses",
    "INTERNAL: Gloo allreduce failed: Connection closed by peer [127.0.0.1]:4711",
    "DEADLINE_EXCEEDED: Barrier timed out",
    "ABORTED: The following tasks are unhealthy (stopped sending heartbeats)",
]
OWN = ["RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes", "INVALID_ARGUMENT: shapes do not agree"]


@pytest.mark.parametrize("said", GONE + OWN)
def test_only_a_lost_connection_is_an_error_of_another_process(said):
    assert distributed.is_lost_connection(jax.errors.JaxRuntimeError(said)) == (said in GONE)
    assert not distributed.is_lost_connection(RuntimeError(said))


@pytest.mark.parametrize(("said", "code"), [(GONE[1], 75), (OWN[0], 1)])
def test_a_process_that_lost_another_one_asks_for_another_try(monkeypatch, said, code):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(distributed, "initialize", lambda: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(distributed.os, "_exit", end)
    with pytest.raises(Ended) as ended, distributed.distributed_session(lambda error: (str(error), 1)):
        raise jax.errors.JaxRuntimeError(said)
    assert ended.value.args == (code,)
