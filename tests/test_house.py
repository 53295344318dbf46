"""The house as drawn: which room may import which, and who may write to another package. Read from the source alone."""

from __future__ import annotations

import pytest
import timm

import timm_resize
from tests.helpers.imports import arrows, between_rooms, circles, foreign_writes, identifiers, read, words

MODULES = read()

FLOORS = (
    {"", "__main__", "api"},
    {"cli", "training", "hub", "plugin", "multi_size", "cost", "integrations"},
    {"resize", "weights", "builds"},
    {"core"},
    {"resample"},
    {"geometry"},
    {"errors", "version"},
)
"""From the top: a module imports from its own floor and from those below. `handlers` has a rule of its own."""

HANDLERS_SEE = ("core.context", "core.registry", "resample", "geometry", "errors", "handlers")


def floor_of(room):
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_its_floor():
    """A new folder is drawn into the house first."""
    assert {m.room for m in MODULES.values()} == set().union(*FLOORS) | {"handlers"}


def test_imports_run_downwards():
    """No module imports from a floor above its own, nor a handler."""
    wrong = [
        f"{name} -> {target}"
        for name, targets in arrows(MODULES).items()
        for target in targets
        if not name.startswith("handlers")
        and (target.startswith("handlers") or floor_of(MODULES[target].room) < floor_of(MODULES[name].room))
    ]
    assert wrong == []


def test_handlers_see_the_handler_api_alone():
    """What a handler of ours imports, one of anybody's can: context, registry, maps, sizes, errors."""
    wrong = [
        f"{name} -> {target}"
        for name, targets in arrows(MODULES).items()
        for target in targets
        if name.startswith("handlers") and not any(target == s or target.startswith(f"{s}.") for s in HANDLERS_SEE)
    ]
    assert wrong == []


@pytest.mark.parametrize("graph", [arrows(MODULES), between_rooms(MODULES)], ids=["modules", "rooms"])
def test_no_circle(graph):
    """Neither modules nor rooms import one another in a circle, imports inside functions included."""
    assert circles(graph) == []


def test_handlers_load_by_name_in_the_registry_alone():
    """Nobody imports a handler by its name as text, but the registry, which loads them all at first use."""
    texts = {name for name, m in MODULES.items() if "timm_resize.handlers" in m.source and not name.startswith("hand")}
    assert texts - {"cli.new_handler"} == {"core.registry"}


def test_the_core_knows_no_file_and_no_private_name_of_timm():
    """core/ imports no file format, no hub client and nothing that timm keeps to itself."""
    formats = ("safetensors", "huggingface_hub", "json", "pickle", "zipfile")
    wrong = [
        f"{name} -> {target}"
        for name, m in MODULES.items()
        if m.room in ("core", "resample", "geometry", "errors")
        for target in m.foreign
        if target.split(".")[0] in formats
        or (target.split(".")[0] == "timm" and any(part.startswith("_") for part in target.split(".")))
    ]
    assert wrong == []


def test_only_the_plugin_writes_to_other_packages():
    """Nothing outside plugin/ assigns to a name, a class attribute or a `__code__` of another package."""
    wrong = {name: foreign_writes(m) for name, m in MODULES.items() if m.room != "plugin"}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load = f",
        "nn.Linear.forward = f",
        "timm.models._builder.load_pretrained: object = f",
        "builder.load_pretrained = f",
        "del builder.load_pretrained",
        "setattr(builder, name, f)",
        "vars(builder)['load_pretrained'] = f",
        "builder.__dict__['load_pretrained'] = f",
        "sys.modules['timm.models'].create_model = f",
        "x = sys.modules.get('timm'); x.create_model = f",
        "x = torch.nn; x.Linear = f",
        "with f() as torch.load: pass",
        "g.__code__ = f.__code__",
        "type(model).forward = f",
    ],
)
def test_what_writing_looks_like(line, tmp_path):
    """Each way of writing that the rule is about is seen."""
    header = "import sys, timm, torch\nfrom torch import nn\nfrom timm.models import _builder as builder\n"
    (tmp_path / "a.py").write_text(header + line)
    assert foreign_writes(read(tmp_path)["a"])


@pytest.mark.parametrize("line", ["model.x = torch.load", "x = torch.zeros(1); x[0] = 1", "y = sys.path", "self.a = 1"])
def test_what_writing_does_not_look_like(line, tmp_path):
    """Reading another package, and writing to what it returned, are no writes to it."""
    (tmp_path / "a.py").write_text(f"import sys, torch\n{line}")
    assert foreign_writes(read(tmp_path)["a"]) == []


def test_no_frame_is_read():
    """Nothing looks into a caller's or another thread's stack."""
    used = {i for m in MODULES.values() for i in identifiers(m)}
    assert used & {"_getframe", "_current_frames", "currentframe", "f_locals", "f_back", "f_code"} == set()


KEYED = {"twin", "twins", "graft", "grafts", "scion", "told", "said", "door", "doors", "shell", "serial"}
KEYED |= {"views", "kinds", "seam"}
"""Words that a reader would need a key for. The field's words: copy, patch, replacement, entry, meta model."""


@pytest.mark.parametrize("name", MODULES)
def test_names_need_no_key(name):
    """No identifier of the package has such a word, except names that timm itself gives (its Twins)."""
    keyed = {i for i in identifiers(MODULES[name]) if KEYED & set(words(i))}
    assert {i for i in keyed if not hasattr(timm.models, i)} == set()


def test_the_package_shows_what_it_exports():
    """`dir` gives the names of `__all__`, and `families` stays the function once the handlers are loaded."""
    timm_resize.families()
    assert dir(timm_resize) == sorted(timm_resize.__all__)
    assert callable(timm_resize.families)
    assert all(hasattr(timm_resize, name) for name in timm_resize.__all__)
