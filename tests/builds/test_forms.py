"""Closed forms: what sequences of sides at several image sizes are told apart, by arithmetic alone."""

from __future__ import annotations

import pytest

from timm_resize.builds.forms import forms

SIZES = ((224, 224), (192, 256), (200, 232), (320, 224), (280, 196))


def up(a, b):
    return -(-a // b)


SIDES = {
    "floor": (lambda n: n // 16, "H // 16"),
    "ceil": (lambda n: up(n, 16), "-(-H // 16)"),
    "floor, then ceil": (lambda n: up(n // 8, 2), "-(-H // 8 // 2)"),
    "patches of 14": (lambda n: n // 14, "H // 14"),
    "window that stops": (lambda n: min(7, n // 32), "min(H // 32, 7)"),
}


@pytest.mark.parametrize("kind", SIDES)
@pytest.mark.parametrize("rest", [0, 1, 5])
def test_cells_and_offsets(kind, rest):
    """A count of cells, or of offsets, with a constant is told from every other, and its side is found."""
    side, text = SIDES[kind]
    for what, count in (("cells", lambda h, w: h * w), ("offsets", lambda h, w: (2 * h - 1) * (2 * w - 1))):
        shapes = [(1, count(side(h), side(w)) + rest, 8) for h, w in SIZES]
        ((form,),) = forms(SIZES, shapes)
        assert (form.dim, form.what, form.rest) == (1, what, rest)
        assert f"h = {text}, " in str(form)


@pytest.mark.parametrize(("what", "of"), [("map", lambda n: n // 8), ("offset map", lambda n: 2 * (n // 16) - 1)])
def test_two_sides(what, of):
    """Two neighbouring dimensions are a grid, or its offsets; odd ones that are not 2h-1 of any side are neither."""
    ((form,),) = forms(SIZES, [(4, of(h), of(w)) for h, w in SIZES])
    assert (form.dim, form.what) == (1, what)
    assert forms(SIZES, [(4, h // 8 - 1, w // 8 - 1) for h, w in SIZES]) == []  # patches that overlap


def test_matrices():
    """A product of two grids of different cells, in two dimensions."""
    ((rows, columns),) = forms(SIZES, [((h // 32) * (w // 32), (h // 16) * (w // 16)) for h, w in SIZES])
    assert (rows.dim, columns.dim) == (0, 1)
    assert rows.of((320, 224)) == (10, 7)
    assert columns.of((320, 224)) == (20, 14)


def test_patches_that_are_not_square():
    """16 pixels high, 8 wide."""
    ((form,),) = forms(SIZES, [((h // 16) * (w // 8), 3) for h, w in SIZES])
    assert form.of((224, 224)) == (14, 28)


def test_one_axis():
    """Rows of one axis are told from those of the other, and offsets from places."""
    ((rows,),) = forms(SIZES, [(h // 16, 3) for h, _ in SIZES])
    ((columns,),) = forms(SIZES, [(2 * (w // 16) - 1, 3) for _, w in SIZES])
    assert (rows.what, rows.axis) == ("axis", 0)
    assert (columns.what, columns.axis) == ("offset axis", 1)


def test_features_of_a_flattened_map():
    """Several entries to a cell are looked for on request alone."""
    shapes = [(5, 12 * (h // 16) * (w // 16)) for h, w in SIZES]
    assert forms(SIZES, shapes) == []
    ((form,),) = forms(SIZES, shapes, channels=True)
    assert form.times == 12


@pytest.mark.parametrize("count", [lambda h, w: (h // 16) ** 2, lambda h, w: h * w % 97, lambda h, w: (h + w) // 7])
def test_nothing_fits(count):
    """A builder that reads one side only, and what follows no grid."""
    assert forms(SIZES, [(1, count(h, w), 8) for h, w in SIZES]) == []


def test_one_more_build_narrows_the_roundings():
    """At multiples of 32 four roundings are one; 200 pixels tell."""
    sizes = ((224, 224), (192, 256), (320, 224))
    ((form,),) = forms(sizes, [(h // 32 * (w // 32), 8) for h, w in sizes])
    assert len(form.between(((224, 224), (200, 200)), ((49, 8), (36, 8)))) == 1
    assert all(h(200) == 6 for h, _ in form.narrowed((200, 232), (42, 8)).grids)
    assert form.narrowed((200, 232), (41, 8)) is None
