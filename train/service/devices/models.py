"""The models of clients on the devices of one process: their adapters, gradients and moments."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import numpy as np

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.engine.followers import OrderHandlers
from stepjax.infer.hosts import agreed
from stepjax.infer.session import Session
from stepjax.stored_function import StoredFunction
from stepjax.train.service.devices.orders import (
    ClearOrder,
    DropOrder,
    FingerprintOrder,
    HoldOrder,
    ModelOrder,
    PassOrder,
    PlaceOrder,
    ReadOrder,
    StepOrder,
    decode_order,
)
from stepjax.train.service.devices.programs import Moments, PassScores, Programs, Stepped
from stepjax.train.service.state_files import HostState
from stepjax.train.tune.fingerprint import fingerprint
from stepjax.train.tune.trainable import on_every_process
from stepjax.train.tune.update import Leaves

PREPARE, RUN = "prepare model", "model"  # kinds of orders between processes


@dataclass
class _DeviceModel:
    config: LoraConfig
    leaves: Leaves
    moments: Moments
    gradients: Leaves | None = None  # since the last step; None: nothing


class DeviceModels:
    """Carries out orders on this process's devices. Every process has the same models, and gets the same orders."""

    def __init__(self, session: Session):
        self._session, self._programs = session, Programs(session)
        self._models: dict[str, _DeviceModel] = {}
        self._held: dict[str, tuple[LoraConfig, Leaves]] = {}  # adapters that are only read

    def prepared(self, order: ModelOrder) -> bool:
        """Whether the programs of an order are compiled."""
        return all(program.has(*arguments) for program, arguments in self._calls(order))

    def prepare(self, order: ModelOrder) -> None:
        """Compile the programs of an order. Any thread may ask, while no order of the same model runs."""
        for program, arguments in self._calls(order):
            program.compiled(*arguments)

    def run(self, order: ModelOrder) -> Any:
        """What an order returns: `PassScores`, `Stepped`, a `HostState`, a digest, or None."""
        match order:
            case PassOrder():
                return self._pass(order)
            case StepOrder():
                return self._step(order)
            case PlaceOrder():
                return self._place(order)
            case HoldOrder(name, lora, factors):
                self._held[name] = lora, self._programs.leaves(lora, agreed(factors))
            case ClearOrder(model):
                self._models[model].gradients = None
            case ReadOrder(model):
                return self._read(self._models[model])
            case DropOrder(name):
                self._models.pop(name, None)
                self._held.pop(name, None)
            case FingerprintOrder():  # those of the MTP layers change nothing in what is trained
                params = self._session.params
                return fingerprint({name: value for name, value in params.items() if not name.startswith("mtp.")})
        return None

    def _place(self, order: PlaceOrder) -> None:
        programs, config, state = self._programs, order.lora, order.state
        state = HostState.of_arrays(agreed(state.arrays()), count=state.count, num_tokens=state.num_tokens)
        leaves = programs.leaves(config, state.leaves)
        first, second = (
            programs.leaves(config, part) if part else programs.zeros(config) for part in (state.first, state.second)
        )
        gradients = None if state.gradients is None else programs.leaves(config, state.gradients)
        self._models[order.model] = _DeviceModel(
            config, leaves, Moments(programs.count(state.count), first, second), gradients
        )

    def _pass(self, order: PassOrder) -> PassScores:
        if order.forward_only:
            program, arguments = self._forward_call(order)
            return program(*arguments)
        model = self._models[order.model]
        program, (_, *rest) = self._gradient_call(order)
        gradients = self._programs.no_gradients(model.config)(model.leaves) if model.gradients is None else None
        gradients, model.gradients = gradients or model.gradients, None  # they are donated
        model.gradients, scored = program(gradients, *rest)
        return scored

    def _step(self, order: StepOrder) -> Stepped:
        model = self._models[order.model]
        gradients, model.gradients = model.gradients, None
        if gradients is None:
            gradients = self._programs.no_gradients(model.config)(model.leaves)
        program = self._programs.step(model.config)
        model.leaves, model.moments, stepped = program(model.leaves, model.moments, gradients, order.numbers)
        return stepped

    def _calls(self, order: ModelOrder) -> list[tuple[StoredFunction, tuple[Any, ...]]]:
        """The programs of an order, with arguments of their shapes."""
        if isinstance(order, PassOrder) and order.forward_only:
            return [self._forward_call(order)]
        if not isinstance(order, PassOrder | StepOrder):
            return []
        model = self._models[order.model]
        zeros = self._programs.no_gradients(model.config), (model.leaves,)
        if isinstance(order, PassOrder):
            return [zeros, self._gradient_call(order)]
        step = self._programs.step(model.config), (model.leaves, model.moments, model.leaves, order.numbers)
        return [zeros, step]

    def _gradient_call(self, order: PassOrder) -> tuple[StoredFunction, tuple[Any, ...]]:
        """The program of a pass with gradients. Its first argument stands for them and has their shapes."""
        model, base = self._models[order.model], self._session.params
        if order.taught is None:
            return self._programs.gradients(model.config), (model.leaves, model.leaves, base, *_loss(order))
        teacher, leaves = self._teacher(order)
        program = self._programs.taught(model.config, teacher, order.taught)
        return program, (model.leaves, model.leaves, base, order.micro, leaves)

    def _forward_call(self, order: PassOrder) -> tuple[StoredFunction, tuple[Any, ...]]:
        model, base = self._models.get(order.model), self._session.params
        config, leaves = self._held[order.model] if model is None else (model.config, model.leaves)
        if order.taught is None:
            return self._programs.scores(config), (leaves, base, *_loss(order))
        teacher, teacher_leaves = self._teacher(order)
        return self._programs.taught_scores(config, teacher, order.taught), (leaves, base, order.micro, teacher_leaves)

    def _teacher(self, order: PassOrder) -> tuple[LoraConfig | None, Leaves | None]:
        return (None, None) if order.teacher is None else self._held[order.teacher]

    def _read(self, model: _DeviceModel) -> HostState | None:
        """A copy of the state. It waits for the devices. Only process 0 has it."""
        parts = (model.leaves, model.moments.first, model.moments.second, model.gradients or {})
        leads = jax.process_index() == 0

        def copied(leaf: jax.Array) -> np.ndarray:
            whole = on_every_process(leaf)
            return np.array(whole) if leads else np.zeros(0, np.float32)

        leaves, first, second, gradients = ({name: copied(leaf) for name, leaf in part.items()} for part in parts)
        state = HostState(leaves, first, second, int(model.moments.count))
        return replace(state, gradients=gradients or None) if leads else None


def _loss(order: PassOrder) -> tuple[Any, ...]:
    """A micro-batch and its loss as arguments of a program."""
    return order.micro, np.int32(order.index), np.asarray(order.numbers, np.float32)


def follower_orders(session: Session) -> OrderHandlers:
    """What a process that follows does with the orders of a training service."""
    models = DeviceModels(session)

    def prepare(content: Any) -> bool:
        models.prepare(decode_order(content))
        return True

    def run(content: Any) -> bool:
        models.run(decode_order(content))
        return False

    return cast("OrderHandlers", {PREPARE: prepare, RUN: run})
