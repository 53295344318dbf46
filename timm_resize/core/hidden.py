"""Tensors that are not where a handler looks: in PEFT's adapters and copies, pruned, normed, or of two models."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from timm_resize.core.copies import shallow_copy
from timm_resize.core.find import Walk, walk
from timm_resize.core.plan import Change
from timm_resize.errors import UnsupportedModelError
from timm_resize.resample import Resample


@dataclass(frozen=True)
class View:
    """A model as its handlers see it: what PEFT wraps stands in the wrapper's place.

    Attributes:
        root: The model itself, or copies of the module objects that hold a wrapper.
        modules: What `walk` gives of it, by the paths that the modules have in the model.
        paths: Path of every module by its id, those of the wrappers and their parts too.
        adapters: The adapters around a layer, by its id, the innermost first.
    """

    root: nn.Module
    modules: Walk
    paths: dict[int, str]
    adapters: dict[int, list[nn.Module]]


def unwrap(root: nn.Module, modules: Walk) -> list[View]:
    """Return the model as handlers see it, once for each copy that PEFT's `modules_to_save` keeps of its modules.

    A plan is made of all of them, so every copy follows, active or not.
    """
    peft = [m for _, m, _ in modules if type(m).__module__.startswith("peft.")]
    paths = {id(module): path for path, module, _ in modules}
    if not peft:
        return [View(root, modules, paths, {})]
    kept = [m._modules["modules_to_save"] for m in peft if _saves_copies(m)]
    names = dict.fromkeys(str(name) for copies in kept if copies is not None for name in copies._modules)
    return [_view(root, dict(paths), name) for name in (*names, "")]


def _saves_copies(module: nn.Module) -> bool:
    return {"original_module", "modules_to_save"} <= module._modules.keys()


def _view(root: nn.Module, paths: dict[int, str], copy: str) -> View:
    """Return the model with the copies of one name, '' for the originals, which also stand in where it has none."""
    adapters: dict[int, list[nn.Module]] = {}
    done: dict[int, nn.Module] = {}

    def bare(module: nn.Module) -> nn.Module:
        if id(module) not in done:
            done[id(module)] = _without(module)
        return done[id(module)]

    def _without(module: nn.Module) -> nn.Module:
        inside = module._modules
        if type(module).__module__.startswith("peft.") and isinstance(inside.get("base_layer"), nn.Module):
            layer = bare(module.get_submodule("base_layer"))
            adapters.setdefault(id(layer), []).append(module)
            return layer
        if _saves_copies(module):
            copies = module.get_submodule("modules_to_save")._modules
            kept = copies.get(copy)
            return bare(module.get_submodule("original_module") if kept is None else kept)
        now = {name: child if child is None else bare(child) for name, child in inside.items()}
        if all(child is inside[name] for name, child in now.items()):
            return module
        out = shallow_copy(module)
        out._modules.update(now)
        paths[id(out)] = paths[id(module)]
        return out

    seen = bare(root)
    return View(seen, [(paths[id(module)], module, end) for _, module, end in walk(seen)], paths, adapters)


LORA = {"Linear", "Conv2d"}
"""PEFT's LoRA layers whose forward is base(x) + Σ scaling · B(A(dropout(x)))."""

SIDES = {"in_features": "lora_A", "out_features": "lora_B"}
SIDES |= dict.fromkeys(("kernel_size", "stride", "padding"), "lora_A")
"""Which part of an adapter has an attribute of the layer as its own."""


def adapted_attributes(adapter: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield what records an attribute of the adapted layer, too: the adapter, and its parts on that side."""
    if name in adapter.__dict__:
        yield adapter
    parts = adapter._modules.get(SIDES.get(name, ""))
    yield from (part for part in (parts or nn.Module()).children() if name in part.__dict__)


def adapted_tensors(adapter: nn.Module, name: str, how: Resample) -> list[tuple[nn.Module, str, Resample]] | None:
    """Return where else a map of an adapted layer's tensor goes, and as which map; None where none is exact.

    A LoRA weight is W + Σ s·B·A. Mapped on either side, M(W + s·B·A)N = MWN + s·(MB)(AN): the rows of B and the
    columns of A go where those of W go, whatever the rank, the scaling, and what is merged at the moment.
    """
    parts = adapter._modules
    known = type(adapter).__module__ == "peft.tuners.lora.layer" and type(adapter).__name__ in LORA
    variant = getattr(adapter, "lora_variant", None) or any(getattr(adapter, "use_dora", {}).values())
    downs, ups = (list((parts.get(side) or nn.Module()).children()) for side in ("lora_A", "lora_B"))
    plain = all(type(part) in (nn.Linear, nn.Conv2d) for part in (*downs, *ups))
    if not known or variant or not plain or getattr(adapter, "fan_in_fan_out", False):
        return None
    if name == "bias":
        return [(up, "bias", how) for up in ups if up.bias is not None]
    sides = None if name != "weight" else _sides(how)
    if sides is None:
        return None
    rows, columns = sides
    out = [(up, "weight", rows) for up in ups] if rows is not None else []
    return out + ([(down, "weight", columns) for down in downs] if columns is not None else [])


def _sides(how: Resample) -> tuple[Resample | None, Resample | None] | None:
    """Part a map of a weight (out, in, ...) into that of its rows and that of the rest; None where it has no parts."""
    rows: Resample | None = None
    rest: Resample | None = None
    step: Resample | None = how
    steps = []
    while step is not None:
        steps.append(replace(step, then=None))
        step = step.then
    for one in reversed(steps):
        if type(one) is not Resample or (one.dim == 0 and len(one.axes) > 1 and not one.flat):
            return None
        if one.dim == 0:
            rows = replace(one, then=rows)
        else:
            rest = replace(one, then=rest)
    return rows, rest


def whereabouts(module: nn.Module, name: str) -> str:
    """Say what has become of a tensor that is no Parameter or buffer of its module, and how to undo it; '' if unknown.

    A value that is computed from others in each forward has no map of its own. Pruned: the mask picks single entries,
    and a resampled tensor is a mean over picked and unpicked ones; one that is alike for all tokens would do, but the
    product is a plain attribute, which the next forward alone renews. Normed: a row's norm changes with its length.
    """
    held = {*module._parameters, *module._buffers}
    call, module_name = f"(module, {name!r})", type(module).__module__
    if parametrize.is_parametrized(module, name):
        return f"is parametrised. Call torch.nn.utils.parametrize.remove_parametrizations{call} first{_AGAIN}"
    if {f"{name}_orig", f"{name}_mask"} <= held:
        return (
            f"is pruned, and a mask has no place at another size. Call torch.nn.utils.prune.remove{call} first{_AGAIN}"
        )
    if {f"{name}_g", f"{name}_v"} <= held:
        return f"has a weight_norm. Call torch.nn.utils.remove_weight_norm{call} first{_AGAIN}"
    if {f"{name}_orig", f"{name}_u"} <= held:
        return f"has a spectral_norm. Call torch.nn.utils.remove_spectral_norm{call} first{_AGAIN}"
    if module_name.startswith("peft."):
        return f"is adapted by a {type(module).__name__} of PEFT. {PEFT_ADVICE}"
    if isinstance(module.__dict__.get(name), Tensor):
        return "is a plain tensor, which no optimizer and no file sees. Register it as an nn.Parameter or a buffer."
    if any(True for _ in module.children()):
        return (
            f"is not there: its module is a {type(module).__name__}, which holds other layers. Put the plain layer in "
            f"its place, merged with what was added to it{_AGAIN}"
        )
    return ""


_AGAIN = ", resize, then change it again."

PEFT_ADVICE = "Call merge_and_unload() of the PEFT model, resize what it returns, then adapt that."
"""For adapters whose parts no map follows exactly."""


def parameters(root: nn.Module, changes: Iterable[Change]) -> dict[str, nn.Parameter]:
    """Return the parameters of a model that change, by name; those of a plan for another model are not there."""
    own = dict(root.named_parameters(remove_duplicate=False))
    return {c.key: own[c.key] for c in changes if c.kind == "parameter" and c.key in own}


def refuse_shared(root: nn.Module, changed: dict[str, nn.Parameter], optimizers: Iterable[Any] = ()) -> None:
    """Raise UnsupportedModelError where a module outside of the model holds a Parameter that is to change.

    Only the interpreter knows who holds a tensor. A count of holders settles the usual case; looking for them takes
    tenths of a second.

    Args:
        root: The model.
        changed: What `parameters` returns; the caller has no other name for any of them.
        optimizers: Who else is known to hold them.
    """
    held = Counter(id(p) for module in root.modules() for p in module._parameters.values())
    for one in optimizers:
        held.update(id(p) for group in one.param_groups for p in group["params"])
        held.update(map(id, one.state))
    here = 3  # the dict, the name in the loop, the argument
    suspects = [p for p in changed.values() if sys.getrefcount(p) > held[id(p)] + here]
    if not suspects or not _holders(root, suspects):
        return
    gc.collect()  # what nobody uses any more is no holder
    for param, name in _holders(root, suspects):
        key, model = next(key for key, p in changed.items() if p is param), type(root).__name__
        raise UnsupportedModelError(
            f"{model}: {key} is also the Parameter {name!r} of a module outside of it, which would not follow. Give "
            "each its own, nn.Parameter(p.detach().clone()), resize both, then tie them again.",
            model=model,
        )


def _holders(root: nn.Module, params: list[nn.Parameter]) -> list[tuple[nn.Parameter, str]]:
    """Return which parameters modules hold that are not in `root`, nor a copy of one that is, and as what."""
    own = {id(module._parameters) for module in root.modules()}
    relatives = {id(module._forward_hooks) for module in root.modules()}  # which shallow copies share
    out: list[tuple[nn.Parameter, str]] = []
    for mapping in gc.get_referrers(*params):
        if type(mapping) is not dict or id(mapping) in own:
            continue
        found = [(p, str(name)) for name, value in mapping.items() for p in params if value is p]
        for owner in gc.get_referrers(mapping) if found else ():
            state = owner.__dict__ if isinstance(owner, nn.Module) else owner
            foreign = isinstance(state, dict) and state.get("_parameters") is mapping
            if foreign and id(state["_forward_hooks"]) not in relatives:
                out += found
    return out


def tied_elsewhere(modules: Walk, changed: Iterable[nn.Parameter], asked: set[str]) -> dict[str, nn.Module]:
    """Return the modules, by path, that hold a parameter which changes, and for which no handler asked there."""
    ids = set(map(id, changed))
    return {
        path: module
        for path, module, _ in modules
        for name, param in module._parameters.items()
        if id(param) in ids and f"{path}.{name}".removeprefix(".") not in asked
    }


def tied(one: str, other: str) -> str:
    """Say that two names of one Parameter do not go the same way."""
    return (
        f"{one} and {other} are one Parameter, and only one of them follows the new size so. Give each its own, "
        "nn.Parameter(p.detach().clone()), and tie them again after the resize where their shapes agree."
    )
