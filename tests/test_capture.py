"""Programs recorded as graphs."""

import random

import numpy as np
import pyro
import pytest
import torch
from torch import nn

from pyro_amortize.capture import Uncapturable, record
from pyro_amortize.steps import decay


def gradient(program, *inputs):
    """A program of its inputs that returns a value and its gradients."""

    def run():
        value = program(*inputs)
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    return run


class TestRecord:
    def test_a_graph_is_the_program_on_other_inputs(self):
        x, w = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
        graph = record(gradient(lambda x, w: (x * w).exp().sum(), x, w), [x, w])
        y, v = torch.randn(5), torch.randn(5)
        value, by_x, by_w = graph([y, v])
        torch.testing.assert_close(value, (y * v).exp().sum())
        torch.testing.assert_close(by_x, v * (y * v).exp())
        torch.testing.assert_close(by_w, y * (y * v).exp())

    def test_a_generator_of_the_program_s_own_is_refused(self):
        generator, x = torch.Generator(), torch.zeros(3)
        with pytest.raises(Uncapturable, match="it holds a Generator of its own"):
            record(lambda: [x + torch.randn(3, generator=generator)], [x])

    def test_tensors_from_elsewhere_are_read_where_they_live(self):
        shift, x = torch.tensor(1.0), torch.zeros(3)
        graph = record(lambda: [x + shift], [x])
        shift.fill_(5.0)
        assert graph([torch.ones(3)])[0].tolist() == [6.0, 6.0, 6.0]

    def test_draws_are_those_of_the_program(self):
        x = torch.zeros(4)

        def run():
            return [x + torch.randn(4), torch.distributions.Gamma(2.0, torch.ones(3)).sample(), torch.randperm(6)]

        graph = record(run, [x])
        torch.manual_seed(7)
        expected = run()
        torch.manual_seed(7)
        assert all(torch.equal(e, f) for e, f in zip(expected, graph([x]), strict=True))
        assert not torch.equal(graph([x])[0], graph([x])[0])

    def test_leaves_states_as_they_were(self):
        norm, x = nn.BatchNorm1d(3), torch.randn(8, 3)
        before, seeds = norm.running_mean.clone(), pyro.util.get_rng_state()["torch"]
        graph = record(lambda: [norm(x) + torch.randn(3)], [x])
        assert torch.equal(norm.running_mean, before)
        assert torch.equal(pyro.util.get_rng_state()["torch"], seeds)
        graph([x])
        assert torch.allclose(norm.running_mean, 0.1 * x.mean(0))

    def test_outputs_may_be_changed_in_place(self):
        x, w = torch.randn(4), torch.randn(4, requires_grad=True)
        both = torch.randn(4, requires_grad=True)

        def run():
            value = (x * w).sum() + (w + both).sum()
            return [x, x[:2], w.detach() + 1, *torch.autograd.grad(value, [w, both]), both.detach().expand(2, 4)]

        before, graph = x.clone(), record(run, [x, w])
        outputs = graph([x, w])
        expected = [output.clone() for output in outputs]
        for place, output in enumerate(outputs):
            output.add_(1.0)
            for other in range(place + 1, len(outputs)):
                assert torch.equal(outputs[other], expected[other])
        assert torch.equal(x, before)

    def test_masks_that_are_the_same_in_every_run(self):
        x = torch.randn(3, 3)

        def run():
            lower = torch.ones(3, 3).tril() > 0
            whole = torch.zeros(3, 3)
            whole[lower] = x[lower]
            return [x[lower], whole]

        y = torch.randn(3, 3)
        vector, matrix = record(run, [x])([y])
        assert torch.equal(matrix, y.tril())
        assert torch.equal(vector, y[torch.ones(3, 3).tril() > 0])

    @pytest.mark.parametrize(
        ("program", "reason"),
        [
            (lambda x: x * x.sum().item(), "Python number"),
            (lambda x: x if x.sum() > 0 else -x, "Python number"),
            (lambda x: x + torch.as_tensor(x.numpy()), "numpy"),
            (lambda x: x + torch.tensor(x.tolist()), "tolist"),
            (lambda x: x + random.random(), "random numbers"),
            (lambda x: x + np.random.rand(), "random numbers"),  # noqa: NPY002
            (lambda x: x[x > 0], "shape"),
            (lambda x: x.nonzero().float(), "shape"),
            (lambda x: x + undefined, "NameError"),  # noqa: F821
        ],
        ids=["item", "if", "numpy", "tolist", "random", "numpy.random", "mask", "nonzero", "mistake"],
    )
    def test_says_why_there_is_no_graph(self, program, reason):
        x = torch.randn(4)
        with pytest.raises(Uncapturable, match=reason):
            record(lambda: [program(x)], [x])

    def test_names_the_line(self):
        x = torch.randn(4)
        with pytest.raises(Uncapturable, match=r"line \d+ of .*test_capture.py"):
            record(lambda: [x * float(x.sum())], [x])

    def test_names_the_user_s_line_where_the_package_stumbles_over_it(self):
        x = torch.randn(())
        with pytest.raises(Uncapturable, match=r"line \d+ of .*test_capture.py"):
            record(lambda: [x * decay(x, 10)], [x])


class TestCompiled:
    def test_results_and_draws_are_those_of_the_graph(self):
        x = torch.randn(6, requires_grad=True)
        graph = record(gradient(lambda x: ((x + torch.randn(6)).exp() * torch.rand(6)).sum(), x), [x])
        compiled = graph.compiled([x])
        for seed in range(3):
            y = torch.randn(6)
            torch.manual_seed(seed)
            expected = graph([y])
            torch.manual_seed(seed)
            for one, other in zip(expected, compiled([y]), strict=True):
                torch.testing.assert_close(one, other)

    def test_without_a_compiler(self, monkeypatch):
        from torch._inductor import config

        x = torch.randn(7)
        graph = record(lambda: [x.sin().exp() * 3.25], [x])
        monkeypatch.setenv("CXX", "no-such-compiler")
        with config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(Uncapturable, match="compiler"):
            graph.compiled([x])
