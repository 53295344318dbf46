"""Which models of other libraries take which sizes, and whether they are then what the library itself would make.

For every model of every library below, at a larger, a smaller and a wide size: the model is resized, and compared with
the library's own build of that size (shapes of parameters and buffers, every attribute of every module), and what was
resampled with the library's own rule for it. A size that is refused is replaced by one of its kind that the refusal
names, if any. On the meta device but for transformers, whose small models are run. Exits with 1 when a model falls
short; each that does is named.

    python benchmarks/libraries.py --report docs/libraries.md
    python benchmarks/libraries.py --every open_clip
"""

from __future__ import annotations

import argparse
import copy
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from torch import Tensor, nn

import timm_resize
from tests.helpers.oracle import attributes, tensors

Size = tuple[int, int]
Values = Callable[[nn.Module, timm_resize.ResizePlan, Size], bool | None]
KINDS = ("larger", "smaller", "wide")


@dataclass(frozen=True)
class Case:
    """One model of a library.

    Attributes:
        name: What the library calls it.
        size: Its own image size.
        build: The library's build of it at a size; raises where the library has none.
        run: Runs it on an image of a size; raises where it cannot.
        values: Whether what a plan resampled is what the library's own rule makes of it; None where it has none.
        sized: Whether the build depends on the size at all.
    """

    name: str
    size: Size
    build: Callable[[Size], nn.Module]
    run: Callable[[nn.Module, Size], object]
    values: Values
    sized: bool = True


def torchvision(every: bool) -> Iterator[Case]:
    """Yield the smallest classification model of each module, Swin's both versions and all ViTs, or every one.

    Those without an argument for the size are built as they are.
    """
    from torchvision import models
    from torchvision.models.vision_transformer import interpolate_embeddings

    def parameters(name: str) -> int:
        return models.get_model_weights(name).DEFAULT.meta["num_params"]

    def kind(name: str) -> tuple[object, ...]:
        return models.get_model_builder(name).__module__, name.startswith("swin_v2"), name.startswith("vit") and name

    def as_interpolated(model: nn.Module, plan: timm_resize.ResizePlan, size: Size) -> bool | None:
        name = "encoder.pos_embedding"
        return same_maps(plan, lambda sd: interpolate_embeddings(size[0], model.patch_size, dict(sd)), name)

    names = models.list_models(module=models)
    for name in names if every else first_of_each(sorted(names, key=parameters), kind):
        key = next((k for start, k in (("vit_", "image_size"), ("maxvit", "input_size")) if name.startswith(start)), "")

        def build(size: Size, name: str = name, key: str = key) -> nn.Module:
            if key == "image_size" and size[0] != size[1]:
                raise ValueError("squares alone")
            init = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
            sized = {key: size[0] if key == "image_size" else size} if key else {}
            with torch.device("cpu" if "regnet" in name else "meta"):  # regnet's constructor computes widths
                return models.get_model(name, **init, **sized).to("meta").eval()

        yield Case(name, (224, 224), build, run_meta, as_interpolated, bool(key))


def open_clip(every: bool) -> Iterator[Case]:
    """Yield the image towers that are configured, equal ones once; of timm towers the first of each module, or all."""
    import open_clip as library
    from open_clip.model import CLIPVisionCfg, _build_vision_tower, resize_pos_embed

    def as_loaded(model: nn.Module, plan: timm_resize.ResizePlan, size: Size) -> bool | None:
        def load(sd: dict[str, Tensor]) -> dict[str, Tensor]:
            sd = {f"visual.{key}": value for key, value in sd.items()}
            resize_pos_embed(sd, SimpleNamespace(visual=model))
            return {key.removeprefix("visual."): value for key, value in sd.items()}

        return same_maps(plan, load, "positional_embedding")

    def kind(name: str) -> tuple[object, ...]:
        config = library.get_model_config(name)
        timms = config["vision_cfg"].get("timm_model_name")
        if timms and not every:
            return (timm.models.model_entrypoint(timms).__module__,)
        return config["embed_dim"], repr(sorted(config["vision_cfg"].items(), key=str))

    for name in first_of_each(library.list_models(), kind):
        config = library.get_model_config(name)
        vision = {**config["vision_cfg"], "timm_model_pretrained": False}

        def build(size: Size | None, vision: dict = vision, width: int = config["embed_dim"]) -> nn.Module:
            square = size if size is None or size[0] != size[1] else size[0]
            sized = {} if size is None or "timm_model_name" in vision else {"image_size": square}
            with torch.device("meta"):
                tower = _build_vision_tower(width, CLIPVisionCfg(**{**vision, **sized})).to("meta").eval()
                if size is not None and not sized:
                    if not hasattr(tower.trunk, "set_input_size") and timm_resize.plan_resize(tower, size).tensors:
                        raise ValueError("the timm model has no set_input_size, and open_clip passes it over")
                    tower.set_input_size(size)
            return tower

        own = build(None).image_size
        yield Case(name, (own, own) if isinstance(own, int) else tuple(own), build, run_meta, as_loaded)


def transformers(every: bool) -> Iterator[Case]:
    """Yield the small models of the tests: one for each class that has handlers."""
    from tests.helpers.transformers_models import CASES

    for name, case in CASES.items():

        def build(size: Size, case=case) -> nn.Module:
            if size[0] != size[1] and not case.oblong:
                raise ValueError("squares alone")
            if size == case.native:
                return case.model()
            return case.cls(case.sized(case.config(), size)).eval()

        def as_run(model: nn.Module, plan: timm_resize.ResizePlan, size: Size, case=case) -> bool | None:
            if not case.exact:
                return None
            pairs = zip(case.run(model, size), case.run(case.model(), size, interpolate=True), strict=True)
            return all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5) for ours, theirs in pairs)

        yield Case(
            name, case.native, build, lambda model, size, case=case: case.run(copy.deepcopy(model), size), as_run
        )


def first_of_each(names: Iterable[str], kind: Callable[[str], object]) -> list[str]:
    """Return the first name of each kind."""
    return list({kind(name): name for name in reversed(list(names))}.values())[::-1]


LIBRARIES = {"torchvision": torchvision, "open_clip": open_clip, "transformers": transformers}


@torch.no_grad()
def run_meta(model: nn.Module, size: Size) -> None:
    """Run two images without values."""
    model(torch.empty(2, 3, *size, device="meta"))


def same_maps(plan: timm_resize.ResizePlan, rule: Callable[[dict[str, Tensor]], dict], name: str) -> bool | None:
    """Whether a plan resamples one tensor, `name`, and to what a library's rule for state dicts makes of it."""
    resampled = [change for change in plan.tensors if isinstance(change.how, timm_resize.Resample)]
    if [change.key for change in resampled] != [name]:
        return None
    x = torch.randn(resampled[0].old, generator=torch.Generator().manual_seed(0))
    return torch.allclose(resampled[0].how(x), rule({name: x})[name], rtol=0, atol=1e-5)


def difference(ours: nn.Module, theirs: nn.Module) -> str:
    """Return what the first difference in structure is, '' for none; values of buffers where there are any."""
    a, b = tensors(ours), tensors(theirs)
    for key in {**a, **b}:
        if key not in a or key not in b or a[key].shape != b[key].shape or a[key].dtype != b[key].dtype:
            return key
    for key, buffer in theirs.named_buffers():
        if not buffer.is_meta and not torch.equal(buffer, a[key]):
            return key
    have, want = attributes(ours), attributes(theirs)
    wrong = [key for key in {**have, **want} if have.get(key) != want.get(key)]
    return f"{'.'.join(filter(None, wrong[0]))}: {have.get(wrong[0])} for {want.get(wrong[0])}" if wrong else ""


def targets(case: Case) -> dict[str, Size]:
    """Return a size of each kind."""
    side = case.size[0]
    large, small = side * 3 // 2, side // 2
    return {"larger": (large, large), "smaller": (small, small), "wide": (side, large)}


def is_of(kind: str, size: Size, own: Size) -> bool:
    """Whether a size is larger than a model's own, smaller, or wide."""
    return {"larger": size > own, "smaller": size < own, "wide": size[0] < size[1]}[kind]


def resized(case: Case, kind: str) -> tuple[nn.Module, timm_resize.ResizePlan | None, Size]:
    """Return the model, its plan and a size of a kind; no plan where it refuses that without naming another."""
    size = targets(case)[kind]
    for attempt in range(2):
        model = case.build(case.size)
        try:
            return model, timm_resize.resize_(model, size), size
        except timm_resize.InvalidSizeError as error:
            others = [s for s in error.nearest if is_of(kind, s, case.size)]
            if attempt or not others:
                break
            size = others[0]
    return model, None, size


def runs(case: Case, build: Callable[[Size], nn.Module], size: Size) -> nn.Module | None:
    """Return a build of a size, None where there is none or it does not run."""
    try:
        case.run(model := build(size), size)
    except Exception:  # the code of another library raises what it likes
        return None
    return model


def judge(case: Case, kind: str) -> tuple[Counter[str], str]:
    """Return the counts of one model at one kind of size, and where it falls short."""
    model, plan, size = resized(case, kind)
    theirs = runs(case, case.build, size)
    counts = Counter(tried=1, theirs=int(theirs is not None))
    if plan is None:
        return counts, "" if theirs is None else f"{size} is refused"
    if case.sized or theirs is None:
        case.run(model, size)
    if theirs is None:
        return counts + Counter(beyond=1), ""
    odd = difference(model, theirs)
    equal = case.values(model, plan, size) if any(c.how is not None for c in plan) else None
    counts += Counter(resized=1, alike=int(not odd), ruled=int(equal is not None), equal=int(bool(equal)))
    return counts, odd or ("its values are others" if equal is False else "")


COLUMNS = ("theirs", "resized", "alike", "ruled", "equal", "beyond")

HEADER = """# Models of other libraries

Made by `benchmarks/libraries.py` with {versions}, in {minutes:.0f} minutes. Each library's models at a larger, a
smaller and a wide size. Every column counts models of the one before it, but the last.

- *it builds*: the library's own build of that size exists and runs.
- *resized*: the model is resized there.
- *as its build*: with the shapes of all parameters and buffers, and all attributes, of that build.
- *with a rule*: something is resampled for which the library has a rule of its own.
- *equal*: to the values of that rule.
- *beyond*: the library has no build of the size; the model is resized there, and runs.

What is in neither *resized* nor *beyond* is refused with an `InvalidSizeError`; no size that a library builds is,
unless it is named below.

- torchvision: {torchvision} in `torchvision.models`, on the meta device. ViT's rule is `interpolate_embeddings`, for
  squares. Nothing in the others but MaxViT depends on the size, so their build is the same at each. MaxViT's maps
  must be whole partitions.
- open_clip: {open_clip} among its configurations, on the meta device. The rule is `resize_pos_embed`,
  at a load with `force_image_size`; it is for its ViT alone. A timm tower's build is `TimmModel.set_input_size`,
  where the timm model has that method; [the table of timm's models](coverage.md) says more of these.
- transformers: a small model, with weights, of each class that has handlers. Its build is a new model of the changed
  configuration; its rule, what its forward makes of an image of another size (`interpolate_pos_encoding=True`).

| library | models | size | it builds | resized | as its build | with a rule | equal | beyond |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""


TRIED = {
    True: {"torchvision": "every name", "open_clip": "every distinct image tower"},
    False: {
        "torchvision": "the smallest model of each class, both versions of Swin and every ViT",
        "open_clip": "every distinct ViT and ResNet and one timm tower of each module",
    },
}


def sweep(names: list[str], every: bool) -> tuple[list[str], list[str]]:
    """Return the rows of the table, and where a model falls short."""
    rows, short = [], list[str]()
    for library in names:
        totals = {kind: Counter[str]() for kind in KINDS}
        for case in LIBRARIES[library](every):
            for kind in KINDS:
                start = time.perf_counter()
                try:
                    counts, wrong = judge(case, kind)
                except Exception as error:
                    counts, wrong = Counter(tried=1), f"{type(error).__name__}: {str(error).splitlines()[0]}"
                totals[kind].update(counts)
                if wrong:
                    short.append(f"{library} {case.name}, {kind}: {wrong}")
                print(library, case.name, kind, dict(counts), wrong, f"{time.perf_counter() - start:.1f}s", flush=True)
        for kind, total in totals.items():
            numbers = " | ".join(str(total[column]) for column in COLUMNS)
            rows.append(f"| {library} | {total['tried']} | {kind} | {numbers} |")
    return rows, short


def versions() -> str:
    """Return the names and versions of the libraries."""
    modules = [__import__(name) for name in ("torchvision", "open_clip", "transformers", "timm", "torch")]
    return ", ".join(f"{module.__name__} {module.__version__}" for module in modules)


def main() -> int:
    """Run the sweep, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES), help=", ".join(LIBRARIES))
    parser.add_argument("--every", action="store_true", help="every name, not one of each class")
    parser.add_argument("--report", type=Path, help="write the table here")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    rows, short = sweep(args.libraries, args.every)
    minutes = (time.perf_counter() - start) / 60
    text = HEADER.format(versions=versions(), minutes=minutes, **TRIED[args.every]) + "\n".join(rows) + "\n"
    if short:
        text += "\nShort of that:\n\n" + "".join(f"- {line}\n" for line in short)
    print(text)
    if args.report:
        args.report.write_text(text)
    return bool(short)


if __name__ == "__main__":
    sys.exit(main())
