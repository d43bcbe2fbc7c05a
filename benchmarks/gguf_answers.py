"""Answers of llama.cpp and of this package from one GGUF file, token by token.

    python benchmarks/gguf_answers.py FILE.gguf [--tokens 100] [--out RESULT.json]

llama.cpp (the package xllamacpp, in this environment) answers a prompt greedily, its end tokens forbidden, and gives
the five likeliest tokens at each place. ``stepjax score`` then reads prompt and answer. llama.cpp rounds activations to
8 bits where weights are quantised, so that only a file in floats compares to rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "What is 467 + 358?"
LIKELY = -8.0  # log-probabilities from here on are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from stepjax.checkpoint.folder import open_folder
    from stepjax.text.chat import encode_chat

    folder = open_folder(args.file)
    assert folder.tokenizer is not None
    assert folder.template is not None
    prompt = encode_chat(folder.tokenizer, folder.template, [{"role": "user", "content": PROMPT}])
    ends = folder.checkpoint.config.eos_ids
    folder.template.close()
    answer = of_llama_cpp(args.file, prompt, args.tokens)
    result = {"file": args.file.name, **compared(args.file, prompt, answer, ends)}
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def of_llama_cpp(file: Path, prompt: list[int], num_tokens: int) -> list[dict[str, Any]]:
    """Each token of its answer with the likeliest ones at its place."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.n_parallel = str(file), 1024, False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    request = {
        "prompt": prompt,
        "max_tokens": num_tokens,
        "logprobs": 5,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = xllamacpp.Server(params).handle_completions(request)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == num_tokens, "it leaves out tokens that end within a character; take fewer, or another model"
    return content


def compared(file: Path, prompt: list[int], answer: list[dict[str, Any]], ends: tuple[int, ...]) -> dict[str, Any]:
    tokens = [place["id"] for place in answer]
    with tempfile.TemporaryDirectory() as folder:
        ids, out = Path(folder) / "ids.json", Path(folder) / "out.npz"
        ids.write_text(json.dumps([prompt + tokens]), encoding="utf-8")
        command = [sys.executable, "-m", "stepjax", "score", "--model", str(file), "--tokens", str(ids)]
        subprocess.run([*command, "--out", str(out), "--dtype", "float32"], check=True, capture_output=True)
        logits = np.load(out, allow_pickle=False)["p0_logits"][len(prompt) - 1 : -1].astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    differences = [
        abs(logprobs[i, other["id"]] - other["logprob"])
        for i, place in enumerate(answer)
        for other in place["top_logprobs"]
        if other["logprob"] > LIKELY
    ]
    logprobs[:, list(ends)] = -np.inf
    same = int((logprobs.argmax(axis=-1) == np.asarray(tokens)).sum())
    return {"tokens": len(tokens), "same": same, "largest_difference": float(max(differences))}


if __name__ == "__main__":
    main()
