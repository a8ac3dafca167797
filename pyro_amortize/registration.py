"""A guide's parameters in Pyro's param store: under which name, and whose the values there are.

Names tell guides of one class apart in the order in which they are first used, so that they are the same in the next
process. What the store holds under a guide's name and no guide of this process has put there was loaded, or set by
hand: that is the guide's to take. Statistics of the data stand there beside the parameters, since these mean nothing
without them.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.utils.weak import WeakIdKeyDictionary

_put: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""What guides have put into the store: for each tensor there the registration, and the tensor that it stands for."""

CODERS = ".coders.["
"""Where in a parameter's name that of its guide ends."""


class Registration:
    """The place of one guide in the param store.

    Args:
        kind: Name of the guide's class, for messages.

    Attributes:
        name: The guide's name in the store, once it has one.
        takes_loaded: Whether a fresh guide takes loaded values.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.name: str | None = None
        self.takes_loaded = True

    def update(self, base: str, tensors: Mapping[str, Tensor], fresh: bool) -> str:
        """Puts a guide's tensors into the store, and takes what was loaded there; returns the guide's name.

        Args:
            base: The name, where no other guide has it; others have ``base_1``, ``base_2``, ...
            tensors: Parameters, and buffers that are kept beside them.
            fresh: Whether the guide is neither trained nor loaded from a file.

        Raises:
            ValueError: What was loaded does not fit.
        """
        store = pyro.get_param_store()._params
        if self.name is None or any(self._is_anothers(store.get(f"{self.name}.{key}")) for key in tensors):
            self.name = self._choose(base, tensors, fresh and self.takes_loaded)
        elif fresh and self.takes_loaded and self.name != base and _loaded(base):  # after it had been named
            self.name = self._choose(base, tensors, takes=True)
        if any(held not in _put for key in tensors if (held := store.get(f"{self.name}.{key}")) is not None):
            self._warn_of_several(base, tensors)
        for key, tensor in tensors.items():
            name = f"{self.name}.{key}"
            held = store.get(name)
            if held is tensor or (held is not None and self._stands_for(held, tensor)):
                continue
            if held is not None and held not in _put:
                if held.shape != tensor.shape:
                    raise ValueError(self._misfit(str(self.name), {key: held}, {key: tensor}))
                tensor.data.copy_(held.detach())
            self._put(name, tensor)
        return self.name

    def _is_anothers(self, held: Tensor | None) -> bool:
        return held is not None and held in _put and _put[held][0]() is not self

    def _stands_for(self, held: Tensor, tensor: Tensor) -> bool:
        return held in _put and _put[held][1]() is tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        store = pyro.get_param_store()
        before = store._params.get(name)
        if before is not None:
            store._param_to_name.pop(before, None)
        # Not by the store's own methods, which put a copy of tensors that are not contiguous.
        there = tensor if tensor.requires_grad else _alias(tensor)
        store._params[name], store._constraints[name], store._param_to_name[there] = there, constraints.real, name
        _put[there] = weakref.ref(self), weakref.ref(tensor)

    def _choose(self, base: str, tensors: Mapping[str, Tensor], takes: bool) -> str:
        """Returns the first name that is not in the store; to take loaded values, the first of theirs that fits."""
        loaded = _loaded(base)
        if takes and loaded:
            fitting = [name for name in loaded if _shapes(loaded[name]) == _shapes(tensors)]
            if not fitting:
                first = next(iter(loaded))
                raise ValueError(self._misfit(first, loaded[first], tensors))
            return fitting[0]
        if takes:
            self._warn_of_others(base)
        found = _found(base)
        number = 0
        while (name := f"{base}_{number}" if number else base) in found:
            number += 1
        return name

    def _warn_of_several(self, base: str, tensors: Mapping[str, Tensor]) -> None:
        """Warns where loaded parameters of other guides than the one that this takes fit, too."""
        fitting = [name for name, values in _loaded(base).items() if _shapes(values) == _shapes(tensors)]
        if len(fitting) > 1:
            warnings.warn(
                f"{self.kind}: the param store holds loaded parameters of {len(fitting)} guides that fit, "
                f"{fitting}. This guide takes '{self.name}'. To tell guides apart, save each by "
                f"guide.save(path) and load it by {self.kind}.load(path, model); to keep one only, call "
                f"pyro.clear_param_store() before it is trained.",
                UserWarning,
                stacklevel=2,
            )

    def _warn_of_others(self, base: str) -> None:
        """Warns of a loaded guide that has another name, which is left where it is."""
        held = pyro.get_param_store()._params.items()
        others = {name.partition(CODERS)[0] for name, value in held if CODERS in name and value not in _put}
        if others:
            warnings.warn(
                f"{self.kind}: the param store holds loaded parameters of a guide '{min(others)}', which this guide, "
                f"'{base}', does not take: it starts untrained. Guides are found again by the name of their class. "
                f"Make this one of that class, or save by guide.save(path) and load by {self.kind}.load(path, model).",
                UserWarning,
                stacklevel=2,
            )

    def _misfit(self, name: str, held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str:
        there, here = _shapes(held), _shapes(tensors)
        key = next(key for key in [*here, *there] if here.get(key) != there.get(key))
        return (
            f"{self.kind}: the param store holds loaded parameters '{name}' that do not fit this guide: "
            f"'{key}' has shape {there.get(key)} there and {here.get(key)} here (None: it is not). Build the guide "
            f"with the model and options that it was trained with; or, to start afresh, call pyro.clear_param_store() "
            f"first. guide.save(path) and {self.kind}.load(path, model) keep the options too."
        )


def _found(base: str) -> dict[str, dict[str, Tensor]]:
    """Returns what the store holds under ``base``, ``base_1``, ..., in this order."""
    entry = re.compile(rf"({re.escape(base)}(?:_(\d+))?)\.(.+)")
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in pyro.get_param_store()._params.items():
        if match := entry.fullmatch(name):
            found.setdefault(match[1], {})[match[3]] = value
    return dict(sorted(found.items(), key=lambda item: int(item[0][len(base) + 1 :] or 0)))


def _loaded(base: str) -> dict[str, dict[str, Tensor]]:
    """Returns what the store holds under these names that no guide has put there."""
    return {n: values for n, values in _found(base).items() if not any(value in _put for value in values.values())}


def _alias(buffer: Tensor) -> Tensor:
    """Returns a buffer as what stands in the store: all there require gradients, as hooks on them suppose."""
    shared = buffer.detach() if buffer.is_floating_point() else buffer.detach().to(torch.get_default_dtype())
    return shared.requires_grad_()


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
