"""Integer shares of a whole."""

import numpy as np


def largest_remainder(total: int, weights: np.ndarray) -> np.ndarray:
    """Divide ``total`` in proportion to ``weights``: round down, then one more to the largest remainders.

    Args:
        total: >= 0.
        weights: ``(n,)``, >= 0, not all zero. Equal remainders are served by lowest index.

    Returns:
        int64 ``(n,)``, sum ``total``.
    """
    if np.issubdtype(weights.dtype, np.integer):
        counts, remainders = np.divmod(total * weights, weights.sum())
    else:
        exact = total * (weights / weights.sum())
        counts = np.floor(exact).astype(np.int64)
        remainders = exact - counts
    served = np.argsort(-remainders, kind="stable")[: total - counts.sum()]
    counts[served] += 1
    return counts
