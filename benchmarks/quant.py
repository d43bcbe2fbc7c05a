"""What quantising does to a model: errors of each layer's weights, and of the next token.

    python benchmarks/quant.py --json benchmarks/results/quant.json

Against the same checkpoint in float32 on given texts (``--prompts``, a text per line) or on chats that the checkpoint's
template renders: the relative error of the weights by layer, and of the next-token distributions the largest and mean
difference of logits, the Kullback-Leibler divergence and how often the likeliest token stays.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit
from rich.console import Console
from rich.table import Table

from stepjax.checkpoint.folder import open_folder
from stepjax.checkpoint.writer import save
from stepjax.infer.generate import generate
from stepjax.infer.load import load, use_caches
from stepjax.infer.session import Session
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.quantised import Quantised, dequantize

FORMATS: dict[str, dict[str, Any]] = {
    "fp8": {"keep_fp8": True},
    "int8": {"quantize": "int8"},
    "int4, 32": {"quantize": "int4", "group": 32},
    "int4, 64": {"quantize": "int4", "group": 64},
    "other maps in FP8": {"dense_fp8": True},
    "cache in FP8": {"cache_fp8": True},
    "int4, 64, all else in FP8": {"quantize": "int4", "group": 64, "dense_fp8": True, "cache_fp8": True},
}
CHATS = ("What is 12 + 30?", "Say abc backwards.", "Hello!", "Which is more, 7 or 9?", "Copy: river", "47 - 18 = ?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="step-tiny")
    parser.add_argument("--prompts", type=Path, help="a text per line, instead of chats")
    parser.add_argument("--answer-tokens", type=int, default=48, help="of the model's own answer, scored too")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_caches()
    base = load(args.model, dtype="float32")
    rows = scored_rows(base, args)
    expected = [base.logits(ids) for ids in rows]
    found: dict[str, Any] = {}
    for name, options in FORMATS.items():
        with tempfile.TemporaryDirectory() as scratch:
            held = load(source(args.model, name, Path(scratch)), dtype="float32", **options)
            found[name] = {
                "quantised_bytes": sum(w.nbytes for w in held.params.values() if isinstance(w, Quantised)),
                "layers": by_layer(base, held),
                **end_to_end(expected, [held.logits(ids) for ids in rows]),
            }
    show(found)
    if args.json:
        about = {"model": args.model, "tokens": sum(map(len, rows)), "commit": commit()}
        args.json.write_text(json.dumps(about | found, indent=2) + "\n", encoding="utf-8")


def scored_rows(session: Session, args: argparse.Namespace) -> list[list[int]]:
    """Prompts with the model's own greedy answers."""
    if args.prompts:
        prompts = [session.encode(line) for line in args.prompts.read_text(encoding="utf-8").splitlines() if line]
    else:
        prompts = [session.encode_chat([{"role": "user", "content": text}]) for text in CHATS]
    params = session.sampling(temperature=0.0, max_tokens=args.answer_tokens, seed=0)
    done = generate(session, prompts, params)
    return [[*prompt, *each.ids] for prompt, each in zip(prompts, done, strict=True)]


def source(model: str, name: str, scratch: Path) -> Path | str:
    """The folder to load: for FP8 a copy of the checkpoint that stores it."""
    folder = open_folder(model)
    if name != "fp8" or folder.checkpoint.experts.name == "fp8":
        return model
    return save(scratch / "fp8", folder.checkpoint.config, {}, source=folder.path, experts=Fp8Blocks())


def by_layer(base: Session, held: Session) -> dict[str, float]:
    """Root-mean-square error of the quantised weights over their own, by layer; an output matrix is one too."""
    errors: dict[str, list[float]] = {}
    for path, weight in held.params.items():
        if isinstance(weight, Quantised):
            wide, exact = np.asarray(dequantize(weight, jnp.float32)), np.asarray(base.params[path])
            errors.setdefault(_layer(path), []).append(float(np.mean((wide - exact) ** 2) / np.mean(exact**2)))
    return {layer: float(np.sqrt(np.mean(each))) for layer, each in errors.items()}


def _layer(path: str) -> str:
    part, number, *_ = path.split(".")
    return {"layers": number, "mtp": f"mtp {number}"}.get(part, "output")


def end_to_end(expected: list[np.ndarray], found: list[np.ndarray]) -> dict[str, float]:
    """Of all next-token distributions."""
    a, b = np.concatenate(expected), np.concatenate(found)
    log_a, log_b = (np.asarray(jax.nn.log_softmax(each, axis=-1)) for each in (a, b))
    divergence = np.sum(np.exp(log_a) * (log_a - log_b), axis=-1)
    return {
        "max_logit_error": float(np.abs(a - b).max()),
        "mean_logit_error": float(np.abs(a - b).mean()),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "same_top": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def show(found: dict[str, Any]) -> None:
    table = Table("held in", "bytes", "weights, by layer", "logits: mean, largest", "KL: mean, largest", "same top")
    for name, each in found.items():
        table.add_row(
            name,
            f"{each['quantised_bytes']:,}",
            " ".join(f"{error:.2%}" for error in each["layers"].values()),
            f"{each['mean_logit_error']:.3f}, {each['max_logit_error']:.2f}",
            f"{each['mean_kl']:.5f}, {each['max_kl']:.3f}",
            f"{each['same_top']:.2%}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
