"""A run without values of what a plan makes, for models with modules in them that no handler was written for.

A subclass, a replaced block or a wrapper may have a size of its own that no plan knows. The planned model on the meta
device says so, by the shapes that do not fit. A model of stock classes alone costs a look at its types.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from types import MethodType

import torch
from torch import Tensor, nn

from timm_resize.core.copies import HOLDERS, planning_copy
from timm_resize.core.find import Walk
from timm_resize.core.input_check import HOOK
from timm_resize.core.plan import ResizePlan
from timm_resize.core.registry import handler_for
from timm_resize.core.transaction import write_all
from timm_resize.core.values import model_writes
from timm_resize.geometry import Size

STOCK = ("timm", "torch", "timm_resize")
"""Packages whose modules handlers are written for."""


def strangers(root: nn.Module, modules: Walk) -> dict[str, nn.Module]:
    """Return the modules, by path, of classes that no handler was written for, or whose forward was replaced."""
    own = handler_for(type(root))
    home = own.cls.__module__ if own is not None and own.cls is type(root) else ""  # whose parts its author knows
    library = own.cls.__module__.split(".")[0] if own is not None and own.size is not None else ""
    stock = (*STOCK, library) if library else STOCK

    def is_known(cls: type) -> bool:
        if cls.__module__.split(".")[0] in stock or cls.__module__ == home:
            return True
        handler = handler_for(cls)
        return handler is not None and handler.cls is cls

    odd = {cls for cls in {type(module) for _, module, _ in modules} if not is_known(cls)}
    found = {path: m for path, m, _ in modules if type(m) in odd or "forward" in m.__dict__ or _spans_tokens(m)}
    head = None if library else _odd_head(root)  # other libraries name widths and classifiers in other ways
    return found if head is None else {**found, "classifier": head}


def _spans_tokens(module: nn.Module) -> bool:
    """Whether a norm is over more than channels, as none of stock's is: it has a weight for each token."""
    return type(module) is nn.LayerNorm and len(module.normalized_shape) > 1


def _odd_head(root: nn.Module) -> nn.Module | None:
    """Return a classifier that is no layer over the model's features: it may read tokens, by their number."""
    heads = [root._modules.get(name) for name in ("head", "fc", "classifier")]
    widths = {getattr(root, "num_features", None), getattr(root, "head_hidden_size", None)}
    for head in heads:
        if isinstance(head, (nn.Linear, nn.Sequential)):
            linears = (m for m in head.modules() if isinstance(m, nn.Linear))
            if next((m.in_features for m in linears), None) not in (None, *widths):
                return head
    return None


def misfit(root: nn.Module, plan: ResizePlan, odd: dict[str, nn.Module]) -> str:
    """Return where a model, resized by `plan`, fails on an image of the new size, and why; '' where it does not.

    Raises:
        CannotRun: It fails at its present size too, or cannot be copied, so that nothing is known.
    """
    failed = _run(root, plan, plan.new_size, odd)
    if failed and (plan.old_size is None or _run(root, None, plan.old_size, odd)):
        raise CannotRun(failed)
    return failed


def other_linear(plan: ResizePlan, odd: dict[str, nn.Module]) -> str:
    """Return the path of a linear layer that changes and is none: its class's forward does another thing; '' for none.

    Shapes cannot tell: a square weight that is kept transposed fits. It is tried on two rows of numbers.
    """
    changed = {change.key for change in plan.tensors}
    for path, layer in odd.items():
        if isinstance(layer, nn.Linear) and f"{path}.weight" in changed and not _is_linear(layer):
            return path
    return ""


def _is_linear(layer: nn.Linear) -> bool:
    if layer.weight.is_meta:
        return True  # as far as can be known
    x = torch.linspace(-1, 1, 2 * layer.in_features, device=layer.weight.device).reshape(2, -1).exp().to(layer.weight)
    try:
        with torch.no_grad():
            got, want = deepcopy(layer).eval()(x), nn.functional.linear(x, layer.weight, layer.bias)
    except (RuntimeError, TypeError, ValueError):
        return False
    return got.shape == want.shape and bool((got - want).abs().max() <= 1e-2 * want.abs().max())


class CannotRun(Exception):  # noqa: N818  (a signal to the planner)
    """Raised where a model takes no image alone, or computes with values that a run without values has not."""


def failure(root: nn.Module, size: Size) -> str:
    """Return where a model as it is fails on an image of `size`, and why; '' where it does not."""
    return _run(root, None, size, {})


def _run(root: nn.Module, plan: ResizePlan | None, size: Size, odd: dict[str, nn.Module]) -> str:
    """Run a copy, planned or as it is, on an image without values; return which module fails and how, '' for none."""
    copy = planning_copy(root)
    if plan is not None:
        write_all(model_writes(copy, plan, {}))
    running: list[str] = []
    for path, module in copy.named_modules():
        _prepare(module, root.get_submodule(path), path, running)
    channels = getattr(root, "in_chans", None) or next(
        (m.in_channels for m in root.modules() if isinstance(m, nn.Conv2d)), 3
    )
    dtype = next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)
    try:
        with torch.no_grad():
            copy.eval()(torch.empty(2, channels, *size, device="meta", dtype=dtype))
    except Exception as error:  # the code of anybody
        inside = [path for path in running if path in odd]
        path = inside[-1] if inside else running[-1] if running else ""
        cls = type(root.get_submodule(path)).__name__
        return f"{path or 'the model'}, a {cls}, fails ({type(error).__name__}: {str(error).splitlines()[0]})"
    return ""


def _prepare(module: nn.Module, original: nn.Module, path: str, running: list[str]) -> None:
    """Let a copy of a module share nothing that a run writes to, and note in `running` which modules are at work."""
    for name, value in list(module.__dict__.items()):
        if isinstance(value, Tensor):
            module.__dict__[name] = torch.empty_like(value, device="meta")
        elif type(value) is dict and name not in HOLDERS:  # a cache
            module.__dict__[name] = {key: kept for key, kept in value.items() if not isinstance(kept, Tensor)}
    forward = module.__dict__.get("forward")
    if isinstance(forward, MethodType) and forward.__self__ is original:
        module.__dict__["forward"] = MethodType(forward.__func__, module)
    elif forward is not None:
        raise CannotRun(f"{path} has a forward that is bound to the model itself")
    computing = {
        key: hook
        for key, hook in module._forward_pre_hooks.items()
        if key == HOOK or type(hook).__module__.startswith("torch.nn.utils.")  # others of the user's may keep values
    }
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(computing), OrderedDict()
    module.register_forward_pre_hook(lambda *_: running.append(path), prepend=True)
    module.register_forward_hook(lambda *_: running.remove(path))  # returns None, which keeps the output
