"""The models that requests can name: the checkpoint's own names and the adapters, which clients may load and unload in
vLLM's terms if the server allows it.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from stepjax.adapters.peft import import_adapter
from stepjax.errors import CheckpointError, ConfigError
from stepjax.infer.serve.api import Api
from stepjax.infer.serve.bodies import BodyRoute
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.limits import LIMITS
from stepjax.infer.serve.replies import json_response

Name = Annotated[str, Field(min_length=1, max_length=int(LIMITS["model"].high))]


class LoadAdapter(BaseModel):
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, description="a PEFT folder on the server")]
    load_inplace: Annotated[
        bool, Field(description="replace an adapter of that name; running answers keep the old version")
    ] = False


class UnloadAdapter(BaseModel):
    lora_name: Name


def router(api: Api) -> APIRouter:
    """The endpoints that list the models."""
    routes = APIRouter(tags=["OpenAI"])
    service, options = api.service, api.options
    began = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": began,
            "owned_by": "stepjax",
            "root": options.names[0],
            "parent": None if name in options.names else options.names[0],
            "max_model_len": service.engine.scheduler.config.context,
        }

    @routes.get("/v1/models")
    async def models(request: Request) -> Response:
        """All models that a request can name, without the adapters of other keys."""
        names = await asyncio.to_thread(api.names, request.scope)
        return json_response({"object": "list", "data": [card(name) for name in names]})

    @routes.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        """One model."""
        if name not in await asyncio.to_thread(api.names, request.scope):
            raise ApiError(f"model: {name[:80]!a} is not served here", status=404, code="model_not_found")
        return json_response(card(name))

    return routes


def adapter_router(api: Api) -> APIRouter:
    """The endpoints that load and unload adapters; none unless ``adapter_updates`` is set."""
    routes, service = APIRouter(tags=["adapters"], route_class=BodyRoute), api.service
    if not api.options.adapter_updates:
        return routes

    @routes.post("/v1/load_lora_adapter")
    async def load_lora_adapter(body: LoadAdapter) -> Response:
        """Load an adapter from a folder on the server, which requests then name as ``model``."""
        service.check_open()
        if body.lora_name in api.options.names:
            raise _not_for_clients(body.lora_name, "is the model's own name; choose another")
        if api.owned(body.lora_name):
            raise _not_for_clients(body.lora_name, "is a name of saved weights; choose another")
        try:
            adapter, lora = await asyncio.to_thread(import_adapter, Path(body.lora_path), api.session.config)
        except (CheckpointError, ConfigError, OSError, ValueError) as error:
            raise ApiError(f"lora_path: {error}"[:1000], code="invalid_value", param="lora_path") from None
        await service.on_engine(
            lambda: service.engine.load_adapter(body.lora_name, adapter, lora, replace=body.load_inplace)
        )
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @routes.post("/v1/unload_lora_adapter")
    async def unload_lora_adapter(body: UnloadAdapter) -> Response:
        """Unload an adapter; running answers keep it to their end."""
        service.check_open()
        if body.lora_name not in service.engine.adapters or api.owned(body.lora_name):
            raise ApiError(
                f"lora_name: {body.lora_name[:80]!a} is not loaded", status=404, code="not_found", param="lora_name"
            )
        await service.on_engine(lambda: service.engine.unload_adapter(body.lora_name))
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")

    return routes


def _not_for_clients(name: str, reason: str) -> ApiError:
    return ApiError(f"lora_name: {name[:80]!a} {reason}", code="invalid_value", param="lora_name")
