"""What people do to a model before they resize it, at random places; each with what it does to a plain model."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from timm.models._features import FeatureGetterNet
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

from tests.helpers.odd_layers import (
    Doubled,
    Grouped,
    Lit,
    Lora,
    LoraLinear,
    OpenLora,
    Parallel,
    Same,
    Scaled,
    Transposed,
)
from tests.helpers.patient import InapplicableError, Patient, Surgery, commuting, in_order, nothing, put
from timm_resize.core.history import CHAIN


def _is_linear(path: str, module: nn.Module) -> bool:
    return type(module) is nn.Linear


def nothing_at_all(p: Patient) -> Surgery:
    return Surgery(nothing)


def adapter(p: Patient) -> Surgery:
    path, cls = p.place(_is_linear), p.pick.choice([Lora, OpenLora, LoraLinear])

    def merge(model: nn.Module) -> None:
        layer = model.get_submodule(path)
        made = cls(layer)
        layer.weight += made.b @ made.a

    return Surgery(p.replacing(path, cls), before=p.drawing(merge))


def peft_adapter(p: Patient) -> Surgery:
    if importlib.util.find_spec("peft") is None:
        raise InapplicableError
    import peft

    path, inside = p.place(_is_linear), p.pick.random() < 0.5
    keep = [p.place(_is_linear)] if not inside and p.pick.random() < 0.3 else None
    config = peft.LoraConfig(
        r=2, target_modules=[path], modules_to_save=keep, init_lora_weights=False, use_dora=p.pick.random() < 0.1
    )

    def inject(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            made = peft.inject_adapter_in_model(config, model) if inside else peft.get_peft_model(model, config)
        return made.eval()

    def merge(model: nn.Module) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(p.seed)
            made = peft.get_peft_model(copy.deepcopy(model), config)
        model.load_state_dict(made.merge_and_unload().state_dict())
        return model

    return Surgery(inject, before=merge)


def pruned(p: Patient) -> Surgery:
    path, name = p.tensor()

    def cut(model: nn.Module) -> None:
        prune.random_unstructured(model.get_submodule(path), name, amount=0.3)

    return Surgery(p.drawing(cut), before=in_order(p.drawing(cut), lambda m: prune.remove(m.get_submodule(path), name)))


def reparametrised(p: Patient) -> Surgery:
    """By hooks, and by torch's parametrisations."""
    path, name = p.tensor(least=2)
    do, undo = p.pick.choice(
        [
            (hooked_weight_norm, remove_weight_norm),
            (hooked_spectral_norm, remove_spectral_norm),
            (parametrizations.weight_norm, parametrize.remove_parametrizations),
            (parametrizations.spectral_norm, parametrize.remove_parametrizations),
            (lambda m, n: parametrize.register_parametrization(m, n, Doubled()), parametrize.remove_parametrizations),
        ]
    )
    act = p.drawing(lambda model: do(model.get_submodule(path), name).eval())
    return Surgery(act, before=in_order(act, lambda model: undo(model.get_submodule(path), name)))


def other_norm(p: Patient) -> Surgery:
    path = p.place(lambda path, m: "norm" in type(m).__name__.lower() and hasattr(m, "weight"))
    kind = p.pick.choice([nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.Identity, nn.GroupNorm])

    def make(old: nn.Module) -> nn.Module:
        width = old.weight.shape[0] if isinstance(old.weight, Tensor) else 1
        return kind(1, width) if kind is nn.GroupNorm else kind(width)

    return commuting(p.replacing(path, make))


def other_head(p: Patient) -> Surgery:
    path = (getattr(p.model, "pretrained_cfg", None) or {}).get("classifier")
    if not isinstance(path, str) or not isinstance(dict(p.model.named_modules()).get(path), nn.Linear):
        raise InapplicableError
    return p.pick.choice(
        [
            commuting(p.drawing(lambda model: model.reset_classifier(7))),
            commuting(p.replacing(path, lambda old: nn.Linear(old.in_features, 7))),
            commuting(p.replacing(path, lambda old: nn.Sequential(nn.Dropout(0.1), nn.Linear(old.in_features, 5)))),
            commuting(p.replacing(path, lambda old: nn.Identity())),
        ]
    )


def frozen(p: Patient) -> Surgery:
    def freeze(model: nn.Module) -> None:
        for param in model.parameters():
            param.requires_grad_(bool(torch.rand(()) < 0.5))

    return commuting(p.drawing(freeze))


def tied(p: Patient) -> Surgery:
    """Two layers with one tensor, or one block in two places."""
    path, name = p.tensor()
    shape = p.model.get_submodule(path).get_parameter(name).shape
    others: list[tuple[str, str]] = []
    for key, param in p.model.named_parameters():
        place, _, other = key.rpartition(".")
        if param.shape == shape and (place, other) != (path, name):
            others.append((place, other))
    if not others:
        raise InapplicableError
    place, other = p.pick.choice(others)

    def tie(model: nn.Module) -> nn.Module:
        model.get_submodule(place)._parameters[other] = model.get_submodule(path)._parameters[name]
        return model

    def equal(model: nn.Module) -> None:
        model.get_submodule(place).get_parameter(other).copy_(model.get_submodule(path).get_parameter(name))

    return Surgery(tie, before=p.drawing(equal))


def shared_block(p: Patient) -> Surgery:
    """One block in two places."""
    path = p.place(lambda path, m: bool(list(m.parameters())) and path.rpartition(".")[2].isdigit())
    parent, shapes = path.rpartition(".")[0], _shapes(p.model.get_submodule(path))
    brothers = [n for n, m in p.model.get_submodule(parent).named_children() if _shapes(m) == shapes]
    brothers = [f"{parent}.{n}" for n in brothers if f"{parent}.{n}" != path]
    if not brothers:
        raise InapplicableError
    other = p.pick.choice(brothers)
    return Surgery(
        in_order(lambda model: put(model, other, model.get_submodule(path))),
        before=in_order(lambda model: put(model, other, copy.deepcopy(model.get_submodule(path)))),
    )


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in module.state_dict().items()}


def tensor_elsewhere(p: Patient) -> Surgery:
    """A buffer, or a plain attribute, in a parameter's place."""
    (path, name), kind = p.tensor(), p.pick.choice(["buffer", "passing buffer", "attribute"])

    def move(model: nn.Module) -> nn.Module:
        module = model.get_submodule(path)
        tensor = module._parameters.pop(name).detach().clone()
        if kind == "attribute":
            module.__dict__[name] = tensor
        else:
            module.register_buffer(name, tensor, persistent=kind == "buffer")
        return model

    return Surgery(move, carried=kind == "buffer")


def without_layer(p: Patient) -> Surgery:
    path = p.place(lambda path, m: True)
    if isinstance(parent := p.model.get_submodule(path.rpartition(".")[0]), nn.Sequential) and p.pick.random() < 0.5:
        last, above = len(parent) - 1, path.rpartition(".")[0]
        return commuting(in_order(lambda model: model.get_submodule(above).__delitem__(last)))
    return commuting(p.replacing(path, lambda old: nn.Identity()))


def more_layers(p: Patient) -> Surgery:
    above = p.place(lambda path, m: isinstance(m, (nn.Sequential, nn.ModuleList)) and len(m) > 0)

    def add(model: nn.Module) -> nn.Module:
        layers = model.get_submodule(above)
        layers.append(copy.deepcopy(layers[-1]))
        return model

    return commuting(add)


def around_layer(p: Patient) -> Surgery:
    path = p.place(lambda path, m: not isinstance(m, nn.ModuleList))
    make = p.pick.choice([Scaled, nn.Sequential, lambda m: nn.Sequential(m, nn.Dropout(0.1)), Parallel])
    return commuting(p.replacing(path, make))


def other_linear(p: Patient) -> Surgery:
    path, make = p.place(_is_linear), p.pick.choice([Transposed, Grouped, Same])
    return Surgery(p.replacing(path, make), judged=False)


def hooked(p: Patient) -> Surgery:
    path = p.place(lambda path, m: not isinstance(m, (nn.ModuleList, nn.ModuleDict)))
    return commuting(in_order(lambda model: model.get_submodule(path).register_forward_hook(_smaller)))


def _smaller(module: nn.Module, args: object, out: object) -> object:
    return out * 0.9 if isinstance(out, Tensor) else out


def projection(p: Patient) -> Surgery:
    """A stem of convolutions in the place of the patch projection, or a kernel as of another patch.

    A file of the latter is one of a model with that patch, as far as anybody can tell from it.
    """
    path = p.place(lambda path, m: path.rpartition(".")[2] == "proj" and _cuts(m))
    old = p.model.get_submodule(path)
    assert isinstance(old, nn.Conv2d)
    patch = old.stride[0]
    if patch % 2 or old.kernel_size != old.stride:
        raise InapplicableError

    def stem(conv: nn.Module) -> nn.Module:
        first = nn.Conv2d(conv.in_channels, 8, 2, 2)
        return nn.Sequential(first, nn.GELU(), nn.Conv2d(8, conv.out_channels, patch // 2, patch // 2))

    def wider(conv: nn.Module) -> nn.Module:
        return nn.Conv2d(conv.in_channels, conv.out_channels, patch + 2, patch, padding=1)

    def dilated(conv: nn.Module) -> nn.Module:
        return nn.Conv2d(conv.in_channels, conv.out_channels, patch // 2, patch, dilation=2)

    return commuting(p.replacing(path, p.pick.choice([stem, wider, dilated])), judged=False)


def _cuts(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride[0] > 1


def other_class(p: Patient) -> Surgery:
    def rename(model: nn.Module) -> nn.Module:
        model.__class__ = type("Mine", (type(model),), {})
        return model

    return commuting(rename)


def layout(p: Patient) -> Surgery:
    return commuting(lambda model: model.to(memory_format=torch.channels_last))


def dtype(p: Patient) -> Surgery:
    if getattr(p.model, CHAIN, None):  # goes back to the original through a cast, which the rounded reference does not
        raise InapplicableError
    kind = p.pick.choice([torch.bfloat16, torch.float16, torch.float64])

    def cast(model: nn.Module) -> nn.Module:
        return model.to(kind)

    return Surgery(cast, before=lambda model: model.to(kind).float(), after=cast, whole=True)


def wrapper(p: Patient) -> Surgery:
    kinds: list[Callable[[nn.Module], nn.Module]] = [
        Lit,
        Parallel,
        nn.Sequential,
        torch.compile,
        ModelEmaV3,
        torch.optim.swa_utils.AveragedModel,
        Scaled,
    ]
    layers = [p.pick.choice(kinds) for _ in range(p.pick.choice([1, 1, 2]))]

    def wrap(model: nn.Module) -> nn.Module:
        for layer in layers:
            model = layer(model)
        return model.eval()

    return commuting(wrap, whole=True)


def features(p: Patient) -> Surgery:
    """timm's own wrapper for feature maps."""
    if not hasattr(p.model, "forward_intermediates"):
        raise InapplicableError
    return commuting(lambda model: FeatureGetterNet(model, out_indices=[-1]).eval(), whole=True)


SURGERIES: dict[str, Callable[[Patient], Surgery]] = {
    act.__name__.replace("_", " "): act
    for act in (
        nothing_at_all,
        adapter,
        peft_adapter,
        pruned,
        reparametrised,
        other_norm,
        other_head,
        frozen,
        tied,
        shared_block,
        tensor_elsewhere,
        without_layer,
        more_layers,
        around_layer,
        other_linear,
        hooked,
        projection,
        other_class,
        layout,
        dtype,
        wrapper,
        features,
    )
}
