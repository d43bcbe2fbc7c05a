"""``stepjax generate``: answer prompts, as text for people or one JSON line per prompt for programs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepjax.errors import RequestError
from stepjax.infer.commands.options import (
    Printer,
    add_model_arguments,
    add_sampling_arguments,
    open_session,
    sampling_params,
)
from stepjax.infer.commands.progress import shown_startup

if TYPE_CHECKING:
    from stepjax.infer.generate import Completion, Generation
    from stepjax.infer.session import Session
    from stepjax.startup import Startup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a user message, e.g. 'What is 467 + 358?'; may be repeated"
    )
    source.add_argument(
        "--tokens", type=Path, metavar="IN.json", help="prompts as a JSON list of lists of token ids, e.g. [[0, 71]]"
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before each prompt (default: none)")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as plain text (default: answer it as a chat)"
    )
    parser.add_argument("--no-thinking", action="store_true", help="answer without thinking (default: think first)")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; may be repeated (default: none)",
    )
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        default=None,
        help="continue past the end of the answer up to --max-tokens (default: stop there)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt (default: text)")


def run(args: argparse.Namespace) -> int:
    tokens = read_tokens(args.tokens) if args.tokens else None
    startup = shown_startup()
    session = open_session(args, startup=startup, needs="ids" if args.tokens else "text" if args.raw else "chat")
    prompts = tokens if tokens is not None else [_encode(session, text, args) for text in args.prompt]
    params = sampling_params(session, args)
    for ids in prompts:  # all of them before the first is answered
        session.check_prompt(ids)
    for ids in prompts:
        _answer(session, ids, params, args, startup)
    return 0


def read_tokens(path: Path) -> list[list[int]]:
    """A JSON list of lists of token ids. Raises RequestError naming the file and the entry."""
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid JSON ({error}); expected a list of lists of token ids") from None
    if not isinstance(prompts, list) or not prompts or not all(isinstance(ids, list) for ids in prompts):
        raise RequestError(f"{path}: expected a non-empty JSON list of lists of token ids, as [[0, 71], [0, 5]]")
    for index, ids in enumerate(prompts):
        if not ids or not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise RequestError(f"{path}: list {index} is empty or holds something that is not an integer")
    return prompts


def _encode(session: Session, text: str, args: argparse.Namespace) -> list[int]:
    if args.raw:
        return session.encode(text)
    system = [{"role": "system", "content": args.system}] if args.system else []
    messages = [*system, {"role": "user", "content": text}]
    return session.encode_chat(messages, enable_thinking=not args.no_thinking)


def _as_dict(completion: Completion) -> dict[str, Any]:
    fields = dataclasses.asdict(completion)
    return fields | fields.pop("timing")


def _answer(session: Session, ids: list[int], params: Any, args: argparse.Namespace, startup: Startup) -> None:
    """Answer one prompt, once its programs are there."""
    from stepjax.infer.generate import Generation  # it loads jax

    generation = Generation(session, [ids], [params], speculate=args.speculate)
    generation.prepare(startup)
    if not args.json:
        _show(generation)
        return
    for _ in generation:
        pass
    print(json.dumps(_as_dict(generation.completions()[0])), flush=True)


def _show(generation: Generation) -> None:
    printer = Printer()
    for _, delta in generation:
        printer.write(delta)
    printer.end()
    done = generation.completions()[0]
    timing = done.timing
    print(
        f"[{len(done.ids)} tokens, {done.finish_reason}; decode {timing.decode_tokens_per_s:.0f} tokens/s, "
        f"{timing.accepted_per_step:.2f} tokens a step]",
        file=sys.stderr,
    )
