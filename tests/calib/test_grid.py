"""Number formats: NumPy and torch round alike, and what is registered is found."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qswin.calib import grid
from qswin.calib.grid import FP8, INT8, UINT8, IntegerGrid, grid_of, register_grid

values = hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-300, 300, width=32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_are_twos_complement_and_weights_leave_the_lowest_out(bits):
    wide, narrow = grid_of(f"int{bits}"), grid_of(f"int{bits}").of_weights
    assert (wide.qmin, wide.qmax) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert (narrow.qmin, narrow.qmax, narrow.name, narrow.bits) == (-wide.qmax, wide.qmax, wide.name, bits)
    assert narrow.of_weights == narrow
    assert (wide.onnx_type, wide.torch_dtype, wide.saturates) == ("INT8", "int8", bits == 8)


@given(values, st.integers(2, 8), st.booleans())
def test_the_nearest_level_is_the_nearest_of_all(x, bits, of_weights):
    found = grid_of(f"int{bits}").of_weights if of_weights else grid_of(f"int{bits}")
    levels = np.arange(found.qmin, found.qmax + 1)
    nearest = found.nearest(x)
    assert np.isin(nearest, levels).all()
    assert (np.abs(nearest - x) == np.abs(levels[:, None] - x).min(axis=0)).all()
    assert np.array_equal(found.nearest(torch.from_numpy(x)).numpy(), nearest)
    codes = found.codes(x)
    assert codes.dtype == np.int8 and (codes == nearest).all()


def test_ties_go_to_the_even_level():
    assert INT8.nearest(np.array([-2.5, -1.5, 0.5, 1.5, 127.5, -128.5])).tolist() == [-2, -2, 0, 2, 127, -128]


def test_the_scale_is_amax_over_the_highest_level():
    assert INT8.scale(254.0) == 2.0 and grid_of("int4").scale(torch.tensor([7.0, 14.0])).tolist() == [1, 2]


def test_a_format_from_outside_is_found_by_name(monkeypatch):
    monkeypatch.setattr(grid, "_GRIDS", dict(grid._GRIDS))
    ternary = IntegerGrid("ternary", 2, -1, 1)
    register_grid(ternary)
    register_grid(dataclasses.replace(ternary))  # the same again
    assert grid_of("ternary") is ternary and ternary.of_weights is ternary
    with pytest.raises(ValueError, match="'ternary' is already registered"):
        register_grid(dataclasses.replace(ternary, bits=3))
    with pytest.raises(ValueError, match="'ternary' are not stored"):
        ternary.codes(np.zeros(3))


def test_an_unknown_format_lists_the_names():
    with pytest.raises(ValueError, match="format 'int9' is not known; choose int2, int3, .*int8"):
        grid_of("int9")


def test_fp8_is_torchs_cast_saturated():
    """Bit by bit, at every level, halfway between levels, next to these, and beyond the largest; ties go to even."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = codes[codes.isfinite()].unique()
    halfway = (levels[1:] + levels[:-1]) / 2
    x = torch.cat(
        [levels, halfway, torch.nextafter(halfway, torch.tensor(1e9)), torch.tensor([460.0, 464.0, 465.0, 1e9])]
    )
    x = torch.cat([x, -x])
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert torch.equal(FP8.nearest(x), expected)
    assert np.array_equal(FP8.nearest(x.numpy()), expected.numpy())
    assert FP8.round(torch.tensor([464.0, 465.0, -1e9])).tolist() == [448.0, 465.0, -1e9]
    assert FP8.codes(x.numpy()).view(np.uint8).tolist() == expected.to(torch.float8_e4m3fn).view(torch.uint8).tolist()


@given(hnp.arrays(np.float32, st.integers(1, 50), elements=st.floats(-600, 600, width=32)))
def test_fp8_is_the_nearest_of_all_levels(x):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    levels = codes[codes.isfinite()].numpy().astype(np.float64)
    nearest = FP8.nearest(x.astype(np.float64))
    assert (np.abs(nearest - x) == np.abs(levels[:, None] - x).min(axis=0)).all()


def test_nan_stays_nan_in_fp8():
    assert FP8.nearest(torch.tensor([float("nan")])).isnan().all() and np.isnan(FP8.nearest(np.array([np.nan]))).all()


def test_unsigned_levels_are_for_what_is_not_negative():
    assert UINT8.nearest(np.array([-3.0, 0.5, 254.6, 300.0])).tolist() == [0, 0, 255, 255]
    assert UINT8.codes(np.array([255.0])).dtype == np.uint8 and UINT8.scale(510.0) == 2
    with pytest.raises(ValueError, match="'uint8' has no negative levels"):
        _ = UINT8.of_weights
