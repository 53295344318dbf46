"""Serve images of several sizes from one set of weights, each as if the model had been resized to it."""

from concurrent.futures import ThreadPoolExecutor

import timm
import torch

import timm_resize

SIZES = [(224, 224), (160, 224), (224, 160), (128, 128)]

model = timm.create_model("levit_128s", num_classes=10).eval()  # its weights depend on the size of the image
multi = timm_resize.MultiSize(model, max_bytes=1 << 20)


def answer(image: torch.Tensor) -> list[float]:
    """Return the probabilities of one image, of whatever size."""
    size = timm_resize.nearest_sizes(model, tuple(image.shape[-2:]))[0]
    image = torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)
    with torch.no_grad():
        return multi(image).softmax(-1)[0].tolist()


requests = [torch.rand(3, *SIZES[i % len(SIZES)], generator=torch.Generator().manual_seed(i)) for i in range(8)]
with ThreadPoolExecutor(2) as pool:
    answers = list(pool.map(answer, requests))
print(f"{len(answers)} answers, sizes {multi.sizes}, {multi.nbytes / 1024:.0f} KiB beside the model")

resized = timm.create_model("levit_128s", num_classes=10).eval()
resized.load_state_dict(model.state_dict())
timm_resize.resize_(resized, (160, 224))
with torch.no_grad():
    alone = resized(requests[1][None]).softmax(-1)[0]
assert torch.allclose(alone, torch.tensor(answers[1]), atol=1e-5)
