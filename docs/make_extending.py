"""Writes the examples of docs/examples to docs/extending.md, each between its markers: python docs/make_extending.py"""

import re
from pathlib import Path

PAGE = Path(__file__).with_name("extending.md")
EXAMPLES = Path(__file__).with_name("examples")


def page() -> str:
    """The page with every example as it is now."""

    def filled(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n```python\n{(EXAMPLES / match[1]).read_text()}```\n"

    return re.sub(r"<!-- (\w+\.py) -->\n```python\n.*?```\n", filled, PAGE.read_text(), flags=re.DOTALL)


if __name__ == "__main__":
    PAGE.write_text(page())
