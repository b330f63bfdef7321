# SPDX-License-Identifier: Apache-2.0
"""Environment variables that libtpu reads when JAX loads it. Imports nothing, so that they can be set before that."""

import os

COMPILE_ONLY_ENV = {  # no metadata server, no log files, several processes at once
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
THREAD_STACK_FLAG = "fibers_default_thread_stack_size"  # bytes


def enlarge_thread_stack() -> None:
    """Give libtpu's threads 1 MiB of stack each, unless LIBTPU_INIT_ARGS sets the stack size.

    The default is about 64 KiB. The recursive cost estimate of fused matrix products overflows it, which ends the
    process, for train steps of BLIP-2, InstructBLIP and LION with FlanT5-XL and of MiniGPT-4.
    """
    args = os.environ.get("LIBTPU_INIT_ARGS", "")
    if THREAD_STACK_FLAG not in args:
        os.environ["LIBTPU_INIT_ARGS"] = f"{args} --{THREAD_STACK_FLAG}={2**20}".strip()
