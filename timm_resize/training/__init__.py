"""What follows a model's weights through a resize while it trains: optimizers, checkpoints, schedules, wrappers."""

from timm_resize.training.distributed import resize_ddp, resize_fsdp
from timm_resize.training.groups import freeze_unresized_, param_groups, resampled
from timm_resize.training.optimizer_state import resize_optimizer_state_dict
from timm_resize.training.recalibrate import recalibrate_
from timm_resize.training.resume import resume_checkpoint
from timm_resize.training.schedule import ProgressiveResize, SizeSchedule

__all__ = [
    "ProgressiveResize",
    "SizeSchedule",
    "freeze_unresized_",
    "param_groups",
    "recalibrate_",
    "resampled",
    "resize_ddp",
    "resize_fsdp",
    "resize_optimizer_state_dict",
    "resume_checkpoint",
]
