"""From a name to a model that answers: `load` and the `Session` it returns."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.cache_folder import MAX_GIB, CacheFolder
from stepjax.checkpoint.folder import ModelFolder, open_folder
from stepjax.checkpoint.reader import ExpertForms, load_params
from stepjax.checkpoint.source import WeightSource
from stepjax.config import ModelConfig
from stepjax.errors import MeshError, RequestError
from stepjax.infer.session import Session
from stepjax.model.layer_tables import stack_layers, stacked_path
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.period import period_of
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.program_cache import ProgramCache, everywhere
from stepjax.sharding.devices import want_virtual_devices
from stepjax.sharding.dispatch import CHEAPEST, Dispatch
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_order import balanced_order, copy_table, replicated_order
from stepjax.sharding.expert_traffic import domain_size
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import DEFAULT, ShardingRules, whole_mesh
from stepjax.sharding.sharded_load import ExpertOrder, load_sharded
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import requested
from stepjax.weights.fp8_rows import FP8_ROWS
from stepjax.weights.int_groups import GROUP
from stepjax.weights.plain import PLAIN

Dtype = Literal["auto", "float32", "bfloat16"]
LayerForm = Literal["auto", "looped", "unrolled"]

LAYER_FORMS: dict[str, LayerForm] = {"cpu": "unrolled"}  # what "auto" is (docs/numbers.md, Layers as a loop)


def load(
    name_or_path: str | Path | ModelFolder,
    *,
    dtype: Dtype = "auto",
    keep_fp8: bool = False,
    quantize: str | None = None,
    group: int = GROUP,
    dense_fp8: bool = False,
    cache_fp8: bool = False,
    mesh: str | MeshSpec | None = None,
    strategy: str | None = None,
    dispatch: Dispatch | None = None,
    expert_order: ExpertOrder | None = None,
    expert_slots: int | None = None,
    expert_loads: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
    program_cache: ProgramCache | None = None,
    layers: LayerForm = "auto",
    first_device: int = 0,
) -> Session:
    """Open a checkpoint and place its weights.

    Args:
      name_or_path: a checkpoint folder, a GGUF file (of a split one, any part), a hub id as
        ``stepfun-ai/Step-3.5-Flash``, an embedded name (``step-tiny``), or a folder already opened.
      dtype: of weights and activations. "auto" is bfloat16 on an accelerator and float32 on a CPU, which has no faster
        bfloat16 product and where greedy answers then do not depend on how a step is shaped.
      keep_fp8: keep the FP8 release's expert weights in 8 bits and widen them where they are used.
      quantize: hold the routed experts in another format of `stepjax.weights.formats`: "int8" with a scale per output
        channel, or "int4" with one per ``group`` columns. Each weight is quantised as it is read. A checkpoint that
        ``stepjax convert`` wrote in such a format is held as it is stored.
      group: columns that share a scale in int4, 32 or 64 as a rule.
      dense_fp8: hold the linear maps beside the routed experts in FP8 with a scale for each row: those of attention,
        dense MLPs, shared experts, the MTP merge and the output matrices. Embedding, norms, routers and the gates of
        heads stay as they are. Each weight is quantised as it is read.
      cache_fp8: hold keys and values in FP8. They are rounded wherever the model attends, so that logits of a whole
        sequence (`Session.logits`) are those that the engine's answers follow.
      mesh: split the model over devices, as ``expert=4,tensor=2`` (`stepjax.sharding.mesh`); None is one device. When
        several processes run, each calls this alike and reads only what its own devices hold.
      strategy: what is split over which axis (`stepjax.sharding.rules`); None is "expert_tensor". A strategy without a
        mesh takes a mesh over all devices.
      dispatch: how tokens reach the experts under a wide strategy; None: in the form that is cheapest for a step.
      expert_order: with a mesh, by layer: which stored expert becomes our j-th, so that busy ones lie on different
        devices (`stepjax.sharding.expert_order.balanced_order`); answers do not change.
      expert_slots: with a mesh, places for experts' weights in each layer; those beyond the number of experts hold the
        busiest a second time (`stepjax.sharding.expert_order.replicated_order`). Answers do not change.
      expert_loads: how often each expert is chosen, [E] or [L, E], from `Session.expert_load`: gives the order or the
        copies. None: as if all were alike.
      progress: called with (bytes read, bytes in all) after each tensor.
      program_cache: executables of earlier runs, as `use_caches` opens them; None: every run compiles its own.
      layers: "looped" holds the repeated layers as stacks, and programs run them in a loop, so that they are compiled
        once; "unrolled" compiles each by itself, as training needs it. "auto" takes what `LAYER_FORMS` says of the
        device. Layers whose experts are in different formats, as a GGUF file may have them, are never stacked.
      first_device: the mesh takes devices from this one on, where those before it are another mesh's.

    Raises:
      CheckpointError, ConfigError, TokenizerError, TemplateError: the folder is not a usable checkpoint. Everything is
        checked before the first weight is placed.
      MeshError: the mesh fits neither the devices nor the model.

    Example:
      >>> import stepjax
      >>> model = stepjax.load("step-tiny")
      >>> len(model.config.layers)
      5
    """
    folder = name_or_path if isinstance(name_or_path, ModelFolder) else open_folder(name_or_path)
    checkpoint = folder.checkpoint
    experts = _experts(checkpoint, requested(keep_fp8=keep_fp8, quantize=quantize, group=group))
    config = dataclasses.replace(checkpoint.config, dense_fp8=dense_fp8, cache_fp8=cache_fp8)
    dense = FP8_ROWS if dense_fp8 else PLAIN
    if expert_slots is not None:
        if (mesh is None and strategy is None) or expert_order:
            raise RequestError("expert_slots: give it together with a mesh, and without expert_order")
        config = config.with_slots(expert_slots)
    experts, layout = _layout(mesh, strategy, dispatch, config, experts, first_device)
    chosen = _resolve_dtype(dtype)
    looped = _looped(layers, checkpoint, experts)
    report = None
    if isinstance(layout, MeshLayout):
        if expert_slots is not None or expert_loads is not None:
            expert_order = _expert_order(config, layout, expert_loads)
        axes = axes_of(abstract(checkpoint.config, layout=layout, mtp=checkpoint.has_mtp))
        shardings = {path: sharding for path, names in axes.items() if (sharding := layout.parameter(*names))}
        params, report = load_sharded(
            checkpoint,
            shardings,
            chosen,
            experts=experts,
            dense=dense,
            expert_order=expert_order,
            progress=progress,
        )
        if expert_order and config.expert_slots:
            params = params | _copy_tables(config, layout, expert_order)
    else:
        if expert_order or expert_loads is not None:
            raise RequestError("expert_order: one device holds all experts; give it together with a mesh")
        params = load_params(checkpoint, chosen, experts=experts, dense=dense, progress=progress)
    if looped:
        model = abstract(config, layout=layout, mtp=checkpoint.has_mtp, looped=True)
        assert model.period is not None
        stack_layers(params, model.period, axes_of(model), layout)
    return Session(
        config,
        params,
        dtype=chosen,
        mtp=checkpoint.has_mtp,
        tokenizer=folder.tokenizer,
        template=folder.template,
        generation_config=folder.generation_config,
        layout=layout,
        load_report=report,
        program_cache=program_cache,
        looped=looped,
    )


def _looped(layers: LayerForm, checkpoint: WeightSource, experts: ExpertForms) -> bool:
    if layers not in get_args(LayerForm):
        raise RequestError(f"layers: is {layers!r}, expected one of {', '.join(get_args(LayerForm))}")
    if layers == "auto":
        layers = LAYER_FORMS.get(jax.default_backend(), "unrolled")
    return layers == "looped" and period_of(checkpoint.config) is not None and not _mixed(checkpoint.config, experts)


def _mixed(config: ModelConfig, experts: ExpertForms) -> bool:
    """Whether layers that a stack would hold together have their experts in several formats."""
    period = period_of(config)
    formats: dict[str, set[ExpertFormat]] = {}
    for path, format in experts.items() if isinstance(experts, Mapping) else ():
        if stacked := stacked_path(path, period):
            formats.setdefault(stacked.path, set()).add(format)
    return any(len(kinds) > 1 for kinds in formats.values())


def _experts(checkpoint: WeightSource, requested: ExpertFormat | None) -> ExpertForms:
    """How the routed experts are to be held: all of them alike, or each weight as its packing says."""
    stored = checkpoint.experts
    if requested is not None and requested.made_while_loading:
        if stored.quantised and stored.kept_as_stored:
            raise RequestError(
                f"quantize {requested.name}: {checkpoint.folder} holds its experts in {stored.bits} bits already; load "
                "it as it is, or quantise the checkpoint that it was made from"
            )
        return requested
    keep = requested.name if requested is not None else ""
    if not checkpoint.by_path:
        return stored if stored.name == keep else checkpoint.resident_experts
    paths = [path for path in checkpoint.paths if ".experts." in path]
    return {
        path: format if (format := checkpoint.format(path)).name == keep else checkpoint.resident(path)
        for path in paths
    }


def _expert_order(config: ModelConfig, layout: MeshLayout, loads: np.ndarray | None) -> ExpertOrder:
    """Which stored expert each slot holds, by layer.

    Raises:
      RequestError: the loads are not of this model.
      MeshError: the ranks do not divide the slots.
    """
    num_ranks, moe = Group.of(layout.rules).num_ranks, [layer.index for layer in config.moe_layers]
    shape = len(moe), config.num_experts
    given = np.ones(shape) if loads is None else np.asarray(loads, np.float64)
    if given.shape not in (shape, shape[1:]) or not np.isfinite(given).all() or (given < 0).any():
        raise RequestError(
            f"expert_loads: of shape {given.shape}, expected finite numbers ≥ 0 for the {shape[1]} experts, or for "
            f"those of each of the {shape[0]} MoE layers"
        )
    given = np.broadcast_to(given, shape)
    if config.expert_slots:
        order = replicated_order(given, num_ranks, config.expert_slots)
    else:
        order = balanced_order(given, num_ranks)
    return dict(zip(moe, (row.tolist() for row in order), strict=True))


def _copy_tables(config: ModelConfig, layout: MeshLayout, order: ExpertOrder) -> dict[str, Any]:
    """Where the router finds the copies of each expert, of every MoE layer."""
    place = layout.parameter("router", "copy")
    tables = {layer: copy_table(np.asarray(row), config.num_experts) for layer, row in order.items()}

    def placed(table: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(table.shape, place, lambda index: table[index])

    return {f"layers.{layer}.moe.copies": placed(table) for layer, table in tables.items()}


def _layout(
    mesh: str | MeshSpec | None,
    strategy: str | None,
    dispatch: Dispatch | None,
    config: ModelConfig,
    experts: ExpertForms,
    first_device: int,
) -> tuple[ExpertForms, Layout]:
    """The layout, and the forms of experts: with smaller units where the mesh cuts inside one."""
    remarks: list[str] = []
    if mesh is None and strategy is not None:
        kind = PLAIN if isinstance(experts, Mapping) or experts is None else experts
        device = jax.devices()[0]
        mesh = whole_mesh(
            strategy, jax.device_count(), config=config, experts=kind, domain=domain_size(device.device_kind)
        )
        remarks.append(f"strategy {strategy} without a mesh takes all {jax.device_count()} devices: {mesh}")
    if mesh is None:
        if dispatch is not None:
            raise MeshError("dispatch: one device holds all experts; give it together with a mesh")
        if jax.process_count() > 1:
            raise MeshError(f"mesh: {jax.process_count()} processes run, but no mesh is given; try --mesh expert=-1")
        return experts, SingleDevice()
    strategy = DEFAULT if strategy is None else strategy
    spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
    if -1 not in spec.sizes.values() and not jax.distributed.is_initialized():
        want_virtual_devices(first_device + spec.num_devices)
    spec = spec.resolve(jax.device_count() - first_device)
    mesh_of_devices = spec.build(jax.devices()[first_device:])
    domain = domain_size(mesh_of_devices.devices.flat[0].device_kind)
    make = functools.partial(MeshLayout, mesh_of_devices, dispatch=dispatch or CHEAPEST, domain=domain)
    if not isinstance(experts, Mapping):
        return experts, make(ShardingRules(config, spec, strategy, experts or PLAIN), remarks=tuple(remarks))
    fitted = {form: _fitted(form, config, spec, strategy) for form in dict.fromkeys(experts.values())}
    most = Counter(fitted[form] for form in experts.values()).most_common(1)
    rules = ShardingRules(config, spec, strategy, most[0][0] if most else PLAIN)
    widened = [form.name for form, finer in fitted.items() if form.quantised and not finer.quantised]
    if widened:
        remarks.append(f"{spec}: would cut experts inside units of {', '.join(widened)}, which are widened")
    return {path: fitted[form] for path, form in experts.items()}, make(rules, remarks=tuple(remarks))


def _fitted(form: ExpertFormat, config: ModelConfig, spec: MeshSpec, strategy: str) -> ExpertFormat:
    """A form whose units the mesh does not cut: itself, one with fewer columns that repeat their scale, or none.

    Raises:
      MeshError: the mesh fits no form.
    """
    try:
        ShardingRules(config, spec, strategy, form)
        return form
    except MeshError:
        columns = form.unit[1] or 1
        for size in range(columns // 2, 1, -1):
            finer = form.refined(size) if columns % size == 0 and size % 2 == 0 else form
            with contextlib.suppress(MeshError):
                if finer != form:
                    ShardingRules(config, spec, strategy, finer)
                    return finer
        ShardingRules(config, spec, strategy, PLAIN)
        return PLAIN


def use_caches(*, programs: bool = True, max_gib: float = MAX_GIB) -> ProgramCache | None:
    """Keep compiled programs between runs, in ``STEPJAX_CACHE_DIR`` or the user's cache folder.

    XLA's own cache is switched on for all of jax, unless ``JAX_COMPILATION_CACHE_DIR`` names another. It spares
    compiling, and the cache that is returned spares tracing and lowering too.

    Args:
      programs: False: compile everything; neither cache is used.
      max_gib: of each of the two; what was not used for longest goes first.
    """
    if not programs:
        everywhere([False])  # other processes may want a cache
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and (folder := CacheFolder.open("compiled")):
        folder.trim(int(max_gib * 2**30))
        # Written in place by jax: of two processes that share the folder, one may meet half a file and compiles itself.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
        jax.config.update("jax_compilation_cache_dir", str(folder.path))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
    return ProgramCache.open(max_gib=max_gib)


def _resolve_dtype(dtype: Dtype) -> Any:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise RequestError(f"dtype: is {dtype!r}, expected auto, float32 or bfloat16")
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(dtype)
