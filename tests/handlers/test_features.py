"""Feature wrappers of every kind give, after a resize, the feature maps of the plain model resized alike."""

from __future__ import annotations

import warnings

import pytest
import torch

import timm_resize
from tests.helpers.examples import EXAMPLES, each_with, example, sweep
from tests.helpers.oracle import image, sizes_for, stock


def plain_features(plain, wrapper, x):
    """Read the maps at the wrapper's places from the plain model, by forward hooks or its own intermediates."""
    if type(wrapper).__name__ == "FeatureGetterNet":
        return plain.forward_intermediates(
            x, indices=wrapper.out_indices, norm=wrapper.norm, output_fmt="NCHW", intermediates_only=True
        )
    seen = {}
    names = wrapper.feature_info.module_name()
    handles = [
        plain.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o}))
        for name in names
    ]
    plain(x)
    for handle in handles:
        handle.remove()
    return [seen[name] for name in names]


def agree(wrapper, plain, size):
    maps = wrapper(image(size))
    maps = list(maps.values()) if isinstance(maps, dict) else maps
    for ours, theirs in zip(maps, plain_features(plain, wrapper, image(size)), strict=True):
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        if ours.shape != theirs.shape and theirs.dim() == 4:  # wrappers turn NHWC to NCHW
            theirs = theirs.permute(0, 3, 1, 2)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def build(name, kind):
    """Return stock's wrapper of the kind ("own": the family's choice), None where stock cannot make it."""
    kwargs = {**EXAMPLES[name], **({} if kind == "own" else {"feature_cls": kind})}
    try:
        return stock(name, features_only=True, out_indices=(0,), **kwargs)
    except (AssertionError, RuntimeError, TypeError):  # no module of that name among the children, no intermediates
        return None


@pytest.mark.parametrize(
    ("name", "kind"), [*each_with("own", sweep(turn=0, of=5)), *each_with("getter", sweep(turn=1, of=5))]
)
@torch.no_grad()
def test_features_are_the_plain_models(name, kind):
    """At a non-square size, `features_only` of the kind computes what the plain model computes at the same place."""
    plain, wrapper = example(name), build(name, kind)
    if wrapper is None:
        pytest.skip("stock has no such wrapper for this model")
    inner = wrapper._modules.get("model", wrapper._modules.get("body", wrapper))
    weights = {k.replace(".", "_"): v.clone() for k, v in plain.state_dict().items()}
    inner.load_state_dict({k: weights[k.replace(".", "_")] for k in inner.state_dict()})
    size = sizes_for(plain)[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        timm_resize.resize_(plain, size)
        timm_resize.resize_(wrapper, size)
    agree(wrapper, plain, size)


def test_a_wrapper_says_the_reduction_of_its_new_patch():
    """After a change of the patch a wrapper's `feature_info` is that of stock's, built with the patch."""
    kwargs = dict(EXAMPLES["vit_tiny_patch16_224"], features_only=True, out_indices=(0,))
    wrapper = stock("vit_tiny_patch16_224", **kwargs)
    timm_resize.resize_(wrapper, 224, patch_size=8)
    assert wrapper.feature_info.reduction() == [8]
    assert wrapper.feature_info.info == stock("vit_tiny_patch16_224", patch_size=8, **kwargs).feature_info.info
