"""Flags of XLA that the commands set before jax starts, each with its reason. ``--xla-defaults off`` sets none.

A flag that the user has set in ``XLA_FLAGS`` stays as it is. XLA ends the process at a flag that it does not know, so
these are set only for versions of jax that were tried, and only where a GPU can be used at all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Literal, NamedTuple

Use = Literal["serving", "training"]

CHOICES = ("on", "off")
OPTION = "--xla-defaults"
TRIED = (0, 10), (0, 12)  # versions of jax, from and to
PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")


class DefaultFlag(NamedTuple):
    """A flag, and why it is set. None was timed on a GPU."""

    name: str
    value: str
    uses: tuple[Use, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


FLAGS = (
    DefaultFlag(
        "--xla_gpu_enable_command_buffer",
        "+COLLECTIVES",
        ("serving", "training"),
        "exchanges between devices become part of a step's CUDA graph, which they cut into pieces before; jax 0.12's "
        "XLA does so by itself",
    ),
    DefaultFlag(
        "--xla_gpu_graph_min_graph_size",
        "1",
        ("serving", "training"),
        "a conditional between two exchanges has fewer than the 5 launches that a graph needs by default, and outside "
        "of a graph the host waits for it",
    ),
    DefaultFlag(
        "--xla_gpu_dot_merger_threshold_mb",
        "0",
        ("training",),
        "a base matrix is not joined with its adapter's, which copies it in every step: the gradients of an adapter "
        "for four layers of the release and 1,024 tokens take 2,285 MB of temporaries in place of 4,938 (bfloat16, "
        "compiled for an H200, jax 0.10.2)",
    ),
)

USES: dict[str, tuple[Use, ...]] = {  # by verb; of study by step
    **dict.fromkeys(("generate", "chat", "serve", "score", "bench", "teach"), ("serving",)),
    **dict.fromkeys(("sft", "distill", "rl", "pretrain"), ("training",)),
    "study": ("serving",),
}
_TRAINED_STEPS = ("train", "lora")


def add_xla_option(parser: argparse.ArgumentParser) -> None:
    """The option, which `set_xla_defaults` has read before the verb's module was imported."""
    parser.add_argument(
        OPTION,
        choices=CHOICES,
        default="on",
        help="flags of XLA for CUDA graphs and memory that are set unless XLA_FLAGS has them (default: %(default)s)",
    )


def set_xla_defaults(verb: str | None, argv: Sequence[str]) -> None:
    """Add what a verb's programs are compiled with to ``XLA_FLAGS``, unless jax may have read it already."""
    if verb not in USES or "jax" in sys.modules or not _tried() or not has_cuda_plugin():
        return
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument(OPTION, default="on")
    parser.add_argument("--step", default="")
    try:
        args, _ = parser.parse_known_args(argv)
    except argparse.ArgumentError:
        return  # the verb's own parser says what is wrong
    if args.xla_defaults == "off":
        return
    uses: tuple[Use, ...] = ("training",) if verb == "study" and args.step in _TRAINED_STEPS else USES[verb]
    add_flags(os.environ, uses)


def add_flags(environment: MutableMapping[str, str], uses: Sequence[Use]) -> None:
    """Add the flags for these uses to ``XLA_FLAGS``, except those that are there.

    Example:
      >>> from stepjax.xla_defaults import add_flags
      >>> environment = {"XLA_FLAGS": "--xla_gpu_graph_min_graph_size=3"}
      >>> add_flags(environment, ["serving"])
      >>> environment["XLA_FLAGS"]
      '--xla_gpu_graph_min_graph_size=3 --xla_gpu_enable_command_buffer=+COLLECTIVES'
    """
    given = environment.get("XLA_FLAGS", "")
    if given.strip() and not given.lstrip().startswith("-"):
        return  # XLA reads its flags from the file of that name
    names = {word.partition("=")[0] for word in given.split()}
    added = [str(flag) for flag in FLAGS if {*flag.uses} & {*uses} and flag.name not in names]
    environment["XLA_FLAGS"] = " ".join([given, *added]).strip()


def flags_in_force(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """What ``XLA_FLAGS`` has, the user's and the defaults."""
    return tuple(environment.get("XLA_FLAGS", "").split())


def has_cuda_plugin() -> bool:
    """Whether jax can find its plugin for CUDA."""
    return find_spec("jax_plugins") is not None and any(map(find_spec, PLUGINS))


def _tried() -> bool:
    try:
        major, minor = map(int, version("jax").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return False
    return TRIED[0] <= (major, minor) <= TRIED[1]
