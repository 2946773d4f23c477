"""A text's tokens as batches of windows."""

from collections.abc import Sequence

import numpy as np

from qjax.errors import CalibrationError


def windows(
    token_ids: Sequence[int] | np.ndarray, *, window: int = 512, count: int = 128, batch_size: int = 8
) -> list[np.ndarray]:
    """The first consecutive windows of a text, in batches of one shape.

    Args:
      token_ids: `[T]`; what is left after the last window is not used.
      window: tokens of one.
      count: how many there should be; a shorter text gives as many as it has.
      batch_size: at most; less where it does not divide their number.

    Returns:
      int32 arrays `[B, window]`.

    Raises:
      CalibrationError: a text of less than one window, or sizes below 1.
    """
    ids = np.asarray(token_ids, np.int32)
    if min(window, count, batch_size) < 1 or ids.ndim != 1:
        raise CalibrationError(
            f"{window=}, {count=}, {batch_size=} of token ids {list(ids.shape)}: none may be below 1"
        )
    count = min(count, len(ids) // window)
    if count == 0:
        raise CalibrationError(f"the text has {len(ids)} tokens; calibration takes windows of {window}")
    size = max(size for size in range(1, batch_size + 1) if count % size == 0)
    return list(ids[: count * window].reshape(-1, size, window))
