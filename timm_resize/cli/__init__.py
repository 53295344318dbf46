"""The command line. Each module of this package without a leading underscore is a subcommand.

Such a module has a docstring, an `EXAMPLE`, `add_arguments(parser)` and `run(args)`; with `OWN_OUTPUT = True` it
answers for all that it prints. All are imported for `--help`, so timm and torch are imported inside `run`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Iterator, Sequence
from types import ModuleType

from timm_resize.cli._common import add_output_arguments, in_options, output
from timm_resize.cli._parser import Parser
from timm_resize.errors import ResizeError
from timm_resize.version import __version__

STATUS = """exit status:
  0    done
  1    something that nobody expected, told in one line; --traceback shows where
  2    a wrong command line, or something that cannot be done as asked
  130  interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `timm-resize`; returns the exit status, after a line on stderr where it is not 0.

    Example:
        >>> main(["plan", "vit_tiny_patch16_224", "--img-size", "8"])
        2
    """
    args = argparse.Namespace(own_output=False, traceback=False, command="timm-resize")
    try:
        parser().parse_args(sys.argv[1:] if argv is None else argv, args)
        if args.own_output:
            args.run(args)
        else:
            with output(args):
                args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, e.g. `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        if args.own_output:
            raise
        return _report(args, "interrupted", 130)
    except Exception as error:
        if args.traceback:
            raise
        if isinstance(error, (ResizeError, OSError)):
            return _report(args, f"error: {in_options(str(error), args)}", 2)
        if args.own_output:
            raise
        return _report(args, f"unexpected {type(error).__name__}: {error}. With --traceback it says where.", 1)
    return 0


def _report(args: argparse.Namespace, text: str, status: int) -> int:
    print(f"{args.command}: {' '.join(text.split())}", file=sys.stderr)
    return status


def parser() -> argparse.ArgumentParser:
    """Return the parser of `timm-resize`, for programs that complete words or make manual pages of it too."""
    out = Parser(
        prog="timm-resize", description="Resize timm models to other image sizes, with their weights carried over."
    )
    out.add_argument("--version", action=_Version, nargs=0, help="show the versions that a bug report needs, and exit")
    commands = out.add_subparsers(metavar="COMMAND", required=True)
    examples = []
    for name, module in _subcommands():
        text = (module.__doc__ or "").strip()
        examples.append(f"  {module.EXAMPLE}")
        command = commands.add_parser(
            name, help=text.splitlines()[0].rstrip("."), description=text, epilog=f"example:\n  {module.EXAMPLE}"
        )
        module.add_arguments(command)
        own_output = getattr(module, "OWN_OUTPUT", False)
        if not own_output:
            add_output_arguments(command)
        command.set_defaults(run=module.run, own_output=own_output, command=command.prog, options=_options(command))
    out.epilog = "\n".join(["examples:", *examples, "", STATUS])
    return out


def _subcommands() -> Iterator[tuple[str, ModuleType]]:
    for info in pkgutil.iter_modules(__path__):
        if not info.name.startswith("_"):
            yield info.name.replace("_", "-"), importlib.import_module(f"{__name__}.{info.name}")


def _options(command: argparse.ArgumentParser) -> dict[str, str]:
    """Return the option, such as --img-size, of each argument of a subcommand."""
    return {action.dest: action.option_strings[0] for action in command._actions if action.option_strings}


class _Version(argparse.Action):
    """Print the versions as their packages' metadata has them, without importing any."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"timm-resize {__version__} (timm {version('timm')}, torch {version('torch')})")
        parser.exit()
