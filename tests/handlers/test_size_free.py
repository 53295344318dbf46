"""Models in which nothing depends on the size: they take it, record it, refuse what forward cannot do."""

from __future__ import annotations

import pytest
import timm
import torch

import timm_resize
from tests.helpers.examples import mostly_slow
from tests.helpers.oracle import image, stock, tensors

SMALL = [
    "resnet18",
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv3_small_050",
    "regnetx_002",
    "mambaout_femto",
    "repvit_m1",
    "starnet_s050",
    "regnetz_005",
    "xcit_nano_12_p8_224",
]
RULES = [
    # model, a size that forward cannot take, one just beside it that it can
    ("csatv2", 100, 104),
    ("tresnet_m", 33, 36),
    ("dla46x_c", 65, 64),
    ("hrnet_w18_small", 65, 64),
    ("sam2_hiera_tiny", 65, 64),
    ("resnetaa50d", 47, 66),
    ("resnetblur18", 16, 17),
    ("inception_v3", 74, 75),
    ("fasternet_t0", 31, 32),
    ("ghostnetv2_100", 32, 33),
    ("pvt_v2_b0", 28, 29),
    ("twins_svt_small", 31, 32),
    ("sequencer2d_s", 13, 14),
    ("convmixer_1536_20", 6, 7),
    ("resnet50_clip_gap", 230, 224),
    ("naflexvit_base_patch16_gap", 230, 224),
    ("qwen3_vit_88m", 230, 224),
]
SHALLOW = {
    "fasternet_t0": {"depths": (1, 1, 1, 1)},
    "naflexvit_base_patch16_gap": {"depth": 1},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "qwen3_vit_88m": {"depth": 1},
    "resnetaa50d": {"layers": (1, 1, 1, 1)},
    "sequencer2d_s": {"layers": [1, 1, 1, 1]},
    "tresnet_m": {"layers": [1, 1, 1, 1]},
    "twins_svt_small": {"depths": [1, 1, 1, 1]},
}
"""Options that leave a model one layer a stage, with the rule of the whole one."""

SEARCHED = {"ghostnetv2_100", "sequencer2d_s", "twins_svt_small"}
"""Models that are run at tens of sizes until one is found, which takes seconds; PVT and ConvMixer are by default."""


def runs(model, size):
    """Whether the forward of a meta model takes a size, with no empty map on the way."""
    empty = []
    hooks = [
        m.register_forward_hook(lambda m, _, o: empty.append(1) if getattr(o, "numel", lambda: 1)() == 0 else None)
        for m in model.modules()
    ]
    try:
        with torch.no_grad():
            model(torch.empty(1, 3, *size, device="meta"))
        return not empty
    except Exception:
        return False
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name", mostly_slow(SMALL, *SMALL[1:6:2]))
def test_a_size_changes_no_tensor_and_stocks_export_reloads(name, tmp_path):
    """Same seed, same bits as stock without a size; stock's own export of it opens in stock, bit for bit."""
    torch.manual_seed(0)
    ours = timm_resize.create_model(name, img_size=(96, 128), num_classes=3).eval()
    torch.manual_seed(0)
    theirs = stock(name, num_classes=3)
    assert timm_resize.plan_resize(ours).new_size == (96, 128)
    assert all(torch.equal(t, tensors(theirs)[n]) for n, t in tensors(ours).items())
    timm.models.save_for_hf(ours, str(tmp_path), safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert all(torch.equal(t, tensors(ours)[n]) for n, t in tensors(again).items())
    with torch.inference_mode():
        assert torch.equal(again(image((96, 128))), ours(image((96, 128))))


@pytest.mark.parametrize(
    ("name", "bad", "good"), [pytest.param(*r, marks=[pytest.mark.slow] * (r[0] in SEARCHED)) for r in RULES]
)
def test_sizes_that_forward_cannot_take_are_refused_with_ones_that_it_can(name, bad, good):
    """Forward fails at the one size and runs at the other; the error names sizes at which it runs."""
    model = stock(name, device="meta", **SHALLOW.get(name, {}))
    assert not runs(model, (bad, bad))
    assert runs(model, (good, good))
    timm_resize.plan_resize(model, good)
    with pytest.raises(timm_resize.InvalidSizeError, match=r"Use \d+") as refusal:
        timm_resize.plan_resize(model, bad)
    named = [int(n) for n in str(refusal.value).rsplit("Use ", 1)[1].rstrip(".").split(" or ")]
    assert named
    assert all(runs(model, (n, n)) for n in named)


@pytest.mark.parametrize("kind", ["list", "dict", "hook", "getter"])
def test_feature_wrappers_take_and_record_a_size(kind):
    """Every wrapper of a size-free model is built at a size, has `set_input_size`, and records what it is set to."""
    name = "resnet18" if kind != "getter" else "mambaout_femto"
    with timm_resize.install():
        model = timm.create_model(name, img_size=96, features_only=True, feature_cls=kind, out_indices=(0, 1))
        assert timm_resize.plan_resize(model).new_size == (96, 96)
        model.set_input_size((64, 128))
        assert timm_resize.plan_resize(model).new_size == (64, 128)
