"""The OpenAPI document says what the server does: schemathesis asks it thousands of strange questions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Serving

CASES = int(os.environ.get("STEPJAX_FUZZ_CASES", "2000"))


@pytest.mark.slow
@pytest.mark.fuzz
def test_no_failure_and_no_undocumented_status(step_tiny, tmp_path):
    """With answers that are cut early: what is asked for may be thousands of tokens."""
    with Serving(step_tiny) as server:
        fit = server.engine.fit

        def fit_short(prompt, params=None):
            found = fit(prompt, params)
            return found.replace(max_tokens=min(found.max_tokens, 8), min_tokens=min(found.min_tokens, 8))

        server.engine.fit = fit_short
        operations = sum(map(len, server.client.get("/openapi.json").json()["paths"].values()))
        each = -(-CASES // operations)
        # Schemathesis counts examples by operation.
        flags = f"--max-examples {each * 2} --phases examples,fuzzing --seed 1 --workers 1 --no-color"
        checks = "--checks not_a_server_error,status_code_conformance"
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
        done = subprocess.run(
            [*command, *flags.split(), *checks.split()], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stdout[-6000:]
        (count,) = re.findall(r"(\d+) generated", done.stdout)
        assert int(count) >= CASES, done.stdout[-3000:]
        assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4}).status_code == 200
