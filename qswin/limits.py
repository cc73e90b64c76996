"""By how much the user multiplies the limits on what files from elsewhere ask for. It imports nothing of the project's.

The environment variable QSWIN_LIMITS says it: QSWIN_LIMITS=4 allows models four times as large.
"""

import math
import os

VARIABLE = "QSWIN_LIMITS"
MORE = f"the environment variable {VARIABLE}=2 doubles the limits"


def scale() -> float:
    """What the environment variable says; 1 where it is not set. Raises ValueError for what is not such a number."""
    text = os.environ.get(VARIABLE, "1")
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < 1e6:
        raise ValueError(f"{VARIABLE}={text!r} in the environment is not a number above 0 and below 10^6")
    return found
