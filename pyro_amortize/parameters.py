"""A model's own parameters and state: left as found, and carried along when a guide is saved.

They belong to the user. Looking at a model, judging it and fitting references to it all happen inside
:func:`preserved`; training the model itself is the business of ``fit_svi`` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import pyro.distributions.constraints as constraints
import torch
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER as _DIVIDER
from pyro.params.param_store import module_from_param_with_module_name
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_amortize.calls import layers

REGISTERS = ("_parameters", "_buffers", "_modules", "_pyro_params", "_pyro_samples")


class Preserved:
    """What is put back at the end of a :func:`preserved` block."""

    def __init__(self, evaluating: bool) -> None:
        self._evaluating = evaluating
        self._tensors: dict[int, tuple[Tensor, Tensor, bool, Tensor | None]] = {}
        self._modules: dict[int, tuple[nn.Module, type[nn.Module], dict[str, Any]]] = {}

    def keep(self, tensor: Tensor) -> None:
        """Remembers the present value of a tensor that the block is going to change in place."""
        if id(tensor) not in self._tensors:
            saved = tensor.detach().clone()
            self._tensors[id(tensor)] = tensor, saved, tensor.requires_grad, tensor.grad

    def keep_module(self, module: nn.Module) -> None:
        """Remembers a module's own attributes: mode, buffers, and what is made at the first call, parameters or not."""
        if id(module) not in self._modules:
            attributes = {name: dict(v) if name in REGISTERS else v for name, v in vars(module).items()}
            self._modules[id(module)] = module, type(module), attributes
            for buffer in module.buffers(recurse=False):
                self.keep(buffer)
        if self._evaluating and module.training:
            module.training = False

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
    record = Preserved(evaluating)

    def watch(module: nn.Module, _: Any) -> None:
        record.keep_module(module)

    hook = register_module_forward_pre_hook(watch)
    try:
        for model in models:
            inner = pyro.poutine.unwrap(model) if callable(model) else model
            owner = getattr(inner, "__self__", inner)  # of a method
            for module in owner.modules() if isinstance(owner, nn.Module) else ():
                record.keep_module(module)
        yield record
    finally:
        hook.remove()
        record.restore()
        store._params, store._param_to_name, store._constraints = stored
        if random_state:
            pyro.util.set_rng_state(rng)
        if random_state and cuda_rng:
            torch.cuda.set_rng_state_all(cuda_rng)


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


def model_state(model: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
    """Returns what a model has learnt, as plain data that ``torch.load(weights_only=True)`` reads.

    Args:
        model: The model; if it is a module, its whole ``state_dict`` is taken.
        names: Its sites in the param store. Those that ``pyro.module`` made are saved module by module, with buffers.

    Raises:
        NotImplementedError: A module cannot be found from the model, or a constraint is no plain data.
    """
    store = pyro.get_param_store()
    names = [name for name in names if name in store]
    own = _values(model) if isinstance(model, nn.Module) else {}
    owned = {id(p) for p in model.parameters()} if isinstance(model, nn.Module) else set()
    modules, params = {}, {}
    for name in names:
        value = store._params[name]
        if id(value) in owned:
            continue
        if _DIVIDER in name:
            registered = module_from_param_with_module_name(name)
            modules[registered] = _values(_registered_module(model, registered, _shapes(store, names, registered)))
        else:
            params[name] = {"value": value.detach().clone(), "constraint": _encode(name, store._constraints[name])}
    return {"own": own, "modules": modules, "params": params}


def load_model_state(model: Callable[..., Any], state: dict[str, Any]) -> None:
    """Puts what :func:`model_state` returned into the model, the modules it registers, and the param store."""
    if isinstance(model, nn.Module):
        model.load_state_dict(state["own"])
    for registered, values in state["modules"].items():
        shapes = {name: value.shape for name, value in values.items()}
        _registered_module(model, registered, shapes).load_state_dict(values)
    store = pyro.get_param_store()
    for name, param in state["params"].items():
        if name in store and store._params[name].shape == param["value"].shape:
            store._params[name].data.copy_(param["value"])
        else:
            constraint = _decode(param["constraint"])
            if name in store:
                del store[name]
            store.setdefault(name, torch.distributions.transform_to(constraint)(param["value"]), constraint)


def _values(module: nn.Module) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in module.state_dict().items()}


def _shapes(store: Any, names: Iterable[str], registered: str) -> dict[str, torch.Size]:
    prefix = registered + _DIVIDER
    return {name[len(prefix) :]: store._params[name].shape for name in names if name.startswith(prefix)}


def _registered_module(model: Callable[..., Any], registered: str, shapes: dict[str, torch.Size]) -> nn.Module:
    """Finds the module behind ``pyro.module(registered, module)`` among those the model can reach."""
    fits: dict[int, tuple[bool, nn.Module]] = {}
    for name, module in _reachable_modules(model):
        held = {n: v.shape for n, v in module.state_dict().items()}
        trained = {n: p.shape for n, p in module.named_parameters() if p.requires_grad}
        if held == shapes or trained == shapes:
            called_so = name.rpartition(".")[2] == registered or fits.get(id(module), (False,))[0]
            fits[id(module)] = called_so, module
    found = [module for called_so, module in fits.values() if called_so] or [module for _, module in fits.values()]
    if len(found) == 1:
        return found[0]
    raise NotImplementedError(
        f"AutoAmortized.save and load: pyro.module('{registered}', ...) registers a module that cannot be told apart "
        f"among those the model reaches ({len(found)} fit). Make the model a PyroModule that holds it as "
        f"self.{registered.replace('.', '_')}."
    )


def _reachable_modules(model: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    for program in layers(model):
        owner = getattr(program, "__self__", program)
        roots: dict[str, Any] = {"": owner, **getattr(owner, "__dict__", {})}
        function = getattr(program, "__func__", program)
        if inspect.isfunction(function):
            used = inspect.getclosurevars(function)
            roots |= {**used.globals, **used.nonlocals}
        for root, value in roots.items():
            if isinstance(value, nn.Module):
                yield from value.named_modules(prefix=root)


def _encode(name: str, constraint: Any) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for key, value in vars(constraint).items():
        if isinstance(value, constraints.Constraint):
            options[key] = _encode(name, value)
        elif isinstance(value, (int, float, Tensor)):
            options[key] = value
        else:
            raise NotImplementedError(
                f"AutoAmortized.save: parameter '{name}' has the constraint {constraint!r}, which cannot be written "
                f"as plain data. Save it apart: pyro.get_param_store().save(path)."
            )
    return {"type": type(constraint).__name__, "options": options}


def _decode(code: dict[str, Any]) -> Any:
    where = constraints if hasattr(constraints, code["type"]) else torch.distributions.constraints
    cls = getattr(where, code["type"])
    constraint = cls.__new__(cls)
    constraint.__dict__.update({k: _decode(v) if isinstance(v, dict) else v for k, v in code["options"].items()})
    return constraint
