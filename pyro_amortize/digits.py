"""Numbers as text: an estimate has as many digits as its standard error tells, which has two."""

from __future__ import annotations

import math

import pandas as pd

MOST_DECIMALS = 6


def written(value: float, se: float = math.nan) -> str:
    """Writes a number: with a standard error to the second digit of that, else to four digits.

    Example:
        >>> written(-691.2849, 0.0538), written(1234.567, 25.3), written(0.123456)
        ('-691.285', '1235', '0.1235')
    """
    if math.isnan(value):
        return "-"
    if not math.isfinite(value) or not math.isfinite(se) or se <= 0:
        return f"{value:.2f}" if 100 <= abs(value) < math.inf else f"{value:.4g}"
    decimals = min(MOST_DECIMALS, max(0, 1 - math.floor(math.log10(se))))
    return f"{value:.{decimals}f}"


def with_error(value: float, se: float) -> str:
    """Writes a number with its standard error.

    Example:
        >>> with_error(-691.2849, 0.0538)
        '-691.285 ± 0.054'
    """
    return f"{written(value, se)} ± {written(se, se)}"


def table(frame: pd.DataFrame) -> str:
    """Writes a table: columns with a standard error, in another one named alike with ``_se``, by the digits of that."""
    columns = {}
    for name in frame.columns:
        errors = frame.get(name if name.endswith("_se") else f"{name}_se")
        if errors is not None:
            columns[name] = [written(float(x), float(se)) for x, se in zip(frame[name], errors, strict=True)]
        elif pd.api.types.is_float_dtype(frame[name]):
            columns[name] = [written(float(x)) for x in frame[name]]
        else:
            columns[name] = ["-" if pd.isna(x) else str(x) for x in frame[name]]
    return pd.DataFrame(columns, index=frame.index).to_string()
