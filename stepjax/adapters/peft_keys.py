"""What is supported of a PEFT folder: keys of ``adapter_config.json`` with their values, and parts of the model.

This is a list of what is allowed: a value that is not listed here is refused by its key, and so is a key that is not
listed here unless it is switched off. PEFT adds a kind of adapter with almost every release, and most of them write
tensors that look like plain LoRA. The keys are those of ``peft.LoraConfig`` from 0.3 to 0.21.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from stepjax.errors import CheckpointError

FileForm = Literal["peft", "experts", "transformers"]  # of an adapter's file: see `stepjax.adapters.peft_names`
FILE_FORMS: tuple[str, ...] = get_args(FileForm)


@dataclass(frozen=True)
class Key:
    """A key of the file, the values of it that are supported, and what to do with a file that has another."""

    supported: str
    test: Callable[[Any], bool]
    advice: str = ""


PARTS: Mapping[str, tuple[str, ...]] = {  # of a file, that stepjax cannot use: what their names begin with
    "vision": ("vision_model.", "vit_large_projector.", "model.vision_model.", "model.multi_modal_projector."),
    "lm_head": ("lm_head.",),
}


def check_keys(path: Path, about: Mapping[str, Any]) -> None:
    """Raise CheckpointError, which names the key, unless the file at ``path`` holds plain LoRA by all of its keys."""
    first = ("peft_type", "init_lora_weights")  # they say most about what else is in the file
    for name in (*first, *(name for name in about if name not in first)):
        value, key = about.get(name), KEYS.get(name)
        if key is None and not off(value):
            raise CheckpointError(
                f"{path}: {name[:80]!r} is {_shown(value)}, but stepjax does not know this key, which may change what "
                "the adapter computes; if it does not, set it to null"
            )
        if key is not None and not key.test(value):
            advice = _about_initialisation(value) if name == "init_lora_weights" else key.advice
            raise CheckpointError(
                f"{path}: {name} is {_shown(value)}, expected {key.supported}{f'; {advice}' if advice else ''}"
            )
    for name in ("r", "lora_alpha"):  # PEFT always writes both, and their defaults have changed
        if name not in about:
            raise CheckpointError(f"{path}: {name} is missing, expected {KEYS[name].supported}")


def off(value: Any) -> bool:
    """Whether a value switches its key off, whatever the key is. A number does not."""
    return value is None or value is False or (isinstance(value, str | list | dict) and not value)


def is_number(value: Any) -> bool:
    """A positive number that float32 can hold, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 3e38  # also false for NaN; Python compares large ints without overflow


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _is_dropout(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1)


def _is_optional(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: value is None or isinstance(value, kinds)


def _is_optional_false(value: Any) -> bool:
    return value is None or value is False


def _is_names(value: Any) -> bool:
    return value is None or isinstance(value, str) or _is_list(value, str)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _is_table(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(test, value.values())))


def _is_initialisation(value: Any) -> bool:
    return value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN)


def _about_initialisation(value: Any) -> str:
    """What to do about an initialisation that changes more than the factors."""
    name = str(value).lower()
    if name.startswith(("pissa", "corda")) or name in ("olora", "lora_ga"):
        return (
            "its factors belong to a base that the initialisation changed; write it again with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...), which makes plain LoRA of it"
        )
    if name == "loftq":
        return "its factors belong to a base that LoftQ quantised; merge it into that base with PEFT (merge_and_unload)"
    if name == "eva":
        return (
            "EVA sets ranks and scales from data while it trains; when the training has ended, load the adapter with "
            "PEFT, set init_lora_weights to true and eva_config to null, and save it again"
        )
    return "if it leaves the weights of the base as they are, set it to true"


_PLAIN = ("gaussian", "orthogonal", "mica")  # leave the base as it is, and are read as they were written
_UNUSED = "if the adapter was converted to plain LoRA, set it to null: PEFT does not use it then"
_MERGE = "merge the adapter into its base with PEFT (merge_and_unload) and give the merged model, or train it without"
_RETRAIN = "it is another function than plain LoRA, and cannot be converted; train it without"

_FREE = Key("anything", lambda _: True)
_TEXT = Key("a string or null", _is_optional(str))
_NAMES = Key("a list of names, a regular expression, or null", _is_names)


def _flag(advice: str) -> Key:
    return Key("false", _is_optional_false, advice)


def _unset(advice: str) -> Key:
    """A key that must be null: an empty table switches its kind of adapter on, with the defaults of PEFT."""
    return Key("null", lambda value: value is None, advice)


KEYS: Mapping[str, Key] = {
    # What the file is. Nothing here changes what is computed.
    "peft_type": Key("'LORA'", lambda value: value == "LORA", "only LoRA is read; " + _MERGE),
    "peft_version": _TEXT,  # read by stepjax.adapters.peft_config
    "task_type": Key(
        "'CAUSAL_LM' or null",
        lambda value: value in (None, "CAUSAL_LM"),
        "adapters of other tasks come with a head of their own; set it to CAUSAL_LM if this one has none",
    ),
    "auto_mapping": Key("a table or null", _is_optional(dict)),
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": Key("a bool", _is_optional(bool)),
    "runtime_config": _FREE,  # PEFT does not read it either
    # How training began and went.
    "init_lora_weights": Key("true, false, 'gaussian', 'orthogonal' or 'mica'", _is_initialisation),
    "lora_dropout": Key("a number from 0 to 1, which has no effect here", _is_dropout),
    "loftq_config": Key("{} or null", off, _UNUSED),
    "eva_config": _unset(_UNUSED),
    "corda_config": _unset(_UNUSED),
    "lora_ga_config": _unset(_UNUSED),
    "megatron_core": _TEXT,  # used with megatron_config only
    "megatron_config": _unset("save the adapter from a model that Megatron has not split"),
    # The scale of each pair of factors.
    "r": Key("a positive integer", _is_rank),
    "lora_alpha": Key("a positive number", is_number),
    "use_rslora": Key("a bool", _is_optional(bool)),
    "rank_pattern": Key("a table of positive integers by pattern", _is_table(_is_rank)),
    "alpha_pattern": Key("a table of positive numbers by pattern", _is_table(is_number)),
    # Which weights have factors. stepjax.adapters.peft_config compares them with the tensors.
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "target_parameters": Key("a list of names or null", lambda value: value is None or _is_list(value, str)),
    "layers_to_transform": Key(
        "integers or null",
        lambda value: value is None or _is_list(value, int) or (isinstance(value, int) and not isinstance(value, bool)),
    ),
    "layers_pattern": _NAMES,
    "modules_to_save": Key("a list of names or null", lambda value: value is None or _is_list(value, str)),
    "ensure_weight_tying": Key("a bool, which has no effect here", _is_optional(bool)),  # no weights are tied
    # What is more, or other, than plain LoRA.
    "bias": Key("'none'", lambda value: value in ("none", None), "trained biases are not LoRA; " + _MERGE),
    "fan_in_fan_out": _flag("it is for weights that are stored transposed, which this model has not"),
    "use_dora": _flag("DoRA is not supported; " + _MERGE),
    "lora_bias": _flag("biases beside B are not supported; train it without"),
    "use_qalora": _flag("QALoRA is not supported; " + _MERGE),
    "qalora_group_size": Key("an integer, which has no effect here", _is_optional(int)),  # used with use_qalora only
    "alora_invocation_tokens": _unset("aLoRA is on from certain tokens only; " + _RETRAIN),
    "trainable_token_indices": _unset("trained rows of the embedding are not LoRA; " + _MERGE),
    "layer_replication": _unset("it is an adapter of a model with more layers; " + _MERGE),
    "arrow_config": _unset("Arrow routes between several adapters; " + _RETRAIN),
    "use_bdlora": _unset("BD-LoRA has block-diagonal factors; " + _MERGE),
    "kasa_config": _unset("KaSA changes the base, and has a third factor; " + _MERGE),
    "velora_config": _unset("VeLoRA is not supported; " + _MERGE),
    "monteclora_config": _unset("MonteCLoRA draws its factors at random; " + _RETRAIN),
}
