"""``stepjax convert``: write a checkpoint again with its routed experts in another format, or as a GGUF file."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from stepjax.checkpoint.folder import ModelFolder, open_folder
from stepjax.checkpoint.gguf.model import GgufCheckpoint
from stepjax.checkpoint.gguf.parts import is_gguf
from stepjax.checkpoint.gguf.writer import FORMS as GGUF_FORMS, write_gguf
from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.stored_weights import StoredWeights
from stepjax.checkpoint.text_files import text_files
from stepjax.commands.writing import add_size, max_shard_bytes, progress_bar
from stepjax.errors import RequestError
from stepjax.packings.written import FORMS, GROUP, WrittenForm
from stepjax.weights.formats import FORMATS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, GGUF file, hub id or embedded name")
    parser.add_argument(
        "target", metavar="DST", type=Path, help="folder or .gguf file to write; it appears complete or not at all"
    )
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument(
        "--form",
        choices=tuple(dict.fromkeys((*FORMS, *GGUF_FORMS))),
        help=f"form of the routed experts as other engines read it: in a folder {', '.join(FORMS)}; in a .gguf file "
        f"{', '.join(GGUF_FORMS)} (default: none; this or --experts is needed)",
    )
    forms.add_argument(
        "--experts",
        choices=tuple(name for name, format in FORMATS.items() if format.spelled or name in FORMS),
        help="format of the routed experts, with other quantised weights left as they are; int8, int4, nvfp4 and mxfp4 "
        "are the same as with --form (default: none)",
    )
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help=f"columns that share a scale (default: {GROUP} in int4, all in int8)",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="DATA",
        help="round --form int4 or int8 by the inputs that experts get from DATA, a .json file with lists of token ids "
        "or a text; writes the distance to SRC as quantisation.json (default: round to nearest)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="BITS",
        help="with --form int4 --calibrate: mean bits of an expert's value, 4 to 8; the layers that cost most in 4 "
        "bits get 8 (default: all have 4)",
    )
    parser.add_argument(
        "--mtp-from",
        metavar="OTHER",
        help="checkpoint of the same base to take MTP layers from, if SRC has none (default: its own)",
    )
    add_size(parser)


def run(args: argparse.Namespace) -> int:
    into_file = is_gguf(args.target)
    if args.experts and not FORMATS[args.experts].spelled:
        args.form, args.experts = args.experts, None
    _check_form(args, into_file=into_file)
    folder = open_folder(args.source, mtp_from=args.mtp_from)
    if into_file:
        return _to_gguf(folder, args)
    size = max_shard_bytes(args)
    written = _write_form(folder, args, size) if args.form else _write_own(folder, args, size)
    checkpoint = Checkpoint(written)
    kinds = {checkpoint.format(path).name for path in checkpoint.paths if ".experts." in path}
    named = " and ".join(sorted(kinds)) if len(kinds) > 1 else args.form or args.experts
    print(f"{written}: {checkpoint.num_bytes:,} bytes of weights, experts in {named}")
    return 0


def _check_form(args: argparse.Namespace, *, into_file: bool) -> None:
    forms = GGUF_FORMS if into_file else FORMS
    if args.form not in forms and (args.form or into_file):
        raise RequestError(
            f"--form {args.form}: is not a form of {'a .gguf file' if into_file else 'a folder'}, expected one of "
            f"{', '.join(forms)}"
        )
    if into_file and args.group is not None:
        raise RequestError(f"--group: {args.form} in a .gguf file has no groups to choose; leave it out")
    if args.experts and (args.mtp_from or args.calibrate):
        name = "--mtp-from" if args.mtp_from else "--calibrate"
        raise RequestError(f"{name}: goes with --form, such as --form int4")
    if args.budget is not None and not args.calibrate:
        raise RequestError("--budget: layers are measured on data; give it together with --calibrate DATA")
    if into_file and args.calibrate:
        raise RequestError("--calibrate: goes with a folder in --form int4 or int8, not with a .gguf file")


def _write_form(folder: ModelFolder, args: argparse.Namespace, size: int) -> Path:
    """The experts as another tool spells them."""
    from stepjax.checkpoint.form_writer import write_form

    form = FORMS[args.form]
    form = form if args.group is None else form.with_group(args.group)
    files = None if folder.path.is_dir() else text_files(folder)
    companions = files.contents(folder.checkpoint.config) if files else None
    if args.calibrate:
        return _write_calibrated(folder, args, size, form, companions)
    with progress_bar() as progress:
        return write_form(
            args.target,
            folder.checkpoint,
            form,
            companions=companions,
            max_shard_bytes=size,
            progress=progress,
            say=_say,
        )


def _write_calibrated(
    folder: ModelFolder, args: argparse.Namespace, size: int, form: WrittenForm, companions: dict[str, bytes] | None
) -> Path:
    from stepjax.calibration.convert import CERTIFICATE, write_calibrated
    from stepjax.calibration.data import read_data
    from stepjax.checkpoint.writer import check_target

    check_target(args.target, overwrite=False)  # before the model runs
    data = read_data(args.calibrate, folder)
    given = [str(args.source), str(args.target), "--form", args.form, "--calibrate", str(args.calibrate)]
    given += ["--group", str(args.group)] if args.group else []
    given += ["--budget", f"{args.budget:g}"] if args.budget is not None else []
    given += ["--mtp-from", args.mtp_from] if args.mtp_from else []
    with progress_bar() as progress:
        found = write_calibrated(
            args.target,
            folder,
            form,
            data,
            command=shlex.join(["stepjax", "convert", *given]),
            budget=args.budget,
            companions=companions,
            max_shard_bytes=size,
            progress=progress,
            say=_say,
        )
    held_out = found["held_out"]
    print(
        f"{args.target / CERTIFICATE}: KL to {args.source} {held_out['kl']['mean']:.6f}, same top token "
        f"{held_out['same_top']:.2%}, on {held_out['tokens']:,} tokens that were held out"
    )
    return args.target


def _say(text: str) -> None:
    print(f"stepjax: {text}", file=sys.stderr)


def _write_own(folder: ModelFolder, args: argparse.Namespace, size: int) -> Path:
    """The experts in the release's layout, and other quantised weights as they are."""
    from stepjax.checkpoint.writer import save

    source = folder.checkpoint
    config, weights, origin, companions = source.config, {}, folder.path, None
    if not folder.path.is_dir():
        files = text_files(folder)
        config = config if source.has_mtp else dataclasses.replace(config, mtp_layers=())
        weights, origin, companions = StoredWeights(source), None, files.contents(config) if files else None
    format = FORMATS[args.experts].for_model(source.config)
    if args.group is not None:
        raise RequestError(f"--group: {args.experts} has no groups to choose; leave it out")
    with progress_bar() as progress:
        return save(
            args.target,
            config,
            weights,
            source=origin,
            companions=companions,
            experts=format,
            max_shard_bytes=size,
            progress=progress,
        )


def _to_gguf(folder: ModelFolder, args: argparse.Namespace) -> int:
    files = text_files(folder)
    with progress_bar() as progress:
        written = write_gguf(
            args.target,
            folder.checkpoint,
            form=args.form,
            vocabulary=files.metadata(folder.checkpoint.config.vocab_size) if files else None,
            progress=progress,
            say=lambda text: print(f"stepjax: {text}", file=sys.stderr),
        )
    tokenizer = "" if files else "; it has no tokenizer, since the source has none"
    print(f"{written}: {GgufCheckpoint(written).num_bytes:,} bytes of weights, experts in {args.form}{tokenizer}")
    return 0
