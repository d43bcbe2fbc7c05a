"""One model that a client trains: an adapter of the base, its gradients, and the state of its optimiser."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.session import Session
from stepjax.infer.steps.state import NO_EXPERT
from stepjax.train.losses.target_losses import CONFIG_NAMES, TARGET_LOSSES
from stepjax.train.service.checks import CheckedCall, CheckedLoss
from stepjax.train.service.devices.micro_batches import MICRO_TOKENS, Datum, PackedCall, pack_call
from stepjax.train.service.devices.orders import ClearOrder, DropOrder, PassOrder, PlaceOrder, ReadOrder, StepOrder
from stepjax.train.service.devices.programs import AdamNumbers, PassScores
from stepjax.train.service.devices.turns import DeviceTurns
from stepjax.train.service.state_files import HostState
from stepjax.train.service.wire.results import pass_to_protobuf

log = logging.getLogger(__name__)

MERGED_TOKENS = MICRO_TOKENS  # of the calls of a step that are computed once more as one batch

_numbers = itertools.count()


class TrainedModel:
    """A model on the devices. Its methods run one at a time, in the order of the client's calls.

    Sums of float32 depend on their order, and the first step of Adam makes ±1 of gradients that are nothing but
    rounding. A step after several calls therefore computes the gradient once more, from all their data as one batch:
    it is that of one call with the same data, to the bit. Calls of more than `MERGED_TOKENS` tokens together, and those
    with a teacher, add their gradients instead, which agree to rounding.
    """

    def __init__(self, id: str, session: Session, config: LoraConfig, device: DeviceTurns):
        self.config = config
        self._name = f"{id} {next(_numbers)}"  # a model that comes back into memory is another one on the devices
        self._session, self._device = session, device
        self._num_tokens = 0
        self._has_gradients = False
        self._calls: dict[int, CheckedCall] | None = {}  # since the last step, by number; None: too many for a batch

    async def create(self, seed: int) -> None:
        """Fresh factors, as `stepjax sft` with the same seed and settings has them."""

        def leaves() -> dict[str, np.ndarray]:
            fresh = lora.init(self._session.config, self.config, jax.random.key(seed))
            return {name: np.asarray(leaf) for name, leaf in fresh.items()}

        await self.place(HostState(await asyncio.to_thread(leaves), {}, {}))

    async def place(self, state: HostState) -> None:
        """Put a state onto the devices."""
        await self._device.carry_out(PlaceOrder(self._name, self.config, state))
        self._num_tokens, self._has_gradients = state.num_tokens, state.gradients is not None
        self._calls = None if self._has_gradients else {}

    def keep(self, calls: Mapping[int, CheckedCall]) -> None:
        """Note which calls the gradients of a state that was placed are of, by their numbers."""
        self._calls = dict(calls)

    async def host(self) -> HostState:
        """A copy of the state."""
        state: HostState = await self._device.carry_out(ReadOrder(self._name))
        return dataclasses.replace(state, num_tokens=self._num_tokens, calls=tuple(self._calls or ()))

    async def drop(self) -> None:
        """Free the memory on the devices."""
        await self._device.carry_out(DropOrder(self._name))

    async def run(self, call: CheckedCall, teacher: str | None = None, *, seq: int = 0) -> tuple[bytes, float]:
        """A forward call, or a forward_backward call, whose gradients are added to those of earlier calls.

        Args:
          seq: number of the call.
          teacher: an adapter that the devices hold, of a loss that has one; None: the base.

        Returns: the result in the client's form, and the loss.
        """
        packed = await asyncio.to_thread(pack_call, call.data)
        try:
            scored = await self._passes(call, packed, teacher)
        except Exception:
            if not call.forward_only:  # it is not known what of this call was added
                await self._clear()
                log.warning("a pass failed on its way; the gradients since the last step are dropped")
            raise
        if not call.forward_only:
            self._num_tokens += call.num_tokens
            self._has_gradients = True
            if self._calls is not None:
                self._calls[seq] = call
                if self._num_tokens > MERGED_TOKENS or call.loss.taught is not None:
                    self._calls = None
        return await asyncio.to_thread(_result, call, packed, scored)

    async def _passes(self, call: CheckedCall, packed: PackedCall, teacher: str | None = None) -> list[PassScores]:
        loss, scored = call.loss, []
        for micro in packed.micros:
            order = PassOrder(self._name, micro, loss.index, loss.numbers, loss.taught, teacher, call.forward_only)
            scored.append(await self._device.carry_out(order))
        return scored

    async def step(self, numbers: AdamNumbers) -> dict[str, float]:
        """One step of AdamW with the gradients since the last one, which are gone afterwards. Returns metrics.

        Raises:
          ApiError: the gradient is not finite; the weights are as before.
        """
        tokens, nothing, calls = self._num_tokens, not self._has_gradients, self._calls or {}
        if len(calls) > 1:
            await self._merge(calls.values())
        self._num_tokens, self._has_gradients, self._calls = 0, False, {}
        stepped = await self._device.carry_out(StepOrder(self._name, numbers))
        if not bool(stepped.finite):
            raise ApiError(
                f"optim_step: the gradient of {tokens} tokens is not finite; the weights are as before, the gradient "
                "is dropped. Lower the learning rate, or look for extreme advantages or log-probabilities",
                code="not_finite",
            )
        metrics = {"grad_norm": float(stepped.gradient_norm), "num_tokens": float(tokens)}
        return metrics | ({"no_gradient": 1.0} if nothing else {})

    async def _merge(self, calls: Iterable[CheckedCall]) -> None:
        """The gradients of calls in place of those that were added up, the data of each loss as one batch."""
        by_loss: dict[CheckedLoss, list[Datum]] = {}
        for call in calls:
            by_loss.setdefault(call.loss, []).extend(call.data)
        try:
            await self._device.carry_out(ClearOrder(self._name))
            for loss, data in by_loss.items():
                packed = await asyncio.to_thread(pack_call, data)
                await self._passes(CheckedCall(data, loss, forward_only=False), packed)
        except Exception:
            await self._clear()
            log.warning("the gradients of a step could not be computed; they are dropped")
            raise

    async def _clear(self) -> None:
        self._num_tokens, self._has_gradients, self._calls = 0, False, {}
        with contextlib.suppress(Exception):  # the engine has failed: the next server begins from the snapshot
            await self._device.carry_out(ClearOrder(self._name))


def _result(call: CheckedCall, packed: PackedCall, scored: Sequence[PassScores]) -> tuple[bytes, float]:
    """Log-probabilities of each datum, in order, and the sums; and the loss."""
    logprobs = [np.asarray(part.logprob_RTK) for part in scored]
    losses = [float(part.loss) for part in scored]
    loss = float(np.sum(losses, dtype=np.float64))
    metrics = {"loss:sum": loss, "num_tokens:sum": float(call.num_tokens)}
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
    replayed = [datum.experts for datum in call.data if datum.experts is not None]
    if replayed:
        metrics["replayed:sum"] = float(sum((experts[:, 0, 0] != NO_EXPERT).sum() for experts in replayed))
    return pass_to_protobuf(outputs, metrics), loss


async def target_scores(device: DeviceTurns, adapter: str, tokens: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Log-probabilities of given ids after each token, float32 [N, K].

    Args:
      adapter: one that the devices hold.
      tokens: int [N].
      targets: int [N, K].
    """
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
    index = list(TARGET_LOSSES).index("cross_entropy")
    order = PassOrder(adapter, packed.micros[0], index, (0.0,) * len(CONFIG_NAMES), forward_only=True)
    scored = await device.carry_out(order)
    return np.asarray(scored.logprob_RTK)[0, :count, : targets.shape[1]]
