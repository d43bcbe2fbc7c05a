"""What is kept between runs: which entry is found, which is trusted, and that its answers are those of a fresh one."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import speaking_folder

from stepjax.cache_folder import ABANDONED_S, TEMPORARY, CacheFolder, cache_root
from stepjax.cli import main
from stepjax.config import ModelConfig
from stepjax.infer.generate import generate
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams
from stepjax.program_cache import ProgramCache, compile_program, digest


class Result(NamedTuple):
    value: jax.Array
    extra: jax.Array | None = None


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPJAX_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def cache(root):
    return ProgramCache.open()


def double(state, x):
    return {"sum": state["sum"] + x}, Result(2 * x + jnp.sin(state["sum"]))


def arguments():
    return {"sum": jnp.arange(5.0)}, np.linspace(0, 1, 5, dtype=np.float32)


def compiled(cache, function=double, identity="double"):
    return compile_program(cache, function, arguments(), identity=identity, types=(Result,), donate_argnums=(0,))


def untraced(state, x):
    raise AssertionError("it was traced")


def test_an_executable_is_loaded_without_tracing(cache):
    fresh = compiled(cache)(*arguments())
    loaded = compiled(ProgramCache.open(), untraced)
    found = loaded(*arguments())
    assert isinstance(found[1], Result)
    assert found[1].extra is None
    jax.tree.map(np.testing.assert_array_equal, found, fresh)
    state, x = arguments()
    loaded(state, x)
    assert state["sum"].is_deleted()  # the donation is kept


def test_the_name_holds_what_an_executable_depends_on():
    state, x = arguments()
    device = jax.devices()[1]
    others = [
        digest("other", (state, x)),
        digest("double", (state, x[:4])),
        digest("double", (state, x.astype(np.int32))),
        digest("double", ({"total": state["sum"]}, x)),
        digest("double", (jax.device_put(state, device), x)),
        digest("double", (jax.device_put(state, jax.devices()[0]), x)),  # committed
    ]
    jax.config.update("jax_default_matmul_precision", "highest")
    others.append(digest("double", (state, x)))
    jax.config.update("jax_default_matmul_precision", None)
    name = digest("double", (state, x))
    assert name == digest("double", arguments())
    assert len({name, *others}) == len(others) + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[:-10],
        lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
        lambda content: b"",
        lambda content: b"something else",
    ],
    ids=["truncated", "flipped", "empty", "foreign"],
)
def test_a_damaged_entry_is_compiled_again(cache, root, caplog, change):
    compiled(cache)
    (path,) = (root / "programs").iterdir()
    sound = path.read_bytes()
    path.write_bytes(change(sound))
    with caplog.at_level(logging.WARNING):
        compiled(cache)(*arguments())
    assert len([record for record in caplog.records if "cannot be used" in record.message]) == 1
    compiled(cache, untraced)  # it is whole again


def test_an_entry_under_another_name_is_not_used(cache, root, caplog):
    compiled(cache)
    (path,) = (root / "programs").iterdir()
    compiled(cache, identity="another")
    (other,) = {*(root / "programs").iterdir()} - {path}
    other.write_bytes(path.read_bytes())
    compiled(cache, identity="another")
    assert "another name" in caplog.text


def test_a_folder_that_others_may_write_to_is_ignored(root, caplog):
    root.mkdir()
    root.chmod(0o777)
    assert ProgramCache.open() is None
    assert "others may write to it" in caplog.text
    root.chmod(0o755)
    assert ProgramCache.open() is not None
    assert (root / "programs").stat().st_mode & 0o777 == 0o700


def test_an_entry_that_others_may_write_to_or_a_link_is_ignored(cache, root, caplog):
    compiled(cache)
    (path,) = (root / "programs").iterdir()
    path.chmod(0o666)
    with pytest.raises(AssertionError, match="it was traced"):
        compiled(cache, untraced)
    assert "it is ignored" in caplog.text
    path.chmod(0o600)
    moved = path.rename(root / "elsewhere")
    path.symlink_to(moved)
    with pytest.raises(AssertionError, match="it was traced"):
        compiled(cache, untraced)


def test_the_least_recently_used_go_first(root):
    folder = CacheFolder.open("programs")
    assert folder is not None
    for number, name in enumerate("abc"):
        folder.write(name, b"x" * 100)
        os.utime(folder.path / name, (number, number))
    folder.read("a")
    folder.trim(250)
    assert [entry.name for entry in folder.entries()] == ["a", "c"]
    left = folder.path / f"{TEMPORARY}1-2"
    left.write_bytes(b"half")
    folder.trim(250)
    assert left.exists()
    old = time.time() - ABANDONED_S - 1
    os.utime(left, (old, old))
    folder.trim(250)
    assert not left.exists()


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("STEPJAX_CACHE_DIR", str(tmp_path / "own"))
    assert cache_root() == tmp_path / "own"
    monkeypatch.delenv("STEPJAX_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_root() == tmp_path / "stepjax"


def test_the_command_shows_and_empties(cache, root, capsys):
    compiled(cache)
    assert main(["cache", "--list"]) == 0
    out = capsys.readouterr().out
    assert str(root) in out
    assert "programs: 1 entries" in out
    assert ".program" in out
    assert main(["cache", "--empty"]) == 0
    assert "removed 1 entries" in capsys.readouterr().out
    assert list((root / "programs").iterdir()) == []


@pytest.fixture
def answers(tmp_path):
    folder = speaking_folder(tmp_path / "model")

    def run(program_cache, mesh=None):
        session = load(folder, dtype="float32", program_cache=program_cache, mesh=mesh)
        params = SamplingParams(max_tokens=12, seed=3, temperature=0.8, logprobs=3)
        return [completion.ids for completion in generate(session, [[0, 5, 6, 7]], params, speculate=1)]

    return run


@pytest.mark.slow
def test_answers_are_those_of_fresh_programs(cache, answers, caplog):
    plain, first, second = answers(None), answers(cache), answers(cache)
    assert plain == first == second
    assert "cannot be" not in caplog.text


@pytest.mark.slow
def test_answers_on_a_mesh_are_those_of_fresh_programs(cache, answers, caplog):
    plain, first, second = (answers(each, "data=2,expert=2") for each in (None, cache, cache))
    assert plain == first == second
    assert "cannot be" not in caplog.text


WRITER = """
    import sys, jax.numpy as jnp
    from stepjax.program_cache import ProgramCache, compile_program
    cache = ProgramCache.open()
    print("begun", flush=True)
    for number in range(int(sys.argv[1])):
        def scale(x, number=number):
            return (x * (number + 2),)
        (value,) = compile_program(cache, scale, (jnp.ones(3),), identity=f"scale {number}")(jnp.ones(3))
        assert value[0] == number + 2
    print("done", flush=True)
"""


def writer(count):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(count)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_processes_share_a_folder_and_may_be_killed(root):
    with writer(400) as killed, writer(12) as kept:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "begun\n"
        time.sleep(0.3)
        killed.send_signal(signal.SIGKILL)
        assert kept.communicate()[0] == "begun\ndone\n"
    with writer(12) as again:
        assert again.communicate()[0] == "begun\ndone\n"
    folder = CacheFolder.open("programs")
    assert folder is not None
    assert all(entry.num_bytes > 100 for entry in folder.entries())


def test_the_model_is_part_of_a_programs_name():
    session = load("step-tiny")
    assert str(ModelConfig.preset("step-tiny")) in session.runner(1).step(0)._identity
    assert session.runner(1).step(0)._identity != session.runner(2).step(0)._identity
