"""Machines as people write them, and where their figures come from."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepjax.errors import ConfigError
from stepjax.sharding.planner.hardware import DEVICES, parse, read_devices


@pytest.mark.parametrize(
    ("text", "name", "devices", "nodes", "domain"),
    [
        ("8xH100", "H100", 8, 1, 8),
        ("H200", "H200", 1, 1, 1),
        ("4 nodes of 8xH200", "H200", 32, 4, 8),
        ("64xH100", "H100", 64, 8, 8),
        ("72xGB200", "GB200", 72, 1, 72),
        ("2 nodes of 4xGB200", "GB200", 8, 2, 8),  # trays of one rack
        ("36 nodes of 4xGB200", "GB200", 144, 36, 72),
        ("2x DGX Spark", "DGX-Spark", 2, 2, 1),
        ("8 x a100 80gb", "A100-80", 8, 1, 8),
        ("8×b200", "B200", 8, 1, 8),
        ("3 nodes of 4xH100", "H100", 12, 3, 4),
    ],
)
def test_hardware_as_people_write_it(text, name, devices, nodes, domain):
    found = parse(text)
    assert (found.device.name, found.num_devices, found.num_nodes, found.domain) == (name, devices, nodes, domain)


@pytest.mark.parametrize("text", ["", "8x", "8xH900", "H100x8", "0xH100", "99999xH100", "8 nodes of", "-1xH100"])
def test_hardware_that_is_not(text):
    with pytest.raises(ConfigError, match="hardware"):
        parse(text)


def test_every_figure_has_a_source():
    assert set(DEVICES) == {"A100-40", "A100-80", "H100", "H200", "B200", "GB200", "DGX-Spark"}
    for device in DEVICES.values():
        assert device.sources
        assert all(what and where for what, where in device.sources.items())


def test_a_file_changes_figures_and_adds_devices(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text('[H100]\nbandwidth = 3.0e12\n[mine]\nbase = "H200"\nmemory_bytes = 120e9\n', encoding="utf-8")
    devices = read_devices(path)
    assert devices["H100"].bandwidth == 3.0e12
    assert devices["H100"].bf16 == DEVICES["H100"].bf16
    assert parse("4xmine", devices).device.memory_bytes == 120e9
    assert DEVICES["H100"].bandwidth == 3.35e12
    for text, message in [
        ("H100 = 1", "expected a table"),
        ("[H100]\nspeed = 1", "'speed'"),
        ("[new]\nbandwidth = 1e12", "lacks memory_bytes"),
        ('[new]\nbase = "H900"', "base = 'H900'"),
        ("[H100]\nbandwidth = -1", "bandwidth = -1"),
        ("[H100]\nall_reduce = [[2048, 1e-5], [1024, 2e-5]]", "fewest bytes first"),
        ("[H100]\nall_reduce = [[2048, 0]]", "pairs of bytes and seconds"),
        ("[H100]\nbandwidth = 0", "more than 0"),
        ("[H100", "cannot be read as TOML"),
    ]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match=message):
            read_devices(path)
