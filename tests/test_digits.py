import math

import pandas as pd
import pytest

from pyro_amortize import digits


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (-691.2849, 0.0538, "-691.285"),
        (1234.567, 25.3, "1235"),
        (0.123456, math.nan, "0.1235"),
        (-9501.6, 0.0, "-9501.60"),
        (math.nan, 1.0, "-"),
        (math.inf, 1.0, "inf"),
        (2e-9, 1e-9, "0.000000"),
    ],
)
def test_as_many_digits_as_the_error_tells(value, se, text):
    assert digits.written(value, se) == text


def test_each_row_of_a_table_by_its_own_error():
    frame = pd.DataFrame(
        {"elbo": [-691.2849, -12345.6], "elbo_se": [0.0538, 31.0], "steps": [3, 4], "to": ["a", None]}, index=["a", "b"]
    )
    lines = digits.table(frame).splitlines()
    assert lines[1].split() == ["a", "-691.285", "0.054", "3", "a"]
    assert lines[2].split() == ["b", "-12346", "31", "4", "-"]
