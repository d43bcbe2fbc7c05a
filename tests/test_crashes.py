"""Runs that are killed, or whose disk is full, at random moments: real processes, and the same bits at the end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from tuning import assert_same, history

ROOT = Path(__file__).resolve().parent.parent
TRIALS = 20
SETTINGS = """
[lora]
rank = 2
targets = ["q"]
experts = "none"
[rollout]
source = "data"
prompts = 2
[loss]
objective = "sft"
[optim]
steps = 12
warmup_steps = 1
rows = 1
length = 192
[eval]
every = 0
[run]
save_every = 2
"""
# A disk of $1 KiB in place of the folder $2; the command, with room, again; then the result is copied to $3.
FULL = """
set -u
mount -t tmpfs -o "size=$1k" none "$2" || exit 99
cd "$2"
shift_out=$3
shift 3
"$@" 2> "$shift_out/first.err"
echo $? > "$shift_out/first.code"
ls "$PWD/run/checkpoints" > "$shift_out/kept" 2> /dev/null
mount -o remount,size=64m "$PWD" || exit 99
"$@" 2> "$shift_out/second.err"
echo $? > "$shift_out/second.code"
cp -r "$PWD/run" "$shift_out/run"
"""
UNSHARE = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--map-root-user"]


def command(settings: Path, out: str) -> list[str]:
    return [sys.executable, "-m", "stepjax", "sft", str(settings), "--out", out]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, Path, float]:
    """Settings, the folder of an uninterrupted run, and its seconds once programs are compiled."""
    home = tmp_path_factory.mktemp("whole")
    settings = home / "settings.toml"
    settings.write_text(SETTINGS)
    for name in ("warm", "run"):
        began = time.monotonic()
        subprocess.run(command(settings, str(home / name)), env=environment(), check=True, capture_output=True)
    return settings, home / "run", time.monotonic() - began


def assert_equal_runs(run: Path, expected: Path) -> None:
    leaves, wanted = (load_file(folder / "leaves" / "12.safetensors") for folder in (run, expected))
    assert_same(leaves, wanted)
    assert history(run) == history(expected)


def wait_for_moment(process: subprocess.Popen, run: Path, rng: random.Random, seconds: float) -> None:
    """Wait until some moment of a run: before its first step, within or after one, or while the result is written.

    The steps say when, since a machine is not equally fast from run to run.
    """
    records, metrics = rng.randrange(0, 13), run / "metrics.jsonl"
    if not records:
        time.sleep(rng.uniform(0, 0.6) * seconds)
        return
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < records):
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.02) * seconds)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, trial):
    settings, expected, seconds = whole
    process = subprocess.Popen(
        command(settings, str(tmp_path / "run")), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for_moment(process, tmp_path / "run", random.Random(trial), seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = set(os.listdir(tmp_path / "run" / "checkpoints")) if (tmp_path / "run" / "checkpoints").exists() else set()
    done = subprocess.run(
        command(settings, str(tmp_path / "run")), env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "damaged" not in done.stderr  # no checkpoint that was whole is lost, and none that is half is seen
    assert_equal_runs(tmp_path / "run", expected)
    print(f"killed with the checkpoints {sorted(before)}")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path, trial):
    settings, expected, _ = whole
    disk, copies = tmp_path / "disk", tmp_path / "copies"
    for folder in (disk, copies):
        folder.mkdir()
    kib = 4 * random.Random(trial).randrange(1, 90)
    script = ["sh", "-c", FULL, "full", str(kib), str(disk), str(copies), *command(settings, str(disk / "run"))]
    done = subprocess.run([*UNSHARE, *script], env=environment(), capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no file system of its own can be mounted here ({done.stderr.strip()})")
    first, second = ((copies / f"{name}.err").read_text() for name in ("first", "second"))
    code = int((copies / "first.code").read_text())
    errors = [line for line in first.splitlines() if line.startswith("stepjax: error:")]
    assert "Traceback" not in first, first
    assert "absl" not in first, first
    assert (code, len(errors)) in ((1, 1), (0, 0)), first  # 0: there was room
    if code:
        assert "No space left on device" in errors[0]
        assert first.splitlines()[-1] == errors[0]
    assert (copies / "second.code").read_text() == "0\n", second
    assert "damaged" not in second, second
    assert_equal_runs(copies / "run", expected)
    print(f"{kib} KiB, kept {(copies / 'kept').read_text().split()}: {errors}")
