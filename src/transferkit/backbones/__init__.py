"""Backbones: any torchvision or timm classifier by name, or a module the user built."""

from transferkit.backbones._adapt import adapt_module
from transferkit.backbones._base import Backbone
from transferkit.backbones._channels import change_channels
from transferkit.backbones._load import (
    ModelInfo,
    build_network,
    list_models,
    load_backbone,
    model_info,
    resolve_name,
)
from transferkit.backbones._stages import StageNames, split_into_stages
from transferkit.backbones._state_dict import read_state_dict
from transferkit.backbones._timm import timm_layers
from transferkit.backbones._weights import WeightsReport, fit_state_dict
from transferkit.backbones.stem import StemChange, change_stem

__all__ = [
    "Backbone",
    "ModelInfo",
    "StageNames",
    "StemChange",
    "WeightsReport",
    "adapt_module",
    "change_channels",
    "change_stem",
    "build_network",
    "fit_state_dict",
    "list_models",
    "load_backbone",
    "model_info",
    "read_state_dict",
    "resolve_name",
    "split_into_stages",
    "timm_layers",
]
