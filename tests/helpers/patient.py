"""A change that somebody makes to a model, and the places where a model can have one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

Act = Callable[[nn.Module], nn.Module]


def nothing(model: nn.Module) -> nn.Module:
    """Leave a model as it is."""
    return model


class InapplicableError(Exception):
    """The model has no place for the surgery."""


@dataclass(frozen=True)
class Surgery:
    """One change, and how a plain model comes to the same function.

    Attributes:
        operate: What is done to the model; returns it, or what holds it then.
        before: What is done to a plain copy before it is resized: weights are merged, pruned, rounded.
        after: What is done to it afterwards: what does not depend on the size.
        whole: Whether `operate` takes the model with all that was done to it, and goes last.
        judged: Whether tensors alone tell the function, so that a file of them can be judged.
        carried: Whether a state dict holds all tensors, so that it says everything of a model like this one.
    """

    operate: Act
    before: Act = nothing
    after: Act = nothing
    whole: bool = False
    judged: bool = True
    carried: bool = True


def commuting(operate: Act, **kwargs: bool) -> Surgery:
    """Make a surgery that may as well be done after the resize."""
    return Surgery(operate, after=operate, **kwargs)


class Patient:
    """A bare model, whose places are chosen at random, half of the time where something depends on the size."""

    def __init__(self, model: nn.Module, pick: random.Random, sized: Iterable[str]) -> None:
        self.model, self.pick, self.seed = model, pick, pick.randrange(2**31)
        self.sized = set(sized)

    def place(self, fits: Callable[[str, nn.Module], bool]) -> str:
        """Choose a module."""
        paths = [path for path, module in self.model.named_modules() if path and fits(path, module)]
        return self._one([p for p in paths if any(k.rpartition(".")[0] == p for k in self.sized)], paths)

    def tensor(self, least: int = 0) -> tuple[str, str]:
        """Choose a parameter of at least so many dimensions: the path of its module, and its name there."""
        keys = [k for k, p in self.model.named_parameters() if p.dim() >= least]
        path, _, name = self._one([k for k in keys if k in self.sized], keys).rpartition(".")
        return path, name

    def _one(self, first: list[str], all_of_them: list[str]) -> str:
        if not all_of_them:
            raise InapplicableError
        return self.pick.choice(first if first and self.pick.random() < 0.5 else all_of_them)

    def drawing(self, act: Callable[[nn.Module], object]) -> Act:
        """Let an act draw the same random numbers each time, and return the model."""

        def drawn(model: nn.Module) -> nn.Module:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(self.seed)
                act(model)
            return model

        return drawn

    def replacing(self, path: str, make: Callable[[nn.Module], nn.Module]) -> Act:
        """Put something else in a module's place."""
        return self.drawing(lambda model: put(model, path, make(model.get_submodule(path)).eval()))


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the module at a path."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def in_order(*acts: Callable[[nn.Module], object]) -> Act:
    """Do one after another."""

    def all_of_them(model: nn.Module) -> nn.Module:
        for act in acts:
            act(model)
        return model

    return all_of_them
