"""Which device a run uses, and how it computes there, through Hugging Face accelerate."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment

from transferkit.exceptions import SettingError

__all__ = ["PRECISIONS", "choose_device", "make_accelerator"]

PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def choose_device(device: str | None = None) -> torch.device:
    """Return the device of that name, or the best there is.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` …, or ``None``.

    Raises:
        SettingError: The device does not exist.

    Example:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    best = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return best or torch.device("cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        there = ", ".join(["cpu"] + ([best.type] if best is not None else []))
        raise SettingError(f"device={device!r} is not there; this machine has {there}") from error


def make_accelerator(device: str | None = None, precision: str = "auto") -> Accelerator:
    """Set up accelerate for a device and a precision.

    Args:
        device: As for :func:`choose_device`. Under ``accelerate launch`` or ``torchrun`` each process has its own, and
            this must be ``None``.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` (CUDA only), or ``"auto"``: bf16 on a GPU that computes in it,
            else fp32.

    Raises:
        SettingError: The device does not exist, or cannot compute in this precision.
    """
    if precision not in PRECISIONS:
        raise SettingError(f"precision={precision!r}; it can be {', '.join(PRECISIONS)}")
    chosen = choose_device(device)
    if precision == "auto":
        precision = "bf16" if chosen.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    if precision == "fp16" and chosen.type != "cuda":
        raise SettingError(f"precision='fp16' needs a CUDA device, not {chosen}; use bf16 or fp32")
    if not torch.distributed.is_initialized():
        # accelerate keeps its choice in process-wide state and refuses another one; a single process may change.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    mixed = "no" if precision == "fp32" else precision
    if device is None:
        return Accelerator(mixed_precision=mixed)
    with patch_environment(accelerate_torch_device=str(chosen)):
        return Accelerator(mixed_precision=mixed, cpu=chosen.type == "cpu")
