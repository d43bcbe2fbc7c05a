"""Makes gguf_blocks.npz: blocks of every type that is read, and what the gguf package's own dequantiser makes of them.

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


if __name__ == "__main__":
    main()
