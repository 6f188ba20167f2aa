"""Backbones: any torchvision or timm classifier by name, or a module the user built."""

from transferkit.backbones._base import Backbone, fit_state_dict, read_state_dict
from transferkit.backbones._load import (
    ModelInfo,
    adopt_module,
    build_network,
    list_models,
    load_backbone,
    model_info,
    resolve_name,
)
from transferkit.backbones._stages import StageNames, split_into_stages

__all__ = [
    "Backbone",
    "ModelInfo",
    "StageNames",
    "adopt_module",
    "build_network",
    "fit_state_dict",
    "list_models",
    "load_backbone",
    "model_info",
    "read_state_dict",
    "resolve_name",
    "split_into_stages",
]
