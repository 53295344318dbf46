"""The resamplings against closed forms, and what holds for every one of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table_levit

from tests.helpers.resampling import KERNELS, close, draw, ramp
from timm_resize.resample import (
    Adjoint,
    AxisMap,
    Geometric,
    Interpolate,
    MirroredOffset,
    PatchKernel,
    Resample,
    offset_table,
    patch_kernel,
    pos_embed,
    pos_embed_map,
    rel_pos_table,
    token_matrix,
    token_reader,
    token_writer,
)

MAPS = [
    pos_embed((7, 7), (9, 6), prefix=2),
    pos_embed_map((7, 7), (9, 6), dim=1),
    pos_embed_map((7, 7), (9, 6), dim=2),
    rel_pos_table((7, 7), (9, 6), suffix=3),
    rel_pos_table((7, 7), (9, 6), mode="bicubic"),
    rel_pos_table((7, 7), (9, 6), dim=1, flat=False),
    Resample((Interpolate(13, 17, "bilinear", False, True),)),
    offset_table((7, 7), (9, 6)),
    token_reader((7, 7), (9, 6)),
    token_writer((7, 7), (9, 6)),
    token_matrix((7, 7), (9, 6)),
    patch_kernel((7, 7), (9, 6)),
]
SHAPES = [
    (1, 51, 3),
    (1, 7, 7, 3),
    (1, 3, 7, 7),
    (172, 3),
    (169, 3),
    (3, 13, 13),
    (13, 3),
    (3, 49),
    (3, 49),
    (49, 3),
    (49, 49),
    (3, 3, 7, 7),
]
NEW_SHAPES = [
    (1, 56, 3),
    (1, 9, 6, 3),
    (1, 3, 9, 6),
    (190, 3),
    (187, 3),
    (3, 17, 11),
    (17, 3),
    (3, 54),
    (3, 54),
    (54, 3),
    (54, 54),
    (3, 3, 9, 6),
]
NAMES = [
    "pos_embed",
    "nhwc",
    "nchw",
    "table",
    "table_bicubic",
    "table_tf",
    "axis",
    "offset",
    "reader",
    "writer",
    "matrix",
    "patch",
]
EACH = pytest.mark.parametrize(("how", "old", "new"), list(zip(MAPS, SHAPES, NEW_SHAPES, strict=True)), ids=NAMES)


# -- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "ratio"),
    [
        (14, 24, 1.090307),
        (7, 8, 1.061402),
        (7, 10, 1.160993),
        (7, 12, 1.240724),
        (7, 14, 1.307619),
        (14, 16, 1.023493),
        (14, 32, 1.134918),
    ],
)
def test_geometric_ratio(old, new, ratio):
    """The spacing ratio of BEiT's fine-tuning code; 1.090307 is the constant in its source for 14→24."""
    positions = Geometric(2 * old - 1, 2 * new - 1).positions()
    assert positions[old - 1] == 0.0
    assert positions[old] == pytest.approx(1.0)
    assert positions[old + 1] - 1.0 == pytest.approx(ratio, abs=2e-6)


def test_geometric_centre_row():
    """A ramp over offsets, 7→12: the published centre row, odd about offset 0."""
    table = ramp(13).sub(6).repeat(13, 1).reshape(169, 1)  # (2*7-1)² offsets, value = dx
    row = rel_pos_table((7, 7), (12, 12))(table).reshape(23, 23)[11]
    want = [0, 1, 1.806, 2.493, 3.115, 3.639, 4.131, 4.553, 4.975, 5.320, 5.660, 6]
    close(row[11:], want, 6e-4)
    close(row[:12].flip(0), [-v for v in want], 6e-4)


def test_geometric_defects_of_stock():
    """What stock does and we reproduce: an unchanged axis is distorted, the ratio clamps, shrinking crops."""
    unchanged = rel_pos_table((14, 14), (18, 14))(ramp(27).sub(13).repeat(27, 1).reshape(729, 1))
    close(unchanged.reshape(35, 27)[17, 13:][[0, 1, 2, 13]], [0, 1, 1.99, 12.28], 5e-3)
    assert Geometric(13, 55).positions()[-1] == pytest.approx(20.78, abs=5e-3)
    clamped = Geometric(13, 55).matrix() @ ramp(13)
    assert torch.equal(clamped[48:], torch.full((7,), 12.0, dtype=torch.float64))  # past 20.78 the last value holds
    assert (Geometric(23, 13).matrix() @ ramp(23).sub(11))[-1] == pytest.approx(5.86, abs=5e-3)


@pytest.mark.parametrize(("old", "new", "lost"), [(7, 9, 0.23), (14, 24, 0.43)])
def test_geometric_there_and_back_loses(old, new, lost):
    """7→9→7 loses about 23 % of a smooth table, 14→24→14 about 42 %: so chains start from the original."""
    bump = torch.exp(-((2 * ramp(2 * old - 1).sub(old - 1) / old) ** 2))
    table = torch.outer(bump, bump).reshape(-1, 1)
    back = rel_pos_table((new, new), (old, old))(rel_pos_table((old, old), (new, new))(table))
    assert ((back - table).norm() / table.norm()).item() == pytest.approx(lost, abs=0.02)


@pytest.mark.parametrize(
    ("antialias", "want"),
    [(True, [0.86719, 0.22656, -0.07031, -0.02344]), (False, [0.87891, 0.26172, -0.10547, -0.03516])],
)
def test_cubic_kernels(antialias, want):
    """2× impulse: a = -0.5 with antialias, a = -0.75 without, also when growing."""
    column = Interpolate(12, 24, "bicubic", antialias).matrix()[:, 6]
    close(column[[13, 14, 15, 16]], want)
    close(column[[12, 11, 10, 9]], want)


@pytest.mark.parametrize(
    ("axis", "want"),
    [
        (Interpolate(14, 28, "bicubic", True), [-0.088, 0.168, 0.71, 1.25, 1.75]),
        (Interpolate(14, 28, "bicubic", False), [-0.105, 0.191, 0.668, 1.297, 1.703]),
        (Interpolate(14, 28, "bicubic", False, True), [0, 0.389, 0.945, 1.458, 1.897]),
        (Interpolate(14, 28, "bilinear", True), [0, 0.25, 0.75, 1.25, 1.75]),
        (Interpolate(14, 28, "nearest", True), [0, 0, 1, 1, 2]),
    ],
    ids=["antialias", "plain", "corners", "bilinear", "nearest"],
)
def test_ramp_rows(axis, want):
    """The first five of a ramp 14→28."""
    close((axis.matrix() @ ramp(14))[:5], want, 6e-4)


def test_half_pixel_moves_offset_zero():
    """Stock's LeViT resize reads a ramp as -.088 at offset 0, an impulse there as 1.18, |dy| 7→4 as .40; not ours."""
    impulse = torch.zeros(196, 1)
    impulse[0] = 1.0
    stock = resize_rel_pos_bias_table_levit
    rows = ramp(14)[:, None].repeat(1, 14).reshape(196, 1).float()
    short = ramp(7)[:, None].repeat(1, 7).reshape(49, 1).float()
    close(stock(rows, (784, 1))[0], [-0.088], 1e-3)
    close(stock(impulse, (784, 1))[0], [1.184], 1e-3)
    close(stock(short, (16, 1))[0], [0.40], 5e-3)
    ours = offset_table((14, 14), (28, 28), dim=0)
    assert ours(rows)[0].item() == 0.0
    assert ours(impulse)[0].item() == 1.0
    assert offset_table((7, 7), (4, 4), dim=0)(short)[0].item() == 0.0


@pytest.mark.parametrize(("mode", "want"), [("bicubic", 0.825), ("bilinear", 0.683)])
def test_white_noise_norm(mode, want):
    """14→24: token norms of white noise shrink to .825 (bicubic) and .683 (bilinear)."""
    noise = draw(1, 196, 1024)
    out = pos_embed((14, 14), (24, 24), mode=mode)(noise)
    assert (out.norm(dim=-1).mean() / noise.norm(dim=-1).mean()).item() == pytest.approx(want, abs=0.003)


# -- offset tables ---------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(7, 4), (4, 7), (14, 16), (14, 12), (14, 24), (24, 14), (2, 9), (9, 2)])
@pytest.mark.parametrize(("mode", "antialias"), KERNELS)
def test_offset_table_pins_both_ends(old, new, mode, antialias):
    """Offset 0 and the last offset keep their bits on each axis; a constant table stays constant."""
    table = draw(3, old * old)
    out = offset_table((old, old), (new, new), mode=mode, antialias=antialias)(table).reshape(3, new, new)
    corners = [0, -1]
    for y, x in itertools.product(corners, corners):
        assert torch.equal(out[:, y, x], table.reshape(3, old, old)[:, y, x])
    flat = offset_table((old, old), (new, new), mode=mode, antialias=antialias)(torch.ones(1, old * old))
    close(flat, torch.ones(1, new * new), 1e-6)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 14), (14, 16), (14, 24), (7, 4), (16, 14)])
def test_offset_table_without_antialias_is_torch_over_the_mirrored_table(old, new):
    """Plain modes equal F.interpolate(align_corners=True) of the even (2n-1)² table, quadrant kept."""
    table = draw(1, 2, old, old, dtype=torch.float64)
    even = torch.cat([table.flip(-1)[..., :-1], table], -1)
    even = torch.cat([even.flip(-2)[..., :-1, :], even], -2)
    for mode in ("bicubic", "bilinear"):
        full = F.interpolate(even, size=(2 * new - 1, 2 * new - 1), mode=mode, align_corners=True)
        ours = offset_table((old, old), (new, new), mode=mode, antialias=False)(table.reshape(2, -1))
        close(ours, full[0, :, new - 1 :, new - 1 :].reshape(2, -1), 1e-10)


def test_offset_table_antialias_in_closed_form():
    """7→5 (spacing 1.5), offset 1 of a linear kernel: weights 1/3 at 1 and 2, 1/9 … normalised over the mirror."""
    row = MirroredOffset(7, 5, "bilinear", True).matrix()[1]
    triangle = (1 - (ramp(13).sub(6) - 1.5).abs() / 1.5).clamp(min=0)
    triangle /= triangle.sum()
    want = triangle[6:].clone()
    want[1:] += triangle[:6].flip(0)
    close(row, want, 1e-12)


# -- any map --------------------------------------------------------------------------------


@EACH
def test_shapes_and_contiguity(how, old, new):
    """The result has the promised shape, is contiguous, and shares nothing, whatever the strides of the input."""
    table = draw(*old)
    out = how(table)
    assert how.shape(old) == tuple(out.shape) == new
    assert out.is_contiguous()
    strided = table.transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.equal(how(strided), out)
    assert not how(table.clone().requires_grad_()).requires_grad


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(how, old, new, dtype):
    """Half precision is computed in full and rounded once; the dtype stays."""
    table = draw(*old).to(dtype)
    out = how(table)
    assert out.dtype == dtype
    assert torch.equal(out, how(table.double()).to(dtype))


@EACH
@pytest.mark.parametrize("width", [1, 9, 600])
def test_bits_do_not_depend_on_where_a_tensor_lies(how, old, new, width):
    """Any strides, any place in memory, within autograd's graph or not: the same bits in every dtype, in new memory."""
    shape = list(old)
    if 3 in old:  # a side that the map leaves as it is
        shape[old.index(3)] = width
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        table = draw(*shape).to(dtype)
        want = how(table)
        shifted = torch.empty(table.numel() + 1, dtype=dtype)[1:].view(shape).copy_(table)
        strided = table.transpose(0, -1).contiguous().transpose(0, -1)
        leaf = table.clone().requires_grad_()
        for other in (how(shifted), how(strided), how.differentiable(leaf)):
            assert torch.equal(other, want)
            assert other.is_contiguous()
            assert other.untyped_storage().nbytes() == other.numel() * other.itemsize
        assert how.differentiable(leaf).requires_grad


@EACH
def test_gradients_go_through_the_map(how, old, new):
    """The gradient of <map(x), y> is the same for every x, and its product with x is <map(x), y>."""
    table, other = draw(*old, dtype=torch.float64).requires_grad_(), draw(*new, seed=1, dtype=torch.float64)
    value = (how.differentiable(table) * other).sum()
    (gradient,) = torch.autograd.grad(value, table)
    close((gradient * table).sum(), value, 1e-9)


@pytest.mark.parametrize("width", [1, 4, 70, 600])
@pytest.mark.parametrize("sides", [((7, 7), (9, 6)), ((14, 14), (37, 37)), ((40, 50), (20, 60))])
def test_wide_maps_by_their_definition(sides, width):
    """Each new cell is the sum over old cells of both axes' weights, for any width and size."""
    old, new = sides
    how = pos_embed(old, new, prefix=2)
    table = draw(1, 2 + old[0] * old[1], width)
    rows, columns = (axis.matrix() for axis in how.axes)
    cells = table[0, 2:].double().unflatten(0, old)
    want = torch.einsum("ai,bj,ijc->abc", rows, columns, cells).flatten(0, 1)
    out = how(table)
    assert torch.equal(out[:, :2], table[:, :2])
    torch.testing.assert_close(out[0, 2:].double(), want, atol=1e-6, rtol=1e-6)


@EACH
def test_meta_device(how, old, new):
    """On the meta device only the shape matters."""
    out = how(torch.empty(old, device="meta"))
    assert out.is_meta
    assert tuple(out.shape) == new


@EACH
def test_wrong_shapes_are_refused(how, old, new):
    """A tensor with another grid, or with too few dimensions, is a ValueError that names its shape."""
    for shape in (new, old[: how.dim], ()):
        with pytest.raises(ValueError, match=r"grid") as error:
            how(torch.zeros(shape))
        assert str(tuple(shape)) in str(error.value)


@EACH
def test_second_moments(how, old, new):
    """A map of squares: non-negative, and by Cauchy-Schwarz at least the square of the mapped mean."""
    mean, spread = draw(*old, dtype=torch.float64), draw(*old, seed=1, dtype=torch.float64)
    for squares in (mean.square(), mean.square() + spread.square()):
        out = how.second_moment(squares)
        assert tuple(out.shape) == new
        assert (out >= 0).all()
        assert (how(mean).square() <= out * (1 + 1e-9) + 1e-12).all()
    sparse = torch.zeros(old, dtype=torch.float64)
    sparse.view(-1)[0] = 1.0
    assert (how.second_moment(sparse) >= 0).all()
    assert how.second_moment(draw(*old).square().half()).dtype == torch.float16


@EACH
def test_rebase(how, old, new):
    """Rebased on its own source a map is equal; rebased on the new side it is the identity and copies every bit."""
    assert how.rebase(how.source) == how
    there = how.rebase(_new_source(how))
    assert there.is_identity
    table = draw(*new)
    copy = there(table)
    assert torch.equal(copy, table)
    assert copy.data_ptr() != table.data_ptr()
    assert not how.is_identity


def _new_source(how: Resample) -> tuple[tuple[int, ...], ...]:
    here = tuple((axis.new,) for axis in how.axes)
    return here + (_new_source(how.then) if how.then else ())


def test_rebase_reaches_the_same_side():
    """A map rebased on another old grid equals one made for it."""
    assert token_matrix((7, 7), (9, 6)).rebase(((4,), (5,), (4,), (5,))) == token_matrix((4, 5), (9, 6))
    assert rel_pos_table((7, 7), (9, 6), suffix=3).rebase(((7,), (9,))) == rel_pos_table((4, 5), (9, 6), suffix=3)


def test_identity_is_decided_by_grids_not_counts():
    """14×14 → 7×28 has as many entries and is no identity."""
    how = pos_embed((14, 14), (7, 28))
    assert not how.is_identity
    table = draw(1, 196, 4)
    assert not torch.equal(how(table), table)
    assert pos_embed((7, 28), (7, 28)).is_identity


@dataclass(frozen=True)
class _Flip(AxisMap):
    """A map that keeps the length but not the coordinates, with negative entries."""

    @property
    def is_identity(self) -> bool:
        return False

    def build(self) -> torch.Tensor:
        return -torch.eye(self.old, dtype=torch.float64).flip(0)

    @property
    def label(self) -> str:
        return "flip"


def test_second_moments_of_a_map_that_keeps_the_length():
    """Non-negative also where an axis changes its coordinates and not its length."""
    how = Resample((_Flip(4, 4),))
    table = draw(4, 2)
    assert torch.equal(how(table), -table.flip(0))
    assert torch.equal(how.second_moment(table.square()), table.square().flip(0))


@pytest.mark.parametrize(
    "axis",
    [
        Interpolate(9, 17),
        Interpolate(17, 9, "bilinear", False),
        MirroredOffset(9, 17),
        Adjoint(9, 17),
        PatchKernel(17, 9),
        Geometric(9, 17),
    ],
    ids=lambda a: a.label,
)
def test_axis_maps_are_values(axis):
    """Equal fields are one value with one matrix (new, old) in float64, whose label is for people."""
    assert axis == type(axis)(**vars(axis))
    assert hash(axis) == hash(type(axis)(**vars(axis)))
    assert axis.matrix() is type(axis)(**vars(axis)).matrix()
    assert axis.matrix().shape == (axis.new, axis.old)
    assert axis.matrix().dtype == torch.float64
    assert axis.label
    assert not axis.is_identity


def test_matrices_do_not_inherit_the_callers_modes():
    """A matrix first made under inference mode or on another default device serves later callers."""
    table = draw(1, 19 * 19, 2)
    with torch.inference_mode(), torch.device("meta"):
        under = pos_embed((19, 19), (23, 21))(table)
    assert not Interpolate(19, 23).matrix().is_inference()
    assert Interpolate(19, 23).matrix().device.type == "cpu"
    assert torch.equal(under, pos_embed((19, 19), (23, 21))(table))


@EACH
def test_precision_settings_do_not_matter(how, old, new):
    """Autocast and a lowered matmul precision leave every bit."""
    table = draw(*old)
    want = how(table)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(how(table), want)
    finally:
        torch.set_float32_matmul_precision(before)
