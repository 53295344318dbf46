"""The parser: argparse, whose errors are one line with near names. Imports neither timm nor torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from timm_resize.errors import near_names


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; the usage is what `--help` is for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 after one line on stderr."""
        end = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: error: {message}{end} Help: {self.prog} --help\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Look for unknown options first: argparse names what else is missing before them."""
        known = self._option_string_actions
        for word in self._own_words(args or ()):
            option = word.partition("=")[0]
            if option.startswith("--") and not any(name.startswith(option) for name in known):
                self.error(f"there is no option {option}{did_you_mean(option, known)}")
        return super().parse_known_args(args, namespace)

    def _own_words(self, args: Sequence[str]) -> Iterable[str]:
        """Yield the words up to '--', or to the first that begins another command line."""
        others = (argparse.REMAINDER, argparse.PARSER)
        takes_others = any(action.nargs in others for action in self._actions)
        for word in args:
            if word == "--" or (takes_others and not word.startswith("-")):
                return
            yield word

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Name near choices."""
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            near = did_you_mean(str(value), known) or f". Use one of {', '.join(known)}"
            raise argparse.ArgumentError(action, f"{value!r} is not known{near}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return '. Did you mean a, b?' for known names close to one, '' when none is close.

    Example:
        >>> did_you_mean("--img-sise", ["--img-size", "--preset"])
        '. Did you mean --img-size?'
    """
    near = near_names(name, known)
    return f". Did you mean {near}?" if near else ""
