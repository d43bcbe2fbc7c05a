"""``stepjax import-adapter``: read a PEFT folder into an adapter that training can start from."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.commands.writing import add_leave_out, left_out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="PEFT folder, in any form that export-adapter writes")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--model", required=True, help="the base model: checkpoint folder, hub id or embedded name, e.g. step-tiny"
    )
    add_leave_out(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter (default: refuse)")


def run(args: argparse.Namespace) -> int:
    import jax

    from stepjax.adapters.lora import filled
    from stepjax.adapters.peft import import_adapter
    from stepjax.commands.info import read_config
    from stepjax.sharding.sharded_checkpoint import save_adapter

    config = read_config(args.model)
    adapter, lora = import_adapter(args.source, config, leave_out=args.leave_out)
    whole = filled(config, lora, adapter, jax.random.key(0))
    save_adapter(args.target, config, whole, lora, overwrite=args.overwrite)
    of_experts = f", of experts {lora.expert_rank} ({lora.experts})" if lora.experts else ""
    without = left_out(args.source, args.leave_out)
    print(f"{args.target}: {len(adapter) // 2} weights, rank {lora.rank}{of_experts}{without}")
    return 0
