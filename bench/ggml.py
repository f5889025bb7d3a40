"""Products of llama.cpp's library ggml, called through ctypes from a build of the user's: nothing of it is built or downloaded here.

The weights lie where llama.cpp itself puts them for that CPU: in its repacked buffer if it has one that takes their type.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch

F32, Q4_0, Q8_0 = 0, 2, 8  # numbers of ggml's types
BLOCKS = {Q4_0: (32, 18), Q8_0: (32, 34)}  # weights and bytes of a block


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class Ggml:
    """ggml's CPU backend from the libraries of a build of llama.cpp."""

    def __init__(self, build: Path) -> None:
        self.libraries = [ctypes.CDLL(str(_find(build, name)), ctypes.RTLD_GLOBAL) for name in ("ggml-base", "ggml-cpu", "ggml")]
        for name, (result, arguments) in SIGNATURES.items():
            function = next(getattr(library, name) for library in self.libraries if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.quiet = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
        self.log_set(ctypes.cast(self.quiet, c_void_p), None)
        self.backend = self.backend_cpu_init()

    def buffer_types(self) -> dict[str, int]:
        """Return the buffers of this CPU by name, in the order of llama.cpp's preference."""
        registry = self.backend_cpu_reg()
        found = []
        if address := self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts"):
            extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
            while extra and extra[len(found)]:
                found.append(extra[len(found)])
        return {self.backend_buft_name(kind).decode(): kind for kind in [*found, self.backend_cpu_buffer_type()]}

    def quantised(self, kind: int, weight: torch.Tensor) -> torch.Tensor:
        """Return a float32 weight in a type of ggml's, rounded as ggml does."""
        rows, columns = weight.shape
        weights, size = BLOCKS[kind]
        out = torch.empty(rows * columns // weights * size, dtype=torch.uint8)
        self.quantize_chunk(kind, weight.contiguous().data_ptr(), out.data_ptr(), 0, rows, columns, None)
        return out


class Products:
    """The products of one token with each of several weights, in one graph, so that starting a graph costs them little."""

    def __init__(self, ggml: Ggml, kind: int, buffer: int, weights: Sequence[torch.Tensor], rows: int, x: torch.Tensor) -> None:
        self.ggml, self.rows = ggml, rows
        columns = x.numel()
        memory = _InitParams(2**20 + 2**12 * len(weights), None, True)
        own, inputs = ggml.init(memory), ggml.init(memory)
        made = [ggml.new_tensor_2d(own, kind, columns, rows) for _ in weights]
        given = ggml.new_tensor_2d(inputs, F32, columns, 1)
        self.outputs = [ggml.mul_mat(inputs, weight, given) for weight in made]
        self.graph = ggml.new_graph_custom(inputs, len(weights) + 8, False)
        for output in self.outputs:
            ggml.build_forward_expand(self.graph, output)
        if not ggml.backend_alloc_ctx_tensors_from_buft(own, buffer):
            raise MemoryError("ggml has no memory for the weights")
        ggml.backend_alloc_ctx_tensors_from_buft(inputs, ggml.backend_cpu_buffer_type())
        for tensor, weight in zip(made, weights, strict=True):
            if ggml.nbytes(tensor) != weight.nbytes:
                raise ValueError(f"weights: expected {ggml.nbytes(tensor)} bytes, got {weight.nbytes}")
            ggml.backend_tensor_set(tensor, weight.data_ptr(), 0, weight.nbytes)
        x = x.float().contiguous()
        ggml.backend_tensor_set(given, x.data_ptr(), 0, x.nbytes)

    def __call__(self, threads: int) -> None:
        self.ggml.backend_cpu_set_n_threads(self.ggml.backend, threads)
        if self.ggml.backend_graph_compute(self.ggml.backend, self.graph) != 0:
            raise RuntimeError("ggml failed to compute its graph")

    def result(self, index: int) -> torch.Tensor:
        """Return the product with one of the weights, after a call."""
        out = torch.empty(self.rows)
        self.ggml.backend_tensor_get(self.outputs[index], out.data_ptr(), 0, out.nbytes)
        return out


def _find(build: Path, name: str) -> Path:
    found = sorted(build.rglob(f"lib{name}.so")) or sorted(build.rglob(f"lib{name}.so.*"))
    if not found:
        raise FileNotFoundError(f"--llama-cpp: expected a folder with lib{name}.so, built with -DBUILD_SHARED_LIBS=ON, got {build}")
    return found[0]
