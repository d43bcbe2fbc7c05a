"""``stepjax serve``: answer over HTTP with the APIs of OpenAI and Anthropic."""

from __future__ import annotations

import argparse
import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from stepjax.errors import RequestError
from stepjax.infer.commands.options import (
    add_engine_arguments,
    add_model_arguments,
    checked_folder,
    open_session,
    printable,
)
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.watchdog import process_and_leader
from stepjax.startup import StartLines, Startup

if TYPE_CHECKING:
    from stepjax.adapters.lora import LoraConfig
    from stepjax.checkpoint.folder import ModelFolder
    from stepjax.infer.engine.config import EngineConfig
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.engine.followers import OrderHandlers
    from stepjax.infer.serve.api import ServeOptions
    from stepjax.infer.serve.extension import Extension
    from stepjax.infer.serve.server import Gate, Server
    from stepjax.infer.serve.service import Service
    from stepjax.infer.session import Session

log = logging.getLogger(__name__)

KEY_VARIABLE = "STEPJAX_API_KEY"
SWITCH_S = 0.0005  # between threads, so that the engine's does not wait for a parser
DEFAULT_LORAS = 4  # slots for adapters that clients load, unless --max-loras is given


class Addition(NamedTuple):
    """What a later room adds to the server, of its model and engine."""

    # (arguments, model, service, options) → more paths
    extend: Callable[[argparse.Namespace, Session, Service, ServeOptions], Extension]
    orders: Callable[[Session], OrderHandlers]  # for what it makes the processes do that follow process 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="MODEL", help="the same as --model")
    add_model_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    server.add_argument(
        "--port", type=int, default=8000, help="port to listen on; 0 takes any free port (default: %(default)s)"
    )
    server.add_argument(
        "--served-model-name",
        action="append",
        metavar="NAME",
        help="name of the model for clients; may be repeated (default: that of --model)",
    )
    server.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help=f"a key that clients must send; may be repeated (default: ${KEY_VARIABLE}, or none)",
    )
    server.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with a key per line (default: none)")
    server.add_argument(
        "--cors-origin",
        action="append",
        metavar="ORIGIN",
        help="origin of web pages that may send requests, e.g. https://example.org; * is any (default: none)",
    )
    server.add_argument("--no-ui", action="store_true", help="serve no chat page at / (default: serve it)")
    server.add_argument("--tls-cert", metavar="FILE", help="PEM file of the certificate (default: plain HTTP)")
    server.add_argument("--tls-key", metavar="FILE", help="PEM file of the certificate's key (default: none)")
    server.add_argument(
        "--drain-seconds",
        type=float,
        default=30,
        metavar="S",
        help="time for running answers to end after SIGTERM (default: %(default)s)",
    )
    server.add_argument(
        "--log-format",
        default="text",
        choices=("text", "json"),
        help="format of the log on stderr (default: %(default)s)",
    )
    server.add_argument(
        "--log-level",
        default="info",
        choices=("debug", "info", "warning", "error"),
        help="least level that is logged (default: %(default)s)",
    )
    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-seqs", type=int, default=16, metavar="N", help="answers that run together (default: %(default)s)"
    )
    engine.add_argument(
        "--max-queue", type=int, default=1024, metavar="N", help="answers that may wait (default: %(default)s)"
    )
    engine.add_argument(
        "--scheduling-policy",
        default="fcfs",
        choices=("fcfs", "priority"),
        help="order of requests: as they arrive, or by the priority that clients give (default: %(default)s)",
    )
    engine.add_argument("--context", type=int, metavar="N", help="tokens of the longest sequence (default: what fits)")
    add_engine_arguments(engine)
    engine.add_argument(
        "--host-cache-gib",
        type=float,
        default=0,
        metavar="X",
        help="host memory of each process for prefixes that the device's cache has no room for (default: %(default)s)",
    )
    engine.add_argument(
        "--lora",
        action="append",
        metavar="NAME=PATH",
        help="serve a PEFT folder under this name; may be repeated (default: none)",
    )
    engine.add_argument(
        "--max-loras", type=int, metavar="N", help="adapters that may be loaded at once (default: those of --lora)"
    )
    engine.add_argument(
        "--max-lora-rank", type=int, metavar="R", help="largest rank of an adapter (default: that of --lora, or 32)"
    )
    engine.add_argument(
        "--allow-lora-updates",
        action="store_true",
        help="let clients load adapters from folders of this machine (default: no)",
    )
    engine.add_argument(
        "--speculate", type=int, metavar="K", help="MTP drafts per step, 0 to 3 (default: chosen by load)"
    )
    engine.add_argument(
        "--move-experts",
        type=int,
        metavar="STEPS",
        help="with --expert-slots: count which experts each STEPS steps choose, and move the copies of the busiest to "
        "where they are needed (default: copies stay where they were loaded)",
    )
    engine.add_argument(
        "--prefill-mesh",
        metavar="AXES",
        help="compute prompts on a mesh of their own; with --decode-mesh, in place of --mesh (default: one for both)",
    )
    engine.add_argument(
        "--decode-mesh",
        metavar="AXES",
        help="the mesh of answers, on the devices after those of --prefill-mesh (default: one mesh for both)",
    )


def run(args: argparse.Namespace, addition: Addition | None = None) -> int:
    """Serve until a signal ends the server. Of several processes the first one serves; the others carry out the orders
    of its engine.
    """
    args.model = args.name or args.model
    keys = _keys(args)
    _check_tls(args)
    _meshes(args)
    folder = checked_folder(args.model, mtp_from=args.mtp_from)
    from stepjax.infer.serve.middleware import ApiKeys
    from stepjax.infer.serve.server import Gate, Server, ServerConfig, log_to_stderr

    log_to_stderr(args.log_format, args.log_level)
    startup = Startup(StartLines(log.info))
    process, _ = process_and_leader()
    if process:
        return _follow(args, folder, startup, addition)
    gate = Gate(startup, ApiKeys(keys))
    config = ServerConfig(args.host, args.port, args.drain_seconds, tls_cert=args.tls_cert, tls_key=args.tls_key)
    server = Server(gate, None, config)
    sys.setswitchinterval(SWITCH_S)

    async def serve() -> tuple[int, Service | None]:
        starting = asyncio.ensure_future(_start(args, folder, keys, startup, gate, server, addition))
        code = await server.run_until_ended()
        starting.cancel()
        return code, await starting if starting.done() and not starting.cancelled() else None

    code, service = asyncio.run(serve())
    if service is not None and service.engine.programs.compiling:
        # It cannot be stopped, and must not meet an interpreter that is taken apart.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(code)
    return code


async def _start(
    args: argparse.Namespace,
    folder: ModelFolder,
    keys: list[str],
    startup: Startup,
    gate: Gate,
    server: Server,
    addition: Addition | None,
) -> Service:
    """Load the model while the server answers health checks, then let it answer requests. Ends the server if it
    fails.
    """
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        log.info("listening on %s; /health says 200 once requests are answered", server.url)
        session, prefill = await asyncio.to_thread(_sessions, args, startup, folder)
        with startup.stage("building", "building the engine"):
            engine = await asyncio.to_thread(_engine, args, session, prefill)
            from stepjax.infer.serve.api import ServeOptions
            from stepjax.infer.serve.app import create_app
            from stepjax.infer.serve.metrics import ServerMetrics
            from stepjax.infer.serve.middleware import ApiKeys
            from stepjax.infer.serve.service import Service

        options = ServeOptions(
            _served_names(args),
            ApiKeys(keys),
            tuple(args.cors_origin or ()),
            ui=not args.no_ui,
            adapter_updates=args.allow_lora_updates,
            priorities=args.scheduling_policy == "priority",
        )
        service = Service(engine, ServerMetrics(engine, options.names[0]), startup)
        server.attach(service)
        extensions = ()
        if addition is not None:
            extensions = (await asyncio.to_thread(addition.extend, args, session, service, options),)
        await gate.open(create_app(service, session, options, extensions))
        await service.ready.wait()
    except BaseException:
        server.should_exit = True
        raise
    log.info("ready after %.1f s", startup.seconds)
    _announce(server.url, session, engine, options)
    return service


def _meshes(args: argparse.Namespace) -> tuple[MeshSpec, MeshSpec] | None:
    """Those of prompts and of answers, if they are apart."""
    if args.move_experts is not None and args.prefill_mesh is not None:
        raise RequestError("--move-experts: the experts of two meshes do not move; leave --prefill-mesh out")
    if args.move_experts is not None and args.expert_slots is None:
        raise RequestError("--move-experts: each expert has one place; give more places with --expert-slots")
    if args.prefill_mesh is None and args.decode_mesh is None:
        return None
    if args.prefill_mesh is None or args.decode_mesh is None or args.mesh is not None:
        raise RequestError("--prefill-mesh and --decode-mesh: expected both, without --mesh, or none of them")
    meshes = MeshSpec.parse(args.prefill_mesh), MeshSpec.parse(args.decode_mesh)
    if process_and_leader()[1]:
        raise RequestError("--prefill-mesh and --decode-mesh: one process drives both; give --mesh to several")
    if any(-1 in mesh.sizes.values() for mesh in meshes):
        raise RequestError("--prefill-mesh and --decode-mesh: leave an axis open, expected the size of each")
    return meshes


def _sessions(args: argparse.Namespace, startup: Startup, folder: ModelFolder) -> tuple[Session, Session | None]:
    """The model, and if prompts have a mesh of their own the model there."""
    meshes = _meshes(args)
    if meshes is None:
        return open_session(args, startup=startup, folder=folder), None
    prefill, decode = meshes
    session = open_session(args, startup=startup, folder=folder, mesh=decode, first_device=prefill.num_devices)
    return session, open_session(args, startup=startup, folder=folder, mesh=prefill)


def _engine(args: argparse.Namespace, session: Session, prefill: Session | None) -> Engine:
    """The engine, with the adapters of the command line."""
    from stepjax.infer.engine.engine import open_engine

    given = GivenAdapters.read(args, session, _served_names(args))
    kind, make = _engine_kind(args, prefill)
    config = _engine_config(args, given, make)
    _, host = process_and_leader()
    if host:
        engine = open_engine(session, config, host=host, kind=kind)
        assert engine is not None, "this is process 0"
    else:
        engine = kind(session, config)
    for name, (factors, lora) in given.adapters.items():
        engine.load_adapter(name, factors, lora)
    return engine


def _engine_kind(args: argparse.Namespace, prefill: Session | None) -> tuple[Any, Callable[..., EngineConfig]]:
    """The class of the engine, and what makes its settings."""
    from stepjax.infer.balanced_engine import BalancedConfig, BalancedEngine
    from stepjax.infer.engine.config import EngineConfig
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.separate_meshes import SeparateConfig, SeparateEngine

    if args.move_experts is not None:
        return BalancedEngine, functools.partial(BalancedConfig, move_every=args.move_experts)
    if prefill is not None:
        return SeparateEngine, functools.partial(SeparateConfig, prefill=prefill)
    return Engine, EngineConfig


def _engine_config(args: argparse.Namespace, given: GivenAdapters, make: Callable[..., EngineConfig]) -> EngineConfig:
    routing = getattr(args, "routing", False)  # what a later room asks for
    return make(
        num_slots=args.max_seqs,
        context=args.context,
        cache_bytes=None if args.cache_gib is None else int(args.cache_gib * 2**30),
        host_cache_bytes=int(args.host_cache_gib * 2**30),
        num_snapshots=0 if args.no_prefix_cache or args.deterministic or routing else None,
        speculate=args.speculate,
        **given.room(args),
        max_waiting=args.max_queue,
        deterministic=args.deterministic,
        routing=routing,
    )


def _follow(args: argparse.Namespace, folder: ModelFolder, startup: Startup, addition: Addition | None) -> int:
    """Carry out what process 0 orders, until its server ends."""
    _, host = process_and_leader()
    # Launchers send these to all processes: process 0 drains, and then ends this one.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: log.info("%s: process 0 ends this one", signal.Signals(number).name))
    session, _ = _sessions(args, startup, folder)
    from stepjax.infer.engine.engine import open_engine

    given = GivenAdapters.read(args, session, _served_names(args))
    log.info("process %d follows process 0 on %s", *process_and_leader())
    others = None if addition is None else addition.orders(session)
    _, make = _engine_kind(args, None)
    open_engine(session, _engine_config(args, given, make), host=host, others=others)
    return 0


def _served_names(args: argparse.Namespace) -> tuple[str, ...]:
    return tuple(args.served_model_name or [Path(args.model).name if Path(args.model).is_dir() else args.model])


@dataclass(frozen=True)
class GivenAdapters:
    """The adapters of the command line, by name."""

    adapters: dict[str, tuple[Mapping[str, Any], LoraConfig]]

    @classmethod
    def read(cls, args: argparse.Namespace, session: Session, names: tuple[str, ...]) -> GivenAdapters:
        from stepjax.adapters.peft import import_adapter

        adapters: dict[str, tuple[Mapping[str, Any], LoraConfig]] = {}
        for text in args.lora or ():
            name, _, path = text.partition("=")
            if not name or not path:
                raise RequestError(f"--lora: is {text!r}, expected NAME=PATH")
            if name in adapters or name in names:
                raise RequestError(f"--lora: the name {name!r} is taken; choose another")
            adapters[name] = import_adapter(path, session.config)
        return cls(adapters)

    def room(self, args: argparse.Namespace) -> dict[str, Any]:
        """The fields of the engine's configuration that concern adapters."""
        slots = args.max_loras
        if slots is None:
            slots = len(self.adapters) or (DEFAULT_LORAS if args.allow_lora_updates else 0)
        if slots < len(self.adapters):
            raise RequestError(f"--max-loras: is {slots}, but {len(self.adapters)} adapters are given")
        if args.allow_lora_updates and not slots:
            raise RequestError("--allow-lora-updates: there is no slot for an adapter; give --max-loras")
        ranks: dict[bool, list[int]] = {True: [], False: []}
        for factors, _ in self.adapters.values():
            for name, value in factors.items():
                if name.endswith(".a"):
                    ranks[".experts." in name].append(value.shape[-2])
        rank = args.max_lora_rank or max(ranks[False] or ranks[True] or [32])
        return {
            "adapter_slots": slots,
            "adapter_rank": rank,
            "adapter_expert_rank": None if args.max_lora_rank else max(ranks[True], default=None),
        }


def _keys(args: argparse.Namespace) -> list[str]:
    """All keys that the flags, the file and the environment name."""
    keys: list[str] = list(args.api_key or ())
    if args.api_key_file is not None:
        try:
            keys += args.api_key_file.read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(f"{args.api_key_file}: cannot be read ({error})") from None
        if not keys:
            raise RequestError(f"{args.api_key_file}: holds no key, expected one per line")
    if os.environ.get(KEY_VARIABLE):
        keys.append(os.environ[KEY_VARIABLE])
    if any(not key.isascii() or not key.isprintable() or " " in key or not key for key in keys):
        raise RequestError(
            "an API key is empty or holds characters that a header cannot; expected ASCII without spaces"
        )
    return keys


def _check_tls(args: argparse.Namespace) -> None:
    if bool(args.tls_cert) != bool(args.tls_key):
        raise RequestError("--tls-cert and --tls-key: expected both or none")
    for file in filter(None, (args.tls_cert, args.tls_key)):
        if not Path(file).is_file():
            raise RequestError(f"{file}: no such file")


def _announce(url: str, session: Session, engine: Engine, options: ServeOptions) -> None:
    """Print the banner."""
    import jax

    size, mesh = engine.executor.size, getattr(session.model.layout, "mesh", None)
    layout = session.model.layout.describe()
    split = "" if mesh is None else f", mesh {layout['mesh']} {layout['strategy']}"
    prefiller = getattr(engine.executor, "prefiller", None)
    if prefiller is not None:
        split += f", prompts on {prefiller.runner.model.layout.describe()['mesh']}"
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(session.params))
    body = f'{{"model": "{options.names[0]}", "messages": [{{"role": "user", "content": "What is 467 + 358?"}}]}}'
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if options.keys else ""
    devices = f"{1 if mesh is None else mesh.size} × {jax.local_devices()[0].device_kind}{split}"
    lines = (
        f"{', '.join(map(printable, options.names))} on {devices}",
        f"  weights {weights / 2**30:,.2f} GiB, cache {engine.executor.cache_bytes / 2**30:,.2f} GiB a device",
        *((f"  host memory for prefixes {size.host_bytes / 2**30:,.2f} GiB",) if size.host_bytes else ()),
        f"  {size.all_slots} answers together, context {size.context:,} tokens",
        f"  {url}",
        *((f"  {url}/ in a browser is a page to chat on",) if options.ui else ()),
        f"  curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'",
    )
    print("\n".join(lines), flush=True)
