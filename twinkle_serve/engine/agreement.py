"""Whether two ways through a model agree, row by row.

Knows floats and how coarse they are. Does not know which ways they are, nor how much is too much.
"""

from __future__ import annotations

import torch


def disagreement(
    found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype
) -> float:
    """The largest difference of [N, W], relative to ``scale``, of models that compute in ``dtype``.

    In bfloat16 that of the median row: rounding sends some rows of a mixture to other experts, and these are
    far off then.
    """
    rows = (found - expected).abs().amax(1) / scale
    return (rows.max() if dtype == torch.float32 else rows.median()).item()
