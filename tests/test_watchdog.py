"""A process of a cluster ends when another is lost, and only then: real processes, real signals."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from devices import with_devices
from ports import two_free_ports

from stepjax.sharding.watchdog import EXIT_CODE

ROOT = Path(__file__).resolve().parent.parent


class Cluster:
    """Processes that run ``watched.py`` with a task."""

    def __init__(self, home: Path, task: str, *, count: int = 2, timeout_s: int = 15):
        environment = {**with_devices(2), "PYTHONPATH": str(ROOT)}
        self.logs = [home / f"{process}.log" for process in range(count)]
        address = f"localhost:{two_free_ports()}"
        self.processes = []
        for process, log in enumerate(self.logs):
            command = [sys.executable, str(ROOT / "tests" / "watched.py"), address, str(count), str(process), task]
            with log.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [*command, str(timeout_s)], stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
                    )
                )

    def until_ready(self) -> None:
        deadline = time.monotonic() + 120
        while not all("ready" in log.read_text() for log in self.logs):
            assert time.monotonic() < deadline, [log.read_text() for log in self.logs]
            time.sleep(0.05)

    def end_of(self, process: int, seconds: float) -> int:
        return self.processes[process].wait(seconds)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdout:
                process.stdout.close()


@pytest.fixture
def cluster(tmp_path) -> Iterator[type]:
    started: list[Cluster] = []

    def start(task: str, **options: int) -> Cluster:
        started.append(Cluster(tmp_path, task, **options))
        return started[-1]

    yield start  # pyright: ignore[reportReturnType]
    for each in started:
        each.close()


@pytest.mark.parametrize("task", ["sum", pytest.param("compute", marks=pytest.mark.slow)])
def test_processes_that_finish_end_with_0(cluster, task):
    """Also when Python keeps its lock for longer than the timeout; and only process 0 writes to stdout."""
    group = cluster(task, timeout_s=4)
    outs = [process.communicate(timeout=120)[0] for process in group.processes]
    assert [process.returncode for process in group.processes] == [0, 0], [log.read_text() for log in group.logs]
    assert outs == ["sum 4.0\n", ""]


LOSSES = [*itertools.product((signal.SIGKILL, signal.SIGSTOP), (0, 1), ("collect", "idle"))]
ALWAYS = (3, 4)  # each signal, each victim, each task; the others go with --slow


@pytest.mark.parametrize(
    ("kind", "victim", "task"),
    [pytest.param(*loss, marks=() if at in ALWAYS else pytest.mark.slow) for at, loss in enumerate(LOSSES)],
)
def test_a_lost_process_takes_the_other_with_it(cluster, task, victim, kind):
    group = cluster(task, timeout_s=3)
    group.until_ready()
    group.processes[victim].send_signal(kind)
    assert group.end_of(1 - victim, 60) == EXIT_CODE
    log = group.logs[1 - victim].read_text()
    assert f"process {1 - victim} ends: process {victim}" in log
    assert "Thread" in log
    assert "watched.py" in log  # the stacks
    if kind == signal.SIGSTOP:
        group.processes[victim].send_signal(signal.SIGCONT)
        assert group.end_of(victim, 60) != 0


@pytest.mark.slow
def test_a_failure_is_told_to_all(cluster):
    """Three processes: the third hears of the second through the first."""
    group = cluster("fail", count=3)
    assert group.end_of(1, 60) == 1
    assert "broken on purpose" in group.logs[1].read_text()
    for other in (0, 2):
        assert group.end_of(other, 60) == EXIT_CODE
        assert "process 1 ended with exit code 1" in group.logs[other].read_text()


@pytest.mark.slow
def test_a_process_that_finds_nobody_says_so(tmp_path, monkeypatch):
    script = "import sys; from stepjax.sharding import cluster; cluster.JOIN_S = 1; from stepjax.cli import main; "
    flags = ["--coordinator", f"localhost:{two_free_ports()}", "--processes", "2", "--process-id", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script + "sys.exit(main(sys.argv[1:]))", "generate", "--prompt", "x", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "the processes did not find each other within 1 s" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_ten_times_out_of_ten_within_30_s(tmp_path, victim, kind):
    for trial in range(10):
        home = tmp_path / str(trial)
        home.mkdir()
        group = Cluster(home, "collect" if trial % 2 else "idle")
        try:
            group.until_ready()
            began = time.monotonic()
            group.processes[victim].send_signal(kind)
            assert group.end_of(1 - victim, 30) == EXIT_CODE
            print(f"{kind.name} of process {victim}: {time.monotonic() - began:.1f} s")
        finally:
            group.close()
