"""Compiles kernels for an H200 that is not there and prints what their PTX has; run by `test_kernel_code.py`.

    python tests/kernel_code.py FOLDER int4,8 fp8,1 …

Each word is a way to hold experts and a number of tokens. XLA writes the PTX into the folder only if it is told to
before jax starts, hence a process of its own.
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

EXPERTS, WIDTH, HIDDEN, TOP_K = 288, 1280, 4096, 8  # of the release
LABEL, BRANCH = re.compile(r"^(\$\w+):"), re.compile(r"bra(?:\.uni)?\s+(\$\w+);")
INSTRUCTION = re.compile(r"^(?:@!?%p\d+ )?([a-z][\w.]*)")


def main() -> None:
    folder = Path(sys.argv[1])
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={folder} --xla_dump_hlo_module_re=.*"
    print(json.dumps({word: compiled(folder, *word.split(",")) for word in sys.argv[2:]}))


def compiled(folder: Path, name: str, tokens: str) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from stepjax.gpu_target import compiling_for
    from stepjax.ops.expert_dense import ExpertWeights
    from stepjax.ops.experts import routed_experts
    from stepjax.sharding.devices import devices, gpu_of
    from stepjax.weights.formats import FORMATS
    from stepjax.weights.quantised import abstract_quantised

    mesh = jax.sharding.Mesh(devices("h200", 1), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for path in folder.glob("*"):
        path.unlink()

    def shape(*sizes: int, dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    matrices = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    weights = ExpertWeights(*(abstract_quantised(sizes, FORMATS[name], place) for sizes in matrices))
    count = int(tokens)
    spec = jax.sharding.PartitionSpec()

    @jax.jit
    def layer(x: Any, ids: Any, combine: Any, weights: Any) -> Any:
        run = jax.shard_map(
            lambda *arguments: routed_experts(*arguments, limit=None), mesh=mesh, in_specs=spec, out_specs=spec
        )
        return run(x, ids, combine, weights)

    arguments = (
        shape(count, HIDDEN, dtype=jnp.bfloat16),
        shape(count, TOP_K, dtype=jnp.int32),
        shape(count, TOP_K, dtype=jnp.float32),
    )
    with compiling_for(gpu_of("h200")):
        executable = layer.lower(*arguments, weights).compile()
    ptx = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.ptx")))
    text, memory = executable.as_text(), executable.memory_analysis()
    assert text
    assert memory
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "loops": loops(ptx),
        "whiles": len(re.findall(r" while\(", text)),
        "widened": sorted(set(re.findall(rf"(?:bf16|f32)\[\d+,(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]", text))),
    }


def loops(ptx: str) -> list[dict[str, int]]:
    """The instructions of each loop in the code, by kind; a loop with one inside it is counted with that one."""
    bodies = []
    for entry in ptx.split(".entry")[1:]:
        lines = [line.strip() for line in entry.splitlines()]
        labels = {match[1]: i for i, line in enumerate(lines) if (match := LABEL.match(line))}
        for i, line in enumerate(lines):
            if (match := BRANCH.search(line)) and labels.get(match[1], i) < i:
                kinds = (INSTRUCTION.match(line) for line in lines[labels[match[1]] : i + 1])
                bodies.append(dict(collections.Counter(kind[1] for kind in kinds if kind)))
    return bodies


if __name__ == "__main__":
    main()
