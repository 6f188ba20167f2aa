"""A trained network in a file that runs without transferkit: ONNX, or torch's own exported program (``.pt2``).

A file gets its name only once it has been opened again and has given the network's own logits for photographs, at
three sizes of batch.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import io
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from transferkit.exceptions import ExportError, OutputError, SettingError, TransferkitError, one_line
from transferkit.model import TransferModel
from transferkit.randomness import keeps_generators
from transferkit.transforms import eval_transform

__all__ = [
    "Export",
    "describe",
    "export_onnx",
    "export_program",
    "frozen_copy",
    "onnx_program",
    "onnx_session",
    "sample_images",
    "whole_files",
]

_BATCHES = (1, 3, 8)
_TOLERANCE = 1e-4
# Bytes of weights. Protobuf ends at 2 GiB, and the graph needs some of it.
_ONE_FILE = 2_000_000_000
_CHANNEL_ORDER = {1: "grey", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True)
class Export:
    """A network that was exported, and how close it is to the original.

    Attributes:
        path: The file.
        difference: Largest difference between a logit of the file and the original's, over all batches that were
            compared; where logits are larger than 1, as a share of the largest.
    """

    path: Path
    difference: float


def export_onnx(
    model: TransferModel,
    path: str | os.PathLike[str],
    *,
    images: Tensor | None = None,
    opset: int | None = None,
) -> Export:
    """Write a network as ONNX, for batches of any size, and check it with ONNX Runtime.

    The input is called ``images``: (B, C, size, size) float32, normalised. The output is called ``logits``: (B,
    num_classes) float32. What goes before and comes after stands in the file's metadata, as :func:`describe` gives it.
    Weights of more than 2 GB go into a second file beside it, ``NAME.onnx.data``.

    Args:
        model: What to export; it is left as it is.
        path: The file, ``.onnx``; its folder is made if missing, and an older file is replaced once the new one is
            whole and right.
        images: (N, C, H, W) float, normalised, 1 or more, to compare logits on; ``None`` for :func:`sample_images`.
        opset: Version of the ONNX operators; ``None`` for the exporter's own.

    Returns:
        The file and the largest difference from the model's logits, which is 1e-4 at most.

    Raises:
        ExportError: A package is missing, the network cannot be exported, or the file gives other logits; nothing is
            written then.
        SettingError: ``path`` does not end in ``.onnx``.
        OutputError: The file cannot be written.

    Source: torch's ``torch.onnx.export(dynamo=True)``.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=["ant", "bee"], image_size=32)
        >>> export_onnx(model, "bees.pb")
        Traceback (most recent call last):
        transferkit.exceptions.SettingError: an ONNX file ends in .onnx, and bees.pb does not; call it bees.onnx
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"exporting to ONNX needs {', '.join(missing)}; install it with pip install 'transferkit[onnxruntime]'"
        )

    def write(network: nn.Module, example: Tensor, file: Path) -> None:
        def translated() -> Any:
            return onnx_program(network, example, outputs=["logits"], opset=opset)

        try:
            program = translated()
        except Exception:  # torch's fused attention has no translation for windows, which come in a fifth dimension
            if not _spell_attention_out(network):
                raise
            program = translated()
        made = program.model.opset_imports.get("")
        if opset not in (None, made):
            raise ExportError(f"opset={opset} was asked of torch's ONNX exporter, which can do {made}; leave it out")
        program.model.metadata_props.update(describe(model))
        size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values())
        if size > _ONE_FILE:
            program.save(file, external_data=True)
        else:
            file.write_bytes(program.model_proto.SerializeToString())

    def opened(file: Path) -> Callable[[Tensor], Tensor]:
        session = onnx_session(str(file))
        return lambda part: torch.from_numpy(session.run(["logits"], {"images": part.numpy()})[0])

    return _export(model, Path(path), "an ONNX file", ".onnx", images, write, opened)


def export_program(model: TransferModel, path: str | os.PathLike[str], *, images: Tensor | None = None) -> Export:
    """Write a network as an exported program of torch, for batches of any size, and check it.

    ``torch.export.load(path).module()`` takes images (B, C, size, size) float32, normalised, and gives logits (B,
    num_classes). What :func:`describe` says lies beside the program as extra files.

    Args:
        model: What to export; it is left as it is.
        path: The file, ``.pt2``; its folder is made if missing, and an older file is replaced once the new one is
            whole and right.
        images: (N, C, H, W) float, normalised, 1 or more, to compare logits on; ``None`` for :func:`sample_images`.

    Returns:
        The file and the largest difference from the model's logits, which is 1e-4 at most.

    Raises:
        ExportError: The network cannot be exported, or the file gives other logits; nothing is written then.
        SettingError: ``path`` does not end in ``.pt2``.
        OutputError: The file cannot be written.

    Source: ``torch.export``.

    Example:
        >>> from transferkit.create import adapt
        >>> from transferkit.preprocessing import Preprocessing
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 9))
        >>> model = adapt(network, class_names=["ant", "bee"], preprocessing=Preprocessing(16, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export_program(model, Path(folder) / "bees.pt2", images=torch.rand(2, 3, 16, 16))
        ...     torch.export.load(exported.path).module()(torch.zeros(5, 3, 16, 16)).shape
        torch.Size([5, 2])
    """

    def write(network: nn.Module, example: Tensor, file: Path) -> None:
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        program = torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
        for graph in program.graph_module.modules():
            if isinstance(graph, torch.fx.GraphModule):
                for node in graph.graph.nodes:
                    node.meta.pop("stack_trace", None)  # where code lies on this machine is nobody's business
        buffer = io.BytesIO()
        torch.export.save(program, buffer, extra_files=describe(model))
        file.write_bytes(buffer.getbuffer())

    def opened(file: Path) -> Callable[[Tensor], Tensor]:
        return torch.export.load(file).module()

    return _export(model, Path(path), "an exported program", ".pt2", images, write, opened)


def describe(model: TransferModel) -> dict[str, str]:
    """Say what a program must know to use an exported network.

    Args:
        model: The original.

    Returns:
        JSON texts: ``class_names``, in the order of the logits; ``preprocessing``, the fields of
        :class:`~transferkit.Preprocessing` with ``transform`` (the eval transform's name) and ``channel_order``
        (``"RGB"``, ``"grey"``, ``"RGBA"`` or ``"as trained"``); ``temperature``, by which logits are divided before
        the softmax, 1 where the model was not calibrated; ``backbone``; and ``transferkit``, the version.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, class_names=["ant", "bee"], image_size=32)
        >>> about = describe(model)
        >>> about["class_names"], json.loads(about["preprocessing"])["channel_order"]
        ('["ant", "bee"]', 'RGB')
    """
    preprocessing = model.preprocessing
    facts = {
        "class_names": list(model.class_names),
        "preprocessing": {
            "transform": model.eval_preset,
            **preprocessing.to_dict(),
            "channel_order": _CHANNEL_ORDER.get(preprocessing.channels, "as trained"),
        },
        "temperature": model.temperature,
        "backbone": model.name,
        "transferkit": version("transferkit"),
    }
    return {key: json.dumps(value, ensure_ascii=False) for key, value in facts.items()}


def sample_images(model: TransferModel) -> Tensor:
    """Cut eight pieces out of two photographs, and prepare them as the model's pictures are.

    Args:
        model: What they are for. Beyond RGB its channels get red, green and blue in turn.

    Returns:
        (8, C, size, size) float, normalised; the same at every call.

    Source: the two photographs that scikit-learn ships, a temple and a flower.

    Example:
        >>> from transferkit.create import create_model
        >>> model = create_model("timm/test_efficientnet", weights=None, num_classes=2, image_size=32)
        >>> sample_images(model).shape
        torch.Size([8, 3, 32, 32])
    """
    from sklearn.datasets import load_sample_images

    channels = model.preprocessing.channels
    transform = eval_transform(model.eval_preset, model.preprocessing)
    pieces = [
        piece
        for photo in load_sample_images().images
        for half in np.array_split(photo, 2, axis=0)
        for piece in np.array_split(half, 2, axis=1)
    ]
    if channels in (1, 3):
        return torch.stack([transform(Image.fromarray(piece)) for piece in pieces])
    turns = torch.arange(channels) % 3
    return torch.stack([transform(torch.from_numpy(piece.copy()).permute(2, 0, 1)[turns]) for piece in pieces])


def frozen_copy(module: nn.Module) -> nn.Module:
    """Copy a module into eval mode, without gradients and without what keeps its stages frozen.

    Args:
        module: It is left as it is.

    Raises:
        ValueError: A function stands in place of a forward; it would go on calling the original.

    Example:
        >>> frozen_copy(nn.Dropout().train()).training
        False
    """
    copied = copy.deepcopy(module)
    for each in copied.modules():
        vars(each).pop("train", None)  # what keeps a frozen stage in eval mode
        each.training = False
        forward = vars(each).get("forward", each.forward)
        if getattr(forward, "__self__", None) is not each:
            raise ValueError("a function in place of its forward would go on calling the original")
    for parameter in copied.parameters():
        parameter.requires_grad_(False).grad = None
    return copied


def onnx_program(
    network: nn.Module, example: Tensor, *, outputs: Sequence[str] | None = None, opset: int | None = None
) -> Any:
    """Translate a network into ONNX, for batches of any size.

    Args:
        network: In eval mode.
        example: (B, C, H, W), B 2 or more; only its shape and type count.
        outputs: Names of the outputs; ``None`` for the exporter's.
        opset: Version of the ONNX operators; ``None`` for the exporter's own.

    Returns:
        A ``torch.onnx.ONNXProgram`` with the input ``images``. It does not tell where on this machine the code lies.

    Raises:
        Exception: Whatever torch raises where it cannot.

    Source: ``torch.onnx.export(dynamo=True)``.
    """
    with warnings.catch_warnings(action="ignore"):
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            input_names=["images"],
            output_names=outputs,
            dynamic_shapes=({0: "batch"},),
            opset_version=opset,
            verbose=False,
        )
    assert program is not None
    importlib.import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(program.model)
    return program


def onnx_session(model: str | bytes) -> Any:
    """Open an ONNX file, or its content, on the CPU.

    Args:
        model: The file's path, or its bytes.

    Returns:
        An ``onnxruntime.InferenceSession`` with as many threads as torch has.
    """
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; it warns of weights that it folds away
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder whose files move into ``folder`` when a block has ended well, and vanish when it has not.

    Args:
        folder: Made if missing; files of the same names are replaced.

    Raises:
        OutputError: It cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with whole_files(Path(folder)) as place:
        ...         _ = (place / "notes.txt").write_text("whole")
        ...     [file.name for file in Path(folder).iterdir()]
        ['notes.txt']
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as place:
            yield Path(place)
            # What another file speaks of comes first: NAME.onnx.data before NAME.onnx.
            for file in sorted(Path(place).iterdir(), reverse=True):
                file.replace(folder / file.name)
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error}") from error


def _export(
    model: TransferModel,
    path: Path,
    kind: str,
    suffix: str,
    images: Tensor | None,
    write: Callable[[nn.Module, Tensor, Path], None],
    opened: Callable[[Path], Callable[[Tensor], Tensor]],
) -> Export:
    if path.suffix != suffix:
        raise SettingError(f"{kind} ends in {suffix}, and {path} does not; call it {path.with_suffix(suffix)}")
    try:
        network = frozen_copy(model.network).cpu().float()
    except Exception as error:  # networks hold whatever they like
        raise ExportError(f"{model.name} cannot be copied to be exported: {_cause(error)}") from error
    wanted = (model.preprocessing.channels, model.preprocessing.size, model.preprocessing.size)
    images = sample_images(model) if images is None else images.detach().cpu().float()
    if tuple(images.shape[1:]) != wanted or not len(images):
        sizes = ", ".join(map(str, wanted))
        raise SettingError(f"images have shape {tuple(images.shape)}; give (N, {sizes}), N 1 or more")
    parts = [images[torch.arange(count) % len(images)] for count in _BATCHES]
    with keeps_generators(), torch.no_grad(), torch.autocast("cpu", enabled=False), whole_files(path.parent) as place:
        expected = [network(part) for part in parts]  # first, since some note down what they saw while they are traced
        try:
            with warnings.catch_warnings(action="ignore"):
                write(network, torch.zeros_like(parts[1]), place / path.name)
                run = opened(place / path.name)
                given = [run(part) for part in parts]
        except (TransferkitError, OSError):
            raise
        except Exception as error:  # whatever an exporter does not know
            cause = _cause(error).replace(str(place / path.name), path.name)
            raise ExportError(f"{model.name} cannot be exported to {suffix}: {cause}") from error
        difference = 0.0
        for part, one, other in zip(parts, given, expected, strict=True):
            share = _difference(one, other)
            if not share <= _TOLERANCE:
                raise ExportError(
                    f"{model.name} gives other logits as {suffix}, off by {share:.2g} at a batch of {len(other)}"
                    f"{_rounding(network, part, other)}; it was not written"
                )
            difference = max(difference, share)
    return Export(path, difference)


def _spell_attention_out(network: nn.Module) -> bool:
    """Switch timm's attention to its own products and softmax; whether there was any to switch."""
    fused = [each for each in network.modules() if getattr(each, "fused_attn", False)]
    for each in fused:
        vars(each)["fused_attn"] = False
    return bool(fused)


def _difference(given: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest number where that is above 1."""
    if given.shape != expected.shape:
        return float("inf")
    return float((given - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def _rounding(network: nn.Module, images: Tensor, logits: Tensor) -> str:
    """Say it where the network's own logits are about as far from those in float64: then the file is as good."""
    try:
        share = _difference(logits.double(), network.double()(images.double()))
    except RuntimeError:  # a network that computes in float32 whatever it is given
        return ""
    return f" (rounding alone moves them by {share:.2g}, which float64 tells)" if share > _TOLERANCE / 4 else ""


def _cause(error: BaseException) -> str:
    """Return what went wrong at first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(f"{type(error).__name__}: {error}")
