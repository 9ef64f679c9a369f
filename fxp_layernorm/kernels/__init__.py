"""The Numba kernels: the function of docs/arithmetic.md, compiled, on integer arrays only.

`drivers` has what callers call; it passes twice over the rows, by `moments` before the `row_stage` and by `elements`
after it. Both are written on `vectors`, and on the `products` that CPUs have for them.
"""

from __future__ import annotations

from .compiled import BLOCK as BLOCK
from .drivers import run as run
from .drivers import run_columns as run_columns
from .drivers import run_sums as run_sums
from .drivers import serve as serve
from .row_stage import bit_length as bit_length
from .row_stage import floor_divide as floor_divide
from .row_stage import isqrt as isqrt
from .row_stage import reciprocal_root as reciprocal_root
