"""What each form of the experts does to the next token, written, read or made while loading: 170 M random weights, and
step-tiny.

    python benchmarks/forms.py --json benchmarks/results/forms.json

KL to the same model in BF16, in nats, with the share of equal likeliest tokens and of routers' choices that agree, and
the bytes of all weights. The random model reads random tokens, step-tiny held-out rows of the tasks it was trained on.
Both run in float32, with the values that each form holds. The layouts of other tools, which are read and not written,
have their experts rounded to nearest here, in groups of 32 where they have groups. A form is written to a temporary
folder, measured and removed before the next. The JSON file is written after each form and keeps what it has of others,
so that a run that was ended, or one with ``--forms q4_k.gguf``, adds to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from provenance import commit

from stepjax.calibration.certificate import SequenceScores, certificate
from stepjax.calibration.forward import Forward
from stepjax.checkpoint.folder import open_weights
from stepjax.checkpoint.form_writer import write_form
from stepjax.checkpoint.gguf.writer import FORMS as GGUF_FORMS, write_gguf
from stepjax.checkpoint.source import WeightSource
from stepjax.checkpoint.writer import save
from stepjax.config import ASSETS, ModelConfig
from stepjax.errors import ConfigError
from stepjax.infer.load import load
from stepjax.packings.written import FORMS
from stepjax.weights.inventory import count_parameters, inventory

LAYERS, DENSE = 11, 2  # the release has 45, three of them dense
# The release's shape in small: 170 M parameters, 134 M of them in experts. Rows divide by 256, as Q4_K and Q6_K want.
WIDTHS: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1280,
    "num_hidden_layers": LAYERS,
    "moe_layers_enum": ",".join(map(str, range(DENSE, LAYERS))),
    "moe_num_experts": 38,
    "moe_top_k": 4,
    "moe_intermediate_size": 256,
    "share_expert_dim": 256,
    "vocab_size": 16384,
    "num_attention_heads": 8,
    "num_attention_groups": 2,
    "head_dim": 64,
    "num_nextn_predict_layers": 0,
    "eos_token_id": [1, 2],
}
WRITTEN = (*FORMS, *(f"{name}.gguf" for name in GGUF_FORMS))
# Of read layouts: bits, columns of a group (0: a row), and whether there are zero points; None: float8 by rows.
READ: dict[str, tuple[int, int, bool] | None] = {
    "float-quantized": None,
    "int-quantized": (8, 0, False),
    "awq-gptq-4": (4, 32, True),
    "gptq-8": (8, 32, True),
    "int3": (3, 32, False),
    "int6": (6, 32, False),
}
# Made while loading, by the flags without their dashes: the options of `stepjax.load`.
LOADED: dict[str, dict[str, Any]] = {
    "quantize int8": {"quantize": "int8"},
    "quantize int4": {"quantize": "int4"},
    "quantize int4 group 32": {"quantize": "int4", "group": 32},
    "quantize nvfp4": {"quantize": "nvfp4"},
    "quantize mxfp4": {"quantize": "mxfp4"},
    "dense-fp8": {"dense_fp8": True},
    "cache-fp8": {"cache_fp8": True},
    "quantize int4 dense-fp8 cache-fp8": {"quantize": "int4", "dense_fp8": True, "cache_fp8": True},
}
FLOATS = ("bf16", "f32.gguf", "f16.gguf", "bf16.gguf")  # which change BF16 weights little or not at all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="that are compared (default: %(default)s)")
    parser.add_argument(
        "--forms",
        nargs="*",
        default=[form for form in (*WRITTEN, *READ, *LOADED) if form not in FLOATS],
        help="of what is written, read or made while loading (default: all of few bits)",
    )
    parser.add_argument("--models", nargs="*", default=["random", "step-tiny"], help="(default: both)")
    parser.add_argument("--json", type=Path, help="a file for the figures (default: none)")
    args = parser.parse_args()
    found = json.loads(args.json.read_text(encoding="utf-8")) if args.json and args.json.exists() else {}
    found |= {"commit": commit(), "machine": platform.platform(), "cores": os.cpu_count(), "seed": 0}
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            folder = Path(scratch) / model
            if model == "random":
                config = random_config()
                save(folder, config, Drawn(config))
                tokens = np.random.default_rng(1).integers(3, config.vocab_size, (args.tokens // 256, 256)).tolist()
            else:
                folder, tokens = ASSETS / model, held_out(args.tokens // 512)
            held = found.setdefault(model, {})
            if held.get("tokens") != sum(map(len, tokens)):
                held.clear()  # figures of other tokens do not compare
            for entry in distances(folder, tokens, args.forms, Path(scratch)):
                held |= entry
                if args.json:
                    args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


def random_config() -> ModelConfig:
    hub = json.loads((ASSETS / "step-3.5-flash" / "config.json").read_text(encoding="utf-8"))
    hub |= {name: value[:LAYERS] for name, value in hub.items() if isinstance(value, list) and len(value) == 48}
    slide = hub["attention_other_setting"] | {"num_attention_heads": 12, "num_attention_groups": 2, "head_dim": 64}
    return ModelConfig.from_hf(hub | WIDTHS | {"attention_other_setting": slide | {"true_head_dim": 64}})


class Drawn(Mapping[str, Any]):
    """Normal weights of variance 1 / columns, each drawn from its own name when it is asked for, and norms of one."""

    def __init__(self, config: ModelConfig):
        self._shapes = {spec.path: spec.shape for spec in inventory(config)}

    def __getitem__(self, path: str) -> np.ndarray:
        shape = self._shapes[path]
        if len(shape) == 1:
            return np.zeros(shape, np.float32)  # norms are centred on one, and the routers' biases are none
        random = np.random.default_rng(list(path.encode()))
        return random.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[-1]))

    def __iter__(self) -> Any:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def held_out(rows: int) -> list[list[int]]:
    """Rows of 512 tokens of step-tiny's tasks, of the split that it was never trained on."""
    import tokenizers

    from stepjax.train.data import task_batches, tasks

    tokenizer = tokenizers.Tokenizer.from_file(str(ASSETS / "step-tiny" / "tokenizer.json"))
    settings = task_batches.BatchSettings(1, max(rows, 1), 512, dict(tasks.MIX), "test")
    return np.asarray(next(task_batches.batches(tokenizer, settings, step=0)).ids).tolist()


def distances(
    folder: Path, tokens: Sequence[Sequence[int]], forms: Sequence[str], scratch: Path
) -> Iterator[dict[str, Any]]:
    """What is known of the model, then the figures of each form by its name."""
    source = open_weights(folder)
    forward = Forward(source)
    layers = [layer.index for layer in source.config.moe_layers]
    reference = forward.scored(tokens)
    yield {
        "parameters": dataclasses.asdict(count_parameters(source.config)) | {"experts_per_token": None},
        "tokens": sum(map(len, tokens)),
        "bf16_bytes": source.num_bytes,
    }
    for form in forms:
        with tempfile.TemporaryDirectory(dir=scratch) as place:
            try:
                scores, num_bytes = scored(forward, source, form, tokens, Path(place))
            except ConfigError as error:  # rows that do not divide into blocks
                yield {form: {"cannot": str(error)}}
                continue
            held = certificate(scores, reference, layers=layers)
            cpu = resource.getrusage(resource.RUSAGE_SELF)
            print(f"{folder.name} {form}: {held['kl']['mean']:.5f} ({cpu.ru_utime:.0f} CPU s so far)", flush=True)
            figures = {name: held[name] for name in ("kl", "same_top")}
            figures["router_agreement"] = held["router_agreement"]["mean"]
            yield {form: figures | ({"bytes": num_bytes} if num_bytes else {})}


def scored(
    forward: Forward, source: WeightSource, form: str, tokens: Sequence[Sequence[int]], place: Path
) -> tuple[list[SequenceScores], int]:
    """What the model makes of the tokens in a form, and the bytes of its files; 0 where it is not written."""
    if form in LOADED:
        session = load(source.folder, dtype="float32", **LOADED[form])
        return [SequenceScores(np.asarray(ids, np.int32), *session.routed(ids)) for ids in tokens], 0
    weights, num_bytes = values(source, form, place)
    with forward.replaced(weights):
        return forward.scored(tokens), num_bytes


def values(source: WeightSource, form: str, place: Path) -> tuple[dict[str, np.ndarray], int]:
    """What a form makes of the weights, in float32, and the bytes of its files; 0 where it is not written."""
    if form in READ:
        experts = (path for path in source.paths if ".experts." in path)
        return {path: rounded(source.read(path, dtype=np.float32), READ[form]) for path in experts}, 0
    written = open_weights(as_form(source, form, place))
    return {path: written.read(path, dtype=np.float32) for path in written.paths}, written.num_bytes


def rounded(w: np.ndarray, rule: tuple[int, int, bool] | None) -> np.ndarray:
    """Rounded to nearest as the tools do it: compressed-tensors' observers, AutoAWQ's and GPTQ's zero points."""
    if rule is None:
        scale = np.abs(w).max(axis=-1, keepdims=True) / np.float32(448)
        return (w / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    bits, columns, zeros = rule
    groups = w.reshape(*w.shape[:-1], -1, columns or w.shape[-1])
    top = 2**bits - 1
    if zeros:
        low, high = (np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0))
        scale = (high - low) / np.float32(top)
        zero = np.rint(-low / scale)
        q = np.clip(np.rint(groups / scale) + zero, 0, top) - zero
    else:
        scale = np.abs(groups).max(-1, keepdims=True) / np.float32(top / 2)
        q = np.clip(np.rint(groups / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (q * scale).reshape(w.shape).astype(np.float32)


def as_form(source: WeightSource, form: str, place: Path) -> Path:
    if form.endswith(".gguf"):
        return write_gguf(place / form, source, form=form.removesuffix(".gguf"))
    return write_form(place / form, source, FORMS[form])


if __name__ == "__main__":
    main()
