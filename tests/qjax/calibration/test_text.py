"""Windows of a text."""

import numpy as np
import pytest

from qjax.calibration import windows
from qjax.errors import CalibrationError


def test_windows_are_consecutive_and_batches_of_one_shape():
    batches = windows(np.arange(100), window=8, count=6, batch_size=4)
    assert [batch.shape for batch in batches] == [(3, 8), (3, 8)]
    np.testing.assert_array_equal(np.concatenate(batches).ravel(), np.arange(48))


def test_a_shorter_text_gives_what_it_has():
    assert [batch.shape for batch in windows(range(30), window=8, count=128)] == [(3, 8)]


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (range(7), {"window": 8}, "the text has 7 tokens; calibration takes windows of 8"),
        (range(7), {"count": 0}, "count=0"),
        ([[1, 2], [3, 4]], {"window": 2}, r"ids \[2, 2\]"),
    ],
)
def test_a_text_that_is_too_short_is_refused(ids, options, message):
    with pytest.raises(CalibrationError, match=message):
        windows(ids, **options)
