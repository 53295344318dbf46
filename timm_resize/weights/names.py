"""Which entries of a state dict are a model's, and under which names: the one place that knows of prefixes."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from timm.models import is_model, model_entrypoint
from torch import Tensor, nn

from timm_resize.core.apply import apply_plan
from timm_resize.core.copies import planning_copy
from timm_resize.core.planner import plan_to
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size
from timm_resize.weights.source import candidates, classifier_prefixes, shape_mismatch, sized_tensors

V = TypeVar("V")

Filter: TypeAlias = Callable[..., dict[str, Tensor]]
"""One of stock's `checkpoint_filter_fn`: of a state dict, and nearly always of a model."""

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that `torch.compile`, FSDP and checkpoint wrappers put anywhere into them."""
CONTAINERS = ("state_dict", "model", "model_state_dict", "module", "teacher", "net")
"""Keys under which programs keep a state dict in a file, in the order in which they are looked for."""
AVERAGED = ("state_dict_ema", "model_ema")
"""Likewise for an averaged one, which timm prefers."""


@dataclass(frozen=True)
class Names:
    """How the names of a state dict map to those of a model inside whatever holds it.

    Attributes:
        mine: The model's name of a tensor → its name in the state dict.
        prefix: What stands before the model's names there, without the parts that wrappers add; '' for nothing.
        gone: Names in the state dict of what the model computes from its geometry, or has under another name.
    """

    mine: dict[str, str]
    prefix: str
    gone: frozenset[str] = frozenset()

    @classmethod
    def of(cls, state_dict: Mapping[str, object], root: nn.Module, path: str = "") -> Names:
        """Find a model's names.

        Args:
            state_dict: Of the model, or of something that holds it and other things.
            root: The model.
            path: Its dotted path in what the state dict is meant for, which decides where two parts fit as well.

        Raises:
            CheckpointError: Nothing of the model is there, too little, or two parts fit as well.
        """
        own = {plain(key): key for key in root.state_dict(keep_vars=True)}
        found: dict[str, dict[str, str]] = {}
        for key in state_dict:
            parts = plain(key).split(".")
            for i in range(len(parts)):
                if (name := ".".join(parts[i:])) in own:
                    found.setdefault(".".join(parts[:i]), {})[own[name]] = key
        votes = Counter({prefix: len(names) for prefix, names in found.items()})
        most = max(votes.values(), default=0)
        if 2 * most < min(len(own), sum(isinstance(v, Tensor) for v in state_dict.values())) or not most:
            raise _nothing_of(root, state_dict, own)
        best = [prefix for prefix, count in votes.items() if count == most]
        if len(best) > 1:
            best = [p for p in best if bare(p) == bare(path)] or [p for p in best if not bare(p)] or best
        if len(best) > 1:
            raise CheckpointError(
                f"{type(root).__name__}: two parts of the state dict fit it as well: {best[0]}.* and {best[1]}.*. "
                f"Give one of them: {{k: v for k, v in state_dict.items() if k.startswith({best[0] + '.'!r})}}."
            )
        prefix = best[0]
        return cls(found[prefix], prefix, computed(state_dict, root, prefix))

    def pick(self, state_dict: Mapping[str, V]) -> dict[str, V]:
        """Return the model's entries by the model's names."""
        return {name: state_dict[key] for name, key in self.mine.items()}

    def below(self, state_dict: Mapping[str, V]) -> dict[str, V]:
        """Return all that stands below the prefix without it, also what the model does not know."""
        start = f"{self.prefix}." if self.prefix else ""
        short = {key: plain(key).removeprefix(start) for key in state_dict if plain(key).startswith(start)}
        known, gone = {key: name for name, key in self.mine.items()}, {*self.gone, "n_averaged"}
        return {known.get(key, name): state_dict[key] for key, name in short.items() if key not in gone}

    def with_unknown(self, tensors: Mapping[str, V], state_dict: Mapping[str, V]) -> dict[str, V]:
        """Return tensors with what a state dict of the model alone has besides, which strict loads refuse."""
        return dict(tensors) if bare(self.prefix) else {**self.below(state_dict), **tensors}

    def put_back(
        self, tensors: Mapping[str, V], state_dict: Mapping[str, V], path: str, held: Container[str] = ()
    ) -> dict[str, V]:
        """Return the state dict with the model's entries replaced by `tensors`, under the names that came in.

        At the same place, which `path` is in what will load them, names have no parts of wrappers that are not there,
        and what an average counts goes unless it is `held` there, too.
        """
        start, there = (f"{place}." if place else "" for place in (self.prefix, path))
        if bare(self.prefix) == bare(path):
            renamed = {key: there + name for name, key in self.mine.items()}
            put = {there + name: value for name, value in tensors.items()}
            gone = {*self.gone} if "n_averaged" in held else {*self.gone, "n_averaged"}
        else:
            renamed = {key: key for key in self.mine.values()}
            put = {self.mine.get(name, start + name): value for name, value in tensors.items()}
            gone = {*self.gone}
        kept = {renamed.get(key, key): value for key, value in state_dict.items() if key not in gone}
        return {key: put.get(key, value) for key, value in {**kept, **put}.items()}


def by_own_names(
    state_dict: Mapping[str, Tensor], root: nn.Module, path: str = "", recorded: Size | None = None
) -> tuple[Names, dict[str, Tensor]]:
    """Return a model's names in a state dict, and its tensors by its own names.

    Where they are not those of this timm, stock's filter for the model's family renames them.

    Args:
        state_dict: Of the model, or of something that holds it and other things.
        root: The model.
        path: Its dotted path in what the state dict is meant for.
        recorded: The size that the checkpoint's file gives.

    Raises:
        CheckpointError: Nothing of the model is there.
    """
    own = root.state_dict(keep_vars=True).keys()
    try:
        names = Names.of(state_dict, root, path)
    except CheckpointError:
        renamed = _renamed(state_dict, root, own - state_dict.keys(), recorded)
        if renamed is None:
            raise
        return Names({}, "", frozenset(state_dict)), renamed
    tensors, below = names.pick(state_dict), names.below(state_dict)
    if own - tensors.keys() and below.keys() - own:
        renamed = _renamed(below, root, own - tensors.keys(), recorded)
        if renamed is not None:
            mine = {k: v for k, v in names.mine.items() if k in renamed}
            start = f"{names.prefix}." if names.prefix else ""
            gone = {k for k in state_dict if plain(k).startswith(start)} - {*mine.values()}
            return Names(mine, names.prefix, frozenset(gone)), renamed
    return names, tensors


def _renamed(
    state_dict: Mapping[str, Tensor], root: nn.Module, lacking: set[str], recorded: Size | None
) -> dict[str, Tensor] | None:
    """Return what stock's filter makes of a state dict, None where that is no nearer to the model's names.

    The filter also resamples what is not of its model's size, in stock's way; it is run on an empty copy of each size
    that the file may be of, until there is nothing to resample.
    """
    rename, own = family_filter(root), root.state_dict(keep_vars=True)
    if rename is None:
        return None
    given = {v.untyped_storage().data_ptr() for v in state_dict.values() if isinstance(v, Tensor)}
    sized = sized_tensors(root)
    for options in candidates(state_dict, root, recorded=recorded):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                at_source = planning_copy(root)
                apply_plan(at_source, plan_to(at_source, **options))
                out = rename(dict(state_dict), at_source)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception:  # a size that cannot be; names that the filter does not know: each raises what it likes
            continue
        shapes = {k: tuple(v.shape) for k, v in at_source.state_dict(keep_vars=True).items()}
        as_they_were = all(out[k].untyped_storage().data_ptr() in given for k in sized if k in out)
        fits = as_they_were and shape_mismatch(shapes, out, classifier_prefixes(root)) is None
        if fits and len(own.keys() - out.keys()) < len(lacking):
            gone = computed(out, root)
            return {k: v for k, v in out.items() if k not in gone}
    return None


def plain(key: str) -> str:
    """Return a name without the parts that wrappers add.

    Example:
        >>> plain("module.blocks.0._orig_mod.attn.qkv.weight")
        'module.blocks.0.attn.qkv.weight'
    """
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def bare(prefix: str) -> str:
    """Return a prefix without the parts that wrappers of a whole model add.

    Example:
        >>> bare("module._orig_mod"), bare("module.net")
        ('', 'net')
    """
    return ".".join(part for part in plain(prefix).split(".") if part != "module")


def path_in(outer: nn.Module, root: nn.Module) -> str:
    """Return the dotted path of a model in what holds it."""
    return next(path for path, module in outer.named_modules(remove_duplicate=False) if module is root)


def family_filter(root: nn.Module) -> Filter | None:
    """Return what stock timm renames other programs' checkpoints of a model with, None where it has nothing."""
    name = (getattr(root, "pretrained_cfg", None) or {}).get("architecture") or ""
    homes = [getattr(model_entrypoint(name), "__module__", "")] if is_model(name) else []
    for home in (*homes, type(root).__module__):
        found = getattr(sys.modules.get(home), "checkpoint_filter_fn", None)
        if found is not None:
            return found
    return None


def unpacked(checkpoint: Mapping[str, Any], use_ema: bool = True) -> Mapping[str, Any]:
    """Return the state dict inside what a program saved; what is one already is returned as it is."""
    keys = (*AVERAGED, *CONTAINERS) if use_ema else CONTAINERS
    while (inner := next((v for k in keys if isinstance(v := checkpoint.get(k), Mapping)), None)) is not None:
        checkpoint = inner
    return checkpoint


def computed(state_dict: Mapping[str, object], root: nn.Module, prefix: str = "") -> frozenset[str]:
    """Return the names of masks, indices, coordinates and caches that other programs save and the model computes."""
    start, own = (f"{prefix}." if prefix else ""), root.state_dict(keep_vars=True)
    buffers = {f"{path}.{n}" if path else n for path, module in root.named_modules() for n in module._buffers}
    names = {start + plain(name) for name in buffers if name not in own}
    return frozenset(key for key in state_dict if plain(key) in names)


def _nothing_of(root: nn.Module, state_dict: Mapping[str, object], own: Mapping[str, str]) -> CheckpointError:
    first = next(iter(state_dict), None)
    packed = next((k for k, v in state_dict.items() if isinstance(v, Mapping)), None)
    if first is None:
        what, advice = "the state dict is empty", "Give the model's tensors by name"
    elif packed is not None:
        what = f"the state dict holds others: {', '.join(map(repr, list(state_dict)[:4]))}"
        advice = f"Give one of them, e.g. checkpoint[{packed!r}]"
    else:
        what = f"the checkpoint is of another model: its first key is {first!r}, this one's is {next(iter(own), '')!r}"
        advice = "Give a checkpoint of this architecture, or build the one that it is of"
    return CheckpointError(f"{type(root).__name__}: {what}. {advice}.")
