"""Resume training from a checkpoint of another image size."""

from __future__ import annotations

import os
from typing import Any, Protocol

from timm.models import _helpers, clean_state_dict
from torch import nn
from torch.optim import Optimizer

from timm_resize.core.find import current_size, find_model
from timm_resize.errors import CheckpointError
from timm_resize.geometry import SizeLike
from timm_resize.training.optimizer_state import resize_optimizer_state_dict
from timm_resize.weights.source import source_geometry
from timm_resize.weights.state_dict import resize_state_dict


class Scaler(Protocol):
    """A gradient scaler as timm has it."""

    state_dict_key: str

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what the file has under `state_dict_key`."""


def resume_checkpoint(
    model: nn.Module,
    checkpoint_path: str | os.PathLike[str],
    optimizer: Optimizer | None = None,
    loss_scaler: Scaler | None = None,
    *,
    ema: nn.Module | None = None,
    source: SizeLike | None = None,
) -> int | None:
    """Load a file of timm's `CheckpointSaver` into a model at another size, its optimizer and EMA copy with it.

    As `timm.models.resume_checkpoint`, which needs the checkpoint's own size. Everything is computed before anything is
    loaded.

    Args:
        model: The model, at the size that training goes on at.
        checkpoint_path: The file.
        optimizer: The optimizer over the model's parameters; its state is resized too.
        loss_scaler: A gradient scaler whose state is in the file under `state_dict_key`, as timm's.
        ema: The EMA copy (ModelEmaV2/V3, AveragedModel or a plain copy), at the model's size.
        source: Image size (H, W) of the checkpoint, where its shapes cannot tell.

    Returns:
        The epoch to go on with, None when the file does not say.

    Raises:
        CheckpointError: The file cannot be read, lacks what was asked for, or fits no size that is known.
    """
    at = f"{type(find_model(model)).__name__}: checkpoint_path={os.fspath(checkpoint_path)!r}"
    try:
        checkpoint = _helpers._torch_load(os.fspath(checkpoint_path), map_location="cpu", weights_only=True)
    except Exception as error:  # each way of being broken has an error of its own
        raise CheckpointError(f"{at} cannot be read: {error}. Give a file of timm's CheckpointSaver.") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CheckpointError(f"{at} has no 'state_dict'. Give a file of timm's CheckpointSaver.")
    for what, key in ((optimizer, "optimizer"), (ema, "state_dict_ema")):
        if what is not None and key not in checkpoint:
            raise CheckpointError(f"{at} has no {key!r}. Leave it out.")
    root = find_model(model)
    saved = clean_state_dict(checkpoint["state_dict"])
    if source is None:  # the weights tell it best
        source = (source_geometry(saved, root) or {}).get("img_size", current_size(root))
    weights = resize_state_dict(saved, root, source=source)
    state = averaged = None
    if optimizer is not None:
        state = resize_optimizer_state_dict(checkpoint["optimizer"], optimizer, root, source=source)
    if ema is not None:
        averaged = resize_state_dict(clean_state_dict(checkpoint["state_dict_ema"]), find_model(ema), source=source)
    root.load_state_dict(weights)
    if averaged is not None and ema is not None:
        find_model(ema).load_state_dict(averaged)
    if state is not None and optimizer is not None:
        optimizer.load_state_dict(state)
    if loss_scaler is not None and loss_scaler.state_dict_key in checkpoint:
        loss_scaler.load_state_dict(checkpoint[loss_scaler.state_dict_key])
    if "epoch" not in checkpoint:
        return None
    return int(checkpoint["epoch"]) + (1 if checkpoint.get("version", 1) > 1 else 0)
