# SPDX-License-Identifier: Apache-2.0
"""Eight virtual CPU devices, so that meshes are real; said before anything imports jax."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
