"""Find the timm model inside what wraps it, and say what cannot be resized and why."""

from __future__ import annotations

import sys

import torch
import torch.fx
from timm.models import is_model, model_entrypoint
from torch import nn

from timm_resize.core.registry import Handler, handler_for, handlers
from timm_resize.errors import UnsupportedModelError
from timm_resize.geometry import Size

TRAIT = "resized_img_size"
"""Key in a model's `_traits` for the size of classes whose constructor has no `img_size`.

timm exports `_traits['img_size']` as a constructor argument, which such a class would reject on reload.
"""

SIZE_TRAITS = ("img_size", TRAIT)

_DISTRIBUTED = {
    "DistributedDataParallel": "Call timm_resize.resize_ddp on every rank: it resizes model.module and the buckets.",
    "FullyShardedDataParallel": "Resize the model before sharding it: unwrap, resize_ on every rank, shard again.",
    "FSDPModule": "Call timm_resize.resize_fsdp on every rank: it gathers the weights, resizes and shards them anew.",
    "DataParallel": "Call resize_(model.module, ...) instead: replicas are made anew at each forward.",
}


def find_model(model: nn.Module) -> nn.Module:
    """Return the module to resize: the model itself, or the one timm model inside a wrapper.

    Raises:
        UnsupportedModelError: Scripted, distributed or quantised, not a module, or several models inside.
    """
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__}: not a torch.nn.Module. Pass the model that timm.create_model returned."
        )
    _refuse_wrapper(model)
    if root_handler(model) is not None:
        return model
    for inner in ("_orig_mod", "model", "body"):  # torch.compile, FeatureGetterNet, FeatureHookNet
        child = model._modules.get(inner)
        if child is not None and (inner == "_orig_mod" or type(model).__module__ == "timm.models._features"):
            return find_model(child)
    found: list[tuple[str, nn.Module]] = []
    for path, module in model.named_modules():
        if path and model_handler(module) and not any(path.startswith(f"{p}.") for p, _ in found):
            _refuse_wrapper(module)
            found.append((path, module))
    if len(found) > 1:
        names = ", ".join(f"{p} ({type(m).__name__})" for p, m in found)
        raise UnsupportedModelError(
            f"{type(model).__name__}: holds {len(found)} models: {names}. Resize the one you mean."
        )
    return found[0][1] if found else model


def _refuse_wrapper(model: nn.Module) -> None:
    name = type(model).__name__
    for cls in type(model).__mro__:
        if cls.__name__ in _DISTRIBUTED and cls.__module__.startswith("torch."):
            raise UnsupportedModelError(
                f"{name}: holds a copy of the parameters' shapes. {_DISTRIBUTED[cls.__name__]}", model=name
            )
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"{name}: a scripted or traced model has its shapes compiled in. Resize the eager model and script that."
        )


def refuse_state(root: nn.Module, modules: Walk) -> None:
    """Raise UnsupportedModelError for layers, of those that `walk` gave, whose tensors are not plain parameters."""
    name = type(root).__name__
    handler = model_handler(root)
    if all(map(_is_plain, {type(m) for _, m, _ in modules})):
        return
    for path, module, _ in modules:
        _refuse_wrapper(module)
        if isinstance(module, torch.fx.GraphModule) and (handler is None or handler.state):
            raise UnsupportedModelError(
                f"{name}: {path or 'the model'} is a traced graph with its shapes compiled in. Build the features with "
                "feature_cls='getter' or 'list', or resize the model before tracing it."
            )
        if type(module).__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized", "torch.ao.nn.intrinsic")):
            raise UnsupportedModelError(
                f"{name}: {path} is quantised ({type(module).__name__}). Resize the float model, then quantise it."
            )


def _is_plain(cls: type) -> bool:
    """Whether no class-wide reason speaks against resizing a module of this class."""
    refused = (torch.jit.ScriptModule, torch.fx.GraphModule)
    return not issubclass(cls, refused) and not any(
        c.__name__ in _DISTRIBUTED or c.__module__.startswith(("torch.ao.nn", "torch.nn.quantized"))
        for c in cls.__mro__
    )


Walk = list[tuple[str, nn.Module, int]]


def walk(root: nn.Module) -> Walk:
    """Return what `root.named_modules()` yields, in a fifth of the time, with the index after all that each holds."""
    out: Walk = [("", root, 0)]
    seen = {id(root)}

    def below(module: nn.Module, start: str) -> None:
        for name, child in module._modules.items():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                index, path = len(out), start + name
                out.append((path, child, index + 1))
                if child._modules:
                    below(child, f"{path}.")
                    out[index] = path, child, len(out)

    below(root, "")
    out[0] = "", root, len(out)
    return out


def model_handler(model: nn.Module) -> Handler | None:
    """Return the handler of a whole model: its class's, or for a rewritten feature wrapper its origin's."""
    handler = handler_for(type(model))
    if handler is not None:
        return handler if handler.is_model else None
    origin = _origin_handler((getattr(model, "pretrained_cfg", None) or {}).get("architecture", ""))
    if type(model).__module__ == "timm.models._features_fx":  # a traced graph: only where no size is compiled in
        return origin if origin is not None and not origin.state else None
    rewritten = type(model).__module__ == "timm.models._features" and not {"model", "body"} & model._modules.keys()
    return origin if rewritten else None


def root_handler(root: nn.Module) -> Handler | None:
    """Return the handler of what a caller asks to resize: a whole model's, or that of a class of the user's own.

    The latter may be for a module that holds a timm model beside layers of its own.
    """
    handler = handler_for(type(root))
    if handler is None or handler.is_model or handler.needs_geometry:
        return model_handler(root)
    return handler


def whole_models(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return a model, by the path '', and where it is another library's the models that it holds, by theirs."""
    own = root_handler(root)
    found = [("", root)]
    if own is not None and own.size is not None:
        for path, module, _ in walk(root)[1:]:
            handler = handler_for(type(module))
            if handler is not None and handler.is_model:
                found.append((path, module))
    return found


def _origin_handler(architecture: str) -> Handler | None:
    """Return the handler of the class that a registered name builds, by the module of its entry point."""
    if not is_model(architecture):
        return None
    source = sys.modules[model_entrypoint(architecture).__module__]
    here = [h for h in handlers() if h.is_model and vars(source).get(h.cls.__name__) is h.cls]
    own = [h for h in here if h.cls.__module__ == source.__name__] or here
    return own[0] if own and all(h.plan is own[0].plan for h in own) else None


def current_size(root: nn.Module) -> Size | None:
    """Return the model's image size (H, W): as recorded, as its patch embedding has it, or as pretrained."""
    handler = handler_for(type(root))
    if handler is not None and handler.size is not None:
        return handler.size(root)
    traits = getattr(root, "_traits", None) or {}
    embed = getattr(root, "patch_embed", None) or getattr(root, "stem", None)
    config = getattr(root, "pretrained_cfg", None) or {}
    candidates = (
        traits.get(TRAIT),
        traits.get("img_size"),
        getattr(embed, "img_size", None),
        getattr(root, "img_size", None),
        (config.get("input_size") or (None,))[1:],
    )
    for size in candidates:
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and len(size) == 2:
            return int(size[0]), int(size[1])
    return None
