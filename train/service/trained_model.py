"""One model that a client trains: an adapter of the base, its gradients, and the state of its optimiser."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.session import Session
from stepjax.train.losses.target_losses import TARGET_LOSSES
from stepjax.train.service.checks import CheckedCall, CheckedLoss
from stepjax.train.service.device import DeviceTurns
from stepjax.train.service.micro_batches import Datum, MicroBatch, pack_call
from stepjax.train.service.programs import AdamNumbers, Moments, PassScores, Programs
from stepjax.train.service.state_files import HostState
from stepjax.train.service.wire.results import pass_to_protobuf
from stepjax.train.tune.update import Leaves

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterOnDevice:
    """An adapter that is read only: a teacher, or the weights of a sampler."""

    config: LoraConfig
    leaves: Leaves


class TrainedModel:
    """The state of a model on the devices. Its methods run one at a time, in the order of the client's calls."""

    def __init__(self, session: Session, config: LoraConfig, programs: Programs, device: DeviceTurns):
        self.config = config
        self._session, self._programs, self._device = session, programs, device
        self._leaves: Leaves = {}
        self._moments: Moments | None = None
        self._gradients: Leaves | None = None
        self._num_tokens = 0

    def create(self, seed: int) -> None:
        """Fresh factors, as `stepjax sft` with the same seed and settings has them."""
        leaves = lora.init(self._session.config, self.config, jax.random.key(seed))
        self.place(HostState({name: np.asarray(leaf) for name, leaf in leaves.items()}, {}, {}))

    def place(self, state: HostState) -> None:
        """Put a state onto the devices."""
        programs, config = self._programs, self.config
        self._leaves = programs.leaves(config, state.leaves)
        first, second = (
            programs.leaves(config, part) if part else programs.zeros(config) for part in (state.first, state.second)
        )
        self._moments = Moments(programs.count(state.count), first, second)
        self._gradients = None if state.gradients is None else programs.leaves(config, state.gradients)
        self._num_tokens = state.num_tokens

    def host(self) -> HostState:
        """A copy of the state. It waits for the devices, so call it in a thread."""
        assert self._moments is not None

        def copied(leaves: Leaves) -> dict[str, np.ndarray]:
            return {name: np.array(leaf) for name, leaf in leaves.items()}

        return HostState(
            copied(self._leaves),
            copied(self._moments.first),
            copied(self._moments.second),
            int(self._moments.count),
            None if self._gradients is None else copied(self._gradients),
            self._num_tokens,
        )

    async def run(self, call: CheckedCall, teacher: AdapterOnDevice | None = None) -> tuple[bytes, float]:
        """A forward call, or a forward_backward call, whose gradients are added to those of earlier calls.

        Args:
          teacher: of a loss that has one; None: the base.

        Returns: the result in the client's form, and the loss.
        """
        packed = await asyncio.to_thread(pack_call, call.data)
        scored: list[PassScores] = []
        try:
            for micro in packed.micros:
                scored.append(await self._score(micro, call.loss, teacher, forward_only=call.forward_only))
        except Exception:
            if not call.forward_only:  # it is not known what of this call was added
                self._gradients, self._num_tokens = None, 0
                log.warning("a pass failed on its way; the gradients since the last step are dropped")
            raise
        if not call.forward_only:
            self._num_tokens += call.num_tokens
        loss = sum(float(part.loss) for part in scored)
        return await asyncio.to_thread(_result, call, packed, scored), loss

    async def step(self, numbers: AdamNumbers) -> dict[str, float]:
        """One step of AdamW with the gradients since the last one, which are gone afterwards. Returns metrics.

        Raises:
          ApiError: the gradient is not finite; the weights are as before.
        """
        gradients, tokens = self._gradients, self._num_tokens
        self._gradients, self._num_tokens = None, 0
        nothing = gradients is None
        gradients = self._programs.zeros(self.config) if gradients is None else gradients
        arguments = (self._leaves, self._moments, gradients, numbers)
        program = self._programs.step(self.config)
        self._leaves, self._moments, stepped = await self._device.launch(program, arguments)
        if not bool(stepped.finite):
            raise ApiError(
                f"optim_step: the gradient of {tokens} tokens is not finite; the weights are as before, the gradient "
                "is dropped. Lower the learning rate, or look for extreme advantages or log-probabilities",
                code="not_finite",
            )
        metrics = {"grad_norm": float(stepped.gradient_norm), "num_tokens": float(tokens)}
        return metrics | ({"no_gradient": 1.0} if nothing else {})

    async def _score(
        self, micro: MicroBatch, loss: CheckedLoss, teacher: AdapterOnDevice | None, *, forward_only: bool
    ) -> PassScores:
        programs, base = self._programs, self._session.params
        if loss.taught is None:
            numbers = np.asarray(loss.numbers, np.float32)
            rest = (micro, np.int32(loss.index), numbers)
            program = (programs.scores if forward_only else programs.gradients)(self.config)
        else:
            settings = (self.config, None if teacher is None else teacher.config, loss.taught)
            rest = (micro, None if teacher is None else teacher.leaves)
            program = (programs.taught_scores if forward_only else programs.taught)(*settings)
        if forward_only:
            return await self._device.launch(program, (self._leaves, base, *rest))
        gradients = programs.zeros(self.config) if self._gradients is None else self._gradients
        self._gradients = None  # they are donated
        self._gradients, scored = await self._device.launch(program, (gradients, self._leaves, base, *rest))
        return scored


def _result(call: CheckedCall, packed: Any, scored: Sequence[PassScores]) -> bytes:
    """Log-probabilities of each datum, in order, and the sums."""
    logprobs = [np.asarray(part.logprob_RTK) for part in scored]
    losses = [float(part.loss) for part in scored]
    metrics = {"loss:sum": float(np.sum(losses, dtype=np.float64)), "num_tokens:sum": float(call.num_tokens)}
    outputs: list[Mapping[str, np.ndarray]] = []
    distances = [np.asarray(part.divergence_RT) for part in scored]
    total = 0.0
    for index, datum in enumerate(call.data):
        values = packed.of_datum(logprobs, index, datum)[:, : datum.width]
        output = {"logprobs": values[:, 0] if datum.flat else values}
        if call.loss.taught is not None:
            output["kl"] = packed.of_datum(distances, index, datum)
            total += float(np.sum(output["kl"], dtype=np.float64))
        outputs.append(output)
    if call.loss.taught is not None:
        metrics["kl:sum"] = total
    return pass_to_protobuf(outputs, metrics)


async def target_scores(
    session: Session,
    programs: Programs,
    device: DeviceTurns,
    adapter: AdapterOnDevice | None,
    tokens: np.ndarray,
    targets: np.ndarray,
) -> np.ndarray:
    """Log-probabilities of given ids after each token, float32 [N, K].

    Args:
      adapter: None: of the base.
      tokens: int [N].
      targets: int [N, K].
    """
    if adapter is None:
        config = LoraConfig(rank=1, targets=("o",), experts=None)
        adapter = AdapterOnDevice(config, programs.zeros(config))  # it changes nothing
    count, zeros = len(tokens), np.zeros((len(tokens),), np.float32)
    datum = Datum(
        tokens.astype(np.int32),
        targets.astype(np.int32),
        np.zeros(targets.shape, np.float32),
        zeros,
        zeros,
        zeros,
        flat=False,
    )
    packed = await asyncio.to_thread(pack_call, [datum])
    numbers, index = np.zeros((3,), np.float32), np.int32(list(TARGET_LOSSES).index("cross_entropy"))
    program = programs.scores(adapter.config)
    arguments = (adapter.leaves, session.params, packed.micros[0], index, numbers)
    scored = await device.launch(program, arguments)
    return np.asarray(scored.logprob_RTK)[0, :count, : targets.shape[1]]
