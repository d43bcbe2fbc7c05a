"""What a later room adds to the server: paths of its own, beside those of the application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastapi import APIRouter

from stepjax.infer.serve.api import Api
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.middleware import App, Receive, Refuse, Scope, Send


class Extension(Protocol):
    """More paths for `stepjax.infer.serve.app.create_app`. They pass the log and the keys as all others do."""

    raw_paths: frozenset[str]  # their endpoints read the body themselves, of any type, and bound it
    open_prefixes: tuple[str, ...]  # paths that begin so need no key

    def router(self, api: Api) -> APIRouter:
        """The endpoints."""
        ...

    async def prepare(self, scope: Scope) -> None:
        """Called for each request that may have a body, once that has been read and before the endpoint runs.

        Raises:
          ApiError: the request is refused.
        """
        ...

    def owns(self, name: str) -> bool:
        """Whether this extension loads and unloads the adapter of this name, so that clients may not."""
        ...

    def shows(self, name: str, scope: Scope | None) -> bool:
        """Whether a request may learn of an adapter that the extension owns. None: whether all requests may.

        It may read files, so it is called in a thread where it can be.
        """
        ...

    async def start(self) -> None:
        """Called once the engine's thread runs, before the first request."""
        ...

    async def stop(self) -> None:
        """Called before the engine's thread ends."""
        ...


class PreparedRequests:
    """Lets extensions see each request before its endpoint does."""

    def __init__(self, app: App, extensions: Sequence[Extension], refuse: Refuse):
        self._app, self._extensions, self._refuse = app, extensions, refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                for extension in self._extensions:
                    await extension.prepare(scope)
            except ApiError as error:
                await self._refuse(scope, receive, send, error)
                return
        await self._app(scope, receive, send)
