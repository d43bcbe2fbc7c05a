"""``stepjax distill``, ``sft`` and ``rl``: fine-tune a model as a TOML file says."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from stepjax.infer.commands.options import add_cache_arguments
from stepjax.infer.commands.progress import shown_startup, write_line


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
    add_cache_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Read the settings, train, print where the result is."""
    startup = shown_startup()
    with startup.stage("importing", "starting jax"):
        from stepjax.infer.load import use_caches
        from stepjax.train.config.reader import read_settings
        from stepjax.train.config.tune import TuneConfig
        from stepjax.train.tune.verbs import recipe, run_tuning

    config = read_settings(TuneConfig, recipe(args.config), args.set, changes={"verb": args.verb})
    cache = use_caches(programs=not args.no_program_cache, max_gib=args.program_cache_gib)
    result = run_tuning(config, args.out, cache=cache, startup=startup, write=write_line)
    print(f"{result.folder}: {result.steps} steps done; the result is in {result.adapter or result.leaves}")
    if result.adapter:
        paths = f"{shlex.quote(str(result.adapter))} FOLDER --model {shlex.quote(config.model.path)}"
        print(f"as a PEFT folder, to serve or to merge: stepjax export-adapter {paths}")
    return 0
