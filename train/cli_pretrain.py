"""``stepjax pretrain``: train a model from scratch on the generated tasks."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.train.config import read_pretrain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.toml", help="settings, as train/recipes/step-tiny.toml")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder; an existing run goes on")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override a setting")


def run(args: argparse.Namespace) -> int:
    config = read_pretrain(args.config, args.set)
    import jax

    jax.config.update("jax_num_cpu_devices", config.devices)
    from stepjax.train.loop import pretrain

    pretrain(config, args.out)
    print(f"{args.out}: {config.steps} steps done; weights in {args.out / 'weights'}")
    return 0
