"""Loading and unloading adapters while the server runs, in vLLM's terms; off unless asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field

from stepjax.adapters.peft import import_adapter
from stepjax.errors import CheckpointError, ConfigError
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.limits import LIMITS
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session

Name = Annotated[str, Field(min_length=1, max_length=int(LIMITS["model"].high))]


class LoadAdapter(BaseModel):
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096, description="a PEFT folder on the server")]
    load_inplace: Annotated[
        bool, Field(description="take the place of one of that name; running answers keep the old version")
    ] = False


class UnloadAdapter(BaseModel):
    lora_name: Name


def add_adapter_routes(app: FastAPI, service: Service, session: Session, names: tuple[str, ...]) -> None:
    """The two routes; ``names`` are the model's own, which no adapter may take."""

    @app.post("/v1/load_lora_adapter", tags=["adapters"])
    async def load_lora_adapter(body: LoadAdapter) -> Response:
        """Load an adapter from a folder on the server, to be asked for by its name as ``model``."""
        service.check_open()
        check_name(body.lora_name, names)
        try:
            adapter, lora = await asyncio.to_thread(import_adapter, Path(body.lora_path), session.config)
        except (CheckpointError, ConfigError, OSError, ValueError) as error:
            raise ApiError(f"lora_path: {error}"[:1000], code="invalid_value", param="lora_path") from None
        await service.on_engine(
            lambda: service.engine.load_adapter(body.lora_name, adapter, lora, replace=body.load_inplace)
        )
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.", media_type="text/plain")

    @app.post("/v1/unload_lora_adapter", tags=["adapters"])
    async def unload_lora_adapter(body: UnloadAdapter) -> Response:
        """Unload an adapter; answers that began with it end with it."""
        service.check_open()
        if body.lora_name not in service.engine.adapters:
            raise ApiError(
                f"lora_name: {body.lora_name[:80]!a} is not loaded", status=404, code="not_found", param="lora_name"
            )
        await service.on_engine(lambda: service.engine.unload_adapter(body.lora_name))
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.", media_type="text/plain")


def check_name(name: str, names: tuple[str, ...]) -> None:
    """Raise ApiError if an adapter would hide the model itself."""
    if name in names:
        raise ApiError(
            f"lora_name: {name[:80]!a} is the model's own name; choose another", code="invalid_value", param="lora_name"
        )
