"""The certificate of two checkpoints: distances as they are defined, and what ``stepjax score --against`` writes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from checkpoints import speaking_folder

from stepjax.calibration.certificate import SequenceScores, certificate, overlap
from stepjax.cli import main
from stepjax.errors import RequestError
from stepjax.infer.session import Session

T, V, L, A = 300, 17, 2, 3


def made(seed: int, near: SequenceScores | None = None) -> SequenceScores:
    random = np.random.default_rng(seed)
    ids = np.arange(T, dtype=np.int32) % V
    logits = 2 * random.standard_normal((T, V)).astype(np.float32)
    if near is not None:
        logits = near.logits + 0.1 * logits
    experts = np.stack([[random.permutation(8)[:A] for _ in range(L)] for _ in range(T)]).astype(np.int32)
    return SequenceScores(ids, logits, experts)


def slow(ours: SequenceScores, other: SequenceScores) -> dict[str, float]:
    """Position by position, in float64."""
    kl, top, loss, agree = [], [], [], []
    for t in range(T):
        p, q = (np.exp(x.logits[t].astype(float)) / np.exp(x.logits[t].astype(float)).sum() for x in (other, ours))
        kl.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        top.append(p.argmax() == q.argmax())
        if t + 1 < T:
            loss.append((-math.log(q[ours.ids[t + 1]]), -math.log(p[ours.ids[t + 1]])))
        agree.append([len({*other.experts[t, layer]} & {*ours.experts[t, layer]}) / A for layer in range(L)])
    return {
        "kl": float(np.mean(kl)),
        "top": float(np.mean(top)),
        "ours": math.exp(np.mean([a for a, _ in loss])),
        "difference": float(np.mean([a - b for a, b in loss])),
        "layer 5": float(np.mean([row[1] for row in agree])),
    }


def test_distances_are_those_of_their_definition():
    other = made(0)
    ours = made(1, near=other)
    found, expected = certificate([ours, ours], [other, other], layers=[3, 5]), slow(ours, other)
    assert found["tokens"] == 2 * T
    assert found["kl"]["mean"] == pytest.approx(expected["kl"], rel=1e-6)
    assert found["same_top"] == pytest.approx(expected["top"])
    assert found["perplexity"]["ours"] == pytest.approx(expected["ours"])
    assert found["loss_difference"]["mean"] == pytest.approx(expected["difference"], abs=1e-9)
    assert found["router_agreement"]["layers"]["5"] == pytest.approx(expected["layer 5"])
    assert found["kl"]["mean"] <= found["kl"]["p99"] <= found["kl"]["max"]


def test_a_model_is_no_distance_from_itself():
    one = made(0)
    found = certificate([one], [one], layers=[3, 5])
    assert found["kl"] == {"mean": 0, "p99": 0, "max": 0}
    assert found["same_top"] == found["router_agreement"]["mean"] == 1


def test_choices_agree_in_any_order():
    ours, other = np.array([[[1, 2, 3]]]), np.array([[[3, 1, 9]]])
    assert overlap(ours, other)[0, 0] == pytest.approx(2 / 3)


def test_logits_that_are_not_finite_have_no_distance():
    one = made(0)
    broken = SequenceScores(one.ids, np.full_like(one.logits, np.nan), one.experts)
    with pytest.raises(RequestError, match="ours logits are not finite"):
        certificate([broken], [one], layers=[3, 5])


def test_scores_that_are_not_finite_are_not_written(capsys, tmp_path, monkeypatch):
    """Weights may hold NaN, which their scales do not show."""
    folder = speaking_folder(tmp_path / "model")
    (tmp_path / "tokens.json").write_text("[[1, 2]]")
    monkeypatch.setattr(Session, "logits", lambda self, ids: np.array([[0, 1], [0, np.nan]], np.float32))
    flags = ["--model", str(folder), "--tokens", str(tmp_path / "tokens.json"), "--out", str(tmp_path / "o.npz")]
    assert main(["score", *flags]) == 1
    assert f"{folder}: its scores (p0_logits) are not finite, and none are written" in capsys.readouterr().err
    assert not (tmp_path / "o.npz").exists()


@pytest.mark.slow
def test_score_against_what_was_quantised(capsys, tmp_path):
    folder = speaking_folder(tmp_path / "model")
    assert main(["convert", str(folder), str(tmp_path / "int4"), "--form", "int4"]) == 0
    (tmp_path / "tokens.json").write_text(json.dumps([list(range(20, 50)), [7, 8, 9]]))
    score = ["score", "--tokens", str(tmp_path / "tokens.json"), "--dtype", "float32", "--out", str(tmp_path / "o.npz")]
    assert main([*score, "--model", str(tmp_path / "int4"), "--against", str(folder)]) == 0
    assert "KL 0." in capsys.readouterr().out
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["tokens"] == 33
    assert found["against"] == str(folder)
    assert 0 < found["kl"]["mean"] < 1
    assert set(found["router_agreement"]["layers"]) == {"1", "2"}
