"""Operations with several implementations behind one function each; ``_dispatch`` chooses and says why."""

from dcar_fast.ops._dispatch import report
from dcar_fast.ops.add_residual import add_residual
from dcar_fast.ops.vq_lookup import vq_lookup

__all__ = ["add_residual", "report", "vq_lookup"]
