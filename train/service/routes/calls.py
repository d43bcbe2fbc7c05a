"""Endpoints of models and samplers: passes, steps, saves, loads, samples, and the promises of all of them."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter, Request, Response

from stepjax.adapters import lora
from stepjax.infer.serve.bodies import SIZE, off_loop
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.replies import json_response
from stepjax.train.service.checks import check_call
from stepjax.train.service.devices.turns import check_alive
from stepjax.train.service.journal import JournalRow
from stepjax.train.service.limits import MAX_BODY_BYTES
from stepjax.train.service.model_work import parsed
from stepjax.train.service.promises import Failure, Outcome
from stepjax.train.service.requests import (
    ALPHA,
    boolean,
    integer,
    metadata,
    only,
    read_adam,
    read_lora,
    read_save,
    string,
)
from stepjax.train.service.routes.reading import json_body, owner_of, raw_body
from stepjax.train.service.state_files import read_checkpoint
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.calls import PROTOBUF, canonical, inflated, read_call
from stepjax.train.service.wire.results import SampleResult, pass_to_json, sample_to_json, sample_to_protobuf
from stepjax.train.service.wire.sample_requests import read_sample
from stepjax.train.service.wire.tensors import bad

RAW_PATHS = frozenset(("/api/v1/forward_backward", "/api/v1/forward"))
JSON_TYPE = "application/json"


def add_calls(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    """Add the endpoints."""
    _add_polls(routes, service, keys)
    _add_samples(routes, service, keys)
    _add_passes(routes, service, keys)
    _add_model_calls(routes, service, keys)
    _add_models(routes, service, keys)


def _add_passes(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    async def run(request: Request, *, forward_only: bool) -> Response:
        check_alive(service.shared.service)
        owner, kind = owner_of(request, keys), request.headers.get("content-type", "").split(";")[0].strip().lower()
        encoding = request.headers.get("content-encoding", "").strip().lower()
        sent = await raw_body(request)
        body = await off_loop(len(sent), lambda: inflated(sent, encoding, most=MAX_BODY_BYTES))
        call = await off_loop(len(body), lambda: read_call(body, kind, forward_only=forward_only))
        await _running_model(service, call.model_id, owner)
        name = "forward" if call.forward_only else "forward_backward"
        try:
            _check_seq(call.seq_id)
            checked = await off_loop(len(body), check_call, call, service.shared.room)
            if checked.loss.taught is not None:
                await _check_teacher(service, checked.loss.teacher, owner)
        except ApiError:
            await service.spend(owner, call.model_id, call.seq_id, name, body)
            raise
        promise = await service.submit(owner, name, call.model_id, call.seq_id, request=checked, type=kind, body=body)
        return json_response(promise.answer)

    @routes.post("/forward_backward")
    async def forward_backward(request: Request) -> Response:
        """Add the gradients of a loss over some data to those of earlier calls; or only score the data."""
        return await run(request, forward_only=False)

    @routes.post("/forward")
    async def forward(request: Request) -> Response:
        """Score data without gradients, as older clients ask for it."""
        return await run(request, forward_only=True)


async def _check_teacher(service: TrainingService, teacher: str, owner: str) -> None:
    if teacher in service.shared.names:
        return
    if not teacher.startswith("tinker://"):
        names = ", ".join(service.shared.names)
        raise bad("loss_fn_config", f"teacher is {teacher[:120]!a}, expected {names}, or a tinker:// path")
    await asyncio.to_thread(service.shared.registry.checkpoint, teacher, owner)


def _add_model_calls(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    async def run(request: Request, kind: str) -> Response:
        check_alive(service.shared.service)
        owner, given = owner_of(request, keys), json_body(request)
        model, seq, body = string(given, "model_id"), given.get("seq_id"), canonical(given)
        await _running_model(service, model, owner)
        try:
            seq = integer(given, "seq_id", low=1)
            _check_json(kind, given)
        except ApiError:
            if isinstance(seq, int):
                await service.spend(owner, model, seq, kind, body)
            raise
        request_ = parsed(service.shared, kind, JSON_TYPE, body)
        promise = await service.submit(owner, kind, model, seq, request=request_, type=JSON_TYPE, body=body)
        return json_response(promise.answer)

    @routes.post("/optim_step")
    async def optim_step(request: Request) -> Response:
        """One step of AdamW with the gradients since the last one."""
        return await run(request, "optim_step")

    @routes.post("/save_weights")
    async def save_weights(request: Request) -> Response:
        """Save weights and optimiser under a name."""
        return await run(request, "save_weights")

    @routes.post("/save_weights_for_sampler")
    async def save_weights_for_sampler(request: Request) -> Response:
        """Save weights for sampling, under a name or for a sampling session that is opened with them."""
        return await run(request, "save_weights_for_sampler")

    @routes.post("/save_weights_external")
    async def save_weights_external(request: Request) -> Response:
        """Save weights as a PEFT folder that can be downloaded."""
        return await run(request, "save_weights_external")

    @routes.post("/load_weights")
    async def load_weights(request: Request) -> Response:
        """Load saved weights, and the optimiser if asked, into a model or as a new one."""
        given = json_body(request)
        if given.get("session_id") is None:
            return await run(request, "load_weights")
        return await _load_as_new(service, owner_of(request, keys), given)


def _check_json(kind: str, given: Mapping[str, Any]) -> None:
    """Refuse a call that could not run, while its client can still be told so at once."""
    if kind == "optim_step":
        read_adam(given)
    elif kind == "load_weights":
        only(given, "model_id", "seq_id", "session_id", "path", "optimizer", "optimizer_config", "weights_access_token")
        string(given, "path")
        boolean(given, "optimizer", False)
    elif kind == "save_weights_external":
        if given.get("age_encryption_recipients"):
            raise bad("age_encryption_recipients", "encrypted downloads are not served; leave it out")
        read_save({name: value for name, value in given.items() if name != "age_encryption_recipients"})
    else:
        read_save(given)


async def _load_as_new(service: TrainingService, owner: str, given: Mapping[str, Any]) -> Response:
    check_alive(service.shared.service)
    known = ("session_id", "model_seq_id", "path", "optimizer", "base_model", "optimizer_config", "user_metadata")
    only(given, *known, "weights_access_token", "model_id", "seq_id")
    if given.get("model_id") is not None:
        raise bad("model_id", "expected model_id with seq_id, or session_id with model_seq_id")
    session, number = string(given, "session_id"), integer(given, "model_seq_id", high=10**9 - 1)
    path = string(given, "path")
    boolean(given, "optimizer", False)
    registry = service.shared.registry
    await asyncio.to_thread(lambda: registry.session(session, owner, running=True))
    if given.get("base_model") is not None:
        _check_base(service, string(given, "base_model"))
    row = await asyncio.to_thread(registry.checkpoint, path, owner)
    if row.kind != "weights":
        raise bad("path", "is a sampler's weights, which cannot be trained; expected a path with /weights/")
    _, config = await asyncio.to_thread(
        lambda: read_checkpoint(registry.checkpoint_folder(path), optimizer=bool(given.get("optimizer")))
    )
    about = {"seed": 0, "parts": row.about["parts"], "user_metadata": metadata(given), "from": path}
    promise = await service.create_model(
        owner, session, number, config=config, about=about, kind="load_weights", body=canonical(given)
    )
    service.heard(session)
    return json_response(promise.answer)


def _add_models(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    @routes.post("/create_model")
    async def create_model(request: Request) -> Response:
        """A new adapter of the base model."""
        check_alive(service.shared.service)
        owner, given = owner_of(request, keys), json_body(request)
        only(
            given,
            "session_id",
            "model_seq_id",
            "base_model",
            "lora_config",
            "optimizer_config",
            "user_metadata",
            "project_id",
        )
        shared = service.shared
        session, number = string(given, "session_id"), integer(given, "model_seq_id", high=10**9 - 1)
        await asyncio.to_thread(lambda: shared.registry.session(session, owner, running=True))
        _check_base(service, string(given, "base_model"))
        optimizer = given.get("optimizer_config") or {}
        if not isinstance(optimizer, Mapping) or optimizer.get("type", "adamw") != "adamw":
            raise bad("optimizer_config", "only the optimiser adamw is served")
        most = shared.limits.max_rank
        config, seed, parts = read_lora(given.get("lora_config"), shared.session.config, max_rank=most)
        lora.targets(shared.session.config, config)
        body = canonical(given)
        if seed is None:  # drawn from what was sent, so that a repeated submission draws the same
            seed = int.from_bytes(hash_of(body + session.encode())[:4], "big")
        about = {"seed": seed, "parts": parts | {"train_unembed": False}, "user_metadata": metadata(given)}
        promise = await service.create_model(
            owner, session, number, config=config, about=about, kind="create_model", body=body
        )
        service.heard(session)
        return json_response(promise.answer)

    @routes.post("/get_info")
    async def get_info(request: Request) -> Response:
        """What a model is."""
        given = json_body(request)
        row = await asyncio.to_thread(service.shared.registry.model, string(given, "model_id"), owner_of(request, keys))
        name = row.about.get("base") or service.shared.names[0]
        data = {"arch": "step3p5", "model_name": name, "tokenizer_id": service.tokenizer or None}
        return json_response(
            {
                "type": "get_info",
                "model_id": row.id,
                "model_name": name,
                "model_data": data,
                "is_lora": True,
                "lora_rank": row.about["lora"]["rank"],
                "lora_alpha": ALPHA,
                "optimizer_config": {"type": "adamw"},
            }
        )


def _add_samples(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    @routes.post("/create_sampling_session")
    async def create_sampling_session(request: Request) -> Response:
        """A sampler of the base model or of saved weights."""
        owner, given, registry = owner_of(request, keys), json_body(request), service.shared.registry
        only(given, "session_id", "sampling_session_seq_id", "base_model", "model_path", "project_id")
        session = string(given, "session_id")
        number = integer(given, "sampling_session_seq_id", high=2**63 - 1)
        await asyncio.to_thread(lambda: registry.session(session, owner, running=True))
        path = await _sampled_path(service, given, owner)
        digest = hash_of(canonical(given)).hex()
        row = await asyncio.to_thread(lambda: registry.open_sampler(session, number, owner, path=path, digest=digest))
        service.heard(session)
        return json_response({"type": "create_sampling_session", "sampling_session_id": row.id})

    @routes.get("/samplers/{id:path}")
    async def sampler(request: Request, id: str) -> Response:
        """What a sampler samples from."""
        row = await asyncio.to_thread(service.shared.registry.sampler, id, owner_of(request, keys))
        answer: dict[str, Any] = {"sampler_id": row.id, "base_model": service.shared.names[0]}
        return json_response(answer | ({"model_path": row.path} if row.path else {}))

    @routes.post("/asample")
    async def asample(request: Request) -> Response:
        """Answers to a prompt, or scores of it."""
        check_alive(service.shared.service)
        owner, given = owner_of(request, keys), json_body(request)
        body = await off_loop(request.scope.get(SIZE, 0), canonical, given)
        call = await off_loop(len(body), read_sample, given)
        if given.get("sampling_session_id") is None:
            raise bad("sampling_session_id", "is missing; create a sampling session first")
        id = string(given, "sampling_session_id")
        number = integer(given, "seq_id", high=2**63 - 1)
        promise = await service.sampling.sample(owner, id, number, call, body)
        service.heard(id.split(":")[0])
        return json_response(promise.answer)


async def _sampled_path(service: TrainingService, given: Mapping[str, Any], owner: str) -> str | None:
    """The path that a sampler is asked for; None: the base model."""
    path, base = given.get("model_path"), given.get("base_model")
    if base is not None:
        _check_base(service, string(given, "base_model"))
    if path is None:
        if base is None:
            raise bad("model_path", "expected a base_model or a model_path")
        return None
    row = await asyncio.to_thread(service.shared.registry.checkpoint, string(given, "model_path"), owner)
    if row.kind != "sampler_weights":
        raise bad("model_path", "is not weights of a sampler; expected a path with /sampler_weights/")
    return row.path


def _add_polls(routes: APIRouter, service: TrainingService, keys: ApiKeys) -> None:
    @routes.post("/retrieve_future")
    async def retrieve_future(request: Request) -> Response:
        """The outcome of a promise; 408 if it is not there within half a minute."""
        owner, given = owner_of(request, keys), json_body(request)
        only(given, "request_id", "allow_metadata_only", "model_id")
        promise = await service.promise(owner, string(given, "request_id"))
        outcome = await promise.wait()
        if outcome is None:
            body = {"type": "try_again", "request_id": promise.id, "queue_state": promise.queue_state}
            return json_response(body, status=408)
        promise.fetched = time.monotonic()
        accepts = PROTOBUF in request.headers.get("accept", "")
        return await off_loop(_size(outcome), functools.partial(_outcome_response, outcome, protobuf=accepts))


def _size(outcome: Outcome) -> int:
    """About the bytes of an outcome, which decide where its answer is written."""
    if isinstance(outcome, SampleResult):
        columns = 1 + outcome.sample_width
        scores = 0 if outcome.prompt_logprobs is None else len(outcome.prompt_logprobs) * (1 + outcome.top_width)
        return 8 * (scores + sum(len(answer.tokens) * columns for answer in outcome.sequences))
    return len(outcome) if isinstance(outcome, bytes) else 0


def _outcome_response(outcome: Outcome, *, protobuf: bool) -> Response:
    if isinstance(outcome, Failure):
        return json_response({"error": outcome.error, "category": outcome.category})
    if isinstance(outcome, bytes):
        return Response(outcome, media_type=PROTOBUF) if protobuf else json_response(_finite(pass_to_json(outcome)))
    if isinstance(outcome, SampleResult):
        if protobuf:
            return Response(sample_to_protobuf(outcome), media_type=PROTOBUF)
        return json_response(_finite(sample_to_json(outcome)))
    return json_response(_finite(outcome))


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite: they become null."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value


async def _running_model(service: TrainingService, model: str, owner: str) -> JournalRow:
    row = await asyncio.to_thread(service.shared.registry.model, model, owner)
    if row.ended:
        raise ApiError(f"model_id {model[:120]!a}: its session has ended", code="session_ended", param="model_id")
    service.heard(row.session)
    return row


def _check_base(service: TrainingService, name: str) -> None:
    names = service.shared.names
    if name not in names:
        raise bad("base_model", f"is {name[:120]!a}, but this server has {', '.join(names)}")


def _check_seq(seq: int) -> None:
    if not 1 <= seq < 2**31:
        raise bad("seq_id", f"is {seq}, expected an integer from 1 to {2**31 - 1}")


def hash_of(body: bytes) -> bytes:
    import hashlib

    return hashlib.sha256(body).digest()
