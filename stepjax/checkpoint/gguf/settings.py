"""A model's settings between GGUF's metadata and the hub's ``config.json``.

GGUF has no key for the rotary width or for the llama3 scaling of frequencies. llama.cpp halves the width for full
layers and takes the scaling from the tensor ``rope_freqs.weight``, from which the rule is found again here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from stepjax.config import FULL, SLIDE, LayerSpec, ModelConfig, RopeScaling
from stepjax.errors import ConfigError

ARCHITECTURE = "step35"
SCALING_KEY = "stepjax.rope_scaling"  # ours: the four numbers of the llama3 rule, which others do not read
EOS_KEY = "stepjax.eos_token_ids"  # ours: all ids that end an answer, of which the tokenizer's keys hold one
SIGMOID = 2  # llama.cpp's number of the router's activation
_EOS_NAMES = ("<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<|im_end|>")  # of the release
_RELEASE = RopeScaling(2.0, 131072, 1.0, 32.0)
_TOLERANCE = 1e-4  # of factors in float32, computed from frequencies in float32


class Metadata:
    """Typed look-ups in a file's metadata; errors name the key."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values

    def number(self, key: str, *, default: float | None = None) -> Any:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ConfigError(f"{key}: is {_shown(value)}, expected a positive number")
        return _shortest(value) if isinstance(value, float) else value

    def count(self, key: str, *, default: int | None = None, low: int = 1) -> int:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**48:
            raise ConfigError(f"{key}: is {_shown(value)}, expected an integer from {low}")
        return value

    def by_layer(self, key: str, lengths: Sequence[int], kind: type, *, default: Any = None) -> list[Any]:
        """A list with one entry for each of `lengths[0]` layers, from a list or from one value for all.

        A list may also have the other lengths: its missing entries are None.
        """
        value = self.values.get(key, default)
        entries = value if isinstance(value, list) else [value] * lengths[0]
        if len(entries) not in lengths:
            raise ConfigError(f"{key}: has {len(entries)} entries, expected {' or '.join(map(str, lengths))}")
        for i, entry in enumerate(entries):
            right = isinstance(entry, kind) or (kind is float and isinstance(entry, int))
            if not right or (isinstance(entry, bool) and kind is not bool):
                raise ConfigError(f"{key}: entry {i} is {_shown(entry)}, expected a {kind.__name__}")
        entries = [_shortest(entry) if isinstance(entry, float) else entry for entry in entries]
        return entries + [None] * (lengths[0] - len(entries))


def to_hub(
    values: Mapping[str, Any], *, vocab_size: int, rope_factors: np.ndarray | None
) -> tuple[dict[str, Any], list[str]]:
    """The ``config.json`` of a file, and notes for the user.

    Args:
      vocab_size: rows of the embedding.
      rope_factors: ``rope_freqs.weight``, if the file has it.

    Raises:
      ConfigError: a key is missing or contradicts another; the message starts with its name.
    """
    meta = Metadata(values)
    check_architecture(values)
    blocks = meta.count(f"{ARCHITECTURE}.block_count")
    num_mtp = meta.count(f"{ARCHITECTURE}.nextn_predict_layers", default=0, low=0)
    if num_mtp >= blocks:
        raise ConfigError(f"{ARCHITECTURE}.nextn_predict_layers: is {num_mtp}, of {blocks} blocks in all")
    num_layers, lengths = blocks - num_mtp, (blocks, blocks - num_mtp)

    def by_layer(name: str, kind: type, **options: Any) -> list[Any]:
        return meta.by_layer(f"{ARCHITECTURE}.{name}", lengths, kind, **options)

    def count(name: str, **options: Any) -> int:
        return meta.count(f"{ARCHITECTURE}.{name}", **options)

    slides = by_layer("attention.sliding_window_pattern", bool)[:num_layers]
    # Of the MTP blocks nothing is believed: one converter wrote heads and windows of full layers for them.
    kinds = [SLIDE if slide else FULL for slide in slides] + [SLIDE] * num_mtp
    _check_fixed(meta, num_layers)
    head_dim = count("attention.key_length")
    if count("attention.value_length", default=head_dim) != head_dim:
        raise ConfigError(f"{ARCHITECTURE}.attention.value_length: differs from key_length = {head_dim}")
    rotated = count("rope.dimension_count", default=head_dim)
    heads, kv_heads = (
        _by_kind(f"{ARCHITECTURE}.attention.{name}", by_layer(f"attention.{name}", int)[:num_layers], kinds)
        for name in ("head_count", "head_count_kv")
    )
    theta = meta.number(f"{ARCHITECTURE}.rope.freq_base")
    thetas = {FULL: theta, SLIDE: meta.number(f"{ARCHITECTURE}.rope.freq_base_swa", default=theta)}
    rotated_swa = count("rope.dimension_count_swa", default=rotated)
    # Full layers rotate pairs of half of it.
    for name, dimensions, unit in (("", rotated, 4), ("_swa", rotated_swa, 2)):
        if dimensions % unit or dimensions > head_dim:
            raise ConfigError(
                f"{ARCHITECTURE}.rope.dimension_count{name}: is {dimensions}, expected a multiple of {unit} up to "
                f"key_length = {head_dim}"
            )
    widths = {FULL: rotated // 2, SLIDE: rotated_swa}
    if count("vocab_size", default=vocab_size) != vocab_size:
        raise ConfigError(
            f"{ARCHITECTURE}.vocab_size: is {count('vocab_size')}, but token_embd.weight has {vocab_size} rows"
        )
    dense = count("leading_dense_block_count", default=0, low=0)
    limits = {
        ours: [entry or 0.0 for entry in by_layer(name, float, default=0.0)]
        for ours, name in (("swiglu_limits", "swiglu_clamp_exp"), ("swiglu_limits_shared", "swiglu_clamp_shexp"))
    }
    eos, notes = _eos_ids(meta)
    hub: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "vocab_size": vocab_size,
        "hidden_size": count("embedding_length"),
        "intermediate_size": count("feed_forward_length"),
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": num_mtp,
        "max_position_embeddings": count("context_length"),
        "rms_norm_eps": meta.number(f"{ARCHITECTURE}.attention.layer_norm_rms_epsilon"),
        "num_attention_heads": heads[FULL],
        "num_attention_groups": kv_heads[FULL],
        "head_dim": head_dim,
        "attention_other_setting": {
            "attention_type": SLIDE,
            "num_attention_heads": heads[SLIDE],
            "num_attention_groups": kv_heads[SLIDE],
            "head_dim": head_dim,
        },
        "layer_types": kinds,
        "sliding_window": count("attention.sliding_window"),
        "rope_theta": [thetas[kind] for kind in kinds],
        "partial_rotary_factors": [widths[kind] / head_dim for kind in kinds],
        "use_rope_layers": [],
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "sink": False,
        "zero_centered": True,
        "use_moe": True,
        "moe_layers_enum": ",".join(map(str, range(dense, num_layers))) or [],
        "moe_num_experts": count("expert_count"),
        "moe_top_k": count("expert_used_count"),
        "moe_intermediate_size": count("expert_feed_forward_length"),
        "share_expert_dim": count("expert_shared_feed_forward_length"),
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": meta.number(f"{ARCHITECTURE}.expert_weights_scale", default=1.0),
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        **limits,
        "tie_word_embeddings": False,
        "bos_token_id": meta.count("tokenizer.ggml.bos_token_id", default=0, low=0),
        "eos_token_id": eos,
    }
    if rope_factors is not None:
        scaling, note = _rope_scaling(values, rope_factors, theta=theta, width=widths[FULL], head_dim=head_dim)
        notes += [note] if note else []
        if scaling is not None:
            hub |= {"rope_scaling": _hub_scaling(scaling), "yarn_only_types": [FULL]}
    return hub, notes


def check_architecture(values: Mapping[str, Any]) -> None:
    """Raise ConfigError unless the file is of this model."""
    found = values.get("general.architecture")
    if found != ARCHITECTURE:
        more = "; it is the vision half of a model" if found == "clip" else ""
        raise ConfigError(
            f"general.architecture: is {_shown(found)}, expected {ARCHITECTURE!r}; other architectures are not "
            f"supported{more}"
        )


def rope_factors(layer: LayerSpec, *, width: int) -> np.ndarray:
    """What ``rope_freqs.weight`` holds: by how much each frequency of a layer is divided, and 1 up to ``width / 2``."""
    factors = np.ones(width // 2, np.float32)
    if layer.rope.scaling is not None:
        scaled = _factors(layer.rope.scaling, theta=layer.rope.theta, width=layer.rope.width)
        factors[: len(scaled)] = scaled
    return factors


def to_metadata(config: ModelConfig, *, mtp: bool) -> dict[str, Any]:
    """The metadata of a model; the inverse of `to_hub`.

    Args:
      mtp: whether the file has the MTP layers.

    Raises:
      ConfigError: the model has something that GGUF has no key for.
    """
    layers = config.all_layers if mtp else config.layers
    full = next((layer for layer in config.layers if layer.window is None), None)
    slide = next((layer for layer in layers if layer.window is not None), None)
    moe = [layer.index for layer in config.moe_layers]
    if full is None or slide is None or moe != list(range(moe[0] if moe else 0, len(config.layers))):
        raise ConfigError("layers: GGUF holds full and sliding layers, with the dense ones in front")
    if (full.rope.width, slide.rope.width) != (full.head_dim // 2, full.head_dim) or slide.head_dim != full.head_dim:
        raise ConfigError(
            f"partial_rotary_factors: full layers rotate {full.rope.width} of {full.head_dim} dims and sliding ones "
            f"{slide.rope.width} of {slide.head_dim}; llama.cpp rotates half of a head in full layers, else all of it"
        )
    if slide.rope.scaling is not None:
        raise ConfigError("yarn_only_types: llama.cpp scales the frequencies of full layers only")
    own = {
        "block_count": np.uint32(len(layers)),
        "context_length": np.uint32(config.max_positions),
        "embedding_length": np.uint32(config.hidden_size),
        "feed_forward_length": np.uint32(config.intermediate_size),
        "leading_dense_block_count": np.uint32(len(config.layers) - len(moe)),
        "moe_every_n_layers": np.uint32(1),
        "attention.head_count": np.array([layer.num_heads for layer in layers], np.int32),
        "attention.head_count_kv": np.array([layer.num_kv_heads for layer in layers], np.int32),
        "attention.key_length": np.uint32(full.head_dim),
        "attention.value_length": np.uint32(full.head_dim),
        "attention.sliding_window": np.uint32(slide.window or 0),
        "attention.sliding_window_pattern": np.array([layer.window is not None for layer in layers]),
        "attention.layer_norm_rms_epsilon": np.float32(config.norm_eps),
        "rope.dimension_count": np.uint32(full.head_dim),
        "rope.freq_base": np.float32(full.rope.theta),
        "rope.freq_base_swa": np.float32(slide.rope.theta),
        "expert_count": np.uint32(config.num_experts),
        "expert_used_count": np.uint32(config.top_k),
        "expert_feed_forward_length": np.uint32(config.expert_size),
        "expert_shared_feed_forward_length": np.uint32(config.shared_size),
        "expert_weights_scale": np.float32(config.router_scale),
        "expert_weights_norm": np.bool_(True),
        "expert_gating_func": np.uint32(SIGMOID),
        "swiglu_clamp_exp": np.array([layer.limit or 0 for layer in layers], np.float32),
        "swiglu_clamp_shexp": np.array([layer.limit_shared or 0 for layer in layers], np.float32),
        "vocab_size": np.uint32(config.vocab_size),
    }
    if mtp:
        own["nextn_predict_layers"] = np.uint32(len(config.mtp_layers))
    values = {f"{ARCHITECTURE}.{name}": value for name, value in own.items()}
    values[EOS_KEY] = np.array(config.eos_ids, np.int32)
    if scaling := full.rope.scaling:
        numbers = (scaling.factor, scaling.original_max_position, scaling.low_freq_factor, scaling.high_freq_factor)
        values[SCALING_KEY] = np.array(numbers, np.float64)
    return values


def _check_fixed(meta: Metadata, num_layers: int) -> None:
    """Keys that may have one value only."""
    for name, expected in (
        ("expert_gating_func", SIGMOID),
        ("expert_weights_norm", True),
        ("moe_every_n_layers", 1),
        ("rope.scaling.type", "none"),
        ("expert_group_count", 1),
        ("attention.causal", True),
    ):
        value = meta.values.get(f"{ARCHITECTURE}.{name}", expected)
        if value != expected or isinstance(value, bool) != isinstance(expected, bool):
            raise ConfigError(
                f"{ARCHITECTURE}.{name}: is {_shown(value)}, but this model is defined with {expected!r} only"
            )


def _by_kind(key: str, counts: Sequence[int], kinds: Sequence[str]) -> dict[str, int]:
    """The one count of each kind of layer; where there is none of a kind, the other's."""
    found: dict[str, int] = {}
    for i, (count, kind) in enumerate(zip(counts, kinds, strict=False)):
        if found.setdefault(kind, count) != count:
            raise ConfigError(f"{key}: entry {i} is {count}, but another {kind} layer has {found[kind]}")
    return {FULL: found.get(FULL, counts[0]), SLIDE: found.get(SLIDE, counts[0])}


def _eos_ids(meta: Metadata) -> tuple[list[int], list[str]]:
    """All ids that end an answer: by our key if the file has it, else the tokenizer's and those of known names."""
    own = meta.values.get(EOS_KEY)
    if own is not None:
        return meta.by_layer(EOS_KEY, (len(own) if isinstance(own, list) else 1,), int), []
    tokens = meta.values.get("tokenizer.ggml.tokens")
    ids = [tokens.index(name) for name in _EOS_NAMES if isinstance(tokens, list) and name in tokens]
    ids += [
        meta.count(key, low=0)
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in meta.values
    ]
    if not ids:
        return [1], ["names no token that ends an answer; 1 is taken for it"]
    return list(dict.fromkeys(ids)), []


def _factors(scaling: RopeScaling, *, theta: float, width: int) -> np.ndarray:
    """The llama3 rule's divisors of ``width / 2`` frequencies (docs/architecture.md, Rotary embedding)."""
    turns = _turns(theta, width) * scaling.original_max_position
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return 1 / ((1 - keep) / scaling.factor + keep)


def _turns(theta: float, width: int) -> np.ndarray:
    """Turns of each frequency for one position."""
    return float(theta) ** (-np.arange(0, width, 2) / width) / (2 * math.pi)


def _rope_scaling(
    values: Mapping[str, Any], factors: np.ndarray, *, theta: float, width: int, head_dim: int
) -> tuple[RopeScaling | None, str]:
    """The llama3 rule behind ``rope_freqs.weight``, and a note if the tensor does not hold what it should.

    Converters before the middle of 2026 computed the factors as if full layers rotated whole heads. The rule is found
    from these too, and the factors are computed anew.
    """
    tensor = "rope_freqs.weight"
    stored = factors.astype(np.float64).reshape(-1)
    if len(stored) < width // 2 or not np.isfinite(stored).all() or (stored < 1 - _TOLERANCE).any():
        raise ConfigError(f"{tensor}: has {len(stored)} factors, expected at least {width // 2} numbers from 1")
    given = values.get(SCALING_KEY)
    if given is None and np.all(np.abs(stored - 1) <= _TOLERANCE):
        return None, ""
    if given is not None:
        candidates = [_given_scaling(given)]
    else:
        fits = [_fits(stored[: rotated // 2], theta=theta, width=rotated) for rotated in (width, head_dim)]
        candidates = [_RELEASE, *itertools.chain.from_iterable(fits)]
    for rotated, note in ((width, ""), (head_dim, f"{tensor}: its factors are those of whole heads; recomputed")):
        for scaling in candidates:
            expected = _factors(scaling, theta=theta, width=rotated)
            count = min(len(expected), len(stored))
            if np.allclose(stored[:count], expected[:count], rtol=_TOLERANCE, atol=0):
                return scaling, note
    raise ConfigError(f"{tensor}: its factors follow no llama3 rule for rotary width {width} or {head_dim}")


def _given_scaling(given: Any) -> RopeScaling:
    numbers = given if isinstance(given, list) else []
    if len(numbers) != 4 or not all(isinstance(x, float) and 0 < x < 2**40 for x in numbers):
        raise ConfigError(f"{SCALING_KEY}: is {_shown(given)}, expected four positive numbers")
    factor, original, low, high = numbers
    if high <= low or original != int(original):
        raise ConfigError(f"{SCALING_KEY}: is {_shown(given)}, expected factor, positions, low < high")
    return RopeScaling(factor, int(original), low, high)


def _fits(stored: np.ndarray, *, theta: float, width: int) -> Iterator[RopeScaling]:
    """Rules that may have given these factors, the rounder ones first.

    A rule keeps ``a · turns − b`` of a frequency, from 0 to 1, with ``a = positions / (high − low)`` and
    ``b = low / (high − low)``: the factors show these two at most.
    """
    factor = float(stored.max())
    if factor <= 1 + _TOLERANCE or len(stored) != width // 2:
        return
    turns = _turns(theta, width)
    keep = np.clip((1 / stored - 1 / factor) / (1 - 1 / factor), 0, 1)
    inside = (keep > 1e-3) & (keep < 1 - 1e-3)
    if inside.sum() >= 2:
        slope, start = np.polyfit(turns[inside], keep[inside], 1)
        slope, start = float(slope), -float(start)
    else:
        slope, start = _steep_enough(turns, keep, inside)
    if slope <= 0 or start <= 0:
        return
    high, positions = round(1 + 1 / start), slope / start
    if high > 1:
        positions = slope * (high - 1)
        yield RopeScaling(round(factor, 4), max(1024, round(positions / 1024) * 1024), 1.0, float(high))
        yield RopeScaling(round(factor, 4), max(1, round(positions)), 1.0, float(high))
    low = 2**20 * start / slope
    yield RopeScaling(factor, 2**20, low, low * (1 + 1 / start))


def _steep_enough(turns: np.ndarray, keep: np.ndarray, inside: np.ndarray) -> tuple[float, float]:
    """Some line that passes through the one frequency inside the ramp, if any, and leaves all others outside."""
    kept, dropped = turns[keep >= 1 - 1e-3], turns[keep <= 1e-3]
    above, below = float(kept.min(initial=2 * turns.max())), float(dropped.max(initial=0.0))
    if not inside.any():
        slope = 2 / (above - below)
        return slope, slope * (above + below) / 2 - 0.5
    place, share = float(turns[inside][0]), float(keep[inside][0])
    slope = 2 * max((1 - share) / (above - place), share / (place - below))
    return slope, slope * place - share


def _hub_scaling(scaling: RopeScaling) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }


def _shortest(value: float) -> float:
    """The decimal number that a float32 stands for: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
