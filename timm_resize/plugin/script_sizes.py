"""Sizes that a script gives to its data alone reach its models too, while `timm-resize run` runs it."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from timm_resize.core.find import current_size, find_model
from timm_resize.errors import ResizeError
from timm_resize.geometry import Size, text
from timm_resize.multi_size import MultiSize
from timm_resize.resize import resize_
from timm_resize.weights.checkpoint import read_checkpoint, saved_size

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """What a script's command line says of image sizes.

    Attributes:
        img_size: Of `--img-size N` or `--input-size C H W`, the size of every model that is created with none.
        several: Whether `--train-img-sizes` gives a size per batch, for which a model has to run any.
        unsized: Models that were created at their own size, since nothing gave one.
    """

    img_size: Size | None
    several: bool
    unsized: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)

    @classmethod
    def read(cls, arguments: Sequence[str]) -> Sizes:
        """Read a command line as argparse does, and the YAML file that timm's train.py takes defaults from.

        Example:
            >>> Sizes.read(["train.py", "--img-size", "160"]).img_size
            (160, 160)
            >>> Sizes.read(["validate.py", "--input-size", "3", "160", "224", "images"]).img_size
            (160, 224)
        """
        config = _config(_words(arguments, "--config") or _words(arguments, "-c"))
        square = _numbers(_words(arguments, "--img-size"), 1) or _numbers([config.get("img_size")], 1)
        channels_first = _numbers(_words(arguments, "--input-size"), 3) or _numbers(config.get("input_size"), 3)
        several = bool(_words(arguments, "--train-img-sizes") or config.get("train_img_sizes"))
        if channels_first:  # the stronger one, as in timm's resolve_data_config
            return cls((channels_first[1], channels_first[2]), several)
        return cls((square[0], square[0]) if square else None, several)


def _words(arguments: Sequence[str], option: str) -> list[str]:
    """Return what stands after the last use of an option, up to the end of the line."""
    for i in reversed(range(len(arguments))):
        name, equals, value = arguments[i].partition("=")
        if name == option:
            return [value] if equals else list(arguments[i + 1 :])
    return []


def _numbers(words: Any, count: int) -> list[int]:
    """Return the first `count` of some words as positive numbers, [] where they are none: the script will say so."""
    with suppress(TypeError, ValueError):
        numbers = [int(word) for word in words[:count]]
        return numbers if len(numbers) == count and min(numbers) > 0 else []
    return []


def _config(words: list[str]) -> dict[str, Any]:
    if not words or not words[0].endswith((".yaml", ".yml")):
        return {}
    import yaml  # type: ignore[import-untyped]  # of a script that reads such a file itself

    with suppress(OSError, yaml.YAMLError), open(words[0]) as file:
        content = yaml.safe_load(file)
        return content if isinstance(content, dict) else {}
    return {}


_running: list[Sizes] = []
"""The sizes of the script that runs, innermost last."""


@contextmanager
def sized_as(arguments: Sequence[str]) -> Iterator[None]:
    """Let the sizes of a command line hold for models that are created without one."""
    _running.append(Sizes.read(arguments))
    try:
        yield
    finally:
        _running.pop()


def created(create: Callable[..., nn.Module], kwargs: dict[str, Any]) -> nn.Module:
    """Create a model, under a script at the script's size."""
    if not _running:
        return create(**kwargs)
    script = _running[-1]
    given, path = kwargs.get("img_size") is not None, None
    if not given and script.img_size is not None:
        kwargs["img_size"] = script.img_size
    elif not given:
        path = kwargs.pop("checkpoint_path", None)
    model = create(**kwargs)
    if not given and script.img_size is None:
        script.unsized.add(model)
    if path:
        from timm.models import load_checkpoint  # ours, once installed

        load_checkpoint(model, path)
    return MultiSize(model) if script.several else model


def follow_(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Bring a model whose size nothing gave to that of the checkpoint which a script is about to load into it."""
    if not any(model in script.unsized for script in _running[-1:]) or not os.path.isfile(path):
        return
    with suppress(ResizeError):  # the load will say what is wrong
        size = saved_size(read_checkpoint(path), find_model(model))
        if size is not None and size != current_size(find_model(model)):
            resize_(model, size)
            _logger.warning("%s is of image size %s, and so is the model now: no size was given.", path, text(size))
