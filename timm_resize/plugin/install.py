"""Put the plugin into timm and take it out again: all of it or nothing."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

import timm
from torch import nn

from timm_resize.core.locks import Lock
from timm_resize.core.registry import is_model_class
from timm_resize.errors import ResizeError
from timm_resize.plugin.create_model import create_model, fast_init_settings
from timm_resize.plugin.data_config import INPUT_CONFIG, onnx_export, resolve_data_config, resolve_input_data_config
from timm_resize.plugin.patch import Exchange, found, stock
from timm_resize.plugin.resume import READERS, resumes
from timm_resize.plugin.script_sizes import created, follow_
from timm_resize.resize import resize_
from timm_resize.weights.checkpoint import load_checkpoint

_logger = logging.getLogger(__name__)


def _create_model(*args: Any, **kwargs: Any) -> nn.Module:
    """As `timm.create_model`, for every model at any size."""
    given = dict(inspect.signature(stock(CREATE_MODEL)).bind(*args, **kwargs).arguments)
    return created(_create, {**given.pop("kwargs", {}), **given})


def _create(**kwargs: Any) -> nn.Module:
    model = create_model(**kwargs)
    _installed.add_method(type(model))
    return model


def _load_checkpoint(model: nn.Module, checkpoint_path: str, *args: Any, **kwargs: Any) -> object:
    """As `timm.models.load_checkpoint`, for a checkpoint of another size too."""
    follow_(model, checkpoint_path)
    return load_checkpoint(model, checkpoint_path, *args, **kwargs)


CREATE_MODEL = "timm.models._factory.create_model"
REPLACED: dict[str, Callable[..., Any]] = {
    CREATE_MODEL: _create_model,
    "timm.models._helpers.load_checkpoint": _load_checkpoint,
    "timm.data.config.resolve_data_config": resolve_data_config,
    INPUT_CONFIG: resolve_input_data_config,
    "timm.utils.onnx.onnx_export": onnx_export,
    **{path: resumes(path) for path in READERS},
}
"""What `install` replaces, by what; and `set_input_size` of every model class and feature wrapper, by `resize_`."""
OPTIONAL = frozenset({*READERS, INPUT_CONFIG})
"""Those that a timm may lack: then they are left out, and the log says so."""
RELIED_ON = (
    "timm.models._factory.model_entrypoint",
    "timm.models._builder.load_pretrained",
    "timm.models._builder._resolve_pretrained_source",
    "timm.models._helpers.load_state_dict",
    "timm.models._hub.save_config_for_hf",
    "timm.models._hub.hf_split",
)
"""Other names of timm that are called and are not part of its public interface."""


class Installed:
    """The plugin's state; `with install():` uninstalls at the end."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.exchanges: list[Exchange] = []
        self.methods: dict[type, tuple[Any, Any]] = {}  # class → our `set_input_size`, and its own

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *_: object) -> None:
        uninstall()

    def uninstall(self) -> None:
        """Take the plugin out again, as `timm_resize.uninstall()`."""
        uninstall()

    def put_in(self) -> None:
        """Replace everything; on an error put back what was replaced."""
        check_timm()
        try:
            for cls in _model_classes():
                self._give(cls)
            for path, ours in REPLACED.items():
                if path in OPTIONAL and not _has_all(path):
                    _logger.warning("timm %s has no %s, which is left out.", timm.__version__, path)
                    continue
                self.exchanges.append(Exchange(found(path), ours))
                self.exchanges[-1].put_in()
        except BaseException:
            self.take_out()
            raise

    def take_out(self) -> None:
        """Put everything back; what somebody else has replaced since stays as they have it."""
        while self.exchanges:
            self.exchanges.pop().take_out()
        while self.methods:
            cls, (ours, own) = self.methods.popitem()
            if cls.__dict__.get("set_input_size") is not ours:
                continue
            if own is None:
                delattr(cls, "set_input_size")
            else:
                setattr(cls, "set_input_size", own)  # noqa: B010

    def add_method(self, cls: type) -> None:
        """Give a class `set_input_size` while the plugin is in, also one that was defined meanwhile."""
        with self.lock:
            if fast_init_settings and not hasattr(getattr(cls, "set_input_size", None), "resizes"):
                self._give(cls)

    def _give(self, cls: type) -> None:
        """Put our method on the class, never on instances, which so stay clean and pickle."""
        method = _method(getattr(cls, "set_input_size", None))
        self.methods[cls] = method, cls.__dict__.get("set_input_size")
        setattr(cls, "set_input_size", method)  # noqa: B010


_installed = Installed()


def install(*, fast_init: bool = True) -> Installed:
    """Put the plugin into timm: `create_model` takes `img_size` for every model, all have `set_input_size`.

    Calls nest: as many `uninstall` calls take it out again. Safe from several threads.

    Args:
        fast_init: Do not initialise weights that a checkpoint is about to replace. The weights are those that stock
            loads, and a new head is drawn by its own initialisers; but fewer random numbers are drawn than by stock,
            so a seed gives other ones, there and afterwards. False draws all, as stock. The latest call holds.

    Returns:
        A handle; as a context manager it uninstalls at the end of the block.

    Raises:
        ResizeError: This timm lacks a name that we rely on; timm is untouched.

    Example:
        >>> import timm, timm_resize
        >>> with timm_resize.install():
        ...     model = timm.create_model("resnet18", img_size=256)
        ...     model.set_input_size((320, 448))
    """
    with _installed.lock:
        if not fast_init_settings:
            _installed.put_in()
        fast_init_settings.append(fast_init)
    return _installed


def uninstall() -> None:
    """Take the plugin out of timm, which is then exactly as before; a no-op when it is not in."""
    with _installed.lock:
        if fast_init_settings:
            fast_init_settings.pop()
            if not fast_init_settings:
                _installed.take_out()


def check_timm() -> None:
    """Raise ResizeError where this timm is not one that the plugin can be put into."""
    gone = [path for path in REPLACED if path not in OPTIONAL and found(path) is None]
    gone += [path for path in RELIED_ON if not _has(path)]
    if gone:
        raise ResizeError(
            f"timm {timm.__version__} has no {' and no '.join(gone)}, which timm_resize relies on. Use timm 1.0.31, or "
            "a newer timm_resize."
        )


def _has_all(path: str) -> bool:
    """Whether a function is there, and what it reads its file with if it resumes."""
    needed = (path, *READERS.get(path, ())[:1])
    return all(str(p).rpartition(".")[0] in sys.modules and found(str(p)) is not None for p in needed)


def _has(path: str) -> bool:
    module, _, name = path.rpartition(".")
    return hasattr(sys.modules.get(module), name)


def _model_classes() -> list[type]:
    """Return timm's model classes and feature wrappers, base classes first."""
    found_there = {
        cls
        for name, module in list(sys.modules.items())
        if name.startswith("timm.models.") and module is not None
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, nn.Module)
        if is_model_class(cls) or cls.__name__.startswith("Feature")
    }
    return sorted(found_there, key=lambda c: (len(c.__mro__), c.__qualname__))


def _method(own: Any) -> Callable[..., None]:
    """Return a `set_input_size` with the positional order of the class's own."""
    if hasattr(own, "resizes"):  # inherited from a class that has ours already
        return own
    order = ["img_size", "patch_size", "window_size"]
    if own is not None:
        order = [n for n in inspect.signature(own).parameters if n != "self"]

    def set_input_size(self: nn.Module, *args: Any, **options: Any) -> None:
        """Resize the model in place; see `timm_resize.resize_`."""
        if len(args) > len(order):
            raise TypeError(f"set_input_size takes {', '.join(order)}; {len(args)} positional arguments were given")
        resize_(self, **dict(zip(order, args, strict=False)), **options)

    set_input_size.resizes = True  # type: ignore[attr-defined]
    if own is not None:
        set_input_size.__doc__ = own.__doc__
    return set_input_size
