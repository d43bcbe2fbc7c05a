"""Executables that are kept between runs, so that a warm start does not trace, lower or compile.

The name of an entry is a digest of all that its executable depends on: our sources, the versions of jax and of the
device's plugin, the devices, flags and settings, and the program with its arguments' shapes and placements. It is
known before anything is traced. An entry that is damaged, or that this jax cannot load, is removed and compiled again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import re
import secrets
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.serialize_executable import deserialize_and_load, serialize

from stepjax.cache_folder import MAX_GIB, CacheFolder

log = logging.getLogger(__name__)

SUFFIX = ".program"
MAGIC = b"stepjax program 1\n"
_HEAD = struct.Struct(">II")  # bytes of the outline and of the payload
_DIGEST = hashlib.sha256
# Settings of logging and of folders, which change no program.
_IRRELEVANT = re.compile(r"cache|log|dump|traceback|distributed|captured_constants|coordina|proxy|check_tracer_leaks")
_VARIABLES = (
    "XLA_FLAGS",
    "LIBTPU_INIT_ARGS",
    "TF_XLA_FLAGS",
    "NVIDIA_TF32_OVERRIDE",
    "CUDA_VISIBLE_DEVICES",
    "STEPJAX_KERNELS",
)


class ProgramCache:
    """Compiles programs, or loads those that an earlier run has compiled."""

    def __init__(self, folder: CacheFolder, *, max_bytes: int = int(MAX_GIB * 2**30)):
        self._folder, self._max_bytes = folder, max_bytes

    @classmethod
    def open(cls, *, max_gib: float = MAX_GIB) -> ProgramCache | None:
        """The user's cache; None if no folder can be trusted. Of several processes each has a folder, or none has."""
        folder = CacheFolder.open("programs")
        if not everywhere([folder is not None])[0] or folder is None:
            return None
        return cls(folder, max_bytes=int(max_gib * 2**30))

    def compiled(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        *,
        identity: str,
        types: Iterable[type] = (),
        **options: Any,
    ) -> jax.stages.Compiled:
        """``function``, jitted with ``options``, for arguments of these shapes.

        Of several processes all call this at the same point. They compile unless each of them has the entry.

        Args:
          identity: what the function depends on beside our sources and its arguments: its name, closure, donation.
          types: NamedTuples in its result that are no argument's.
        """
        executable = self.load(arguments, identity=identity, types=types)
        if everywhere([executable is not None])[0] and executable is not None:
            return executable
        return self.build(function, arguments, identity=identity, types=types, **options)

    def load(
        self, arguments: Sequence[Any], *, identity: str, types: Iterable[type] = ()
    ) -> jax.stages.Compiled | None:
        """The executable of an earlier run, of this process alone; None if there is none."""
        name = digest(identity, arguments) + SUFFIX
        executable = self._load(name, arguments, {kind.__name__: kind for kind in types})
        if executable is not None:
            log.debug("program cache: loaded %s", name)
        return executable

    def build(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        *,
        identity: str,
        types: Iterable[type] = (),
        **options: Any,
    ) -> jax.stages.Compiled:
        """Compile, and keep the executable for later runs."""
        name = digest(identity, arguments) + SUFFIX
        compiled = _compile_anew(function, arguments, options)
        log.debug("program cache: compiled %s", name)
        self._save(name, compiled, arguments, {kind.__name__: kind for kind in types})
        return compiled

    def _load(self, name: str, arguments: Sequence[Any], types: dict[str, type]) -> jax.stages.Compiled | None:
        content = self._folder.read(name)
        if content is None:
            return None
        try:
            outline, payload = _unpack(name, content)
            out = _filled(outline, arguments, types)
            return deserialize_and_load(
                zlib.decompress(payload),
                jax.tree.structure((tuple(arguments), {})),
                jax.tree.structure(out),
                execution_devices=_devices(arguments),
            )
        except Exception as error:  # compiling is always possible
            log.warning("program cache: %s cannot be used (%s: %s); compiling", name, type(error).__name__, error)
            self._folder.remove(name)
            return None

    def _save(self, name: str, compiled: jax.stages.Compiled, arguments: Sequence[Any], types: dict[str, type]) -> None:
        try:
            payload, _, out_tree = serialize(compiled)
            outline = _outline(jax.tree.unflatten(out_tree, [0] * out_tree.num_leaves), arguments, types)
        except Exception as error:  # a plugin that cannot serialise: the program works without
            log.warning("program cache: a program cannot be kept (%s: %s)", type(error).__name__, error)
            return
        if self._folder.write(name, _pack(name, outline, zlib.compress(payload, 1))):
            self._folder.trim(self._max_bytes)


def compile_program(
    cache: ProgramCache | None,
    function: Callable[..., Any],
    arguments: Sequence[Any],
    *,
    identity: str,
    types: Iterable[type] = (),
    **options: Any,
) -> jax.stages.Compiled:
    """`ProgramCache.compiled`, or a plain compilation without a cache."""
    if cache is None:
        return jax.jit(function, **options).lower(*arguments).compile()
    return cache.compiled(function, arguments, identity=identity, types=types, **options)


def _compile_anew(
    function: Callable[..., Any], arguments: Sequence[Any], options: dict[str, Any]
) -> jax.stages.Compiled:
    """A compilation whose result can be serialised.

    On CPUs an executable that came out of XLA's own cache loses its code when it is serialised again: it loads, and
    fails when it is called ("Function … not found", jaxlib 0.10.2). There the program gets a name of its own, which
    that cache has not met, and what the cache makes of it is removed.
    """
    if jax.default_backend() != "cpu":
        return jax.jit(function, **options).lower(*arguments).compile()
    token = secrets.token_hex(8)

    def run(*arguments: Any) -> Any:
        return function(*arguments)

    run.__name__ = run.__qualname__ = f"{function.__name__}_{token}"
    compiled = jax.jit(run, **options).lower(*arguments).compile()
    if folder := jax.config.values["jax_compilation_cache_dir"]:
        for path in Path(folder).glob(f"*{token}*"):
            path.unlink(missing_ok=True)
    return compiled


def everywhere(flags: Sequence[bool]) -> list[bool]:
    """Whether each flag is set on all processes, which call this at the same point with as many flags.

    A single process looks for no devices here: how many virtual ones there are may still be open.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return list(flags)
    from jax.experimental import multihost_utils

    of_all = np.asarray(multihost_utils.process_allgather(np.asarray(flags, bool)))
    return [bool(column.all()) for column in of_all.T]


def digest(identity: str, arguments: Sequence[Any]) -> str:
    """The name of a program for arguments of these shapes, dtypes and placements."""
    leaves, tree = jax.tree.flatten(tuple(arguments))
    parts = [_environment(), _settings(), identity, str(tree), *map(_described, leaves)]
    parts.append(str([(device.id, device.process_index) for device in _devices(arguments)]))
    return _DIGEST("\0".join(parts).encode()).hexdigest()


def _described(leaf: Any) -> str:
    """The properties of an argument that a program depends on."""
    where = getattr(leaf, "sharding", None)
    committed = where if getattr(leaf, "committed", where is not None) else None
    return f"{leaf.shape} {leaf.dtype} {getattr(leaf, 'weak_type', False)} {committed!r}"


def _devices(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The devices of a program, in the order of its mesh."""
    for leaf in jax.tree.leaves(arguments):
        where = getattr(leaf, "sharding", None)
        if isinstance(where, jax.sharding.NamedSharding) and isinstance(where.mesh, jax.sharding.Mesh):
            return tuple(where.mesh.devices.flat)
        if where is not None:
            return tuple(sorted(where.device_set, key=lambda device: device.id))
    return (jax.devices()[0],)


@functools.cache
def _environment() -> str:
    """What is constant in a process: sources, versions, devices, flags."""
    device = jax.devices()[0]
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "numpy", "libtpu")}
    parts = {
        "sources": sources_digest(),
        "python": sys.version,
        "versions": versions,
        "platform": (device.platform, device.client.platform_version, device.device_kind),
        "devices": [(device.id, device.process_index, device.device_kind) for device in jax.devices()],
        "processes": (jax.process_count(), jax.process_index()),
        "processor": _processor() if device.platform == "cpu" else platform.machine(),
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
    }
    return json.dumps(parts, sort_keys=True, default=str)


def _settings() -> str:
    """jax's settings that tracing and compiling may read."""
    return str(sorted((name, str(value)) for name, value in jax.config.values.items() if not _IRRELEVANT.search(name)))


@functools.cache
def sources_digest() -> str:
    """A digest of every source file of this package."""
    total = _DIGEST()
    root = Path(__file__).parent
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(files):
            if name.endswith(".py"):
                path = Path(folder, name)
                total.update(f"{path.relative_to(root)}\0".encode() + _DIGEST(path.read_bytes()).digest())
    return total.hexdigest()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The instructions that a program for this processor may use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    fields = ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "CPU part")
    first = text.split("\n\n", 1)[0].splitlines()
    kept = sorted(line for line in first if line.partition(":")[0].strip() in fields)
    return "\n".join([platform.machine(), str(os.cpu_count()), *kept])


def _pack(name: str, outline: Any, payload: bytes) -> bytes:
    head = json.dumps([name, outline]).encode()
    body = _HEAD.pack(len(head), len(payload)) + head + payload
    return MAGIC + _DIGEST(body).digest() + body


def _unpack(name: str, content: bytes) -> tuple[Any, bytes]:
    """The outline and the payload.

    Raises:
      ValueError: the content is not what was written under this name.
    """
    start = len(MAGIC) + _DIGEST().digest_size
    body = memoryview(content)[start:]
    if content[: len(MAGIC)] != MAGIC or _DIGEST(body).digest() != content[len(MAGIC) : start]:
        raise ValueError("the entry is damaged")
    head_bytes, payload_bytes = _HEAD.unpack_from(body)
    head = bytes(body[_HEAD.size : _HEAD.size + head_bytes])
    written, outline = json.loads(head)
    if written != name:
        raise ValueError("the entry was written under another name")
    return outline, bytes(body[_HEAD.size + head_bytes :][:payload_bytes])


def _outline(tree: Any, arguments: Sequence[Any], types: dict[str, type]) -> Any:
    """The structure of a result as JSON. A leaf is 0; a part with the structure of an argument is its number.

    Raises:
      TypeError: it holds a node of another type.
    """
    if tree is None or type(tree) is int:
        return tree
    structure = jax.tree.structure(tree)
    for number, argument in enumerate(arguments):
        if structure == jax.tree.structure(argument):
            return {"argument": number}
    if isinstance(tree, dict):
        return {"dict": [[key, _outline(value, arguments, types)] for key, value in tree.items()]}
    kind = type(tree).__name__
    if type(tree) not in (tuple, list, types.get(kind)):
        raise TypeError(f"{kind} is not known to the cache")
    return {"type": kind, "items": [_outline(item, arguments, types) for item in list(tree)]}


def _filled(outline: Any, arguments: Sequence[Any], types: dict[str, type]) -> Any:
    """The structure that `_outline` described."""
    if outline is None or outline == 0:
        return outline
    if "argument" in outline:
        return arguments[outline["argument"]]
    if "dict" in outline:
        return {key: _filled(value, arguments, types) for key, value in outline["dict"]}
    items = [_filled(item, arguments, types) for item in outline["items"]]
    if outline["type"] in ("tuple", "list"):
        return tuple(items) if outline["type"] == "tuple" else items
    return types[outline["type"]](*items)
