"""``stepjax bench``: the speed of the engine on a list of requests."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from stepjax.errors import RequestError
from stepjax.infer.commands.generate import read_tokens
from stepjax.infer.commands.options import (
    add_engine_arguments,
    add_model_arguments,
    add_sampling_arguments,
    open_session,
    sampling_params,
)
from stepjax.infer.commands.progress import shown_startup

if TYPE_CHECKING:
    from stepjax.infer.bench import BenchReport, Request
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.session import Session


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="a prompt per line, or a .json list of lists of token ids (default: random prompts)",
    )
    requests.add_argument(
        "--requests", type=int, default=32, metavar="N", help="number of random prompts (default: %(default)s)"
    )
    requests.add_argument(
        "--prompt-tokens",
        default="128",
        metavar="N[:M]",
        help="length of random prompts, or a range, e.g. 20:200 (default: %(default)s)",
    )
    requests.add_argument(
        "--shared-tokens",
        type=int,
        default=0,
        metavar="N",
        help="length of a prefix that all random prompts share (default: %(default)s)",
    )
    requests.add_argument(
        "--rate", type=float, metavar="X", help="requests that arrive per second, e.g. 2.5 (default: all at once)"
    )
    requests.add_argument(
        "--stop-at-eos", action="store_true", help="end answers where the model ends them (default: at --max-tokens)"
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--slots", type=int, default=16, metavar="N", help="sequences that run together (default: %(default)s)"
    )
    engine.add_argument(
        "--context", type=int, metavar="N", help="tokens of the longest sequence (default: as the requests need)"
    )
    add_engine_arguments(engine)
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: a table)")


def run(args: argparse.Namespace) -> int:
    prompts = _read(args.prompts) if args.prompts else None
    least, most = _range(args.prompt_tokens)
    text = prompts is not None and isinstance(prompts[0], str)
    startup = shown_startup()
    session = open_session(args, startup=startup, needs="text" if text else "ids")
    from stepjax.infer.bench import Request, bench, random_requests
    from stepjax.infer.engine.config import EngineConfig
    from stepjax.infer.engine.engine import Engine

    params = sampling_params(session, args).replace(ignore_eos=not args.stop_at_eos)
    if prompts is None:
        vocab = len(session.tokenizer) if session.tokenizer else session.config.vocab_size
        requests = random_requests(
            args.requests,
            vocab=vocab,
            prompt_tokens=(least, most),
            params=params,
            shared_tokens=args.shared_tokens,
            rate=args.rate,
        )
    else:
        requests = [
            Request(session.encode(prompt) if isinstance(prompt, str) else prompt, params) for prompt in prompts
        ]
    config = EngineConfig(
        num_slots=args.slots,
        context=args.context or _context(session, requests),
        cache_bytes=None if args.cache_gib is None else int(args.cache_gib * 2**30),
        num_snapshots=0 if args.no_prefix_cache or args.deterministic else None,
        speculate=args.speculate,
        max_waiting=max(1024, len(requests) * params.n),
        deterministic=args.deterministic,
    )
    engine = Engine(session, config)
    with startup.stage("compiling", "preparing programs", unit="programs") as stage:
        engine.warm(progress=stage.advance)
    report = bench(engine, requests)
    about = _about(args, session, engine)
    if args.json:
        print(json.dumps(about | report.as_dict(), indent=2))
    else:
        _show(about, report)
    return 0


def _read(path: Path) -> list[Any]:
    """Lines of text, or lists of ids."""
    if path.suffix == ".json":
        return read_tokens(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read ({error})") from None
    if not lines:
        raise RequestError(f"{path}: is empty, expected a prompt per line")
    return lines


def _range(text: str) -> tuple[int, int]:
    first, _, last = text.partition(":")
    if not (first.isdecimal() and (last or first).isdecimal()) or not 0 < int(first) <= int(last or first):
        raise RequestError(f"--prompt-tokens: is {text!r}, expected a number, or two as 100:200")
    return int(first), int(last or first)


def _context(session: Session, requests: list[Request]) -> int:
    """Room for the longest request, as a power of two."""
    longest = max(len(request.prompt) + request.params.max_tokens for request in requests)
    return min(session.config.max_positions, max(256, 1 << (longest - 1).bit_length()))


def _about(args: argparse.Namespace, session: Session, engine: Engine) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from stepjax.infer.bench import held

    device = jax.local_devices()[0].device_kind
    return {
        "model": args.model,
        "dtype": jnp.dtype(session.dtype).name,
        "device": f"{jax.device_count()} × {device}",
        "device_kind": device,
        "mesh": args.mesh,
        "jax": jax.__version__,
        "slots": args.slots,
        "speculate": args.speculate,
        "engine": held(session, engine),
    }


def _show(about: dict[str, Any], report: BenchReport) -> None:
    table = Table(box=box.SIMPLE, show_header=False, title=f"{about['model']}, {about['dtype']}, {about['device']}")
    first, later = report.time_to_first_token_s, report.time_per_output_token_s
    rows = {
        "requests": f"{report.requests:,} in {report.seconds:.2f} s",
        "tokens": f"{report.prompt_tokens:,} in prompts, {report.output_tokens:,} answered",
        "answered per second": f"{report.output_tokens_per_s:,.1f}",
        "time to first token": f"{_ms(first.mean)} mean, {_ms(first.median)} median, {_ms(first.p99)} p99",
        "time per token": f"{_ms(later.mean)} mean, {_ms(later.median)} median, {_ms(later.p99)} p99",
        "steps": f"{report.steps:,}, {report.prefill_steps:,} of them prefill",
        "tokens a decode step": f"{report.tokens_per_decode_step:.2f} of each sequence",
        "drafts accepted": ", ".join(f"{share:.0%}" for share in report.acceptance) or "–",
        "prompt tokens spared": f"{report.cached_prompt_tokens:,}",
        "preemptions": f"{report.preemptions:,}",
        "host time a step": f"{report.host_ms_per_step:.2f} ms; the device had run dry before {report.idle_share:.0%}",
        "cache": f"{report.cache_bytes / 2**20:,.1f} MiB a device, {report.cache_over_formula:.3f} × the formula",
        "peak memory": f"{report.peak_bytes / 2**30:,.2f} GiB",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
