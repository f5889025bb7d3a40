"""What Triton's interpreter gets wrong, put right for the tests."""

from __future__ import annotations


def teach_bfloat16_rounding() -> None:
    """Let float32 become bfloat16 as a GPU does it, to the nearest even. The interpreter cuts the bits off."""
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(source, source_type, target_type, rounding_mode):
        if (source_type, target_type) != (tl.float32, tl.bfloat16):
            return convert(source, source_type, target_type, rounding_mode)
        rounded = torch.tensor(source.tolist() if source.ndim == 0 else source.copy(), dtype=torch.float32).bfloat16()
        return rounded.view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = nearest


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
