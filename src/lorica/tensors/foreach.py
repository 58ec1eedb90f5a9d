# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
"""torch's fused loops over lists of tensors, which have no public names there."""

from __future__ import annotations

from torch import _foreach_abs_ as abs_
from torch import _foreach_add_ as add_
from torch import _foreach_copy_ as copy_
from torch import _foreach_lerp_ as lerp_
from torch import _foreach_mul as mul
from torch import _foreach_mul_ as mul_
from torch import _foreach_norm as norm
from torch import _foreach_sub_ as sub_

__all__ = ["abs_", "add_", "copy_", "lerp_", "mul", "mul_", "norm", "sub_"]
