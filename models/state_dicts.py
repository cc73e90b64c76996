"""Names of one layout as those of another."""

import re
from collections.abc import Iterable


def rename(name: str, renames: Iterable[tuple[str, str]]) -> str:
    """The name after every (pattern, replacement), in order; patterns are regular expressions, searched anywhere."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name
