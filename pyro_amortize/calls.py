"""Calls of a model, their arguments by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from pyro import poutine
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import Messenger, _bound_partial
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

Model = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class Call:
    """A call of a model, its arguments by name however they were passed.

    ``leaves`` maps the name of every argument to its value; dicts, lists and tuples are opened, so that the tensor
    under key "y" of the argument ``batch`` is called ``batch['y']``.
    """

    def __init__(self, model: Model, args: Args, kwargs: Kwargs, signature: inspect.Signature | None = None) -> None:
        self._bound = (signature or signature_of(model)).bind(*args, **kwargs)
        self._bound.apply_defaults()
        self.leaves: dict[str, Any] = {}
        for name, value in self._bound.arguments.items():
            variadic = self._bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            for key, item in value.items() if variadic else [(name, value)]:
                self.leaves.update(leaves_of(key, item))

    def replaced(self, values: dict[str, Any]) -> tuple[Args, Kwargs]:
        """Returns positional and keyword arguments for the model, some leaves replaced."""
        arguments = {}
        for name, value in self._bound.arguments.items():
            if self._bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                arguments[name] = {key: rebuilt(key, item, values) for key, item in value.items()}
            else:
                arguments[name] = rebuilt(name, value, values)
        bound = inspect.BoundArguments(self._bound.signature, arguments)
        return bound.args, bound.kwargs

    def value(self, name: str) -> Any:
        """Returns a leaf, or an argument that is opened whole; None if the call has neither."""
        return self.leaves.get(name, self._bound.arguments.get(name))

    @property
    def parameters(self) -> dict[str, tuple[Any, bool]]:
        """The model's arguments by name: their values, and whether they may stand without their names."""
        kinds = {name: parameter.kind for name, parameter in self._bound.signature.parameters.items()}
        named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        return {name: (value, kinds[name] not in named) for name, value in self._bound.arguments.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The leaves that are tensors."""
        return {name: value for name, value in self.leaves.items() if isinstance(value, Tensor)}


def is_recorded() -> bool:
    """Tells whether a graph of this call is being recorded, so that no tensor's value may be looked at."""
    return get_proxy_mode() is not None


def signature_of(model: Model) -> inspect.Signature:
    """Returns the signature of a model under its handlers; of a module, that of ``forward``."""
    fn: Any = model
    while True:
        inner = poutine.unwrap(fn)
        inner = inner.fn if hasattr(inner, "msngr") and hasattr(inner, "fn") else inner
        if inner is fn:
            break
        fn = inner
    return inspect.signature(fn.forward if isinstance(fn, nn.Module) and not hasattr(fn, "__signature__") else fn)


def layers(model: Model) -> Iterator[Model]:
    """Yields the programs of which a model consists: itself below its handlers, and what decorators stand around.

    ``amortize`` is one of these decorators.
    """
    program: Any = model
    while program is not None:
        program = poutine.unwrap(program)
        yield program
        program = getattr(program, "__wrapped__", None)


def opened(model: Model) -> tuple[Model, Callable[[Any], bool]]:
    """Takes off the ``poutine.block`` handlers around a model, which hide its data and plates along with its latents.

    Returns:
        The model, its other handlers on it, and what tells of a site's message whether a block hid it.
    """
    blocks: list[BlockMessenger] = []
    others: list[Messenger] = []
    fn = model
    while isinstance(fn, _bound_partial):
        wrapper: Any = fn.func
        if not (isinstance(wrapper, functools.partial) and len(wrapper.args) == 2):
            break
        messenger, fn = wrapper.args
        (blocks if isinstance(messenger, BlockMessenger) else others).append(messenger)
    if not blocks:
        return model, lambda _: False
    for messenger in reversed(others):
        fn = messenger(fn)
    return fn, lambda msg: any(block.hide_fn(msg) for block in blocks)


def leaves_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yields name and value of what an argument holds, dicts, lists and tuples opened."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves_of(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves_of(f"{name}[{i}]", item)
    else:
        yield name, value


def rebuilt(name: str, value: Any, values: dict[str, Any]) -> Any:
    """Returns an argument with some of its leaves replaced."""
    if isinstance(value, dict):
        items = {key: rebuilt(f"{name}[{key!r}]", item, values) for key, item in value.items()}
        copy = value.copy()
        copy.update(items)
        return copy
    if isinstance(value, (list, tuple)):
        items_ = [rebuilt(f"{name}[{i}]", item, values) for i, item in enumerate(value)]
        return type(value)(*items_) if hasattr(value, "_fields") else type(value)(items_)
    return values.get(name, value)
