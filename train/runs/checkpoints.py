"""The checkpoints of a run: written whole or not at all, and taken up from the newest that is not damaged."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from stepjax.errors import CheckpointError
from stepjax.sharding.orbax_errors import DamagedError, orbax_reason, quiet_orbax, reading
from stepjax.train.runs.digest import host_digest

T = TypeVar("T")

DIGEST = "digest"  # of the arrays, in a checkpoint's description


class Checkpoints:
    """The folder ``checkpoints`` of a run. A context manager; every process of the run makes one."""

    def __init__(self, out: Path, *, keep: int, also: Callable[[], int] = lambda: 0):
        """
        Args:
          keep: newest checkpoints that are kept; 0: all.
          also: returns the step of one more that is kept; 0: none.
        """
        self._out, self._folder, self._keep, self._also = out, out / "checkpoints", keep, _OneMore(also)
        quiet_orbax()
        self._manager = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return [int(checkpoint.step) for checkpoint in self._manager.checkpoints]

    def resume(self, initial: T, *, check: Callable[[Mapping[str, Any]], None] = lambda about: None) -> T:
        """The newest checkpoint that can be read, with the shardings of ``initial``; ``initial`` if there is none.

        Damaged ones that are newer move to the folder ``damaged`` of the run, and stderr says so.

        Args:
          check: raises an error if a checkpoint's description does not fit the run.

        Raises:
          CheckpointError: all are damaged, or the newest is and several processes run.
        """
        damaged: dict[int, str] = {}
        state: T | None = None
        for step in reversed(self.steps):
            try:
                state = self._load(step, initial, check)
                break
            except DamagedError as error:
                damaged[step] = error.reason
        if not damaged:
            return initial if state is None else state
        newest, reason = next(iter(damaged.items()))
        if state is None or jax.process_count() > 1:
            raise CheckpointError(
                f"{self._folder / str(newest)}: the checkpoint is damaged ({reason})"
                + ("; so are all before it" if len(damaged) > 1 else "")
                + "; move it out of the folder to continue from the one before, or begin again in another folder"
            )
        self._set_aside(damaged)
        steps = self.steps
        names = ", ".join(f"{step} ({reason})" for step, reason in damaged.items())
        print(
            f"stepjax: {self._folder}: damaged: {names}; moved to {self._out / 'damaged'}; the run continues from the "
            f"checkpoint of step {steps[-1]}",
            file=sys.stderr,
        )
        return state

    def load(self, step: int, like: T) -> T:
        """The checkpoint of ``step`` with the shardings of ``like``. CheckpointError: it cannot be read."""
        return self._load(step, like, lambda about: None)

    def save(self, step: int, state: Any, about: Mapping[str, Any]) -> None:
        """Write the checkpoint of ``step``. After an error the checkpoints that were there are as they were.

        Raises:
          CheckpointError: it cannot be written, because the disk is full or may not be written to.
        """
        about = dict(about) | {DIGEST: host_digest(state)}
        try:
            self._manager.save(step, state, custom_metadata=about)
        except Exception as error:  # orbax and tensorstore report a full disk as ValueError
            self._discard(step)
            raise CheckpointError(
                f"{self._folder / str(step)}: the checkpoint cannot be written ({orbax_reason(error)}); {self.kept()}"
            ) from None

    def kept(self) -> str:
        """What a later run can begin with, as a part of a message."""
        steps = [int(path.name) for path in self._folder.glob("[0-9]*") if path.name.isdecimal()]
        if not steps:
            return "there is no checkpoint yet"
        return f"{self._folder / str(max(steps))} is the last one, from which the same command continues"

    def close(self) -> None:
        with contextlib.suppress(Exception):  # what failed was reported by `save`
            self._manager.close()

    def _open(self) -> Any:
        policies: Any = ocp.training.preservation_policies
        kept = policies.AnyPreservationPolicy([policies.LatestN(self._keep or None), self._also])  # None: all
        try:
            return ocp.training.Checkpointer(str(self._folder), preservation_policy=kept, cleanup_tmp_directories=True)
        except OSError as error:
            raise CheckpointError(f"{self._folder}: cannot be opened ({error.strerror or error})") from None

    def _load(self, step: int, initial: T, check: Callable[[Mapping[str, Any]], None]) -> T:
        with reading(self._folder / str(step)):
            about = self._manager.metadata(step).custom_metadata
            if not about:
                raise ValueError("its description is missing")
            check(about)
            shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), initial)
            state = jax.tree.map(_committed_alike, self._manager.load(step, shapes), initial)
            wanted, digest = about.get(DIGEST), host_digest(state)
            if wanted and digest and wanted != digest:
                raise ValueError("its arrays are not those that were written")
        return state

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        self.close()
        for step in damaged:
            target = self._out / "damaged" / str(step)
            target.parent.mkdir(exist_ok=True)
            for number in range(1, 10**6):
                if not target.exists():
                    break
                target = target.with_name(f"{step}-{number}")
            (self._folder / str(step)).rename(target)
        self._manager = self._open()

    def _discard(self, step: int) -> None:
        """Remove what a failed save left, which may fill the disk."""
        for part in self._folder.glob(f"{step}.*"):
            shutil.rmtree(part, ignore_errors=True)


class _OneMore:
    """A rule of orbax that keeps the checkpoint of one step."""

    def __init__(self, step: Callable[[], int]):
        self._step = step

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [checkpoint.step == self._step() for checkpoint in checkpoints]


def _committed_alike(array: jax.Array, like: jax.Array) -> jax.Array:
    """Restored arrays are bound to their device. An executable for arrays that are not is stored under another name."""
    return array if like.committed else jnp.asarray(np.asarray(array))
