"""LoRA: small factors that learn beside a frozen model.

An adapter is a flat table of float32 arrays, two a weight: ``layers.7.attn.q_proj.weight.a`` [r, in] and ``….b``
[out, r]; routed experts have [E, r, in] and [E, out, r]. `attach` puts them into a model's parameters, where every
product uses them (`stepjax.weights.adapted`), in serving and in training. The gradient with respect to the adapter is

    jax.grad(lambda adapter: loss(bind(model, attach(params, adapter, lora))))

The router, norms, embeddings, the output matrix and the MTP layers are never adapted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ModelConfig
from stepjax.errors import ConfigError
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.ranges import Range, check_ranges
from stepjax.weights.adapted import Adapted, factor_axes, merged
from stepjax.weights.inventory import TensorSpec, inventory

Adapter = dict[str, jax.Array]  # path of a weight and ".a" or ".b" → float32 factor
ExpertForm = Literal["per_expert", "shared_outer"]

ATTENTION = ("q", "k", "v", "o", "g")
TARGETS = (*ATTENTION, "dense", "shared")  # beside the routed experts


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how.

    An adapter of rank r is scaled by alpha / r, each by its own rank: then neither the first updates nor the best
    learning rate depend on it, and a token's A experts of rank r / A each move as a dense layer of rank r does.

    Raises:
      ConfigError: a field is out of range, or a target unknown.

    Example:
      >>> import stepjax
      >>> stepjax.LoraConfig(rank=8, alpha=16.0).targets
      ('q', 'k', 'v', 'o', 'dense', 'shared')
    """

    rank: Annotated[int, Range(1, 2**16)] = 32
    alpha: Annotated[float, Range(above=0, most=1e9)] = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "dense", "shared")  # of `TARGETS`
    experts: ExpertForm | None = "per_expert"  # shared_outer: the factors on the model's width are one for all experts
    # None: rank // experts per token, so that a token meets as much as in a dense layer
    expert_rank: Annotated[int, Range(1, 2**16)] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        check_ranges(self, "lora")
        for target in self.targets:
            if target not in TARGETS:
                raise ConfigError(f"lora: target {target!r} is unknown, expected some of {', '.join(TARGETS)}")
        if self.experts is not None and self.experts not in get_args(ExpertForm):
            raise ConfigError(
                f"lora: experts is {self.experts!r}, expected {' or '.join(get_args(ExpertForm))}, or nothing"
            )
        if not self.targets and self.experts is None:
            raise ConfigError("lora: no target is given, expected at least one")

    def scale(self, rank: int) -> float:
        """Factor of B·A of this rank: the one place that decides it."""
        return self.alpha / rank


@dataclass(frozen=True)
class Target:
    """One adapted weight."""

    path: str
    rank: int
    scale: float
    shape: tuple[int, ...]  # of the weight
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


def targets(config: ModelConfig, lora: LoraConfig) -> tuple[Target, ...]:
    """The weights that ``lora`` adapts, in the order of the model.

    Raises:
      ConfigError: a target matches no weight of this model.
    """
    wanted = {*lora.targets, *(("experts",) if lora.experts else ())}
    matches: dict[str, list[TensorSpec]] = {name: [] for name in wanted}
    for spec in inventory(config):
        name = target_name(spec)
        if name in wanted:
            matches[name].append(spec)
    for name, specs in matches.items():
        if not specs:
            raise ConfigError(f"lora: target {name!r} matches no weight of this model; leave it out")
    rank = lora.expert_rank or max(1, lora.rank // config.top_k)
    chosen = {spec.path for specs in matches.values() for spec in specs}
    return tuple(
        _target(spec, lora, rank if spec.part == "experts" else lora.rank)
        for spec in inventory(config)
        if spec.path in chosen
    )


def target_name(spec: TensorSpec) -> str | None:
    """What a weight is called as a target; None if it can be none."""
    if spec.path.startswith("mtp."):
        return None
    if spec.part == "attention" and spec.path.endswith("_proj.weight"):
        return spec.path.split(".")[-2].removesuffix("_proj")
    return spec.part if spec.part in ("dense", "shared", "experts") else None


def init(config: ModelConfig, lora: LoraConfig, key: jax.Array) -> Adapter:
    """Fresh factors: A uniform within ±1/√in, B zero, so that the model answers as before, to the bit."""
    adapter: Adapter = {}
    for number, target in enumerate(targets(config, lora)):
        adapter[f"{target.path}.a"] = _fresh(target, key, number)
        adapter[f"{target.path}.b"] = jnp.asarray(np.zeros(target.b_shape, np.float32))
    return adapter


def filled(config: ModelConfig, lora: LoraConfig, adapter: Mapping[str, Any], key: jax.Array) -> Adapter:
    """The same adapter with factors of every target, each of the rank of its target, so that all can be trained.

    Where a target has none, or of a smaller rank, A gets fresh rows and B zeros. The sum B·A stays as it is.

    Raises:
      ConfigError: the adapter has factors that do not fit ``lora``.
    """
    left, out = set(adapted_paths(adapter)), {}
    for number, target in enumerate(targets(config, lora)):
        path = target.path
        a, b = _fresh(target, key, number), jnp.zeros(target.b_shape, jnp.float32)
        if path in left:
            given_a, given_b = (jnp.asarray(adapter[f"{path}.{factor}"], jnp.float32) for factor in "ab")
            rank = given_a.shape[-2]
            if (given_a.ndim, given_b.ndim) != (a.ndim, b.ndim) or rank > target.rank:
                raise ConfigError(
                    f"lora: the adapter's factors of {path} are {list(given_a.shape)} and {list(given_b.shape)}, "
                    f"expected {list(a.shape)} and {list(b.shape)} by its settings"
                )
            a = a.at[..., :rank, :].set(given_a)
            b = b.at[..., :rank].set(given_b * (lora.scale(rank) / target.scale))
            left.remove(path)
        out |= {f"{path}.a": a, f"{path}.b": b}
    if left:
        raise ConfigError(f"lora: the adapter has factors of {min(left)}, which its settings do not name")
    return out


def shapes(config: ModelConfig, lora: LoraConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """What `init` makes, as shapes."""
    return {
        f"{target.path}.{factor}": jax.ShapeDtypeStruct(shape, jnp.float32)
        for target in targets(config, lora)
        for factor, shape in (("a", target.a_shape), ("b", target.b_shape))
    }


def axes(config: ModelConfig, lora: LoraConfig) -> dict[str, tuple[str | None, ...]]:
    """Logical axes of every factor, from which a mesh's rules place it as they place its weight."""
    of_weights = axes_of(abstract(config, mtp=False))
    found: dict[str, tuple[str | None, ...]] = {}
    for target in targets(config, lora):
        a_ndim, b_ndim = len(target.a_shape), len(target.b_shape)
        of_a, of_b = factor_axes(of_weights[target.path], a_ndim=a_ndim, b_ndim=b_ndim)
        found |= {f"{target.path}.a": of_a, f"{target.path}.b": of_b}
    return found


def attach(params: Mapping[str, Any], adapter: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The parameters with the adapter's factors beside their weights. No gradient reaches the weights.

    Raises:
      ConfigError: the adapter is of another model.
    """
    out = {path: jax.lax.stop_gradient(weight) for path, weight in params.items()}
    for path in adapted_paths(adapter):
        weight, a, b = params.get(path), adapter[f"{path}.a"], adapter[f"{path}.b"]
        if weight is None:
            raise ConfigError(f"lora: the adapter has factors of {path}, which is no weight of this model")
        if isinstance(weight, Adapted):
            raise ConfigError(f"lora: {path} has an adapter already; split or merge it first")
        check_fit(path, weight.shape, a.shape, b.shape)
        out[path] = Adapted(out[path], a, b, scale=lora.scale(a.shape[-2]))
    return out


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], Adapter]:
    """What `attach` was given: the parameters without an adapter, and the adapter."""
    base: dict[str, Any] = {}
    adapter: Adapter = {}
    for path, weight in params.items():
        base[path] = weight.base if isinstance(weight, Adapted) else weight
        if isinstance(weight, Adapted):
            adapter |= {f"{path}.a": weight.a, f"{path}.b": weight.b}
    return base, adapter


def merge(params: Mapping[str, Any], adapter: Mapping[str, Any], lora: LoraConfig) -> dict[str, Any]:
    """The parameters with the adapter added to their weights, in float32 and rounded once.

    A quantised weight comes out in bfloat16: to quantise the sum again is the exporter's choice (`stepjax merge`).
    """
    attached = attach(params, adapter, lora)
    return {
        path: merged(weight, weight.base.dtype if isinstance(weight.base, jax.Array) else jnp.bfloat16)
        if isinstance(weight, Adapted)
        else params[path]
        for path, weight in attached.items()
    }


def adapted_paths(adapter: Mapping[str, Any]) -> list[str]:
    """Paths of the weights that an adapter has factors of.

    Raises:
      ConfigError: one of a pair is missing.
    """
    paths = sorted({name.removesuffix(".a").removesuffix(".b") for name in adapter})
    for path in paths:
        for factor in ("a", "b"):
            if f"{path}.{factor}" not in adapter:
                raise ConfigError(f"lora: the adapter has no {path}.{factor}, but its partner")
    return paths


def check_fit(path: str, shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    """Raise ConfigError unless factors of these shapes fit a weight of ``shape``."""
    *lead, size_out, size_in = shape
    rank = a[-2] if len(a) > 1 else 0
    whole = (*lead, rank, size_in), (*lead, size_out, rank)
    if rank < 1 or a not in (whole[0], whole[0][-2:]) or b not in (whole[1], whole[1][-2:]):
        raise ConfigError(
            f"lora: {path} is {list(shape)}, but the adapter's factors are {list(a)} and {list(b)}; expected "
            f"{[*lead, 'r', size_in]} and {[*lead, size_out, 'r']}"
        )


def _fresh(target: Target, key: jax.Array, number: int) -> jax.Array:
    """Drawn on the host: jax would compile a program for each shape, 4 s for step-tiny."""
    bound = target.shape[-1] ** -0.5
    random = np.random.default_rng([*map(int, jax.random.key_data(key)), number])
    return jnp.asarray(random.uniform(-bound, bound, target.a_shape).astype(np.float32))


def _target(spec: TensorSpec, lora: LoraConfig, rank: int) -> Target:
    *lead, size_out, size_in = spec.shape
    a, b = (*lead, rank, size_in), (*lead, size_out, rank)
    if spec.part == "experts" and lora.experts == "shared_outer":
        a, b = (a, b[1:]) if spec.path.endswith(".down") else (a[1:], b)
    return Target(spec.path, rank, lora.scale(rank), spec.shape, a, b)


def describe(lora: LoraConfig) -> dict[str, Any]:
    """The settings in JSON's terms; ``LoraConfig(**describe(lora))`` is the same again."""
    return dataclasses.asdict(lora) | {"targets": list(lora.targets)}
