"""What users pass to the functions of the package, checked alike, and named where it is wrong."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_amortize.calls import Args, Kwargs, Model, signature_of
from pyro_amortize.parameters import preserved

P = ParamSpec("P")
R = TypeVar("R")


def named(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function of the package, so that it says what to do with a keyword argument that is not its own."""
    parameters = inspect.signature(function).parameters
    options = [name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in parameters:
                raise TypeError(
                    f"{function.__name__}: {unknown('option', name, options)} Keyword arguments of the model go in "
                    f"model_kwargs={{'{name}': ...}}."
                )
        with with_rows(function.__name__):
            return function(*args, **kwargs)

    return checked


@contextmanager
def with_rows(function: str) -> Iterator[None]:
    """Runs a block, and says what Pyro's error of an empty plate means."""
    try:
        yield
    except ZeroDivisionError as error:
        if str(error) != "size cannot be zero":
            raise
        raise ValueError(
            f"{function}: a plate of the model has no elements, which Pyro does not allow: the data have no rows. Pass "
            f"one row at least, and leave calls without any out: if len(x): ..."
        ) from error


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """Says that a name is not known, which are, and which may be meant."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, 1)
    meant = f" (do you mean '{close[0]}'?)" if close else ""
    return f"{what} '{name}' is not known{meant}. Known: {', '.join(names)}."


def check_count(function: str, name: str, value: object, least: int = 1) -> None:
    """Refuses what is no whole number, or too small a one."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{function}: {name}={value!r}. Expected a whole number, {least} or more.")


def check_options(function: str, option: str, given: Mapping[str, Any] | None, known: Iterable[str]) -> dict[str, Any]:
    """Returns options that are passed on to another function, as ``svi={...}``; refuses others."""
    if not isinstance(given, (Mapping, type(None))):
        raise ValueError(f"{function}: {option}={given!r}. Expected a dict of options, as {option}={{'seed': 0}}.")
    known = list(known)
    for name in given or {}:
        if name not in known:
            raise ValueError(f"{function}: {option}={{'{name}': ...}}: {unknown('option', name, known)}")
    return dict(given or {})


def check_model(function: str, model: Any, args: Args, kwargs: Any) -> dict[str, Any]:
    """Refuses a model that is none, or whose arguments do not fit; returns its keyword arguments."""
    if not isinstance(kwargs, (Mapping, type(None))):
        raise ValueError(
            f"{function}: model_kwargs is a {type(kwargs).__name__}. Expected a dict of the model's keyword arguments, "
            f"as model_kwargs={{'y': y}}."
        )
    remedy = (
        "Pass its positional arguments as they are, its keyword arguments in model_kwargs={...}, and options by name"
    )
    check_arguments(function, model, args, kwargs or {}, remedy)
    return dict(kwargs or {})


def check_arguments(function: str, model: Any, args: Args, kwargs: Mapping[str, Any], remedy: str) -> None:
    """Refuses a model that is none, or whose arguments do not fit."""
    refuse_guide(function, model)
    if not callable(model):
        raise ValueError(f"{function}: the model is a {type(model).__name__}. Expected a callable Pyro model.")
    signature = signature_of(model)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"{function}: the arguments do not fit the model: {error}. It takes {signature}. {remedy}."
        ) from None


def check_pair(
    function: str, model: Any, guide: Any, args: Args, kwargs: Any, trained: bool = False
) -> tuple[Model, dict[str, Any]]:
    """Refuses a model and guide that are swapped or missing; returns the guide, and the model's keyword arguments.

    The guide may be a fit, which stands for its guide. One that has to be ``trained`` is refused while it has no plan.
    """
    refuse_guide(function, model, guide)
    if not callable(guide) and callable(getattr(guide, "guide", None)):
        guide = guide.guide
    if not callable(guide) or guide is model:
        got = "the model again" if guide is model else f"of type {type(guide).__name__}"
        raise ValueError(
            f"{function}: the second argument is {got}; expected the model's guide. Write "
            f"guide = AutoAmortizedNormal(model), then {function}(model, guide, ...)."
        )
    kwargs = check_model(function, model, args, kwargs)
    if trained and _is_guide(guide) and getattr(guide, "plan", guide) is None:
        raise RuntimeError(f"{function}: the guide has no parameters yet. Train it first: fit_svi(model, guide, ...).")
    if observes(guide, args, kwargs) and not observes(model, args, kwargs):
        raise ValueError(
            f"{function}: the first argument observes no data, but the second does: the model comes first. Write "
            f"{function}(model, guide, ...)."
        )
    return guide, kwargs


def check_given(function: str, given: Any, known: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Returns the values at which latents are held; refuses names that are no latents, and values of other shapes.

    Args:
        function: Name of the function, for messages.
        given: The values.
        known: For each latent a value of its shape and dtype; None where there is none.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{function}: given={given!r}. Expected a dict from latent site to its value, as "
            f"given={{'{next(iter(known), 'theta')}': torch.tensor(0.0)}}."
        )
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{function}: given={{'{name}': ...}}: {unknown('latent', name, known)}")
        own = known[name]
        values[name] = torch.as_tensor(value) if own is None else torch.as_tensor(value, dtype=own.dtype)
        if own is not None and values[name].shape != own.shape:
            raise ValueError(
                f"{function}: given={{'{name}': ...}} has shape {tuple(values[name].shape)}, but site '{name}' has "
                f"shape {tuple(own.shape)}. Pass a value of that shape: torch.full({tuple(own.shape)}, ...)."
            )
    return values


def _is_guide(program: Any) -> bool:
    return isinstance(poutine.unwrap(program) if callable(program) else program, (AutoGuide, GuideMessenger))


def refuse_guide(function: str, model: Any, guide: Any = None) -> None:
    """Refuses a guide in the model's place."""
    if _is_guide(model):
        call = f"{function}(model, ...)" if guide is None else f"{function}(model, guide, ...)"
        raise ValueError(
            f"{function}: the first argument is a guide, {type(poutine.unwrap(model)).__name__}; expected the model. "
            f"Write {call}."
        )


def observes(program: Model, args: Args, kwargs: Kwargs) -> bool:
    """Tells whether a program observes data, as models do and guides do not, though some of Pyro's run the model."""
    if _is_guide(program):
        return False
    with preserved(program, evaluating=True), torch.no_grad(), poutine.block():
        trace = poutine.trace(program).get_trace(*args, **kwargs)
    return any(
        site["type"] == "sample"
        and site["is_observed"]
        and not (site_is_subsample(site) or site_is_factor(site) or site["infer"].get("_deterministic"))
        for site in trace.nodes.values()
    )
