"""``stepjax pretrain``: train a model from scratch on the generated tasks, in one stage or several."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from pathlib import Path

from stepjax.errors import ConfigError
from stepjax.infer.commands.options import add_cache_arguments
from stepjax.infer.commands.progress import shown_startup, write_line
from stepjax.train.config.pretrain import PretrainConfig, read_pretrain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        type=Path,
        nargs="+",
        metavar="CONFIG.toml",
        help="settings, one file per stage, e.g. train/recipes/step-tiny.toml",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="run folder; resumes an interrupted run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a setting, e.g. steps=20; may be repeated (default: none)",
    )
    add_cache_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Train all stages. With several, stage n has the folder RUN/n and starts from the last weights of stage n − 1."""
    stages = _stages([read_pretrain(path, args.set) for path in args.config], args.out)
    startup = shown_startup()
    with startup.stage("importing", "starting jax"):
        import jax

        with contextlib.suppress(RuntimeError):  # jax is initialised already; the loop checks the number of devices
            jax.config.update("jax_num_cpu_devices", max(config.devices for config, _ in stages))
        from stepjax.infer.load import use_caches
        from stepjax.train.pretrain.loop import pretrain

        cache = use_caches(programs=not args.no_program_cache, max_gib=args.program_cache_gib)
    for config, out in stages:
        pretrain(config, out, cache=cache, startup=startup, write=write_line)
        print(f"{out}: {config.steps} steps done; weights in {out / 'weights'}")
    return 0


def _stages(configs: list[PretrainConfig], out: Path) -> list[tuple[PretrainConfig, Path]]:
    """Settings and folder of each stage."""
    if len(configs) == 1:
        return [(configs[0], out)]
    stages: list[tuple[PretrainConfig, Path]] = []
    for number, config in enumerate(configs, start=1):
        if stages:
            if config.start_from:
                raise ConfigError(
                    f"start_from: stage {number} starts from the weights of stage {number - 1}; leave it out"
                )
            earlier, folder = stages[-1]
            config = dataclasses.replace(config, start_from=str(folder / "weights" / f"{earlier.steps}.safetensors"))
        stages.append((config, out / str(number)))
    return stages
