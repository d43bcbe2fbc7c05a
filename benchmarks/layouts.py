"""The layouts that plans are held against: a line each, `mesh strategy step batch context [word=number …]`.

Words are chunk, drafts, layers (default 3: dense with full attention, experts with a window, experts with full
attention, at the real widths), fp8=1, int8=1 and int4=1. 45 layers are the whole model.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from stepjax.config import ModelConfig
from stepjax.train.planning.workload import Workload
from stepjax.weights.formats import FORMATS


class Case(NamedTuple):
    """One step on one mesh."""

    text: str
    mesh: str
    strategy: str
    workload: Workload
    layers: int

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The model, or one with a layer of each kind."""
        picked = whole.layers if self.layers == len(whole.layers) else [whole.layers[at] for at in _KINDS[self.layers]]
        layers = tuple(dataclasses.replace(layer, index=at) for at, layer in enumerate(picked))
        depths = tuple(dataclasses.replace(layer, index=len(layers) + at) for at, layer in enumerate(whole.mtp_layers))
        return dataclasses.replace(whole, layers=layers, mtp_layers=depths)


_KINDS = {2: (0, 3), 3: (0, 3, 4)}


def read(text: str) -> list[Case]:
    return [_case(line) for line in text.strip().splitlines() if line.strip()]


def _case(line: str) -> Case:
    mesh, strategy, step, batch, context, *words = line.split()
    given = {name: int(value) for name, _, value in (word.partition("=") for word in words)}
    layers = given.pop("layers", 3)
    experts = next((name for name in FORMATS if given.get(name)), "bf16")
    workload = Workload(
        step=step,  # type: ignore[arg-type]  (one of four, by the tables below)
        batch=int(batch),
        context=int(context),
        chunk=given.get("chunk"),
        drafts=given.get("drafts", 0),
        experts=FORMATS[experts],
    )
    return Case(" ".join(line.split()), mesh, strategy, workload, layers)


# Peak bytes and collectives, compiled for H100s.
GPU = read("""
expert=8 expert decode 16 4096
expert=8 expert_tensor decode 64 16384 drafts=1
expert=4,tensor=2 expert_tensor decode 128 2048
expert=8 expert_tensor prefill 1 8192 chunk=512
expert=2,tensor=4 expert_tensor decode 8 32768
tensor=8 tensor decode 4 8192
expert=4,tensor=2 expert_tensor prefill 1 8192 chunk=256
context=2,expert=4 expert_tensor decode 2 131072
expert=4 expert decode 32 8192 fp8=1
expert=4 expert prefill 1 8192 chunk=512 fp8=1
expert=8 expert_tensor decode 32 4096 layers=45
expert=2,tensor=4 expert_tensor prefill 2 8192 chunk=2048
expert=16 expert decode 256 2048
expert=8,tensor=2 expert_tensor decode 1 4096 drafts=3
data=2,expert=4 expert_tensor decode 64 4096
tensor=2 tensor decode 2 4096 drafts=3
expert=32,tensor=2 expert_tensor decode 64 4096
context=2,expert=8 expert_tensor prefill 1 65536 chunk=8192
expert=4,tensor=4 expert_tensor decode 1 65536
expert=8 expert_tensor prefill 1 4096 chunk=128 drafts=3
context=4,expert=8 expert_tensor decode 1 262144
expert=4 expert decode 16 8192 fp8=1 layers=45
tensor=8 tensor prefill 1 32768 chunk=4096
data=2,expert=4 expert_tensor prefill 8 4096 chunk=256
expert=8 expert decode 1 4096 fp8=1
data=2,expert=4 expert_tensor prefill 4 4096 chunk=1024
context=2,tensor=4 tensor decode 16 16384 drafts=1
expert=32 expert_tensor decode 128 4096
expert=16 expert prefill 1 8192 chunk=2048
expert=16,tensor=4 expert_tensor decode 512 4096
data=4,expert=2,tensor=2 expert_tensor decode 32 8192 drafts=3
expert=8 expert_tensor prefill 2 4096 chunk=1024
context=4,expert=2 expert_tensor prefill 1 131072 chunk=2048
data=2,context=2,expert=8 expert_tensor decode 16 32768
tensor=4 tensor decode 10 2560 layers=45
expert=4 expert prefill 4 4096 chunk=128 fp8=1
expert=4,tensor=2 expert_tensor prefill 4 4096 chunk=64 drafts=1
context=2,expert=4,tensor=2 expert_tensor prefill 2 32768 chunk=4096
data=8,expert=8 expert_tensor decode 64 4096
expert=8,tensor=4 expert_tensor prefill 1 16384 chunk=16384
expert=8 expert_tensor prefill 1 8192 chunk=512 layers=45
expert=4 expert decode 32 8192 fp8=1 layers=45
expert=4 expert_tensor decode 8 8192 int4=1
expert=2 expert decode 128 2048 int4=1
expert=2 expert_tensor prefill 1 8192 chunk=512 int4=1
expert=4 expert decode 2 65536 drafts=3 int8=1
data=2,expert=2,tensor=2 expert_tensor prefill 6 4096 chunk=256
expert=2,tensor=2 expert_tensor prefill 1 8192 chunk=2048 fp8=1
""")

# Argument bytes, compiled for virtual CPU devices, 1 to 512 of them.
CPU = read(
    "\n".join(
        f"{line} layers=2"
        for line in """
data=1 expert_tensor decode 1 1024
data=1 tensor decode 3 512 drafts=3
data=2 expert_tensor decode 4 1024
data=3 expert_tensor decode 6 1024
data=5 expert_tensor decode 4 640
data=64 expert_tensor decode 64 512
data=512 expert decode 512 256
tensor=2 tensor decode 2 1024 drafts=1
tensor=4 tensor decode 5 768
tensor=8 tensor decode 8 1024 drafts=2
tensor=16 tensor decode 4 1024
tensor=32 tensor decode 4 1024
tensor=2 expert_tensor decode 1 4096
tensor=8 expert decode 8 1024 fp8=1
tensor=2 tensor decode 8 1024 fp8=1
expert=2 expert_tensor decode 2 2048
expert=3 expert decode 3 1024
expert=4 expert decode 10 2560 fp8=1
expert=6 expert_tensor decode 6 1024
expert=8 expert_tensor decode 32 4096
expert=9 expert decode 1 512
expert=12 expert_tensor decode 2 512 drafts=3
expert=16 expert_tensor decode 64 1024 drafts=1
expert=18 expert decode 4 512
expert=24 expert_tensor decode 5 512
expert=32 expert decode 7 1024 fp8=1
expert=36 expert_tensor decode 8 512
expert=48 expert decode 3 512
expert=72 expert_tensor decode 2 512
expert=96 expert decode 96 256
expert=144 expert_tensor decode 4 512
expert=288 expert_tensor decode 1 512
expert=2,tensor=2 expert_tensor decode 4 1024
expert=4,tensor=2 expert_tensor decode 8 2048 drafts=3
expert=8,tensor=2 expert decode 8 1024
expert=4,tensor=4 tensor decode 2 1024
expert=8,tensor=4 expert_tensor decode 32 4096
expert=16,tensor=2 expert_tensor decode 16 1024 fp8=1
expert=16,tensor=4 expert_tensor decode 9 1024
expert=32,tensor=2 expert_tensor decode 64 512
expert=32,tensor=8 expert_tensor decode 8 512
expert=16,tensor=32 expert_tensor decode 4 512
expert=9,tensor=4 expert decode 3 512
context=2 expert_tensor decode 2 2048
context=4,expert=2 expert_tensor decode 3 4096 drafts=1
context=3,expert=4 expert decode 4 1000
context=8,tensor=2 tensor decode 1 8192
context=64,expert=8 expert_tensor decode 1 65536
data=2,context=2 expert_tensor decode 4 2048
data=2,expert=4,tensor=2 expert_tensor decode 8 1024 drafts=1
data=4,expert=8 expert decode 6 1024
data=8,expert=8,tensor=2 expert_tensor decode 64 1024
data=2,context=2,expert=2,tensor=2 expert_tensor decode 6 2048 drafts=2
data=16,context=2,expert=8,tensor=2 expert_tensor decode 32 1024
data=4,expert=32,tensor=4 expert_tensor decode 8 512 fp8=0
data=2,expert=4 fsdp decode 4 1024
data=4,tensor=2 fsdp decode 4 1024
data=8,expert=4,tensor=2 fsdp decode 8 512 drafts=1
data=64,expert=8 fsdp decode 64 256
data=2,expert=2 fsdp decode 2 512 fp8=1
expert=8 expert_tensor prefill 1 2048 chunk=512
expert=4,tensor=2 expert_tensor prefill 4 1024 chunk=128 drafts=1
context=2,expert=4 expert prefill 1 4096 chunk=512
data=2,tensor=4 tensor prefill 3 1024 chunk=256
""".strip().splitlines()
    )
)
