"""A model's own parameters and state, left as found.

They belong to the user. Looking at a model, judging it and fitting references to it all happen inside
:func:`preserved`; training the model itself is the business of ``fit_svi`` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER as _DIVIDER
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

REGISTERS = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")


class Preserved:
    """What is put back at the end of a :func:`preserved` block.

    Of what a block around it has not met yet, that one remembers first: it, too, is to find things as they were before.

    Args:
        evaluating: Whether modules run in eval mode inside the block.
        around: The record of the block around this one.
    """

    def __init__(self, evaluating: bool, around: Preserved | None) -> None:
        self._evaluating = evaluating
        self._around = around
        self._tensors: dict[int, tuple[Tensor, Tensor, bool, Tensor | None]] = {}
        self._modules: dict[int, tuple[nn.Module, type[nn.Module], dict[str, Any]]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Remembers the present value of a tensor that the block is going to change in place."""
        if id(tensor) not in self._tensors:
            if self._around is not None:
                self._around.keep(tensor)
            saved = tensor.detach().clone()
            self._tensors[id(tensor)] = tensor, saved, tensor.requires_grad, tensor.grad

    def keep_whole(self, module: nn.Module) -> None:
        """Remembers a module and all below it: mode, buffers, and what is made at the first call, parameters or not."""
        for part in module.modules() if id(module) not in self._modules else [module]:
            self._keep_module(part)
            if self._evaluating and part.training:
                part.training = False

    def _keep_module(self, module: nn.Module) -> None:
        if id(module) in self._modules:
            return
        if self._around is not None:
            self._around.keep_whole(module)
        attributes = {name: dict(v) if name in REGISTERS else v for name, v in vars(module).items()}
        self._modules[id(module)] = module, type(module), attributes
        for buffer in module.buffers(recurse=False):
            self.keep(buffer)

    def restore(self) -> None:
        """Puts everything back."""
        for module, kind, attributes in self._modules.values():
            if type(module) is kind:  # torch's lazy modules become others, with parameters made in place: these stay
                _put_back(module, attributes)
            module.training = attributes["training"]
        with torch.no_grad():
            for tensor, saved, requires_grad, grad in self._tensors.values():
                tensor.data.copy_(saved)
                tensor.requires_grad_(requires_grad)
                tensor.grad = grad


_innermost: ContextVar[Preserved | None] = ContextVar("_innermost", default=None)


@contextmanager
def preserved(*models: Any, evaluating: bool = False, random_state: bool = True) -> Iterator[Preserved]:
    """Runs a block after which random states, param store and modules are as before, bit for bit.

    The block sees the param store as it is (unlike ``param_store.scope()``, which starts empty).

    Args:
        models: Modules to watch; others are met when they are called.
        evaluating: Whether modules run in eval mode inside the block.
        random_state: Whether random states are put back; without, the block draws from them as any sampling does.

    Yields:
        The record, on which ``keep`` announces tensors that are about to be trained in place.
    """
    store = pyro.get_param_store()
    stored = dict(store._params), dict(store._param_to_name), dict(store._constraints)
    rng = pyro.util.get_rng_state()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    around = _innermost.get()
    record = Preserved(evaluating, around)

    def watch(module: nn.Module, _: Any) -> None:
        record.keep_whole(module)

    hook = register_module_forward_pre_hook(watch)
    _innermost.set(record)
    try:
        for model in models:
            inner = pyro.poutine.unwrap(model) if callable(model) else model
            owner = getattr(inner, "__self__", inner)  # of a method
            if isinstance(owner, nn.Module):
                record.keep_whole(owner)
        yield record
    finally:
        _innermost.set(around)
        hook.remove()
        record.restore()
        store._params, store._param_to_name, store._constraints = stored
        if random_state:
            pyro.util.set_rng_state(rng)
        if random_state and cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)


def refuse_replaced(
    function: str, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], training: bool = True
) -> None:
    """Refuses a model with a module under whose name the param store holds the parameters of another.

    ``pyro.module`` goes on announcing those of the other then, so that nothing trains this one. Where it is told to,
    by ``update_module_params=True``, it hands them to this one instead, so that there is none in the second run.

    Args:
        function: Name of the function, for messages.
        model: A Pyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        training: Whether it is to be trained; else parameters of the same values, loaded into both, are as good.

    Raises:
        ValueError: There is such a module.
    """
    if not any(_DIVIDER in name for name in pyro.get_param_store()):
        return
    with preserved(model, evaluating=True), torch.no_grad(), pyro.poutine.block():
        for _ in range(2):
            with _Replaced(training) as seen:
                model(*args, **kwargs)
    if seen.names:
        name = seen.names[0]
        raise ValueError(
            f"{function}: the module that the model registers as '{name}' is not the one whose parameters the param "
            f"store holds under this name, so that it would not be trained. Forget the other before the new one is "
            f"used, pyro.clear_param_store(), or hand its parameters on: "
            f"pyro.module('{name}', module, update_module_params=True)."
        )


class _Replaced(Messenger):
    """Notes modules that are registered under names for which the param store holds other parameters, or values."""

    def __init__(self, parameters: bool) -> None:
        super().__init__()
        self.parameters = parameters
        self.names: list[str] = []

    def _pyro_post_param(self, msg: Message) -> None:
        module, divider, _ = msg["name"].partition(_DIVIDER)
        if not divider or len(msg["args"]) < 2:
            return
        own, stored = msg["args"][1], msg["value"].unconstrained()
        if own is not stored and (self.parameters or not torch.equal(own, stored)):
            self.names.append(module)


def _put_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    """Gives a module the attributes that it had, its registers in place, since others may hold them.

    Parameters alone would not do: a module that makes them at its first call notes elsewhere that it did.
    """
    now = vars(module)
    for name in REGISTERS:
        if name in attributes:
            now[name].clear()
            now[name].update(attributes[name])
    for name in set(now) - set(attributes):
        del now[name]
    now.update({name: value for name, value in attributes.items() if name not in REGISTERS})
