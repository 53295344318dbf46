"""What one image costs a model: tokens, operations, parameters and attention scores, without computing a value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from timm_resize.core.apply import apply_plan
from timm_resize.core.copies import meta_copy
from timm_resize.core.find import current_size, find_model
from timm_resize.core.plan import ResizePlan
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, SizeLike, ceil_div, parse_size, text

_aten = torch.ops.aten

_SOFTMAX = {getattr(_aten, name) for name in ("_softmax", "_safe_softmax") if hasattr(_aten, name)}
_PRODUCT = {_aten.mm, _aten.addmm, _aten.bmm, _aten.baddbmm, _aten.convolution}


@dataclass(frozen=True)
class Cost:
    """The cost of one image in evaluation mode.

    Attributes:
        img_size: Image size (H, W).
        tokens: Positions in the outputs of the modules that timm's `feature_info` names, prefix tokens included,
            equal ones in a row once: (197,) for a ViT, (3136, 784, 196, 49) for a Swin. Empty when it names none.
        flops: Floating-point operations of matrix products and convolutions, two per multiply-add. Elementwise
            operations, normalisation, pooling and interpolation are not counted.
        parameters: Number of parameters.
        attention: Elements of the score matrix (all heads and windows) of each attention layer, in order.
            A layer run by a fused kernel counts too, although that kernel never holds its scores in full.
    """

    img_size: Size
    tokens: tuple[int, ...]
    flops: int
    parameters: int
    attention: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes by name, for JSON."""
        return asdict(self)


def measure(model: nn.Module, img_size: SizeLike | None = None) -> Cost:
    """Run `model` on one image on the meta device and count. Reads the model only.

    Args:
        model: A timm model on any device, or something that holds exactly one.
        img_size: Size to run at, an int or (H, W), for models that take any; by default the model's own.

    Raises:
        ResizeError: The forward cannot run at this size, or needs values that the meta device does not have.

    Example:
        >>> import timm, timm_resize.cost
        >>> cost = timm_resize.cost.measure(timm.create_model("vit_tiny_patch16_224", device="meta"))
        >>> cost.tokens, cost.flops // 10**6, max(cost.attention)
        ((197,), 2507, 116427)
    """
    root = find_model(model)
    name = type(root).__name__
    size = current_size(root) if img_size is None else parse_size(img_size, "img_size", name)
    if size is None:
        message = f"{name}: img_size=None and the model records no size. Give img_size=224."
        raise ResizeError(message, model=name, argument="img_size")
    copy = meta_copy(root).eval().requires_grad_(False)
    weight = next((p for p in copy.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.empty(1, _channels(copy), *size, device="meta", dtype=weight.dtype)
    scores = _Scores()
    # On the meta device scaled_dot_product_attention is two products and a softmax, which both counters see.
    with torch.no_grad(), _positions(copy) as tokens:
        try:
            with scores, FlopCounterMode(display=False) as flops:
                copy(image)
        except torch.cuda.OutOfMemoryError:  # a RuntimeError that says nothing of the size
            raise
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            reason = " ".join(str(error).split())
            message = f"{name}: img_size={size} cannot be measured on the meta device: {reason}."
            raise ResizeError(message, model=name, argument="img_size", value=size) from None
    return Cost(
        img_size=size,
        tokens=tuple(tokens) or _by_reduction(copy, size),
        flops=flops.get_total_flops(),
        parameters=sum(p.numel() for p in copy.parameters()),
        attention=tuple(scores.attention()),
    )


def before_and_after(model: nn.Module, plan: ResizePlan) -> tuple[Cost, Cost]:
    """Return what one image costs before and after a plan. Reads the model only.

    Args:
        model: The model that the plan was made for.
        plan: Not applied yet.

    Raises:
        StalePlanError: The plan is not of this model as it is now.
        ResizeError: As `measure`.

    Example:
        >>> import timm, timm_resize, timm_resize.cost
        >>> model = timm.create_model("vit_tiny_patch16_224", device="meta")
        >>> costs = timm_resize.cost.before_and_after(model, timm_resize.plan_resize(model, 384))
        >>> [cost.tokens for cost in costs]
        [(197,), (577,)]
    """
    root = find_model(model)
    plan.check(root)
    copy = meta_copy(root)
    apply_plan(copy, plan)
    return measure(root), measure(copy)


def _channels(model: nn.Module) -> int:
    config = getattr(model, "pretrained_cfg", None) or {}
    return int(getattr(model, "in_chans", None) or (config.get("input_size") or (3,))[0])


@contextmanager
def _positions(model: nn.Module) -> Iterator[list[int]]:
    """Collect the position counts of the modules in `feature_info`, each count once in a row."""
    counts: list[int] = []
    hooks = []

    def watch(module: nn.Module, channels: int) -> None:
        def hook(_: nn.Module, __: object, output: object) -> None:
            tensor = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(tensor, Tensor) and channels in tensor.shape[1:]:
                count = tensor.numel() // channels  # whatever the layout: NCHW, NHWC, NLC
                if not counts or counts[-1] != count:
                    counts.append(count)

        hooks.append(module.register_forward_hook(hook))

    for info in _features(model):
        module = _module(model, info.get("module") or "")
        if module is not None and info.get("num_chs"):
            watch(module, int(info["num_chs"]))
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()


def _by_reduction(model: nn.Module, size: Size) -> tuple[int, ...]:
    """Return the grids that `feature_info` promises, for models whose entries name no module that runs."""
    grids = [ceil_div(size, int(info["reduction"])) for info in _features(model) if info.get("reduction")]
    return tuple(dict.fromkeys(h * w for h, w in grids))


def _features(model: nn.Module) -> list[dict[str, Any]]:
    info = getattr(model, "feature_info", None) or []
    return list(getattr(info, "info", info))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        module = model.get_submodule(path) if path else None
    except AttributeError:
        return None
    while isinstance(module, nn.ModuleList) and len(module):  # never called itself
        module = module[-1]
    return module


class _Scores(TorchDispatchMode):
    """Find attention scores: outputs of a softmax that a matrix product then takes.

    A softmax that only weighs branches (split attention, selective kernels) or ends a classifier is none. Views of
    a score share its storage; an operation between softmax and product that keeps the number of elements (a cast,
    dropout, a gate) carries the mark on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._numel: list[int] = []
        self._used: set[int] = set()
        self._mark: dict[int, int] = {}
        self._alive: list[Tensor] = []  # a freed storage's address could come back as another tensor's

    def attention(self) -> list[int]:
        """Return the number of elements of each score tensor, in order."""
        return [n for i, n in enumerate(self._numel) if i in self._used]

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[object, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in _SOFTMAX:
            self._numel.append(out.numel())
            self._set(out, len(self._numel) - 1)
            return out
        marks = [m for a in args if isinstance(a, Tensor) and (m := self._mark.get(_storage(a))) is not None]
        if op in _PRODUCT:
            self._used.update(marks)
        else:
            first = out[0] if isinstance(out, (tuple, list)) and out else out
            for mark in marks:
                if isinstance(first, Tensor) and first.numel() == self._numel[mark]:
                    self._set(first, mark)
        return out

    def _set(self, tensor: Tensor, mark: int) -> None:
        self._mark[_storage(tensor)] = mark
        self._alive.append(tensor)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def table(*costs: Cost) -> str:
    """Set costs side by side, the last beside its ratio to the first.

    Example:
        >>> before = Cost((224, 224), (197,), 2 * 10**9, 5 * 10**6, ())
        >>> print(table(before, Cost((448, 448), (785,), 10**10, 5 * 10**6, ())))
                                              224x224  448x448  ratio
        tokens                                    197      785   3.98
        parameters (M)                           5.00     5.00   1.00
        GFLOPs (2 per multiply-add)              2.00    10.00   5.00
        GMACs (multiply-adds)                    1.00     5.00   5.00
        attention scores, largest (MiB fp32)        -        -      -
        attention scores, largest (MiB half)        -        -      -
        attention scores, total (MiB fp32)          -        -      -
        attention scores, total (MiB half)          -        -      -
    """
    rows = [["", *(text(c.img_size) for c in costs), "ratio"]]
    rows.append(["tokens", *(", ".join(map(str, c.tokens)) or "-" for c in costs), _tokens_ratio(costs)])
    for label, values in (
        ("parameters (M)", [c.parameters / 1e6 for c in costs]),
        ("GFLOPs (2 per multiply-add)", [c.flops / 1e9 for c in costs]),
        ("GMACs (multiply-adds)", [c.flops / 2e9 for c in costs]),
    ):
        rows.append([label, *map(_number, values), _ratio(values)])
    for label, reduce in (("largest", max), ("total", sum)):
        for precision, size in (("fp32", 4), ("half", 2)):
            values = [reduce(c.attention) * size / 2**20 if c.attention else math.nan for c in costs]
            rows.append([f"attention scores, {label} (MiB {precision})", *map(_number, values), _ratio(values)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _tokens_ratio(costs: tuple[Cost, ...]) -> str:
    return _ratio([c.tokens[0] if c.tokens else math.nan for c in costs])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}" if value >= 0.995 else f"{value:.3g}"


def _ratio(values: list[float]) -> str:
    first, last = values[0], values[-1]
    return "-" if math.isnan(first) or math.isnan(last) or not first else f"{last / first:.2f}"
