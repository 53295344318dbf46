"""Train small, finish large: a size per epoch, and with it the optimizer, the running average and the batch size."""

import timm
import torch
from timm.data import create_transform
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image

import timm_resize


class Images(Dataset):
    """Sixteen images of noise in two classes, cut to the present size by timm's augmentation."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.rand(3, 160, 160, generator=torch.Generator().manual_seed(index)) * 0.7
        pixels[index % 2] += 0.3
        return self.transform(to_pil_image(pixels)), index % 2


torch.manual_seed(0)
data = Images()
model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=2)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ema = ModelEmaV3(model, decay=0.9)
loader = None


def on_size(size: tuple[int, int], batch_size: int | None) -> None:
    """Make images of the new size, as many pixels a batch as before."""
    global loader
    data.transform = create_transform((3, *size), is_training=True)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True)
    print(f"images of {size}, {batch_size} a batch")


progress = timm_resize.ProgressiveResize(
    model,
    timm_resize.SizeSchedule.linear(64, 128, epochs=3),
    optimizer=optimizer,
    ema=ema,
    on_size=on_size,
    batch_size=4,
)
for epoch in range(3):
    progress.start_epoch(epoch)
    for x, y in loader:
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
    print(f"epoch {epoch}: loss {loss.item():.3f}")
