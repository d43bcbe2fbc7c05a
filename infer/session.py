"""A loaded model: logits of given tokens, answers to prompts and chats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ModelConfig
from stepjax.errors import ContextError, RequestError
from stepjax.infer.guided.compiler import Grammars
from stepjax.infer.guided.guide import Masks
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.steps.runner import Runner
from stepjax.model.cache import MAX_DRAFTS, Chunk
from stepjax.model.layer_tables import FlatParams
from stepjax.model.layout import Layout
from stepjax.model.step3p5 import Params, Step3p5, abstract, bind
from stepjax.ops.experts import expert_load
from stepjax.program_cache import ProgramCache
from stepjax.sharding.sharded_load import LoadReport
from stepjax.stored_function import StoredFunction
from stepjax.text.chat import ChatTemplate, encode_chat
from stepjax.text.tokenizer import Tokenizer

HEAD_ROWS = 256  # rows per call of an output matrix: bounds the logits on the device to 256 × V


class Session:
    """A loaded model: logits of given tokens, answers to prompts and chats. `stepjax.load` makes one.

    Example:
      >>> import stepjax
      >>> model = stepjax.load("step-tiny")
      >>> model.logits([0, 3, 5, 300]).shape[0]
      4
    """

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
        program_cache: ProgramCache | None = None,
        looped: bool = False,
    ):
        """
        Args:
          params: by dotted path; of a looped model its table (`stepjax.model.layer_tables`).
          looped: the repeated layers are stacks, and programs run them in a loop.
        """
        self.program_cache = program_cache
        self.config, self.table, self.dtype = config, params, dtype
        self.tokenizer, self.template = tokenizer, template
        self.generation_config, self.load_report = dict(generation_config or {}), load_report
        self.model: Step3p5 = abstract(config, dtype=dtype, mtp=mtp, layout=layout, looped=looped)
        self._runners: dict[tuple[int, bool, bool], Runner] = {}
        self._functions: dict[str, StoredFunction] = {}

    @cached_property
    def params(self) -> Params:
        """Every parameter by its dotted path, as ``layers.7.moe.experts.gate``, however programs hold it (`table`)."""
        return FlatParams(self.table, self.model.period) if self.model.period else self.table

    @property
    def max_drafts(self) -> int:
        """MTP depths of the checkpoint, at most 3."""
        return min(MAX_DRAFTS, len(self.model.mtp))

    def sampling(self, **given: Any) -> SamplingParams:
        """Sampling parameters: ``given``, else the checkpoint's generation_config, else the model card's."""
        return SamplingParams.from_defaults(self.generation_config, **given)

    def runner(self, speculate: int | None = None, *, routing: bool = False, counting: bool = False) -> Runner:
        """The compiled steps for ``speculate`` drafts; None takes all the checkpoint has.

        Args:
          routing: the steps also return the experts of every token.
          counting: and how many of their tokens chose each expert.
        """
        drafts = self.max_drafts if speculate is None else speculate
        if not 0 <= drafts <= self.max_drafts:
            raise RequestError(
                f"speculate: is {drafts}, but this checkpoint has {self.max_drafts} MTP layers to draft with"
            )
        key = drafts, routing, counting
        if key not in self._runners:
            num_tokens = len(self.tokenizer) if self.tokenizer else self.config.vocab_size
            self._runners[key] = Runner(
                self._together,
                num_tokens=num_tokens,
                drafts=drafts,
                routing=routing,
                counting=counting,
                cache=self.program_cache,
            )
        return self._runners[key]

    @cached_property
    def _together(self) -> Step3p5:
        """The model with the layout for sequences that share a cache."""
        layout = self.model.layout.together()
        if layout == self.model.layout:
            return self.model
        looped = self.model.period is not None
        return abstract(self.config, dtype=self.dtype, mtp=bool(self.model.mtp), layout=layout, looped=looped)

    @cached_property
    def grammars(self) -> Grammars:
        """The compiler of grammars over the checkpoint's tokenizer."""
        return Grammars(self._require_tokenizer(), self.config.eos_ids)

    @cached_property
    def masks(self) -> Masks:
        """Sets of tokens as bit masks, for the checkpoint's tokenizer."""
        return Masks(self._require_tokenizer(), self.config.vocab_size)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits of one sequence: float32 [T, V]; row t has seen tokens 0 … t."""
        hidden, _ = self._forward(mtp=False)(self.table, self.padded(ids))
        return self.head_rows(hidden, len(ids), None)

    def mtp_logits(self, ids: Sequence[int]) -> list[np.ndarray]:
        """Teacher-forced MTP logits: for depth k = 1 … 3 float32 [T − k, V]; row t was fed token t + k."""
        return self.score(ids)[1]

    def score(self, ids: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """`logits` and `mtp_logits` from one pass."""
        hidden, states = self._forward(mtp=True)(self.table, self.padded(ids))
        depths = [self.head_rows(state, max(len(ids) - k, 0), k - 1) for k, state in enumerate(states, start=1)]
        return self.head_rows(hidden, len(ids), None), depths

    def routed(self, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """`logits` and the experts that each MoE layer's router chose: int32 [T, L, A]."""

        def run(params: Params, ids_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            out = bind(self.model, params).forward(ids_BT, Chunk.whole(*ids_BT.shape))
            whole = self.model.layout.constrain  # other processes may have parts of a split choice
            return out.hidden_BTD, tuple(whole(choice, None, None, None) for choice in out.expert_ids)

        hidden, choices = self.stored("score experts", run)(self.table, self.padded(ids))
        experts = [np.asarray(layer)[0, : len(ids)] for layer in choices]
        none = np.zeros((len(ids), 0, self.config.top_k), np.int32)
        return self.head_rows(hidden, len(ids)), np.stack(experts, axis=1) if experts else none

    def expert_load(self, ids: Sequence[int]) -> np.ndarray:
        """How many of these tokens chose each expert, int32 [L, E] for the L MoE layers."""

        def run(params: Params, ids_BT: jax.Array, count: jax.Array) -> jax.Array:
            num_experts = self.config.num_experts
            out = bind(self.model, params).forward(ids_BT, Chunk.whole(*ids_BT.shape))
            real = jnp.arange(ids_BT.shape[1])[None, :, None] < count
            chosen = [jnp.where(real, layer_BTA, num_experts) for layer_BTA in out.expert_ids]
            return jnp.stack([expert_load(layer_BTA, num_experts) for layer_BTA in chosen])

        count = self.stored("expert load", run, out_shardings=self.model.layout.replicated)
        return np.asarray(count(self.table, self.padded(ids), np.int32(len(ids))))

    def encode(self, text: str, *, bos: bool = True) -> list[int]:
        """Ids of raw text, after the beginning-of-sequence token unless ``bos`` is false."""
        return self._require_tokenizer().encode(text, bos=bos)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Ids of a conversation, rendered by the checkpoint's own template, up to where the answer begins."""
        if self.template is None:
            raise RequestError("chat: this checkpoint has no chat template; pass token ids or raw text")
        return encode_chat(self._require_tokenizer(), self.template, messages, **options)

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise RequestError unless ``ids`` is a non-empty list of vocabulary ids that fits the context."""
        if not len(ids):
            raise RequestError("tokens: the list is empty, expected at least one id")
        for i, token in enumerate(ids):
            if (
                isinstance(token, bool)
                or not isinstance(token, int | np.integer)
                or not 0 <= token < self.config.vocab_size
            ):
                raise RequestError(
                    f"tokens: entry {i} is {token!r}, expected an integer from 0 to {self.config.vocab_size - 1}"
                )
        if len(ids) > self.config.max_positions:
            raise ContextError(
                f"tokens: {len(ids)} ids, but the model's context is {self.config.max_positions}",
                num_tokens=len(ids),
                context=self.config.max_positions,
            )

    def check_prompt(self, ids: Sequence[int]) -> int:
        """How many tokens the context leaves for an answer to ``ids``; raises RequestError if it leaves none."""
        self.check_ids(ids)
        room = self.config.max_positions - len(ids)
        if room < 1:
            raise ContextError(
                f"prompt: has {len(ids)} tokens, but the context is {self.config.max_positions}; shorten the prompt",
                num_tokens=len(ids),
                context=self.config.max_positions,
            )
        return room

    def _require_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("text: this checkpoint has no tokenizer.json; pass token ids")
        return self.tokenizer

    def padded(self, ids: Sequence[int]) -> np.ndarray:
        """[1, T'] with T' the next power of two. Attention is causal: padding at the end changes no earlier row."""
        self.check_ids(ids)
        width = max(16, 1 << (len(ids) - 1).bit_length())
        return np.asarray([[*ids, *[0] * (width - len(ids))]], np.int32)

    def _forward(self, *, mtp: bool) -> StoredFunction:
        """``(params, ids) → (hidden states, those of each MTP depth)``."""

        def run(params: Params, ids_BT: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            model, chunk = bind(self.model, params), Chunk.whole(*ids_BT.shape)
            hidden = model.forward(ids_BT, chunk).hidden_BTD
            return hidden, model.mtp_hidden(ids_BT, hidden, chunk) if mtp else []

        return self.stored(f"score {mtp}", run)

    def _logits(self, depth: int | None) -> StoredFunction:
        """``(params, hidden states, first row) → logits``; depth None is the backbone's head."""

        def run(params: Params, hidden_BTD: jax.Array, start: jax.Array) -> jax.Array:
            model, rows = bind(self.model, params), min(HEAD_ROWS, hidden_BTD.shape[1])
            block = jax.lax.dynamic_slice_in_dim(hidden_BTD, start, rows, axis=1)
            logits = model.logits(block) if depth is None else model.mtp[depth].logits(block)
            return logits[0]

        return self.stored(f"logits {depth}", run, out_shardings=self.model.layout.replicated)

    def stored(self, name: str, function: Callable[..., Any], **options: Any) -> StoredFunction:
        """A function that closes over the session's model alone, the same for each call with this name."""
        if name not in self._functions:
            self._functions[name] = StoredFunction(
                name, function, identity=model_identity(self), cache=self.program_cache, **options
            )
        return self._functions[name]

    def head_rows(self, hidden_BTD: jax.Array, rows: int, depth: int | None = None) -> np.ndarray:
        """Logits of the first ``rows`` rows, a block at a time: float32 [rows, V].

        Args:
          depth: MTP depth from 0 whose head is used; None: the backbone's.
        """
        out = np.empty((rows, self.config.vocab_size), np.float32)
        for start in range(0, rows, HEAD_ROWS):
            block = self._logits(depth)(self.table, hidden_BTD, np.int32(start))
            out[start : start + HEAD_ROWS] = np.asarray(block)[: rows - start]
        return out


def model_identity(session: Session) -> str:
    """What a program depends on that closes over the session's model, for `stepjax.program_cache`."""
    model = session.model
    period = "looped" if model.period else "unrolled"
    return f"{session.config} in {np.dtype(session.dtype)}, mtp {len(model.mtp)}, {period}, {model.layout!r}"


def num_tokens_of(session: Session) -> int:
    """Entries of the vocabulary that can be sampled."""
    return len(session.tokenizer) if session.tokenizer else session.config.vocab_size
