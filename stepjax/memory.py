"""How much memory new arrays can have, so that what cannot fit is refused before the system ends the process."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import jax

from stepjax.errors import ConfigError

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def check_room(needed: int, *, devices: int, what: str, advice: str) -> None:
    """Refuse what has no room on a device of this process. Where nobody says how much is free, nothing is refused.

    Args:
      needed: bytes of new arrays on each device.
      devices: of this process, which the arrays are on.
      what: needs them, as the subject of a sentence.
      advice: what to lower.

    Raises:
      ConfigError: less is free.
    """
    _refuse(needed, free_bytes(devices), what, advice)


def check_host_room(needed: int, *, what: str, advice: str) -> None:
    """As `check_room`, of memory of the host. No device is opened."""
    _refuse(needed, host_bytes(), what, advice)


def _refuse(needed: int, free: int | None, what: str, advice: str) -> None:
    if free is not None and needed > free:
        raise ConfigError(
            f"{what} needs {needed / 2**30:,.1f} GiB, but {max(free, 0) / 2**30:,.1f} GiB of memory are free; {advice}"
        )


def free_bytes(devices: int = 1) -> int | None:
    """Bytes that are free on each of so many devices of this process; None if nobody says.

    Those of a CPU share the memory of the host.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None
    free = host_bytes()
    return free if free is None else free // devices


def host_bytes() -> int | None:
    """Bytes of the host that this process may still take; None if nobody says.

    What the system calls available and free swap space (proc(5), /proc/meminfo), and no more than the control groups of
    the process leave (cgroups(7), version 2).
    """
    return min((room for room in (_available_bytes(), _group_bytes()) if room is not None), default=None)


def private_bytes(pid: int) -> int:
    """Resident bytes of a process that it shares with no file (proc(5), /proc/PID/statm); 0 if nobody says."""
    with contextlib.suppress(OSError, ValueError):
        _, resident, shared, *_ = (PROC / str(pid) / "statm").read_text().split()
        return (int(resident) - int(shared)) * mmap.PAGESIZE
    return 0


def _available_bytes() -> int | None:
    with contextlib.suppress(OSError, ValueError):
        lines = (line.split() for line in (PROC / "meminfo").read_text().splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
        if "MemAvailable" in kib:
            return 1024 * (kib["MemAvailable"] + kib.get("SwapFree", 0))
    return None


def _group_bytes() -> int | None:
    """What the control groups of this process leave; None without a limit. Cached files count as free."""
    rooms = []
    with contextlib.suppress(OSError):
        lines = (PROC / "self" / "cgroup").read_text().splitlines()
        path = next((line.split(":", 2)[2] for line in lines if line.startswith("0::")), None)
        folder = GROUPS / (path or "").strip("/")
        for group in (folder, *folder.parents) if path else ():
            if not group.is_relative_to(GROUPS):
                break
            with contextlib.suppress(OSError, ValueError):
                most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
                counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                rooms.append(most - used + int(counts.get("inactive_file", 0)))
    return min(rooms, default=None)
