"""lm-eval against the server, sample by sample beside the log-likelihoods of the model itself.

    python benchmarks/harness.py --lm-eval path/to/lm_eval --json benchmarks/results/harness.json

Runs lm-eval's ``local-completions`` (token ids, remote tokenizer) from an environment of its own on a local
multiple-choice task, and compares the log-likelihood of each choice with the sum over the logits that ``stepjax score``
writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from serving import Server

from stepjax.infer.load import load, use_caches
from stepjax.infer.session import Session

TASK = """task: tiny_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""


def questions(count: int) -> list[dict[str, Any]]:
    """Prompts in plain text with four answers."""
    found = []
    for at in range(count):
        a, b = 100 + 7 * at, 358 - 3 * at
        choices = [str(a + b + shift) for shift in (0, 1, 10, 100)]
        found.append({"question": f"What is {a} + {b}?\n", "choices": choices, "answer": 0})
    return found


def loglikelihood(session: Session, text: str, choice: str) -> float:
    """Of a choice after a text, as ``stepjax score`` has it: the sum of its tokens' log-probabilities.

    As in lm-eval, whitespace at the end of the text counts to the choice, and no token stands before the text.
    """
    spaces = text[len(text.rstrip()) :]
    text, choice = text.rstrip(), spaces + choice
    start, ids = len(session.encode(text)) - 1, session.encode(text + choice)[1:]
    logits = session.logits(ids)[:, : len(session.tokenizer or ())].astype(np.float64)
    scores = logits - logits.max(-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(-1, keepdims=True))
    return float(sum(scores[at - 1, ids[at]] for at in range(start, len(ids))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lm-eval", required=True, help="its command, lm-eval[api] installed")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--max-seqs", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--speculate", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_caches()
    session = load("step-tiny", dtype="float32")
    asked = questions(args.questions)
    with tempfile.TemporaryDirectory() as scratch, Server(args) as server:
        folder = Path(scratch)
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps(each) + "\n" for each in asked), encoding="utf-8")
        (folder / "task.yaml").write_text(TASK.format(data=data), encoding="utf-8")
        url = f"http://{server.address[0]}:{server.address[1]}"
        model = (
            f"model=step-tiny,base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=2,max_length=500"
        )
        command = [args.lm_eval, "--model", "local-completions", "--model_args", model, "--tasks", "tiny_sums"]
        command += ["--include_path", scratch, "--log_samples", "--output_path", str(folder / "out")]
        subprocess.run(command, check=True)
        (samples,) = (folder / "out").rglob("samples_*.jsonl")
        (results,) = (folder / "out").rglob("results_*.json")
        accuracy = json.loads(results.read_text(encoding="utf-8"))["results"]["tiny_sums"]
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    worst = 0.0
    for row in rows:
        doc = row["doc"]
        for choice, resp in zip(doc["choices"], row["resps"], strict=True):
            worst = max(worst, abs(float(resp[0][0]) - loglikelihood(session, doc["question"], choice)))
    found = {"questions": len(rows), "choices": 4 * len(rows), "largest_difference": worst, "accuracy": accuracy}
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
