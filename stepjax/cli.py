"""The command line: a table of verbs, each in a module that is imported only when its verb is used."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple

from stepjax._version import __version__
from stepjax.errors import StepjaxError
from stepjax.xla_defaults import USES, add_xla_option, set_xla_defaults


class Verb(NamedTuple):
    """A command. Its module has ``add_arguments(parser)`` and ``run(args) -> exit code``."""

    group: str  # its heading in ``stepjax --help``
    module: str
    summary: str
    example: str


_ANSWER, _MODELS, _PLAN, _TRAIN, _ADAPTERS = (
    "Run a model",
    "Look at and convert checkpoints",
    "Plan for a machine that need not be there",
    "Train",
    "Adapters",
)
VERBS = {
    "generate": Verb(
        _ANSWER,
        "stepjax.infer.commands.generate",
        "answer prompts",
        'stepjax generate --prompt "What is 467 + 358?" --temperature 0',
    ),
    "chat": Verb(
        _ANSWER, "stepjax.infer.commands.chat", "talk with a model in the terminal", "stepjax chat --model step-tiny"
    ),
    "serve": Verb(
        _ANSWER,
        "stepjax.train.commands.serve",
        "answer over HTTP with the APIs of OpenAI and Anthropic",
        "stepjax serve step-tiny --port 8000",
    ),
    "score": Verb(
        _ANSWER,
        "stepjax.infer.commands.score",
        "write the logits of given tokens to a file",
        "stepjax score --tokens tokens.json --out logits.npz",
    ),
    "bench": Verb(
        _ANSWER,
        "stepjax.infer.commands.bench",
        "measure the speed of the engine",
        "stepjax bench --requests 32 --prompt-tokens 20:200 --max-tokens 64 --slots 8",
    ),
    "info": Verb(
        _MODELS,
        "stepjax.commands.info",
        "show the parameters, sizes and layers of a model",
        "stepjax info step-3.5-flash",
    ),
    "convert": Verb(
        _MODELS,
        "stepjax.commands.convert",
        "write a checkpoint with its experts in another precision",
        "stepjax convert step-tiny step-tiny-int8 --form int8",
    ),
    "cache": Verb(
        _MODELS, "stepjax.commands.cache", "show or empty the cache of compiled programs", "stepjax cache --list"
    ),
    "plan": Verb(
        _PLAN,
        "stepjax.train.commands.plan",
        "choose a mesh, a strategy and a precision for given hardware",
        "stepjax plan --hardware 4xH100 --goal latency --context 8192 --experts bf16,fp8",
    ),
    "study": Verb(
        _PLAN,
        "stepjax.train.commands.study",
        "compile a step for a mesh and report its memory and communication",
        "stepjax study --mesh expert=8,tensor=4 --step decode --batch 32",
    ),
    "sft": Verb(
        _TRAIN,
        "stepjax.train.commands.tune",
        "fine-tune a model on examples",
        "stepjax sft settings.toml --out runs/mine --set optim.steps=200",
    ),
    "distill": Verb(
        _TRAIN,
        "stepjax.train.commands.tune",
        "fine-tune a model to match a teacher on its own answers",
        "stepjax distill step-tiny-distill --out runs/distill --set optim.steps=20",
    ),
    "rl": Verb(
        _TRAIN,
        "stepjax.train.commands.tune",
        "fine-tune a model with rewards",
        "stepjax rl settings.toml --out runs/rewards --set optim.steps=200",
    ),
    "teach": Verb(
        _TRAIN,
        "stepjax.train.commands.teach",
        "write a teacher's likeliest tokens for a data set",
        "stepjax teach settings.toml --out teacher.safetensors",
    ),
    "pretrain": Verb(
        _TRAIN,
        "stepjax.train.commands.pretrain",
        "train a model from scratch, as step-tiny was",
        "stepjax pretrain train/recipes/step-tiny.toml --out runs/step-tiny",
    ),
    "data": Verb(
        _TRAIN,
        "stepjax.train.commands.data",
        "check training data: bad rows, lengths, what is trained",
        "stepjax data check rows.jsonl --model step-tiny --length 256",
    ),
    "report": Verb(
        _TRAIN,
        "stepjax.train.commands.report",
        "show the metrics of a training run, with plots",
        "stepjax report runs/distill",
    ),
    "release": Verb(
        _TRAIN,
        "stepjax.train.commands.release",
        "write a pretraining run as a checkpoint folder and grade it",
        "stepjax release runs/step-tiny/2 --out step-tiny --require add=0.95",
    ),
    "export-adapter": Verb(
        _ADAPTERS,
        "stepjax.sharding.commands.export_adapter",
        "write an adapter as a PEFT folder",
        "stepjax export-adapter runs/distill/adapter distilled --model step-tiny-student",
    ),
    "import-adapter": Verb(
        _ADAPTERS,
        "stepjax.sharding.commands.import_adapter",
        "convert a PEFT folder to an adapter that training can start from",
        "stepjax import-adapter distilled start --model step-tiny-student",
    ),
    "merge": Verb(
        _ADAPTERS,
        "stepjax.commands.merge",
        "add an adapter to a checkpoint's weights",
        "stepjax merge step-tiny-student distilled merged",
    ),
}

# Verbs that several processes may run together.
SEVERAL_HOSTS = ("generate", "serve", "score", "merge", "distill", "sft", "rl")
CLUSTER = "stepjax.sharding.cluster"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 success, 1 an error in the input, 2 an error in the command line, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    _mend_streams()
    return _guarded(lambda: _run(argv))


def _run(argv: list[str]) -> int:
    verb = argv[0] if argv else None
    set_xla_defaults(verb, argv)
    args = _parser(verb).parse_args(argv)
    if verb not in SEVERAL_HOSTS:  # the others run in one process only
        import_module(CLUSTER).refuse(verb)
        return args.run(args)
    return import_module(CLUSTER).run(args, lambda: _guarded(lambda: args.run(args)))


def _guarded(command: Callable[[], int]) -> int:
    """The command's exit code, or that of the error that ended it."""
    try:
        code = command()
        sys.stdout.flush()  # here, so that a write error is still caught
        return code
    except StepjaxError as error:
        print(f"stepjax: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has ended, as `head` does: not an error
        _discard_output()
        return 0
    except OSError as error:  # a full disk, a folder without write permission
        _discard_output()
        print(f"stepjax: error: {error}", file=sys.stderr)
        return 1


def _mend_streams() -> None:
    """Replace closed streams by the null device, and characters that the terminal's encoding lacks by "?"."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (stays open)
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Discard what is still buffered, so that the flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the chosen verb's module is imported, so that help and errors appear at once."""
    parser = argparse.ArgumentParser(
        prog="stepjax",
        description="Step 3.5 Flash in JAX: run, serve, plan and train it. `stepjax COMMAND --help` shows an example.",
        epilog=_overview(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepjax {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (_, module, summary, example) in VERBS.items():
        sub = verbs.add_parser(
            name,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name == verb:
            home = import_module(module)
            home.add_arguments(sub)
            if name in USES:
                add_xla_option(sub)
            if name in SEVERAL_HOSTS:
                import_module(CLUSTER).add_arguments(sub)
            sub.set_defaults(run=home.run, verb=name)
    return parser


def _overview() -> str:
    """The commands in their groups."""
    lines = []
    for group in dict.fromkeys(verb.group for verb in VERBS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<15} {verb.summary}" for name, verb in VERBS.items() if verb.group == group]
    return "\n".join(lines[1:])
