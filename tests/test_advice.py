"""What a gap report says to do."""

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_amortize import plan_amortization
from pyro_amortize.advice import advise


@pytest.mark.parametrize(("width", "wider"), [(0, 256), (64, 256), (256, 512), (400, 800)])
def test_a_wider_encoder_is_wider_than_what_there_is(width, wider):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    plan = plan_amortization(model, torch.randn(5))
    gap = pd.DataFrame({"total": [1.0], "total_se": [0.01]})
    per_row, blocks = gap.set_axis(["amortization_gap"]), gap.set_axis(["data"])
    (text,) = advise(per_row, blocks, plan, {}, None, None, {"data": width})
    assert f"encoder={{'data': MLP(({wider}, {wider}))}}" in text
