"""Every way in for weights of another size gives the same tensors: a checkpoint saved at B, whose base was C, at A."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import ModelEmaV3
from torch import nn

import timm_resize
from tests.helpers.examples import ALWAYS, EXAMPLES, HEAVY, as_built, example
from tests.helpers.oracle import redraw_, stock, tensors
from timm_resize.core.find import current_size
from timm_resize.core.registry import families
from timm_resize.hub.save import plain_tensors

NAMES = [
    min(family.examples, key=lambda name: (name in HEAVY, name not in ALWAYS, name))
    for family in families()
    if family.state and family.examples
] + ["flexivit_small"]
"""One model of each family with state, and one whose checkpoint stock's filter reads with options of its own."""

WAYS = (
    "local-dir",
    "file",
    "pickle",
    "state_dict",
    "checkpoint_path",
    "averaged",
    "wrapped",
    "load_checkpoint",
    "resize_state_dict",
    "beside",
    "holder",
    "resume_checkpoint",
)

BY_CONFIG = {"swinv2_cr_tiny_224"}
"""Models whose saved config decides: it gives the window as of the size saved at."""

CASES = [
    pytest.param(
        name,
        wide,
        [way for way in WAYS[turn::6] if way != "local-dir" or name not in BY_CONFIG],
        id=f"{name}-{'wide' if wide else 'square'}-{turn}",
        marks=[pytest.mark.slow] * ((turn, wide, at % 2) != (at % 6, at // 2 % 2, at // 6 % 2)),
    )
    for at, name in enumerate(NAMES)
    for turn in range(6)
    for wide in (0, 1)
]
"""By default every second model comes in two of the ways at one shape; all in all ways, at both, in the slow ones."""


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def near(model, change, wide):
    """Return a valid size about `change` pixels larger, of whole patches; a wide one by 64 pixels more on one side."""
    side = current_size(model)[0] + change
    if wide:
        return timm_resize.nearest_sizes(model, (side // 16 * 16, side // 16 * 16 + 64))[0]
    usual = (s for s in sorted(range(-64, 65), key=abs) if not (side + s) % 16 or not (side + s) % 14)
    valid = ((side + s,) * 2 for s in usual if timm_resize.nearest_sizes(model, side + s)[0] == (side + s,) * 2)
    return next(valid, timm_resize.nearest_sizes(model, side)[0])


class Holder(nn.Module):
    """A program's own module about a model, with a parameter of its own."""

    def __init__(self, model):
        super().__init__()
        self.proto = nn.Parameter(torch.zeros(3))
        self.net = model


def written(way, saved, folder):
    """Write the weights of `saved` as a program does that this package does not know, and return the file."""
    state = plain_tensors(saved)
    if way in ("file", "checkpoint_path", "load_checkpoint"):
        path = folder / "weights.safetensors"
        save_file(state, path)
        return str(path)
    other = {k: torch.zeros_like(v) for k, v in state.items()}
    content = {
        "pickle": {"state_dict": state},
        "averaged": {"state_dict": other, "state_dict_ema": ModelEmaV3(saved).state_dict()},
        "wrapped": {f"module._orig_mod.{k}": v for k, v in state.items()},
        "beside": {"epoch": 3, "state_dict": Holder(saved).state_dict()},
        "resume_checkpoint": {"epoch": 3, "version": 2, "state_dict": state},
    }
    torch.save(content[way], folder / "weights.pth")
    return str(folder / "weights.pth")


def brought(way, name, saved, size, folder):
    """Bring the weights of `saved` in one way into a model at `size`; away from squares with the size they are of."""
    kwargs, of = EXAMPLES[name], current_size(saved)
    asked = {"img_size": size, **kwargs}
    source = {} if of[0] == of[1] else {"source": of}
    source_size = {} if of[0] == of[1] else {"source_size": of}
    if way == "local-dir":
        timm_resize.save_pretrained(saved, folder)
        return timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size)
    if way in ("file", "pickle", "state_dict"):
        overlay = {"file": written(way, saved, folder)} if way != "state_dict" else {way: plain_tensors(saved)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **asked, **source_size)
    if way in ("checkpoint_path", "averaged", "wrapped", "beside"):
        return timm.create_model(name, checkpoint_path=written(way, saved, folder), **asked, **source_size)
    model = timm.create_model(name, **asked)
    if way == "load_checkpoint":
        timm.models.load_checkpoint(model, written(way, saved, folder), **source_size)
    elif way == "resume_checkpoint":
        assert timm_resize.resume_checkpoint(model, written(way, saved, folder), **source) == 4
    elif way == "holder":
        holder = Holder(model)
        holder.load_state_dict(timm_resize.resize_state_dict(Holder(saved).state_dict(), holder, **source))
    else:
        model.load_state_dict(timm_resize.resize_state_dict(saved.state_dict(), model, **source))
    return model


@pytest.mark.parametrize(("name", "wide", "ways"), CASES)
def test_every_way_gives_the_same_tensors(name, wide, ways, tmp_path):
    """Base size C, saved at a larger B, opened at a smaller A: what a resize from B to A computes, bit for bit."""
    saved = example(name)
    timm_resize.resize_(saved, near(saved, 64, wide), **as_built(name))
    size = near(saved, -96, wide)
    want = copy.deepcopy(saved)
    want.__dict__.pop("_resize_chain", None)  # a file holds the tensors, not their originals
    timm_resize.resize_(want, size, **as_built(name))
    with timm_resize.install():
        for way in ways:
            folder = tmp_path / way
            folder.mkdir()
            got = brought(way, name, saved, size, folder)
            assert current_size(got) == size, way
            have, wanted = tensors(got), tensors(want)
            assert have.keys() == wanted.keys(), way
            for key, value in wanted.items():
                assert torch.equal(have[key], value), f"{way}: {key}"


def jax_archive(model, path):
    """Write a ViT's weights as Google's JAX releases hold them: (h, w, in, out) kernels, heads apart."""
    state, heads = {k: v.numpy() for k, v in model.state_dict().items()}, model.blocks[0].attn.num_heads
    dim = model.embed_dim
    out = {
        "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for i in range(len(model.blocks)):
        ours, theirs = f"blocks.{i}.", f"Transformer/encoderblock_{i}/"
        for a, b in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_2")):
            out[f"{theirs}{b}/scale"], out[f"{theirs}{b}/bias"] = state[f"{ours}{a}.weight"], state[f"{ours}{a}.bias"]
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        parts = zip(
            ("query", "key", "value"),
            state[f"{ours}attn.qkv.weight"].reshape(3, dim, dim),
            state[f"{ours}attn.qkv.bias"].reshape(3, dim),
            strict=True,
        )
        for part, weight, bias in parts:
            out[f"{attention}{part}/kernel"] = weight.T.reshape(dim, heads, -1)
            out[f"{attention}{part}/bias"] = bias.reshape(heads, -1)
        out[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, -1, dim)
        out[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for a, b in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"{theirs}MlpBlock_3/{b}/kernel"] = state[f"{ours}mlp.{a}.weight"].T
            out[f"{theirs}MlpBlock_3/{b}/bias"] = state[f"{ours}mlp.{a}.bias"]
    np.savez(path, **out)


@pytest.mark.parametrize("size", [(224, 224), (320, 320), (96, 160)])
def test_archives_of_jax_arrays(size, tmp_path):
    """A .npz checkpoint opens at another size as stock's own loader fits it (plain bilinear), in both ways."""
    name, kwargs = "vit_tiny_patch16_224", {"depth": 2, "num_classes": 3}
    model, path = redraw_(stock(name, **kwargs)), str(tmp_path / "weights.npz")
    jax_archive(model, path)
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": path, "custom_load": True, "num_classes": 3}}
    theirs = stock(name, img_size=size, **kwargs, **overlay)
    with timm_resize.install():
        for how in (overlay, {"checkpoint_path": path}):
            ours = timm.create_model(name, img_size=size, **kwargs, **how)
            for key, value in tensors(theirs).items():
                torch.testing.assert_close(tensors(ours)[key], value, atol=1e-5, rtol=0)
    assert size != (224, 224) or all(torch.equal(v, tensors(model)[k]) for k, v in tensors(theirs).items())


@pytest.mark.parametrize("size", [(224, 224), (320, 320), (96, 160)])
def test_layouts_of_other_programs(size):
    """A checkpoint by open_clip's names opens at another size as stock's filter fits it."""
    name, kwargs = "vit_tiny_patch16_224", {"depth": 2, "num_classes": 3}
    state = {f"visual.trunk.{k}": v for k, v in redraw_(stock(name, **kwargs)).state_dict().items()}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": 3}}
    theirs = stock(name, img_size=size, **kwargs, **overlay)
    ours = timm_resize.create_model(name, img_size=size, **kwargs, **overlay)
    for key, value in tensors(theirs).items():
        torch.testing.assert_close(tensors(ours)[key], value, atol=1e-5, rtol=0)
