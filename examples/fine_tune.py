"""Fine-tune a checkpoint at a larger size, with a learning rate of its own for what the resize changed."""

import timm
import torch
from torch.nn.functional import cross_entropy

import timm_resize


def images(size: int, batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make images of two classes, which differ in their first channel."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(batch) % 2
    x = torch.randn(batch, 3, size, size, generator=generator)
    x[:, 0] += labels.view(-1, 1, 1)
    return x, labels


torch.manual_seed(0)
small = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=2)
torch.save(small.state_dict(), "small.pth")  # stands for the checkpoint that you have

model = timm_resize.create_model(
    "vit_tiny_patch16_224", img_size=96, depth=2, num_classes=2, checkpoint_path="small.pth"
)
print("resampled:", timm_resize.resampled(model))
optimizer = torch.optim.AdamW(timm_resize.param_groups(model, lr=1e-4, resized_lr=1e-3))
model.train()
for step in range(4):
    x, y = images(96, 8, seed=step)
    loss = cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
timm_resize.save_pretrained(model, "fine-tuned-96")
