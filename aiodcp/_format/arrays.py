"""What arrays of numbers are called."""

from __future__ import annotations

import numpy as np
import numpy.ma  # which `numpy.unique` imports when it is first called: 11 ms, in which no other thread runs
import numpy.typing as npt

Array = npt.NDArray[np.int64]

Flags = npt.NDArray[np.bool_]
