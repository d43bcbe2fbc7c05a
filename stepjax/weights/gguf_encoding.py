"""Float32 values into the blocks of a GGUF file: the types that `stepjax convert` writes.

Each function takes blocks [B, values] and returns their bytes [B, bytes]. Q8_0, Q4_0 and MXFP4 give the bytes of
gguf's own quantiser. Any encoding of the K types is valid; these search the scale that leaves the least error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

_SEARCHED = 8  # ranges that are tried for a group


def q8_0(w: np.ndarray) -> np.ndarray:
    """``d = amax / 127``; values are divided by it before it is rounded, and round half away from zero."""
    d = np.abs(w).max(axis=-1, keepdims=True) / np.float32(127)
    q = _half_away(w * _inverse(d))
    return np.concatenate([_half_bytes(d), q.astype(np.int8).view(np.uint8)], axis=-1)


def q4_0(w: np.ndarray) -> np.ndarray:
    """The value of largest magnitude becomes −8."""
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=-1, keepdims=True), axis=-1)
    d = largest / np.float32(-8)
    codes = np.clip(np.trunc(w * _inverse(d) + np.float32(8.5)), 0, 15).astype(np.uint8)
    return np.concatenate([_half_bytes(d), _packed(codes)], axis=-1)


def mxfp4(w: np.ndarray) -> np.ndarray:
    """``2^(floor(log2 amax) − 2)``, and the nearest of the sixteen values; of two, the smaller magnitude."""
    amax = np.abs(w).max(axis=-1, keepdims=True)
    exponent = np.clip(np.frexp(amax)[1] - 3, -127, 127)  # frexp: amax = m · 2^e with m in [0.5, 1)
    exponent = np.where(amax > 0, exponent, -127)
    # Values below are a power of two times the weights, hence exact.
    scaled = np.ldexp(np.abs(w).astype(np.float64), -exponent)
    borders = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    codes = np.searchsorted(borders, scaled, side="left").astype(np.uint8)
    codes |= ((w < 0) & (codes > 0)).astype(np.uint8) << 3
    return np.concatenate([(exponent + 127).astype(np.uint8), _packed(codes)], axis=-1)


def q4_k(w: np.ndarray) -> np.ndarray:
    """Groups of 32 with a scale and a minimum of 6 bits each, as multiples of two float16 numbers."""
    groups = w.reshape(-1, 8, 32)
    scale, least = _fitted_range(groups, 15)
    d, dmin = (_half(x.max(axis=-1, keepdims=True) / np.float32(63)) for x in (scale, least))
    steps, minima = (
        np.clip(np.rint(x * _inverse(unit)), 0, 63).astype(np.uint8) for x, unit in ((scale, d), (least, dmin))
    )
    step = (d * steps)[..., None]
    codes = np.clip(np.rint((groups + (dmin * minima)[..., None]) * _inverse(step)), 0, 15).astype(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([_half_bytes(d), _half_bytes(dmin), _six_bits(steps, minima), packed], axis=-1)


def q6_k(w: np.ndarray) -> np.ndarray:
    """Groups of 16 with a signed scale of 8 bits, as a multiple of a float16 number."""
    groups = w.reshape(-1, 16, 16)
    scale = _fitted_scale(groups, -32)
    extreme = np.take_along_axis(scale, np.abs(scale).argmax(axis=-1, keepdims=True), axis=-1)
    d = _half(extreme / np.float32(-128))
    steps = np.clip(np.rint(scale * _inverse(d)), -128, 127)
    step = (d * steps.astype(np.float32))[..., None]
    codes = (np.clip(np.rint(groups * _inverse(step)), -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 128)
    low, high = codes & 15, codes >> 4
    low = (low[..., :64] | (low[..., 64:] << 4)).reshape(-1, 128)
    runs = high.reshape(-1, 2, 4, 32)
    high = (runs[:, :, 0] | (runs[:, :, 1] << 2) | (runs[:, :, 2] << 4) | (runs[:, :, 3] << 6)).reshape(-1, 64)
    return np.concatenate([low, high, steps.astype(np.int8).view(np.uint8), _half_bytes(d)], axis=-1)


ENCODERS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "q8_0": q8_0,
    "q6_k": q6_k,
    "q4_k": q4_k,
    "q4_0": q4_0,
    "mxfp4": mxfp4,
}


def _fitted_range(groups: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and minimum ≥ 0 of each group, ``w ≈ scale · code − minimum``.

    Codes are made with some ranges, each with the scale and the minimum that fit them best by least squares.
    """
    low = np.minimum(groups.min(axis=-1, keepdims=True), 0)
    span = np.maximum(groups.max(axis=-1, keepdims=True), 0) - low
    best = np.full(span.shape, np.inf, np.float32)
    scale, least = span / np.float32(most), -low
    sum_w, size = groups.sum(axis=-1, keepdims=True), np.float32(groups.shape[-1])
    for levels in np.linspace(-0.9, 1.1, _SEARCHED, dtype=np.float32) + np.float32(most):
        codes = np.clip(np.rint((groups - low) * (_inverse(span) * levels)), 0, most)
        sum_c, sum_cc, sum_cw = (x.sum(axis=-1, keepdims=True) for x in (codes, codes * codes, codes * groups))
        step = (size * sum_cw - sum_c * sum_w) * _inverse(size * sum_cc - sum_c * sum_c)
        begin = (sum_w - step * sum_c) / size
        from_zero = begin > 0
        step, begin = np.where(from_zero, sum_cw * _inverse(sum_cc), step), np.where(from_zero, np.float32(0), begin)
        error = np.square(codes * step + begin - groups).sum(axis=-1, keepdims=True)
        better = (error < best) & (step > 0)
        best, scale, least = (np.where(better, x, y) for x, y in ((error, best), (step, scale), (-begin, least)))
    return scale[..., 0], least[..., 0]


def _fitted_scale(groups: np.ndarray, low: int) -> np.ndarray:
    """The signed scale of each group, ``w ≈ scale · code`` with codes from ``low`` to ``−low − 1``."""
    largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    best, scale = np.full(largest.shape, np.inf, np.float32), largest / np.float32(low)
    for levels in np.linspace(-0.8, 0.8, _SEARCHED, dtype=np.float32) + np.float32(low):
        codes = np.clip(np.rint(groups * (_inverse(largest) * levels)), low, -low - 1)
        step = (codes * groups).sum(axis=-1, keepdims=True) * _inverse((codes * codes).sum(axis=-1, keepdims=True))
        error = np.square(codes * step - groups).sum(axis=-1, keepdims=True)
        better = error < best
        best, scale = np.where(better, error, best), np.where(better, step, scale)
    return scale[..., 0]


def _six_bits(steps: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Eight scales and eight minima in 12 bytes: [B, 12]."""
    first = (steps[:, :4] & 63) | ((steps[:, 4:] >> 4) << 6)
    second = (minima[:, :4] & 63) | ((minima[:, 4:] >> 4) << 6)
    return np.concatenate([first, second, (steps[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)], axis=-1)


def _packed(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits, the first half of a block in the low bits."""
    half = codes.shape[-1] // 2
    return codes[..., :half] | (codes[..., half:] << 4)


def _half(x: np.ndarray) -> np.ndarray:
    """Rounded to float16, as float32."""
    return x.astype(np.float16).astype(np.float32)


def _half_bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def _inverse(x: np.ndarray) -> np.ndarray:
    """1 / x, and 0 where x is 0 or its inverse is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / x
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _half_away(x: np.ndarray) -> np.ndarray:
    magnitude = np.abs(x)
    floor = np.floor(magnitude)
    return np.sign(x) * (floor + np.floor(2 * (magnitude - floor)))
