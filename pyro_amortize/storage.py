"""What a guide and its model have learnt, as plain data: written to a file, and read from it."""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyro
import pyro.distributions.constraints as constraints
import torch
from pyro.params.param_store import _MODULE_NAMESPACE_DIVIDER as _DIVIDER
from pyro.params.param_store import module_from_param_with_module_name
from torch import Tensor, nn

from pyro_amortize.calls import layers
from pyro_amortize.encoders import MLP, Constant, DeepSets, Recurrent, Table, Window


def write(path: str | os.PathLike[str], guide: nn.Module, options: Mapping[str, Any], model: dict[str, Any]) -> None:
    """Writes a guide with its options, and what :func:`model_state` returned."""
    codes = {name: encode_option(value) for name, value in options.items()}
    torch.save({"guide": guide.state_dict(), "options": codes, "model": model}, path)


def read(kind: str, path: str | os.PathLike[str], map_location: Any) -> dict[str, Any]:
    """Reads what :func:`write` wrote.

    Raises:
        ValueError: Something else wrote it.
    """
    if callable(path):
        raise ValueError(f"{kind}.load: the path comes first, then the model: {kind}.load(path, model).")
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(_not_a_guide(kind, path)) from error
    if not (isinstance(state, dict) and {"guide", "options", "model"} <= set(state)):
        raise ValueError(_not_a_guide(kind, path))
    return state


def _not_a_guide(kind: str, path: str | os.PathLike[str]) -> str:
    return (
        f"{kind}.load: '{path}' is no file that guide.save(path) wrote. A param store is loaded by "
        f"pyro.get_param_store().load(path), the state of a guide by guide.load_state_dict(torch.load(path))."
    )


def options_of(kind: str, codes: Mapping[str, dict[str, Any]], given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a saved guide; those of the user's own must be among the given ones.

    Raises:
        ValueError: Such an option is missing.
    """
    options = dict(given)
    for name, code in codes.items():
        if name not in given and "own" in code:
            raise ValueError(
                f"{kind}.load: the guide was made with {name}={code['own']}, of your own. Pass it again: "
                f"{kind}.load(path, model, {name}=...)."
            )
        if name not in given:
            options[name] = decode_option(code)
    return options


def encode_option(value: Any) -> dict[str, Any]:
    """Writes an option as plain data; one of the user's own is only named."""
    if isinstance(value, dict):
        codes = {key: encode_option(item) for key, item in value.items()}
        own = [f"{{'{key}': {code['own']}}}" for key, code in codes.items() if "own" in code]
        return {"own": own[0]} if own else {"dict": codes}
    if isinstance(value, MLP) and hasattr(nn, value.activation.__name__):
        return {"MLP": [list(value.hidden_dims), value.activation.__name__]}
    if isinstance(value, DeepSets) and hasattr(nn, value.activation.__name__):
        return {"DeepSets": [list(value.hidden_dims), list(value.phi_dims), value.activation.__name__]}
    if isinstance(value, (Window, Recurrent)) and hasattr(nn, value.activation.__name__) and value.network is None:
        fields = {**vars(value), "hidden_dims": list(value.hidden_dims), "activation": value.activation.__name__}
        return {type(value).__name__: fields}
    if isinstance(value, (Table, Constant)):
        return {"kind": type(value).__name__}
    if value is None or isinstance(value, (str, int, float, list, tuple)):
        return {"plain": list(value) if isinstance(value, tuple) else value}
    return {"own": getattr(value, "__name__", type(value).__name__)}


def decode_option(code: dict[str, Any]) -> Any:
    """Makes an option from what :func:`encode_option` returned."""
    if "dict" in code:
        return {key: decode_option(item) for key, item in code["dict"].items()}
    if "MLP" in code:
        hidden_dims, activation = code["MLP"]
        return MLP(tuple(hidden_dims), getattr(nn, activation))
    if "DeepSets" in code:
        hidden_dims, phi_dims, activation = code["DeepSets"]
        return DeepSets(tuple(hidden_dims), tuple(phi_dims), getattr(nn, activation))
    for kind in (Window, Recurrent):
        if kind.__name__ in code:
            fields = code[kind.__name__]
            return kind(**{**fields, "activation": getattr(nn, fields["activation"])})
    if "kind" in code:
        return {"Table": Table, "Constant": Constant}[code["kind"]]()
    return code["plain"]


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
