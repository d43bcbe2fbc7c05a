"""What ``convert`` writes is loaded by transformers itself, through compressed-tensors where that is the form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import COMPANIONS, Tensors, levelled, random_tensors, short_hub_config, tiny_hub_config, write_folder

from stepjax.cli import main
from stepjax.infer.load import load

pytestmark = pytest.mark.oracle

IDS = np.random.default_rng(3).integers(0, 128, (1, 40))
TOLERANCE = 2e-4  # float32 sums in another order


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    hub = short_hub_config()
    tensors = {name: levelled(value) if value.ndim == 3 else value for name, value in random_tensors(hub).items()}
    written = write_folder(tmp_path_factory.mktemp("back") / "model", hub, tensors)
    for name in COMPANIONS:
        (written / name).unlink()
    return written


def written(folder: Path, target: Path, *flags: str) -> Path:
    assert main(["convert", str(folder), str(target), *flags]) == 0
    return target


@pytest.mark.compressed
@pytest.mark.parametrize(
    "flags",
    [
        ("--form", "int4"),
        ("--form", "int4", "--group", "16"),
        ("--form", "int8"),
        ("--form", "nvfp4"),
        ("--form", "mxfp4"),
        ("--form", "int4", "--calibrate", "tokens.json", "--budget", "6"),
    ],
    ids=" ".join,
)
def test_transformers_loads_it_through_compressed_tensors(folder, tmp_path, monkeypatch, flags):
    import torch
    from golden.hub_model import Step3p5ForCausalLM, logits_of

    monkeypatch.chdir(tmp_path)
    Path("tokens.json").write_text(json.dumps(np.random.default_rng(0).integers(0, 128, (4, 24)).tolist()))
    packed = written(folder, tmp_path / "packed", *flags)
    model, report = Step3p5ForCausalLM.from_pretrained(packed, dtype=torch.float32, output_loading_info=True)
    mtp = tuple(f"model.layers.{i}." for i in (3, 4, 5))
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    assert all(name.startswith(mtp) for name in report["unexpected_keys"])
    model.hf_quantizer.compressor.decompress_model(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = module.weight.data.float()
    theirs = logits_of(model.eval(), IDS)[0]
    ours = load(packed, dtype="float32").logits(IDS[0].tolist())
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert np.abs(load(folder, dtype="float32").logits(IDS[0].tolist()) - ours).max() > 1e-3  # it is another model


def test_transformers_loads_the_release_s_own_form(folder, tmp_path):
    """Its class of Step 3.7, whose vision half is made small and left at random."""
    import torch
    from transformers.models.step3p7.modeling_step3p7 import Step3p7ForConditionalGeneration

    plain = written(folder, tmp_path / "plain", "--form", "bf16")
    hub = json.loads((plain / "config.json").read_text())
    vision = {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14}
    wrapped = {"model_type": "step3p7", "text_config": hub, "vision_config": vision}
    wrapped |= {"architectures": ["Step3p7ForConditionalGeneration"]}
    (plain / "config.json").write_text(json.dumps(wrapped))
    model, report = Step3p7ForConditionalGeneration.from_pretrained(
        plain, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert all("vision" in name or "projector" in name for name in report["missing_keys"])
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.from_numpy(IDS)).logits[0].float().numpy()
    np.testing.assert_allclose(load(plain, dtype="float32").logits(IDS[0].tolist()), theirs, atol=TOLERANCE)


def test_transformers_widens_the_release_s_fp8(folder, tmp_path):
    """Weight by weight: loading a whole checkpoint, 5.23 leaves out the scales of stacked down projections."""
    import torch
    from golden.hub_model import logits_of, model_of
    from safetensors import safe_open
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    packed = written(folder, tmp_path / "packed", "--form", "fp8")
    stored = {}
    for path in packed.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — not a dict
    tool, tensors = Fp8Dequantize(None), {}
    for name, value in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        wide = value.float() if scale is None else tool._dequantize_one(value, scale, torch.float32)
        tensors[name] = wide.numpy()
    theirs = logits_of(model_of(short_hub_config(), tensors, torch.float32), IDS)[0]
    np.testing.assert_allclose(load(packed, dtype="float32").logits(IDS[0].tolist()), theirs, atol=TOLERANCE)


def test_the_class_with_the_hub_s_names_is_transformers_own(folder):
    """`hub_model` differs from transformers' text model in names and in how experts are held alone."""
    import torch
    from golden.hub_model import logits_of, model_of
    from golden.make import Oracle

    hub = tiny_hub_config()  # whose layer 1 is of the kind of MTP blocks, as the oracle needs it
    tensors: Tensors = random_tensors(hub)
    expected = Oracle(hub, tensors).run(IDS)["logits"]
    np.testing.assert_allclose(logits_of(model_of(hub, tensors, torch.float32), IDS), expected, atol=TOLERANCE)
