"""Resume training from a checkpoint of another image size."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from torch.optim import Optimizer

from timm_resize.core.find import find_model
from timm_resize.core.transaction import Stateful, Transaction, write_all
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size, SizeLike, parse_size
from timm_resize.training.optimizer_state import resize_optimizer_state_dict
from timm_resize.weights.checkpoint import read_checkpoint, saved_size
from timm_resize.weights.names import by_own_names
from timm_resize.weights.source import check_given
from timm_resize.weights.state_dict import check_fits, fitted


class Scaler(Stateful, Protocol):
    """A gradient scaler as timm has it; the file keeps its state under `state_dict_key`."""

    state_dict_key: str


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

    As `timm.models.resume_checkpoint`, which needs the checkpoint's own size. Everything is computed and checked before
    anything is loaded; should a load fail all the same, what was loaded before it is taken back.

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
    root = find_model(model)
    at = f"{type(root).__name__}: checkpoint_path={os.fspath(checkpoint_path)!r}"
    try:
        checkpoint = read_checkpoint(checkpoint_path)
    except OSError as error:
        raise CheckpointError(f"{at} cannot be read: {error}. Give a file of timm's CheckpointSaver.") from None
    content = checkpoint.content
    wanted = {"state_dict": model, "optimizer": optimizer, "state_dict_ema": ema}
    for key in (key for key, what in wanted.items() if what is not None):
        if not isinstance(content.get(key), Mapping):
            advice = "Give a file of timm's CheckpointSaver" if key == "state_dict" else "Leave it out"
            raise CheckpointError(f"{at} has no {key!r}. {advice}.")
    epoch = content.get("epoch")
    if "epoch" in content and type(epoch) is not int:
        raise CheckpointError(f"{at} has epoch={epoch!r}, not a number. Set the epoch in the file.")
    given = None if source is None else parse_size(source, "source")
    check_given(at, given, checkpoint.img_size, "source")
    size = given or saved_size(checkpoint, root)
    writes = [_loads(root, content["state_dict"], size)]
    if ema is not None:
        writes.append(_loads(find_model(ema), content["state_dict_ema"], size))
    if optimizer is not None:
        state = resize_optimizer_state_dict(content["optimizer"], optimizer, root, source=size)
        writes.append(partial(Transaction.load_optimizer, optimizer=optimizer, state_dict=state))
    if loss_scaler is not None and loss_scaler.state_dict_key in content:
        state = content[loss_scaler.state_dict_key]
        writes.append(partial(Transaction.load_other, thing=loss_scaler, state_dict=state))
    write_all(writes)
    return None if epoch is None else epoch + (1 if content.get("version", 1) > 1 else 0)


def _loads(root: nn.Module, state_dict: Mapping[str, Tensor], source: Size | None) -> Callable[[Transaction], None]:
    """Return the write that loads a checkpoint's tensors, checked and of the model's size."""
    names, tensors = by_own_names(state_dict, root, recorded=source)
    tensors = names.with_unknown(fitted(tensors, root, source=source)[0], state_dict)
    check_fits(tensors, root, strict=True)
    return partial(Transaction.load, module=root, state_dict=tensors)
