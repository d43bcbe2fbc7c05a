"""``stepjax score``: the logits of given tokens, written to an .npz file."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.errors import RequestError
from stepjax.infer.commands.generate import read_tokens
from stepjax.infer.commands.options import add_model_arguments, open_session
from stepjax.infer.commands.progress import shown_startup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--tokens",
        type=Path,
        required=True,
        metavar="IN.json",
        help="a JSON list of lists of token ids, e.g. [[0, 71], [0, 5]]",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="OUT.npz", help="file to write, in NumPy's .npz format"
    )
    parser.add_argument("--mtp", action="store_true", help="also write the logits of the MTP layers (default: no)")


def run(args: argparse.Namespace) -> int:
    """Score every list j of the file.

    The file holds ``p{j}_ids`` [T], ``p{j}_logits`` [T, V] float32 and, with --mtp, ``p{j}_mtp{k}_logits`` [T − k, V]
    for depth k = 1 … 3, whose row t was fed token t + k.
    """
    prompts = read_tokens(args.tokens)
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise RequestError(f"{args.out}: expected the name of a file in an existing folder")
    startup = shown_startup()
    session = open_session(args, startup=startup)
    for ids in prompts:
        session.check_ids(ids)
    if args.mtp and not session.max_drafts:
        raise RequestError("--mtp: this checkpoint has no MTP layers")

    import jax
    import numpy as np

    arrays = {}
    with startup.stage("scoring", "scoring", unit="sequences") as stage:
        for j, ids in enumerate(prompts):
            stage.advance(j, len(prompts))
            arrays[f"p{j}_ids"] = np.asarray(ids, np.int32)
            if not args.mtp:
                arrays[f"p{j}_logits"] = session.logits(ids)
                continue
            arrays[f"p{j}_logits"], depths = session.score(ids)
            arrays |= {f"p{j}_mtp{k}_logits": logits for k, logits in enumerate(depths, start=1)}
    if jax.process_index():  # all processes have the same arrays; one writes them
        return 0
    try:
        with args.out.open("wb") as file:  # a file object: numpy would append .npz to another name
            np.savez(file, **arrays)
    except OSError as error:
        raise RequestError(f"{args.out}: cannot be written ({error.strerror})") from None
    print(f"{args.out}: {len(prompts)} sequences, {sum(map(len, prompts))} tokens")
    return 0
