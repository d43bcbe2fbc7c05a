"""How PEFT names and lays out the factors of an adapter; the one place that knows it.

Three forms, by what an expert layer is to the reader:

  peft          three stacked parameters a layer, as in the release's own code: ``….moe.gate_proj`` with A [E·r, in],
                rows expert-major, and B [out, r·E], columns rank-major: the expert varies fastest there
  experts       one pair a matrix of an expert, ``….moe.experts.{e}.gate_proj``, as servers read it
  transformers  transformers' class, whose gate and up are one parameter: one pair of twice the rank, B block-diagonal

All other weights have A [r, in] and B [out, r] under their module's name. A weight is named here as PEFT names it: a
module's by the module, a stacked parameter by itself, as ``….mlp.experts.down_proj``. In the file, factors of a stacked
parameter lie under its module. Those of the first of two in one module lie under ``….base_layer``, for PEFT wraps the
module twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from stepjax.adapters.lora import target_name
from stepjax.adapters.peft_keys import PARTS, FileForm
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.weights.inventory import TensorSpec, inventory

PREFIX = "base_model.model."
_FACTOR = re.compile(r"\.lora_([AB])(?:\.\w+)?\.weight$")  # some writers keep the adapter's name in the key

Pair = tuple[np.ndarray, np.ndarray]  # A and B

_PARAMETER = re.compile(r"\.moe\.(?:gate|up|down)_proj\.weight$|\.mlp\.experts\.(?:gate_up|down)_proj$")


@dataclass(frozen=True)
class Module:
    """A weight that may be adapted, and what it is called."""

    spec: TensorSpec
    stem: str  # the release's module, as ``model.layers.3.moe.gate_proj``

    @property
    def expert_part(self) -> str | None:
        """gate, up or down of routed experts."""
        return self.spec.path.rpartition(".")[2] if self.spec.part == "experts" else None

    @property
    def transformers_stem(self) -> str:
        """The module of transformers' class, that of all experts for routed ones."""
        stem = self.stem.replace("model.", "model.language_model.", 1).replace(".share_expert.", ".mlp.shared_experts.")
        return re.sub(r"\.moe\.\w+$", ".mlp.experts", stem) if self.expert_part else stem


def modules(config: ModelConfig) -> tuple[Module, ...]:
    """Every weight of a model that may be adapted."""
    return tuple(Module(spec, spec.hub_name.removesuffix(".weight")) for spec in inventory(config) if target_name(spec))


def written(config: ModelConfig, factors: Mapping[str, Pair], form: FileForm) -> Iterator[tuple[str, Pair]]:
    """Names of weights with their factors in a form; experts' shared factors are written once for each."""
    fused: dict[str, dict[str, Pair]] = {}
    for module in modules(config):
        path, part = module.spec.path, module.expert_part
        if path not in factors:
            continue
        a, b = factors[path]
        if part is None:
            yield (module.transformers_stem if form == "transformers" else module.stem), (a, b)
            continue
        count = module.spec.shape[0]
        a, b = (x if x.ndim == 3 else np.broadcast_to(x, (count, *x.shape)) for x in (a, b))
        if form == "experts":
            for e in range(count):
                yield _of_expert(module.stem, e), (a[e], b[e])
        elif form == "peft":
            yield f"{module.stem}.weight", stacked(a, b)
        elif part == "down":
            yield f"{module.transformers_stem}.{part}_proj", stacked(a, b)
        else:
            fused.setdefault(module.transformers_stem, {})[part] = a, b
    for stem, parts in fused.items():
        yield f"{stem}.gate_up_proj", stacked(*_beside(parts, config))


def read(
    config: ModelConfig, factors: Mapping[str, Pair], *, where: str, stacked_as_linear: bool | None
) -> dict[str, Pair]:
    """Factors by our path, from names of any form; the inverse of `written`.

    Args:
      stacked_as_linear: as that of `unstacked`.

    Raises:
      CheckpointError: a name or a shape is not of this model, or a weight has two pairs.
    """
    left = dict(factors)
    out: dict[str, Pair] = {}

    def whole(name: str, shape: tuple[int, ...]) -> Pair:
        return unstacked(*left[name], shape, where=f"{where}: {name}", as_linear=stacked_as_linear)

    for module in modules(config):
        path, part, shape = module.spec.path, module.expert_part, module.spec.shape
        if part is None:
            stem = module.stem if module.stem in left else module.transformers_stem
            if stem in left:
                out[path] = left.pop(stem)
            continue
        single = [_of_expert(module.stem, e) for e in range(shape[0])]
        if not left.keys().isdisjoint(single):
            missing = [name for name in single if name not in left]
            if missing:
                raise CheckpointError(f"{where}: has experts of {module.stem}, but not {missing[0]}")
            pairs = [left.pop(name) for name in single]
            if len({(a.shape, b.shape) for a, b in pairs}) > 1:
                raise CheckpointError(f"{where}: the experts of {module.stem} have factors of several shapes")
            out[path] = np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])
            continue
        alone = {f"{module.stem}.weight", f"{module.transformers_stem}.{part}_proj"} & left.keys()
        fused = f"{module.transformers_stem}.gate_up_proj"
        if alone:
            name = alone.pop()
            out[path] = whole(name, shape)
            del left[name]
        elif part != "down" and fused in left:
            out[path] = _half(*whole(fused, (shape[0], 2 * shape[1], shape[2])), part)
            if part == "up":
                del left[fused]
    if left:
        raise CheckpointError(
            f"{where}: {next(iter(left))} is no adapted weight of this model, or is there twice ({len(left)} such); "
            "adapters of the router, norms, embeddings and MTP layers are not supported (target_modules, "
            "target_parameters)"
        )
    return out


def part_of(key: str) -> str | None:
    """Which of `stepjax.adapters.peft_keys.PARTS` a tensor of a file belongs to; None: to the text model."""
    name = key.removeprefix(PREFIX)
    return next((part for part, starts in PARTS.items() if name.startswith(starts)), None)


def is_parameter(name: str) -> bool:
    """Whether a weight's name is that of a stacked parameter."""
    return _PARAMETER.search(name) is not None


def stem_of(name: str, names: Collection[str]) -> str:
    """The module under which the file has the factors of a weight, beside those of ``names``."""
    if not is_parameter(name):
        return name
    module, _, parameter = name.rpartition(".")
    return f"{module}.base_layer" if parameter == "gate_up_proj" and f"{module}.down_proj" in names else module


def name_of(stem: str, stems: Collection[str], targets: Callable[[str], bool]) -> str:
    """The weight whose factors the file has under ``stem``, beside those of ``stems``; the inverse of `stem_of`.

    Args:
      targets: whether the file's ``target_parameters`` has a name.
    """
    if is_parameter(f"{stem}.weight"):
        return f"{stem}.weight"
    if stem.endswith(".mlp.experts.base_layer"):
        return f"{stem.removesuffix('base_layer')}gate_up_proj"
    if not stem.endswith(".mlp.experts"):
        return stem
    alone = f"{stem}.base_layer" not in stems and targets(f"{stem}.gate_up_proj") and not targets(f"{stem}.down_proj")
    return f"{stem}.{'gate_up_proj' if alone else 'down_proj'}"


def split_key(key: str) -> tuple[str, str] | None:
    """A tensor's name as module and factor, "A" or "B"; None if it is no factor."""
    match = _FACTOR.search(key)
    return (key[: match.start()].removeprefix(PREFIX), match[1]) if match else None


def stacked(a: np.ndarray, b: np.ndarray) -> Pair:
    """[E, r, in] and [E, out, r] as one A [E·r, in] and one B [out, r·E]."""
    count, rank, size_in = a.shape
    return a.reshape(count * rank, size_in), b.transpose(1, 2, 0).reshape(b.shape[1], rank * count)


def unstacked(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...], *, where: str, as_linear: bool | None) -> Pair:
    """What `stacked` was given, for weights of ``shape`` [E, out, in].

    PEFT before 0.19 took the second axis of such a parameter for its input: A then has the output's width.

    Args:
      as_linear: whether A has the input's width, where shapes do not tell; None: not known.
    """
    count, size_out, size_in = shape
    rank = a.shape[0] // count if a.ndim == 2 else 0
    if a.ndim != 2 or b.ndim != 2 or rank < 1 or a.shape[0] != rank * count or b.shape[1] != rank * count:
        raise CheckpointError(f"{where}: factors {list(a.shape)} and {list(b.shape)} are not those of {count} experts")
    current, swapped = (a.shape[1], b.shape[0]) == (size_in, size_out), (a.shape[1], b.shape[0]) == (size_out, size_in)
    if not current and not swapped:
        raise CheckpointError(
            f"{where}: factors {list(a.shape)} and {list(b.shape)} do not fit experts of {size_out} × {size_in}"
        )
    if current and swapped:
        if as_linear is None:
            raise CheckpointError(
                f"{where}: experts are square ({size_out} × {size_in}), so that shapes do not tell which version of "
                'PEFT wrote this; add "peft_version" to adapter_config.json, with the version that wrote it'
            )
        current = as_linear
    by_expert, by_rank = a.reshape(count, rank, -1), b.reshape(b.shape[0], rank, count)
    if current:
        return by_expert, np.ascontiguousarray(by_rank.transpose(2, 0, 1))
    return np.ascontiguousarray(by_rank.transpose(2, 1, 0)), np.ascontiguousarray(by_expert.transpose(0, 2, 1))


def _of_expert(stem: str, expert: int) -> str:
    layer, _, name = stem.rpartition(".")
    return f"{layer}.experts.{expert}.{name}"


def _beside(parts: Mapping[str, Pair], config: ModelConfig) -> Pair:
    """Gate and up as one adapter of their concatenation: the ranks side by side, B block-diagonal."""
    size = (config.num_experts, config.expert_size, config.hidden_size)

    def none(rank: int) -> Pair:
        return np.zeros((size[0], rank, size[2]), np.float32), np.zeros((size[0], size[1], rank), np.float32)

    rank = max(a.shape[1] for a, _ in parts.values())
    (gate_a, gate_b), (up_a, up_b) = (_padded(*parts.get(name, none(rank)), rank) for name in ("gate", "up"))
    b = np.zeros((size[0], 2 * size[1], 2 * rank), np.float32)
    b[:, : size[1], :rank], b[:, size[1] :, rank:] = gate_b, up_b
    return np.concatenate([gate_a, up_a], axis=1), b


def _padded(a: np.ndarray, b: np.ndarray, rank: int) -> Pair:
    missing = rank - a.shape[1]
    return np.pad(a, ((0, 0), (0, missing), (0, 0))), np.pad(b, ((0, 0), (0, 0), (0, missing)))


def _half(a: np.ndarray, b: np.ndarray, part: str) -> Pair:
    """Gate's or up's part of an adapter of both; of half the rank where the halves keep to themselves."""
    rows, rank = b.shape[1] // 2, a.shape[1] // 2
    diagonal = a.shape[1] % 2 == 0 and not b[:, :rows, rank:].any() and not b[:, rows:, :rank].any()
    half = slice(0, rows) if part == "gate" else slice(rows, None)
    ranks = slice(None) if not diagonal else slice(0, rank) if part == "gate" else slice(rank, None)
    return np.ascontiguousarray(a[:, ranks]), np.ascontiguousarray(b[:, half, ranks])
