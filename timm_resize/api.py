"""What a user or a third-party handler may rely on, as `timm_resize.<name>`."""

from timm_resize.builds.infer import Inferred, infer
from timm_resize.core.context import Changes, Context, Grids
from timm_resize.core.plan import Change, Rebuild, Reinitialise, ResizePlan
from timm_resize.core.registry import families, register, registry, unregister
from timm_resize.errors import CheckpointError, InvalidSizeError, ResizeError, StalePlanError, UnsupportedModelError
from timm_resize.hub.push import push_to_hub
from timm_resize.hub.save import save_pretrained
from timm_resize.multi_size import MultiSize
from timm_resize.plugin.create_model import create_model
from timm_resize.plugin.data_config import data_config
from timm_resize.plugin.install import install, uninstall
from timm_resize.resample import AxisMap, Resample
from timm_resize.resize import at_size, nearest_sizes, plan_resize, resize_
from timm_resize.training import (
    ProgressiveResize,
    SizeSchedule,
    freeze_unresized_,
    param_groups,
    recalibrate_,
    resampled,
    resize_ddp,
    resize_fsdp,
    resize_optimizer_state_dict,
    resume_checkpoint,
)
from timm_resize.version import __version__
from timm_resize.weights.state_dict import resize_state_dict

__all__ = [
    "AxisMap",
    "Change",
    "Changes",
    "CheckpointError",
    "Context",
    "Grids",
    "Inferred",
    "InvalidSizeError",
    "MultiSize",
    "ProgressiveResize",
    "Rebuild",
    "Reinitialise",
    "Resample",
    "ResizeError",
    "ResizePlan",
    "SizeSchedule",
    "StalePlanError",
    "UnsupportedModelError",
    "__version__",
    "at_size",
    "create_model",
    "data_config",
    "families",
    "freeze_unresized_",
    "infer",
    "install",
    "nearest_sizes",
    "param_groups",
    "plan_resize",
    "push_to_hub",
    "recalibrate_",
    "register",
    "registry",
    "resampled",
    "resize_",
    "resize_ddp",
    "resize_fsdp",
    "resize_optimizer_state_dict",
    "resize_state_dict",
    "resume_checkpoint",
    "save_pretrained",
    "uninstall",
    "unregister",
]
