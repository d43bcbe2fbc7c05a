"""The engine: runs many requests together; each gets the tokens that it would get alone.

`stepjax.infer.engine.scheduler` plans a step, `stepjax.infer.engine.executor` launches it, and the engine reads the
result. A step is launched before the previous one is read, so that the device does not wait for the host. The end of an
answer is therefore seen one step late, and the surplus tokens are dropped.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence as Tokens
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.adapters.lora import LoraConfig
from stepjax.adapters.peft import import_adapter
from stepjax.errors import ContextError, RequestError
from stepjax.infer.engine.adapters import AdapterNames, AdapterPin
from stepjax.infer.engine.answer import Answer, TokenScore, split_request
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.draft_policy import DRAFTS, DraftPolicy, StepBytes
from stepjax.infer.engine.executor import Assignment, Mask, Order, Progress
from stepjax.infer.engine.followers import Channel, Leader, OrderHandlers, connect, follow
from stepjax.infer.engine.guidance import Guidance, fault_of
from stepjax.infer.engine.ready_programs import CPU_PROGRAMS, ReadyPrograms
from stepjax.infer.engine.scheduler import Scheduler
from stepjax.infer.engine.sequence import FinishReason, Row, Sequence, StepOutput, StepPlan
from stepjax.infer.engine.stats import FinishedStep, Stats, StepTimer
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.steps.state import Emitted
from stepjax.model.step3p5 import Params
from stepjax.sharding.watchdog import deadline

if TYPE_CHECKING:
    from stepjax.infer.session import Session

STEP_S = 300.0  # time limit of a compiled step on several hosts


class Update(NamedTuple):
    """What a step added to one answer."""

    id: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None = None
    scores: tuple[TokenScore, ...] = ()  # of the tokens, if the request asks for them
    prompt_scores: tuple[TokenScore, ...] = ()  # of the prompt from its second token on; with the first update
    num_cached: int = 0  # prompt tokens found in the prefix cache
    fault: str = ""  # why the answer ended in an error, unless its logits were not finite
    experts: np.ndarray | None = None  # uint16 [prompt and answer, MoE layers, A], in the last update, with `routing`


class Engine:
    """Runs requests on one model. Not thread-safe: one thread calls `add`, `step`, `finish` and `cancel`.

    Example:
      >>> import stepjax
      >>> model = stepjax.load("step-tiny")
      >>> engine = stepjax.Engine(model, stepjax.EngineConfig(num_slots=2, context=256, widths=(64,)))
      >>> prompt = model.encode_chat([{"role": "user", "content": "What is 467 + 358?"}])
      >>> engine.add(prompt, model.sampling(temperature=0.0, max_tokens=64), id="sum")
      ['sum']
      >>> [update.finish_reason for update in engine.run()][-1]
      'stop'
    """

    def __init__(self, session: Session, config: EngineConfig | None = None, *, channels: Tokens[Channel] = ()):
        """
        Args:
          channels: to the other processes of a cluster, which `follow` this one; see `stepjax.infer.engine.followers`.

        Raises:
          ConfigError: the configuration contradicts itself, or the cache has no room for a single page.
          RequestError: more drafts than the checkpoint has MTP layers.
        """
        self.config = config = config or EngineConfig()
        self.stats = Stats()
        self.executor = config.executor(session)
        self._runner = self.executor.runner
        # Tells the processes that follow this one what to do; None if there are none.
        self.leader = Leader(self.executor, channels) if channels else None
        drafts = self._runner.drafts
        self._policy = DraftPolicy(StepBytes.of(session.config, session.table), most=drafts)
        fixed = config.speculate if config.speculate is not None else drafts if config.deterministic else None
        self._fixed_drafts = fixed
        self.scheduler = Scheduler(config.scheduler(self.executor), drafts=self._drafts)
        limits = self.scheduler.piece_limits
        rows = {width: self.executor.row_buckets_for(limit) for width, limit in limits.items()}
        most = CPU_PROGRAMS if jax.default_backend() == "cpu" else None
        self._slot_buckets = config.slot_buckets(self.executor.size)
        self.programs = ReadyPrograms(self.executor.prepare_shape, self._slot_buckets, rows, most=most)
        self._session = session
        self._adapters = AdapterNames(config.adapter_slots)
        self._in_flight: deque[_Launched] = deque()
        self._owners: dict[int, str] = {}  # slot → the sequence whose sampling it has
        self._answers: dict[str, Answer] = {}
        self._numbers = itertools.count()
        self._timer = StepTimer(self.stats)
        self._guidance = Guidance()
        self._failed: list[Update] = []
        self.on_step: Callable[[FinishedStep], None] | None = None  # called with every step that has been read

    def add(
        self,
        prompt: Tokens[int],
        params: SamplingParams | None = None,
        *,
        id: str | None = None,
        priority: int = 0,
        adapter: str | AdapterPin = "",
        salt: str = "",
        constraint: Constraint | None = None,
    ) -> list[str]:
        """Queue a request; returns the ids of its answers, one unless ``params.n`` asks for more.

        Args:
          params: ``max_tokens`` is cut to the room that the context leaves. None: the checkpoint's defaults.
          id: of the request. If there are several answers, answer i has the id ``id/i``.
          priority: requests with a lower number go first.
          adapter: name of a loaded adapter (`load_adapter`); "" is the model alone. The answer keeps the version that
            is loaded now. Or a pin (`pin_adapter`), for the version that was loaded when it was made.
          salt: requests share cached prompts only if salt and adapter are the same.
          constraint: a limit on the thinking, and a grammar for the text after it. With one, ``min_tokens`` counts the
            tokens after the thinking.

        Raises:
          RequestError: a bad prompt, bad parameters, or more than the cache can ever hold.
          QueueFullError: too many wait.
        """
        id = id if id is not None else f"request-{next(self._numbers)}"
        params = self.fit(prompt, params)
        prompt = tuple(map(int, prompt))
        version = adapter.key if isinstance(adapter, AdapterPin) else self._adapters.key(adapter)
        guided = params.replace(min_tokens=0) if constraint is not None else params  # the guide holds to it
        answers = split_request(id, guided)
        ids = [answer_id for answer_id, _ in answers]
        for index, (answer_id, answer_params) in enumerate(answers):
            sequence = Sequence(
                answer_id,
                prompt,
                answer_params,
                priority,
                version,
                salt,
                use_prefix=answer_params.prompt_logprobs is None,
            )
            try:
                guide = None if constraint is None else constraint.guide()
                if guide is not None and params.min_tokens:
                    guide.require(params.min_tokens, ends=params.ends(self._session.config.eos_ids))
                self.scheduler.add(sequence)
            except Exception:
                for earlier in ids[:index]:  # all answers of a request or none
                    self.cancel(earlier)
                raise
            answer = Answer(sequence, frozenset(answer_params.ends(self._session.config.eos_ids)))
            self._answers[answer_id] = answer
            if guide is not None:
                self._guidance.begin(answer, guide)
        return ids

    def fit(self, prompt: Tokens[int], params: SamplingParams | None = None) -> SamplingParams:
        """The parameters as `add` uses them: checked, and cut to the room that the context leaves. Thread-safe.

        Raises:
          ContextError: the prompt leaves no room to answer, in the context or in the pages of the cache.
          RequestError: a bad prompt or bad parameters.
        """
        session, config = self._session, self.scheduler.config
        params = params or session.sampling()
        context = min(config.context, config.capacity)
        room = min(session.check_prompt(prompt), context - len(prompt))
        if room < 1:
            raise ContextError(
                f"prompt: has {len(prompt)} tokens, but the engine's context is {context}; shorten the prompt or give "
                "the engine a larger context, or more pages",
                num_tokens=len(prompt),
                context=context,
            )
        params = params.replace(max_tokens=min(params.max_tokens, room), min_tokens=min(params.min_tokens, room))
        params.check(self._runner.num_tokens, eos_ids=session.config.eos_ids)
        config.check(len(prompt), params.max_tokens)
        return params

    def finish(self, id: str, reason: FinishReason = "stop") -> np.ndarray | None:
        """End an answer, for example at a stop string in its text. It gets no more updates. Returns its experts."""
        answer = self._answers.get(id)
        self.scheduler.finish(id, reason)
        self._forget(id)
        return None if answer is None else answer.experts.first(answer.sequence.num_tokens)

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that new requests may use. Thread-safe."""
        return self._adapters.names

    def pin_adapter(self, name: str) -> AdapterPin:
        """The version of an adapter that is loaded now, for a later `add`: it stays as long as the pin exists, even if
        the adapter is unloaded or replaced. Thread-safe.

        Raises:
          RequestError: no adapter has that name.
        """
        return self._adapters.pin(name)

    def load_adapter(
        self,
        name: str,
        adapter: Mapping[str, Any] | Path | str,
        lora: LoraConfig | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Load an adapter under a name. Running answers keep the version that they began with.

        Args:
          adapter: a PEFT folder, or factors by name with their settings ``lora``. Of several processes only this one
            reads it.
          replace: replace a loaded adapter of that name.

        Raises:
          RequestError: no slot is free, the name is in use, or the rank is too large.
          CheckpointError, ConfigError: the folder is damaged, or of another model.
        """
        stack = self.executor.adapters
        if stack is None:
            raise RequestError("adapter: this engine has no room for any; give it adapter_slots")
        if isinstance(adapter, str | Path):
            adapter, lora = import_adapter(adapter, self._session.config)
        if lora is None:
            raise RequestError("adapter: factors are given, expected their LoraConfig with them")
        stack.check(adapter)
        in_use = {answer.sequence.adapter for answer in self._answers.values()}
        slot = self._adapters.reserve(name, in_use, replace=replace)
        (self.leader or self.executor).load_adapter(slot, adapter, lora)
        self._adapters.enter(name, slot)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter. Its slot becomes free when the answers that use it have ended.

        Raises:
          RequestError: no adapter has that name.
        """
        self._adapters.remove(name)

    def cancel(self, id: str) -> None:
        self.finish(id, "cancelled")

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight or self._answers or self._failed)

    def step(self) -> list[Update]:
        """Launch a step and read the one before it."""
        with self._timer.host():
            plan = self._plan()
            newest = self._in_flight[-1].emitted.token_BT if self._in_flight else None
            # The stub of jax.Array does not list the method.
            device_idle = newest is not None and newest.is_ready()  # pyright: ignore[reportAttributeAccessIssue]
            if plan is not None:
                self.stats.num_idle += device_idle
                self._launch(plan)
        if not self._in_flight or (plan is not None and len(self._in_flight) == 1):
            return self._take_failed()
        launched = self._in_flight.popleft()
        emitted = self._read(launched)
        with self._timer.host():
            if self.on_step:
                self.on_step(FinishedStep(launched.order, self._timer.last_step_s, device_idle))
            return [*self._commit(launched.order, emitted, launched.answers), *self._take_failed()]

    def run(self) -> Iterator[Update]:
        """Run steps until all requests have ended."""
        while self.has_work:
            yield from self.step()

    def restart(self, params: Params) -> None:
        """Continue with another table of parameters of the same shapes, like a new engine: all cached pages are
        forgotten.

        The parameters are not copied. No request may be running.
        """
        assert not self.has_work, "finish or cancel what runs first"
        assert self.leader is None, "the processes that follow have parameters of their own"
        self.executor.params = params
        self.scheduler = Scheduler(self.config.scheduler(self.executor), drafts=self._drafts)
        self._policy = DraftPolicy(StepBytes.of(self._session.config, params), most=self._runner.drafts)
        self._owners.clear()
        self.executor.forget()

    def warm(self, *, progress: Progress | None = None) -> None:
        """Compile every step that these settings can ask for, so that none is compiled while requests wait.

        Args:
          progress: called with the numbers of programs done and in all.
        """
        drafts = DRAFTS if self._fixed_drafts is None else (self._fixed_drafts,)
        decode = [(slots, k) for slots in self._slot_buckets for k in drafts if k <= self._runner.drafts]
        limits = self.scheduler.piece_limits
        prefill = [(rows, width) for width in limits for rows in self.executor.row_buckets_for(limits[width])]
        (self.leader or self.executor).warm(decode, prefill, progress=progress)

    def start(self, *, progress: Progress | None = None) -> None:
        """Compile what is needed to answer; a thread compiles the rest once steps want it.

        A deterministic engine, and one of several processes, compiles everything first: its programs do not change.

        Args:
          progress: called with the numbers of programs done and in all.
        """
        if self.leader or self.config.deterministic:
            self.warm(progress=progress)
            return
        shapes = self.programs.first(self._drafts(1))
        decode, prefill = ([(*shape[1:],) for shape in shapes if shape.kind == kind] for kind in ("decode", "prefill"))
        self.executor.warm(decode, prefill, progress=progress)
        self.programs.open(shapes)

    def close(self) -> None:
        """Compile nothing more, end the threads, and let the processes go that follow this one."""
        self.programs.close()
        self._guidance.close()
        self.executor.close()
        if self.leader:
            self.leader.close()

    def _drafts(self, batch: int) -> int:
        return self.programs.drafts(self._policy.drafts(batch) if self._fixed_drafts is None else self._fixed_drafts)

    def _plan(self) -> StepPlan | None:
        """The next step, if there is one. If all answers wait for their masks, it waits for the first mask."""
        self._guidance.release()
        self.scheduler.most_rows = self.programs.most_rows(self.scheduler.piece_limits)
        plan = self.scheduler.plan()
        if plan is None and not self._in_flight and self._guidance.num_pending:
            self._guidance.wait()
            plan = self.scheduler.plan()
        return plan

    def _launch(self, plan: StepPlan) -> None:
        order, compiled_before = self._order(plan), self.executor.waited_s
        emitted = (self.leader or self.executor).run(order)
        self._timer.launched(self.executor.waited_s - compiled_before, alone=not self._in_flight)
        answers = tuple(self._answers.get(row.id) for row in plan.rows)
        self._in_flight.append(_Launched(order, emitted, answers))

    def _read(self, launched: _Launched) -> Any:
        """What the step emitted, as numpy arrays."""
        with self._timer.device(launched.order), deadline("a step", STEP_S):
            return jax.tree.map(np.asarray, launched.emitted)

    def _order(self, plan: StepPlan) -> Order:
        for slot in plan.resets:
            self._owners.pop(slot, None)
        self._guidance.reset(plan.resets)
        assignments, masks = [], []
        rows = [(row, self._answers.get(row.id)) for row in plan.rows]
        for row, answer in rows:
            if answer is not None and self._owners.get(row.slot) != row.id:
                self._owners[row.slot] = row.id
                sequence = answer.sequence
                adapter = self._adapters.slot(sequence.adapter)
                assignments.append(
                    Assignment(row.slot, sequence.params, sequence.prompt, tuple(sequence.output), adapter)
                )
            if answer is not None and (mask := self._mask(row, answer, plan)) is not None:
                masks.append(mask)
        wanted = [answer.sequence.params for _, answer in rows if answer is not None]
        num_slots, num_rows, size, slots = 0, 0, self.executor.size, [row.slot for row in plan.rows]
        if plan.kind == "decode":
            num_slots = self.programs.slots(1 + max(slot % size.num_slots for slot in slots), plan.drafts)
        else:
            num_rows = self.programs.rows(size.fullest(slots), plan.width)
            waiting = [run for run in self.scheduler.admission.running if not run.prefilled]
            left = [plan.rows[0].count, *(len(run.tokens) - run.position for run in waiting)]
            prompts = size.fullest([*slots, *(run.slot for run in waiting)])
            self.programs.want_prefill(prompts, max(left), self.scheduler.piece_limits)
        return Order(
            plan,
            tuple(assignments),
            num_slots=num_slots,
            num_rows=num_rows,
            scores=any(params.logprobs is not None for params in wanted),
            drafts=any(answer is not None and answer.guide is not None for _, answer in rows),
            masks=tuple(masks),
            prompt_scores=plan.kind == "prefill" and any(params.prompt_logprobs is not None for params in wanted),
        )

    def _commit(self, order: Order, emitted: Any, launched: Tokens[Answer | None]) -> list[Update]:
        """Process a step's tokens: end the answers that they complete, and commit them to the scheduler.

        Args:
          launched: the answers of the rows. An answer may have ended since, and another may have its id.
        """
        plan = order.plan
        answers = [
            answer if self._answers.get(row.id) is answer else None
            for row, answer in zip(plan.rows, launched, strict=True)
        ]
        places = self.executor.size.places(plan, order.num_slots or order.num_rows)
        count_B, token_BT, finite_B = (x.tolist() for x in (emitted.count_B, emitted.token_BT, emitted.finite_B))
        counts = [count_B[place] for place in places]
        self.stats.count(plan, counts)
        if plan.kind == "decode":
            self._policy.observe(plan.drafts, counts)
        taken: list[tuple[Row, int, tuple[int, ...], FinishReason | None]] = []
        for row, answer, place in zip(plan.rows, answers, places, strict=True):
            tokens: tuple[int, ...] = ()
            reason: FinishReason | None = None
            if answer is not None:
                if order.prompt_scores and answer.sequence.params.prompt_logprobs is not None:
                    answer.take_prompt(row, jax.tree.map(lambda x, p=place: x[p], emitted.prompt))
                try:
                    finite = finite_B[place]
                    tokens, ended = answer.cut(token_BT[place][: count_B[place]]) if finite else ((), False)
                    reason = ("stop" if ended else None) if finite else "error"
                except Exception as error:  # of its guide: it ends this request, never the engine
                    reason, answer.fault = "error", fault_of(error)
                if emitted.expert_BTLA is not None:
                    answer.take_experts(row, plan, emitted.expert_BTLA[place], len(tokens))
                if reason == "error":
                    self.scheduler.finish(row.id, reason)
                elif tokens and reason is None and answer.guide is not None:
                    self._guidance.look_ahead(answer, emitted.draft_BK[place].tolist())
            taken.append((row, place, tokens, reason))
        output = StepOutput(tuple(tokens for _, _, tokens, _ in taken))
        done = {sequence.id for sequence in self.scheduler.commit(plan, output)}
        updates = []
        for (row, place, tokens, reason), answer in zip(taken, answers, strict=True):
            if answer is None or not (tokens or reason):
                continue
            if reason == "stop":
                self.scheduler.finish(row.id, reason)
            elif reason is None and row.id in done:
                reason = "length"
            scores = answer.scores(emitted.scores, place, len(tokens)) if order.scores else ()
            cached = answer.sequence.num_cached
            experts = answer.experts.first(answer.sequence.num_tokens) if reason else None
            updates.append(Update(row.id, tokens, reason, scores, answer.give_prompt(), cached, answer.fault, experts))
            if reason:
                self._forget(row.id)
        return updates

    def _forget(self, id: str) -> None:
        """Forget an answer that has ended, if it has not been forgotten yet."""
        answer = self._answers.pop(id, None)
        if answer is not None:
            self._guidance.drop(answer)

    def _mask(self, row: Row, answer: Answer, plan: StepPlan) -> Mask | None:
        try:
            return self._guidance.mask(row, answer, plan)
        except Exception as error:  # it ends this request, never the engine
            self._fail(answer, fault_of(error))
            return None

    def _fail(self, answer: Answer, fault: str) -> None:
        """End an answer that cannot continue; its tokens in flight are dropped."""
        id = answer.sequence.id
        self.finish(id, "error")
        self._failed.append(Update(id, (), "error", fault=fault))

    def _take_failed(self) -> list[Update]:
        failed, self._failed = self._failed, []
        return failed


def open_engine(
    session: Session, config: EngineConfig, *, host: str, others: OrderHandlers | None = None, kind: Any = Engine
) -> Engine | None:
    """Run an engine on all processes of a cluster. Process 0 returns it; the others carry out its orders until it is
    closed, and return None.

    Args:
      host: address of process 0.
      others: for orders that are not the engine's, on the processes that follow.
      kind: class of the engine.

    Raises:
      ClusterError: a process does not connect, has different settings, or is lost.
    """
    channels = connect(host, f"{config} of {session.config} in {jnp.dtype(session.dtype)}")
    if jax.process_index() == 0:
        return kind(session, config, channels=channels)
    follow(config.executor(session), channels[0], others)
    return None


class _Launched(NamedTuple):
    """A step on the device."""

    order: Order
    emitted: Emitted
    answers: tuple[Answer | None, ...]  # of its rows
