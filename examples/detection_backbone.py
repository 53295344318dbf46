"""A backbone with position embeddings in a detector, at a size that is not square."""

import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

import timm_resize

SIZE = (160, 224)  # height, width: multiples of the patch


class Backbone(nn.Module):
    """The last map of a ViT, as a detector wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("vit_tiny_patch16_224", depth=2, features_only=True, out_indices=(1,))
        self.out_channels = self.body.feature_info.channels()[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the map (batch, channels, h, w)."""
        return self.body(x)[-1]


torch.manual_seed(0)
anchors = AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),))
# the detector resizes its images itself: fixed_size is (width, height)
detector = RetinaNet(Backbone(), num_classes=2, anchor_generator=anchors, fixed_size=(SIZE[1], SIZE[0]))
print(timm_resize.plan_resize(detector, SIZE))
optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3, momentum=0.9)
timm_resize.resize_(detector, SIZE, optimizer=optimizer)

images = [torch.rand(3, 300, 420), torch.rand(3, 200, 280)]
targets = [{"boxes": torch.tensor([[20.0, 30.0, 120.0, 140.0]]), "labels": torch.tensor([1])} for _ in images]
detector.train()
losses = detector(images, targets)
sum(losses.values()).backward()
optimizer.step()
print({name: round(loss.item(), 3) for name, loss in losses.items()})

detector.eval()
with torch.no_grad():
    found = detector(images)
print("boxes:", [len(one["boxes"]) for one in found])
