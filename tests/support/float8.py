"""Whether this torch multiplies in float8 on a CPU: older ones do so on a GPU only."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dinov3_ray.model.float8 import Float8Linear


def _runs_on_cpu() -> bool:
    try:
        Float8Linear(nn.Linear(16, 16, dtype=torch.bfloat16))(torch.zeros(1, 16, dtype=torch.bfloat16))
    except NotImplementedError:
        return False
    return True


FLOAT8_ON_CPU = _runs_on_cpu()
needs_float8_on_cpu = pytest.mark.skipif(not FLOAT8_ON_CPU, reason="this torch has no float8 product on a CPU")
