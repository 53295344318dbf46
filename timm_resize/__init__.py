"""Any timm model, at any image size, with its pretrained weights carried over."""

import timm_resize.families  # noqa: F401  binds the name before the function below takes it for good
from timm_resize.apply import resize_
from timm_resize.checkpoint import resize_state_dict
from timm_resize.data import data_config
from timm_resize.errors import (
    CheckpointError,
    InvalidSizeError,
    ResizeError,
    StalePlanError,
    UnsupportedModelError,
)
from timm_resize.factory import create_model, install, uninstall
from timm_resize.hub import save_pretrained
from timm_resize.plan import Change, ResizePlan
from timm_resize.planner import nearest_sizes, plan_resize
from timm_resize.push import push_to_hub
from timm_resize.registry import families, register
from timm_resize.views import MultiSize, at_size

__version__ = "0.1.0"

__all__ = [
    "Change",
    "CheckpointError",
    "InvalidSizeError",
    "MultiSize",
    "ResizeError",
    "ResizePlan",
    "StalePlanError",
    "UnsupportedModelError",
    "at_size",
    "create_model",
    "data_config",
    "families",
    "install",
    "nearest_sizes",
    "plan_resize",
    "push_to_hub",
    "register",
    "resize_",
    "resize_state_dict",
    "save_pretrained",
    "uninstall",
]
