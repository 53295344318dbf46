"""Put a model on the Hugging Face Hub, resized to another image size.

Reads the source at its own size, resizes it, and uploads safetensors, a config and a model card in one commit.
Log in first (hf auth login), or set HF_TOKEN.
"""

from __future__ import annotations

import argparse

from huggingface_hub.utils import HfHubHTTPError, HFValidationError

from timm_resize.cli._common import add_resize_arguments, build, resize_options
from timm_resize.errors import ResizeError
from timm_resize.hub.push import push_to_hub
from timm_resize.resize import resize_

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


def run(args: argparse.Namespace) -> None:
    """Resize, upload, and print the plan and the commit's address."""
    model = build(args.source, {"pretrained": not args.no_pretrained, **dict(args.model_kwargs)})
    print(resize_(model, args.img_size, **resize_options(args)).summary())
    try:
        commit = push_to_hub(
            model, args.repo, commit_message=args.message, private=args.private, revision=args.revision
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise ResizeError(f"push: --repo={args.repo}: {error}. Check the name and log in (hf auth login).") from None
    print(f"pushed {commit.commit_url}")
