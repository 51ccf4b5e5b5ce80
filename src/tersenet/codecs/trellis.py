"""The trellis of dependent quantization: which levels may follow which, for the quantizer and the context coder.

Eight states. A state that is even holds an even level, one that is odd an odd level or zero; a level's number is half
of its size, rounded up, and whether that is even or odd leads to the next state. Levels that neighbour each other in a
state lie two steps apart, so they cost as few bits as those of a quantizer twice as coarse, and yet all steps are in
use: at equal bits the error is about 1 dB smaller (Marcellin and Fischer 1990; Schwarz et al. 2019).
"""

import numpy as np
from numpy.typing import NDArray

NEXT = ((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5))
_TABLE = np.array(NEXT)


def follows(levels: NDArray[np.int32]) -> bool:
    """Whether every row of a matrix is a path through the trellis that begins in state 0."""
    state = np.zeros(len(levels), np.int64)
    for column in levels.T:
        size = np.abs(column)
        if ((size + state & 1) & (size > 0)).any():
            return False
        state = _TABLE[state, size + (state & 1) >> 1 & 1]
    return True
