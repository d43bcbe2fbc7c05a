"""``stepjax teach``: write a teacher's likeliest tokens for the rows of a data set."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.errors import ConfigError
from stepjax.infer.commands.options import add_cache_arguments
from stepjax.infer.commands.progress import shown_startup
from stepjax.ranges import Range, argument

TOP_K = Range(1, 1000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", type=Path, metavar="CONFIG.toml", help="settings with a source of files and a teacher"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--data", metavar="NAME", help="source of [data] to score (default: the first)")
    parser.add_argument(
        "--top-k",
        type=argument(TOP_K, whole=True),
        default=20,
        metavar="K",
        help="tokens per position (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a setting, e.g. model.path=step-tiny; may be repeated (default: none)",
    )
    add_cache_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Score the completion of each row, in the order of the file."""
    from stepjax.train.config.reader import read_settings
    from stepjax.train.config.tune import TuneConfig

    config = read_settings(TuneConfig, args.config, [*args.set, 'verb="sft"', 'rollout.source="data"'])
    name = args.data or next(iter(config.data))
    if config.data.get(name) is None or not config.data[name].has_files:
        raise ConfigError(f"data.{name}: expected a source of files, whose rows are scored")
    startup = shown_startup()
    with startup.stage("importing", "starting jax"):
        from stepjax.infer.load import use_caches
        from stepjax.train.tune.teach import teach

        cache = use_caches(programs=not args.no_program_cache, max_gib=args.program_cache_gib)
    count, tokens = teach(config, name, args.out, top_k=args.top_k, cache=cache, startup=startup)
    print(f"{args.out}: {count} rows, {tokens} tokens, {args.top_k} likeliest of each")
    return 0
