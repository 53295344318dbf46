"""What timm is made of, to tell whether anything of it was replaced."""

from __future__ import annotations

import sys
import types


def timm_objects():
    """Every object in every timm module and every attribute of every timm class, by identity."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name == "timm" or name.startswith("timm."):
            for key, value in vars(module).items():
                found[name, key] = id(value)
                if isinstance(value, type) and value.__module__.startswith("timm"):
                    for attr, member in vars(value).items():
                        if attr == "__slotnames__":  # Python's own, of a class that was copied
                            continue
                        found[value.__module__, value.__qualname__, attr] = id(member)
                if isinstance(value, types.FunctionType):
                    found[name, key, "code"] = id(value.__code__)
    return found
