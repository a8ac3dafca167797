"""Progress bars, where somebody can watch them: a file that keeps all that is printed would keep a line an update."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(*args: Any, shown: bool, **options: Any) -> tqdm:
    """Makes a bar of tqdm's, which shows itself if it is to, and :func:`watched`."""
    return tqdm(*args, disable=not (shown and watched()), **options)


def watched() -> bool:
    """Tells whether what is printed to stderr goes to a terminal or a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")
