"""Random sequences of what people do to a model, each step checked against stock timm and against saved copies."""

from __future__ import annotations

import copy
import functools
import random
import tempfile
import warnings
from collections import Counter
from typing import Any

import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import nn

import timm_resize
import timm_resize.core.transaction
from tests.helpers.examples import EXAMPLES, example
from tests.helpers.oracle import assert_close, assert_same_structure, first, image, redraw_, stock, tensors

STEPS = (
    "resize",
    "train",
    "save and load",
    "deepcopy",
    "dtype",
    "install",
    "plan",
    "same size",
    "break a resize",
    "several sizes",
    "features",
)


class InjectedError(RuntimeError):
    """The injected failure."""


class Sequence:
    """One model, its optimizer, and what is known of both."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.pick = name, random.Random(seed)
        torch.manual_seed(seed)
        self.model = redraw_(example(name), seed)
        self.origin = copy.deepcopy(self.model)  # as it was when its weights changed last
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.size = self.native = timm_resize.plan_resize(self.model).new_size
        self.choices = self._sizes()
        self.counts: Counter[str] = Counter()

    def _sizes(self) -> list[tuple[int, int]]:
        """The model's own size and a few small ones that it allows."""
        half = max(self.size[0] // 2, 32)
        wanted = [(half, half), (half, half + 32), (half + 32, half), (half + 32, half + 32)]
        near = [s for w in wanted for s in timm_resize.nearest_sizes(self.model, w)[:1]]
        return list(dict.fromkeys([self.size, *near]))

    def run(self, step: str) -> None:
        """Take a step, then check."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(self, step.replace(" ", "_"))()
            self.check()
        self.counts[step] += 1

    def check(self) -> None:
        """Identity of parameters, shapes of optimizer state, a finite forward."""
        params = list(self.model.parameters())
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in params]
        for param, state in self.optimizer.state.items():
            assert all(v.shape == param.shape for k, v in state.items() if k != "step")
        assert timm_resize.plan_resize(self.model).new_size == self.size
        with torch.no_grad():
            assert first(self.model.eval()(image(self.size))).isfinite().all()

    def resize(self) -> None:
        """There, back and there: back to the bits that it had, then to the same again.

        The tensors are those of stock's `set_input_size`, where it has one; the output is that of stock's model, built
        at the size, with the same weights.
        """
        before, here = copies(self.model), self.size
        self.size = self.pick.choice(self.choices)
        timm_resize.resize_(self.model, self.size, optimizer=self.optimizer)
        there = copies(self.model)
        fixed = {k for k, p in self.model.named_parameters() if p.shape == before[k].shape and not sized(k)}
        assert all(torch.equal(there[k], before[k]) for k in fixed)
        for size, want in ((here, before), (self.size, there)):
            timm_resize.resize_(self.model, size, optimizer=self.optimizer)
            assert all(torch.equal(v, want[k]) for k, v in tensors(self.model).items())
        if self.origin is not None and (theirs := resized_by_stock(self.origin, self.size)):
            assert_close(self.model, theirs)
        if theirs := built_by_stock(self.name, self.size):
            theirs.load_state_dict(self.model.state_dict())
            with torch.no_grad():
                x = image(self.size)
                torch.testing.assert_close(first(self.model.eval()(x)), first(theirs(x)), rtol=1e-4, atol=1e-4)

    def train(self) -> None:
        self.model.train()
        first(self.model(image(self.size, batch=2))).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.origin = copy.deepcopy(self.model) if self.size == self.native else None

    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            timm_resize.save_pretrained(self.model, folder)
            again = timm_resize.create_model(f"local-dir:{folder}", pretrained=True, img_size=self.size)
        want = self.model.state_dict()
        assert all(torch.equal(v, want[k].to(v.dtype)) for k, v in again.state_dict().items())

    def deepcopy(self) -> None:
        self.model, self.optimizer = copy.deepcopy((self.model, self.optimizer))

    def dtype(self) -> None:
        there = copy.deepcopy(self.model).double()
        timm_resize.resize_(there, self.pick.choice(self.choices))
        timm_resize.resize_(there, self.size)
        want = dict(self.model.named_parameters())  # not buffers: those rebuilt in float64 are not rounded
        assert all(torch.equal(p.to(want[k].dtype), want[k]) for k, p in there.named_parameters())

    def install(self) -> None:
        with timm_resize.install():
            timm.create_model("test_resnet", img_size=64)
            self.model.set_input_size(self.size)

    def plan(self) -> None:
        before = {k: (id(v), v._version) for k, v in tensors(self.model).items()}
        timm_resize.plan_resize(self.model, self.pick.choice(self.choices))
        assert before == {k: (id(v), v._version) for k, v in tensors(self.model).items()}

    def same_size(self) -> None:
        before = {k: v.clone() for k, v in tensors(self.model).items()}
        assert not timm_resize.resize_(self.model, self.size, optimizer=self.optimizer)
        assert all(torch.equal(v, before[k]) for k, v in tensors(self.model).items())

    def break_a_resize(self) -> None:
        before, state = copy.deepcopy(self.model), copy.deepcopy(self.optimizer.state_dict())
        calls, fail, write = [0], self.pick.randrange(1, 12), timm_resize.core.transaction._write

        def failing(do: Any) -> None:
            calls[0] += 1
            if calls[0] == fail:
                raise InjectedError
            do()

        timm_resize.core.transaction._write = failing
        try:
            size = self.pick.choice([s for s in self.choices if s != self.size] or self.choices)
            timm_resize.resize_(self.model, size, optimizer=self.optimizer)
            self.size = size  # fewer writes than that
        except InjectedError:
            self.counts["faults"] += 1
            assert_same_structure(self.model, before)
            want = tensors(before)
            assert all(torch.equal(v, want[k]) for k, v in tensors(self.model).items())
            now = self.optimizer.state_dict()["state"]
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(now[i][k]))
                for i, s in state["state"].items()
                for k, v in s.items()
            )
        finally:
            timm_resize.core.transaction._write = write

    def features(self) -> None:
        """timm's feature getter over a copy, resized away and back, gives what the model's own method gives."""
        if not hasattr(self.model, "forward_intermediates"):
            return
        size = self.pick.choice(self.choices)
        features = FeatureGetterNet(copy.deepcopy(self.model), out_indices=[-1])
        try:
            timm_resize.resize_(features, size)
            timm_resize.resize_(features, self.size)
        except timm_resize.InvalidSizeError:  # EfficientFormer: features need an even map, the model does not
            assert self.name.startswith("efficientformer_")
            return
        with torch.no_grad():
            want = self.model.forward_intermediates(image(self.size), indices=[-1], intermediates_only=True)[-1]
            assert torch.equal(features(image(self.size))[-1], want)

    def several_sizes(self) -> None:
        """MultiSize gives the model's own output, and at another size that of stock's method on the present weights."""
        size, multi = self.pick.choice(self.choices), timm_resize.MultiSize(self.model)
        with torch.no_grad():
            assert torch.equal(first(multi(image(self.size))), first(self.model(image(self.size))))
            output = first(multi(image(size)))
            assert output.isfinite().all()
            theirs = resized_by_stock(self.model, size) if self.size == self.native else None
            if theirs is not None:
                torch.testing.assert_close(output, first(theirs(image(size))), rtol=1e-4, atol=1e-4)


def copies(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in tensors(model).items()}


def sized(name: str) -> bool:
    """Whether a parameter may change though its shape does not: tables of positions, and weights over tokens."""
    return any(word in name for word in ("pos", "bias", "rel", "spatial", "tokens", "gate.proj"))


def resized_by_stock(model: nn.Module, size: tuple[int, int]) -> nn.Module | None:
    """Return a copy after stock's own `set_input_size`, None where it has none or fails."""
    if not hasattr(model, "set_input_size"):
        return None
    theirs = copy.deepcopy(model).eval()
    try:
        theirs.set_input_size(img_size=size)
        with torch.no_grad():
            theirs(image(size))
    except (AssertionError, RuntimeError, ValueError):
        return None
    return theirs


def built_by_stock(name: str, size: tuple[int, int]) -> nn.Module | None:
    """Return stock's model at a size, None where stock cannot build it or run it there; the caller's own."""
    built = _built_by_stock(name, size)
    return copy.deepcopy(built).train().eval() if built is not None else None  # which empties caches of old biases


@functools.lru_cache(maxsize=8)
def _built_by_stock(name: str, size: tuple[int, int]) -> nn.Module | None:
    """Swin gets other windows by building than by `set_input_size`, which is what a resize is compared with."""
    if theirs := resized_by_stock(example(name), size):
        return theirs
    try:
        theirs = stock(name, img_size=size, **EXAMPLES[name])
        with torch.no_grad():
            theirs(image(size))
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError):
        return None
    return theirs
