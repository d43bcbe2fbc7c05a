"""The folder of a run: who may write there, what is compared, what a crash or a full disk leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning import SHORT, assert_same, changed

from stepjax.adapters.lora import LoraConfig, init
from stepjax.adapters.peft import export_adapter
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, ConfigError, TrainingError
from stepjax.train.config.tune import DataSettings, OptimSettings
from stepjax.train.data.fingerprint import fingerprint as data_fingerprint
from stepjax.train.runs.checkpoints import Checkpoints
from stepjax.train.runs.digest import host_digest
from stepjax.train.runs.folder import MetricsFile, check_finite, is_due, read_metrics
from stepjax.train.runs.identity import claim, claim_content, update_settings
from stepjax.train.runs.lock import locked
from stepjax.train.runs.sinks import TensorBoard
from stepjax.train.teachers.resident import Scored
from stepjax.train.tune.run import FREE, about_warmup, check_steps
from stepjax.train.tune.teach import store
from stepjax.whole_file import whole_file, write_whole

ROOT = Path(__file__).resolve().parent.parent


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def state(step: int) -> dict[str, jax.Array]:
    """Arrays that do not compress, as many as fill a file of their own."""
    return {"leaf": jax.random.normal(jax.random.key(step), (3000,)), "step": jnp.asarray(step, jnp.int32)}


def folder_with(out: Path, *steps: int, keep: int = 0) -> Path:
    with Checkpoints(out, keep=keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"base": "b"})
    return out


# --- checkpoints


def data_file(folder: Path) -> Path:
    return max((file for file in folder.rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 0xFF
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated data": lambda folder: os.truncate(data_file(folder), 100),
    "empty data": lambda folder: os.truncate(data_file(folder), 0),
    "missing data": lambda folder: data_file(folder).unlink(),
    "flipped bits": lambda folder: flip(data_file(folder), 5000),
    "zeros": lambda folder: data_file(folder).write_bytes(bytes(data_file(folder).stat().st_size)),
    "empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
    "no state": lambda folder: shutil.rmtree(folder / "state"),
    "missing metadata": lambda folder: (folder / "state" / "_METADATA").unlink(),
    "garbage metadata": lambda folder: (folder / "state" / "_METADATA").write_text("{]"),
    "empty description": lambda folder: (folder / "_CHECKPOINT_METADATA").write_text(""),
    "garbage description": lambda folder: (folder / "_CHECKPOINT_METADATA").write_bytes(b"\xff\0"),
    "missing manifest": lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if at % 4 == 0 else pytest.mark.slow) for at, kind in enumerate(DAMAGE)]
)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_it_taken(tmp_path, capfd, kind):
    folder_with(tmp_path, 2, 4)
    DAMAGE[kind](tmp_path / "checkpoints" / "4")
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        assert_same(checkpoints.resume(state(0)), state(2))
        assert checkpoints.steps == [2]
        checkpoints.save(4, state(4), {"base": "b"})  # the run goes on, and comes there again
        assert_same(checkpoints.resume(state(0)), state(4))
    said = capfd.readouterr().err
    assert said.count("\n") == 1, said
    assert said.startswith("stepjax: ")
    assert "continues from the checkpoint of step 2" in said
    assert (tmp_path / "damaged" / "4").is_dir()


def test_several_damaged_checkpoints_and_none_that_is_whole(tmp_path, capfd):
    folder_with(tmp_path, 2, 4, 6)
    for step in (4, 6):
        DAMAGE["empty folder"](tmp_path / "checkpoints" / str(step))
    (tmp_path / "damaged" / "6").mkdir(parents=True)  # of an earlier accident
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        assert_same(checkpoints.resume(state(0)), state(2))
    assert "6 (" in capfd.readouterr().err
    assert (tmp_path / "damaged" / "6-1").is_dir()
    DAMAGE["truncated data"](tmp_path / "checkpoints" / "2")
    with (
        Checkpoints(tmp_path, keep=0) as checkpoints,
        pytest.raises(CheckpointError, match="2: the checkpoint is damaged"),
    ):
        checkpoints.resume(state(0))
    assert (tmp_path / "checkpoints" / "2").is_dir()  # nothing is begun again in silence


def test_a_run_without_checkpoints_begins_at_its_beginning(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert_same(checkpoints.resume(state(7)), state(7))
        assert checkpoints.kept() == "there is no checkpoint yet"


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    folder_with(tmp_path, 1, 2, 3, 4, keep=keep)
    with Checkpoints(tmp_path, keep=keep) as checkpoints:
        assert checkpoints.steps == left


def test_a_checkpoint_that_cannot_be_written_leaves_the_others(tmp_path, monkeypatch, capfd):
    """orbax reports a full disk as ValueError, after a traceback of each of its threads."""
    folder_with(tmp_path, 2)
    with Checkpoints(tmp_path, keep=0) as checkpoints:

        def full(step: int, tree: Any, **options: Any) -> None:
            (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing: 'x': No space left on device [os_error_code='28']")

        monkeypatch.setattr(checkpoints._manager, "save", full)
        with pytest.raises(CheckpointError) as error:
            checkpoints.save(4, state(4), {})
        assert "(No space left on device)" in str(error.value)
        assert f"{tmp_path / 'checkpoints' / '2'} is the last one" in str(error.value)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert capfd.readouterr().err == ""


FULL = """
import resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_run_folder import folder_with, state
from stepjax.cli import _guarded
out = Path({out!r})
folder_with(out, 2)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
sys.exit(_guarded(lambda: folder_with(out, 4)))
"""


def test_a_full_disk_is_one_line_of_error(tmp_path):
    """Real writes fail, in orbax's own threads; a limit on the size of files stands for the disk."""
    script = FULL.format(tests=str(ROOT / "tests"), out=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("stepjax: error: ")
    assert "cannot be written (File too large)" in done.stderr
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        assert_same(checkpoints.resume(state(0)), state(2))


def test_a_checkpoint_of_another_base_is_not_a_damaged_one(tmp_path):
    def refuse(about: Any) -> None:
        raise ConfigError("another base")

    folder_with(tmp_path, 2, 4)
    with Checkpoints(tmp_path, keep=0) as checkpoints, pytest.raises(ConfigError, match="another base"):
        checkpoints.resume(state(0), check=refuse)
    assert not (tmp_path / "damaged").exists()


def test_digests_see_every_bit():
    one = state(1)
    assert host_digest(one) == host_digest(jax.tree.map(np.asarray, one))
    for other in ({**one, "step": jnp.asarray(2, jnp.int32)}, {**one, "leaf": one["leaf"].at[7].multiply(-1)}, {}):
        assert host_digest(other) != host_digest(one)
    assert host_digest({"a": np.zeros((2, 3))}) != host_digest({"a": np.zeros((3, 2))})


def test_what_is_not_finite_is_not_written(tmp_path, monkeypatch):
    check_finite(3, {"a": jnp.ones(3)})
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(TrainingError, match=r"step 3: b has values that are not finite"):
            check_finite(3, {"a": jnp.ones(3), "b": jnp.ones((2, 2)).at[1, 1].set(bad)})


def test_no_adapter_and_no_scores_with_nan(tmp_path):
    config, lora = ModelConfig.preset("step-tiny"), LoraConfig(rank=2, targets=("q",), experts=None)
    adapter = {name: np.array(leaf) for name, leaf in init(config, lora, jax.random.key(0)).items()}
    name = next(iter(adapter))
    adapter[name][0, 0] = np.nan
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} of the adapter has values that are not finite"):
        export_adapter(tmp_path / "out", config, adapter, lora)
    prompt: Any = SimpleNamespace(index=0, part=0)
    top = np.zeros((2, 1), np.int32)
    scored = Scored(np.zeros(2, np.float32), top, np.array([[0.0], [np.inf]], np.float32))
    with pytest.raises(TrainingError, match="top_logprob of the teacher has values that are not finite"):
        store(tmp_path / "scores.safetensors", [(prompt, [1, 2], scored)], about={})
    assert list(tmp_path.iterdir()) == []


# --- settings and content


def begin(out: Path) -> None:
    """What a run leaves that has made a step: a record."""
    file = MetricsFile(out / "metrics.jsonl", 0)
    file.write({"step": 0})
    file.close()


def test_a_refusal_names_each_setting_with_both_values(tmp_path):
    claim(SHORT, tmp_path)
    begin(tmp_path)
    claim_content(tmp_path, {"model": "a" * 32, "data.rows": "b" * 64})
    other = changed(SHORT, optim={"lr": 2e-3, "steps": 9}, rollout={"prompts": 5}, run={"keep": 7}, eval={"items": 3})
    with pytest.raises(ConfigError) as error:
        claim(other, tmp_path, free=FREE)
    assert "optim.lr 0.001 → 0.002, rollout.prompts 4 → 5 (there → now)" in str(error.value)
    assert "steps" not in str(error.value)
    second = dataclasses.replace(SHORT, data={**SHORT.data, "more": DataSettings(weight=2.0)})
    with pytest.raises(ConfigError, match=r"data\.more\.weight absent → 2\.0"):
        claim(second, tmp_path, free=FREE)
    with pytest.raises(ConfigError, match=r"data\.rows bbbbbbbbbbbb → cccccccccccc, model\.dtype absent → float32"):
        claim_content(tmp_path, {"model": "a" * 32, "data.rows": "c" * 64, "model.dtype": "float32"})
    claim_content(tmp_path, {"data.rows": "b" * 64, "model": "a" * 32})


def test_what_a_resumed_run_may_change_is_written_down(tmp_path):
    claim(SHORT, tmp_path)
    claim_content(tmp_path, {"model": "a"})
    begin(tmp_path)
    more = changed(SHORT, optim={"steps": 9}, run={"keep": 7}, model={"path": "../elsewhere"})
    previous = claim(more, tmp_path, free=FREE)
    assert previous == SHORT
    update_settings(more, previous, tmp_path)
    assert claim(more, tmp_path) == more


def test_options_of_a_users_code_may_be_nan(tmp_path):
    """Which no value equals, itself not either."""
    options = {"a": float("nan"), "b": [float("nan"), 1.0]}
    data = {"mine": DataSettings("environment", environment="my_env.py:Shop", environment_options=options)}
    config = dataclasses.replace(SHORT, data=data)
    claim(config, tmp_path)
    begin(tmp_path)
    claim(config, tmp_path)
    other = dataclasses.replace(data["mine"], environment_options=options | {"a": 1.0})
    with pytest.raises(ConfigError, match=r"environment_options\.a nan → 1\.0"):
        claim(dataclasses.replace(SHORT, data={"mine": other}), tmp_path)


def test_settings_of_a_run_that_never_began_are_replaced(tmp_path):
    """Such as one whose model.path was wrong, or whose first update had no room in memory: nothing was learned."""
    claim(changed(SHORT, model={"path": "wrong"}, optim={"lr": 1.0}), tmp_path)
    assert claim(SHORT, tmp_path) == SHORT
    claim_content(tmp_path, {"model": "a"})
    (tmp_path / "metrics.jsonl").touch()
    other = changed(SHORT, optim={"rows": 1})
    assert claim(other, tmp_path, free=FREE) == other
    claim_content(tmp_path, {"model": "b"})
    assert claim(SHORT, tmp_path) == SHORT
    claim_content(tmp_path, {"model": "a"})
    begin(tmp_path)
    with pytest.raises(ConfigError, match=r"optim\.lr 0\.001 → 1\.0"):
        claim(changed(SHORT, optim={"lr": 1.0}), tmp_path, free=FREE)


def test_data_are_known_by_their_content(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, copy = tmp_path / "a" / "rows.jsonl", tmp_path / "b" / "rows.jsonl"
    first.write_text('{"prompt": "x"}\n')
    shutil.copy(first, copy)
    known = data_fingerprint(DataSettings("jsonl", path=str(first)))
    assert data_fingerprint(DataSettings("jsonl", path=str(copy))) == known
    monkeypatch.chdir(tmp_path / "b")  # a relative path, from another working directory
    assert data_fingerprint(DataSettings("jsonl", path="rows.jsonl")) == known
    copy.write_text('{"prompt": "y"}\n')
    assert data_fingerprint(DataSettings("jsonl", path="rows.jsonl")) != known


@pytest.mark.parametrize(
    ("before", "now", "done", "said"),
    [
        ({"steps": 20}, {"steps": 30}, 20, "optim.steps: 20 → 30; as if they had been given at the beginning"),
        ({"steps": 20}, {"steps": 10}, 8, "optim.steps: 20 → 10; as if"),
        ({"steps": 20, "decay_from": 10}, {"steps": 30, "decay_from": 10}, 10, "as if"),
        (
            {"steps": 20, "decay_from": 10},
            {"steps": 30, "decay_from": 10},
            15,
            "now ends there, but 4 of the 15 steps that were made (from step 11) had the rates of 20 steps",
        ),
        ({"steps": 20}, {"steps": 20}, 20, ""),
    ],
)
def test_other_numbers_of_steps(capsys, before, now, done, said):
    before, now = (OptimSettings(**{"warmup_steps": 2, "lr": 1.0, **fields}) for fields in (before, now))
    check_steps(before, now, done=done)
    found = capsys.readouterr().err
    assert said in found
    assert bool(said) == bool(found)
    with pytest.raises(ConfigError, match=r"optim\.steps: is .*, but the run has made 99 steps"):
        check_steps(before, now, done=99)


# --- one run at a time


def test_a_second_run_in_the_folder_is_refused(tmp_path):
    out = tmp_path / "run"
    with locked(out):
        with pytest.raises(ConfigError, match="another run of this process"), locked(out):
            pass
        code = (
            "import sys\nfrom pathlib import Path\nfrom stepjax.cli import _guarded\n"
            "from stepjax.train.runs.lock import locked\n"
            f"sys.exit(_guarded(lambda: locked(Path({str(out)!r})).__enter__()))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 1
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"a run of process {os.getpid()} on " in done.stderr
    with locked(out):  # given back
        pass


def test_a_killed_run_leaves_no_lock(tmp_path):
    script = (
        f"from pathlib import Path\nimport time\nfrom stepjax.train.runs.lock import locked\n"
        f"with locked(Path({str(tmp_path)!r})):\n print('locked', flush=True)\n time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment())
    assert process.stdout
    with process.stdout:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match=f"a run of process {process.pid} on"), locked(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with locked(tmp_path):
        pass


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="is a file, expected the folder of a run"), locked(tmp_path / "run"):
        pass
    with pytest.raises(NotADirectoryError), locked(tmp_path / "run" / "inside"):
        pass


# --- metrics and sinks


@pytest.mark.parametrize(
    "rest",
    [b'{"step": 2, "lo', b"\0" * 40, b'{"step": 2}\0\0\0', b"\xff\xfe\n", b'{"a": 1}\n', b"[1]\n", b'{"step": "x"}'],
)
def test_torn_lines_of_metrics(tmp_path, rest):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step": 1}\n' + rest)
    assert [record["step"] for record in read_metrics(tmp_path)][:2] == [0, 1]
    metrics = MetricsFile(file, 2)
    metrics.write({"step": 2, "loss": 0.5})
    metrics.close()
    assert file.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "loss": 0.5}\n'


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", 0)
    metrics.write({"step": 0})
    real = metrics._file

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def write(self, line: bytes) -> int:
            return real.write(line[:5])  # as much as there was room for

    metrics._file = Full()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left on device") as error:
        metrics.write({"step": 1})
    assert error.value.filename == str(tmp_path / "metrics.jsonl")
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'


def test_events_that_cannot_be_written_are_an_error_at_once(tmp_path):
    """And neither a traceback of a thread nor a record that waits without end."""
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    sink = TensorBoard(tmp_path / "tensorboard", 0)
    sink.write({"step": 0, "loss": 1.0})
    with Path("/dev/full").open("wb", buffering=0) as full:
        file, sink._file = sink._file, full
        for _ in range(20):
            with pytest.raises(OSError, match="No space left"):
                sink.write({"step": 1, "loss": 1.0})
        sink._file = file
    sink.write({"step": 2, "loss": 0.5})
    sink.close()
    events = list(events_of(next((tmp_path / "tensorboard").iterdir())))
    assert [event.step for event in events] == [0, 0, 0, 2]
    assert [(value.tag, value.simple_value) for event in events for value in event.summary.value] == [
        ("loss", 1.0),
        ("loss", 0.5),
    ]


def events_of(file: Path) -> Iterator[Any]:
    """The events of a file, by the frame that TensorBoard reads: length, checksum, message, checksum."""
    from tensorboardX.proto import event_pb2
    from tensorboardX.record_writer import masked_crc32c

    messages: Any = event_pb2
    rest = file.read_bytes()
    while rest:
        (size,), (check,) = struct.unpack("<Q", rest[:8]), struct.unpack("<I", rest[8:12])
        assert check == masked_crc32c(rest[:8])
        data, rest = rest[12 : 12 + size], rest[12 + size :]
        assert struct.unpack("<I", rest[:4])[0] == masked_crc32c(data)
        rest = rest[4:]
        yield messages.Event.FromString(data)


# --- files


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    file = tmp_path / "x.bin"
    write_whole(file, b"old")
    with contextlib.suppress(KeyboardInterrupt), whole_file(file) as partial:
        partial.write_bytes(b"new, but")
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.bin"]


def test_what_happens_every_so_many_steps():
    assert [count for count in range(7) if is_due(3, count)] == [0, 3, 6]
    assert not any(is_due(0, count) for count in range(7))


def test_a_warmup_that_the_run_does_not_end_is_told():
    assert about_warmup(OptimSettings(steps=10, warmup_steps=10)) == ""
    line = about_warmup(OptimSettings(steps=5, warmup_steps=10, lr=1e-3))
    assert "has 10 steps and the run 5" in line
    assert "not optim.lr = 0.001" in line
    assert float(line.split("largest rate is ")[1].split(",")[0]) == pytest.approx(5e-4)
