"""A small bundle, made once."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.qat.bundle.small import Made, make_bundle  # noqa: E402


@pytest.fixture(scope="session")
def made() -> Made:
    return make_bundle()
