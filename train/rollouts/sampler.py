"""Answers of the current policy, from an engine in this process that runs the weights that are trained.

A batch of rollouts depends on the weights, the prompts and the seeds only, since the engine restarts with each batch.
So a resumed run samples the same tokens as an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from stepjax.errors import ConfigError, TrainingError
from stepjax.infer.engine.answer import ExpertRecord
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.ready_programs import ProgramShape
from stepjax.infer.engine.stats import Stats
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.infer.transcript import AnswerStream, Transcript, begins_in_reasoning
from stepjax.memory import check_room
from stepjax.model.step3p5 import Params
from stepjax.stored_function import StoredFunction
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.tasks import ChatMessage
from stepjax.train.data.turns import reply_ids
from stepjax.train.environments.episode import Environment, Turn
from stepjax.train.rollouts.grading import Dialogue, Grade, begin_grade, environment_name, finished_grades
from stepjax.train.workers.code import CodeEpisode, results_of, runs_alone
from stepjax.train.workers.plugin import UserCodeError
from stepjax.weights.inventory import kv_bytes_per_token, kv_window_bytes

PAGE = 64  # tokens
WIDTHS = (64, 512)  # of prefill pieces


@dataclass
class Rollout:
    """One episode: the prompt, and every token after it."""

    prompt: Prompt
    group: int  # answers to the same prompt share it
    policy_step: int  # number of updates before the policy wrote it; −1 if it did not
    ids: list[int] = field(default_factory=list)  # after the prompt
    answer_mask: list[bool] = field(default_factory=list)  # True: of the answer, False: of the environment's replies
    logprobs: list[float] = field(default_factory=list)  # of the sampler; 0 for tokens that it did not sample
    text: str = ""
    turns: int = 0
    truncated: bool = False
    reward: float = 0.0  # NaN if it failed, and for a completion of the data
    parts: Mapping[str, float] = field(default_factory=dict)  # of the reward, by name
    failure: str = ""  # why there is no reward
    writer: Literal["student", "teacher", "data"] = "student"
    experts: np.ndarray | None = None  # uint16 [prompt and answer, MoE layers, A]: the sampler's, for router replay

    @property
    def num_answer_tokens(self) -> int:
        return sum(self.answer_mask)


@dataclass
class _Episode:
    """A rollout that is not finished."""

    rollout: Rollout
    environment: Environment | CodeEpisode
    conversation: Dialogue = field(default_factory=Dialogue)
    stream: AnswerStream | None = None  # of the current turn
    grade: Grade | None = None  # once it is over
    routing: ExpertRecord = field(default_factory=ExpertRecord)


class Sampler:
    """Runs episodes on one engine."""

    def __init__(
        self,
        session: Session,
        *,
        slots: int,
        context: int,
        max_tokens: int,
        turns: int = 1,
        speculate: int = 0,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        routing: bool = False,
    ):
        """
        Args:
          slots: answers that are written at the same time.
          context: tokens of the longest episode, prompt included.
          max_tokens: of an episode without its prompt, all turns and the environment's replies together.
          turns: most turns of the model in an episode.
          speculate: MTP drafts per step.
          routing: keep the experts of every token (`Rollout.experts`).
        """
        if session.tokenizer is None:
            raise ConfigError("rollout: the checkpoint has no tokenizer.json, which episodes need")
        self._session, self._turns, self._max_tokens = session, turns, max_tokens
        self._params = SamplingParams(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=0, logprobs=0
        )
        self._batch_params = self._params
        context = min(context, session.config.max_positions)
        shards = session.model.layout.together().num_shards
        slots = -(-slots // shards) * shards  # each shard has as many, and their pages
        _check_room(session, slots, context)
        # Deterministic: an answer's log-probabilities are the same bits whatever else is in the batch, and all batches
        # use one decode program.
        config = EngineConfig(
            num_slots=slots,
            context=context,
            num_pages=slots * -(-context // PAGE),
            page_size=PAGE,
            speculate=min(speculate, session.max_drafts),
            widths=tuple(width for width in WIDTHS if width < context) or (context,),
            max_waiting=1 << 20,
            deterministic=True,
            routing=routing,
        )
        self._engine = Engine(session, config)
        self._replies: dict[str, Future] = {}  # of environments that are not known yet, by episode

    @property
    def stats(self) -> Stats:
        """Sums over all batches up to now: drafts, accepted drafts, seconds, tokens."""
        return self._engine.stats

    @property
    def calls(self) -> list[tuple[StoredFunction, tuple[Any, ...]]]:
        """The programs that batches use with their arguments, so that they can be compiled ahead."""
        config, limits = self._engine.config, self._engine.scheduler.piece_limits
        decode = ProgramShape("decode", self._engine.executor.size.num_slots, config.speculate or 0)
        prefill = [ProgramShape("prefill", limits[width], width) for width in limits]
        return self._engine.executor.calls([decode, *prefill])

    def run(
        self,
        params: Params,
        prompts: Sequence[Prompt],
        *,
        samples: int,
        seed: int,
        policy_step: int,
        greedy: bool = False,
    ) -> list[Rollout]:
        """``samples`` answers to each prompt, in the order of the prompts. The parameters are not copied.

        Args:
          seed: of the batch; each answer has random numbers of its own.
          policy_step: number of updates before this batch, or −1 (`Rollout.policy_step`).
          greedy: take the likeliest tokens, as evaluation does.

        Raises:
          TrainingError: the logits of an answer are not finite.
        """
        self._engine.restart(params)
        self._batch_params = self._params.replace(temperature=0.0) if greedy else self._params
        episodes: dict[str, _Episode] = {}
        for group, prompt in enumerate(prompts):
            for sample in range(samples):
                rollout = Rollout(prompt, group, policy_step)
                episode = _Episode(rollout, prompt.new_environment())
                episodes[str(group * samples + sample)] = episode
        self._replies.clear()
        for name, episode in episodes.items():
            self._request_turn(name, episode, seed=_seed(seed, int(name), 0))
        while self._engine.has_work or self._replies:
            self._take_replies(episodes, seed)
            for update in self._engine.step() if self._engine.has_work else ():
                episode = episodes[update.id]
                if update.finish_reason == "error":
                    raise TrainingError(
                        f"rollout {update.id} after {policy_step} updates: the logits are not finite; lower optim.lr"
                    )
                rollout, stream = episode.rollout, episode.stream
                assert stream is not None
                added = stream.take(update)
                rollout.ids += added.ids
                rollout.answer_mask += [True] * len(added.ids)
                rollout.logprobs += [score.logprob for score in added.scores]
                if added.finish_reason:
                    if stream.experts is not None:
                        episode.routing.take(0, stream.experts)
                    self._end_turn(update.id, episode, seed)
        rewards = finished_grades([episode.grade for episode in episodes.values() if episode.grade])
        for episode, reward in zip(episodes.values(), rewards, strict=True):
            rollout = episode.rollout
            rollout.reward, rollout.parts, rollout.failure = reward.total, reward.parts, reward.failure
            rollout.experts = episode.routing.first(len(rollout.prompt.ids) + len(rollout.ids))
        return [episode.rollout for episode in episodes.values()]

    def _request_turn(self, name: str, episode: _Episode, *, seed: int) -> None:
        """Request the next turn from the engine. Without room for a token, the rollout is truncated instead."""
        session, rollout = self._session, episode.rollout
        prompt = [*rollout.prompt.ids, *rollout.ids]
        room = self._max_tokens - len(rollout.ids)
        context = self._engine.scheduler.config.context - len(prompt)
        if min(room, context) < 1:
            rollout.truncated = True
            self._end(episode)
            return
        params = self._batch_params.replace(max_tokens=min(room, context), seed=seed)
        tokenizer = session.tokenizer
        assert tokenizer is not None
        episode.stream = AnswerStream(
            Transcript(
                params,
                eos_ids=session.config.eos_ids,
                tokenizer=tokenizer,
                in_reasoning=begins_in_reasoning(prompt, tokenizer),
                tools=rollout.prompt.tools,
            )
        )
        rollout.turns += 1
        # Cached prefixes of an earlier policy must not be reused, so the salt has the policy's step.
        self._engine.add(prompt, params, id=name, salt=str(rollout.policy_step))

    def _end_turn(self, name: str, episode: _Episode, seed: int) -> None:
        """Give the turn to the environment, and request the next turn if it replies."""
        assert episode.stream is not None
        rollout, transcript = episode.rollout, episode.stream.transcript
        finished = transcript.finish_reason in ("stop", "tool_calls")
        rollout.text += transcript.text
        calls = tuple({"name": call.name, "arguments": _arguments(call.arguments)} for call in transcript.calls)
        turn = Turn(transcript.reasoning, transcript.content, calls, finished)
        message: ChatMessage = {"role": "assistant", "reasoning_content": turn.reasoning, "content": turn.content}
        if calls:
            message["tool_calls"] = [
                {"id": f"call_{number}", "type": "function", "function": call} for number, call in enumerate(calls)
            ]
        episode.conversation.turns.append(turn)
        episode.conversation.messages.append(message)
        replies = episode.environment.respond(turn)
        if isinstance(replies, Future):
            self._replies[name] = replies
        else:
            self._go_on(name, episode, replies, seed)

    def _take_replies(self, episodes: Mapping[str, _Episode], seed: int) -> None:
        """Go on with the episodes whose environments have replied. Wait for one if the engine has nothing else to do.

        On several hosts all replies are waited for, since which came first is not the same on all.
        """
        if not self._replies:
            return
        if runs_alone():
            done, _ = wait(self._replies.values(), None if not self._engine.has_work else 0.0, FIRST_COMPLETED)
            names = [name for name, future in self._replies.items() if future in done]
        else:
            names = list(self._replies)
        replies = results_of([self._replies.pop(name) for name in names])
        for name, reply in zip(names, replies, strict=True):
            self._go_on(name, episodes[name], reply, seed)

    def _go_on(self, name: str, episode: _Episode, replies: Sequence[ChatMessage] | UserCodeError, seed: int) -> None:
        """Give the replies to the model as its next prompt, or end the episode."""
        rollout = episode.rollout
        if isinstance(replies, UserCodeError):
            self._end(episode, failure=f"{environment_name(rollout.prompt)} failed: {replies}")
            return
        if not episode.conversation.turns[-1].finished:
            rollout.truncated = True
            self._end(episode)
            return
        if not replies or rollout.turns == self._turns:
            self._end(episode)
            return
        before = [*rollout.prompt.messages, *episode.conversation.messages]
        ids = reply_ids(self._session, before, replies, tools=rollout.prompt.tools)
        episode.conversation.messages += replies
        rollout.ids += ids
        rollout.answer_mask += [False] * len(ids)
        rollout.logprobs += [0.0] * len(ids)
        assert self._session.tokenizer is not None
        rollout.text += self._session.tokenizer.decode(ids, skip_special=False)
        self._request_turn(name, episode, seed=_seed(seed, int(name), rollout.turns))

    def _end(self, episode: _Episode, *, failure: str = "") -> None:
        """Ask for the reward, which is computed while the engine goes on with other episodes."""
        rollout = episode.rollout
        answer = episode.conversation.answer(raw=rollout.text, ids=rollout.ids)
        episode.grade = begin_grade(rollout.prompt, episode.environment, answer, self._session, failure=failure)


def _check_room(session: Session, slots: int, context: int) -> None:
    """ConfigError: the caches of all slots, split over the devices, need more memory than is free."""
    model, element_bytes = session.config, jnp.dtype(session.dtype).itemsize
    one = kv_bytes_per_token(model, element_bytes=element_bytes) * context
    one += kv_window_bytes(model, element_bytes=element_bytes, mtp=False)
    mesh = session.model.layout.replicated
    devices = len(mesh.addressable_devices) if mesh else 1
    what = f"rollout.slots: the cache of {slots:,} answers of {context:,} tokens"
    needed = slots * one // (len(mesh.device_set) if mesh else 1)
    check_room(needed, devices=devices, what=what, advice="lower rollout.slots, rollout.context or optim.length")


def _seed(batch: int, number: int, turn: int) -> int:
    """A 32-bit seed of one turn, from those of its batch, answer and turn."""
    mixed = (batch * 0x9E3779B1 + number * 0x85EBCA77 + turn * 0xC2B2AE3D) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)) * 0x2C1B3C6D & 0xFFFFFFFF


def _arguments(text: str) -> dict[str, Any]:
    """The arguments of a call. Text that is no JSON object becomes an object that no grader accepts."""
    try:
        arguments = json.loads(text or "{}")
    except ValueError:
        return {"": text}
    return arguments if isinstance(arguments, dict) else {"": arguments}


def data_rollouts(prompt: Prompt, *, group: int) -> list[Rollout]:
    """What the data has written, a rollout for each sequence that trains the row. ConfigError: there is none."""
    if not prompt.trained:
        raise ConfigError(
            f"{prompt.where or f'data.{prompt.source}, row {prompt.index}'}: has no completion to learn from; add the "
            "assistant's turn, or let the student or a teacher write it (rollout.source)"
        )
    rollouts = []
    for part, sequence in enumerate(prompt.trained):
        start = replace(prompt, ids=sequence.prompt, part=part)
        logprobs = [0.0] * len(sequence.ids)
        ids, mask = list(sequence.ids), list(sequence.mask)
        rollouts.append(Rollout(start, group, -1, ids, mask, logprobs, reward=math.nan, writer="data"))
    return rollouts
