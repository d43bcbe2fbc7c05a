"""Write a checkpoint whose experts are rounded by what they see, with a certificate of what that took."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stepjax._version import __version__
from stepjax.calibration.budget import check_budget, chosen_bits
from stepjax.calibration.certificate import certificate, write_certificate
from stepjax.calibration.data import CalibrationData
from stepjax.calibration.encoder import CalibratedEncoder
from stepjax.calibration.forward import Forward
from stepjax.checkpoint.folder import ModelFolder, open_weights
from stepjax.checkpoint.form_writer import write_form
from stepjax.checkpoint.reader import ProgressCallback
from stepjax.errors import RequestError
from stepjax.packings.written import PackedInts, WrittenForm

CERTIFICATE = "quantisation.json"


def write_calibrated(
    folder: Path,
    model: ModelFolder,
    form: WrittenForm,
    data: CalibrationData,
    *,
    command: str,
    budget: float | None,
    companions: Mapping[str, bytes] | None,
    max_shard_bytes: int,
    progress: ProgressCallback | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write ``model`` in ``form`` and return the certificate, which the folder holds as quantisation.json.

    The source runs over the data on the default device, then the result over the rows that were held out. Nothing is
    drawn at random: the same command on the same machine gives the same bytes.

    Args:
      command: that makes this folder again.
      budget: mean bits of an expert's value; layers that cost most in 4 bits get 8. None: all layers as ``form`` says.
      say: told what is done.

    Raises:
      RequestError: the form cannot be calibrated.
    """
    if not isinstance(form, PackedInts):
        raise RequestError(f"--calibrate: goes with --form int4 or int8, not {form.name}")
    if budget is not None:
        check_budget(budget, form)
    source = model.checkpoint
    say(f"running {len(data.rows)} rows, {data.num_tokens:,} tokens, to see what experts are given")
    forward = Forward(source)
    inputs, reference = forward.layer_inputs(data.rows), forward.scored(data.held_out)
    bits = None
    if budget is not None:
        say(f"measuring the {len(inputs)} layers in 4 bits, one at a time")
        bits = chosen_bits(budget, forward, source, form, data.rows)
    del forward
    held = bits.form(form) if bits else form
    encoder = CalibratedEncoder(source, held, inputs)
    written = write_form(
        folder,
        source,
        held,
        encode=encoder,
        companions=companions,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        say=say,
    )
    say(f"measuring with {len(data.held_out)} rows that were held out")
    ours = Forward(open_weights(written)).scored(data.held_out)
    layers = [layer.index for layer in source.config.moe_layers]
    found = {
        "command": command,
        "version": __version__,
        "form": {"name": form.name, "bits": form.bits, "group": form.columns},
        **({"bits": bits.as_dict()} if bits else {}),
        "rounding": "GPTQ",
        "seed": None,
        "data": {
            "file": data.path.name,
            "sha256": data.sha256,
            "rows": len(data.rows),
            "tokens": data.num_tokens,
            "held_out_rows": len(data.held_out),
        },
        "experts": encoder.report(),
        "held_out": certificate(ours, reference, layers=layers),
    }
    write_certificate(written / CERTIFICATE, found)
    return found
