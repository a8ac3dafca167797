"""Arguments by name, however they are passed."""

from collections import OrderedDict, namedtuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import nn

from pyro_amortize.calls import Call, signature_of

Pair = namedtuple("Pair", ["left", "right"])


def plain(x, y=None, *, scale=1.0):
    return x, y, scale


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((1, 2), {"scale": 3}), ((1,), {"y": 2, "scale": 3}), ((), {"scale": 3, "y": 2, "x": 1})],
    ids=["positional", "mixed", "keyword"],
)
def test_leaves_are_named_alike_however_passed(args, kwargs):
    assert Call(plain, args, kwargs).leaves == {"x": 1, "y": 2, "scale": 3}


def test_defaults_are_leaves():
    assert Call(plain, (1,), {}).leaves == {"x": 1, "y": None, "scale": 1.0}


def test_containers_are_opened():
    call = Call(plain, ({"a": 1, "b": [2, (3,)]},), {"y": Pair(4, 5)})
    assert call.leaves == {
        "x['a']": 1,
        "x['b'][0]": 2,
        "x['b'][1][0]": 3,
        "y[0]": 4,
        "y[1]": 5,
        "scale": 1.0,
    }


def test_replacing_leaves_rebuilds_containers_and_leaves_the_originals():
    batch = OrderedDict(a=1, b=[2, (3,)])
    pair = Pair(4, 5)
    call = Call(plain, (batch,), {"y": pair})
    args, kwargs = call.replaced({"x['b'][1][0]": 30, "y[0]": 40, "scale": 7})
    x, y, scale = plain(*args, **kwargs)
    assert x == {"a": 1, "b": [2, (30,)]}
    assert isinstance(x, OrderedDict)
    assert y == Pair(40, 5)
    assert isinstance(y, Pair)
    assert scale == 7
    assert batch == {"a": 1, "b": [2, (3,)]}
    assert pair == Pair(4, 5)


def test_variadic_arguments():
    def model(first, *rest, **options):
        return first, rest, options

    call = Call(model, (1, 2, 3), {"left": 4, "right": {"in": 5}})
    assert call.leaves == {"first": 1, "rest[0]": 2, "rest[1]": 3, "left": 4, "right['in']": 5}
    args, kwargs = call.replaced({"rest[1]": 30, "left": 40})
    assert model(*args, **kwargs) == (1, (2, 30), {"left": 40, "right": {"in": 5}})


def test_tensors_are_the_leaves_that_are():
    x = torch.ones(2)
    assert list(Call(plain, (x, [x, 1]), {}).tensors) == ["x", "y[0]"]


class Net(nn.Module):
    def forward(self, x, flag=False):
        return x

    def model(self, data):
        return data


class PyroNet(PyroModule):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("model", "leaves"),
    [
        (Net(), {"x": 1, "flag": False}),
        (PyroNet(), {"x": 1}),
        (Net().model, {"data": 1}),
        (poutine.scale(plain, scale=0.5), {"x": 1, "y": None, "scale": 1.0}),
        (pyro.condition(poutine.mask(Net(), mask=True), data={}), {"x": 1, "flag": False}),
        (poutine.block(PyroNet()), {"x": 1}),
        (lambda x: x, {"x": 1}),
    ],
    ids=["module", "pyro-module", "method", "handler", "handlers-on-module", "handler-on-pyro-module", "lambda"],
)
def test_signatures_are_found_below_handlers_and_modules(model, leaves):
    assert Call(model, (1,), {}).leaves == leaves


def test_handlers_as_decorators():
    @poutine.scale(scale=0.5)
    def model(x):
        return pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    assert Call(model, (1,), {}).leaves == {"x": 1}


def test_a_signature_of_its_own_is_kept():
    net = Net()
    net.__signature__ = signature_of(plain)
    assert list(signature_of(net).parameters) == ["x", "y", "scale"]
    assert list(signature_of(Net()).parameters) == ["x", "flag"]


def test_arguments_that_do_not_fit_the_signature_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        Call(plain, (1,), {"z": 2})
