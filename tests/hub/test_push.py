"""Pushing to a Hub with huggingface_hub's own client, against a server on the loopback."""

from __future__ import annotations

import json
import sys
import time

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.utils import RepositoryNotFoundError

import timm_resize
from tests.helpers.forks import in_forks, without_the_package
from tests.helpers.hub_server import TIMEOUT, TOKEN, serve
from tests.helpers.oracle import image
from tests.helpers.stock_reader import read
from timm_resize.cli import main


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that is the only one the client knows, and a cache of its own."""
    found, server = serve()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    known = {
        "ENDPOINT": found.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": True,
    }
    modules = [m for path, m in sys.modules.items() if path.split(".")[0] == "huggingface_hub"]
    for name, value in known.items():
        for module in [m for m in modules if name in vars(m)]:  # older clients import the names of their constants
            monkeypatch.setattr(module, name, value)
    yield found
    server.shutdown()
    server.server_close()


def build(name="vit_tiny_patch16_224", size=(96, 160), **kwargs):
    kwargs = kwargs or {"depth": 1, "num_classes": 3, "embed_dim": 48, "num_heads": 3}
    return timm_resize.create_model(name, img_size=size, **kwargs).eval()


def files(hub, branch="main"):
    return hub.repositories["me/model"].branches[branch][-1]


def assert_loads(model, source="hf-hub:me/model", **kwargs):
    again = timm.create_model(source, pretrained=True, **kwargs).eval()
    assert_same(again.state_dict(), model.state_dict())


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


def test_round_trip(hub, tmp_path, capfd):
    """What was pushed opens from hf-hub:, bit for bit, with the plugin and in a process without it."""
    model = build()
    commit = timm_resize.push_to_hub(model, "me/model")
    assert commit.commit_url.startswith(f"{hub.url}/me/model/commit/")
    assert "model.safetensors" in capfd.readouterr().err  # the client's own progress bar
    assert set(files(hub)) == {"model.safetensors", "config.json", "README.md"}
    assert json.loads(files(hub)["config.json"])["pretrained_cfg"]["input_size"] == [3, 96, 160]
    with timm_resize.install():
        assert_loads(model)
    torch.save(image((96, 160)), tmp_path / "image.pt")

    def user():
        without_the_package()
        read(tmp_path, "hf-hub:me/model", cache_dir=tmp_path / "another")

    in_forks(user)
    seen = torch.load(tmp_path / "seen.pt")
    assert_same(seen["state"], model.state_dict())
    with torch.no_grad():
        assert torch.equal(seen["output"], model(image((96, 160))))


def test_the_card(hub):
    """The card says what the model is, how to load it, and what was done to which tensor."""
    timm_resize.push_to_hub(build(), "me/model")
    card = files(hub)["README.md"].decode()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert 'timm.create_model("hf-hub:me/model", pretrained=True)' in card
    assert "resized from 224x224 to 96x160" in card
    assert "| `pos_embed` | 1x197x48 | 1x61x48 | resampled: bicubic antialias |" in card


def test_the_card_tells_training_from_resizing(hub):
    """After training the card no longer says that the tensors are those of the resize."""
    model = build(size=224)
    timm_resize.resize_(model, 96)
    timm_resize.push_to_hub(model, "me/model")
    assert "still hold what the resize computed" in files(hub)["README.md"].decode()
    with torch.no_grad():
        model.pos_embed += 1
    timm_resize.push_to_hub(model, "me/model", revision="trained")
    assert "were trained or changed after the resize" in files(hub, "trained")["README.md"].decode()
    assert "still hold what the resize computed" in files(hub)["README.md"].decode()


def test_an_edited_card_stays(hub):
    """A card that somebody changed by a letter is theirs from then on."""
    timm_resize.push_to_hub(build(), "me/model")
    edited = files(hub)["README.md"].replace(b"## Load it", b"## How to load it")
    files(hub)["README.md"] = edited
    timm_resize.push_to_hub(build(size=64), "me/model")
    assert files(hub)["README.md"] == edited


def test_files_of_the_owners_stay(hub):
    """A README.md that is there already is not replaced, and neither is any other file."""
    timm_resize.push_to_hub(build(), "me/model")
    files(hub).update({"README.md": b"---\nlicense: mit\n---\nmine", "notes.txt": b"mine too"})
    timm_resize.push_to_hub(build(size=64), "me/model")
    assert (files(hub)["README.md"], files(hub)["notes.txt"]) == (b"---\nlicense: mit\n---\nmine", b"mine too")
    assert json.loads(files(hub)["config.json"])["model_args"]["img_size"] == [64, 64]


def test_what_stock_cannot_build(hub):
    """The card of a size that stock's constructor cannot express gives the plugin's call, and that call works."""
    model = build("convit_tiny", (192, 256), depth=1, local_up_to_layer=1)
    timm_resize.push_to_hub(model, "me/model")
    card = files(hub)["README.md"].decode()
    assert 'timm_resize.create_model("hf-hub:me/model", pretrained=True, img_size=(192, 256))' in card
    assert "Stock timm cannot build this size" in card
    again = timm_resize.create_model("hf-hub:me/model", pretrained=True, img_size=(192, 256))
    assert_same(again.state_dict(), model.state_dict())


def test_private_repositories_and_branches(hub, monkeypatch):
    """A private model opens with a token and not without; a branch holds another size than main."""
    timm_resize.push_to_hub(build(), "me/model", private=True)
    assert hub.repositories["me/model"].private
    before, large = files(hub), build(size=128)
    timm_resize.push_to_hub(large, "me/model", revision="large")
    assert files(hub) == before
    assert_loads(large, "hf-hub:me/model@large")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        timm.create_model("hf-hub:me/model", pretrained=True, cache_dir="elsewhere")


FAULTS = (403, 503, "cut", "drop", "hang")
RARER = (400, 401, 404, 409, 413, 429, 500, 502)
EACH = pytest.mark.parametrize(
    "faults", [FAULTS, *(pytest.param((f,), marks=pytest.mark.slow) for f in FAULTS + RARER)]
)
"""What a request gets instead of its answer: each of the usual in turn, or always the same."""


@pytest.fixture
def impatient(monkeypatch):
    """A client that waits half a second for an answer, and not at all before it tries again."""
    client = huggingface_hub.utils.get_session()
    monkeypatch.setattr(client, "timeout", TIMEOUT, raising=False)
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        monkeypatch.setattr(huggingface_hub.constants, name, TIMEOUT, raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@EACH
def test_an_upload_that_breaks_at_any_request(hub, impatient, faults, record_property):
    """Whatever breaks on the way, the repository is at its last commit or at the new one, whole; again works."""
    timm_resize.push_to_hub(build(), "me/model")

    def push(model, at=None):
        """Push, with the fault at request `at`; returns the number of requests."""
        files(hub).pop("README.md", None)  # so that a card is sent again
        hub.objects.clear()  # and the weights
        start = len(hub.requests)
        hub.faults = {} if at is None else {start + at: faults[at % len(faults)]}
        timm_resize.push_to_hub(model, "me/model")
        return len(hub.requests) - start

    requests = push(build(size=64))
    assert requests >= 6
    for at in range(requests):
        before, model = dict(files(hub)), build(size=96 if at % 2 else 128)
        try:
            push(model, at)
        except Exception:  # whatever the client raises
            before.pop("README.md", None)
            assert files(hub) == before, at
            push(model)
        assert_loads(model)
    record_property("faults", requests)


@EACH
def test_a_download_that_breaks_at_any_request(hub, impatient, faults, tmp_path, record_property):
    """A broken answer is an error or is fetched again, never a model of half the weights; again works."""
    model, at = build(), 0
    timm_resize.push_to_hub(model, "me/model")
    with timm_resize.install():
        while True:
            start = len(hub.requests)
            hub.faults = {start + at: faults[at % len(faults)]}
            try:
                assert_loads(model, cache_dir=tmp_path / f"{at}")
            except AssertionError:
                raise
            except Exception:  # whatever the client raises
                assert_loads(model, cache_dir=tmp_path / f"{at}")
            if hub.faults:
                break
            at += 1
    assert at >= 3
    record_property("faults", at)


def test_nothing_is_uploaded_of_what_cannot_be_saved(hub):
    """A model that has no config is refused before the repository is made."""
    with pytest.raises(timm_resize.UnsupportedModelError):
        timm_resize.push_to_hub(timm.create_model("test_resnet", features_only=True), "me/model")
    assert hub.requests == []


def test_the_command_line(hub, capsys, monkeypatch):
    """`timm-resize push` uploads, and tells in one line what the Hub refused."""
    args = [
        "push",
        "vit_tiny_patch16_224",
        "--no-pretrained",
        "--img-size",
        "96",
        "--model-kwargs",
        "depth=1",
        "--repo",
    ]
    assert main([*args, "me/model"]) == 0
    assert f"pushed {hub.url}/me/model/commit/" in capsys.readouterr().out
    del hub.requests[:]
    for token, repo in (("wrong", "me/other"), (TOKEN, "me/no name"), (None, "me/other")):
        monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
        assert main([*args, repo]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"timm-resize push: error: --repo {repo}")
        assert ("hf auth login" in error) is (repo == "me/other")
    assert [path for _, path in hub.requests] == ["api/whoami-v2"]  # the wrong token's; nothing was built or sent
