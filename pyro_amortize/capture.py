"""A Pyro program, recorded as one graph of tensor operations and compiled, so that its handlers run once.

``make_fx`` runs the program a last time and writes down every operation of it, the gradients' among them. What is
left are tensors in, tensors out: parameters and data are inputs, tensors from closures are read where they live.
Everything else is fixed as it was: Python numbers, branches taken, shapes.
"""

from __future__ import annotations

import operator
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor, fx
from torch.distributions import Distribution
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from pyro_amortize.parameters import preserved

OFTEN = 40
"""At which call with the same shapes a function is recorded."""
ESCAPES = ("numpy", "__array__", "tolist")
INDEXING = {getattr(torch.ops.aten, name).default for name in ("index_put", "index_put_", "_unsafe_index_put")}
INDEXING |= {torch.ops.aten.index.Tensor}
LITERAL = torch.ops.aten.lift_fresh_copy.default


class Uncapturable(Exception):
    """A program that no graph stands for; the message says why."""


class Graph:
    """A recorded program.

    Attributes:
        module: The operations; takes inputs and constants, returns a tuple of tensors.
        constants: Tensors that the program found elsewhere, buffers and closures; read and changed in place.
        num_operations: How many operations there are.
        num_values: How many numbers they compute.
    """

    def __init__(self, module: fx.GraphModule, constants: list[Tensor]) -> None:
        self.module = module
        self.constants = constants
        self.num_operations = sum(node.op == "call_function" for node in module.graph.nodes)
        self.num_values = sum(_numel(node) for node in module.graph.nodes if node.op == "call_function")
        self._run: Callable[..., Sequence[Tensor]] = module.forward  # past the hooks of modules

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
        # Callers key graphs by shapes: asserting them again takes a tenth of a small graph's time.
        options: dict[str, Any] = {"fallback_random": True, "size_asserts": False}
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


class Recorded:
    """A function that is recorded once it has been called often with tensors of the same shapes.

    Args:
        function: Of values, shape (draws, rows, dim), and of another tensor; returns shape (draws, rows), each entry
            from the values at its place alone. It is differentiable by the values.
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function
        self.calls: dict[Any, int] = {}
        self.graphs: dict[Any, Graph | None] = {}

    def __call__(self, values: Tensor, other: Tensor) -> Tensor:
        """Calls the function, or its graph."""
        key = values.shape, values.dtype, other.shape, values.requires_grad and torch.is_grad_enabled()
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] == OFTEN:
            self.graphs[key] = self._graph(values.detach().requires_grad_(key[-1]), other.detach())
        graph = self.graphs.get(key)
        if graph is None:
            return self.function(values, other)
        return _RowByRow.apply(values, other, graph) if key[-1] else graph([values, other])[0]

    def _graph(self, values: Tensor, other: Tensor) -> Graph | None:
        def run() -> list[Tensor]:
            value = self.function(values, other)
            return [value.detach(), *(torch.autograd.grad(value.sum(), [values]) if values.requires_grad else ())]

        try:
            return record(run, [values, other])
        except Uncapturable:
            return None


class _RowByRow(torch.autograd.Function):
    """A graph that returns values and their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, other: Tensor, graph: Graph) -> Tensor:
        value, gradient = graph([values, other])
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[..., None] * gradient, None, None


def record(run: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """Records what a program computes. Random states, modules and the param store are left as found.

    Args:
        run: The program; returns tensors.
        inputs: The very tensors that it works on and that may be others in another run; each an object of its own.

    Raises:
        Uncapturable: It makes Python numbers, or shapes, of values; it draws random numbers elsewhere than from torch;
            or an operation cannot be recorded.
    """
    with preserved(), _unvalidated(), warnings.catch_warnings():
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
    _number_masks(module)
    for node in module.graph.nodes:
        if _has_shape_of_values(node):
            raise Uncapturable(f"the shape of a tensor depends on values ({node.target})")
    _own_outputs(module)
    return Graph(module, _lifted(module))


@contextmanager
def _unvalidated() -> Iterator[None]:
    """Switches validation off, of expanded distributions too, which keep the flag of when they were made."""
    check = Distribution._validate_sample
    Distribution._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    try:
        with pyro.validation_enabled(False):
            yield
    finally:
        Distribution._validate_sample = check  # type: ignore[method-assign]


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
        text = "it makes a Python number or a branch of a tensor's value (.item(), float(), if)"
    else:
        text = f"{type(error).__name__}: {text}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_of_a_library(frame.filename)]
    return f"{text}, at line {frames[-1].lineno} of {frames[-1].filename}" if frames else text


def _is_of_a_library(path: str) -> bool:
    return path.startswith((*torch.__path__, *pyro.__path__, os.path.dirname(__file__), "<"))


def _has_shape_of_values(node: fx.Node) -> bool:
    """Tells whether an operation's result has a shape that hangs on values, as of ``x[mask]``."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is torch.ops.aten.index.Tensor:
        return any(_is_mask(index) for index in node.args[1])  # type: ignore[union-attr]
    return torch.Tag.dynamic_output_shape in node.target.tags


def _number_masks(module: fx.GraphModule) -> None:
    """Replaces masks that index tensors by the places that they mark, where these are the same in every run."""
    fixed: dict[fx.Node, Tensor | None] = {}
    for node in list(module.graph.nodes):
        if node.target not in INDEXING:
            continue
        indices: list[Any] = []
        for index in node.args[1]:
            value = _fixed_value(index, module, fixed) if _is_mask(index) else None
            if value is None:
                indices.append(index)
                continue
            for places in value.nonzero(as_tuple=True):
                name = f"_places{len(module._buffers)}"
                module.register_buffer(name, places)
                with module.graph.inserting_before(node):
                    indices.append(module.graph.get_attr(name))
        node.update_arg(1, indices)


def _fixed_value(node: Any, module: fx.GraphModule, known: dict[fx.Node, Tensor | None]) -> Any:
    """Returns the value of a node that hangs on no input, no random number and nothing changed in place; else None."""
    if not isinstance(node, fx.Node):
        return node
    if node not in known:
        known[node] = None
        function = node.target if isinstance(node.target, torch._ops.OpOverload) else None
        if function and not function._schema.is_mutable and torch.Tag.nondeterministic_seeded not in function.tags:
            values = [_fixed_value(parent, module, known) for parent in node.all_input_nodes]
            if all(value is not None for value in values):
                found = dict(zip(node.all_input_nodes, values, strict=True))
                args = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                known[node] = function(*args[0], **args[1])
    return known[node]


def _own_outputs(module: fx.GraphModule) -> None:
    """Makes every output a tensor of its own, to be changed in place: no input, constant, other output, or a view."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    bases: set[fx.Node] = set()
    owned = []
    for node in output.args[0]:
        base = node
        while base.op == "call_function" and _is_view(base.target):
            base = base.args[0]
        meta = node.meta.get("tensor_meta")
        if base.op != "call_function" or base in bases or (meta is not None and 0 in meta.stride):
            with module.graph.inserting_before(output):
                node = module.graph.call_function(
                    torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
        bases.add(base)
        owned.append(node)
    output.args = (tuple(owned),)


def _is_view(function: Any) -> bool:
    if isinstance(function, torch._ops.OpOverload):
        return any(result.alias_info is not None for result in function._schema.returns)
    return function is operator.getitem


def _is_mask(node: Any) -> bool:
    return isinstance(node, fx.Node) and _dtype(node) in (torch.bool, torch.uint8)


def _numel(node: fx.Node) -> int:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return 0 if shape is None else shape.numel()


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
            held = getattr(module, node.target)
            if not isinstance(held, Tensor):
                raise Uncapturable(f"it holds a {type(held).__name__} of its own")
            constants[node.target] = held.detach()
        node.replace_all_uses_with(places[node.target])
        module.graph.erase_node(node)
    module.recompile()
    return list(constants.values())
