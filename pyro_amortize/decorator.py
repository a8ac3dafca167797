"""The front door: a model that carries its own amortized guide."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, overload

from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_amortize.arguments import unknown
from pyro_amortize.calls import Model
from pyro_amortize.compare import METHODS, Comparison, by_label, compare_inference
from pyro_amortize.fit import SVIFit, fit_svi
from pyro_amortize.gap import GapReport, amortization_gap
from pyro_amortize.guides import AutoAmortized, guide_apart
from pyro_amortize.posterior import Posterior

GUIDE_OPTIONS = tuple(inspect.signature(AutoAmortized).parameters)[1:]


class AmortizedModel(PyroModule):
    """A Pyro model with an amortized guide; made by :func:`amortize`.

    It is the model still: it has the signature, the attributes, the parameters and the ``state_dict`` of what it wraps,
    and it is called, traced and trained like that. The trained guide is saved by ``model.guide.save(path)``.
    """

    def __init__(self, model: Model, guide_options: dict[str, Any]) -> None:
        super().__init__()
        state = self.__dict__  # not by attributes, which would make submodules of model and guide
        state["__wrapped__"], state["_guide_options"], state["_guide"] = model, guide_options, None
        for name in functools.WRAPPER_ASSIGNMENTS:
            if hasattr(model, name):
                state[name] = getattr(model, name)
        state["__signature__"] = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
        if isinstance(model, nn.Module):
            for part in ("_parameters", "_buffers", "_modules"):
                state[part] = model.__dict__[part]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        return self.__wrapped__(*args, **kwargs)

    @property
    def guide(self) -> AutoAmortized:
        """The guide, made when first asked for; not a submodule."""
        if self.__dict__["_guide"] is None:
            self.__dict__["_guide"] = (AutoAmortized(self, **self.__dict__["_guide_options"]),)
        return self.__dict__["_guide"][0]

    def fit(self, *args: Any, **options: Any) -> SVIFit:
        """Trains guide and model: :func:`~pyro_amortize.fit.fit_svi`."""
        return fit_svi(self, self.guide, *args, **options)

    def _trained(self, what: str) -> AutoAmortized:
        """Returns the guide; refuses one that has no parameters yet."""
        if self.guide.plan is None:
            raise RuntimeError(
                f"{what}: the model has not been fitted yet, so its guide has no parameters. Train it first: "
                f"model.fit(...), with the model's arguments."
            )
        return self.guide

    def posterior(self, *args: Any, **kwargs: Any) -> Posterior:
        """Returns the guide's answer for these data: ``guide.posterior``."""
        return self._trained("posterior").posterior(*args, **kwargs)

    def predictive(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Draws latents and replicated observations: ``guide.predictive``."""
        return self._trained("predictive").predictive(*args, **options)

    def gap(self, *args: Any, **options: Any) -> GapReport:
        """Measures what amortizing cost on these data: :func:`~pyro_amortize.gap.amortization_gap`."""
        return amortization_gap(self, self._trained("gap"), *args, **options)

    def compare(self, *args: Any, **options: Any) -> Comparison:
        """Compares methods of inference: :func:`~pyro_amortize.compare.compare_inference`.

        The method "amortized" is a new guide with the options of this model's.
        """
        methods = options.pop("methods", METHODS)
        fresh = {
            label: guide_apart(self, **self.__dict__["_guide_options"]) if what == "amortized" else what
            for label, what in by_label(methods).items()
        }
        return compare_inference(self, *args, methods=fresh, **options)

    def train(self, mode: bool = True) -> AmortizedModel:
        """Sets the mode of the model."""
        super().train(mode)
        if isinstance(self.__wrapped__, nn.Module):
            self.__wrapped__.train(mode)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        model = self.__dict__.get("__wrapped__")
        if isinstance(model, nn.Module):
            setattr(model, name, value)
        if not isinstance(model, nn.Module) or name in self.__dict__:
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        model = self.__dict__.get("__wrapped__")
        if model is not None and name not in self.__dict__ and hasattr(model, name):
            return getattr(model, name)
        return super().__getattr__(name)

    def __reduce__(self) -> Any:
        if isinstance(self.__wrapped__, nn.Module):
            return _again, (self.__wrapped__, self.__dict__["_guide_options"], self.__dict__["_guide"])
        return self.__qualname__


def _again(model: nn.Module, guide_options: dict[str, Any], guide: Any) -> AmortizedModel:
    again = AmortizedModel(model, guide_options)
    again.__dict__["_guide"] = guide
    return again


@overload
def amortize(model: Model, **guide_options: Any) -> AmortizedModel: ...
@overload
def amortize(model: None = None, **guide_options: Any) -> Callable[[Model], AmortizedModel]: ...
def amortize(model: Model | None = None, **guide_options: Any) -> Any:
    """Gives a model its own amortized guide; a decorator, bare or with the options of ``AutoAmortized``.

    Args:
        model: A Pyro model: a function, or an instance of a module.
        guide_options: Options of :class:`~pyro_amortize.guides.AutoAmortized`.

    Returns:
        The model still, with ``guide``, ``fit``, ``posterior``, ``predictive``, ``gap`` and ``compare``.

    Raises:
        TypeError: A class was decorated, or an option is not known.

    Example:
        >>> @amortize(encoder=MLP((16,)))
        ... def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> fit = model.fit(torch.randn(100), num_steps=200, seed=0, progress=False)
        >>> model.posterior(torch.randn(5)).mean["z"].shape
        torch.Size([5])
    """
    for name in guide_options:
        if name not in GUIDE_OPTIONS:
            raise TypeError(f"amortize: {unknown('option', name, GUIDE_OPTIONS)}")
    if model is None:
        return functools.partial(amortize, **guide_options)
    if inspect.isclass(model):
        raise TypeError(
            f"amortize: {model.__name__} is a class; a guide belongs to an instance. Write "
            f"model = amortize({model.__name__}(...))."
        )
    if not callable(model):
        raise TypeError(f"amortize: expected a Pyro model, got a {type(model).__name__}.")
    return AmortizedModel(model, guide_options)
