# SPDX-License-Identifier: Apache-2.0
# Sets of compiler flags by name, to be sourced: `source launch/flags.sh; use_flags overlap`. The default is none: try
# `lionjax train` without, then with one set, and keep what is faster on your pod. A name that the compiler does not
# know stops the program at its start, so that a wrong one is never silently without effect.

# Gathers of weights hidden behind products: for meshes with a wide fsdp axis.
TPU_OVERLAP="--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true \
--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true \
--xla_enable_async_all_gather=true"

# More of the chip's own memory for one fused operation: for models of wide layers on v5p and v6e.
TPU_VMEM="--xla_tpu_scoped_vmem_limit_kib=98304"

# Gradients summed over the network between slices while the backward pass still runs: for several slices.
TPU_SLICES="--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"

# Products computed twice now and then, to find a chip that gets them wrong. Costs a few per cent.
TPU_CHECKS="--xla_tpu_enable_sdc_checker=true"

# On GPUs: collectives in the background, larger ones, and loops whose next turn is fetched early.
GPU_OVERLAP="--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu_enable_while_loop_double_buffering=true \
--xla_gpu_all_gather_combine_threshold_bytes=134217728 --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728"

# use_flags NAME [NAME ...]: overlap, vmem, slices, checks for TPUs, gpu_overlap for GPUs.
use_flags() {
    local name
    for name in "$@"; do
        case "$name" in
            overlap) export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} $TPU_OVERLAP" ;;
            vmem) export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} $TPU_VMEM" ;;
            slices) export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} $TPU_SLICES" ;;
            checks) export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS:-} $TPU_CHECKS" ;;
            gpu_overlap) export XLA_FLAGS="${XLA_FLAGS:-} $GPU_OVERLAP" ;;
            *) echo "there are no flags $name; see launch/flags.sh" >&2; return 2 ;;
        esac
    done
}
