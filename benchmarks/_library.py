"""The plugin's plain C entries: its kernels on anybody's pointers and stream, without XLA.

So the kernels and torch's are captured into CUDA graphs by the same calls, in one process.
"""

from __future__ import annotations

import ctypes
from typing import Any

from jaxfp8._cutlass import plugin


FROM_TABLE = -1
OUT_BF16 = 0
IN_BF16 = 0


class Library:
    """`jaxfp8_launch_gemm` and `jaxfp8_launch_quantize`, on torch tensors."""

    def __init__(self) -> None:
        found = plugin()
        if found.path is None:
            raise SystemExit(f"There is nothing to measure: {found.problem}")
        library = ctypes.CDLL(found.path)
        pointer, number = ctypes.c_void_p, ctypes.c_int
        self.kernels: list[str] = found.build.get("kernels", [])
        self.build = found.build
        self._gemm = library.jaxfp8_launch_gemm
        self._gemm.restype = ctypes.c_char_p
        self._gemm.argtypes = [
            *(number, number, number),  # kernel, promoted, out_dtype
            *(number, number, number),  # m, n, k
            *(pointer, number, pointer),  # lhs, lhs_rows, rhs
            *(pointer, number, pointer, number),  # lhs_scale, per_token, rhs_scale, per_channel
            *(pointer, pointer, ctypes.c_longlong),  # bias, out, out_pitch
            *(number, number, pointer),  # activation, dependent, stream
        ]
        self._quantize = library.jaxfp8_launch_quantize
        self._quantize.restype = ctypes.c_char_p
        self._quantize.argtypes = [
            *(number, number, number, number),  # in_dtype, m, k, k_pad
            *(pointer, pointer, pointer, pointer, pointer),  # x, x_scale, q, scale, stream
        ]

    def gemm(
        self,
        lhs: Any,
        rhs: Any,
        lhs_scale: Any,
        rhs_scale: Any,
        out: Any,
        *,
        kernel: int = FROM_TABLE,
        promoted: bool = False,
        dependent: bool = True,
        lhs_rows: int | None = None,
    ) -> Any:
        """`out = lhs_scale * rhs_scale * (lhs @ rhs.T)` in bfloat16, on torch's current stream.

        `dependent` allows dependent launch, as a product of quantized inputs has it. Of `lhs`,
        `lhs_rows` lie in memory (default: M): a layer's scratch has whole tiles.
        """
        (m, k), n = lhs.shape, rhs.shape[0]
        error = self._gemm(
            *(kernel, int(promoted), OUT_BF16, m, n, k),
            *(lhs.data_ptr(), lhs_rows or m, rhs.data_ptr()),
            *(lhs_scale.data_ptr(), 1, rhs_scale.data_ptr(), 1),
            *(None, out.data_ptr(), out.stride(0), 0, int(dependent), _current_stream()),
        )
        if error is not None:
            raise RuntimeError(f"jaxfp8_launch_gemm failed: {error.decode()}")
        return out

    def quantize(self, x: Any, q: Any, scale: Any) -> Any:
        """bfloat16 `x` row by row into `q`, e4m3 and zero-padded, and `scale`."""
        (m, k), k_pad = x.shape, q.shape[1]
        error = self._quantize(
            *(IN_BF16, m, k, k_pad),
            *(x.data_ptr(), None, q.data_ptr(), scale.data_ptr(), _current_stream()),
        )
        if error is not None:
            raise RuntimeError(f"jaxfp8_launch_quantize failed: {error.decode()}")
        return q


def _current_stream() -> int:
    import torch

    return torch.cuda.current_stream().cuda_stream
