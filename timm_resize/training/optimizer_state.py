"""Optimizer state through a resize, live and in state dicts."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from timm_resize.core.apply import apply_plan
from timm_resize.core.copies import planning_copy
from timm_resize.core.find import current_size, find_model
from timm_resize.core.followers import OptimizerLike, ParamState, mapped_state, misshapen
from timm_resize.core.planner import plan_to
from timm_resize.errors import CheckpointError
from timm_resize.geometry import SizeLike, parse_size
from timm_resize.resample import Resample
from timm_resize.weights.names import Names
from timm_resize.weights.source import source_geometry


def resize_optimizer_state_dict(
    state_dict: dict[str, Any], optimizer: OptimizerLike, model: nn.Module, *, source: SizeLike | None = None
) -> dict[str, Any]:
    """Fit an optimizer's state dict saved at one image size to a model at another.

    Args:
        state_dict: From `optimizer.state_dict()` at the other size. Parameters are told apart by their names where it
            gives them (`torch.optim.AdamW(model.named_parameters())`, torch's distributed checkpoints), whatever holds
            the model; else they are in the same order. Not changed.
        optimizer: The optimizer that will load it, over `model`'s parameters.
        model: The model, at its own size.
        source: Image size (H, W) of the checkpoint; by default the one that the shapes of the state fit.

    Returns:
        A new state dict. For optimizers that keep state of other shapes (factored), that of the resampled parameters is
        left out, so that it starts afresh.

    Raises:
        CheckpointError: Other parameters, another number of them, or state that fits no size that is known.

    Example:
        >>> import timm, timm_resize, torch
        >>> def at(size):
        ...     model = timm.create_model("vit_tiny_patch16_224", img_size=size, depth=1)
        ...     return model, torch.optim.AdamW(model.parameters())
        >>> (small, old), (large, new) = at(64), at(96)
        >>> small(torch.randn(2, 3, 64, 64)).sum().backward(); old.step()
        >>> new.load_state_dict(timm_resize.resize_optimizer_state_dict(old.state_dict(), new, large))
        >>> new.state[large.pos_embed]["exp_avg"].shape
        torch.Size([1, 37, 192])
    """
    root = find_model(model)
    groups = _paired(state_dict["param_groups"], optimizer, root)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    saved = [i for group in groups for i in group["params"]]
    names = {id(p): k for k, p in root.named_parameters()}
    keys = {i: names.get(id(p), "") for i, p in zip(saved, order, strict=True)}
    like = _shapes(state_dict["state"], keys, {k: p.shape for k, p in root.named_parameters()})
    maps, shapes = _maps(root, like, source)
    out = {**state_dict, "state": {}, "param_groups": groups}
    sized = {i: shapes.get(keys.get(i, ""), p.shape) for i, p in zip(saved, order, strict=True)}
    odd = any(misshapen(state, sized[i]) for i, state in state_dict["state"].items() if i in sized)
    for index, state in state_dict["state"].items():
        key = keys.get(index, "")
        if key not in maps:
            out["state"][index] = state
        elif not odd:
            out["state"][index] = {**state, **mapped_state(state, shapes[key], maps[key])}
    return out


def _paired(saved: list[dict[str, Any]], optimizer: OptimizerLike, root: nn.Module) -> list[dict[str, Any]]:
    """Return copies of saved groups whose parameters stand in the order of the optimizer's.

    Raises:
        CheckpointError: They are not of the optimizer's parameters.
    """
    groups, ours = copy.deepcopy(saved), [len(group["params"]) for group in optimizer.param_groups]
    theirs = [len(group["params"]) for group in groups]
    if ours != theirs:
        raise _other_optimizer(root, f"has groups of {theirs} parameters, the optimizer of {ours}")
    by_group = [group.get("param_names") or [i for i in group["params"] if isinstance(i, str)] for group in groups]
    if not all(by_group):
        return groups
    names = {id(p): key for key, p in root.named_parameters()}
    found = Names.of(dict.fromkeys(name for group in by_group for name in group), root).mine
    for group, theirs_named, here in zip(groups, by_group, optimizer.param_groups, strict=True):
        at = {name: i for i, name in enumerate(theirs_named)}
        own = [names.get(id(p), "") for p in here["params"]]
        lacking = next((key for key in own if key and found.get(key) not in at), None)
        if lacking:
            raise _other_optimizer(root, f"has no {lacking} in the group where the optimizer has it")
        rest = iter([i for name, i in at.items() if name not in {found[key] for key in own if key}])
        order = [at[found[key]] if key else next(rest) for key in own]
        for entry in ("params", "param_names"):
            if entry in group:
                group[entry] = [group[entry][i] for i in order]
    return groups


def _other_optimizer(root: nn.Module, what: str) -> CheckpointError:
    return CheckpointError(
        f"{type(root).__name__}: the optimizer state {what}. Build the optimizer as it was when the state was saved."
    )


def _shapes(
    states: dict[int, ParamState], keys: dict[int, str], shapes: dict[str, torch.Size]
) -> dict[str, Tensor] | None:
    """Return a stand-in for the weights: per parameter a state tensor of its shape; None where some have no such."""
    out = {}
    for index, state in states.items():
        found = [v for v in state.values() if isinstance(v, Tensor) and v.numel() > 1]
        key = keys.get(index, "")
        if found and key:
            whole = [v for v in found if v.dim() == len(shapes[key])]
            if not whole:
                return None
            out[key] = whole[0]
    return out


def _maps(
    root: nn.Module, like: dict[str, Tensor] | None, source: SizeLike | None
) -> tuple[dict[str, Resample], dict[str, torch.Size]]:
    """Return the maps from the source's size to the model's, and the source's shapes, by parameter name."""
    name = type(root).__name__
    found = None if like is None else source_geometry(like, root)
    if source is not None:
        found = {"img_size": parse_size(source, "source", name)}
    if found is None:
        why = "fits no square image size" if like is not None else "is factored, which does not tell its image size"
        raise CheckpointError(f"{name}: the optimizer state {why}. Give source=(height, width), the size it is of.")
    at_source = planning_copy(root)
    apply_plan(at_source, plan_to(at_source, **found))
    plan = plan_to(at_source, current_size(root))
    return {c.key: c.how for c in plan if isinstance(c.how, Resample)}, {
        k: p.shape for k, p in at_source.named_parameters()
    }
