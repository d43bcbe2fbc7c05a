"""What a later room adds to the server: paths of its own, beside those of the application."""

from __future__ import annotations

from typing import Protocol

from fastapi import APIRouter

from stepjax.infer.serve.api import Api


class Extension(Protocol):
    """More paths for `stepjax.infer.serve.app.create_app`. They pass the log and the keys as all others do."""

    raw_paths: frozenset[str]  # their endpoints read the body themselves, of any type, and bound it
    open_prefixes: tuple[str, ...]  # paths that begin so need no key

    def router(self, api: Api) -> APIRouter:
        """The endpoints."""
        ...

    async def start(self) -> None:
        """Called once the engine's thread runs, before the first request."""
        ...

    async def stop(self) -> None:
        """Called before the engine's thread ends."""
        ...
