"""Weights that read or write a grid: patch kernels and token mixing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from tests.helpers.resampling import GRIDS, KERNELS, close, draw, grid_resize, one_axis
from timm_resize.resample import patch_kernel, token_matrix, token_reader, token_writer


@pytest.mark.parametrize(
    ("old", "new", "error"), [(8, 16, 0), (16, 20, 0), (16, 32, 0), (14, 16, 0), (16, 14, 0.49), (32, 8, 0.96)]
)
def test_patch_kernel_keeps_inner_products(old, new, error):
    """FlexiViT: ⟨resize(x), w'⟩ = ⟨x, w⟩ when growing; shrinking loses as much as the paper's formula must."""
    w, x = draw(64, 3, old, old), draw(16, 3, old, old, seed=1)
    resized = F.interpolate(x, size=(new, new), mode="bicubic", antialias=True)
    before = torch.einsum("oihw,bihw->bo", w, x)
    after = torch.einsum("oihw,bihw->bo", patch_kernel((old, old), (new, new))(w), resized)
    relative = ((after - before).norm() / before.norm()).item()
    assert relative == pytest.approx(error, abs=0.02 if error else 3e-6)


@pytest.mark.parametrize(("mode", "antialias"), [("bicubic", True), ("bicubic", False), ("bilinear", False)])
def test_adjoint_patch_kernels_read_a_small_patch_as_enlarged(mode, antialias):
    """By torch's own enlargement: w'(x) = w(enlarge(x)) for every small patch x; a growing patch is as without."""
    w, x = draw(4, 3, 14, 12, dtype=torch.float64), draw(5, 3, 8, 7, dtype=torch.float64)
    enlarged = torch.nn.functional.interpolate(x, (14, 12), mode=mode, antialias=antialias, align_corners=False)
    how = patch_kernel((14, 12), (8, 7), mode=mode, antialias=antialias, adjoint=True)
    close(torch.einsum("oihw,bihw->bo", how(w), x), torch.einsum("oihw,bihw->bo", w, enlarged), 1e-10)
    grown = [patch_kernel((8, 7), (14, 12), mode=mode, antialias=antialias, adjoint=a)(x) for a in (True, False)]
    close(*grown)


def test_patch_kernels_do_not_chain():
    """16→32→16 is off by about .95 of the kernel's norm, the reason for keeping originals."""
    w = draw(64, 3, 16, 16)
    there = patch_kernel((16, 16), (32, 32))
    back = patch_kernel((32, 32), (16, 16))
    assert ((back(there(w)) - w).norm() / w.norm()).item() == pytest.approx(0.95, abs=0.02)
    assert torch.equal(there.rebase(there.source)(w), there(w))


GROWING = [((7, 7), (9, 9)), ((14, 14), (18, 18)), ((14, 14), (24, 24)), ((5, 7), (7, 11)), ((6, 9), (6, 13))]


@pytest.mark.parametrize(("old", "new"), GROWING)
def test_token_identities_when_growing(old, new):
    """fc1'·U = fc1, fc2' = U·fc2, bias' = U·b, S' = U·S·pinv(U), in float64 and float32."""
    n, u = old[0] * old[1], grid_resize(old, new)
    fc1, fc2, bias, s = (draw(*shape, dtype=torch.float64) for shape in ((8, n), (n, 8), (n,), (n, n)))
    reader, writer, matrix = token_reader(old, new), token_writer(old, new), token_matrix(old, new)
    close(reader(fc1) @ u, fc1, 1e-12)
    close(writer(fc2), u @ fc2, 1e-12)
    close(writer(bias), u @ bias, 1e-12)
    close(matrix(s), u @ s @ torch.linalg.pinv(u), 1e-12)
    close(matrix(s) @ u, u @ s, 1e-12)
    close(reader(fc1.float()).double() @ u, fc1, 1e-5)


@pytest.mark.parametrize(
    ("old", "new", "error"), [((7, 7), (9, 9), 0.42), ((14, 14), (18, 18), 0.39), ((14, 14), (24, 24), 1.26)]
)
def test_naive_row_interpolation_errs(old, new, error):
    """Interpolating fc1's rows like an image: off by the published fractions, and constants scale by N'/N."""
    w, u = draw(512, old[0] * old[1], dtype=torch.float64), grid_resize(old, new)
    naive = token_writer(old, new, dim=1)(w)
    assert ((naive @ u - w).norm() / w.norm()).item() == pytest.approx(error, abs=0.06)
    ratio = new[0] * new[1] / (old[0] * old[1])
    ones = torch.ones(1, old[0] * old[1], dtype=torch.float64)
    assert token_writer(old, new, dim=1)(ones).sum().item() == pytest.approx(ratio * ones.sum().item())
    assert token_reader(old, new)(ones).sum().item() == pytest.approx(ones.sum().item())


@pytest.mark.parametrize(("old", "new"), GRIDS)
@pytest.mark.parametrize(("mode", "antialias"), KERNELS)
def test_constant_grids_keep_their_sums(old, new, mode, antialias):
    """Growing, shrinking and mixed: a constant grid is read the same, and a constant writer stays constant."""
    n = old[0] * old[1]
    w = draw(8, n, dtype=torch.float64)
    options = dict(mode=mode, antialias=antialias)
    close(token_reader(old, new, **options)(w).sum(1), w.sum(1), 1e-11)
    close(token_writer(old, new, **options)(torch.full((n,), 1.25)), torch.full((new[0] * new[1],), 1.25), 1e-7)
    s = draw(n, n, dtype=torch.float64)
    wide = token_writer(old, new, **options)(s.sum(1))
    close(token_matrix(old, new, **options)(s).sum(1), wide, 1e-11)


@pytest.mark.parametrize(("old", "new"), GROWING)
def test_shrinking_readers_undo_growing(old, new):
    """Readers, untouched between, come back exactly from a larger grid even without the original."""
    w = draw(8, old[0] * old[1], dtype=torch.float64)
    close(token_reader(new, old)(token_reader(old, new)(w)), w, 1e-12)


def field(size: tuple[int, int], seed: int, waves: int = 3) -> torch.Tensor:
    """Sample one smooth function of the image at the cell centres of a grid: (h*w,), float64."""
    y, x = ((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in size)
    amplitude = draw(waves, waves, seed=seed, dtype=torch.float64)
    rows = torch.stack([torch.cos(math.pi * i * y) for i in range(waves)])
    columns = torch.stack([torch.cos(math.pi * i * x) for i in range(waves)])
    return torch.einsum("ij,ih,jw->hw", amplitude, rows, columns).reshape(-1)


@pytest.mark.parametrize(
    ("old", "new"),
    [((14, 14), (7, 7)), ((14, 14), (10, 10)), ((14, 14), (12, 9)), ((14, 14), (20, 10)), ((14, 14), (7, 28))],
)
def test_shrinking_readers_read_smooth_grids_alike(old, new):
    """Shrinking and mixed: a smooth grid is read to 1.2 %, at least eight times closer than by pinv(U) or by rows."""
    w = draw(64, old[0] * old[1], dtype=torch.float64)
    u = [one_axis(a, b, "bicubic", True) for a, b in zip(old, new, strict=True)]
    inverse = w @ torch.linalg.pinv(torch.kron(*u))
    rows = token_writer(old, new, dim=1)(w) * (old[0] * old[1] / (new[0] * new[1]))
    ours = token_reader(old, new)(w)
    errors = torch.zeros(3, dtype=torch.float64)
    for seed in range(8):
        before, small = w @ field(old, seed), field(new, seed)
        off = torch.stack([(m @ small - before).norm() for m in (ours, inverse, rows)])
        errors += off / before.norm() / 8
    assert errors[0] < 0.012
    assert errors[0] < errors[1:].min() / 8
