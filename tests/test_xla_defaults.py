"""Flags of XLA that commands set: before jax starts, where a GPU may be, and never in the place of a user's."""

import os
import subprocess
import sys

import pytest

from stepjax import xla_defaults
from stepjax.cli import VERBS
from stepjax.xla_defaults import FLAGS, USES, add_flags, set_xla_defaults

GRAPH, SIZE, MERGER = (flag.name for flag in FLAGS)


@pytest.fixture
def fresh(monkeypatch):
    """A process with a GPU's plugin, in which nothing has imported jax yet."""
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    monkeypatch.setattr(xla_defaults, "has_cuda_plugin", lambda: True)
    monkeypatch.setenv("XLA_FLAGS", "")
    return monkeypatch


def names_after(verb: str, *arguments: str) -> list[str]:
    set_xla_defaults(verb, [verb, *arguments])
    return [word.partition("=")[0] for word in os.environ["XLA_FLAGS"].split()]


@pytest.mark.parametrize(
    ("verb", "arguments", "expected"),
    [
        ("serve", ["step-tiny"], [GRAPH, SIZE]),
        ("generate", ["--xla-defaults", "on"], [GRAPH, SIZE]),
        ("generate", ["--xla-defaults", "off"], []),
        ("generate", ["--xla-defaults=off"], []),
        ("sft", ["settings.toml", "--set", "optim.steps=3"], [GRAPH, SIZE, MERGER]),
        ("study", ["--mesh", "data=1"], [GRAPH, SIZE]),
        ("study", ["--mesh", "data=1", "--step", "lora"], [GRAPH, SIZE, MERGER]),
        ("study", ["--step", "train", "--xla-defaults", "off"], []),
        ("info", [], []),
        ("plan", [], []),
        (None, [], []),
    ],
)
def test_flags_of_a_verb(fresh, verb, arguments, expected):
    assert names_after(verb, *arguments) == expected


def test_a_flag_of_the_user_stays():
    environment = {"XLA_FLAGS": f"--xla_dump_to=here {GRAPH}= "}
    add_flags(environment, ["training"])
    assert environment["XLA_FLAGS"] == f"--xla_dump_to=here {GRAPH}=  {SIZE}=1 {MERGER}=0"
    again = dict(environment)
    add_flags(again, ["serving", "training"])
    assert again == environment


def test_a_file_of_flags_stays():
    environment = {"XLA_FLAGS": "/etc/xla.flags"}
    add_flags(environment, ["training"])
    assert environment == {"XLA_FLAGS": "/etc/xla.flags"}


def test_nothing_is_set_that_this_jax_may_not_know(fresh):
    for versions in ("0.9.1", "0.13.0", "1.0", "unknown"):
        fresh.setattr(xla_defaults, "version", lambda _, versions=versions: versions)
        assert names_after("serve") == []
    fresh.setattr(xla_defaults, "version", lambda _: "0.12.0.1")
    assert names_after("serve") == [GRAPH, SIZE]


def test_nothing_is_set_without_a_plugin_or_after_jax(fresh):
    fresh.setattr(xla_defaults, "has_cuda_plugin", lambda: False)
    assert names_after("serve") == []
    fresh.setattr(xla_defaults, "has_cuda_plugin", lambda: True)
    fresh.setitem(sys.modules, "jax", object())
    assert names_after("serve") == []


def test_every_flag_has_its_reason():
    assert USES.keys() <= VERBS.keys()
    assert all(len(flag.reason.split()) > 10 for flag in FLAGS)


def test_the_command_line_does_not_import_jax():
    """Which has read its flags once it is used."""
    code = "import sys, stepjax.cli; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
