# SPDX-License-Identifier: Apache-2.0
"""What tests and the processes that they start ask of XLA on a CPU, where compiling takes most of the time."""

import importlib.metadata

JAXLIB = tuple(int(part) for part in importlib.metadata.version("jaxlib").split(".")[:2])
# A program in one piece for LLVM: cut in 32 for its threads it takes a seventh more of the processor's time. The older
# emitter of loops; jaxlib 0.11 has no other way and refuses the flag. With JAX_DISABLE_MOST_OPTIMIZATIONS, which leaves
# out the costly passes of LLVM, it compiles in a seventh of the time; results are the same to rounding.
XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1" + (
    " --xla_cpu_use_fusion_emitters=false" if JAXLIB < (0, 11) else ""
)

# For `jax.jit(..., compiler_options=OPTIMIZED)`: a program that runs so often that compiling it as for users pays.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} | (
    {"xla_cpu_use_fusion_emitters": True} if JAXLIB < (0, 11) else {}
)
