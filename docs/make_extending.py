"""Writes the examples to docs/extending.md and docs/training-loops.md, each between its markers.

Run python docs/make_extending.py.
"""

import re
from pathlib import Path

DOCS = Path(__file__).parent
EXAMPLES = {"extending.md": "examples", "training-loops.md": "loops"}  # a page, and the folder of its examples


def page(name: str) -> str:
    """A page with every example as it is now."""

    def filled(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n```python\n{(DOCS / EXAMPLES[name] / match[1]).read_text()}```\n"

    return re.sub(r"<!-- (\w+\.py) -->\n```python\n.*?```\n", filled, (DOCS / name).read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    for name in EXAMPLES:
        (DOCS / name).write_text(page(name))
