"""ONNX, checked against torch before anybody gets it."""

import contextlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from icmoe.errors import RunError
from icmoe.export.network import DeployedNetwork

MAX_DIFFERENCE = 1e-4
MIN_AGREEMENT = 0.9999
NUM_CHECKS = 3
OPSET = 18


@dataclass(frozen=True)
class OnnxCheck:
    """How close ONNX is to torch: largest difference of a probability, share of pixels with the same class."""

    max_difference: float
    agreement: float


def write_onnx(network: DeployedNetwork, path: Path) -> OnnxCheck:
    """Export, run with onnxruntime on the CPU and compare with torch.

    Args:
        network: to export.
        path: of the file; below 2 GB, the format's own limit, its weights are inside.

    Returns:
        The worst of three random images.

    Raises:
        RunError: if onnxruntime's answer differs too much from torch's; nothing is written.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError("ONNX needs more packages: pip install 'icmoe-fl[export]'.") from error

    names = ["image", "detail"][: 1 + network.needs_detail]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    # The exporter reports its progress on stdout and warns of its own parts.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, network.example(), dynamo=True, input_names=names, output_names=["probabilities"],
            opset_version=OPSET, verbose=False,
        )  # fmt: skip
        if program is None:
            raise RunError("torch gave no ONNX program for this model; try other versions of torch and onnx.")
        program.save(str(temporary))
    session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
    checks = [_compare(network, session, names, seed=seed) for seed in range(NUM_CHECKS)]
    worst = OnnxCheck(
        float(np.max([one.max_difference for one in checks])), float(np.min([one.agreement for one in checks]))
    )
    # Put so that NaN fails as well.
    if not (worst.max_difference <= MAX_DIFFERENCE and worst.agreement >= MIN_AGREEMENT):
        temporary.unlink()
        raise RunError(
            f"ONNX differs from torch by up to {worst.max_difference:.2g} in a probability and in "
            f"{1 - worst.agreement:.2%} of the classes; allowed are {MAX_DIFFERENCE:g} and {1 - MIN_AGREEMENT:.2%}. "
            "Try other versions of torch, onnx and onnxruntime."
        )
    temporary.replace(path)
    return worst


def _compare(network: DeployedNetwork, session: object, names: list[str], *, seed: int) -> OnnxCheck:
    inputs = network.example(seed=seed)
    with torch.no_grad():
        expected = network(*inputs).numpy()
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    found = session.run(None, feeds)[0]  # type: ignore[attr-defined]
    return OnnxCheck(
        float(np.abs(found - expected).max()), float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
    )
