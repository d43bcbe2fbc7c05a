"""The flags and the output that the commands of this folder share."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

from stepjax.cache_folder import MAX_GIB
from stepjax.checkpoint.folder import ModelFolder, open_folder
from stepjax.errors import RequestError
from stepjax.sharding.mesh import MeshSpec
from stepjax.text.tool_calls import CallStart, ContentDelta
from stepjax.weights.formats import made_while_loading
from stepjax.weights.int_groups import GROUP

STRATEGY_NAMES = ("tensor", "expert", "expert_tensor", "fsdp", "wide", "wide_data")  # of `stepjax.sharding.rules`

if TYPE_CHECKING:
    import numpy as np

    from stepjax.infer.sampling.params import SamplingParams
    from stepjax.infer.session import Session
    from stepjax.infer.transcript import Delta
    from stepjax.sharding.dispatch import Dispatch
    from stepjax.startup import Startup


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="step-tiny", help="checkpoint folder, hub id or embedded name (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="dtype of the weights; auto: float32 on CPU, else bfloat16 (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-fp8", action="store_true", help="keep an FP8 release's expert weights in 8 bits (default: as --dtype)"
    )
    add_mtp_argument(parser)
    parser.add_argument("--quantize", choices=made_while_loading(), help="quantize the routed experts (default: no)")
    parser.add_argument(
        "--group", type=int, default=GROUP, metavar="N", help="values per scale in int4 (default: %(default)s)"
    )
    add_fp8_arguments(parser)
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="split the model over devices, e.g. expert=4,tensor=2 (default: one device; with --strategy all devices)",
    )
    add_cache_arguments(parser)
    parser.add_argument(
        "--strategy",
        choices=STRATEGY_NAMES,
        help="which weights --mesh splits over which axis (default: expert_tensor)",
    )
    add_dispatch_arguments(parser)
    parser.add_argument(
        "--expert-slots",
        type=int,
        metavar="S",
        help="slots for experts on a mesh; more than one each hold copies of the busiest (default: one each)",
    )
    parser.add_argument(
        "--expert-loads",
        type=Path,
        metavar="FILE.json",
        help="how often each expert is chosen, from score --record-loads, to place experts (default: all alike)",
    )
    parser.add_argument(
        "--layers",
        default="auto",
        choices=("auto", "looped", "unrolled"),
        help="compile the repeated layers once, as a loop, or each by itself; auto: unrolled (default: %(default)s)",
    )


def add_fp8_arguments(parser: argparse.ArgumentParser) -> None:
    """FP8 for what is not a routed expert."""
    parser.add_argument(
        "--dense-fp8",
        action="store_true",
        help="hold the maps of attention, MLPs and outputs in FP8, with a scale for each row (default: as --dtype)",
    )
    parser.add_argument(
        "--cache-fp8",
        action="store_true",
        help="hold keys and values in FP8, for twice the tokens in the same memory (default: as --dtype)",
    )


def add_dispatch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dispatch",
        default="auto",
        choices=("auto", "gather", "exchange", "node"),
        help="how tokens reach the experts under --strategy wide; auto: the cheapest for a step (default: %(default)s)",
    )
    parser.add_argument(
        "--dispatch-fp8",
        action="store_true",
        help="send tokens to the experts in 8 bits, which changes answers a little (default: no)",
    )
    parser.add_argument(
        "--dispatch-halves",
        action="store_true",
        help="send a step's tokens to the experts in two halves, each while the other is computed (default: no)",
    )
    parser.add_argument(
        "--dispatch-ragged",
        action="store_true",
        help="send no empty rows, with XLA's ragged all-to-all; CPUs do not have it and gather all rows (default: no)",
    )


def dispatch_of(args: argparse.Namespace) -> Dispatch | None:
    """What these options say; None if all have their defaults."""
    from stepjax.sharding.dispatch import CHEAPEST, Dispatch

    form = None if args.dispatch == "auto" else args.dispatch
    dispatch = Dispatch(form, fp8=args.dispatch_fp8, halves=args.dispatch_halves, ragged=args.dispatch_ragged)
    return None if dispatch == CHEAPEST else dispatch


def read_loads(path: Path) -> np.ndarray:
    """Numbers of tokens of each expert, [E], or of each MoE layer's, [L, E].

    Raises:
      RequestError: the file holds something else.
    """
    import numpy as np

    try:
        loads = np.asarray(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as JSON numbers ({error})") from None
    if loads.ndim not in (1, 2) or loads.dtype.kind not in "iuf":
        raise RequestError(f"{path}: expected a list of numbers, the tokens of each expert, or such lists by layer")
    return loads


def add_mtp_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mtp-from",
        metavar="OTHER",
        help="checkpoint of the same base to take MTP layers from, if --model has none (default: its own)",
    )


def add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-program-cache", action="store_true", help="compile all programs and keep none (default: keep them)"
    )
    parser.add_argument(
        "--program-cache-gib",
        type=float,
        default=MAX_GIB,
        metavar="X",
        help="largest size of the program cache, which stepjax cache shows (default: %(default)s)",
    )


def add_engine_arguments(engine: argparse._ArgumentGroup) -> None:
    """Options of the engine's cache and arithmetic, for `serve` and `bench`."""
    engine.add_argument(
        "--cache-gib",
        type=float,
        metavar="X",
        help="memory for the cache of a device, e.g. 4 (default: what is free; on a CPU 0.25, or what one sequence of "
        "the longest context needs, at most 1)",
    )
    engine.add_argument(
        "--no-prefix-cache",
        action="store_true",
        help="do not reuse the prefixes of earlier prompts (default: reuse them)",
    )
    engine.add_argument(
        "--deterministic",
        action="store_true",
        help="make answers bitwise independent of the other requests (default: no)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Sampling flags. Their defaults are the checkpoint's generation_config, else the model card's values."""
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="longest answer (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, metavar="X", help="0 is greedy (default: the checkpoint's)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="keep the likeliest tokens up to this probability, e.g. 0.9 (default: the checkpoint's)",
    )
    parser.add_argument(
        "--top-k", type=int, metavar="N", help="keep the N likeliest tokens; 0 is off (default: the checkpoint's)"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="X", help="drop tokens less likely than X times the likeliest (default: 0)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="makes sampling repeatable (default: random)")
    parser.add_argument(
        "--speculate", type=int, metavar="K", help="MTP drafts per step, 0 to 3 (default: all that the checkpoint has)"
    )


def sampling_params(session: Session, args: argparse.Namespace) -> SamplingParams:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")
    given = {name: getattr(args, name, None) for name in names}
    given["stop"] = tuple(given["stop"]) if given["stop"] else None
    return session.sampling(**given)


def checked_folder(
    name: str, *, mtp_from: str | None = None, needs: Literal["ids", "text", "chat"] = "ids"
) -> ModelFolder:
    """Open a folder, without jax, and check that it has what a command ``needs``."""
    folder = open_folder(name, mtp_from=mtp_from)
    if needs != "ids" and folder.tokenizer is None:
        raise RequestError(f"{folder.path}: has no tokenizer.json, so it takes token ids only: generate --tokens")
    if needs == "chat" and folder.template is None:
        raise RequestError(f"{folder.path}: has no chat template; continue plain text with generate --raw")
    for note in folder.checkpoint.notes:
        print(f"stepjax: {printable(note)}", file=sys.stderr)
    return folder


def open_session(
    args: argparse.Namespace,
    *,
    startup: Startup,
    folder: ModelFolder | None = None,
    needs: Literal["ids", "text", "chat"] = "ids",
    mesh: MeshSpec | None = None,
    first_device: int = 0,
) -> Session:
    """Import jax and load the weights, after all that can be checked without.

    Args:
      startup: shows what is done.
      folder: that of the model, if it has been checked.
      mesh, first_device: in place of ``--mesh``, and from which device on.
    """
    if mesh is None and args.mesh is not None:
        mesh = MeshSpec.parse(args.mesh)
    folder = folder or checked_folder(args.model, mtp_from=args.mtp_from, needs=needs)
    loads = None if args.expert_loads is None else read_loads(args.expert_loads)
    with startup.stage("importing", "starting jax"):
        from stepjax.infer.load import load, use_caches

        cache = use_caches(programs=not args.no_program_cache, max_gib=args.program_cache_gib)
    with startup.stage("loading", f"loading {printable(args.model)}", unit="bytes") as stage:
        session = load(
            folder,
            dtype=args.dtype,
            keep_fp8=args.keep_fp8,
            quantize=args.quantize,
            group=args.group,
            dense_fp8=args.dense_fp8,
            cache_fp8=args.cache_fp8,
            mesh=mesh,
            first_device=first_device,
            strategy=args.strategy,
            dispatch=dispatch_of(args),
            expert_slots=args.expert_slots,
            expert_loads=loads,
            layers=args.layers,
            progress=stage.advance,
            program_cache=cache,
        )
    for note in session.model.layout.notes:
        print(f"stepjax: {note}", file=sys.stderr)
    return session


class Printer:
    """Prints an answer as it grows: thinking dimmed, then the answer, then tool calls."""

    def __init__(self) -> None:
        self._console = Console()
        self._thought = self._answered = False

    def write(self, delta: Delta) -> None:
        if delta.reasoning:
            self._thought = True
            self._print(delta.reasoning, "dim")
        for event, _ in delta.parts:
            if self._thought and not self._answered:
                self._print("\n\n", "")
            self._answered = True
            if isinstance(event, ContentDelta):
                self._print(event.text, "")
            else:
                self._print(f"\n→ {event.name}" if isinstance(event, CallStart) else f"({event.text})", "cyan")

    def end(self) -> None:
        self._print("\n", "")

    def _print(self, text: str, style: str) -> None:
        """Exactly the text: as a plain string, rich would expand tabs and replace ``:smile:``."""
        if text:
            with self._console.capture() as drawn:
                self._console.print(Segments([Segment(printable(text), Style.parse(style))]), soft_wrap=True)
            print(drawn.get(), end="", flush=True)


def printable(text: str) -> str:
    """The text without control characters; a model's text must not control the terminal."""
    return "".join(
        c if c in "\n\t" or (ord(c) >= 32 and not 127 <= ord(c) < 160) else "\N{REPLACEMENT CHARACTER}" for c in text
    )
