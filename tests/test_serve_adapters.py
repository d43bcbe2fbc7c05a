"""Adapters over HTTP: chosen by the model's name, loaded and unloaded while answers run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapters import lora_config, trained
from alone import Batch
from fastapi import APIRouter, Response
from peft_folders import peft_folder
from serving import Serving

from stepjax.adapters.lora import merge
from stepjax.adapters.peft import export_adapter
from stepjax.errors import RequestError
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.serve import app as app_module
from stepjax.infer.serve.api import Api, ServeOptions
from stepjax.infer.serve.app import create_app
from stepjax.infer.serve.endpoints import completions
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.metrics import ServerMetrics
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.replies import json_response
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session

CONFIG = EngineConfig(
    num_slots=2, context=128, num_pages=16, page_size=16, speculate=0, widths=(16,), token_budget=16, num_snapshots=2,
    adapter_slots=3, adapter_rank=6, adapter_expert_rank=3,
)  # fmt: skip
LORA = lora_config()
PROMPT = [5, 6, 7, 8, 9, 10]
LENGTH = 24


@pytest.fixture(scope="module")
def session() -> Session:
    return load("step-tiny", dtype="float32")


@pytest.fixture(scope="module")
def folders(session, tmp_path_factory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("adapters")
    return {
        name: export_adapter(home / name, session.config, trained(session.config, LORA, seed=seed), LORA)
        for seed, name in enumerate(("a", "b", "c"), start=3)
    }


@pytest.fixture(scope="module")
def expected(session) -> dict[str, str]:
    """The answer of each merged model, and of the base, without a server."""
    params = SamplingParams(max_tokens=LENGTH, temperature=0.0, ignore_eos=True, seed=0)
    found = {}
    for seed, name in enumerate(("a", "b", "c", ""), start=3):
        weights = merge(session.params, trained(session.config, LORA, seed=seed), LORA) if name else session.params
        batch = Batch(session.runner(0), weights, [PROMPT], [params], dtype=session.dtype, chunk=16)
        tokens = batch.prefill()
        while len(tokens) < LENGTH:
            tokens += batch.step([True])[0]
        assert session.tokenizer
        found[name] = session.tokenizer.decode(tokens, skip_special=True)
    assert len({*found.values()}) == 4
    return found


@pytest.fixture(scope="module")
def server(session, folders) -> Iterator[Serving]:
    with Serving(session, CONFIG, adapter_updates=True) as serving:
        yield serving


def answer(server: Serving, model: str | None) -> str:
    body = {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True}
    response = server.post("/v1/completions", body | ({"model": model} if model else {}))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def change(server: Serving, verb: str, **body: Any) -> tuple[int, str]:
    response = server.post(f"/v1/{verb}_lora_adapter", body)
    return response.status_code, response.text


def names(server: Serving) -> list[str]:
    return [card["id"] for card in server.client.get("/v1/models").json()["data"]]


def test_adapters_are_models_of_their_own(server, folders, expected):
    for name in ("a", "b"):
        status, text = change(server, "load", lora_name=name, lora_path=str(folders[name]))
        assert (status, text) == (200, f"Success: LoRA adapter '{name}' added successfully.")
    own = names(server)
    assert own[-2:] == ["a", "b"]
    card = server.client.get("/v1/models/a").json()
    assert (card["id"], card["parent"]) == ("a", own[0])
    with ThreadPoolExecutor(6) as pool:
        asked = ["a", "b", None, "b", "a", own[0]]
        found = list(pool.map(lambda name: answer(server, name), asked))
    assert found == [expected[name if name in ("a", "b") else ""] for name in asked]
    for name in ("a", "b"):
        assert change(server, "unload", lora_name=name) == (
            200,
            f"Success: LoRA adapter '{name}' removed successfully.",
        )
    assert names(server) == own[:-2]
    gone = server.post("/v1/completions", {"prompt": PROMPT, "model": "a"})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.long
@pytest.mark.slow
def test_an_answer_is_of_one_version_while_they_change(server, folders, expected):
    """Four clients ask without a pause while two adapters replace each other under one name."""
    assert change(server, "load", lora_name="x", lora_path=str(folders["a"]))[0] == 200
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(answer, server, "x") for _ in range(24)]
        for name in "bcabca":
            # All slots may be taken by versions that still answer: then it is said, and asked again.
            for _ in range(200):
                status, text = change(server, "load", lora_name="x", lora_path=str(folders[name]), load_inplace=True)
                if status == 200:
                    break
                assert "slots are taken" in text
            assert status == 200
        found = {each.result() for each in asked}
    assert found <= {expected[name] for name in "abc"}
    assert answer(server, "x") == expected["a"]
    assert change(server, "unload", lora_name="x")[0] == 200


@pytest.mark.parametrize(
    ("verb", "body", "status", "message"),
    [
        ("load", {"lora_name": "step-tiny", "lora_path": "A"}, 400, "model's own name"),
        ("load", {"lora_name": "y", "lora_path": "/nowhere"}, 400, "has no adapter_config.json"),
        ("load", {"lora_name": "y", "lora_path": "PISSA"}, 400, "init_lora_weights is 'pissa'"),
        ("load", {"lora_name": "y"}, 400, "lora_path"),
        ("load", {"lora_name": "", "lora_path": "A"}, 400, "lora_name"),
        ("unload", {"lora_name": "y"}, 404, "is not loaded"),
    ],
)
def test_bad_requests_change_nothing(server, folders, tmp_path, verb, body, status, message):
    before = names(server)
    pissa = peft_folder(tmp_path / "pissa", {"init_lora_weights": "pissa"}, {})
    paths = {"A": str(folders["a"]), "PISSA": str(pissa)}
    found = change(server, verb, **{k: paths.get(v, v) for k, v in body.items()})
    assert found[0] == status, found
    assert message in found[1]
    assert names(server) == before


def test_a_name_is_taken_once(server, folders):
    assert change(server, "load", lora_name="z", lora_path=str(folders["a"]))[0] == 200
    status, text = change(server, "load", lora_name="z", lora_path=str(folders["b"]))
    assert (status, "is loaded already" in text) == (400, True)
    assert change(server, "unload", lora_name="z")[0] == 200


def client_of(session: Session, **options: Any) -> httpx.AsyncClient:
    """A client of an application without a server."""
    engine = Engine(session, EngineConfig(num_slots=1, context=64, speculate=0, num_snapshots=0))
    app: Any = create_app(Service(engine, ServerMetrics(engine, "m")), session, ServeOptions(("m",), **options))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here")


def test_clients_load_nothing_unless_they_may(session):
    """The routes are not there."""

    async def ask() -> int:
        async with client_of(session) as client:
            return (await client.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"})).status_code

    assert asyncio.run(ask()) == 404


def test_a_new_endpoint_is_one_entry_of_the_table(session, monkeypatch):
    """It is then routed, in the OpenAPI document, behind the keys, and its errors have the common form."""

    def router(api: Api) -> APIRouter:
        routes = APIRouter(tags=["new"])

        @routes.get("/v1/length")
        async def length(text: str) -> Response:
            if not text:
                raise ApiError("text: is empty", param="text")
            return json_response({"model": api.model_name(None), "length": len(text)})

        return routes

    monkeypatch.setattr(app_module, "ROUTERS", (*app_module.ROUTERS, router))

    async def ask() -> tuple[list[httpx.Response], Any]:
        async with client_of(session, keys=ApiKeys(["k"])) as client:
            headers = {"x-api-key": "k"}
            refused = await client.get("/v1/length?text=abc")
            found = [await client.get(f"/v1/length?{query}", headers=headers) for query in ("text=abc", "text=", "")]
            return [refused, *found], (await client.get("/openapi.json", headers=headers)).json()

    (refused, found, empty, missing), document = asyncio.run(ask())
    assert (refused.status_code, found.json()) == (401, {"model": "m", "length": 3})
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "text")
    assert missing.status_code == 400
    assert set(document["paths"]["/v1/length"]["get"]["responses"]) >= {"200", "400", "401"}


def unloading(server: Serving, name: str, call: Any) -> Any:
    """``call``, after which an adapter is unloaded."""

    def called(*args: Any, **options: Any) -> Any:
        value = call(*args, **options)
        server.service.engine.unload_adapter(name)
        return value

    return called


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
}


@pytest.mark.parametrize("path", BODIES)
def test_an_adapter_that_goes_before_a_request_is_accepted_is_not_replaced_by_the_base(
    server, folders, monkeypatch, path
):
    change(server, "load", lora_name="a", lora_path=str(folders["a"]))
    with monkeypatch.context() as patched:
        patched.setattr(Api, "model_name", unloading(server, "a", Api.model_name))
        response = server.post(path, {**BODIES[path], "model": "a"})
    assert response.status_code == 404, response.text
    found = response.json()["error"]
    assert (found["code"], found["param"]) == ("model_not_found", "model")


@pytest.mark.slow
def test_an_accepted_request_keeps_its_adapter_whatever_is_loaded_before_it_begins(
    server, folders, expected, monkeypatch
):
    """Unloaded, and its slot wanted for others, while the request is read."""
    change(server, "load", lora_name="a", lora_path=str(folders["a"]))
    read = completions.read_completion

    def slowly(engine: Engine, *args: Any) -> Any:
        engine.unload_adapter("a")
        for name in ("b", "c"):
            engine.load_adapter(name, folders[name])
        with pytest.raises(RequestError, match="slots are taken"):
            engine.load_adapter("a", folders["a"])
        return read(engine, *args)

    with monkeypatch.context() as patched:
        patched.setattr(completions, "read_completion", slowly)
        assert answer(server, "a") == expected["a"]
    for name in ("b", "c"):
        assert answer(server, name) == expected[name]
    assert change(server, "load", lora_name="a", lora_path=str(folders["a"]))[0] == 200  # the pin is gone
    for name in ("a", "b", "c"):
        assert change(server, "unload", lora_name=name)[0] == 200
