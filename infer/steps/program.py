"""A jitted function and its executables: compiled once per set of shapes, and never in the middle of a timed call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from stepjax.infer.sampling.sampler import Logprobs
from stepjax.infer.steps.state import Emitted, State, placement
from stepjax.model.layout import Layout
from stepjax.model.step3p5 import Params
from stepjax.program_cache import ProgramCache
from stepjax.stored_function import StoredFunction

log = logging.getLogger(__name__)


class Program:
    """A jitted function, compiled when asked to, once per set of shapes, and not in the middle of a timed call."""

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        layout: Layout,
        *,
        identity: str = "",
        cache: ProgramCache | None = None,
    ):
        """``function(params, state, …) -> (state, …)``; the state is donated and stays where it lies, the rest of the
        result is whole on every device. The parameters keep their shapes between calls.

        Args:
          identity: what the function depends on beside our sources and its arguments; the cache's names hold it.
          cache: executables of earlier runs.
        """
        self.name, self._function, self._layout = name, function, layout
        self._identity, self._cache = f"{name}\0{identity}\0{layout!r}", cache
        self._executables: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._functions: dict[Any, StoredFunction] = {}

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return sum(function.compile_s for function in [*self._functions.values()])

    def compiled(self, params: Params, state: State, *rest: Any) -> Callable[..., Any]:
        """The executable for arguments of these shapes. Compiling one is logged: someone may be waiting."""
        key = _shapes(state, rest)
        if key not in self._executables:
            began = time.perf_counter()
            function, arguments = self.stored(params, state, *rest)
            executable = function.compiled(*arguments)
            self._executables[key] = lambda params, *others: executable(tuple(params.values()), *others)
            shapes = " ".join(str(list(leaf.shape)) for leaf in jax.tree.leaves(rest) if leaf.ndim)
            took = time.perf_counter() - began
            log.info("prepared %s for %s in %.1f s", self.name, shapes, took)
        return self._executables[key]

    def stored(self, params: Params, state: State, *rest: Any) -> tuple[StoredFunction, tuple[Any, ...]]:
        """What is compiled for arguments of these shapes, and its arguments.

        It takes the parameters as a list: to sort hundreds of names costs 0.4 ms a call.
        """
        names = tuple(params)
        key = names, _shapes(state)
        if key not in self._functions:

            def run(values: Sequence[Any], state: State, *rest: Any) -> Any:
                return self._function(dict(zip(names, values, strict=True)), state, *rest)

            self._functions[key] = StoredFunction(
                self.name,
                run,
                identity=f"{self._identity}\0{names}",
                cache=self._cache,
                types=(Emitted, Logprobs),
                donate_argnums=(1,),
                out_shardings=(placement(state, self._layout), self._layout.replicated),
            )
        return self._functions[key], (tuple(params.values()), state, *rest)

    def has(self, state: State, *rest: Any) -> bool:
        """Whether the executable for arguments of these shapes is there."""
        return _shapes(state, rest) in self._executables

    def jitted(self, state: State) -> jax.stages.Wrapped:
        """The function for a state of these shapes."""
        placed = (placement(state, self._layout), self._layout.replicated)
        return jax.jit(self._function, donate_argnums=(1,), out_shardings=placed)


def _shapes(*arguments: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(arguments))
