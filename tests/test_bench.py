"""The bench: its numbers are those of the requests, and they add up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from checkpoints import speaking_folder
from tiny import tiny_session

from stepjax.cli import main
from stepjax.infer.bench import Request, Spread, bench, cache_over_formula, random_requests
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling.params import SamplingParams

PARAMS = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True, seed=0)
CONFIG = EngineConfig(num_slots=2, context=64, page_size=8, widths=(32,), token_budget=32, speculate=0, num_snapshots=2)


@pytest.mark.slow
def test_the_report_counts_what_was_asked():
    engine = Engine(tiny_session(), CONFIG)
    prompts = np.random.default_rng(0).integers(8, 128, (5, 20)).tolist()
    asked = [Request(prompt, PARAMS.replace(n=1 + at % 2)) for at, prompt in enumerate(prompts)]
    report = bench(engine, asked)
    assert (report.requests, report.output_tokens, report.errors) == (7, 7 * 9, 0)
    assert report.prompt_tokens == 7 * 20
    assert report.tokens_per_decode_step == 1.0
    assert report.acceptance == []
    assert report.cached_prompt_tokens >= 2 * 16  # the second answers start where the first are
    assert report.output_tokens_per_s == pytest.approx(report.output_tokens / report.seconds)
    assert 0 < report.time_to_first_token_s.median <= report.time_to_first_token_s.p99 < report.seconds
    assert report.steps > report.prefill_steps > 0
    assert report.cache_bytes > 0


@pytest.mark.slow
def test_requests_wait_for_their_arrival():
    late = bench(Engine(tiny_session(), CONFIG), [Request([9, 10], PARAMS), Request([9, 11], PARAMS, 1.0)])
    assert late.seconds > 1.0
    assert late.time_to_first_token_s.p99 < 1.0  # counted from the arrival


def test_the_cache_holds_no_more_than_tokens_and_windows_need():
    """Here the spare rows are much beside a window of 8; of the release's 512 they are 1 %."""
    engine = Engine(tiny_session(), EngineConfig(num_slots=2, context=256, page_size=8, num_snapshots=0))
    assert 1.0 < cache_over_formula(engine) < 1.5


def test_random_requests_are_those_of_their_seed():
    asked = random_requests(6, vocab=50, prompt_tokens=(5, 9), params=PARAMS, shared_tokens=4, rate=10.0, seed=3)
    assert asked == random_requests(
        6, vocab=50, prompt_tokens=(5, 9), params=PARAMS, shared_tokens=4, rate=10.0, seed=3
    )
    assert {tuple(each.prompt[:4]) for each in asked} == {tuple(asked[0].prompt[:4])}
    assert all(5 <= len(each.prompt) <= 9 for each in asked)
    assert [each.params.seed for each in asked] == list(range(6))
    assert [each.arrival_s for each in asked] == sorted(each.arrival_s for each in asked)
    assert Spread.of([]) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return speaking_folder(tmp_path_factory.mktemp("bench") / "model")


def run(capsys, *args: object) -> tuple[int, str, str]:
    code = main(["bench", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.slow
def test_the_command_prints_json_and_a_table(capsys, folder, tmp_path):
    (tmp_path / "lines.txt").write_text("one line\n\nanother\n")
    common = ["--model", folder, "--max-tokens", 4, "--slots", 2, "--context", 256, "--speculate", 0]
    code, out, _ = run(capsys, *common, "--prompts", tmp_path / "lines.txt", "--json")
    found = json.loads(out)
    assert (code, found["requests"], found["output_tokens"]) == (0, 2, 8)
    assert found["time_to_first_token_s"].keys() == {"mean", "median", "p99"}
    code, out, _ = run(capsys, *common, "--requests", 3, "--prompt-tokens", "4:6")
    assert code == 0
    assert "12 answered" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt-tokens", "9:3"], "--prompt-tokens: is '9:3'"),
        (["--prompt-tokens", "x"], "--prompt-tokens"),
        (["--prompts", "missing.txt"], "missing.txt: cannot be read"),
        (["--slots", "0"], "num_slots: is 0"),
        (["--cache-gib", "0"], "cache_bytes: is 0"),
    ],
)
def test_bad_flags_are_refused(capsys, folder, flags, message):
    code, out, err = run(capsys, "--model", folder, *flags)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]
