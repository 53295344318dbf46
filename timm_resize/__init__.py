"""Any timm model, at any image size, with its pretrained weights carried over.

`timm_resize.api` says what is exported. All of it is imported the first time that any of it is used: timm and torch
take seconds, for which `timm-resize --help` would wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from timm_resize.version import __version__ as __version__

if TYPE_CHECKING:
    from timm_resize.api import *  # noqa: F403
    from timm_resize.api import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        """Import what is exported; from then on this module holds it, and this function is called for misses alone."""
        api, here = import_module("timm_resize.api"), globals()
        here.update({exported: getattr(api, exported) for exported in ("__all__", *api.__all__)})
        if name not in here:
            text = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(text, name=name, obj=import_module(__name__))  # Python suggests a near name
        return here[name]

    def __dir__() -> list[str]:
        """List what a user may rely on; the rooms behind it stay importable by their full names."""
        return [*import_module("timm_resize.api").__all__]
