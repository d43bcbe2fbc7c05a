"""Memory that goes back to the system: zeros of caches that nobody has written over, and what compiling leaves."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.infer.engine import host_memory
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.host_memory import trim_heap, uncommit_zeros
from stepjax.infer.load import load

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems keep such pages")
MIB = 2**20


def resident_bytes() -> int:
    """Anonymous memory of this process that is in RAM."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def test_zeros_take_no_memory_until_they_are_written():
    zeros = jax.block_until_ready(jax.jit(lambda: jnp.zeros((64 * MIB,), jnp.uint8))())
    before = resident_bytes()
    uncommit_zeros({"cache": zeros})
    after = resident_bytes()
    assert before - after > 60 * MIB
    write = jax.jit(lambda x: x.at[5 * MIB].set(7), donate_argnums=0)
    written = jax.block_until_ready(write(zeros))
    assert resident_bytes() - after < 8 * MIB  # in place: one page
    values = np.asarray(written)
    assert values[5 * MIB] == 7
    assert values.sum() == 7


def test_what_shares_a_page_with_the_zeros_stays():
    region = mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    region[:] = b"\1" * len(region)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    host_memory._uncommit(address + 10, 2 * mmap.PAGESIZE)
    page = mmap.PAGESIZE
    assert region[:page] == b"\1" * page
    assert region[page : 2 * page] == bytes(page)  # the only page that lay wholly inside
    assert region[2 * page :] == b"\1" * 2 * page
    host_memory._uncommit(address + 10, page)  # no whole page
    assert region[:page] == b"\1" * page


def test_an_engine_holds_only_the_pages_that_requests_have_used():
    session = load("step-tiny")
    Engine(session, EngineConfig(num_slots=4, num_pages=64))  # what is compiled once
    before = resident_bytes()
    engine = Engine(session, EngineConfig(num_slots=4, cache_bytes=256 * MIB, context=32768))
    assert engine.executor.cache_bytes > 100 * MIB
    assert resident_bytes() - before < 32 * MIB


def test_systems_without_such_calls_keep_their_memory(monkeypatch):
    monkeypatch.setattr(host_memory, "_malloc_trim", lambda: None)
    trim_heap()
    calls = []
    monkeypatch.setattr(host_memory, "_uncommit", lambda *range: calls.append(range))
    monkeypatch.setattr(host_memory.sys, "platform", "darwin")
    uncommit_zeros(jnp.zeros((2 * MIB,), jnp.uint8))
    assert calls == []


def test_a_script_ends_while_programs_are_compiled():
    """The thread that compiles is in C++ code when the interpreter ends, which must not be taken apart around it."""
    script = """
        import threading, time
        import jax, jax.numpy as jnp
        from stepjax.infer.engine.ready_programs import WANTED, ReadyPrograms

        began = threading.Event()

        def prepare(shape):
            began.set()
            f = lambda x: [x := jnp.sin(x @ x) + k for k in range(60)][-1]
            jax.jit(f).lower(jnp.ones((9, 9))).compile()
            print("compiled", flush=True)

        programs = ReadyPrograms(prepare, (1, 2), {16: (1,)})
        programs.open(programs.first(0))
        for _ in range(WANTED):
            programs.slots(1, 0)
        began.wait(60)
        print("leaves", flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.split()) == ["compiled", "leaves"]
