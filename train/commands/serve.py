"""``stepjax serve``: the server of `stepjax.infer.commands.serve`; with ``--train`` a training service beside it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from stepjax.errors import RequestError
from stepjax.infer.commands import serve

if TYPE_CHECKING:
    from stepjax.infer.engine.followers import OrderHandlers
    from stepjax.infer.serve.api import ServeOptions
    from stepjax.infer.serve.service import Service
    from stepjax.infer.session import Session
    from stepjax.train.service.extension import TrainingExtension

TRAIN_SLOTS = 8  # adapters that answer together, unless --max-loras is given
RANK = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    serve.add_arguments(parser)
    group = parser.add_argument_group("training service")
    group.add_argument(
        "--train",
        action="store_true",
        help="let clients of the Tinker API train and sample adapters of the model (default: no)",
    )
    group.add_argument(
        "--train-folder",
        type=Path,
        metavar="FOLDER",
        help="where the service keeps what it trains (default: stepjax-train-PORT in the current folder)",
    )
    group.add_argument(
        "--train-models",
        type=int,
        default=16,
        metavar="N",
        help="models that a key may train at once (default: %(default)s)",
    )
    group.add_argument(
        "--train-tokens-per-minute",
        type=int,
        default=0,
        metavar="N",
        help="tokens that a key may train in a minute; 0: no limit (default: %(default)s)",
    )
    group.add_argument(
        "--train-disk-gib",
        type=float,
        default=0,
        metavar="X",
        help="size of a key's checkpoints; 0: no limit (default: %(default)s)",
    )
    group.add_argument(
        "--train-replay",
        action="store_true",
        help="keep the experts of sampled tokens and train with them (router replay); turns off the prefix cache "
        "(default: no)",
    )


def run(args: argparse.Namespace) -> int:
    if not args.train:
        return serve.run(args)
    if args.layers == "looped":
        raise RequestError("--train: trains layers by name, which --layers looped does not have; leave it out")
    if args.move_experts is not None:
        raise RequestError("--train: trains with experts that stay where they lie; leave --move-experts out")
    args.layers = "unrolled"
    args.routing = args.train_replay
    if args.max_loras is None:
        args.max_loras = TRAIN_SLOTS + len(args.lora or ())
    args.max_lora_rank = args.max_lora_rank or RANK
    return serve.run(args, serve.Addition(_extension, _orders))


def _extension(
    args: argparse.Namespace, session: Session, service: Service, options: ServeOptions
) -> TrainingExtension:
    from stepjax.infer.commands.options import checked_folder
    from stepjax.train.service.extension import TrainingExtension
    from stepjax.train.service.limits import ServiceLimits
    from stepjax.train.service.training_service import TrainingService

    limits = ServiceLimits(
        args.train_models, args.max_lora_rank, args.train_tokens_per_minute, int(args.train_disk_gib * 2**30)
    )
    folder = args.train_folder or Path(f"stepjax-train-{args.port}")
    tokenizer = str(checked_folder(args.model).path)
    return TrainingExtension(
        TrainingService(session, service, options.names, folder=folder, limits=limits, tokenizer=tokenizer)
    )


def _orders(session: Session) -> OrderHandlers:
    from stepjax.train.service.devices.models import follower_orders

    return follower_orders(session)
