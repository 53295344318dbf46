"""Put a resized model on the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.utils import EntryNotFoundError
from torch import nn

from timm_resize.core.find import current_size, find_model
from timm_resize.geometry import text
from timm_resize.hub.save import CARD, may_replace, save_pretrained, write_card
from timm_resize.version import __version__


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    model_args: dict[str, Any] | None = None,
) -> CommitInfo:
    """Upload a model at its present size, in one commit: weights, config and, where there is none, a model card.

    The repository is made if missing, the branch `revision` too. Files that the repository has besides stay, and so
    does a README.md that somebody wrote or edited. An upload that breaks leaves the repository at its last commit.

    Args:
        model: A timm model, or something that holds exactly one.
        repo_id: "owner/name" or "name".
        commit_message: By default the model and its size.
        private: Of a new repository; None for the owner's default.
        token: As for `huggingface_hub`; None for the one that is logged in.
        revision: Branch to commit to, None for main.
        create_pr: Open a pull request instead.
        model_args: As for `save_pretrained`.

    Returns:
        The commit, with its URL.

    Raises:
        UnsupportedModelError, ResizeError: As `save_pretrained`; nothing is uploaded.
        huggingface_hub.utils.HfHubHTTPError: What the Hub refused.
    """
    api = HfApi(token=token, library_name="timm_resize", library_version=__version__)
    with tempfile.TemporaryDirectory() as folder:
        root = find_model(model)
        save_pretrained(root, folder, model_args=model_args)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        card = Path(folder, CARD)
        if _has_its_own_card(api, repo_id, revision):
            card.unlink()
        else:
            at = f"hf-hub:{repo_id}{f'@{revision}' if revision else ''}"
            write_card(root, card, repo_id.rpartition("/")[2], at)
        size = current_size(root)
        message = commit_message or f"{type(root).__name__}{f' at {text(size)}' if size else ''}"
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message, create_pr=create_pr
        )


def _has_its_own_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether a repository has a README.md that `model_card` did not make, or that was edited since."""
    try:
        path = api.hf_hub_download(repo_id, CARD, revision=revision)
    except EntryNotFoundError:
        return False
    return not may_replace(Path(path).resolve())  # the cache holds links to files
