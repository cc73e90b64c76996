"""matplotlib, where it is installed."""

from typing import Any


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files. Raises ValueError where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install matplotlib") from error
    return pyplot
