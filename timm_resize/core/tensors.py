"""The calls of a handler that make changes of parameters, buffers and attributes, and see that they can be made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from timm_resize.core.hidden import PEFT_ADVICE, View, adapted_attributes, adapted_tensors, tied, whereabouts
from timm_resize.core.input_check import GUARD, guard_of
from timm_resize.core.maps import Maps
from timm_resize.core.plan import CACHE, MISSING, Change, Kind, Rebuild, Reinitialise, same_value, shape_of
from timm_resize.core.request import Request
from timm_resize.errors import ResizeError, UnsupportedModelError
from timm_resize.geometry import Size, text
from timm_resize.resample import Resample, maps


class Tensors(Maps):
    """What a plan does to single tensors. Reads the model, never writes to it."""

    def __init__(self, view: View, request: Request, new_size: Size) -> None:
        super().__init__(request)
        self.root = view.root
        self.new_size = new_size
        self._paths, self._adapters = view.paths, view.adapters
        self._seen: set[tuple[int, str]] = set()
        self._asked: set[str] = set()
        self._maps: dict[int, tuple[str, Resample]] = {}  # by tensor: its name, and its map, the identity too

    def attribute(self, module: nn.Module, **values: object) -> Iterator[Change]:
        """Set Python attributes of `module`; those that already hold the value are left out.

        An empty dict empties a cache, which forward may fill between the plan and its use: never left out.
        """
        for name, new in values.items():
            if isinstance(new, dict) and not new and self._first(module, name):
                yield Change(self.path(module), name, "attribute", CACHE, new)
                continue
            old = module.__dict__.get(name, MISSING)
            if not same_value(old, new) and self._first(module, name):
                yield Change(self.path(module), name, "attribute", old, new)
                for adapter in self._adapters.get(id(module), ()):
                    for part in adapted_attributes(adapter, name):
                        yield from self.attribute(part, **{name: new})

    def parameter(self, module: nn.Module, name: str, how: Resample, *, optional: bool = False) -> Iterator[Change]:
        """Resample a parameter of `module`; nothing when the map is the identity.

        A buffer in the parameter's place goes through the same map, and so do the adapters that are around the layer.

        Args:
            module: A submodule of the model.
            name: Of its parameter.
            how: The map, of `ctx` or of the handler's own.
            optional: The model may have been built without it: None is left alone.

        Raises:
            ResizeError: `module` has no such parameter, or `how` is not a map.
            UnsupportedModelError: The parameter has another shape than the map is for, is tied to another that goes
                elsewhere, or is computed from others in each forward.
        """
        if not isinstance(how, Resample):
            advice = "Give a map of ctx, such as ctx.pos_embed(old, new), or a Resample."
            raise self._misuse("parameter", module, f"how={how!r} of {name!r} is not a map. {advice}")
        tensor: Tensor | None = module._parameters.get(name)
        kind: Kind = "parameter"
        if tensor is None and module._buffers.get(name) is not None:
            tensor, kind = module._buffers[name], "buffer"
        if tensor is None and optional and getattr(module, name, MISSING) is None:
            return
        if tensor is None:
            raise self._absent(module, name)
        key = self._key(module, name)
        fresh = self._agreed(key, tensor, how) if kind == "parameter" else self._first(module, name)
        if how.is_identity or not fresh:
            return
        try:
            new = how.shape(tensor.shape)
        except ValueError as error:
            raise self._unsupported(
                f"{key} does not have its type's shape: {error}. Undo the change to that {type(module).__name__}, or "
                "give the sizes that it is for in its handler."
            ) from None
        yield Change(self.path(module), name, kind, shape_of(tensor), new, how)
        for adapter in self._adapters.get(id(module), ()):
            parts = adapted_tensors(adapter, name, how)
            if parts is None:
                where = f"{self.path(module)} is adapted by a {type(adapter).__name__} of PEFT"
                raise self._unsupported(f"{where}, which no map of its {name} follows exactly. {PEFT_ADVICE}")
            for part, tensor_name, its in parts:
                yield from self.parameter(part, tensor_name, its)

    def _absent(self, module: nn.Module, name: str) -> ResizeError:
        """Return the error for a tensor that a handler asks for and that is not there."""
        if found := whereabouts(module, name):
            return self._unsupported(f"{self._key(module, name)} {found}")
        if getattr(module, name, MISSING) is None:
            what = f"its {name!r} is None. Put the tensor back, or say optional=True where models are built without it."
        else:
            what = f"it has no parameter {name!r}. {_names(module._parameters)}"
        return self._misuse("parameter", module, what)

    def _agreed(self, key: str, tensor: Tensor, how: Resample) -> bool:
        """Whether a tensor is asked for the first time in this plan; one in two places must go one way in both."""
        self._asked.add(key)
        if id(tensor) not in self._maps:
            self._maps[id(tensor)] = key, how
            return True
        first, its = self._maps[id(tensor)]
        if its != how and not (its.is_identity and how.is_identity):
            raise self._unsupported(tied(first, key))
        return False

    def _key(self, module: nn.Module, name: str) -> str:
        return f"{self.path(module)}.{name}".removeprefix(".")

    def buffer(
        self, module: nn.Module, name: str, shape: Sequence[int] | None, how: Rebuild | Reinitialise | None = None
    ) -> Iterator[Change]:
        """Replace a buffer of `module` by one of `shape` (None: by None). Yield only when it does change.

        A Parameter in the buffer's place that is not trained is rebuilt likewise, where the rule is a `Rebuild`.

        Raises:
            ResizeError: `module` has no such buffer, or a `shape` comes without a rule that can fill it.
            UnsupportedModelError: A trained Parameter is in the buffer's place.
        """
        if not self._first(module, name):
            return
        old: Tensor | None = module._buffers.get(name)
        kind: Kind = "buffer"
        if name not in module._buffers:
            old, kind = module._parameters.get(name), "parameter"
            if old is None:
                raise self._misuse("buffer", module, f"it has no buffer {name!r}. {_names(module._buffers)}")
            if old.requires_grad or isinstance(how, Reinitialise):
                what = "that is trained, where" if old.requires_grad else "where"
                raise self._unsupported(
                    f"{self._key(module, name)} is a Parameter {what} a {type(module).__name__} has a buffer, which "
                    "each size computes anew. Make it a buffer again, or a Parameter with requires_grad_(False)."
                )
        new = None if shape is None else tuple(shape)
        if new is not None:
            self._check_rule(module, name, old, new, how)
        if old is not None or new is not None:
            yield Change(self.path(module), name, kind, shape_of(old), new, None if new is None else how)

    def _check_rule(
        self, module: nn.Module, name: str, old: Tensor | None, shape: tuple[int, ...], how: object
    ) -> None:
        rebuild = "Give Rebuild(function, args)"
        if not isinstance(how, (Rebuild, Reinitialise)):
            what = f"how={how!r} is no rule for {name!r} of shape {shape}. {rebuild} or Reinitialise()."
        elif isinstance(how, Reinitialise) and not hasattr(module, "init_non_persistent_buffers"):
            what = f"it has no init_non_persistent_buffers, which Reinitialise() of {name!r} calls. {rebuild}."
        elif isinstance(how, Rebuild) and not how.like and old is None:
            what = (
                f"{name!r} is None, without device and dtype. Give Rebuild(..., like='weight'), a tensor that it has."
            )
        else:
            return
        raise self._misuse("buffer", module, what)

    def guard(self, module: nn.Module, grid: Callable[[Size], Size], given: Size | None = None) -> Iterator[Change]:
        """Let `module` refuse an input that gives another grid than the new size does.

        For models whose forward runs there, and is silently wrong.

        Args:
            module: Submodule that is given the image, or the map (h, w) of `given`; a tensor (batch, channels, h, w).
            grid: (h, w) given → (h, w) of the grid that the weights are for.
            given: What `module` is given at the new size, None for the image.
        """
        size = self.new_size if given is None else given
        yield from self.attribute(module, **{GUARD: guard_of(type(self.root).__name__, self.new_size, size, grid)})

    def flatten_linear(
        self, linear: nn.Linear, old: Size, new: Size, *, channels_last: bool = False, pool: bool = False
    ) -> Iterator[Change]:
        """Resize a linear layer that reads a flattened map: (channels, h, w), or (h, w, channels) if last.

        Args:
            linear: The layer; its `in_features` is channels * h * w.
            old: (h, w) of the map so far.
            new: (h, w) of the map at the new size.
            channels_last: How the map is flattened.
            pool: Read it as through an adaptive average pool to the old grid, not as the old map resized.

        Raises:
            UnsupportedModelError: `in_features` is no multiple of the old map.
        """
        channels, rest = divmod(linear.in_features, old[0] * old[1])
        if rest:
            raise UnsupportedModelError(
                f"{type(self.root).__name__}: {self.path(linear)} reads {linear.in_features} features, no multiple of "
                f"a {text(old)} map. Give the map that it was made for."
            )
        how = maps.flatten_linear(
            old, new, channels=channels, channels_last=channels_last, pool=pool, **self.interpolation()
        )
        yield from self.parameter(linear, "weight", how)
        yield from self.attribute(linear, in_features=channels * new[0] * new[1])

    def path(self, module: nn.Module) -> str:
        """Return the module's dotted path in the root, '' for the root.

        Raises:
            ResizeError: The module is not in the root.
        """
        path = self._paths.get(id(module))
        if path is None:
            name = type(self.root).__name__
            raise ResizeError(
                f"{name}: ctx was given a {type(module).__name__} that is not in the {name}. Give modules of ctx.root, "
                "not copies, nor what is not registered in it."
            )
        return path

    def _unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{type(self.root).__name__}: {what}", model=type(self.root).__name__)

    def _misuse(self, call: str, module: nn.Module, what: str) -> ResizeError:
        """Return the error of a handler that calls `ctx` wrongly."""
        where = f"a {type(module).__name__} ({self.path(module) or 'the model'})"
        return ResizeError(f"{type(self.root).__name__}: ctx.{call} of {where}: {what}")

    def _first(self, thing: object, name: str) -> bool:
        """Whether (thing, name) was not changed before in this plan: shared modules and tied parameters."""
        key = (id(thing), name)
        if key in self._seen:
            return False
        self._seen.add(key)
        return True


def _names(tensors: Mapping[str, object]) -> str:
    return f"Use one of {', '.join(tensors)}." if tensors else "It has none."
