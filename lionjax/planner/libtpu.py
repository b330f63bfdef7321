# SPDX-License-Identifier: Apache-2.0
"""What libtpu reads from its surroundings as JAX loads it. Loads nothing itself, so that it can be said in time."""

import os

COMPILE_ONLY_ENV = {  # no questions to a network, no logs, several programs at once
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
THREAD_STACK_FLAG = "fibers_default_thread_stack_size"  # of its threads, in bytes


def enlarge_thread_stack() -> None:
    """Give libtpu's threads 1 MiB of stack each, unless LIBTPU_INIT_ARGS says otherwise.

    By default they have about 64 KiB, and the estimate of what fused products cost calls itself deeper than that for
    updates of BLIP-2, InstructBLIP and LION around FlanT5-XL and of MiniGPT-4: it would end the process.
    """
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    if THREAD_STACK_FLAG not in given:
        os.environ["LIBTPU_INIT_ARGS"] = f"{given} --{THREAD_STACK_FLAG}={2**20}".strip()
