"""The command line: a table of verbs, each in a module that is imported only when its verb is used."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from stepjax._version import __version__
from stepjax.errors import StepjaxError

# Verb → the module with ``add_arguments(parser)`` and ``run(args) -> exit code``, and a line of help.
VERBS = {
    "generate": ("stepjax.infer.commands.generate", "answer prompts"),
    "chat": ("stepjax.infer.commands.chat", "talk with a model in the terminal"),
    "score": ("stepjax.infer.commands.score", "write the logits of given tokens to a file"),
    "convert": ("stepjax.commands.convert", "write a checkpoint with its experts in another precision"),
    "export-adapter": ("stepjax.sharding.commands.export_adapter", "write an adapter as a PEFT folder"),
    "import-adapter": ("stepjax.sharding.commands.import_adapter", "read a PEFT adapter into one to train on"),
    "merge": ("stepjax.commands.merge", "add an adapter to a checkpoint's weights"),
    "serve": ("stepjax.infer.commands.serve", "answer over HTTP, as OpenAI's interface has it"),
    "bench": ("stepjax.infer.commands.bench", "measure how fast requests are answered"),
    "info": ("stepjax.commands.info", "show what a model consists of"),
    "study": ("stepjax.train.commands.study", "compile a step for a mesh that need not exist, and count its bytes"),
    "plan": ("stepjax.train.commands.plan", "choose a mesh for a machine that need not be there"),
    "pretrain": ("stepjax.train.commands.pretrain", "train a model from scratch, as step-tiny was"),
    "distill": ("stepjax.train.commands.tune", "teach a model by another, on its own answers"),
    "sft": ("stepjax.train.commands.tune", "teach a model by examples"),
    "rl": ("stepjax.train.commands.tune", "teach a model by rewards"),
    "teach": ("stepjax.train.commands.teach", "write a teacher's likeliest tokens for a data set"),
    "report": ("stepjax.train.commands.report", "show what a training run measured, with plots"),
    "release": ("stepjax.train.commands.release", "write a training run as a checkpoint folder and grade it"),
}

SEVERAL_HOSTS = ("generate", "score", "merge", "distill", "sft", "rl")  # verbs that several processes run together
ALONE = ("chat", "serve")  # verbs that several must not run
CLUSTER = "stepjax.sharding.cluster"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 the input is at fault, 2 the command line is, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _mend_streams()
    return _guarded(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    verb = argv[0] if argv else None
    args = _parser(verb).parse_args(argv)
    if verb in ALONE:
        import_module(CLUSTER).refuse(verb)
    if verb not in SEVERAL_HOSTS:
        return args.run(args)
    return import_module(CLUSTER).run(args, lambda: _guarded(lambda: args.run(args)))


def _guarded(command: Callable[[], int]) -> int:
    """The command's exit code, or that of the error that ended it."""
    try:
        code = command()
        sys.stdout.flush()  # here, where a failure to write is still caught
        return code
    except StepjaxError as error:
        print(f"stepjax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left: not our error, and nothing more to say
        _discard_output()
        return 0
    except OSError as error:  # a full disk, a folder that may not be written to
        _discard_output()
        print(f"stepjax: error: {error}", file=sys.stderr)
        return 1


def _mend_streams() -> None:
    """A stream that the caller closed reads and writes nothing; a character that the terminal lacks becomes "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (open as long as the process)
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """What is still buffered goes nowhere, so that the interpreter's own flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen verb's module is imported, so that help and errors come at once."""
    parser = argparse.ArgumentParser(prog="stepjax", description="Step 3.5 Flash in JAX: run it, score it, train it.")
    parser.add_argument("--version", action="version", version=f"stepjax {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, summary) in VERBS.items():
        sub = verbs.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == verb:
            home = import_module(module)
            home.add_arguments(sub)
            if name in SEVERAL_HOSTS:
                import_module(CLUSTER).add_arguments(sub)
            sub.set_defaults(run=home.run, verb=name)
    return parser
