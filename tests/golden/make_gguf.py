"""Makes what tests know of GGUF by the gguf package itself.

gguf_blocks.npz has blocks of every type that is read and what the package's own dequantiser makes of them.
gguf_model.gguf is a model by its own writer, with sums of its dequantised tensors beside it.

    python tests/golden/make_gguf.py

needs gguf 0.19 and nothing of this package. Bytes are random, but for the float16 scales, so that every bit is used.
"""

from __future__ import annotations

from pathlib import Path

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
from gguf.quants import dequantize, quantize  # pyright: ignore[reportMissingImports]

# Where float16 numbers begin in a block; MXFP4 has an exponent instead.
FLOATS = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "MXFP4": (),
}
ENCODED = ("Q8_0", "Q4_0", "MXFP4")  # of which the package has a quantiser, and this project writes them
ROWS, BLOCKS = 3, 2


def main() -> None:
    write_model(Path(__file__).with_name("gguf_model.gguf"))
    random = np.random.default_rng(8)
    arrays: dict[str, np.ndarray] = {"weights": (0.05 * random.standard_normal((4, 256))).astype(np.float32)}
    arrays["weights"][0, :40] = 0
    for name, floats in FLOATS.items():
        kind = gguf.GGMLQuantizationType[name]
        _, num_bytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = random.integers(0, 256, (ROWS, BLOCKS, num_bytes), np.uint8)
        for start in floats:
            scales = random.standard_normal((ROWS, BLOCKS, 1)).astype("<f2")
            scales[0, 0] = 6e-8  # subnormal
            blocks[..., start : start + 2] = scales.view(np.uint8)
        if not floats:
            blocks[..., 0] = random.integers(100, 150, (ROWS, BLOCKS))
            blocks[0, :, 0] = 0, 254
        stored = blocks.reshape(ROWS, -1)
        arrays[f"{name.lower()}.stored"] = stored
        with np.errstate(over="ignore"):
            arrays[f"{name.lower()}.wide"] = dequantize(stored, kind)
        if name in ENCODED:
            arrays[f"{name.lower()}.encoded"] = quantize(arrays["weights"], kind)
    np.savez_compressed(Path(__file__).with_name("gguf_blocks.npz"), **arrays)  # pyright: ignore[reportArgumentType]


def write_model(path: Path) -> None:
    """A dense layer, a sliding and a full layer of four experts each; types differ from tensor to tensor."""
    random = np.random.default_rng(9)
    width, vocab, expert, head, heads = 32, 48, 32, 16, (2, 4, 2)
    writer = gguf.GGUFWriter(str(path), "step35")
    writer.add_name("golden")
    writer.add_block_count(3)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(64)
    writer.add_head_count(list(heads))
    writer.add_head_count_kv([1, 1, 1])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_freq_base(5e6)
    writer.add_rope_freq_base_swa(1e4)
    writer.add_sliding_window(8)
    writer.add_sliding_window_pattern([False, True, False])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    writer.add_expert_feed_forward_length(expert)
    writer.add_expert_shared_feed_forward_length(expert)
    writer.add_expert_weights_scale(3.0)
    writer.add_expert_weights_norm(True)
    writer.add_leading_dense_block_count(1)
    writer.add_swiglu_clamp_exp([0.0, 0.0, 7.0])
    writer.add_swiglu_clamp_shexp([0.0, 0.0, 16.0])
    writer.add_tokenizer_model("no_vocab")
    writer.add_eos_token_id(3)
    shapes = {"token_embd.weight": (vocab, width), "output_norm.weight": (width,), "output.weight": (vocab, width)}
    for i, count in enumerate(heads):
        at = f"blk.{i}"
        shapes |= {f"{at}.attn_norm.weight": (width,), f"{at}.ffn_norm.weight": (width,)}
        shapes |= {f"{at}.attn_q_norm.weight": (head,), f"{at}.attn_k_norm.weight": (head,)}
        shapes |= {f"{at}.attn_q.weight": (count * head, width), f"{at}.attn_gate.weight": (count, width)}
        shapes |= {f"{at}.attn_k.weight": (head, width), f"{at}.attn_v.weight": (head, width)}
        shapes |= {f"{at}.attn_output.weight": (width, count * head)}
        suffix, lead, hidden = ("", (), 64) if i == 0 else ("_exps", (4,), expert)
        for name, shape in (("gate", (hidden, width)), ("up", (hidden, width)), ("down", (width, hidden))):
            shapes[f"{at}.ffn_{name}{suffix}.weight"] = (*lead, *shape)
            if i:
                shapes[f"{at}.ffn_{name}_shexp.weight"] = shape
        if i:
            shapes |= {f"{at}.ffn_gate_inp.weight": (4, width), f"{at}.exp_probs_b.bias": (4,)}
    kinds = [
        gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_0", "MXFP4", "BF16", "F16", "Q4_1", "Q5_0", "F32")
    ]
    wide = {}
    for i, (name, shape) in enumerate(shapes.items()):
        value = (0.2 * random.standard_normal(shape)).astype(np.float32)
        if len(shape) == 1 or "gate_inp" in name:
            wide[name] = value
            writer.add_tensor(name, value)
            continue
        kind = kinds[i % len(kinds)]
        stored = quantize(value, kind)
        wide[name] = np.asarray(dequantize(stored, kind), np.float32).reshape(shape)
        writer.add_tensor(name, stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # Of each tensor the sum over its first axis, which any difference shows in.
    sums = {name: value.astype(np.float64).sum(axis=0) for name, value in wide.items()}
    np.savez_compressed(path.with_suffix(".npz"), **sums)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
