"""A program: maps the same tensors in several ways and fails unless all give the same bits, in this process.

    python -m tests.helpers.same_bits [model]

With `model` also the tables of a timm model; without, timm is not imported, which would take seconds.
Run under several of MKL's and torch's code paths by tests/promises/test_processors.py.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from timm_resize.resample import (
    Resample,
    offset_table,
    patch_kernel,
    pos_embed,
    pos_embed_map,
    rel_pos_table,
    token_matrix,
    token_reader,
)

OLD, NEW = (7, 7), (9, 6)
MAPS: dict[str, tuple[Resample, tuple[int, ...]]] = {
    "position embedding with a prefix": (pos_embed(OLD, NEW, prefix=2), (1, 51, 193)),
    "position embedding in several pieces": (pos_embed((14, 14), (37, 37), prefix=1), (1, 197, 150)),
    "position map": (pos_embed_map(OLD, NEW, dim=2), (1, 67, 7, 7)),
    "table": (rel_pos_table(OLD, NEW), (169, 3)),
    "table with a suffix": (rel_pos_table(OLD, NEW, suffix=3), (172, 12)),
    "table with axes apart": (rel_pos_table(OLD, NEW, dim=1, flat=False), (5, 13, 13)),
    "offset table": (offset_table(OLD, NEW), (9, 49)),
    "reader": (token_reader(OLD, NEW), (11, 49)),
    "token matrix": (token_matrix(OLD, NEW), (49, 49)),
    "kernel": (patch_kernel(OLD, NEW), (10, 3, 7, 7)),
}


def misplaced(tensor: Tensor, by: int) -> Tensor:
    """Return an equal tensor whose first byte lies `by` elements behind an aligned address."""
    return torch.empty(tensor.numel() + by, dtype=tensor.dtype)[by:].view(tensor.shape).copy_(tensor)


def check_maps() -> None:
    """Among others of its shape, misplaced, strided, and within autograd's graph."""
    for name, (how, shape) in MAPS.items():
        for dtype in (torch.float32, torch.float64):
            tensors = [torch.randn(shape, dtype=dtype) for _ in range(3)]
            alone = [how(tensor) for tensor in tensors]
            for tensor, want in zip(tensors, alone, strict=True):
                ways = {f"{by} elements off": how(misplaced(tensor, by)) for by in (1, 3)}
                ways["strided"] = how(tensor.transpose(0, -1).contiguous().transpose(0, -1))
                ways["in the graph"] = how.differentiable(tensor.clone().requires_grad_()).detach()
                for way, got in ways.items():
                    assert torch.equal(got, want), f"{name}, {dtype}, {way}: {(got - want).abs().max()}"


def check_model() -> None:
    """Tables of one shape in a model, resized together, live and from a state dict of misplaced tensors."""
    import timm

    import timm_resize

    model = timm.create_model("swin_tiny_patch4_window7_224", depths=(2, 2, 2, 2), embed_dim=24, num_classes=1)
    model.double()
    old: dict[str, Tensor] = {k: v.clone() for k, v in model.state_dict().items()}
    tables = [key for key in old if key.endswith("relative_position_bias_table")]
    for key in tables:
        nn.init.normal_(model.get_parameter(key))
        old[key] = model.get_parameter(key).detach().clone()
    timm_resize.resize_(model, 320)
    moved = {key: misplaced(tensor, 1) for key, tensor in old.items()}
    loaded = timm_resize.resize_state_dict(moved, model, source=224)
    how = rel_pos_table((7, 7), (10, 10))
    for key in tables:
        assert torch.equal(model.get_parameter(key), how(old[key])), f"{key}: with the model and alone"
        assert torch.equal(loaded[key], model.get_parameter(key)), f"{key}: from a state dict and live"


if __name__ == "__main__":
    torch.manual_seed(0)
    check_maps()
    if sys.argv[1:] == ["model"]:
        check_model()
    print("same bits", torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())
