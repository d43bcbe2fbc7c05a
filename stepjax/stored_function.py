"""A function of arrays that is compiled once for each set of shapes, and whose executables are kept between runs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax

from stepjax.program_cache import ProgramCache, everywhere

log = logging.getLogger(__name__)

TOGETHER = 4  # functions that are compiled at once; they are traced one at a time


class StoredFunction:
    """A function for `jax.jit`, which any thread may compile ahead of its first call.

    Example:
      >>> import numpy as np
      >>> from stepjax.stored_function import StoredFunction
      >>> double = StoredFunction("double", lambda x: (2 * x,))
      >>> [value.tolist() for value in double(np.arange(3))]
      [[0, 2, 4]]
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        identity: str = "",
        cache: ProgramCache | None = None,
        types: Iterable[type] = (),
        **options: Any,
    ):
        """
        Args:
          identity: what the function depends on beside our sources and its arguments: closure, donation, shardings.
          cache: executables of earlier runs; None: every run compiles its own.
          types: NamedTuples in its result that are no argument's.
          options: of `jax.jit`.
        """
        self.name, self._function, self._identity, self._cache = name, function, f"{name}\0{identity}", cache
        self._types, self._options = tuple(types), options
        self._executables: dict[Any, jax.stages.Compiled] = {}
        self._locks: dict[Any, threading.Lock] = {}
        self.compile_s = 0.0

    def __call__(self, *arguments: Any) -> Any:
        return self.compiled(*arguments)(*arguments)

    def compiled(self, *arguments: Any, stored: bool = True) -> jax.stages.Compiled:
        """The executable for arguments of these shapes, which keep their placements between calls.

        Shapes may stand for arrays.

        Args:
          stored: look for it in the cache. Several processes then agree, and must call this at the same point.
        """
        key = _key(arguments)
        executable = self._executables.get(key)
        if executable is not None:
            return executable
        with self._locks.setdefault(key, threading.Lock()):
            if key not in self._executables:
                began = time.perf_counter()
                self._executables[key] = self._compile(arguments, stored=stored)
                took = time.perf_counter() - began
                self.compile_s += took
                log.debug("prepared %s in %.1f s", self.name, took)
            return self._executables[key]

    def has(self, *arguments: Any) -> bool:
        """Whether the executable for arguments of these shapes is there."""
        return _key(arguments) in self._executables

    def load(self, *arguments: Any) -> jax.stages.Compiled | None:
        """The executable, or that of an earlier run, which `use` takes into use; None if there is neither."""
        executable = self._executables.get(_key(arguments))
        if executable is not None or self._cache is None:
            return executable
        return self._cache.load(arguments, identity=self._identity, types=self._types)

    def use(self, executable: jax.stages.Compiled, *arguments: Any) -> None:
        """Take an executable that `load` returned."""
        self._executables.setdefault(_key(arguments), executable)

    def _compile(self, arguments: tuple[Any, ...], *, stored: bool) -> jax.stages.Compiled:
        if self._cache is None:
            return jax.jit(self._function, **self._options).lower(*arguments).compile()
        run = self._cache.compiled if stored else self._cache.build
        return run(self._function, arguments, identity=self._identity, types=self._types, **self._options)


def compile_together(
    calls: Sequence[tuple[StoredFunction, Sequence[Any]]], *, progress: Callable[[int, int], None] | None = None
) -> None:
    """Compile functions for arguments, several at once. Of several processes, all call this with the same functions.

    Args:
      progress: called with the numbers of functions done and in all.
    """
    report, several = progress or _no_report, jax.process_count() > 1
    report(0, len(calls))
    if several:  # they agree before threads change the order
        executables = [function.load(*arguments) for function, arguments in calls]
        agreed = everywhere([executable is not None for executable in executables])
        for (function, arguments), executable, all_have_it in zip(calls, executables, agreed, strict=True):
            if all_have_it and executable is not None:
                function.use(executable, *arguments)
    with ThreadPoolExecutor(TOGETHER, thread_name_prefix="compile") as pool:
        jobs = [pool.submit(function.compiled, *arguments, stored=not several) for function, arguments in calls]
        for done, job in enumerate(as_completed(jobs), start=1):
            job.result()
            report(done, len(calls))


def _key(arguments: Sequence[Any]) -> Any:
    leaves, structure = jax.tree.flatten(tuple(arguments))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)  # a placement costs 20 µs a leaf


def _no_report(done: int, total: int) -> None:
    pass
