"""Steps of serving and training with shapes instead of arrays, from the functions that serve and train."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.adapters.lora import LoraConfig, attach, shapes
from stepjax.config import ModelConfig
from stepjax.errors import MeshError, RequestError
from stepjax.gpu_target import compiling_for
from stepjax.infer.steps.abstract_steps import decode_step, prefill_step
from stepjax.model.cache import MAX_DRAFTS
from stepjax.model.step3p5 import Params, Step3p5, abstract, axes_of
from stepjax.sharding.compiled.step_study import Step, StepStudy, abstract_params, copies, study
from stepjax.sharding.devices import Target, devices, gpu_of
from stepjax.sharding.dispatch import CHEAPEST, Dispatch
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import layout_of
from stepjax.sharding.planner.picture import Picture, picture
from stepjax.sharding.rules import DEFAULT, ShardingRules, whole_mesh
from stepjax.sharding.sharded_checkpoint import shardings
from stepjax.train.config.tune import OptimSettings
from stepjax.train.objectives.objective import Batch, LossContext, LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.packing.rows import PackedRows
from stepjax.train.pretrain.step import Placement, TrainState, make_step, split_biases
from stepjax.train.runs.optimizer import adamw, learning_rate
from stepjax.train.tune.setup import abstract_state, schedule_of
from stepjax.train.tune.update import COMPILER_OPTIONS, Leaves, TuneState, accumulation
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.plain import PLAIN

StepName = Literal["decode", "prefill", "train", "lora"]

MAX_DEVICES = 4096  # more is probably a typing error, and each would be a virtual CPU
CHUNK = 2048  # default of the prompt tokens of a sequence in one step


@dataclass(frozen=True)
class Workload:
    """One step. Sizes are over all devices."""

    step: StepName
    batch: int = 1  # sequences, or packed rows in training
    context: int = 4096  # cached positions of each, or tokens of a row in training and LoRA
    chunk: int | None = None  # prompt tokens of each in one prefill step; None: `CHUNK`, or the context if shorter
    drafts: int = 0  # MTP layers that are held and run
    experts: ExpertFormat = PLAIN  # of the routed experts
    dtype: str = "auto"  # of weights, activations and caches; auto: bfloat16, but float32 in step "train"

    @property
    def tokens(self) -> int:
        """Tokens of each sequence in one step."""
        if self.step in ("train", "lora"):
            return self.context
        if self.step == "decode":
            return 1 + self.drafts
        return min(CHUNK, self.context) if self.chunk is None else self.chunk

    @property
    def served(self) -> bool:
        """Whether an engine runs this step, whose sequences share a cache (`MeshLayout.together`)."""
        return self.step in ("decode", "prefill")

    def placed(self, layout: MeshLayout) -> int:
        """Sequences, or the slots that an engine has for them: as many on each shard."""
        return layout.num_shards * -(-self.batch // layout.num_shards) if self.served else self.batch

    @property
    def resolved_dtype(self) -> Any:
        """``dtype``, with auto resolved."""
        if self.dtype == "auto":
            return jnp.dtype(jnp.float32 if self.step == "train" else jnp.bfloat16)
        return jnp.dtype(self.dtype)

    def check(self, config: ModelConfig) -> None:
        """Raise RequestError if a size is out of range for the model."""
        depths = min(MAX_DRAFTS, len(config.mtp_layers))
        for name, value, low, high in (
            ("batch", self.batch, 1, 1 << 20),
            ("context", self.context, 1, config.max_positions),
            ("chunk", 1 if self.chunk is None else self.chunk, 1, self.context),
            ("speculate", self.drafts, 0, depths),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name}: is {value}, expected {low} to {high}")
        if self.chunk is not None and self.step != "prefill":
            raise RequestError(
                f"chunk: is {self.chunk}, but only --step prefill has chunks; expected none for {self.step}"
            )
        if self.step in ("train", "lora") and self.drafts:
            raise RequestError("speculate: a training step is studied without MTP layers, expected 0")
        if self.step == "train" and self.experts.quantised:
            name = self.experts.flag.removeprefix("--")
            raise RequestError(f"{name}: quantised weights have no gradient and are not trained; leave it out")
        if self.step == "train" and config.dense_fp8:
            raise RequestError("dense-fp8: quantised weights have no gradient and are not trained; leave it out")
        if not self.served and config.cache_fp8:
            raise RequestError(f"cache-fp8: a {self.step} step has no cache; leave it out, or study decode or prefill")
        for columns in (config.hidden_size, config.expert_size):
            self.experts.check_shape((columns,))


def first_layers(config: ModelConfig, count: int | None) -> ModelConfig:
    """The model with its first ``count`` layers alone, and all of its MTP depths; None: as it is.

    Raises:
      RequestError: it has not as many.
    """
    if count is None:
        return config
    if not 1 <= count <= len(config.layers):
        raise RequestError(f"layers: is {count}, expected 1 to {len(config.layers)}")
    return dataclasses.replace(config, layers=config.layers[:count])


def study_mesh(
    spec: MeshSpec | None,
    num_devices: int | None,
    *,
    strategy: str = DEFAULT,
    config: ModelConfig | None = None,
    experts: ExpertFormat = PLAIN,
) -> tuple[MeshSpec, int]:
    """The mesh with the sizes of all axes, and the number of devices (None: as many as the mesh has).

    Args:
      spec: None: that of the strategy over all devices, of the model whose ``config`` is given.

    Raises:
      MeshError: the mesh does not fit the devices, or neither is given.
    """
    if spec is None and num_devices is None:
        raise MeshError("mesh: give --mesh, as --mesh expert=8, or --devices N for the strategy's own over N devices")
    if num_devices is None:
        assert spec is not None
        if -1 in spec.sizes.values():
            raise MeshError(f"mesh: {spec} has an axis of size -1; give --devices N, or a size")
        num_devices = spec.num_devices
    if not 1 <= num_devices <= MAX_DEVICES:
        raise MeshError(f"devices: {num_devices}, expected 1 to {MAX_DEVICES}")
    if spec is None:
        assert config is not None
        spec = whole_mesh(strategy, num_devices, config=config, experts=experts) if num_devices > 1 else MeshSpec()
    return spec.resolve(num_devices), num_devices


def study_model(
    config: ModelConfig,
    workload: Workload,
    mesh: MeshSpec,
    *,
    num_devices: int | None = None,
    strategy: str = "expert_tensor",
    dispatch: Dispatch | None = None,
    target: Target = "cpu",
) -> StepStudy:
    """Compile one step of a model for a mesh, in a process that has not used jax yet.

    Raises:
      RequestError: a size is out of range for the model.
      MeshError: the mesh is not legal for the model, the target is missing, or the compiler fails.
    """
    workload.check(config)
    spec, num_devices = study_mesh(mesh, num_devices)
    config = dataclasses.replace(config, mtp_layers=config.mtp_layers[: workload.drafts])
    rules = ShardingRules(config, spec, strategy, workload.experts.for_model(config))
    layout = MeshLayout(spec.build(devices(target, num_devices)), rules, dispatch=dispatch or CHEAPEST)
    layout = layout.together() if workload.served else layout
    notes = copies(layout, batch=workload.placed(layout), context=workload.context)
    if num_devices > spec.num_devices:
        notes.append(f"the mesh uses {spec.num_devices} of {num_devices} devices")
    with compiling_for(gpu_of(target)):
        return study(step_of(config, workload, layout), layout, notes=notes)


def picture_of(
    config: ModelConfig, workload: Workload, mesh: MeshSpec, *, strategy: str, dispatch: Dispatch | None = None
) -> Picture:
    """Which device would hold what in a step that `study_model` would compile.

    Raises:
      RequestError: a size is out of range for the model.
      MeshError: the mesh is not legal for the model.
    """
    workload.check(config)
    layout = layout_of(config, mesh, strategy, workload.experts.for_model(config))
    layout = dataclasses.replace(layout, dispatch=dispatch or CHEAPEST)
    layout = layout.together() if workload.served else layout
    return picture(
        layout,
        batch=workload.batch,
        context=workload.context,
        served=workload.served,
        depths=workload.drafts,
        dtype=workload.resolved_dtype.name,
        notes=copies(layout, batch=workload.placed(layout), context=workload.context),
    )


def step_of(config: ModelConfig, workload: Workload, layout: MeshLayout) -> Step:
    """The function of the step and the shapes of its arguments.

    Args:
      layout: of an engine's step the one for sequences that share a cache (`MeshLayout.together`).
    """
    dtype, batch, context = workload.resolved_dtype, workload.batch, workload.context
    model = abstract(config, dtype=dtype, layout=layout)
    params = abstract_params(model, layout)
    if workload.step == "train":
        return train_step(model, params, layout, batch=batch, length=context)
    if workload.step == "lora":
        return lora_step(model, params, layout, batch=batch, length=context)
    drafts = workload.drafts
    if workload.step == "decode":
        return decode_step(model, params, batch=batch, context=context, drafts=drafts, dtype=dtype)
    chunk = workload.tokens
    return prefill_step(model, params, batch=batch, context=context, chunk=chunk, drafts=drafts, dtype=dtype)


def _sharded(x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def train_step(model: Step3p5, params: Params, layout: MeshLayout, *, batch: int, length: int) -> Step:
    """An AdamW update of all parameters from ``batch`` packed rows of ``length`` tokens, with activations kept."""
    schedule = learning_rate(
        1e-3, warmup=10, decay_from=80, steps=100, floor=0.1
    )  # the result does not depend on these
    optimizer = adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01, clip=1.0)

    def create(params: Params) -> TrainState:
        trained, biases = split_biases(dict(params))
        return TrainState(trained, biases, optimizer.init(trained), jnp.zeros((), jnp.int32))

    state = jax.eval_shape(create, params)
    rows = PackedRows(*(jax.ShapeDtypeStruct((batch, length), np.int32) for _ in PackedRows._fields))
    placement = Placement.split(layout, state, rows, axes_of(model))
    placed = jax.tree.map(_sharded, state, placement.state)
    function = make_step(model, optimizer, schedule, placement, mtp_weight=0.0, balance_rate=1.0)
    return Step(function, (placed, rows), params, batch * length, optimizer=placed.optimizer)


def lora_step(model: Step3p5, params: Params, layout: MeshLayout, *, batch: int, length: int) -> Step:
    """The gradients of a default adapter by likelihood, from a micro-batch of ``batch`` rows of ``length`` tokens.

    They are the largest program of an update. The optimiser's state lies beside it, so it is an argument here.
    """
    config, adapter, optim = model.config, LoraConfig(), OptimSettings()
    schedule = schedule_of(optim)  # the result does not depend on it
    optimizer = adamw(schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, clip=optim.clip)
    leaf_shardings = shardings(config, adapter, layout)
    state, state_shardings = abstract_state(
        shapes(config, adapter), optimizer, leaf_shardings, layout, keep_previous=False
    )
    state = jax.tree.map(_sharded, state, state_shardings)

    def tokens(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (batch, length)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(shape, "batch", "length"))

    rows = PackedRows(*(tokens(jnp.int32) for _ in PackedRows._fields))
    micro = Batch(rows, sampler=tokens(jnp.float32), advantage=tokens(jnp.float32))
    total = jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.replicated)

    def assemble(base: Params, leaves: Leaves) -> Params:
        return attach(base, leaves, adapter)

    likelihood = OBJECTIVES["sft"]
    context = LossContext(LossSettings(likelihood.name), model, config.vocab_size, {})
    accumulate = accumulation(functools.partial(likelihood.loss, context), assemble, "")

    def run(gradients: Leaves, state: TuneState, params: Params, micro: Batch, total: jax.Array) -> Any:
        return accumulate(gradients, state.leaves, params, micro, total, None, None)

    function = jax.jit(
        run,
        donate_argnums=0,
        keep_unused=True,
        out_shardings=(state_shardings.leaves, layout.replicated),
        compiler_options=COMPILER_OPTIONS,
    )
    return Step(function, (state.leaves, state, params, micro, total), params, batch * length, optimizer=state)
