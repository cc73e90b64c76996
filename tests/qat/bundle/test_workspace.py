"""Buffers that are needed at the same time never share bytes, and others do."""

from hypothesis import given
from hypothesis import strategies as st

from qswin.qat.bundle.contents import ALIGNMENT
from qswin.qat.bundle.format import aligned
from qswin.qat.bundle.workspace import Lifetime, plan_workspace


def lifetimes():
    buffer = st.tuples(st.integers(1, 5000), st.integers(0, 12), st.integers(0, 6))
    return st.lists(buffer, max_size=20).map(lambda all_: [Lifetime(s, f, f + more) for s, f, more in all_])


@given(lifetimes())
def test_buffers_that_live_together_lie_apart(buffers):
    offsets, whole = plan_workspace(dict(enumerate(buffers)))
    for now in range(20):
        used: set[int] = set()
        for index, buffer in enumerate(buffers):
            if buffer.first <= now <= buffer.last:
                taken = set(range(offsets[index], offsets[index] + buffer.size))
                assert not used & taken
                used |= taken
        assert all(byte < whole for byte in used)
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())


def test_a_chain_needs_two_buffers():
    """Each launch reads what the one before it wrote."""
    chain = {index: Lifetime(1000, index, index + 1) for index in range(50)}
    offsets, whole = plan_workspace(chain)
    assert whole == 2 * aligned(1000) and set(offsets.values()) == {0, aligned(1000)}


def test_no_buffers_need_no_workspace():
    assert plan_workspace({}) == ({}, 0)
