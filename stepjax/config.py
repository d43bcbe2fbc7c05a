"""The model's configuration: read from the hub's ``config.json``, resolved once into one `LayerSpec` per layer.

The hub file spreads a layer over six lists and two settings blocks. Everything after this module sees a layer's
window, heads, rotary embedding and clamps as plain values, so no other file knows how the hub spells them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from sys import float_info
from typing import Any

from stepjax.errors import ConfigError

FULL, SLIDE = "full_attention", "sliding_attention"
ASSETS = Path(__file__).parent / "assets"
PRESETS = ("step-3.5-flash", "step-tiny")
OWN_FORMAT = "stepjax"  # quant_method of a checkpoint in a format that only this package reads, such as int8 and int4
TOOLS = (
    "compressed-tensors",
    "modelopt",
    "awq",
    "gptq",
    "auto-round",
    "intel/auto-round",
    "quark",
)  # other quant_methods
VISION_TYPE = "step3p7"  # model_type of Step 3.7, whose text_config is of this model


@dataclass(frozen=True)
class RopeScaling:
    """Frequency scaling of llama3: long wavelengths are divided by ``factor``, short ones kept, with a ramp between."""

    factor: float
    original_max_position: int  # tokens
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer: the first ``width`` dimensions of a head are rotated, the others not."""

    theta: float
    width: int  # even, ≤ head_dim
    scaling: RopeScaling | None


@dataclass(frozen=True)
class LayerSpec:
    """Settings of one layer. ``index`` counts backbone layers, then MTP layers."""

    index: int
    window: int | None  # keys that a query attends to, its own included; None: full causal attention
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    moe: bool
    limit: float | None  # clamp of the routed experts
    limit_shared: float | None  # clamp of the shared expert, or of the dense MLP

    @property
    def kind(self) -> str:
        """The hub's name of the attention kind."""
        return FULL if self.window is None else SLIDE


@dataclass(frozen=True)
class ModelConfig:
    """A resolved Step 3.5 model. Hashable, so it can be a static argument of a jitted function.

    Example:
      >>> import stepjax
      >>> config = stepjax.ModelConfig.preset("step-3.5-flash")
      >>> config.num_experts, config.top_k, len(config.layers)
      (288, 8, 45)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int  # dense MLP, MTP blocks included
    layers: tuple[LayerSpec, ...]
    mtp_layers: tuple[LayerSpec, ...]
    num_experts: int
    top_k: int  # experts per token
    expert_size: int  # hidden width of one routed expert
    shared_size: int  # hidden width of the shared expert
    router_scale: float
    norm_eps: float
    max_positions: int
    bos_id: int
    eos_ids: tuple[int, ...]
    fp8_block: tuple[int, int] | None = None  # rows, columns per scale of the FP8 release; None for the BF16 release
    expert_slots: int = 0  # places for routed experts' weights where some are held more than once; 0: one for each
    dense_fp8: bool = False  # the linear maps beside the routed experts are held in FP8 (`stepjax.weights.fp8_rows`)
    cache_fp8: bool = False  # so are keys and values (`stepjax.model.fp8_cache`)

    def with_slots(self, slots: int) -> ModelConfig:
        """The model with ``slots`` places for the weights of its experts; ConfigError if they are fewer."""
        if slots < self.num_experts:
            raise ConfigError(f"expert slots: {slots}, expected at least the {self.num_experts} experts")
        return dataclasses.replace(self, expert_slots=slots)

    @property
    def num_slots(self) -> int:
        """Places for the weights of routed experts."""
        return self.expert_slots or self.num_experts

    @classmethod
    def from_hf(cls, hub: Mapping[str, Any]) -> ModelConfig:
        """Resolve the hub's ``config.json``.

        Raises:
          ConfigError: a field is missing, contradictory, or asks for arithmetic that this model does not have; the
            message starts with the field's name.
        """
        return _Reader(text_config(hub)).resolve()

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read and resolve a ``config.json``; errors name the file."""
        try:
            hub = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror}); a checkpoint folder needs config.json"
            ) from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid JSON ({error}); copy it again") from None
        if not isinstance(hub, dict):
            raise ConfigError(f"{path}: holds a JSON {type(hub).__name__}, expected an object")
        try:
            return cls.from_hf(hub)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """The configuration of an embedded name, one of `PRESETS`."""
        if name not in PRESETS:
            raise ConfigError(f"preset {name!r} is unknown; choose one of {', '.join(PRESETS)}")
        return cls.from_file(ASSETS / name / "config.json")

    @property
    def moe_layers(self) -> tuple[LayerSpec, ...]:
        """The backbone layers with routed experts."""
        return tuple(layer for layer in self.layers if layer.moe)

    @property
    def all_layers(self) -> tuple[LayerSpec, ...]:
        """Backbone layers, then MTP layers. The position in the tuple is ``index``."""
        return self.layers + self.mtp_layers

    def with_window(self, window: int) -> ModelConfig:
        """The same model with sliding windows of ``window`` keys, the query's own included.

        The release's inference code sees 512; StepFun's training code (and what derives from it) sees 513.
        """

        def widen(layer: LayerSpec) -> LayerSpec:
            return layer if layer.window is None else dataclasses.replace(layer, window=window)

        return dataclasses.replace(
            self,
            layers=tuple(map(widen, self.layers)),
            mtp_layers=tuple(map(widen, self.mtp_layers)),
        )


def text_config(hub: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model in a ``config.json``: all of it, or the ``text_config`` of Step 3.7.

    Raises:
      ConfigError: Step 3.7's has none.
    """
    if hub.get("model_type") != VISION_TYPE:
        return hub
    text = hub.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(f"model_type: is {VISION_TYPE!r}, but text_config is {text!r}, expected an object")
    shared = ("quantization_config", "bos_token_id", "eos_token_id", "tie_word_embeddings")
    inherited = {name: hub[name] for name in shared if name in hub and text.get(name) is None}
    kind = {"model_type": "step3p5"} if text.get("model_type") in (VISION_TYPE, "step3p7_text", None) else {}
    return {**text, **inherited, **kind}


# Fields that do not change the forward pass of text.
_INERT = frozenset(
    "architectures auto_map model_type torch_dtype dtype transformers_version use_cache initializer_range max_seq_len "
    "moe_layer_offset moe_every_n_layer pad_token_id bos_token_id name_or_path return_dict output_attentions "
    "output_hidden_states output_router_logits is_encoder_decoder is_decoder id2label label2id problem_type "
    "tokenizer_class num_labels task_specific_params chunk_size_feed_forward attn_implementation layer_norm_type "
    "use_bfloat16 gradient_checkpointing router_aux_loss_coef mtp_loss_weight temperature top_p top_k do_sample "
    "max_length min_length num_beams".split()
)

# Fields that must have this value. A hub file may omit those marked False.
_FIXED: dict[str, tuple[Any, bool]] = {
    "use_qk_norm": (True, True),
    "use_head_wise_attn_gate": (True, True),
    "sink": (False, False),
    "att_impl_type": ("GQA", False),
    "zero_centered": (True, True),
    "use_moe": (True, False),
    "norm_expert_weight": (True, True),
    "moe_router_activation": ("sigmoid", True),
    "use_moe_router_bias": (True, True),
    "need_fp32_gate": (True, True),
    "tie_word_embeddings": (False, True),
    "hidden_act": ("silu", False),
    "attention_bias": (False, False),
    "attention_dropout": (0, False),
    "mlp_bias": (False, False),
}

_READ = frozenset(
    "hidden_size intermediate_size num_hidden_layers vocab_size max_position_embeddings num_attention_heads "
    "num_attention_groups num_key_value_heads head_dim attention_other_setting layer_types sliding_window rope_theta "
    "partial_rotary_factors rope_scaling yarn_only_types use_rope_layers moe_layers_enum moe_num_experts moe_top_k "
    "moe_intermediate_size share_expert_dim moe_router_scaling_factor swiglu_limits swiglu_limits_shared rms_norm_eps "
    "num_nextn_predict_layers eos_token_id quantization_config".split()
)


class _Reader:
    """Resolves one hub mapping. Each method reads one field or one group of related fields."""

    def __init__(self, hub: Mapping[str, Any]):
        self.hub = hub

    def resolve(self) -> ModelConfig:
        self._check_names()
        self.num_layers = self._count("num_hidden_layers")
        # Lists may stop at the backbone, so that nothing but this bounds the entries which are filled in for MTP.
        self.num_mtp = self._count("num_nextn_predict_layers", default=0, low=0, high=64)
        self.kinds = self._layer_kinds()
        moe = self._moe_layers()
        limits, shared = self._limits("swiglu_limits"), self._limits("swiglu_limits_shared")
        heads = {FULL: self._heads(), SLIDE: self._slide_heads()}
        ropes = self._ropes({kind: head_dim for kind, (_, _, head_dim) in heads.items()})
        window = self._count("sliding_window") if SLIDE in self.kinds else None
        specs = tuple(
            LayerSpec(i, window if kind == SLIDE else None, *heads[kind], ropes[i], i in moe, limits[i], shared[i])
            for i, kind in enumerate(self.kinds)
        )
        num_experts, top_k = self._count("moe_num_experts"), self._count("moe_top_k")
        if top_k > num_experts:
            raise ConfigError(f"moe_top_k: is {top_k}, more than moe_num_experts = {num_experts}")
        return ModelConfig(
            vocab_size=self._count("vocab_size"),
            hidden_size=self._count("hidden_size"),
            intermediate_size=self._count("intermediate_size"),
            layers=specs[: self.num_layers],
            mtp_layers=specs[self.num_layers :],
            num_experts=num_experts,
            top_k=top_k,
            expert_size=self._count("moe_intermediate_size"),
            shared_size=self._count("share_expert_dim"),
            router_scale=self._number("moe_router_scaling_factor"),
            norm_eps=self._number("rms_norm_eps", default=1e-5),
            max_positions=self._count("max_position_embeddings", default=self.hub.get("max_seq_len")),
            bos_id=self._token_id("bos_token_id", self.hub.get("bos_token_id", 0)),
            eos_ids=self._eos_ids(),
            fp8_block=self._fp8_block(),
        )

    def _check_names(self) -> None:
        kind = self.hub.get("model_type")
        if kind != "step3p5":
            raise ConfigError(f"model_type: is {kind!r}, expected 'step3p5'; other architectures are not supported")
        for name, (value, required) in _FIXED.items():
            if name not in self.hub and required:
                raise ConfigError(f"{name}: is missing, expected {value!r}; it is never filled from a default")
            setting = self.hub.get(name, value)
            if setting != value or (isinstance(value, bool) and not isinstance(setting, bool)):
                raise ConfigError(f"{name}: is {setting!r}, but this model is defined with {value!r} only")
        for name, value in self.hub.items():
            known = (
                name in _READ or name in _FIXED or name in _INERT or name.startswith("_") or name.endswith("_token_id")
            )
            if not known and value not in (None, False, 0, "", [], {}):
                raise ConfigError(
                    f"{name}: is not a field of step3p5 (value {value!r}) and may change the arithmetic; "
                    "remove it from config.json if it does not"
                )

    def _get(self, name: str) -> Any:
        if self.hub.get(name) is None:
            raise ConfigError(f"{name}: is missing")
        return self.hub[name]

    def _count(self, name: str, *, default: int | None = None, low: int = 1, high: int = 2**48) -> int:
        value = self.hub.get(name)
        value = default if value is None and default is not None else self._get(name)
        return _integer(name, value, low, high)

    def _number(self, name: str, *, default: float | None = None) -> float:
        value = self.hub.get(name)
        return _positive(name, default if value is None and default is not None else self._get(name))

    def _token_id(self, name: str, value: Any) -> int:
        return _integer(name, value, 0, self._count("vocab_size") - 1)

    def _eos_ids(self) -> tuple[int, ...]:
        value = self._get("eos_token_id")
        if value == []:
            raise ConfigError("eos_token_id: is [], expected at least one id; no answer would ever end")
        return tuple(self._token_id("eos_token_id", token) for token in (value if isinstance(value, list) else [value]))

    def _per_layer(self, name: str) -> list[Any]:
        """A list with one entry per layer. If it has the backbone only, MTP layers get the value of a sliding layer."""
        value = self._get(name)
        total = self.num_layers + self.num_mtp
        if not isinstance(value, list) or len(value) not in (self.num_layers, total):
            shown = f"{len(value)} entries" if isinstance(value, list) else repr(value)
            raise ConfigError(
                f"{name}: has {shown}, expected a list of num_hidden_layers = {self.num_layers} or, with "
                f"num_nextn_predict_layers, {total}"
            )
        return value

    def _extended(self, name: str, value: list[Any]) -> list[Any]:
        """Give the MTP layers the first sliding layer's value where the list stops at the backbone."""
        missing = len(self.kinds) - len(value)
        if not missing:
            return value
        if SLIDE not in self.kinds[: self.num_layers]:
            raise ConfigError(f"{name}: has no entry for the MTP layers and no sliding layer to take it from")
        return value + [value[self.kinds.index(SLIDE)]] * missing

    def _layer_kinds(self) -> list[str]:
        kinds = self._per_layer("layer_types")
        for i, kind in enumerate(kinds):
            if kind not in (FULL, SLIDE):
                raise ConfigError(f"layer_types: entry {i} is {kind!r}, expected {FULL!r} or {SLIDE!r}")
            if i >= self.num_layers and kind != SLIDE:
                raise ConfigError(f"layer_types: entry {i} is an MTP layer and must be {SLIDE!r}, found {kind!r}")
        return kinds + [SLIDE] * (self.num_layers + self.num_mtp - len(kinds))

    def _moe_layers(self) -> frozenset[int]:
        value = self._get("moe_layers_enum")
        try:
            indices = [int(part) for part in value.split(",")] if isinstance(value, str) else [*map(index, value)]
        except (TypeError, ValueError):
            raise ConfigError(f"moe_layers_enum: is {value!r}, expected layer numbers as '3,4,5' or a list") from None
        for i in indices:
            if not 0 <= i < self.num_layers:
                raise ConfigError(
                    f"moe_layers_enum: names layer {i}, but the backbone has layers 0…{self.num_layers - 1}"
                )
        if len(set(indices)) != len(indices):
            raise ConfigError(f"moe_layers_enum: names a layer twice: {value!r}")
        return frozenset(indices)

    def _limits(self, name: str) -> list[float | None]:
        """Clamp per layer. 0, 0.0 and null all mean none. One list is never used in place of the other."""
        total = self.num_layers + self.num_mtp
        if self.hub.get(name) is None:
            return [None] * total
        value = self._per_layer(name)
        limits = [None if limit in (None, 0) else _positive(name, limit) for limit in value]
        return limits + [None] * (total - len(value))

    def _heads(self) -> tuple[int, int, int]:
        groups = self._count("num_attention_groups")
        if self.hub.get("num_key_value_heads", groups) != groups:
            kv_heads = self.hub["num_key_value_heads"]
            raise ConfigError(f"num_key_value_heads: is {kv_heads!r}, contradicts num_attention_groups = {groups}")
        return _grouped("num_attention_heads", self._count("num_attention_heads"), groups, self._count("head_dim"))

    def _slide_heads(self) -> tuple[int, int, int]:
        num_heads, groups, head_dim = self._heads()
        other = self.hub.get("attention_other_setting")
        if other is None:
            return num_heads, groups, head_dim
        where = "attention_other_setting"
        if not isinstance(other, Mapping) or other.get("attention_type", SLIDE) != SLIDE:
            raise ConfigError(f"{where}: is {other!r}, expected an object with attention_type {SLIDE!r}")
        unknown = set(other) - {
            "attention_type",
            "num_attention_heads",
            "num_attention_groups",
            "head_dim",
            "true_head_dim",
        }
        if unknown:
            raise ConfigError(f"{where}.{min(unknown)}: is not a known field")
        num_heads = _integer(f"{where}.num_attention_heads", other.get("num_attention_heads", num_heads), 1)
        groups = _integer(f"{where}.num_attention_groups", other.get("num_attention_groups", groups), 1)
        head_dim = _integer(f"{where}.head_dim", other.get("head_dim", head_dim), 1)
        if other.get("true_head_dim", head_dim) != head_dim:
            raise ConfigError(
                f"{where}.true_head_dim: is {other['true_head_dim']!r}, contradicts head_dim = {head_dim}"
            )
        return _grouped(f"{where}.num_attention_heads", num_heads, groups, head_dim)

    def _ropes(self, head_dims: Mapping[str, int]) -> list[RopeSpec]:
        if self.hub.get("use_rope_layers"):
            raise ConfigError(
                f"use_rope_layers: is {self.hub['use_rope_layers']!r}; only [] (every layer) is supported"
            )
        thetas = self._scalar_or_list("rope_theta", None)
        factors = self._scalar_or_list("partial_rotary_factors", 1.0)
        scaling = self._rope_scaling()
        scaled = self._scaled_kinds() if scaling else frozenset()
        ropes = []
        for i, kind in enumerate(self.kinds):
            factor = _positive(f"partial_rotary_factors[{i}]", factors[i])
            width = round(head_dims[kind] * factor)
            if factor > 1 or width < 2 or width % 2 or abs(width - head_dims[kind] * factor) > 1e-6:
                raise ConfigError(
                    f"partial_rotary_factors: entry {i} is {factors[i]!r}: {factor} × head_dim {head_dims[kind]} must "
                    f"be an even number of dims from 2 to {head_dims[kind]}"
                )
            ropes.append(RopeSpec(_positive(f"rope_theta[{i}]", thetas[i]), width, scaling if kind in scaled else None))
        return ropes

    def _scalar_or_list(self, name: str, default: float | None) -> list[Any]:
        value = self.hub.get(name)
        value = default if value is None and default is not None else self._get(name)
        return self._extended(name, self._per_layer(name)) if isinstance(value, list) else [value] * len(self.kinds)

    def _rope_scaling(self) -> RopeScaling | None:
        value = self.hub.get("rope_scaling")
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise ConfigError(f"rope_scaling: is {value!r}, expected an object or null")
        kinds = [value[key] for key in ("rope_type", "type") if key in value]
        if not kinds or any(kind != "llama3" for kind in kinds):
            raise ConfigError(f"rope_scaling.rope_type: is {kinds}, only 'llama3' is supported")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        unknown = set(value) - set(names) - {"rope_type", "type"}
        if unknown:
            raise ConfigError(f"rope_scaling.{min(unknown)}: is not a field of the llama3 rule")
        factor, low, high = (_positive(f"rope_scaling.{name}", value.get(name)) for name in names[:3])
        original = _integer(f"rope_scaling.{names[3]}", value.get(names[3]), 1)
        if high <= low:
            raise ConfigError(f"rope_scaling.high_freq_factor: is {high}, must exceed low_freq_factor = {low}")
        return RopeScaling(factor, original, low, high)

    def _scaled_kinds(self) -> frozenset[str]:
        kinds = self.hub.get("yarn_only_types")
        if not isinstance(kinds, list) or not kinds or any(kind not in (FULL, SLIDE) for kind in kinds):
            raise ConfigError(
                f"yarn_only_types: is {kinds!r}; with rope_scaling it must list the layer kinds that are scaled, "
                f"as [{FULL!r}]"
            )
        return frozenset(kinds)

    def _fp8_block(self) -> tuple[int, int] | None:
        value = self.hub.get("quantization_config")
        if value is None:
            return None
        where = "quantization_config"
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: is {value!r}, expected an object or null")
        if value.get("quant_method") in (OWN_FORMAT, *TOOLS):
            return None  # the tensors show the format
        for name, expected in (("quant_method", "fp8"), ("fmt", "e4m3"), ("activation_scheme", "dynamic")):
            if value.get(name, expected) != expected or (name == "quant_method" and name not in value):
                others = f" and {', '.join(TOOLS)}" if name == "quant_method" else ""
                raise ConfigError(f"{where}.{name}: is {value.get(name)!r}, only {expected!r}{others} is supported")
        block = value.get("weight_block_size")
        if not isinstance(block, Sequence) or isinstance(block, str) or len(block) != 2:
            raise ConfigError(f"{where}.weight_block_size: is {block!r}, expected two numbers as [128, 128]")
        rows, columns = (_integer(f"{where}.weight_block_size", size, 1) for size in block)
        return rows, columns


_LARGEST = float_info.max  # an integer in JSON may exceed it


def _integer(name: str, value: Any, low: int, high: int = 2**48) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        limit = f" to {high}" if high < 2**48 else ""
        raise ConfigError(f"{name}: is {value!r}, expected an integer from {low}{limit}")
    return value


def _positive(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= _LARGEST:
        raise ConfigError(f"{name}: is {value!r}, expected a positive number")
    return float(value)


def _grouped(name: str, num_heads: int, groups: int, head_dim: int) -> tuple[int, int, int]:
    if num_heads % groups:
        raise ConfigError(f"{name}: {num_heads} query heads are not a multiple of {groups} key-value heads")
    return num_heads, groups, head_dim
