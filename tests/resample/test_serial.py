"""Work in pieces against torch's own operation on the whole."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import timm_resize
from tests.helpers.oracle import redraw_, stock
from timm_resize.resample import serial

SHAPES = [(), (0, 3), (5,), (70_000,), (3, 40_000), (400, 14, 14), (100_000, 2), (1, 577, 96)]


@pytest.fixture(autouse=True, params=[1, 2])
def _threads(request):
    """Each test with one thread, where nothing is cut, and with two."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_copies_are_exact_and_contiguous(shape):
    """Copying and converting keeps every value; what is not contiguous becomes so."""
    tensor = drawn(*shape)
    for source in (tensor, tensor.transpose(0, -1) if tensor.dim() else tensor):
        assert torch.equal(serial.copied(source), source)
        assert serial.copied(source).is_contiguous()
        assert serial.copied(source).data_ptr() != source.data_ptr() or not source.numel()
        assert torch.equal(serial.converted(source, torch.float64), source.to(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 300_000)])
def test_zeros_are_memory_like_any_other(shape, dtype):
    """Zeros, also where they are pages that come when touched; written to, copied and saved like any tensor."""
    zeros = serial.zeros(shape, dtype=dtype, device=torch.device("cpu"))
    assert (zeros.shape, zeros.dtype) == (torch.Size(shape), dtype)
    assert torch.equal(zeros, torch.zeros(shape, dtype=dtype))
    if zeros.numel():
        zeros.view(-1)[-1] = 3
        again = copy.deepcopy(zeros)
        del zeros
        assert again.view(-1)[-1] == 3
        assert again.sum() == 3


@pytest.mark.parametrize("shape", [s for s in SHAPES if s])
def test_pieces_cover_a_tensor_once(shape):
    """Adding one to each piece adds one to each element."""
    tensor = torch.zeros(shape)
    for part in serial.cut(tensor):
        part += 1
    assert torch.equal(tensor, torch.ones(shape))


def test_equality_sees_the_last_element():
    """A difference in any piece counts, NaN is unlike itself, and shapes that differ are unequal."""
    tensor = drawn(70_001)
    other = tensor.clone()
    assert serial.equal(tensor, other)
    other[-1] += 1
    assert not serial.equal(tensor, other)
    assert not serial.equal(torch.full((3,), float("nan")), torch.full((3,), float("nan")))
    assert not serial.equal(tensor, tensor[:-1])
    assert not serial.equal(tensor, tensor.reshape(-1, 1))


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_joined_as_by_cat(dim):
    """Parts of unequal length along either dimension, one of them empty."""
    parts = [drawn(*shape) for shape in ((0, 300), (1, 300), (200, 300))]
    parts = parts if dim == 0 else [p.T for p in parts]
    assert torch.equal(serial.joined(parts, dim), torch.cat(parts, dim))


@pytest.mark.parametrize("before", [1, 3, 400])
@pytest.mark.parametrize("after", [1, 12, 768])
@pytest.mark.parametrize(("old", "new"), [(14, 24), (24, 14), (197, 577)])
def test_the_middle_axis_is_mapped_as_by_matmul(before, after, old, new):
    """The product is torch's in float64, to the rounding of sums of 200 terms."""
    before = min(before, 20_000 // after)
    matrix, tensor = drawn(new, old, dtype=torch.float64), drawn(before, old, after, dtype=torch.float64)
    got = serial.middle_product(matrix, tensor)
    assert got.is_contiguous()
    torch.testing.assert_close(got, matrix @ tensor, rtol=1e-13, atol=1e-12)


def test_sums_are_broadcast_along_the_first_dimension():
    """Large and small sums are those of `+`."""
    for rows in (3, 500):
        a, b = torch.arange(rows)[:, None, None], torch.arange(200).reshape(1, 10, 20)
        assert torch.equal(serial.added(a, b), a + b)


def test_equal_buffers_share_memory_only_where_no_state_dict_holds_them():
    """Blocks of one geometry share an index after a resize, as separate tensors; what is saved is never shared."""
    beit = redraw_(stock("beit_base_patch16_224", depth=2, embed_dim=48, num_heads=3))
    timm_resize.resize_(beit, 96)
    one, two = (block.attn.relative_position_index for block in beit.blocks)
    assert one is not two
    assert one.data_ptr() == two.data_ptr()
    assert len([n for n, _ in beit.named_buffers() if n.endswith("relative_position_index")]) == 2
    levit = timm.create_model("levit_128s")
    timm_resize.resize_(levit, 256)
    saved = [t for t in levit.state_dict().values() if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in saved}) == len(saved)
