"""The OpenAPI document says what the server does: schemathesis asks it thousands of strange questions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from serving import NAME, Serving

CASES = int(os.environ.get("STEPJAX_FUZZ_CASES", "2000"))


@pytest.mark.slow
@pytest.mark.fuzz
def test_no_failure_and_no_undocumented_status(step_tiny, tmp_path):
    """With answers that are cut early: what is asked for may be thousands of tokens.

    A failure is not shrunk, which would take longer than all cases do; the first few are shown as they came.
    """
    with Serving(step_tiny) as server:
        fit = server.engine.fit

        def fit_short(prompt, params=None):
            found = fit(prompt, params)
            return found.replace(max_tokens=min(found.max_tokens, 8), min_tokens=min(found.min_tokens, 8))

        server.engine.fit = fit_short
        document = server.client.get("/openapi.json").json()
        for schema in document["components"]["schemas"].values():
            if "model" in schema.get("properties", {}):  # else nearly all would ask for models that are not there
                schema["properties"]["model"] = {"enum": ["step-tiny", NAME]}
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        paths = document["paths"].values()
        # Schemathesis counts examples by operation, and those without a body have one or a few.
        with_body = sum("requestBody" in operation for operations in paths for operation in operations.values())
        flags = f"--max-examples {-(-CASES // with_body)} --phases examples,fuzzing --seed 1 --workers 1 --no-color"
        flags += " --no-shrink --max-failures 5 --request-timeout 120"
        checks = "--checks not_a_server_error,status_code_conformance"
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", "openapi.json", "--url", server.url]
        done = subprocess.run(
            [*command, *flags.split(), *checks.split()], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stdout[-6000:]
        (count,) = re.findall(r"(\d+) generated", done.stdout)
        assert int(count) >= CASES, done.stdout[-3000:]
        text = server.client.get("/metrics").text
        answered = sum(map(float, re.findall(r"^stepjax:request_success_total{.*} (\S+)$", text, re.MULTILINE)))
        assert answered >= CASES / 20  # the others were refused for what they asked
        assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4}).status_code == 200
