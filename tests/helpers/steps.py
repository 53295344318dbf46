"""Random sequences of what people do to a model, each step followed by checks against a model of its own."""

from __future__ import annotations

import contextlib
import copy
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
from tests.helpers.oracle import assert_same_structure, first, image, redraw_, stock, tensors
from timm_resize.core.registry import families

EXAMPLES = {name: dict(kwargs) for family in families() for name, kwargs in family.examples.items()}
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
    "views",
    "features",
)


class InjectedError(RuntimeError):
    """The injected failure."""


class Sequence:
    """One model, its optimizer, and what is known of both."""

    def __init__(self, name: str, seed: int) -> None:
        self.name, self.pick = name, random.Random(seed)
        torch.manual_seed(seed)
        self.model = redraw_(stock(name, **EXAMPLES[name]), seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.size = timm_resize.plan_resize(self.model).new_size
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
        """Identity of parameters, shapes of optimizer state, shapes of a fresh build, a finite forward."""
        params = list(self.model.parameters())
        held = [p for group in self.optimizer.param_groups for p in group["params"]]
        assert [id(p) for p in held] == [id(p) for p in params]
        for param, state in self.optimizer.state.items():
            assert all(v.shape == param.shape for k, v in state.items() if k != "step")
        assert timm_resize.plan_resize(self.model).new_size == self.size
        fresh = self._fresh()
        assert {n: p.shape for n, p in self.model.named_parameters()} == {
            n: p.shape for n, p in fresh.named_parameters()
        }
        self.model.eval()
        with torch.no_grad():
            dtype = params[0].dtype
            assert first(self.model(image(self.size).to(dtype))).isfinite().all()

    def _fresh(self) -> nn.Module:
        """Stock's model after stock's `set_input_size`, where it has one: Swin gets other windows than by building."""
        with torch.device("meta"):
            fresh = stock(self.name, **EXAMPLES[self.name])
            if hasattr(fresh, "set_input_size"):
                with contextlib.suppress(Exception):  # stock's fails at some sizes
                    fresh.set_input_size(img_size=self.size)
                    return fresh
            return timm_resize.create_model(self.name, img_size=self.size, **EXAMPLES[self.name])

    def resize(self) -> None:
        self.size = self.pick.choice(self.choices)
        timm_resize.resize_(self.model, self.size, optimizer=self.optimizer)

    def train(self) -> None:
        self.model.train()
        dtype = next(self.model.parameters()).dtype
        first(self.model(image(self.size, batch=2).to(dtype))).float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

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
        """timm's feature getter over a copy, resized, gives what the plain model's own method gives."""
        if not hasattr(self.model, "forward_intermediates"):
            return
        size, alone = self.pick.choice(self.choices), copy.deepcopy(self.model)
        features = FeatureGetterNet(copy.deepcopy(self.model), out_indices=[-1])
        timm_resize.resize_(alone, size)
        try:
            timm_resize.resize_(features, size)
        except timm_resize.InvalidSizeError:  # EfficientFormer: features need an even map, the model does not
            return
        with torch.no_grad():
            want = alone.forward_intermediates(image(size), indices=[-1], intermediates_only=True)[-1]
            assert torch.equal(features(image(size))[-1], want)

    def views(self) -> None:
        size, multi = self.pick.choice(self.choices), timm_resize.MultiSize(self.model)
        alone = copy.deepcopy(self.model)
        alone.__dict__.pop("_resize_chain", None)
        timm_resize.resize_(alone, size)
        with torch.no_grad():
            torch.testing.assert_close(first(multi(image(size))), first(alone(image(size))), rtol=1e-4, atol=1e-4)
