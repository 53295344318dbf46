"""Let the site show what stands under `Example:` in a docstring as code: its parser knows the plural alone."""

from __future__ import annotations

import griffe


class ExamplesSection(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
