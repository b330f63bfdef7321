# SPDX-License-Identifier: Apache-2.0
"""TPU slices by the names people give them: how many chips, how they lie, and what a chip can do at best.

`devices` asks libtpu for a slice that is not there: devices for which programs can be compiled, and nothing more.
Figures of chips are those that the maker publishes.
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
    """One generation. Rates are of one device as JAX counts them, in units of 1e12 FLOP/s (bfloat16) and 1e9 bytes/s.

    `parts`: devices of a chip. `counts`: what the number in a slice's name counts, "chips" or "cores" (two a chip).
    `flat`: chips lie in a plane, not in a cuboid. `links`: to the chips beside it, `network`: to other slices.
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
    chip_config_name: str = "default"  # libtpu's word for how the cores of a chip go together

    @property
    def max_chips(self) -> int:
        """Chips of the largest slice."""
        return 256 if self.is_2d else 4096


CHIPS = (
    Chip("v4", (), False, "cores", 32, 275, 1228, 300, 6.25, chip_config_name="megacore"),
    Chip("v5e", ("v5litepod", "v5lite"), True, "chips", 16, 197, 819, 200, 3.125),
    Chip("v5p", (), False, "cores", 95, 459, 2765, 600, 6.25, chip_config_name="megacore"),
    Chip("v6e", ("trillium",), True, "chips", 32, 918, 1600, 400, 12.5),
    Chip("tpu7x", ("v7x", "ironwood"), False, "cores", 96, 1153, 3690, 600, 6.25, devices_per_chip=2),
)
# One GPU by what it calls itself: its published dense rate in bfloat16 and its memory's, in the same units.
GPUS = {"H200": (989, 4800), "H100 PCIe": (756, 2000), "H100": (989, 3350), "A100": (312, 2039)}
EXAMPLE_NAMES = "v4-32, v5e-16, v5e-256, v5p-512, v6e-64 or tpu7x-128"


@dataclasses.dataclass(frozen=True)
class Topology:
    """`slices` equal slices of chips that lie in `shape`."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """Chips of all slices together."""
        total = self.slices
        for size in self.shape:
            total *= size
        return total

    @property
    def devices(self) -> int:
        """What JAX counts."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Machines of four chips each."""
        return max(1, self.chips // 4)

    def __str__(self) -> str:
        lies = "x".join(map(str, self.shape))
        one = f"{self.chip.name} {lies}, {self.chips // self.slices} chips"
        return one if self.slices == 1 else f"{self.slices} slices of {one}"


def peak_rates(device_kind: str) -> tuple[float, float] | None:
    """(1e12 FLOP/s in bfloat16, 1e9 bytes/s) of one device by JAX's `device_kind`; None for one that is not known."""
    spoken = {"v5 lite": "v5e", "v6 lite": "v6e", "v5": "v5p", "v4": "v4", "7x": "tpu7x"}
    if device_kind.startswith("TPU"):
        name = next((name for word, name in spoken.items() if word in device_kind), None)
        return next(((chip.peak_tflops, chip.hbm_gb_per_s) for chip in CHIPS if chip.name == name), None)
    return next((rates for name, rates in GPUS.items() if name in device_kind), None)


def parse_topology(name: str, slices: int = 1) -> Topology:
    """A slice by name (v5e-16, v5litepod-256, tpu-v5p-512) or by shape (v5p:4x8x8); see `KNOWN`.

    The number counts TensorCores for v4, v5p and tpu7x, two a chip, and chips for v5e and v6e, as in the names that
    one asks for them by. Raises UserError for a name that is none, with the nearest that is.
    """
    words = re.fullmatch(r"(?:tpu-)?([a-z0-9]+?)(?:[-:=_])([0-9x]+)", name.strip().lower())
    if words is None:
        raise UserError(f"{name!r} is no topology; write for example {EXAMPLE_NAMES}")
    kind, rest = words.groups()
    chip = next((chip for chip in CHIPS if kind in (chip.name, *chip.aliases)), None)
    if chip is None:
        names = [name for chip in CHIPS for name in (chip.name, *chip.aliases)]
        near = difflib.get_close_matches(kind, names, n=1) or ["v5e"]
        raise UserError(f"there is no TPU {kind!r}; did you mean {near[0]}-{rest}?")
    if slices < 1:
        raise UserError(f"--slices is {slices}; give at least 1")
    if "x" in rest:
        return Topology(chip, _parse_shape(chip, rest, name), slices)
    cores = 2 if chip.size_unit == "cores" else 1
    known = {_product(shape) * cores: shape for shape in slice_shapes(chip)}
    if int(rest) not in known:
        near = min(known, key=lambda number: abs(number - int(rest)))
        what = f"number counts {chip.size_unit}, and there is no {name}"
        raise UserError(f"the {what}; did you mean {chip.name}-{near}?")
    return Topology(chip, known[int(rest)], slices)


def slice_shapes(chip: Chip) -> list[tuple[int, ...]]:
    """How slices of each size lie: powers of two, as near to a square or a cube as they can be."""
    made, shape = [(1, 1)] if chip.is_2d else [], [2, 2] if chip.is_2d else [2, 2, 1]
    while _product(shape) <= chip.max_chips:
        made.append(tuple(shape))
        # The last of the smallest axes grows: 2x2, 2x4, 4x4, ... and 2x2x1, 2x2x2, 2x2x4, ...
        place = max(range(len(shape)), key=lambda axis: (-shape[axis], axis))
        shape[place] *= 2
        shape.sort() if _product(shape) > 4 else None
    return made


def _parse_shape(chip: Chip, text: str, name: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(size) for size in text.split("x"))
    except ValueError:
        shape = ()
    wanted = 2 if chip.is_2d else 3
    if len(shape) != wanted or min(shape) < 1 or _product(shape) > chip.max_chips:
        example = "v5e:4x8" if chip.is_2d else "v5p:4x4x8"
        raise UserError(f"{name!r} wants {wanted} sizes of at most {chip.max_chips} chips, as in {example}")
    return shape


def _product(sizes) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def topology_devices(topology: Topology) -> list:
    """The slice's devices, for which one can compile. Needs libtpu and no TPU.

    Raises UserError where libtpu is missing, or does not know of such a slice.
    """
    require_libtpu()
    for name, value in libtpu.COMPILE_ONLY_ENV.items():
        os.environ.setdefault(name, value)
    libtpu.enlarge_thread_stack()
    from jax.experimental import topologies

    chip, shape = topology.chip, topology.shape
    whole = (*shape, 1)[:3]
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    try:
        made = topologies.get_topology_desc(
            topology_name=f"{chip.name}:{'x'.join(map(str, shape))}",
            platform="tpu",
            chip_config_name=chip.chip_config_name,
            chips_per_host_bounds=tuple(min(2, size) for size in whole[:2]) + (1,),
            wrap=torus_wraparound(chip, whole),
            **more,
        )
    except Exception as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(f"libtpu knows no slice of {topology}: {said}") from error
    return list(made.devices)


def torus_wraparound(chip: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    """Along which axes the links close to a ring: all of a cuboid of whole 4x4x4 cubes, a plane's of 16 chips."""
    if chip.is_2d:
        return tuple(size == 16 for size in shape)
    return (all(size % 4 == 0 for size in shape),) * 3


def has_libtpu() -> bool:
    """Whether programs for TPUs can be compiled here."""
    return importlib.util.find_spec("libtpu") is not None


def require_libtpu() -> None:
    """Raise UserError where programs for TPUs cannot be compiled."""
    if not has_libtpu():
        raise UserError("a plan wants libtpu, which compiles without a TPU: pip install 'lionjax[tpu]'")
