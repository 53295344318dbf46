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
from timm_resize.training import (
    ProgressiveResize,
    SizeSchedule,
    freeze_unresized_,
    param_groups,
    resize_ddp,
    resize_fsdp,
    resize_optimizer_state_dict,
    resume_checkpoint,
)
from timm_resize.views import MultiSize, at_size

__version__ = "0.1.0"

__all__ = [
    "Change",
    "CheckpointError",
    "InvalidSizeError",
    "MultiSize",
    "ProgressiveResize",
    "ResizeError",
    "ResizePlan",
    "SizeSchedule",
    "StalePlanError",
    "UnsupportedModelError",
    "at_size",
    "create_model",
    "data_config",
    "families",
    "freeze_unresized_",
    "install",
    "nearest_sizes",
    "param_groups",
    "plan_resize",
    "push_to_hub",
    "register",
    "resize_",
    "resize_ddp",
    "resize_fsdp",
    "resize_optimizer_state_dict",
    "resize_state_dict",
    "resume_checkpoint",
    "save_pretrained",
    "uninstall",
]
