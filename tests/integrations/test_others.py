"""Programs that need nothing of ours but `resize_`: what they keep beside a model goes on working."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import timm_resize
from tests.helpers.oracle import image, stock

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(size=64):
    """A small ViT, the same each time."""
    torch.manual_seed(0)
    return stock("vit_tiny_patch16_224", img_size=size, depth=1, embed_dim=48, num_heads=3, num_classes=2)


def step(model, optimizer, size, backward=lambda loss: loss.backward()):
    """One step on seeded noise."""
    backward(nn.functional.cross_entropy(model(image(size, batch=2)), torch.tensor([0, 1])))
    optimizer.step()
    optimizer.zero_grad()


def test_accelerate(tmp_path):
    """A prepared model and optimizer are resized in place; accelerate's own lists hold them, and save and load them."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, plain = tiny(), tiny()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    alone = torch.optim.AdamW(plain.parameters())
    for size in ((64, 64), (96, 64)):
        timm_resize.resize_(model, size, optimizer=optimizer)
        timm_resize.resize_(plain, size, optimizer=alone)
        step(model, optimizer, size, accelerator.backward)
        step(plain, alone, size)
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in model.state_dict().items())
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        model.pos_embed.zero_()
    accelerator.load_state(tmp_path)
    assert torch.equal(model.pos_embed, plain.pos_embed)
    assert accelerator._models == [model]


def test_fastai():
    """Progressive resizing: `resize_(learn.model, S)` and `learn.dls = loaders(S)` between two fits."""
    fastai = pytest.importorskip("fastai.vision.all", reason="fastai is not installed")

    def loaders(size):
        data = [(image((size, size), seed=i)[0], torch.tensor(i % 2)) for i in range(4)]
        return fastai.DataLoaders(*(fastai.DataLoader(data, bs=2) for _ in range(2)))

    learn = fastai.Learner(loaders(64), tiny(), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        moment = learn.opt.state[learn.model.pos_embed]["sqr_avg"]
        timm_resize.resize_(learn.model, 96, optimizer=learn.opt)
        assert moment.shape == (1, 17, 48)
        assert learn.opt.state[learn.model.pos_embed]["sqr_avg"].shape == (1, 37, 48)
        learn.dls = loaders(96)
        learn.fit(1, 1e-3, reset_opt=False)
    assert learn.model.pos_embed.shape == (1, 37, 48)


@pytest.mark.parametrize(
    ("network", "name", "options"),
    [("Unet", "tu-swin_tiny_patch4_window7_224", {"depths": (1, 1, 2, 1)}), ("DPT", "tu-vit_tiny_patch16_224", {})],
)
@torch.no_grad()
def test_segmentation_models_save_and_open(network, name, options, tmp_path):
    """smp's own save_pretrained and from_pretrained, of a resized network: the same masks."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    net = getattr(smp, network)(name, encoder_weights=None, classes=2, **options).eval()
    timm_resize.resize_(net, (128, 192))
    net.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path).eval()
    assert torch.equal(again(image((128, 192))), net(image((128, 192))))


@torch.no_grad()
def test_peft_saves_and_opens(tmp_path):
    """Adapters over tokens, resized: saved, put on a base of the size, and merged, they compute the same."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    base = stock("mixer_s32_224", num_classes=2)
    later = copy.deepcopy(base)
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["fc1", "fc2"], init_lora_weights=False)).eval()
    timm_resize.resize_(model, 192)
    timm_resize.resize_(later, 192)
    model.save_pretrained(tmp_path / "adapters")
    again = peft.PeftModel.from_pretrained(later, tmp_path / "adapters").eval()
    want = model(image((192, 192)))
    torch.testing.assert_close(again(image((192, 192))), want, atol=1e-5, rtol=1e-4)
    timm_resize.save_pretrained(model.merge_and_unload(), tmp_path / "merged")
    opened = timm_resize.create_model(f"local-dir:{tmp_path / 'merged'}", pretrained=True).eval()
    torch.testing.assert_close(opened(image((192, 192))), want, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_torchvision_detection():
    """A backbone in a detector of torchvision's, at a wide size; the transform's size is the caller's to set."""
    detection = pytest.importorskip("torchvision.models.detection", reason="torchvision is not installed")
    anchors = pytest.importorskip("torchvision.models.detection.anchor_utils")

    class Body(nn.Module):
        out_channels = 256

        def __init__(self):
            super().__init__()
            self.body = timm.create_model("levit_128s", features_only=True, out_indices=(1,))

        def forward(self, x):
            return self.body(x)[0]

    grid = anchors.AnchorGenerator(((32,),), ((1.0,),))
    net = detection.RetinaNet(Body(), num_classes=2, anchor_generator=grid, fixed_size=(256, 192)).eval()
    timm_resize.resize_(net, (192, 256))  # fixed_size is (width, height)
    seen = []
    net.backbone.body.register_forward_hook(lambda module, args, out: seen.append((args[0].shape[-2:], out[0].shape)))
    assert len(net([torch.rand(3, 300, 500)])[0]["boxes"]) >= 0
    assert seen == [((192, 256), (1, 256, 6, 8))]
    net.transform.fixed_size = (224, 224)
    with pytest.raises(timm_resize.InvalidSizeError, match=r"\(192, 256\) is set, and the input is 224x224"):
        net([torch.rand(3, 300, 500)])
