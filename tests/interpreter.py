"""What Triton's interpreter gets wrong, put right for the tests."""

from __future__ import annotations


def teach_bfloat16_products() -> None:
    """Let `tl.dot` multiply bfloat16 values. The interpreter keeps them as their bits and multiplies those."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    multiply = interpreter.InterpreterBuilder.create_dot

    def in_float32(tensor):
        if tensor.dtype.scalar != tl.bfloat16:
            return tensor
        return interpreter.TensorHandle((tensor.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, d, *precision):
        return multiply(self, in_float32(a), in_float32(b), d, *precision)

    interpreter.InterpreterBuilder.create_dot = create_dot
