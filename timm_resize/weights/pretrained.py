"""Pretrained weights read at the checkpoint's own size, whatever size the model is wanted at."""

from __future__ import annotations

import pickle
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from safetensors import SafetensorError
from timm.models import _builder
from torch import Tensor, nn

from timm_resize.core.apply import apply_plan
from timm_resize.core.find import current_size, find_model, model_handler
from timm_resize.core.planner import plan_request
from timm_resize.core.request import make_request
from timm_resize.errors import CheckpointError
from timm_resize.geometry import Size, SizeLike
from timm_resize.weights.names import Filter, Names, computed
from timm_resize.weights.provenance import checkpoint_file, recorded_size
from timm_resize.weights.source import Geometry, check_given, patch_size, source_geometry, windows_of
from timm_resize.weights.state_dict import check_covers, check_fits, check_values

UNREADABLE = (RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError)
"""What readers of checkpoint files raise for damaged ones; an OSError says that there is none."""


class PretrainedLoader:
    """What one build calls in place of timm's `load_pretrained`, which it calls in turn.

    The model, still random, is brought to the size that the file's tensors have, so that stock's filter has nothing to
    interpolate; everything is checked before anything is loaded.

    Args:
        sizes: Geometry that was asked for or is on record, tried as the checkpoint's after the model's own.
        source_size: Image size (H, W) of the checkpoint, where the caller gives it.
        assign: Let the model take the file's tensors over, where a copy of them would do.

    Attributes:
        windows: Those that the model was built with, where the file's tables have others; None where they are the same.
        patch: Likewise the patch size.
        misfit: The error where the file's tensors are not the model's; stock's filter may still fit them.
    """

    def __init__(self, sizes: Geometry, source_size: Size | None = None, assign: bool = False) -> None:
        self.sizes = sizes
        self.source_size = source_size
        self.assign = assign
        self.windows: tuple[Size, ...] | None = None
        self.patch: SizeLike | None = None
        self.misfit: CheckpointError | None = None

    def __call__(self, model: nn.Module, *args: object, filter_fn: Filter | None = None, **kwargs: object) -> None:
        """Load as timm does.

        Raises:
            CheckpointError: The checkpoint cannot be read, or is not of this model.
        """
        config = kwargs.get("pretrained_cfg") or getattr(model, "pretrained_cfg", None)
        read = not (
            config and all(_builder._resolve_pretrained_source(config))
        )  # without a source stock says so itself

        def at_source(state_dict: dict[str, Tensor], model: nn.Module = model) -> dict[str, Tensor]:
            nonlocal read
            read = True
            root = find_model(model)
            built, patch = _windows(root), patch_size(root)
            filtered = _filtered_at_source(filter_fn, self.sizes, self.source_size, state_dict, model)
            if built != _windows(root):
                self.windows = built
            if patch != patch_size(root):
                self.patch = patch
            return filtered

        with self._checked(model):
            try:
                _builder.load_pretrained(model, *args, filter_fn=at_source, **kwargs)
            except CheckpointError:
                raise
            except UNREADABLE as error:
                if read:
                    raise
                why = textwrap.shorten(str(error), 600, placeholder=" …")
                raise CheckpointError(f"the checkpoint cannot be read: {why} Fetch it again.") from error

    @contextmanager
    def _checked(self, model: nn.Module) -> Iterator[None]:
        """Let the model's `load_state_dict` refuse what does not fit before it loads anything."""
        load = model.load_state_dict

        def load_checked(state_dict: Mapping[str, Tensor], strict: bool = True, **kwargs: Any) -> object:
            check_values(state_dict, model)
            try:
                check_fits(state_dict, model, strict)
            except CheckpointError as error:
                self.misfit = error
                raise
            if not strict:
                check_covers(state_dict, model)
            return load(state_dict, strict=strict, assign=self.assign, **kwargs)

        model.load_state_dict = load_checked  # type: ignore
        try:
            yield
        finally:
            del model.load_state_dict


def _windows(root: nn.Module) -> tuple[Size, ...] | None:
    """Return the windows of each stage as a model's own tables have them, None for a model that has none to set."""
    handler = model_handler(root)
    if handler is None or "window_size" not in handler.options:
        return None
    return windows_of(root.state_dict(keep_vars=True), root)


def from_jax(root: nn.Module) -> bool:
    """Whether a pretrained model's weights are an archive of JAX arrays, read by the model's own `load_pretrained`."""
    config = getattr(root, "pretrained_cfg", None)
    _, place = _builder._resolve_pretrained_source(config) if config else ("", "")
    name = place[-1] if isinstance(place, (list, tuple)) and place else place
    return isinstance(name, str) and name.endswith((".npz", ".npy"))


def _filtered_at_source(
    filter_fn: Filter | None, sizes: Geometry, given: Size | None, state_dict: dict[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """Resize the (still random) model to the checkpoint's size, then run stock's filter."""
    root = find_model(model)
    with suppress(CheckpointError):  # names that stock's filter knows, or that will be refused below
        state_dict = Names.of(state_dict, root).below(state_dict)
    found = None
    if model_handler(root) is not None:
        path = checkpoint_file(getattr(root, "pretrained_cfg", None) or {})
        recorded = recorded_size(path) if path else None
        check_given(type(root).__name__, given, recorded)
        found = source_geometry(state_dict, root, sizes, recorded=given or recorded)
        if given is not None and (found is None or found.get("img_size", current_size(root)) != given):
            raise CheckpointError(f"{type(root).__name__}: the checkpoint is not of source_size={given}. Leave it out.")
        if found:
            request = make_request(type(root).__name__, **found, constructing=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                apply_plan(root, plan_request(root, request))
    if filter_fn is not None:
        with _configured(root, current_size(root) if found else None):
            state_dict = _filtered(filter_fn, state_dict, model)
    gone = computed(state_dict, model)
    return {key: value for key, value in state_dict.items() if key not in gone}


def _filtered(filter_fn: Filter, state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Run stock's filter, which raises what it likes for names and shapes that it does not expect."""
    try:
        try:
            return filter_fn(state_dict, model)
        except TypeError:  # as stock: filters of one argument
            return filter_fn(state_dict)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{type(find_model(model)).__name__}: stock's filter does not take the checkpoint ({error}). Give the "
            "checkpoint of this architecture, and source_size=(height, width), the image size it was saved at."
        ) from error


@contextmanager
def _configured(root: nn.Module, size: Size | None) -> Iterator[None]:
    """Let a model's configuration give the size that its checkpoint was found to have: stock's filters look there."""
    config = getattr(root, "pretrained_cfg", None)
    if size is None or not config or not config.get("input_size"):
        yield
        return
    root.pretrained_cfg = {**config, "input_size": (config["input_size"][0], *size)}  # type: ignore[assignment]
    try:
        yield
    finally:
        root.pretrained_cfg = config
