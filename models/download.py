"""Downloads from the Hugging Face Hub that fail at once where there is no network."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator

from huggingface_hub import constants

PATIENCE = 3.0  # seconds to wait for the Hub's first answer


@contextlib.contextmanager
def cache_only_if_unreachable() -> Iterator[None]:
    """Where the Hub does not answer, its client looks in its cache only; else it would repeat its request for 50 s."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not answers(constants.ENDPOINT)
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def answers(url: str) -> bool:
    """Whether a server answers within `PATIENCE`, whatever it says; through the environment's proxies."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True  # it answers
    except OSError:
        return False
    return True
