"""Put a model on the Hugging Face Hub, resized to another image size.

Reads the source at its own size, resizes it, and uploads safetensors, a config and a model card in one commit.
Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from timm_resize.cli._common import add_json_argument, add_resize_arguments, resize_options, steps
from timm_resize.errors import ResizeError

EXAMPLE = "timm-resize push local-dir:levit-320x448 --img-size 384 --repo me/levit-384 --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", help="a timm model name (with tag), local-dir:FOLDER or hf-hub:OWNER/NAME"
    )
    add_resize_arguments(parser)
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="repository to upload to, made if missing")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="commit message")
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--no-pretrained", action="store_true", help="random weights; nothing is downloaded")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Resize, upload, and print the plan and the commit's address."""
    with steps(args, "checking", "reading weights", "resizing", "uploading") as begin:
        begin()
        _check_hub(args.repo)
        from timm_resize.cli._sources import build, check_space, fetch, size_in_bytes
        from timm_resize.hub.push import push_to_hub
        from timm_resize.resize import resize_

        kwargs, options = dict(args.model_kwargs), resize_options(args)
        trial = build(args.source, kwargs, meta=True)  # what cannot be, before minutes of work
        resize_(trial, args.img_size, **options)
        check_space(Path(tempfile.gettempdir()), size_in_bytes(trial))
        if not args.no_pretrained:
            fetch(trial, args.source)
        begin()
        model = build(args.source, {"pretrained": not args.no_pretrained, **kwargs})
        begin()
        plan = resize_(model, args.img_size, **options)
        begin()
        try:
            commit = push_to_hub(
                model, args.repo, commit_message=args.message, private=args.private, revision=args.revision
            )
        except ResizeError:
            raise
        except Exception as error:  # of the Hub, of its client, or of the network
            raise ResizeError(f"--repo {args.repo}: {error}. Check the name and the connection.") from error
    if args.json:
        print(json.dumps({"plan": plan.to_dict(), "commit": commit.commit_url}))
        return
    print(plan.summary())
    print(f"pushed {commit.commit_url}")


def _check_hub(repo: str) -> None:
    """Raise ResizeError unless `repo` can be a name and the Hub knows who is asking."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ResizeError(f"--repo {repo} is no name of a repository: {error}") from None
    if get_token() is None:
        raise ResizeError(f"--repo {repo}: nobody is logged in. Log in (hf auth login), or set HF_TOKEN.")
    try:
        HfApi().whoami()
    except Exception as error:  # of the Hub, of its client, or of the network
        raise ResizeError(
            f"--repo {repo}: {error}. Log in (hf auth login), or check HF_TOKEN and the connection."
        ) from error
