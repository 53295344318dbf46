"""One step of the fuzz: a random model, changed at random, brought to a random size by a random way, and judged."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import timm_resize
from tests.helpers.examples import EXAMPLES, HEAVY, as_built, example
from tests.helpers.oracle import redraw_, stock
from tests.helpers.patient import InapplicableError, Patient
from tests.helpers.snapshots import WrongError, assert_near, output_tensors, same, shapes, unchanged
from tests.helpers.steps import built_by_stock, resized_by_stock
from tests.helpers.surgery import SURGERIES
from timm_resize.core.find import find_model
from timm_resize.core.history import CHAIN
from timm_resize.hub.save import plain_tensors
from timm_resize.weights.checkpoint import load_checkpoint

Size = tuple[int, int]

VARIANTS: list[dict[str, Any]] = [
    *[{}] * 5,
    {"features_only": True},
    {"num_classes": 0},
    {"in_chans": 1},
    {"dynamic_img_size": True},
    {"num_classes": 0, "global_pool": ""},
]
"""Keywords that models are built with, where they take them."""

BY_CONFIG = ("crossvit", "swinv2_cr")
"""Models whose saved config decides: it gives a branch's scale, or the window, as of the size saved at."""

SLOW = {*HEAVY, "gmixer_12_224", "mvitv2_tiny", "nest_tiny", "resmlp_12_224", "volo_d1_224"}
"""Examples that are taken a tenth as often."""


RESULTS = ("right", "refused", "violation", "no reference", "inapplicable")


@dataclass
class Outcome:
    """What became of a step: one of `RESULTS`, and the error's text."""

    seed: int
    model: str = ""
    family: str = ""
    surgeries: list[str] = field(default_factory=list)
    way: str = ""
    sizes: list[Any] = field(default_factory=list)
    result: str = "right"
    detail: str = ""

    @property
    def about(self) -> str:
        """The step in words."""
        return f"{self.model}, {' and '.join(self.surgeries)}, {self.way}, {' -> '.join(map(str, self.sizes))}"


@dataclass(frozen=True)
class Choices:
    """Names that a step is drawn from: of `EXAMPLES`, of `SURGERIES` and of `WAYS`; by default of all."""

    models: tuple[str, ...] = ()
    surgeries: tuple[str, ...] = tuple(SURGERIES)
    ways: tuple[str, ...] = ()


EVERYTHING = Choices()


class _NoReferenceError(Exception):
    """The bare model is refused."""


def take_step(seed: int, choices: Choices = EVERYTHING, raises: bool = False) -> Outcome:
    """Take a step; a violation is raised only where that is asked for."""
    out = Outcome(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            _Trial(out, choices).run()
        except InapplicableError as error:
            out.result, out.detail = "inapplicable", f"{error.__cause__ or error}"
        except _NoReferenceError as error:
            out.result, out.detail = "no reference", str(error)
        except timm_resize.ResizeError as error:
            out.result, out.detail = "refused", str(error)
        except Exception as error:  # each is a finding
            if raises:
                raise
            out.result, out.detail = "violation", f"{type(error).__name__}: {error}"
    return out


class _Trial:
    """A bare model, what is done to it, and the plain model that has to be the same in the end."""

    def __init__(self, out: Outcome, choices: Choices) -> None:
        self.out, self.pick, self.choices = out, random.Random(out.seed), choices
        names = choices.models or [n for n in sorted(EXAMPLES) if n not in SLOW or self.pick.random() < 0.1]
        self.name = out.model = self.pick.choice(names)
        self.kwargs = {**EXAMPLES[self.name], **self.pick.choice(VARIANTS)}
        self.bare = self._built()
        out.family = type(find_model(self.bare)).__name__
        self.native = _size_of(self.bare)

    def _built(self) -> nn.Module:
        if self.kwargs != EXAMPLES[self.name]:
            with suppress(AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
                return redraw_(stock(self.name, **self.kwargs))
            self.kwargs = EXAMPLES[self.name]
        return example(self.name)

    def size(self) -> Size:
        """Draw a size: the model's own, a valid one near a random one, or any."""
        low, high = (min(int(f * self.native[0]), most) for f, most in ((0.3, 96), (1.2, 288)))
        side, kind = (lambda: self.pick.randint(low, high)), self.pick.random()
        wanted = (side(), side()) if self.pick.random() < 0.5 else (side(),) * 2
        near = timm_resize.nearest_sizes(self.bare, wanted) if kind < 0.8 else []
        return self.native if kind < 0.05 else near[0] if near and max(near[0]) < 512 else wanted

    def run(self) -> None:
        """Operate, make sure that the reference is one, resize, compare."""
        target, way = self.size(), self.pick.choice(self.choices.ways or list(WAYS))
        if self.pick.random() < 0.25 and not self.kwargs.get("features_only"):
            with suppress(timm_resize.InvalidSizeError):
                timm_resize.resize_(self.bare, self.size())  # a resize lies behind it
        self.start = _size_of(self.bare)
        self.out.way, self.out.sizes = way, [self.start, target]
        for attempt in reversed(range(5)):
            try:
                subject = self._subject()
                break
            except Exception as error:  # the model cannot have it
                if not attempt:
                    raise InapplicableError from error
        WAYS[way](self, subject, target)

    def _subject(self) -> nn.Module:
        """Return the model after a surgery whose reference, without a resize, is of the same function."""
        near = (timm_resize.nearest_sizes(self.bare, self.native[0] * f // 4 + 7)[:1] for f in (2, 3))
        plans = [timm_resize.plan_resize(self.bare, size) for sizes in near for size in sizes]
        patient = Patient(self.bare, self.pick, {c.key for plan in plans for c in plan.tensors})
        count = min(len(self.choices.surgeries), self.pick.choice([1, 1, 1, 2]))
        self.out.surgeries = names = self.pick.sample(self.choices.surgeries, count)
        self.surgeries = sorted((SURGERIES[name](patient) for name in names), key=lambda surgery: surgery.whole)
        subject = self._each("operate", copy.deepcopy(self.bare))
        twin = self._each("after", self._each("before", copy.deepcopy(self.bare)))
        if names not in (["nothing at all"], ["frozen"], ["layout"]):
            self._compare(subject, twin, self.start)
        have, want = subject.state_dict(), twin.state_dict()
        self.alike = [k for k, v in have.items() if k in want and same(v, want[k])]
        return subject

    def _each(self, act: str, model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for surgery in self.surgeries:
                model = getattr(surgery, act)(model)
        return model

    # -- the reference -----------------------------------------------------------------------

    def _reference(self, target: Size, created: bool = False, opened: Size | None = None) -> nn.Module:
        """Return a plain model of the same function, resized as it is, compared with stock's where stock has one.

        Args:
            target: Size.
            created: Whether the weights come from a state dict, into a model that was created at the size.
            opened: Size at which what was saved at `target` is opened.
        """
        twin = self._each("before", copy.deepcopy(self.bare))
        plain = self.kwargs == EXAMPLES[self.name]
        theirs = resized_by_stock(twin, target) if plain and self.start == self.native and not created else None
        if created or self.out.way == "MultiSize":  # from the tensors as they are, not from their originals
            twin.__dict__.pop(CHAIN, None)
        try:
            timm_resize.resize_(twin, target, **(as_built(self.name) if created else {}))
            if opened is not None:
                twin.__dict__.pop(CHAIN, None)
                timm_resize.resize_(twin, opened, **as_built(self.name))
        except timm_resize.ResizeError as error:
            raise _NoReferenceError(str(error)) from error
        if theirs is None and plain and opened is None and self.pick.random() < 0.3:
            theirs = built_by_stock(self.name, target)
            if theirs is not None and shapes(theirs) == shapes(twin):
                theirs.load_state_dict(twin.state_dict())
            else:
                theirs = None
        if theirs is not None and opened is None:
            self._compare(twin, theirs, target)
        return twin

    def _judge(self, got: nn.Module, target: Size, created: bool = False) -> None:
        want = self._each("after", self._reference(target, created))
        self._compare(got, want, target)
        mine, theirs = got.state_dict(), want.state_dict()  # outputs hide what a later mean or a small scale takes
        pairs = {k: (mine[k], theirs[k]) for k in self.alike if k in mine and k in theirs}
        assert_near(pairs, 1e-2 if "dtype" in self.out.surgeries else 1e-4)

    def _compare(self, got: nn.Module, want: nn.Module, size: Size) -> None:
        """Compare outputs, or for types of few digits the tensors that both have."""
        kinds = {p.dtype for p in want.parameters() if p.is_floating_point()}
        if kinds & {torch.bfloat16, torch.float16}:
            theirs = dict(want.named_parameters())
            assert_near({k: (p, theirs[k]) for k, p in got.named_parameters() if k in theirs}, 1e-2)
            return
        x = torch.randn(1, self.kwargs.get("in_chans", 3), *size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            wanted, had = (output_tensors(model.eval()(x.to(next(iter(kinds))))) for model in (want, got))
        if len(wanted) != len(had):
            raise WrongError(f"{len(had)} outputs for {len(wanted)}")
        assert_near({f"output {i}": pair for i, pair in enumerate(zip(had, wanted, strict=True))}, 2e-3)

    def _judge_file(self, opened: nn.Module, reference: nn.Module) -> None:
        """Judge a model of the bare class by its tensors: those of the plain reference, or what was put in later."""
        want = {**reference.state_dict(), **find_model(self._each("after", copy.deepcopy(reference))).state_dict()}
        have = opened.state_dict()
        if strange := have.keys() - want.keys():
            raise WrongError(f"{min(strange)} is of neither")
        if all(surgery.judged for surgery in self.surgeries):
            assert_near({k: (have[k], want[k]) for k in have}, 1e-2 if "dtype" in self.out.surgeries else 1e-4)

    # -- ways --------------------------------------------------------------------------------

    def live(self, subject: nn.Module, target: Size) -> None:
        """In place, with an optimizer; back again every bit is as it was."""
        optimizer = torch.optim.AdamW(subject.parameters())
        for param in subject.parameters():
            optimizer.state[param] = {"step": torch.tensor(1.0), "exp_avg": param.detach() / 2, "exp_avg_sq": param**2}
        ids = {k: (id(p), p.requires_grad) for k, p in subject.named_parameters()}
        before = {k: v.clone() for k, v in subject.state_dict().items()}
        with unchanged(subject), timm_resize.install() if self.pick.random() < 0.2 else nullcontext() as installed:
            if installed is None:
                timm_resize.resize_(subject, target, optimizer=optimizer)
            else:
                find_model(subject).set_input_size(target, optimizer=optimizer)
        self._judge(subject, target)
        if ids != {k: (id(p), p.requires_grad) for k, p in subject.named_parameters()}:
            raise WrongError("other parameters than before")
        if self.start != self.native:  # what is resampled now may have another original
            return
        moments = {k: (optimizer.state[p]["exp_avg"], p.detach() / 2) for k, p in subject.named_parameters()}
        assert_near(moments, 1e-4 if "dtype" not in self.out.surgeries else 1e-2)
        with _must_work("back again"):
            timm_resize.resize_(subject, self.start, optimizer=optimizer)
        now = subject.state_dict()
        if odd := [k for k in {**before, **now} if not same(before.get(k), now.get(k))]:
            raise WrongError(f"back again: {odd[0]} is not as it was")

    def multi_size(self, subject: nn.Module, target: Size) -> None:
        """Several sizes at once; the model itself stays as it is."""
        graph = self.pick.random() < 0.5

        class Multi(nn.Module):
            def forward(self, x: torch.Tensor) -> Any:
                with torch.set_grad_enabled(graph):
                    return multi(x)

        with unchanged(subject, always=True):
            multi, got = timm_resize.MultiSize(subject), Multi()
            got.model = multi
            self._judge(got, target)

    def at_size(self, subject: nn.Module, target: Size) -> None:
        """For a while."""
        with unchanged(subject, always=True), timm_resize.at_size(subject, target):
            self._judge(subject, target)

    def state_dict(self, subject: nn.Module, target: Size) -> None:
        """Into a model of the size on which the same was done."""
        model, state = self._other(target), subject.state_dict()
        asked = {"source": self.start} if self.pick.random() < 0.5 else {}
        with unchanged(subject, always=True), unchanged(model):
            fitted = timm_resize.resize_state_dict(state, model, **asked)
        with _must_work("what was fitted"):
            model.load_state_dict(fitted)
        self._judge(model, target, created=True)

    def load_checkpoint(self, subject: nn.Module, target: Size) -> None:
        """From a file into a model of the size on which the same was done, or on which nothing was."""
        alike = self.pick.random() < 0.5
        asked = {"source_size": self.start} if self.pick.random() < 0.5 else {}
        model = self._other(target) if alike else self._created(target)
        with _saved(subject, self.pick) as path, unchanged(model):
            load_checkpoint(model, path, **asked)
        if alike:
            self._judge(model, target, created=True)
        else:
            self._judge_file(model, self._reference(target, created=True))

    def checkpoint_path(self, subject: nn.Module, target: Size) -> None:
        """A file by `create_model`."""
        asked: dict[str, Any] = {"img_size": target, **self.kwargs}
        with _saved(subject, self.pick) as path:
            if self.pick.random() < 0.5:
                model = timm_resize.create_model(self.name, checkpoint_path=path, **asked)
            else:
                overlay = {"file": path, "num_classes": getattr(find_model(self.bare), "num_classes", 1000)}
                overlay["input_size"] = (self.kwargs.get("in_chans", 3), *self.native)
                model = timm_resize.create_model(self.name, pretrained=True, pretrained_cfg_overlay=overlay, **asked)
        self._judge_file(model, self._reference(target, created=True))

    def saved_and_opened(self, subject: nn.Module, target: Size) -> None:
        """Saved at B, opened at C."""
        if self.name.startswith(BY_CONFIG):
            raise InapplicableError
        timm_resize.resize_(subject, target)
        size = self.pick.choice([target, self.size()])
        self.out.sizes.append(size)
        with tempfile.TemporaryDirectory() as folder:
            with unchanged(subject, always=True):
                timm_resize.save_pretrained(subject, folder)
            with _must_work("opening") if size == target else nullcontext():
                model = timm_resize.create_model(f"local-dir:{folder}", pretrained=True, img_size=size)
        self._judge_file(model, self._reference(target, opened=size))

    def _created(self, target: Size) -> nn.Module:
        return redraw_(timm_resize.create_model(self.name, img_size=target, **self.kwargs).eval(), 1)

    def _other(self, target: Size) -> nn.Module:
        created = self._created(target)
        if not all(surgery.carried for surgery in self.surgeries):
            raise InapplicableError
        try:
            return redraw_(self._each("operate", created), 2)
        except Exception as error:
            raise InapplicableError from error


def _size_of(model: nn.Module) -> Size:
    return timm_resize.plan_resize(model).new_size


@contextmanager
def _must_work(what: str) -> Iterator[None]:
    """Take a refusal for a violation."""
    try:
        yield
    except (timm_resize.ResizeError, RuntimeError) as error:
        raise WrongError(f"{what}: {error}") from error


@contextmanager
def _saved(model: nn.Module, pick: random.Random) -> Iterator[str]:
    """Save a state dict as programs do."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / pick.choice(["weights.safetensors", "weights.pth"]))
        if path.endswith(".pth"):
            torch.save({"state_dict": model.state_dict()}, path)
        else:
            save_file(plain_tensors(model), path)
        yield path


WAYS: dict[str, Callable[[_Trial, nn.Module, Size], None]] = {
    "resize_": _Trial.live,
    "MultiSize": _Trial.multi_size,
    "at_size": _Trial.at_size,
    "resize_state_dict": _Trial.state_dict,
    "load_checkpoint": _Trial.load_checkpoint,
    "checkpoint_path": _Trial.checkpoint_path,
    "save, open": _Trial.saved_and_opened,
}
