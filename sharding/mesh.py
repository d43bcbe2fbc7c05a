"""The mesh that a user writes as text: how many devices each kind of split takes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stepjax.errors import MeshError

if TYPE_CHECKING:
    from jax.sharding import Mesh

# Outermost first. Neighbours in `tensor` sit next to each other, on the fastest links; replicas of `data` exchange
# nothing in inference and may be far apart.
AXES = ("data", "context", "expert", "tensor")


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Devices along each axis; at most one is −1, the devices that are left.

    Raises:
      MeshError: a size is below 1, or two are −1.

    Example:
      >>> import stepjax
      >>> stepjax.MeshSpec.parse("expert=4,tensor=2").num_devices
      8
    """

    data: int = 1  # sequences
    context: int = 1  # positions of a sequence: its cache, and its tokens in prefill
    expert: int = 1  # whole routed experts
    tensor: int = 1  # heads, widths, the vocabulary

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1 and size != -1:
                raise MeshError(f"mesh: {axis} = {size}, expected at least 1, or -1 for the devices that are left")
        if list(self.sizes.values()).count(-1) > 1:
            raise MeshError(f"mesh: {self} leaves two axes open, expected at most one -1")

    @classmethod
    def parse(cls, text: str) -> MeshSpec:
        """Read ``data=2,expert=4``; an axis left out is 1, an empty text is one device."""
        sizes: dict[str, int] = {}
        for item in filter(None, (item.strip() for item in text.split(","))):
            axis, _, size = (part.strip() for part in item.partition("="))
            if axis not in AXES:
                raise MeshError(
                    f"mesh: {axis!r} is not an axis, expected one of {', '.join(AXES)}, as expert=4,tensor=2"
                )
            if axis in sizes:
                raise MeshError(f"mesh: {axis} is given twice, expected one size for it")
            if not size.removeprefix("-").isdecimal() or len(size) > 6:
                raise MeshError(f"mesh: {axis} = {size!r}, expected an integer")
            sizes[axis] = int(size)
        return cls(**sizes)

    def __str__(self) -> str:
        """The text that `parse` reads."""
        return ",".join(f"{axis}={size}" for axis, size in self.sizes.items() if size != 1) or "data=1"

    @property
    def sizes(self) -> dict[str, int]:
        """Every axis with its size, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_devices(self) -> int:
        """Product of the sizes. The spec must be resolved."""
        assert min(self.sizes.values()) > 0, f"{self} is not resolved"
        return math.prod(self.sizes.values())

    def resolve(self, num_devices: int) -> MeshSpec:
        """The spec for ``num_devices``: an open axis takes what the others leave.

        Raises:
          MeshError: the sizes do not fit the number of devices.
        """
        open_axes = [axis for axis, size in self.sizes.items() if size == -1]
        fixed = {axis: size for axis, size in self.sizes.items() if size != -1}
        product = MeshSpec(**fixed).num_devices
        if not open_axes:
            if product > num_devices:
                raise MeshError(
                    f"mesh: {self} takes {product} devices, found {num_devices}{_advice(fixed, num_devices)}"
                )
            return self
        if num_devices % product:
            raise MeshError(
                f"mesh: {self} leaves {num_devices} / {product} devices for {open_axes[0]}, expected an integer"
                f"{_advice(fixed, num_devices)}"
            )
        return MeshSpec(**fixed, **{open_axes[0]: num_devices // product})

    def build(self, devices: Sequence[Any] | None = None) -> Mesh:
        """The jax mesh over the first available devices, all axes Auto; every process must own some of them."""
        import jax
        from jax.sharding import AxisType

        available = list(jax.devices() if devices is None else devices)
        spec = self.resolve(len(available))
        chosen = available[: spec.num_devices]
        idle = {device.process_index for device in available} - {device.process_index for device in chosen}
        if idle:
            raise MeshError(
                f"mesh: {self} takes {len(chosen)} of {len(available)} devices, which leaves process {min(idle)} "
                "without any; use all devices when several processes run"
            )
        kinds = (AxisType.Auto,) * len(AXES)
        return jax.make_mesh(tuple(spec.sizes.values()), AXES, axis_types=kinds, devices=chosen)


def _advice(sizes: Mapping[str, int], num_devices: int) -> str:
    """A spec that fits: it splits no axis further, uses the most devices and changes the fewest axes."""
    axes = [axis for axis, size in sizes.items() if size > 1]
    options = [[n for n in range(1, min(sizes[axis], num_devices) + 1) if num_devices % n == 0] for axis in axes]
    fitting = [counts for counts in itertools.product(*options) if num_devices % math.prod(counts) == 0]
    kept = max(
        fitting,
        key=lambda counts: (math.prod(counts), sum(n == sizes[axis] for axis, n in zip(axes, counts, strict=True))),
    )
    return f"; {MeshSpec(**dict(zip(axes, kept, strict=True)))} would fit"
