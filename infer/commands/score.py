"""``stepjax score``: the logits of given tokens, written to an .npz file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from stepjax.errors import CheckpointError, RequestError
from stepjax.infer.commands.generate import read_tokens
from stepjax.infer.commands.options import add_model_arguments, open_session
from stepjax.infer.commands.progress import shown_startup
from stepjax.whole_file import writing

if TYPE_CHECKING:
    from stepjax.calibration.certificate import SequenceScores
    from stepjax.infer.session import Session
    from stepjax.startup import Startup


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
    parser.add_argument(
        "--record-loads",
        type=Path,
        metavar="OUT.json",
        help="also write how many tokens chose each expert of each layer, for --expert-loads (default: no)",
    )
    parser.add_argument("--mtp", action="store_true", help="also write the logits of the MTP layers (default: no)")
    parser.add_argument(
        "--against",
        metavar="OTHER",
        help="another checkpoint of the model, as the one that --model was quantised from: how far the two are apart "
        "is printed and written beside OUT.npz as OUT.json (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Score every list j of the file.

    The file holds ``p{j}_ids`` [T], ``p{j}_logits`` [T, V] float32 and, with --mtp, ``p{j}_mtp{k}_logits`` [T − k, V]
    for depth k = 1 … 3, whose row t was fed token t + k.
    """
    prompts = read_tokens(args.tokens)
    if args.out.is_dir() or not args.out.parent.is_dir():
        raise RequestError(f"{args.out}: expected the name of a file in an existing folder")
    startup = shown_startup()
    other = _other(args, prompts, startup) if args.against else []
    session = open_session(args, startup=startup)
    for ids in prompts:
        session.check_ids(ids)
    if args.mtp and not session.max_drafts:
        raise RequestError("--mtp: this checkpoint has no MTP layers")

    import jax
    import numpy as np

    from stepjax.weights.finite import not_finite

    arrays, loads = {}, np.zeros((len(session.config.moe_layers), session.config.num_experts), np.int64)
    with startup.stage("scoring", "scoring", unit="sequences") as stage:
        for j, ids in enumerate(prompts):
            stage.advance(j, len(prompts))
            arrays[f"p{j}_ids"] = np.asarray(ids, np.int32)
            if args.record_loads:
                loads += session.expert_load(ids)
            if not args.mtp:
                arrays[f"p{j}_logits"] = session.logits(ids)
                continue
            arrays[f"p{j}_logits"], depths = session.score(ids)
            arrays |= {f"p{j}_mtp{k}_logits": logits for k, logits in enumerate(depths, start=1)}
    ours = [_scored(session, ids) for ids in prompts] if args.against else []
    if name := not_finite(arrays):
        raise CheckpointError(
            f"{args.model}: its scores ({name}) are not finite, and none are written; its weights hold NaN or "
            "infinity, or are too large for the dtype"
        )
    if jax.process_index():  # all processes have the same arrays; one writes them
        return 0
    with writing(args.out), args.out.open("wb") as file:  # a file object: numpy would append .npz to another name
        np.savez(file, **arrays)
    if args.record_loads:
        with writing(args.record_loads):
            args.record_loads.write_text(json.dumps(loads.tolist()), encoding="utf-8")
    print(f"{args.out}: {len(prompts)} sequences, {sum(map(len, prompts))} tokens")
    if args.against:
        _compare(args, session, ours, other)
    return 0


def _other(args: argparse.Namespace, prompts: list[list[int]], startup: Startup) -> list[SequenceScores]:
    """What the other checkpoint makes of the sequences; it is let go before ours is loaded."""
    plain = {"quantize": None, "keep_fp8": False, "dense_fp8": False, "cache_fp8": False, "mtp_from": None}
    options = {**vars(args), "model": args.against, **plain}
    session = open_session(argparse.Namespace(**options), startup=startup)
    for ids in prompts:
        session.check_ids(ids)
    with startup.stage("scoring", f"scoring {args.against}", unit="sequences") as stage:
        out = []
        for j, ids in enumerate(prompts):
            stage.advance(j, len(prompts))
            out.append(_scored(session, ids))
    return out


def _scored(session: Session, ids: list[int]) -> SequenceScores:
    import numpy as np

    from stepjax.calibration.certificate import SequenceScores

    return SequenceScores(np.asarray(ids, np.int32), *session.routed(ids))


def _compare(
    args: argparse.Namespace, session: Session, ours: list[SequenceScores], other: list[SequenceScores]
) -> None:
    """Print the distance of the two checkpoints, and write it as JSON."""
    from stepjax.calibration.certificate import certificate, write_certificate

    if ours[0].logits.shape[1] != other[0].logits.shape[1] or ours[0].experts.shape != other[0].experts.shape:
        raise RequestError(f"--against {args.against}: is of another model than {args.model}, expected one of its size")
    found = certificate(ours, other, layers=[layer.index for layer in session.config.moe_layers])
    about = {"model": args.model, "against": args.against, "dtype": args.dtype, "data": str(args.tokens)}
    path = args.out.with_suffix(".json")
    write_certificate(path, about | found)
    kl, routers = found["kl"], found["router_agreement"]["mean"]
    print(
        f"{path}: KL {kl['mean']:.6f} (p99 {kl['p99']:.6f}, max {kl['max']:.6f}), same top token "
        f"{found['same_top']:.2%}, routers agree {'–' if routers is None else f'{routers:.2%}'}"
    )
