"""Several processes that run one command: who they are, how they find each other, how they start and leave.

Nothing here imports jax until the processes join, so that a bad setting is refused at once.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from stepjax.errors import ClusterError
from stepjax.sharding.listener import Listener, is_loopback
from stepjax.sharding.watchdog import Watchdog

SILENCE_S = 15  # after which the watchdog takes a process for lost
HEARTBEAT_S = 20  # after which jax would; it ends the process without a message
LOST_S = 2  # in which a process whose command failed may hear that another was lost, which ends it as that one's victim
JOIN_S = 300  # how long processes wait for each other at the start
FLAGS = ("coordinator", "processes", "process_id")

_LOCAL_RANKS = ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID")
_LOCAL_SIZES = ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE")
_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "COBALT_JOBID")
_BRACKET = r"\[\d+(?:[-x]\d+)?(?:,\d+(?:[-x]\d+)?)*\]"  # of a SLURM node list
_PORTS = range(61440, 65530, 2)  # of SLURM jobs, by job id; each takes a pair


@dataclass(frozen=True)
class ClusterSpec:
    """One process's place among those that run the same command."""

    coordinator: str  # host:port of process 0; its watchdog listens on the port after that
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None  # None: all devices of the host
    source: str = "flags"
    job: str = ""  # what tells the launcher's jobs apart, if there is such a thing

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65535:
            raise ClusterError(
                f"{self.source}: the coordinator is {self.coordinator!r}, expected HOST:PORT of process 0"
            )
        if self.num_processes < 1:
            raise ClusterError(f"{self.source}: {self.num_processes} processes, expected at least 1")
        if not 0 <= self.process_id < self.num_processes:
            last = self.num_processes - 1
            raise ClusterError(f"{self.source}: this is process {self.process_id}, expected one of 0 to {last}")

    @property
    def watch_address(self) -> tuple[str, int]:
        """Where process 0's watchdog listens."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port) + 1

    def key(self, environ: Mapping[str, str] = os.environ) -> bytes:
        """The key with which processes show each other that they are of one cluster: from STEPJAX_KEY, a secret.

        Without it the key comes from the launcher's job, which keeps out only processes that took a wrong address.
        """
        secret = environ.get("STEPJAX_KEY", "") or f"{self.job} of {self.num_processes}"
        return hashlib.sha256(b"stepjax cluster\0" + secret.encode(errors="surrogateescape")).digest()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several hosts", "detected under srun, mpirun and in indexed Kubernetes jobs")
    group.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="address of process 0, e.g. node0:8476 (default: detected, or one process)",
    )
    group.add_argument(
        "--processes", type=int, metavar="N", help="number of processes that run this command (default: detected, or 1)"
    )
    group.add_argument(
        "--process-id", type=int, metavar="I", help="index of this process, from 0 (default: detected, or 0)"
    )


def find(args: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> ClusterSpec | None:
    """The cluster that the flags name, else the one that the environment does; None if this process runs alone.

    Raises:
      ClusterError: a setting is missing, or two contradict each other.
    """
    flags = {name: value for name in FLAGS if (value := getattr(args, name, None)) is not None}
    if not flags:
        return detect(environ)
    if missing := [f"--{name.replace('_', '-')}" for name in FLAGS if name not in flags]:
        raise ClusterError(f"{' and '.join(missing)} missing: --coordinator, --processes and --process-id go together")
    return _unless_alone(ClusterSpec(args.coordinator, args.processes, args.process_id))


def detect(environ: Mapping[str, str]) -> ClusterSpec | None:
    """The cluster that variables describe: our own, an indexed Kubernetes job's, an MPI's or SLURM's.

    MPI goes before SLURM: in an allocation mpirun starts its daemons by srun, and the processes that these start
    inherit srun's variables, which count daemons. Under srun itself the variables of PMI are SLURM's own.
    """
    for look in (_own, _open_mpi, _hydra, _slurm, _pmi):
        if spec := look(environ):
            return _unless_alone(spec)
    if "STEPJAX_COORDINATOR" in environ:
        raise ClusterError(
            f"STEPJAX_COORDINATOR: is {environ['STEPJAX_COORDINATOR']!r}, but nothing says how many processes there "
            "are; set STEPJAX_PROCESSES and STEPJAX_PROCESS_ID, or start them by srun or mpirun"
        )
    return None


def refuse(verb: str, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to start a command in several processes that one process runs: each would write what the others do.

    Raises:
      ClusterError: there are several.
    """
    try:
        spec = detect(environ)
    except ClusterError:  # half a description: nothing started several
        if verb == "chat":
            raise
        return
    if spec:
        instead = "use generate" if verb == "chat" else "as one task (srun -n 1)"
        raise ClusterError(
            f"{verb}: runs in one process, found {spec.num_processes} ({spec.source}); start it without srun or "
            f"mpirun, or {instead}"
        )


def run(args: argparse.Namespace, command: Callable[[], int]) -> int:
    """Run a command as this process's part of its cluster; ``command`` turns errors into an exit code.

    Only process 0 writes to stdout. When one process fails or falls silent, all end: with the code of the failure
    there, with `stepjax.sharding.watchdog.EXIT_CODE` elsewhere.
    """
    spec = find(args)
    if spec is None:
        return command()
    _take_stdout(quiet=spec.process_id > 0)
    watchdog = Watchdog(
        spec.watch_address,
        spec.num_processes,
        spec.process_id,
        timeout_s=SILENCE_S,
        join_s=JOIN_S,
        key=spec.key(),
    )
    with watchdog as watch:
        _start(spec, mesh=getattr(args, "mesh", None))
        try:
            code = command()
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        if code:
            time.sleep(LOST_S)
            watch.give_up(f"process {spec.process_id} ended with exit code {code}")
            os._exit(code)  # jax would wait at its exit for processes that wait for this one
        import jax

        jax.distributed.shutdown()
    return code


def _start(spec: ClusterSpec, *, mesh: str | None) -> None:
    import jax

    from stepjax.sharding.devices import want_virtual_devices
    from stepjax.sharding.mesh import MeshSpec

    if mesh is not None and -1 not in (requested := MeshSpec.parse(mesh)).sizes.values():
        want_virtual_devices(max(1, requested.num_devices // spec.num_processes))
    host, _, port = spec.coordinator.rpartition(":")
    if spec.process_id == 0:  # jaxlib 0.10 may crash on a port that is taken
        Listener(host, int(port), 1).close()
    try:
        with _no_proxy():
            jax.distributed.initialize(
                spec.coordinator,
                spec.num_processes,
                spec.process_id,
                local_device_ids=None if spec.local_device_ids is None else list(spec.local_device_ids),
                initialization_timeout=JOIN_S,
                heartbeat_timeout_seconds=HEARTBEAT_S,
                coordinator_bind_address=spec.coordinator if is_loopback(host.strip("[]")) else None,
            )
    except (RuntimeError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise ClusterError(f"{spec.coordinator}: the processes did not find each other ({reason})") from error


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """The processes speak to each other directly; a download of weights later may need the proxy again."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
    try:
        yield
    finally:
        os.environ.update(taken)


def _take_stdout(*, quiet: bool) -> None:
    """Keep stdout for what the command prints: libraries below Python (gloo) write to its descriptor, too."""
    sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        kept = os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        output = os.devnull if quiet else kept
        sys.stdout = open(output, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def _unless_alone(spec: ClusterSpec) -> ClusterSpec | None:
    return spec if spec.num_processes > 1 else None


def _own(environ: Mapping[str, str]) -> ClusterSpec | None:
    """STEPJAX_COORDINATOR, STEPJAX_PROCESSES and the index that Kubernetes gives to a pod of an indexed job."""
    if "STEPJAX_PROCESSES" not in environ and not (
        "STEPJAX_PROCESS_ID" in environ or {"STEPJAX_COORDINATOR", "JOB_COMPLETION_INDEX"} <= environ.keys()
    ):
        return None
    index_name = "STEPJAX_PROCESS_ID" if "STEPJAX_PROCESS_ID" in environ else "JOB_COMPLETION_INDEX"
    return ClusterSpec(
        _text(environ, "STEPJAX_COORDINATOR", "HOST:PORT of process 0, as the pod's name behind a headless service"),
        _number(environ, "STEPJAX_PROCESSES"),
        _number(environ, index_name),
        source=f"STEPJAX_COORDINATOR, STEPJAX_PROCESSES, {index_name}",
    )


def _slurm(environ: Mapping[str, str]) -> ClusterSpec | None:
    """A job step: srun sets SLURM_STEP_ID, sbatch and salloc alone do not."""
    if "SLURM_STEP_ID" not in environ or "SLURM_STEP_NODELIST" not in environ:
        return None
    count = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    shared = not re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    step = _number(environ, "SLURM_STEP_ID")  # of a job there may be several at a time
    port = _PORTS[(_number(environ, "SLURM_JOB_ID") + step) % len(_PORTS)]
    return ClusterSpec(
        environ.get("STEPJAX_COORDINATOR") or f"{first_host(environ['SLURM_STEP_NODELIST'])}:{port}",
        _number(environ, count),
        _number(environ, "SLURM_PROCID"),
        _device(environ, "SLURM_LOCALID") if shared else None,
        source=f"SLURM ({count}, SLURM_PROCID)",
        job=f"SLURM {environ['SLURM_JOB_ID']}.{step}",
    )


def _open_mpi(environ: Mapping[str, str]) -> ClusterSpec | None:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return None
    size = _number(environ, "OMPI_COMM_WORLD_SIZE")
    shared = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE") > 1
    return ClusterSpec(
        (environ.get("STEPJAX_COORDINATOR") or _launcher(environ)) if size > 1 else "localhost:1",
        size,
        _number(environ, "OMPI_COMM_WORLD_RANK"),
        _device(environ, "OMPI_COMM_WORLD_LOCAL_RANK") if shared else None,
        source="Open MPI (OMPI_COMM_WORLD_SIZE, OMPI_COMM_WORLD_RANK)",
        job=environ.get("OMPI_MCA_orte_hnp_uri") or environ.get("PMIX_NAMESPACE", ""),
    )


def _hydra(environ: Mapping[str, str]) -> ClusterSpec | None:
    """MPICH's mpiexec and those made from it (Intel MPI, MVAPICH): srun does not set MPI_LOCALRANKID."""
    return _of_pmi(environ) if {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"} <= environ.keys() else None


def _pmi(environ: Mapping[str, str]) -> ClusterSpec | None:
    """Another launcher with PMI (Cray PALS)."""
    return _of_pmi(environ) if {"PMI_RANK", "PMI_SIZE"} <= environ.keys() else None


def _of_pmi(environ: Mapping[str, str]) -> ClusterSpec:
    size = _number(environ, "PMI_SIZE")
    local_rank = next((name for name in _LOCAL_RANKS if name in environ), "")
    local_size = next((_number(environ, name) for name in _LOCAL_SIZES if name in environ), 0)
    return ClusterSpec(
        (environ.get("STEPJAX_COORDINATOR") or _first_of_job(environ, size, local_size)) if size > 1 else "localhost:1",
        size,
        _number(environ, "PMI_RANK"),
        _device(environ, local_rank) if local_rank and local_size != 1 else None,
        source="MPI (PMI_SIZE, PMI_RANK)",
        job=_job(environ),
    )


def _job(environ: Mapping[str, str]) -> str:
    """The batch job, by the first scheduler that names one."""
    return next((f"{name} {environ[name]}" for name in _JOBS if environ.get(name)), "")


def _first_of_job(environ: Mapping[str, str], size: int, local_size: int) -> str:
    """Where process 0 of an mpiexec without an address of its own runs: here, or on the first host of the batch job."""
    number = re.search(r"\d+", _job(environ))
    port = _PORTS[int(number[0]) % len(_PORTS) if number else 0]
    if local_size == size:
        return f"localhost:{port}"
    for name in ("SLURM_JOB_NODELIST", "SLURM_STEP_NODELIST"):
        if environ.get(name):
            return f"{first_host(environ[name], name)}:{port}"
    if hosts := environ.get("LSB_MCPU_HOSTS", environ.get("LSB_HOSTS", "")).split():
        return f"{hosts[0]}:{port}"
    raise ClusterError(
        "MPI: its variables do not tell where process 0 runs; set STEPJAX_COORDINATOR=HOST:PORT or pass "
        "--coordinator, --processes and --process-id"
    )


def _device(environ: Mapping[str, str], name: str) -> tuple[int] | None:
    """This process's GPU of those that the host's processes share; all it sees if that is only one of them."""
    place, seen = _number(environ, name), environ.get("CUDA_VISIBLE_DEVICES", "")
    return None if seen and "," not in seen else (place,)


def _launcher(environ: Mapping[str, str]) -> str:
    """Where mpirun runs, and process 0 with it.

    Open MPI 4 says ``1531576320.0;tcp://10.96.0.1,10.148.0.1:34911``, Open MPI 5 ``prterun-HOST-PID@1``. Where all
    processes are on one host, that is the place.
    """
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([^,:]+)", uri) or re.search(r"tcp6://\[([^\],]+)", uri)
    number = re.match(r"\d+", uri)
    if address and number:
        host = f"[{address[1]}]" if ":" in address[1] else address[1]
        return f"{host}:{_PORTS[int(number[0]) % len(_PORTS)]}"
    namespace = re.fullmatch(r"(?:prterun|prte)-(.+)-(\d+)(?:@\d+)?", environ.get("PMIX_NAMESPACE", ""))
    port = _PORTS[int(namespace[2]) % len(_PORTS) if namespace else 0]
    if environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == environ.get("OMPI_COMM_WORLD_SIZE"):
        return f"localhost:{port}"
    if namespace:
        return f"{namespace[1]}:{port}"
    raise ClusterError(
        "Open MPI: its variables do not tell where process 0 runs; set STEPJAX_COORDINATOR=HOST:PORT or pass "
        "--coordinator, --processes and --process-id"
    )


def first_host(nodelist: str, variable: str = "SLURM_STEP_NODELIST") -> str:
    """The first host of a SLURM node list: ``rack[0-1]blade[02-3],login1`` begins with rack0blade02.

    The grammar is that of ``scontrol show hostnames``: names with commas or blanks between them, each with any number
    of brackets, and in a bracket numbers and ranges with commas between them. Leading zeros count. ``bgl[000x133]`` is
    a block of a torus, from its first corner on.

    Raises:
      ClusterError: the text is not of this form.
    """
    match = re.match(rf"[\s,]*((?:[\w.-]|{_BRACKET})+)(?=[\s,]|$)", nodelist, re.ASCII)
    if not match:
        raise ClusterError(f"{variable}: is {nodelist!r}, expected host names, as gpu[003-006]")
    return re.sub(_BRACKET, lambda bracket: re.split("[-,x]", bracket[0][1:-1])[0], match[1])


def _text(environ: Mapping[str, str], name: str, expected: str) -> str:
    if not environ.get(name):
        raise ClusterError(f"{name}: is not set, expected {expected}")
    return environ[name]


def _number(environ: Mapping[str, str], name: str) -> int:
    value = _text(environ, name, "an integer")
    if not re.fullmatch(r"[0-9]{1,10}", value):
        raise ClusterError(f"{name}: is {value!r}, expected an integer")
    return int(value)
