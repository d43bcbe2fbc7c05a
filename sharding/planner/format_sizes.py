"""What a model's weights take in each format of the experts, whatever the mesh: in files, on devices, and to load."""

from __future__ import annotations

from dataclasses import dataclass

from stepjax.config import ModelConfig
from stepjax.errors import ConfigError
from stepjax.sharding.planner.hardware import Cluster
from stepjax.sharding.planner.step_time import load_time
from stepjax.weights.formats import FORMATS
from stepjax.weights.gguf_blocks import GGUF_TYPES
from stepjax.weights.inventory import inventory


@dataclass(frozen=True)
class FormatSize:
    """Weights with experts in one format and all else in 16 bits, divided evenly over the devices of a cluster."""

    name: str  # as "int4 in 32s", or "q4_k in a GGUF file"
    num_bytes: int  # of all weights as they are held, MTP layers among them
    device_bytes: int  # of one device's part
    load_s: float  # from files in this format, taken to have as many bytes
    quantised_load_s: float | None  # with --quantize, from the BF16 release; None: it is not made while loading


def format_sizes(config: ModelConfig, cluster: Cluster, *, storage: float) -> list[FormatSize]:
    """In the order of the tables of formats.

    Args:
      storage: bytes per second that one node reads.
    """
    forms = {name: form for format in FORMATS.values() for name, form in format.variants(config).items()}
    forms |= {f"{name} in a GGUF file": form for name, form in GGUF_TYPES.items()}
    specs = inventory(config)
    experts = [spec for spec in specs if spec.part == "experts"]
    whole = sum(spec.num_bytes for spec in specs)
    plain = whole - sum(spec.num_bytes for spec in experts)
    sizes = []
    for name, form in forms.items():
        try:
            for spec in experts:
                form.check_shape(spec.shape)
        except ConfigError:  # rows that do not divide
            continue
        held = plain + sum(form.num_bytes(spec.shape) if form.quantised else spec.num_bytes for spec in experts)
        made = form.quantised and form.made_while_loading
        sizes.append(
            FormatSize(
                name,
                held,
                held // cluster.num_devices,
                _seconds(held, held, cluster, storage),
                _seconds(whole, held, cluster, storage) if made else None,
            )
        )
    return sizes


def _seconds(read: int, held: int, cluster: Cluster, storage: float) -> float:
    count = cluster.num_devices
    return load_time(read, read / count, held / count, cluster, storage=storage)
