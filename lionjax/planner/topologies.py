# SPDX-License-Identifier: Apache-2.0
"""TPU topologies by name: chips, slice shapes, published peak rates, and compile-only devices.

`topology_devices` gets a slice's devices from libtpu without the hardware; programs can be compiled for them, not run.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re

from lionjax.core.types import UserError
from lionjax.planner import libtpu

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation. Rates are published peaks per JAX device, in 1e12 FLOP/s (bfloat16) and 1e9 bytes/s.

    `is_2d`: slices are 2D, else 3D. `size_unit`: what the number in a slice's name counts, "chips" or "cores" (two per
    chip). `ici_gb_per_s`: links to the neighboring chips of a slice; `dcn_gb_per_s`: network to other slices.
    """

    name: str
    aliases: tuple[str, ...]
    is_2d: bool
    size_unit: str
    hbm_gib: float
    peak_tflops: float
    hbm_gb_per_s: float
    ici_gb_per_s: float
    dcn_gb_per_s: float
    devices_per_chip: int = 1
    chip_config_name: str = "default"  # libtpu's name for the combination of a chip's cores

    @property
    def max_chips(self) -> int:
        """Number of chips of the largest slice."""
        return 256 if self.is_2d else 4096


CHIPS = (
    Chip("v4", (), False, "cores", 32, 275, 1228, 300, 6.25, chip_config_name="megacore"),
    Chip("v5e", ("v5litepod", "v5lite"), True, "chips", 16, 197, 819, 200, 3.125),
    Chip("v5p", (), False, "cores", 95, 459, 2765, 600, 6.25, chip_config_name="megacore"),
    Chip("v6e", ("trillium",), True, "chips", 32, 918, 1600, 400, 12.5),
    Chip("tpu7x", ("v7x", "ironwood"), False, "cores", 96, 1153, 3690, 600, 6.25, devices_per_chip=2),
)
# Substring of a GPU's device_kind: published dense bfloat16 rate in 1e12 FLOP/s, memory bandwidth in 1e9 bytes/s.
GPUS = {"H200": (989, 4800), "H100 PCIe": (756, 2000), "H100": (989, 3350), "A100": (312, 2039)}
EXAMPLE_NAMES = "v4-32, v5e-16, v5e-256, v5p-512, v6e-64 or tpu7x-128"


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices, each of `shape` chips (2D or 3D)."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        total = self.slices
        for size in self.shape:
            total *= size
        return total

    @property
    def devices(self) -> int:
        """Number of JAX devices in all slices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Number of hosts, of four chips each."""
        return max(1, self.chips // 4)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        text = f"{self.chip.name} {shape}, {self.chips // self.slices} chips"
        return text if self.slices == 1 else f"{self.slices} slices of {text}"


def peak_rates(device_kind: str) -> tuple[float, float] | None:
    """(bfloat16 rate in 1e12 FLOP/s, memory bandwidth in 1e9 bytes/s) by JAX's `device_kind`; None if unknown."""
    tpu_names = {"v5 lite": "v5e", "v6 lite": "v6e", "v5": "v5p", "v4": "v4", "7x": "tpu7x"}
    if device_kind.startswith("TPU"):
        name = next((name for part, name in tpu_names.items() if part in device_kind), None)
        return next(((chip.peak_tflops, chip.hbm_gb_per_s) for chip in CHIPS if chip.name == name), None)
    return next((rates for name, rates in GPUS.items() if name in device_kind), None)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """A Topology by name (v5e-16, v5litepod-256, tpu-v5p-512) or by shape (v5p:4x8x8); see `EXAMPLE_NAMES`.

    As in Cloud TPU names, the number counts TensorCores for v4, v5p and tpu7x (two per chip), and chips for v5e and
    v6e. Raises UserError for an unknown name, with the closest known one.
    """
    match = re.fullmatch(r"(?:tpu-)?([a-z0-9]+?)(?:[-:=_])([0-9x]+)", name.strip().lower())
    if match is None:
        raise UserError(f"{name!r} is no topology; write for example {EXAMPLE_NAMES}")
    kind, size = match.groups()
    chip = next((chip for chip in CHIPS if kind in (chip.name, *chip.aliases)), None)
    if chip is None:
        names = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
        closest = difflib.get_close_matches(kind, names, n=1) or ["v5e"]
        raise UserError(f"there is no TPU {kind!r}; did you mean {closest[0]}-{size}?")
    if slices < 1:
        raise UserError(f"--slices is {slices}; give at least 1")
    if "x" in size:
        return Topology(chip, _parse_shape(chip, size, name), slices)
    cores = 2 if chip.size_unit == "cores" else 1
    shapes = {_product(shape) * cores: shape for shape in slice_shapes(chip)}
    if int(size) not in shapes:
        closest = min(shapes, key=lambda number: abs(number - int(size)))
        raise UserError(f"there is no {name} (the number counts {chip.size_unit}); did you mean {chip.name}-{closest}?")
    return Topology(chip, shapes[int(size)], slices)


def slice_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The shape of the slice of each size: powers of two, as close to a square or cube as possible."""
    shapes, shape = [(1, 1)] if chip.is_2d else [], [2, 2] if chip.is_2d else [2, 2, 1]
    while _product(shape) <= chip.max_chips:
        shapes.append(tuple(shape))
        # The last of the smallest axes grows: 2x2, 2x4, 4x4, ... and 2x2x1, 2x2x2, 2x2x4, ...
        growing = max(range(len(shape)), key=lambda axis: (-shape[axis], axis))
        shape[growing] *= 2
        shape.sort() if _product(shape) > 4 else None
    return shapes


def _parse_shape(chip: Chip, text: str, name: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    num_axes = 2 if chip.is_2d else 3
    if len(shape) != num_axes or min(shape) < 1 or _product(shape) > chip.max_chips:
        example = "v5e:4x8" if chip.is_2d else "v5p:4x4x8"
        raise UserError(
            f"{name!r} needs {num_axes} sizes with a product of at most {chip.max_chips} chips, as in {example}"
        )
    return shape


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def topology_devices(topology: Topology) -> list:
    """Compile-only devices of the topology; needs libtpu but no TPU.

    Raises UserError if libtpu is missing or does not know the topology.
    """
    require_libtpu()
    for name, value in libtpu.COMPILE_ONLY_ENV.items():
        os.environ.setdefault(name, value)
    libtpu.enlarge_thread_stack()
    from jax.experimental import topologies

    chip, shape = topology.chip, topology.shape
    shape_3d = (*shape, 1)[:3]
    kwargs = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        description = topologies.get_topology_desc(
            topology_name=f"{chip.name}:{'x'.join(map(str, shape))}",
            platform="tpu",
            chip_config_name=chip.chip_config_name,
            chips_per_host_bounds=tuple(min(2, size) for size in shape_3d[:2]) + (1,),
            wrap=torus_wraparound(chip, shape_3d),
            **kwargs,
        )
    except Exception as error:
        message = str(error).strip().splitlines()[0]
        raise UserError(f"libtpu does not support {topology}: {message}; choose another --topology") from error
    return list(description.devices)


def torus_wraparound(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Axes with wrap-around links: all axes of a 3D slice of full 4x4x4 cubes; those of size 16 of a 2D slice."""
    if chip.is_2d:
        return tuple(size == 16 for size in shape)
    return (all(size % 4 == 0 for size in shape),) * 3


def has_libtpu() -> bool:
    """Whether libtpu is installed."""
    return importlib.util.find_spec("libtpu") is not None


def require_libtpu() -> None:
    """Raises UserError if libtpu is not installed."""
    if not has_libtpu():
        raise UserError("`lionjax plan` needs libtpu (no TPU needed); run `pip install 'lionjax[tpu]'`")
