"""Bad input: each with its error text, and nothing changed by it."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import image, stock, tensors


@pytest.fixture(scope="module")
def model():
    """A small ViT, 224 px."""
    return stock("vit_tiny_patch16_224", depth=1, num_classes=2)


HELP = "Use img_size=224 for a square, or img_size=(192, 256) for height and width."


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "VisionTransformer: img_size=0 has a side below 1. " + HELP),
        (-224, "VisionTransformer: img_size=-224 has a side below 1. " + HELP),
        ((224, -1), "VisionTransformer: img_size=(224, -1) has a side below 1. " + HELP),
        (True, "VisionTransformer: img_size=True is a bool, not whole pixels. " + HELP),
        (224.0, "VisionTransformer: img_size=224.0 is a float, not whole pixels. " + HELP),
        (float("nan"), "VisionTransformer: img_size=nan is a float, not whole pixels. " + HELP),
        (10**30, f"VisionTransformer: img_size={10**30} has a side above 1000000. " + HELP),
        ("224", "VisionTransformer: img_size='224' is a str, not whole pixels. " + HELP),
        ((224,), "VisionTransformer: img_size=(224,) has 1 numbers, not (height, width). " + HELP),
        ((3, 224, 224), "VisionTransformer: img_size=(3, 224, 224) has 3 numbers, not (height, width). " + HELP),
        (8, "VisionTransformer: img_size=(8, 8) is smaller than patch_size=16. Use 16."),
        ((8, 224), "VisionTransformer: img_size=(8, 224) is smaller than patch_size=16. Use (16, 224)."),
    ],
)
def test_sizes_that_are_none(model, size, text):
    """Each wrong size raises InvalidSizeError with its text, through every entry, and changes nothing."""
    before = {n: (t, t.clone()) for n, t in tensors(model).items()}
    python = copy.deepcopy({k: v for k, v in model.__dict__.items() if k in ("_traits", "_model_args")})
    for call in (lambda: timm_resize.plan_resize(model, size), lambda: timm_resize.resize_(model, size)):
        with pytest.raises(timm_resize.InvalidSizeError, match=f"^{re.escape(text)}$"):
            call()
    with timm_resize.install(), pytest.raises(timm_resize.InvalidSizeError, match=f"^{re.escape(text)}$"):
        model.set_input_size(size)
    for n, t in tensors(model).items():
        assert t is before[n][0]
        assert torch.equal(t, before[n][1])
    assert python == {k: v for k, v in model.__dict__.items() if k in ("_traits", "_model_args")}


@pytest.mark.parametrize("size", [0, True, 224.0, "224", (224,), (3, 224, 224)])
def test_create_model_checks_the_size_before_it_builds(size):
    """A wrong size in create_model names the model as it was asked for."""
    with pytest.raises(timm_resize.InvalidSizeError, match="^vit_tiny_patch16_224: img_size="):
        timm_resize.create_model("vit_tiny_patch16_224", img_size=size)


@pytest.mark.parametrize("size", [np.int64(64), torch.tensor(64), [64, 64], torch.Size([64, 64]), np.array([64, 64])])
def test_integers_of_numpy_and_torch_are_sizes(model, size):
    """Anything that is one whole number or two is taken."""
    assert timm_resize.plan_resize(model, size).new_size == (64, 64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"interpolation": "bicubik"}, "VisionTransformer: interpolation='bicubik' is not known. Use bicubic."),
        ({"window_policy": "grow"}, "VisionTransformer: window_policy='grow' is not known. Use timm, keep, scale."),
        ({"preset": "diet"}, "VisionTransformer: preset='diet' is not known. Use deit."),
        (
            {"window_size": 7},
            "VisionTransformer: window_size=7 is not an option of this model. Use img_size, patch_size.",
        ),
        (
            {"patch_size": 0},
            "VisionTransformer: patch_size=0 has a side below 1. "
            "Use patch_size=224 for a square, or patch_size=(192, 256) for height and width.",
        ),
    ],
)
def test_options_that_are_not_known(model, options, text):
    """Unknown policies, presets, interpolations and options name the nearest valid ones."""
    with pytest.raises(timm_resize.ResizeError, match=f"^{re.escape(text)}$"):
        timm_resize.plan_resize(model, 64, **options)


def test_a_size_that_drops_pixels_works_with_one_warning(model):
    """250 px at patch 16: 15x15 patches as in stock, and one warning that counts the pixels."""
    duplicate = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        timm_resize.resize_(duplicate, (250, 224))
    assert [str(w.message) for w in caught] == [
        "VisionTransformer: img_size=(250, 224) drops 10 rows and 0 columns of pixels at the bottom and right: "
        "patch_size=16."
    ]
    assert duplicate(image((250, 224))).shape == (1, 2)


def test_a_scripted_model_is_refused(model):
    """A ScriptModule says to resize the eager model."""
    with pytest.raises(timm_resize.UnsupportedModelError, match="Resize the eager model and script that"):
        timm_resize.resize_(torch.jit.script(copy.deepcopy(model)), 64)


def test_a_ddp_model_is_refused(model, tmp_path):
    """DistributedDataParallel names the call that unwraps, resizes and wraps again."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        with pytest.raises(timm_resize.UnsupportedModelError, match=r"Call timm_resize.resize_ddp on every rank"):
            timm_resize.resize_(wrapped, 64)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_refused(model):
    """A dynamically quantised layer is named, with the order of steps."""
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(timm_resize.UnsupportedModelError, match="is quantised .*Resize the float model, then quantise"):
        timm_resize.resize_(quantised, 64)


def test_something_that_is_no_model_is_refused():
    """A string, or a net that nobody registered, is an UnsupportedModelError."""
    with pytest.raises(timm_resize.UnsupportedModelError, match="^str: not a torch.nn.Module"):
        timm_resize.plan_resize("vit_tiny_patch16_224", 64)
    with pytest.raises(timm_resize.UnsupportedModelError, match="^Sequential: no handler"):
        timm_resize.plan_resize(nn.Sequential(nn.Linear(2, 2)), 64)


def test_two_models_in_one_module_are_listed(model):
    """A module that holds two models names both."""
    pair = nn.ModuleDict({"student": copy.deepcopy(model), "teacher": copy.deepcopy(model)})
    with pytest.raises(timm_resize.UnsupportedModelError, match=r"student \(VisionTransformer\), teacher \(Vision"):
        timm_resize.resize_(pair, 64)
    timm_resize.resize_(nn.Sequential(pair["student"]), 64)
    assert pair["student"].patch_embed.img_size == (64, 64)


def test_a_stale_plan_is_refused(model):
    """A plan made before another resize names the tensor and both shapes."""
    duplicate = copy.deepcopy(model)
    plan = timm_resize.plan_resize(duplicate, 64)
    timm_resize.resize_(duplicate, 96)
    with pytest.raises(timm_resize.StalePlanError, match=r"patch_embed.img_size is \(96, 96\), the plan was made for"):
        timm_resize.resize_(duplicate, plan)


def test_a_changed_layer_is_named(model):
    """A position embedding of another length than the grid says is named, not guessed at."""
    duplicate = copy.deepcopy(model)
    duplicate.pos_embed = nn.Parameter(torch.zeros(1, 100, 192))
    with pytest.raises(
        timm_resize.UnsupportedModelError, match=r"pos_embed does not have its type's shape: .* 99 grid"
    ):
        timm_resize.plan_resize(duplicate, 64)


def test_a_million_pixels_a_side_is_a_plan_not_an_allocation(model):
    """10^6 px gives a plan with the shape it would need; nothing is allocated."""
    plan = timm_resize.plan_resize(model, 1_000_000)
    assert next(c.new for c in plan if c.name == "pos_embed") == (1, 1 + 62500 * 62500, 192)


def test_a_traced_feature_graph_is_refused():
    """A feature extractor traced by torch.fx has its token counts compiled in; the error names the other kinds."""
    graph = stock("levit_128s", features_only=True, feature_cls="fx", out_indices=(0,))
    with pytest.raises(timm_resize.UnsupportedModelError, match="is a traced graph .* feature_cls='getter' or 'list'"):
        timm_resize.resize_(graph, 64)


@pytest.mark.parametrize(
    ("size", "options", "fields"),
    [
        (8, {}, ("img_size", (8, 8), ((16, 16),))),
        ((8, 224), {}, ("img_size", (8, 224), ((16, 224),))),
        (0, {}, ("img_size", 0, ())),
        (None, {"patch_size": 1.5}, ("patch_size", 1.5, ())),
        (64, {"interpolation": "bicubik"}, ("interpolation", "bicubik", ("bicubic",))),
        (64, {"preset": "xyz"}, ("preset", "xyz", ("timm", "deit", "big_vision"))),
    ],
)
def test_errors_have_fields(model, size, options, fields):
    """Model, argument, value and what works are there for a program too, and survive a copy and a pickle."""
    with pytest.raises(timm_resize.ResizeError) as caught:
        timm_resize.plan_resize(model, size, **options)
    error = caught.value
    for one in (error, copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (type(one), str(one)) == (type(error), str(error))
        assert (one.model, one.argument, one.value, one.nearest) == ("VisionTransformer", *fields)


def test_errors_without_fields():
    """A plain message does, also for the kind that is a RuntimeError too."""
    error = pickle.loads(pickle.dumps(timm_resize.CheckpointError("Net: no.")))
    assert isinstance(error, RuntimeError)
    assert (str(error), error.model, error.argument, error.value, error.nearest) == ("Net: no.", "", "", None, ())


def test_patches_that_overlap_are_refused():
    """A projection whose stride is not its patch makes other counts of tokens than its grid says: no plan is made."""
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.patch_embed.proj = torch.nn.Conv2d(3, 192, 16, stride=10)
    with pytest.raises(
        timm_resize.UnsupportedModelError, match=r"patch_embed.proj has stride=\(10, 10\), its patches are"
    ):
        timm_resize.plan_resize(model, (128, 256))
    assert model.patch_embed.img_size == (224, 224)
