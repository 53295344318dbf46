"""The registry: what it takes, what it refuses and how it says so, and that a test leaves it as it was."""

from __future__ import annotations

import sys
import threading
from importlib.metadata import EntryPoint

import pytest
from timm.models.levit import Levit
from torch import nn

import timm_resize
from tests.helpers.forks import forget_the_package, in_forks
from timm_resize.core import registry as module
from timm_resize.core.registry import Registry


class Base(nn.Module):
    """A layer."""


class Derived(Base):
    """One that inherits its handler."""


class Model(nn.Module):
    """What counts as a whole model."""

    def reset_classifier(self, num_classes):
        """Timm's."""


def plan_it(module, ctx, *, window, shift=(0, 0)):
    yield from ()


def plan_other(module, ctx):
    yield from ()


def raised(call):
    with pytest.raises(timm_resize.ResizeError) as caught:
        call()
    return str(caught.value)


def test_a_subclass_inherits_until_it_has_its_own():
    """The nearest class in the MRO counts, and unregister goes back to the base's handler."""
    registry = Registry()
    assert registry.handler_for(Derived) is None
    registry.register(Base)(plan_it)
    assert registry.handler_for(Derived).plan is plan_it
    registry.register(Derived)(plan_other)
    assert registry.handler_for(Derived).plan is plan_other
    registry.unregister(Derived)
    assert registry.handler_for(Derived).plan is plan_it
    assert [h.cls for h in registry.handlers()] == [Base]


def test_keywords_are_read_from_the_signature():
    """`window` must be given by another handler, `shift` may be."""
    registry = Registry()
    registry.register(Base)(plan_it)
    handler = registry.handler_for(Base)
    assert (handler.keywords, handler.required, handler.needs_geometry) == ({"window", "shift"}, {"window"}, "window")
    registry.register(Derived)(plan_other)
    handler = registry.handler_for(Derived)
    assert (handler.keywords, handler.required, handler.needs_geometry) == (set(), set(), "")


def test_a_double_is_an_error_that_says_what_to_write():
    """It names the class, both handlers, unregister and override; none of the call's classes is registered."""
    registry = Registry()
    registry.register(Base)(plan_it)
    assert raised(lambda: registry.register(Model, Base)(plan_other)) == (
        f"register(Base): plan_other would be its second handler, after {__name__}.plan_it. Call timm_resize."
        "unregister(Base) first, or register inside 'with timm_resize.registry.override(Base)', which undoes it."
    )
    assert [h.cls for h in registry.handlers()] == [Base]


@pytest.mark.parametrize(
    ("classes", "options", "plan", "words"),
    [
        ((), {}, plan_it, "register: no class given. Use @register(MyLayer)."),
        (
            (len,),
            {},
            plan_it,
            "register: <built-in function len> is not a torch.nn.Module class. Use @register(MyLayer).",
        ),
        ((Base(),), {}, plan_it, "register: Base() is not a torch.nn.Module class. Use @register(MyLayer)."),
        (
            (Model,),
            {"state": "pos_embed"},
            plan_it,
            "register(Model): examples is missing, and the whole model has state='pos_embed'. Use "
            "examples={'registered_name': {'depth': 1}}, or {} where timm.create_model does not build it.",
        ),
        ((Base,), {"options": "patch_size"}, plan_it, "options='patch_size' is a string. Use options=('patch_size',)."),
        (
            (Base,),
            {},
            lambda module, ctx: [],
            "register(Base): <lambda> is not a generator function. Yield the changes",
        ),
    ],
)
def test_what_cannot_be_a_handler(classes, options, plan, words):
    """Each refusal names the class and the argument, and what to write."""
    registry = Registry()
    assert words in raised(lambda: registry.register(*classes, **options)(plan))
    assert registry.handlers() == []


def test_signatures_that_visit_cannot_call():
    """A handler takes the module and the context by position, and named keywords only."""

    def one(module):
        yield

    def three(module, ctx, window):
        yield

    def anything(module, ctx, **geometry):
        yield

    for plan in (one, three, anything):
        words = raised(lambda plan=plan: Registry().register(Base)(plan))
        assert words.startswith(f"register(Base): {plan.__name__}(module")
        assert words.endswith(f" cannot be called. Use def {plan.__name__}(module, ctx, *, ...).")


def test_examples_may_be_none_only_where_nothing_depends_on_the_size():
    """{} says that timm does not build the model; a layer, or a model without state, needs none."""
    registry = Registry()
    registry.register(Model, state="pos_embed", examples={})(plan_it)
    registry.register(Base, state="table")(plan_it)
    registry.unregister(Model)
    registry.register(Model)(plan_it)
    assert [(h.cls, h.is_model) for h in registry.handlers()] == [(Base, False), (Model, True)]


def test_unregister_of_what_is_not_there():
    """It names the base whose handler the class inherits, where there is one."""
    registry = Registry()
    assert raised(lambda: registry.unregister(Base)) == (
        "unregister(Base): the class has no handler of its own. Leave it out."
    )
    registry.register(Base)(plan_it)
    assert "Use unregister(Base), whose handler it inherits." in raised(lambda: registry.unregister(Derived))


def test_override_undoes_what_was_registered_in_it():
    """Also after an error, and nested; a class given to it may be registered anew."""
    before = timm_resize.families()
    levit = next(h for h in before if h.cls is Levit)

    def fail_inside():
        with timm_resize.registry.override(Levit):
            assert module.handler_for(Levit) is None
            timm_resize.register(Levit, examples={})(plan_other)
            with timm_resize.registry.override():
                timm_resize.unregister(Levit)
                timm_resize.register(Base)(plan_it)
            assert (module.handler_for(Levit).plan, module.handler_for(Base)) == (plan_other, None)
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert timm_resize.families() == before
    assert module.handler_for(Levit) is levit


def test_a_class_of_ours_is_taken_before_anything_was_planned():
    """The double is found where it is written, not when the handlers load; ours is not lost in silence."""

    def register():
        forget_the_package()
        import timm_resize

        assert "timm_resize.handlers.levit" not in sys.modules
        with pytest.raises(timm_resize.ResizeError) as caught:
            timm_resize.register(Levit)(plan_it)
        return str(caught.value)

    [text] = in_forks(register)
    assert "register(Levit): plan_it would be its second handler, after timm_resize.handlers.levit.plan_levit" in text


@pytest.fixture
def entry(tmp_path, monkeypatch):
    """A function that makes a module of the given source the only entry point."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source):
        (tmp_path / "their_package.py").write_text(source)
        sys.modules.pop("their_package", None)
        point = EntryPoint("their_models", "their_package", module.PACKAGE)
        monkeypatch.setattr(module, "entry_points", lambda group: [point] if group == point.group else [])

    yield write
    sys.modules.pop("their_package", None)


THEIRS = """
import time
from torch import nn
from timm_resize import register

time.sleep(0.2)

class Layer(nn.Module):
    pass

def plan_layer(layer, ctx):
    yield from ()

timm_resize_registry.register(Layer)(plan_layer)
"""


def test_an_entry_point_is_loaded_once_by_several_threads(entry, monkeypatch):
    """Threads that come while it loads wait: each finds the handler, which is registered once."""
    registry, found = Registry(), []
    monkeypatch.setattr("builtins.timm_resize_registry", registry, raising=False)
    entry(THEIRS)
    threads = [threading.Thread(target=lambda: found.append(registry.handlers())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [[h.cls.__name__ for h in each] for each in found] == [["Layer"]] * 4


def test_a_broken_entry_point_is_named_until_it_is_repaired(entry, monkeypatch):
    """Every look-up says which it is; nothing of it stays, so that it loads whole once it can."""
    registry = Registry()
    monkeypatch.setattr("builtins.timm_resize_registry", registry, raising=False)
    entry(f"{THEIRS}\nimport not_there_at_all\n")
    for _ in range(2):
        assert raised(registry.handlers) == (
            "entry point their_models = their_package in the group timm_resize.handlers cannot be loaded: "
            "ModuleNotFoundError: No module named 'not_there_at_all'. Repair or uninstall that package."
        )
    entry(THEIRS)
    assert [h.cls.__name__ for h in registry.handlers()] == ["Layer"]


def test_a_class_that_not_every_version_has_goes_by_name():
    """A dotted name registers the class where there is one, and nothing where the library lacks it or its module."""
    with timm_resize.registry.override():
        before = set(timm_resize.registry.handlers())

        @timm_resize.register("torch.nn.Bilinear", "torch.nn.Trilinear", "torch.nn.nowhere.Quad", "nobody.Layer")
        def plan_bilinear(layer, ctx):
            yield from ()

        assert {h.cls for h in set(timm_resize.registry.handlers()) - before} == {nn.Bilinear}


def test_handlers_of_a_library_load_when_its_class_is_met_and_stay():
    """They are those of the class's module, and outlive an `override` that was open when they were first wanted."""

    def meet() -> list[str]:
        forget_the_package()
        from torchvision.models import VisionTransformer

        from timm_resize.core.registry import registry

        registry.load()
        name = "timm_resize.handlers.libraries.torchvision.vision_transformer"
        assert name not in sys.modules
        with registry.override():
            inside = registry.handler_for(VisionTransformer)
        after = registry.handler_for(VisionTransformer)
        assert inside is after is not None
        return [after.plan.__module__, name]

    [(found, name)] = in_forks(meet)
    assert found == name
