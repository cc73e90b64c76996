"""What TensorRT's calibrators are fed, without TensorRT."""

import numpy as np
import pytest

from qswin.calib.trt_cache.native import BatchStream, private_file


def test_full_batches_are_fed_and_counted():
    batches = [np.full((n, 3, 2, 2), n, np.float32) for n in (4, 4, 3)]
    stream = BatchStream(batches, 4)
    fed = [item["input"] for item in stream]
    assert [len(batch) for batch in fed] == [4, 4] and stream.images == 8 and stream.error is None


def test_an_unreadable_image_is_kept_for_the_caller():
    def batches():
        yield np.zeros((2, 3, 2, 2), np.float32)
        raise ValueError("a.jpg: cannot be read")

    stream = BatchStream(batches(), 2)
    assert len(list(stream)) == 1
    assert "a.jpg" in str(stream.error)


def test_polygraphy_reads_a_cache_that_has_no_name():
    util = pytest.importorskip("polygraphy.util", reason="Polygraphy is not installed")
    file = private_file(b"TRT-8600-MinMaxCalibration\n")
    assert util.get_file_size(file) == 27 and util.load_file(file) == b"TRT-8600-MinMaxCalibration\n"
    util.save_file(b"what TensorRT writes back", file)
