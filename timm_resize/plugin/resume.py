"""timm's functions that resume training, for a checkpoint of another image size too."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from timm.models import clean_state_dict
from timm.utils import unwrap_model
from torch import nn
from torch.optim import Optimizer

from timm_resize.core.find import find_model, model_handler
from timm_resize.core.transaction import Transaction, Writes, write_all
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, text
from timm_resize.plugin.patch import Function, calling, found, stock
from timm_resize.training.optimizer_state import resize_optimizer_state_dict
from timm_resize.weights.checkpoint import read_checkpoint
from timm_resize.weights.names import by_own_names, path_in
from timm_resize.weights.state_dict import check_fits, fitted

with suppress(ImportError):  # `found` finds what is imported; an older timm has none
    importlib.import_module("timm.task")

READERS = {
    "timm.models._helpers.resume_checkpoint": ("timm.models._helpers._torch_load", ("state_dict",)),
    "timm.task._helpers.resume_task_checkpoint": ("timm.task._helpers._load_train_checkpoint", ("state_dict", "model")),
    "timm.task._helpers.load_task_ema_checkpoint": (
        "timm.task._helpers._load_train_checkpoint",
        ("state_dict_ema", "model_ema", "state_dict", "model"),
    ),
}
"""Each function that resumes: what it reads the file with, and where in it it looks for the weights, in order."""

_logger = logging.getLogger(__name__)


def resumes(path: str) -> Function:
    """Return what runs one of timm's functions on what it reads, fitted to the model that is resumed.

    All of it is loaded or, on an error, nothing.
    """
    reader, keys = READERS[path]

    def resume(*args: Any, **kwargs: Any) -> Any:
        run = stock(path)
        given = inspect.signature(run).bind(*args, **kwargs).arguments
        model = given["task"].get_eval_model(ema=keys[0] == "state_dict_ema") if "task" in given else given["model"]
        file, optimizer = given["checkpoint_path"], given.get("optimizer")
        fit = None
        if model is not None and os.path.isfile(file):
            content = read_checkpoint(file, weights_only=given.get("weights_only", True))
            fit = _fitted(content.content, content.img_size, keys, unwrap_model(model), optimizer)
        if fit is None:
            return run(*args, **kwargs)
        fitted_content, writes = fit
        out: list[Any] = []
        run = calling(run, {found(reader): lambda *_, **__: fitted_content})
        write_all([*writes, lambda _: out.append(run(*args, **kwargs))])
        return out[0]

    return resume


def _fitted(
    content: Mapping[str, Any],
    recorded: Size | None,
    keys: tuple[str, ...],
    model: nn.Module,
    optimizer: Optimizer | None,
) -> tuple[dict[str, Any], Writes] | None:
    """Return a file's content at the model's size, and what loads it; None where stock loads it as it is.

    Raises:
        CheckpointError: It is of another model, or fits no size that is known.
    """
    key = next((k for k in keys if content.get(k) is not None), None)
    state = clean_state_dict(content if key is None else content[key])
    try:
        root = find_model(model)
    except ResizeError:  # no single model of timm's
        return None
    if model_handler(root) is None:
        return None
    names, tensors = by_own_names(state, root, recorded=recorded)
    tensors, plan = fitted(tensors, root, recorded=recorded)
    if plan is None:
        return None
    check_fits(names.with_unknown(tensors, state), root, strict=True)
    _logger.info("resuming at image size %s from %s", *(text(size) for size in (plan.new_size, plan.old_size) if size))
    writes: Writes = [partial(Transaction.load, module=root, state_dict=tensors)]
    state = names.put_back(tensors, state, path_in(model, root))
    out = dict(state) if key is None else {**content, key: state}
    if optimizer is not None and "optimizer" in content:
        out["optimizer"] = resize_optimizer_state_dict(content["optimizer"], optimizer, root, source=plan.old_size)
        writes.append(partial(Transaction.load_optimizer, optimizer=optimizer, state_dict=out["optimizer"]))
    return out, writes
