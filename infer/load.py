"""From a name to a model that answers: `load` and the `Session` it returns."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.cache import MAX_DRAFTS, Chunk
from stepjax.chat import ChatTemplate, encode_chat
from stepjax.checkpoint import Change, Checkpoint, load_params
from stepjax.config import ModelConfig
from stepjax.errors import ContextError, MeshError, RequestError
from stepjax.folder import ModelFolder, open_folder
from stepjax.infer.generate import Completion, generate
from stepjax.infer.grammar import Grammars
from stepjax.infer.guide import Masks
from stepjax.infer.runner import Runner
from stepjax.infer.sampling import SamplingParams
from stepjax.layout import Layout, SingleDevice
from stepjax.model import Params, Step3p5, abstract, axes_of, bind
from stepjax.quant_groups import BITS, GROUP, IntFormat, form_of, quantize_groups
from stepjax.sharding.layout import MeshLayout
from stepjax.sharding.load import ExpertOrder, LoadReport, load_sharded
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.rules import Rules
from stepjax.sharding.target import want_virtual_devices
from stepjax.tokenizer import Tokenizer
from stepjax.weights import Groups

Dtype = Literal["auto", "float32", "bfloat16"]

HEAD_ROWS = 256  # rows per call of an output matrix: bounds the logits on the device to 256 × V


def load(
    name_or_path: str | Path | ModelFolder,
    *,
    dtype: Dtype = "auto",
    keep_fp8: bool = False,
    quantize: IntFormat | None = None,
    group: int = GROUP,
    mesh: str | MeshSpec | None = None,
    strategy: str = "expert_tensor",
    expert_order: ExpertOrder | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Session:
    """Open a checkpoint and place its weights.

    Args:
      name_or_path: a checkpoint folder, a hub id as ``stepfun-ai/Step-3.5-Flash``, an embedded name
        (``step-tiny``), or a folder already opened.
      dtype: of weights and activations. "auto" is bfloat16 on an accelerator and float32 on a CPU, which has no faster
        bfloat16 product and where greedy answers then do not depend on how a step is shaped.
      keep_fp8: keep the FP8 release's expert weights in 8 bits and widen them where they are used.
      quantize: hold the routed experts in whole numbers: "int8" with a scale per output channel, or "int4" with one
        per ``group`` columns. Each weight is quantised as it is read. A checkpoint that ``stepjax convert`` wrote in
        whole numbers is held as it is stored.
      group: columns that share a scale in int4, 32 or 64 as a rule.
      mesh: split the model over devices, as ``expert=4,tensor=2`` (`stepjax.sharding.mesh`); None is one device. When
        several processes run, each calls this alike and reads only what its own devices hold.
      strategy: what is split over which axis (`stepjax.sharding.rules`).
      expert_order: with a mesh, by layer: which stored expert becomes our j-th, so that busy ones lie on different
        devices (`stepjax.sharding.balance.balanced_order`); answers do not change.
      progress: called with (bytes read, bytes in all) after each tensor.

    Raises:
      CheckpointError, ConfigError, TokenizerError, TemplateError: the folder is not a usable checkpoint. Everything is
        checked before the first weight is placed.
      MeshError: the mesh fits neither the devices nor the model.
    """
    folder = name_or_path if isinstance(name_or_path, ModelFolder) else open_folder(name_or_path)
    checkpoint = folder.checkpoint
    change = _quantiser(quantize, group, checkpoint, keep_fp8=keep_fp8)
    groups = form_of(quantize, group) if quantize else checkpoint.groups
    layout = _layout(mesh, strategy, checkpoint.config, keep_fp8=keep_fp8 and checkpoint.fp8, groups=groups)
    chosen = _resolve_dtype(dtype)
    report = None
    if isinstance(layout, MeshLayout):
        axes = axes_of(abstract(checkpoint.config, layout=layout, mtp=checkpoint.has_mtp))
        shardings = {path: layout.parameter(*names) for path, names in axes.items()}
        params, report = load_sharded(
            checkpoint,
            shardings,
            chosen,
            keep_fp8=keep_fp8,
            expert_order=expert_order,
            change=change,
            progress=progress,
        )
    else:
        if expert_order:
            raise RequestError("expert_order: one device holds all experts; give it together with a mesh")
        params = load_params(checkpoint, chosen, keep_fp8=keep_fp8, change=change, progress=progress)
    return Session(
        checkpoint.config,
        params,
        dtype=chosen,
        mtp=checkpoint.has_mtp,
        tokenizer=folder.tokenizer,
        template=folder.template,
        generation_config=folder.generation_config,
        layout=layout,
        load_report=report,
    )


def _quantiser(format: IntFormat | None, group: int, checkpoint: Checkpoint, *, keep_fp8: bool) -> Change | None:
    """What turns experts into whole numbers while they are read."""
    if format is None:
        return None
    if format not in BITS:
        raise RequestError(f"quantize: is {format!r}, expected {' or '.join(BITS)}")
    if keep_fp8:
        raise RequestError(
            f"quantize {format} and keep_fp8: expected one of them, since each says how experts are held"
        )
    if checkpoint.groups:
        raise RequestError(
            f"quantize {format}: {checkpoint.folder} holds its experts in {checkpoint.groups.bits} bits already; load "
            "it as it is, or quantise the checkpoint that it was made from"
        )

    def change(path: str, value: Any) -> Any:
        return quantize_groups(value, format, group) if ".experts." in path else value

    return change


def _layout(
    mesh: str | MeshSpec | None, strategy: str, config: ModelConfig, *, keep_fp8: bool, groups: Groups | None
) -> Layout:
    if mesh is None:
        if jax.process_count() > 1:
            raise MeshError(f"mesh: {jax.process_count()} processes run, but no mesh is given; try --mesh expert=-1")
        return SingleDevice()
    spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
    if -1 not in spec.sizes.values() and not jax.distributed.is_initialized():
        want_virtual_devices(spec.num_devices)
    spec = spec.resolve(jax.device_count())
    return MeshLayout(spec.build(), Rules(config, spec, strategy, keep_fp8=keep_fp8, groups=groups))


def use_compile_cache() -> None:
    """Keep compiled programs between runs, in ``JAX_COMPILATION_CACHE_DIR`` or the user's cache folder."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "stepjax" / "compiled"
        try:
            folder = folder.expanduser()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError):  # no home, or one that may not be written to: compile anew each time
            return
        # Written in place by jax: of two processes that share the folder, one may meet half a file and compiles itself.
        warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry", UserWarning)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _resolve_dtype(dtype: Dtype) -> Any:
    if dtype not in ("auto", "float32", "bfloat16"):
        raise RequestError(f"dtype: is {dtype!r}, expected auto, float32 or bfloat16")
    if dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return jnp.dtype(dtype)


class Session:
    """A loaded model: logits of given tokens, answers to prompts and chats."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        dtype: Any,
        mtp: bool = True,
        tokenizer: Tokenizer | None = None,
        template: ChatTemplate | None = None,
        generation_config: Mapping[str, Any] | None = None,
        layout: Layout | None = None,
        load_report: LoadReport | None = None,
    ):
        self.config, self.params, self.dtype = config, params, dtype
        self.tokenizer, self.template = tokenizer, template
        self.generation_config, self.load_report = dict(generation_config or {}), load_report
        self.model: Step3p5 = abstract(config, dtype=dtype, mtp=mtp, layout=layout)
        self._runners: dict[tuple[int, bool], Runner] = {}

    @property
    def max_drafts(self) -> int:
        """MTP depths at hand."""
        return min(MAX_DRAFTS, len(self.model.mtp))

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters: ``given``, else the checkpoint's generation_config, else the model card's."""
        return SamplingParams.from_defaults(self.generation_config, **given)

    def runner(self, speculate: int | None = None, *, routing: bool = False) -> Runner:
        """The compiled steps for ``speculate`` drafts; None takes all the checkpoint has.

        Args:
          routing: the steps tell the experts of every token, too.
        """
        drafts = self.max_drafts if speculate is None else speculate
        if not 0 <= drafts <= self.max_drafts:
            raise RequestError(
                f"speculate: is {drafts}, but this checkpoint has {self.max_drafts} MTP layers to draft with"
            )
        key = drafts, routing
        if key not in self._runners:
            num_tokens = len(self.tokenizer) if self.tokenizer else self.config.vocab_size
            self._runners[key] = Runner(self._together, num_tokens=num_tokens, drafts=drafts, routing=routing)
        return self._runners[key]

    @cached_property
    def _together(self) -> Step3p5:
        """The model for sequences that share a cache."""
        layout = self.model.layout.together()
        if layout == self.model.layout:
            return self.model
        return abstract(self.config, dtype=self.dtype, mtp=bool(self.model.mtp), layout=layout)

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars over the checkpoint's tokenizer."""
        return Grammars(self._require_tokenizer(), self.config.eos_ids)

    @cached_property
    def masks(self) -> Masks:
        """Sets of the tokenizer's entries."""
        return Masks(self._require_tokenizer(), self.config.vocab_size)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits of one sequence: float32 [T, V]; row t has seen tokens 0 … t."""
        hidden, _ = self._score(self.params, self._padded(ids), mtp=False)
        return self._head(hidden, len(ids), None)

    def mtp_logits(self, ids: Sequence[int]) -> list[np.ndarray]:
        """Teacher-forced MTP logits: for depth k = 1 … 3 float32 [T − k, V]; row t was fed token t + k."""
        return self.score(ids)[1]

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """`logits` and `mtp_logits` from one pass."""
        hidden, states = self._score(self.params, self._padded(ids), mtp=True)
        depths = [self._head(state, max(len(ids) - k, 0), k - 1) for k, state in enumerate(states, start=1)]
        return self._head(hidden, len(ids), None), depths

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None, **options: Any
    ) -> list[Completion]:
        """`stepjax.generate` on this session."""
        return generate(self, prompts, params, **options)

    def encode(self, text: str) -> list[int]:
        """Ids of raw text, led by the beginning-of-sequence token."""
        return self._require_tokenizer().encode(text, bos=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of a conversation, rendered by the checkpoint's own template, up to where the answer begins."""
        if self.template is None:
            raise RequestError("chat: this checkpoint has no chat template; pass token ids or raw text")
        return encode_chat(self._require_tokenizer(), self.template, messages, **options)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise RequestError unless ``ids`` is a non-empty list of vocabulary ids that fits the context."""
        if not len(ids):
            raise RequestError("tokens: the list is empty, expected at least one id")
        for at, token in enumerate(ids):
            if (
                isinstance(token, bool)
                or not isinstance(token, int | np.integer)
                or not 0 <= token < self.config.vocab_size
            ):
                raise RequestError(
                    f"tokens: entry {at} is {token!r}, expected a whole number from 0 to {self.config.vocab_size - 1}"
                )
        if len(ids) > self.config.max_positions:
            raise ContextError(f"tokens: {len(ids)} ids, but the model's context is {self.config.max_positions}")

    def check_prompt(self, ids: Sequence[int]) -> int:
        """Raise RequestError unless the context has room for an answer to ``ids``; returns how many tokens of room."""
        self.check_ids(ids)
        room = self.config.max_positions - len(ids)
        if room < 1:
            raise ContextError(
                f"prompt: has {len(ids)} tokens, but the context is {self.config.max_positions}; shorten the prompt"
            )
        return room

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("text: this checkpoint has no tokenizer.json; pass token ids")
        return self.tokenizer

    def _padded(self, ids: Sequence[int]) -> np.ndarray:
        """[1, T'] with T' the next power of two: causal, so padding behind changes nothing before it."""
        self.check_ids(ids)
        width = max(16, 1 << (len(ids) - 1).bit_length())
        return np.asarray([[*ids, *[0] * (width - len(ids))]], np.int32)

    @cached_property
    def _score(self) -> Callable[..., tuple[jax.Array, list[jax.Array]]]:
        def run(params: Params, ids_BT: jax.Array, *, mtp: bool) -> tuple[jax.Array, list[jax.Array]]:
            model, chunk = bind(self.model, params), Chunk.whole(*ids_BT.shape)
            hidden = model.forward(ids_BT, chunk).hidden_BTD
            return hidden, model.mtp_hidden(ids_BT, hidden, chunk) if mtp else []

        return jax.jit(run, static_argnames="mtp")

    @cached_property
    def _logits(self) -> Callable[[Params, jax.Array, np.int32, int | None], jax.Array]:
        def run(params: Params, hidden_BTD: jax.Array, at: jax.Array, depth: int | None) -> jax.Array:
            model, rows = bind(self.model, params), min(HEAD_ROWS, hidden_BTD.shape[1])
            block = jax.lax.dynamic_slice_in_dim(hidden_BTD, at, rows, axis=1)
            logits = model.logits(block) if depth is None else model.mtp[depth].logits(block)
            return logits[0]

        return jax.jit(run, static_argnums=3, out_shardings=self.model.layout.replicated)

    def _head(self, hidden_BTD: jax.Array, rows: int, depth: int | None) -> np.ndarray:
        """Logits of the first ``rows`` rows, a block at a time."""
        out = np.empty((rows, self.config.vocab_size), np.float32)
        for at in range(0, rows, HEAD_ROWS):
            block = self._logits(self.params, hidden_BTD, np.int32(at), depth)
            out[at : at + HEAD_ROWS] = np.asarray(block)[: rows - at]
        return out
