"""Triton decides between compiling and interpreting when it is imported, so the tests of interpreted kernels in
interpreted/ are collected only in a process that was started for them: see test_interpreter.py."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreted"]


def sum_products_in_float64() -> None:
    """The interpreter leaves products to numpy's BLAS, whose float32 sums depend on the shape of a tile for some
    processors, so that equal rows in different tiles would differ. Summed in float64 and rounded once they do not."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def wide(x: interpreter.TensorHandle) -> np.ndarray:
        data = x.data
        if x.dtype.primitive_bitwidth == 8:
            data = interpreter._convert_float(data, x.dtype, tl.float16, None).view(np.float16)
        return data.astype(np.float64)

    def create_dot(self, a, b, d, *rest):
        if d.data.dtype.kind != "f":
            return dot(self, a, b, d, *rest)
        return interpreter.TensorHandle((wide(a) @ wide(b) + d.data).astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    sum_products_in_float64()
