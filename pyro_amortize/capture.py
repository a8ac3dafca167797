"""A Pyro program, recorded as one graph of tensor operations and compiled, so that its handlers run once.

``make_fx`` runs the program a last time and writes down every operation of it, the gradients' among them. What is
left are tensors in, tensors out: parameters and data are inputs, tensors from closures are read where they live.
Everything else is fixed as it was: Python numbers, branches taken, shapes.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_amortize.parameters import preserved

ESCAPES = ("numpy", "__array__", "tolist")
LITERAL = torch.ops.aten.lift_fresh_copy.default


class Uncapturable(Exception):
    """A program that no graph stands for; the message says why."""


class Graph:
    """A recorded program.

    Attributes:
        module: The operations; takes inputs and constants, returns a tuple of tensors.
        constants: Tensors that the program found elsewhere, buffers and closures; read and changed in place.
        num_operations: How many operations there are.
    """

    def __init__(self, module: fx.GraphModule, constants: list[Tensor]) -> None:
        self.module = module
        self.constants = constants
        self.num_operations = sum(node.op == "call_function" for node in module.graph.nodes)
        self._run: Callable[..., Sequence[Tensor]] = module

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Runs it on inputs of the shapes that it was recorded with."""
        with torch.no_grad():
            return self._run(*inputs, *self.constants)

    def compiled(self, inputs: Sequence[Tensor]) -> Graph:
        """Returns this graph compiled by inductor; draws are those of the graph, from torch's generators.

        Raises:
            Uncapturable: The compiler fails, or there is none.
        """
        from torch._inductor import compile as inductor  # takes a second to import

        example: list[Any] = [*(value.detach() for value in inputs), *self.constants]
        options: dict[str, Any] = {"fallback_random": True}
        if any(value.is_cuda for value in example):
            options["triton.cudagraphs"] = True
        graph = Graph(self.module, self.constants)
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                graph._run = inductor(self.module, example, options=options)
                with preserved():
                    graph._run(*(value.clone() for value in example))  # it compiles in earnest when first run
        except Exception as error:
            raise Uncapturable(f"the compiler failed: {_first_line(error)}") from error
        return graph


def record(run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Records what a program computes. Random states, modules and the param store are left as found.

    Args:
        run: The program; returns tensors.
        inputs: The very tensors that it works on and that may be others in another run; each an object of its own.

    Raises:
        Uncapturable: It makes Python numbers, or shapes, of values; it draws random numbers elsewhere than from torch;
            or an operation cannot be recorded.
    """
    with preserved(), pyro.validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = _other_random_states()
        try:
            with _Refusing():
                module = make_fx(lambda *_: tuple(run()))(*inputs)
        except Uncapturable:
            raise
        except Exception as error:
            raise Uncapturable(_first_line(error)) from error
        if before != _other_random_states():
            raise Uncapturable("it draws random numbers from Python or numpy, not from torch")
    for node in module.graph.nodes:
        if _has_shape_of_values(node):
            raise Uncapturable(f"the shape of a tensor depends on values ({node.target})")
    return Graph(module, _lifted(module))


def _other_random_states() -> tuple[Any, ...]:
    state = pyro.util.get_rng_state()
    return state["random"], state["numpy"][1].tobytes(), state["numpy"][2:]


class _Refusing(TorchFunctionMode):
    """Refuses to take values out of tensors unseen, which a graph would hold fixed."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in ESCAPES:
            raise Uncapturable(f"it takes values out of a tensor by Tensor.{func.__name__}()")
        return func(*args, **(kwargs or {}))


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if "value out of a tracing tensor" in text or "data-dependent" in text.lower():
        return "it makes a Python number or a branch of a tensor's value (.item(), float(), if)"
    return f"{type(error).__name__}: {text}"


def _has_shape_of_values(node: fx.Node) -> bool:
    """Tells whether an operation's result has a shape that hangs on values, as of ``x[mask]``."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch.ops.aten.index.Tensor:
        indices = [index for index in node.args[1] if index is not None]  # type: ignore[union-attr]
        return any(_dtype(index) in (torch.bool, torch.uint8) for index in indices)
    return torch.Tag.dynamic_output_shape in node.target.tags


def _dtype(node: Any) -> torch.dtype | None:
    meta = node.meta.get("tensor_meta") or node.meta.get("val")
    return getattr(meta, "dtype", None)


def _lifted(module: fx.GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that a graph holds, which a compiler might take for constant; returns them.

    Literals, as of ``torch.tensor(1.0)``, stay.
    """
    constants: dict[str, Tensor] = {}
    places: dict[str, fx.Node] = {}
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1:]
    for node in list(module.graph.nodes):
        if node.op != "get_attr" or all(user.target is LITERAL for user in node.users):
            continue
        if node.target not in places:
            where = module.graph.inserting_after(last[0]) if last else module.graph.inserting_before()
            with where:
                places[node.target] = module.graph.placeholder(f"constant_{len(places)}")
            last = [places[node.target]]
            constants[node.target] = getattr(module, node.target).detach()
        node.replace_all_uses_with(places[node.target])
        module.graph.erase_node(node)
    module.recompile()
    return list(constants.values())
