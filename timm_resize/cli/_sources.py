"""What a subcommand makes of a SOURCE: the model it names, on the meta device or with its weights."""

from __future__ import annotations

import os
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, get_session
from timm.models import is_model, parse_model_name, split_model_name_tag
from torch import Tensor, nn

from timm_resize.cli._parser import did_you_mean
from timm_resize.errors import ResizeError
from timm_resize.plugin.create_model import create_model
from timm_resize.weights.provenance import checkpoint_file, hub_file


def check_name(name: str) -> None:
    """Raise ResizeError for a model, tag or folder that there is not, with near names.

    What `hf-hub:` names is not looked for.
    """
    if os.path.isdir(name):
        raise ResizeError(f"{name} is a folder. Use local-dir:{name}.")
    scheme, rest = parse_model_name(name)
    if scheme == "local-dir" and not Path(rest, "config.json").is_file():
        raise ResizeError(f"{name}: there is no {Path(rest, 'config.json')}. Give a folder that a model was saved to.")
    if scheme is not None:
        return
    base, tag = split_model_name_tag(rest)
    if not is_model(base):
        near = did_you_mean(base, timm.list_models()) or ". timm.list_models('*part*') finds names"
        raise ResizeError(f"timm has no model {base}{near}")
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
    if tag and tag not in tags:
        near = did_you_mean(tag, tags) or (f". Use one of {', '.join(tags)}." if tags else ". It has none.")
        raise ResizeError(f"{base} has no weights {tag}{near}")


def build(
    name: str, kwargs: Mapping[str, object], *, meta: bool = False, create: Callable[..., nn.Module] = create_model
) -> nn.Module:
    """Create a model, on the meta device if asked; whatever fails there is the user's to fix."""
    check_name(name)
    try:
        with torch.device("meta" if meta else "cpu"):
            return create(name, **kwargs)
    except ResizeError:
        raise
    except Exception as error:  # constructors, file formats and the network raise what they like
        raise ResizeError(textwrap.shorten(f"{name}: {error}", 600, placeholder=" …")) from error


def on_meta(name: str, kwargs: Mapping[str, object]) -> nn.Module:
    """Create a model without values, of what is on this machine alone."""
    if parse_model_name(name)[0] == "hf-hub":
        raise ResizeError(f"{name} would be downloaded. Give the architecture's name, or convert it.")
    return build(name, kwargs, meta=True)


def fetch(model: nn.Module, name: str) -> None:
    """Download the weights of a model, built from `name`, if they are on the Hub alone. Tried once.

    timm would look for a second file where the first cannot be reached.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    place = hub_file(config)
    if place is None or checkpoint_file(config) is not None:
        return
    repo, file, revision = place
    unreachable = f"{name}: the Hub cannot be reached, and {file} of {repo} is not on this machine. "
    unreachable += "Check the connection, or give --no-pretrained."
    try:
        get_session().head(constants.ENDPOINT, timeout=10)  # a download would try for a minute
    except Exception as error:  # of the client, whichever it is; no answer is an exception
        raise ResizeError(unreachable) from error
    try:
        hf_hub_download(repo, file, revision=revision)
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too
        raise ResizeError(unreachable) from error
    except EntryNotFoundError:  # timm knows under which other names weights may be there
        return
    except Exception as error:  # of the Hub, of its client, or of the network
        raise ResizeError(textwrap.shorten(f"{name}: {repo}: {error}", 600, placeholder=" …")) from error


def size_in_bytes(model: nn.Module) -> int:
    """Return how many bytes the tensors of a checkpoint of the model take."""
    return sum(tensor.nbytes for tensor in model.state_dict(keep_vars=True).values())


def check_space(folder: Path, needed: int) -> None:
    """Raise ResizeError unless a folder, or the nearest above it that is there, may be written to and has the space."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ResizeError(f"{there} is a file. Give a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ResizeError(f"{there} may not be written to. Give another folder.")
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ResizeError(
            f"{there} has {free / 1e9:.1f} GB left and {needed / 1e9:.1f} GB are to be written. Make room."
        )


def classes_in(state_dict: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """Return how many classes a checkpoint's classifier has, None when it cannot be told."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    for name in (names,) if isinstance(names, str) else names:
        weight = state_dict.get(f"{name}.weight")
        if weight is not None:
            return int(weight.shape[0])
    return None
