"""What arrays of numbers are called."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

Flags = npt.NDArray[np.bool_]
