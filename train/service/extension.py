"""The training service as an extension of the server."""

from __future__ import annotations

from fastapi import APIRouter

from stepjax.infer.serve.api import Api
from stepjax.infer.serve.bodies import PARSED
from stepjax.infer.serve.middleware import ApiKeys, Scope
from stepjax.train.service.registry import SCHEME
from stepjax.train.service.routes.calls import RAW_PATHS, add_calls
from stepjax.train.service.routes.files import FILES_PREFIX, add_files
from stepjax.train.service.routes.reading import owner_of_scope
from stepjax.train.service.routes.records import add_records
from stepjax.train.service.routes.sessions import add_sessions
from stepjax.train.service.routes.unserved import add_unserved
from stepjax.train.service.training_service import TrainingService


class TrainingExtension:
    """Adds the paths of the Tinker API to a server (`stepjax.infer.serve.extension.Extension`)."""

    raw_paths: frozenset[str] = RAW_PATHS
    open_prefixes: tuple[str, ...] = (FILES_PREFIX,)

    def __init__(self, service: TrainingService):
        self.service = service
        self._keys = ApiKeys(())

    def router(self, api: Api) -> APIRouter:
        self._keys = api.options.keys
        routes = APIRouter(prefix="/api/v1", tags=["Tinker"])
        for add in (
            add_calls,
            add_unserved,
            add_sessions,
            add_records,
            add_files,
        ):  # the calls first: they come most often
            add(routes, self.service, api.options.keys)
        return routes

    async def prepare(self, scope: Scope) -> None:
        """A chat request may name saved weights of a sampler as its model, if it has the key that saved them."""
        body = scope.get(PARSED)
        model = body.get("model") if isinstance(body, dict) else None
        if isinstance(model, str) and model.startswith(SCHEME):
            await self.service.provide(model, owner_of_scope(scope, self._keys))

    def owns(self, name: str) -> bool:
        """Saved weights are named by their paths."""
        return name.startswith(SCHEME)

    def shows(self, name: str, scope: Scope | None) -> bool:
        """Named weights, to the key that saved them, and to all once they are published."""
        owner = None if scope is None and self._keys else owner_of_scope(scope or {}, self._keys)
        return self.service.shows(name, owner)

    async def start(self) -> None:
        await self.service.start()

    async def stop(self) -> None:
        await self.service.stop()
