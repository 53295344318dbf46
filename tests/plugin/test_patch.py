"""Functions that run ours and are put back, and copies that call ours, on small modules made for it."""

from __future__ import annotations

import inspect
import pickle
import sys
import types

import pytest
import timm
from timm.models import _builder, _factory, get_deprecated_models, is_model

from timm_resize.plugin.patch import Exchange, calling, found, stock

SOURCE = """
def inner(x, y=1, *, z=2):
    return ("inner", x, y, z)

def middle(x):
    return [inner(x) for _ in range(1)][0]

def outer(x):
    return middle(x)

def aside(x):
    return x

def closing(function):
    def wrapped(x):
        return function(x)
    return wrapped

held = closing(outer)

def circle(x):
    return circle(x - 1) if x else inner(x)
"""


@pytest.fixture
def package():
    """A module of a package that is not ours."""
    module = types.ModuleType("somebodys.module")
    exec(SOURCE, vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_an_exchanged_function_is_the_same_object_and_runs_ours(package):
    """Every name and partial of it runs the replacement; arguments arrive as given; then the old code is back."""
    function, code = package.inner, package.inner.__code__
    exchange = Exchange(function, lambda *args, **kwargs: ("ours", args, kwargs))
    exchange.put_in()
    assert package.inner is function
    assert function(1, z=3) == ("ours", (1,), {"z": 3})
    assert package.outer(5) == ("ours", (5,), {})
    assert str(inspect.signature(function)) == "(x, y=1, *, z=2)"
    assert stock("somebodys.module.inner")(1) == ("inner", 1, 1, 2)
    exchange.take_out()
    assert function.__code__ is code
    assert function(1, z=3) == ("inner", 1, 1, 3)
    assert not vars(function)


def test_a_function_that_somebody_exchanged_after_us_stays_theirs(package):
    """Putting back does not undo what was done since."""
    exchange = Exchange(package.inner, lambda *args: "ours")
    exchange.put_in()
    package.inner.__code__ = (lambda x: "theirs").__code__
    exchange.take_out()
    assert package.inner(1) == "theirs"


def test_a_function_is_found_behind_wrappers(package):
    """Under its home's name another function may stand: an honest wrapper leads to it, else other names do."""
    function = package.inner

    def opaque(x):
        return function(x)

    package.alias = types.ModuleType("somebodys.alias")
    sys.modules["somebodys.alias"] = package.alias
    package.alias.inner = function
    package.inner = opaque
    assert found("somebodys.module.inner") is function
    del sys.modules["somebodys.alias"]
    assert found("somebodys.module.inner") is None
    opaque.__wrapped__ = function
    assert found("somebodys.module.inner") is function
    assert found("somebodys.module.nothing") is None


@pytest.mark.parametrize("start", ["outer", "held", "circle"])
def test_a_copy_calls_ours_and_the_original_does_not(package, start):
    """Through comprehensions, closures and circles; no module attribute and no function of the package changes."""
    before = dict(vars(package))
    copy = calling(getattr(package, start), {package.inner: lambda x: ("ours", x)})
    assert copy(0) == ("ours", 0)
    assert getattr(package, start)(0) == ("inner", 0, 1, 2)
    assert vars(package) == before


def test_a_function_that_gets_to_nothing_is_itself(package):
    """No copy is made where none is needed, nor of what is no plain function."""
    assert calling(package.aside, {package.inner: print}) is package.aside
    assert calling(len, {package.inner: print}) is len
    assert pickle.loads(pickle.dumps(calling(len, {}))) is len


def test_every_entry_point_of_timm_gets_to_its_loader():
    """For all registered names, deprecated ones too, a copy calls ours in place of `load_pretrained`."""
    names = [*timm.list_models(), *(n for n in get_deprecated_models() if is_model(n))]
    assert len(names) > 1371
    ours = lambda *args, **kwargs: None  # noqa: E731
    for name in names:
        entry = _factory.model_entrypoint(name)
        assert calling(entry, {_builder.load_pretrained: ours}) is not entry, name
