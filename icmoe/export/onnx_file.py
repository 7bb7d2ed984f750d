"""ONNX, checked against torch before anybody gets it."""

import contextlib
import io
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from icmoe.errors import RunError
from icmoe.export.check_images import Inputs
from icmoe.export.network import DeployedNetwork

MAX_DIFFERENCE = 1e-4
MIN_AGREEMENT = 0.9999
OPSET = 18


@dataclass(frozen=True)
class OnnxCheck:
    """How close ONNX is to torch.

    Attributes:
        max_difference: largest difference of a probability.
        agreement: share of pixels with the same class, in the worst image.
        images: names of the images compared.
        files: names of the files written: the model and, above 1.5 GB, its weights.
    """

    max_difference: float
    agreement: float
    images: tuple[str, ...]
    files: tuple[str, ...]


def onnx_files(folder: Path) -> list[Path]:
    """What an export left in a folder: the model and the file of its weights."""
    return [path for path in (folder / "model.onnx", folder / "model.onnx.data") if path.exists()]


def write_onnx(network: DeployedNetwork, path: Path, images: Mapping[str, Inputs]) -> OnnxCheck:
    """Export, run with onnxruntime on the CPU and compare with torch.

    Args:
        network: to export.
        path: of the file. A model above 1.5 GB does not fit into one file of this format: its weights go into a second
            one beside it, called ``.data``, which the first one names.
        images: inputs to compare on, by name; see ``check_images``.

    Returns:
        The comparison's outcome.

    Raises:
        RunError: if onnxruntime's answer differs too much from torch's; nothing is written.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError("ONNX needs more packages: pip install 'icmoe-fl[export]'.") from error

    names = ["image", "detail"][: 1 + network.needs_detail]
    # A folder, because the model names the file of its weights: both must have their final names from the start.
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _export(network, temporary / path.name, names)
        session = onnxruntime.InferenceSession(str(temporary / path.name), providers=["CPUExecutionProvider"])
        found = [_compare(network, session, names, inputs) for inputs in images.values()]
        difference, agreement = float(np.max([one[0] for one in found])), float(np.min([one[1] for one in found]))
        # Put so that NaN fails as well.
        if not (difference <= MAX_DIFFERENCE and agreement >= MIN_AGREEMENT):
            raise RunError(
                f"ONNX differs from torch by up to {difference:.2g} in a probability and in {1 - agreement:.2%} of the "
                f"classes; allowed are {MAX_DIFFERENCE:g} and {1 - MIN_AGREEMENT:.2%}. Try other versions of torch, "
                "onnx and onnxruntime."
            )
        # The weights first, so that no model stands there without them.
        files = sorted((one.name for one in temporary.iterdir()), reverse=True)
        for name in files:
            (temporary / name).replace(path.with_name(name))
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. Free some space or choose another --out."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return OnnxCheck(difference, agreement, tuple(images), tuple(sorted(files)))


def _export(network: DeployedNetwork, path: Path, names: list[str]) -> None:
    # The exporter reports its progress on stdout and warns of its own parts.
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, network.example(), dynamo=True, input_names=names, output_names=["probabilities"],
            opset_version=OPSET, verbose=False,
        )  # fmt: skip
        if program is None:
            raise RunError("torch gave no ONNX program for this model; try other versions of torch and onnx.")
        program.save(str(path))


def _compare(network: DeployedNetwork, session: object, names: list[str], inputs: Inputs) -> tuple[float, float]:
    """Largest difference of a probability, share of pixels with the same class."""
    with torch.no_grad():
        expected = network(*inputs).numpy()
    feeds = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    found = session.run(None, feeds)[0]  # type: ignore[attr-defined]
    return float(np.abs(found - expected).max()), float((found.argmax(axis=1) == expected.argmax(axis=1)).mean())
