"""What has no room in memory is refused with its size and what to lower, before anything is allocated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_session

from stepjax import memory
from stepjax.errors import ConfigError
from stepjax.stored_function import StoredFunction
from stepjax.train.config.tune import OptimSettings
from stepjax.train.rollouts import sampler
from stepjax.train.tune.room import check_update_room

GIB = 2**30


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A machine with 8 GiB available and 1 GiB of swap, whose control groups have no limit."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapFree: 1048576 kB\nHugePages: 0\n"
    )
    (proc / "self" / "cgroup").write_text("1:cpu:/old\n0::/jobs/one\n")
    (groups / "jobs" / "one").mkdir(parents=True)
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "GROUPS", groups)
    return proc, groups


def limit(group, most: str, used: int, cached: int = 0) -> None:
    (group / "memory.max").write_text(most)
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_devices_of_a_cpu_share_what_the_system_calls_available(host):
    assert memory.free_bytes() == 9 * GIB
    assert memory.free_bytes(devices=3) == 3 * GIB


def test_control_groups_have_the_last_word(host):
    proc, groups = host
    limit(groups / "jobs" / "one", "max", 3 * GIB)
    assert memory.free_bytes() == 9 * GIB
    limit(groups / "jobs" / "one", f"{6 * GIB}", 3 * GIB, cached=GIB)
    assert memory.free_bytes() == 4 * GIB
    limit(groups / "jobs", f"{5 * GIB}", 3 * GIB)
    assert memory.free_bytes() == 2 * GIB
    (proc / "meminfo").unlink()
    assert memory.free_bytes() == 2 * GIB
    (proc / "self" / "cgroup").unlink()
    assert memory.free_bytes() is None
    memory.check_room(1 << 60, devices=1, what="it", advice="nothing")  # nobody says, so nothing is refused


def test_an_update_without_room_is_refused(monkeypatch):
    """What a program adds: its own arrays and those that stand as shapes. Gradients are as large as the leaves."""
    leaves = {"a": jnp.ones((1024, 256))}  # 1 MiB
    shape = jax.ShapeDtypeStruct((3 * 1024, 256), jnp.float32)
    tripled = StoredFunction("tripled", lambda leaves, x: (leaves["a"].sum() * x,))
    calls = [(tripled, (leaves, shape))]
    needed = (1 + 3 + 3) * 2**20
    for free in (needed + 2**20, None):
        monkeypatch.setattr(memory, "free_bytes", lambda devices, free=free: free)
        check_update_room(OptimSettings(), leaves, calls)
    monkeypatch.setattr(memory, "free_bytes", lambda devices: needed - 1)
    with pytest.raises(ConfigError, match=r"^optim\.rows: an update of 8 rows of 256 tokens needs .* lower optim"):
        check_update_room(OptimSettings(), leaves, calls)


def test_caches_of_answers_without_room_are_refused(monkeypatch):
    session = tiny_session()
    monkeypatch.setattr(memory, "free_bytes", lambda devices: GIB)
    sampler._check_room(session, 4, 128)
    with pytest.raises(ConfigError, match=r"^rollout\.slots: the cache of 4,096 answers of 1,048,576 tokens needs"):
        sampler._check_room(session, 4096, 2**20)


def test_the_message_has_both_sizes(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda devices: int(2.5 * GIB))
    with pytest.raises(ConfigError) as error:
        memory.check_room(1200 * GIB, devices=1, what="it", advice="lower it")
    assert str(error.value) == "it needs 1,200.0 GiB, but 2.5 GiB of memory are free; lower it"
