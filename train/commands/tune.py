"""``stepjax distill``, ``sft`` and ``rl``: fine-tune a model as a TOML file says."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from stepjax.train.config.reader import read_settings
from stepjax.train.config.tune import TuneConfig

RECIPES = Path(__file__).parents[1] / "recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="settings, or a built-in recipe, e.g. step-tiny-distill"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder; resumes an interrupted run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a setting, e.g. optim.steps=20; may be repeated (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Read the settings, train, print where the result is."""
    path = args.config
    if not path.exists() and (RECIPES / f"{path}.toml").exists():
        path = RECIPES / f"{path}.toml"
    config = dataclasses.replace(read_settings(TuneConfig, path, [*args.set, f'verb="{args.verb}"']))
    from stepjax.infer.load import use_caches
    from stepjax.train.tune.run import leaves_file, tune

    use_caches()
    tune(config, args.out)
    print(f"{args.out}: {config.optim.steps} steps done; the result is in {leaves_file(args.out, config.optim.steps)}")
    return 0
