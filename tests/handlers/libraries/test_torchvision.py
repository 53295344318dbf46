"""torchvision's classifiers, against its own builds at the new size and its own `interpolate_embeddings`."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer, interpolate_embeddings

import timm_resize
from tests.helpers.oracle import assert_same_structure, image, redraw_

STEM = [ConvStemConfig(4, 3, 2), ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]


def vit(size, patch=8, **options):
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16, "num_classes": 3}
    return redraw_(VisionTransformer(image_size=size, patch_size=patch, **sizes, **options)).eval()


def maxvit(size, partition=7):
    widths = {"stem_channels": 8, "block_channels": [8, 16], "block_layers": [2, 1], "head_dim": 4}
    built = MaxVit((size, size), partition_size=partition, stochastic_depth_prob=0.0, num_classes=3, **widths)
    return redraw_(built).eval()


def swin(block, merging):
    torch.manual_seed(0)
    shape = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": [7, 7]}
    return SwinTransformer(**shape, num_classes=3, block=block, downsample_layer=merging).eval()


@pytest.mark.parametrize("options", [{}, {"representation_size": 8}, {"conv_stem_configs": STEM}], ids=str)
@pytest.mark.parametrize("size", [96, 32])
@torch.no_grad()
def test_vit(options, size):
    """Structure, embedding and outputs are those of torchvision's build with its interpolated weights."""
    model = vit(48, **options)
    theirs = vit(size, **options)
    theirs.load_state_dict(interpolate_embeddings(size, 8, OrderedDict(copy.deepcopy(model.state_dict()))))
    timm_resize.resize_(model, size)
    assert_same_structure(model, theirs)
    torch.testing.assert_close(model.encoder.pos_embedding, theirs.encoder.pos_embedding, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(image((size, size))), theirs(image((size, size))), rtol=1e-4, atol=1e-5)


def test_vit_as_asked():
    """What the caller asks for goes before torchvision's own: timm's antialiased bicubic is another."""
    own, asked = vit(48), vit(48)
    timm_resize.resize_(own, 32)
    plan = timm_resize.resize_(asked, 32, interpolation="bicubic", antialias=True)
    assert plan.tensors[0].action == "resampled: bicubic antialias"
    assert (own.encoder.pos_embedding - asked.encoder.pos_embedding).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model", "size", "said", "nearest"),
    [
        (vit(48), 50, "not divisible by patch_size=8", [48, 56]),
        (vit(48), (32, 64), "not a square", [32, 64]),
        (vit(48, conv_stem_configs=STEM[:2]), 64, "gives a 16x16 map after the stem", []),
        (maxvit(56), 60, "15x15 map in blocks.0, not divisible by partition_size=7", [56, 109]),
        (maxvit(112), (56, 112), "only if square", [56, 112]),
    ],
)
def test_sizes_that_cannot_be(model, size, said, nearest):
    """A size that torchvision's forward cannot run is refused, naming those that it can."""
    with pytest.raises(timm_resize.InvalidSizeError, match=said) as caught:
        timm_resize.plan_resize(model, size)
    assert {side for side, _ in caught.value.nearest} == set(nearest)


@pytest.mark.parametrize(("size", "partition"), [(112, 7), (64, 8), (80, 5)])
@torch.no_grad()
def test_maxvit(size, partition):
    """Partitions keep their cells, or take `window_size`; structure and outputs are those of torchvision's build."""
    model, theirs = maxvit(56), maxvit(size, partition)
    tables = {k: v.clone() for k, v in model.state_dict().items()}
    plan = timm_resize.resize_(model, size, window_size=partition)
    assert bool(plan.tensors) == (partition != 7)
    assert_same_structure(model, theirs)
    theirs.load_state_dict(model.state_dict())
    assert torch.equal(model(image((size, size))), theirs(image((size, size))))
    timm_resize.resize_(model, 56, window_size=7)
    assert all(torch.equal(v, tables[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_maxvit_refuses_another_shape():
    """An image with as many partitions in another shape, which torchvision puts together wrongly, is refused."""
    model, x = maxvit(112), image((56, 224))
    assert model(x).shape == (1, 3)
    timm_resize.resize_(model, 56)
    timm_resize.resize_(model, 112)
    assert model(image((110, 112))).shape == (1, 3)
    with pytest.raises(timm_resize.InvalidSizeError, match="takes 109 to 112"):
        model(x)


def test_maxvit_scales_its_partition():
    """With window_policy="scale" the partitions grow with the image, and their count stays."""
    model = maxvit(56)
    timm_resize.resize_(model, 112, window_policy="scale")
    assert_same_structure(model, maxvit(112, 14))


@pytest.mark.parametrize(
    ("block", "merging"), [(SwinTransformerBlock, PatchMerging), (SwinTransformerBlockV2, PatchMergingV2)]
)
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (50, 37)])
@torch.no_grad()
def test_swin_is_as_it_was(block, merging, size):
    """Swin pads its maps in each forward and has no size of its own: every bit stays, and outputs are torchvision's."""
    model = swin(block, merging)
    theirs, x = copy.deepcopy(model), image(size)
    assert not timm_resize.resize_(model, size).tensors
    assert_same_structure(model, theirs)
    assert torch.equal(model(x), theirs(x))


def test_registered_names():
    """One name of each family, as torchvision builds it, at a larger, a smaller and a wide size."""
    for name in ("vit_b_32", "maxvit_t", "squeezenet1_1"):
        with torch.device("meta"):
            model = models.get_model(name).eval()
        for size in ((448, 448), (128, 128), (128, 256)):
            try:
                timm_resize.resize_(model, size)
            except timm_resize.InvalidSizeError:
                assert name == "maxvit_t" or (name == "vit_b_32" and size == (128, 256))
                continue
            assert model(torch.empty(2, 3, *size, device="meta")).shape == (2, 1000)


@torch.no_grad()
def test_state_dicts():
    """A checkpoint of another size is fitted, its size guessed, with a wrapper's names and another head too."""
    model, small = vit(96), vit(32)
    sd = {f"module.{k}": v for k, v in small.state_dict().items()}
    sd["module.heads.head.weight"] = torch.zeros(7, 16)
    fitted = timm_resize.resize_state_dict(sd, model)
    want = interpolate_embeddings(96, 8, OrderedDict(copy.deepcopy(small.state_dict())))["encoder.pos_embedding"]
    torch.testing.assert_close(fitted["encoder.pos_embedding"], want, rtol=0, atol=1e-5)
    assert fitted["heads.head.weight"].shape == (7, 16)
    with pytest.raises(timm_resize.CheckpointError, match="source"):
        timm_resize.resize_state_dict(small.state_dict(), model, source=64)


@pytest.mark.parametrize(("base", "large"), [(vit(32), 96), (maxvit(56), 112)])
@torch.no_grad()
def test_several_sizes(base, large):
    """MultiSize and at_size give what a resized copy gives, and leave the model as it was."""
    model, resized, x = copy.deepcopy(base), copy.deepcopy(base), image((large, large))
    before = copy.deepcopy(model)
    timm_resize.resize_(resized, large)
    multi = timm_resize.MultiSize(model)
    assert torch.equal(multi(x), resized(x))
    with timm_resize.at_size(nn.Sequential(model), large) as plan:
        assert plan.new_size == (large, large)
        assert torch.equal(model(x), resized(x))
    assert_same_structure(model, before)
    assert all(torch.equal(v, w) for v, w in zip(model.parameters(), before.parameters(), strict=True))


def test_what_follows():
    """Optimizer state and an averaged copy go through the embedding's map."""
    model = vit(48)
    ema, optimizer = AveragedModel(model), torch.optim.AdamW(model.parameters())
    model(image((48, 48))).sum().backward()
    optimizer.step()
    ema.update_parameters(model)
    moment = optimizer.state[model.encoder.pos_embedding]["exp_avg"].clone()
    plan = timm_resize.resize_(model, 96, optimizer=optimizer, ema=ema)
    how = plan.tensors[0].how
    assert torch.equal(optimizer.state[model.encoder.pos_embedding]["exp_avg"], how(moment))
    assert ema.module.image_size == 96
    assert torch.equal(ema.module.encoder.pos_embedding, model.encoder.pos_embedding)
    model(image((96, 96))).sum().backward()
    optimizer.step()


def test_what_else_is_told(tmp_path):
    """A traced graph, and a save that nothing would open, are refused with what to do instead."""
    graph = create_feature_extractor(vit(48), ["encoder.ln"])
    with pytest.raises(timm_resize.UnsupportedModelError, match="resize the model before tracing it"):
        timm_resize.resize_(graph, 96)
    with pytest.raises(timm_resize.UnsupportedModelError, match="torch.save"):
        timm_resize.save_pretrained(vit(48), tmp_path)
    assert timm_resize.data_config(vit(48))["input_size"] == (3, 48, 48)
