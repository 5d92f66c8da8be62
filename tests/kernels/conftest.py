"""Triton decides between compiling and interpreting when it is imported, so the tests of interpreted kernels in
interpreted/ are collected only in a process that was started for them: see test_interpreter.py."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["interpreted"]


def sum_products_in_float64() -> None:
    """The interpreter leaves products to numpy's BLAS, whose float32 sums depend on the shape of a tile for some
    processors, so that equal rows in different tiles would differ. Summed in float64 and rounded once they do not."""
    import numpy as np
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *rest):
        if d.data.dtype.kind != "f":
            return dot(self, a, b, d, *rest)
        found = dot(self, a, b, interpreter.TensorHandle(d.data.astype(np.float64), d.dtype), *rest)
        return interpreter.TensorHandle(found.data.astype(d.data.dtype), found.dtype)

    interpreter.InterpreterBuilder.create_dot = create_dot


if INTERPRETED:
    sum_products_in_float64()
