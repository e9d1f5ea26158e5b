"""The quantize kernel by itself, beside a device copy of its input."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks._library import Library
from benchmarks._timing import GraphContestant, interleave, pairwise_ratio, warm_up
from benchmarks.shapes import GEMM_ROWS, launches_for
from jaxfp8.padded import padded_size


WIDTHS = (1280, 3420, 4096, 11008, 14336, 18944)


def measure(rounds: int, warm_up_seconds: float) -> list[dict[str, Any]]:
    """Microseconds for bfloat16 x `[M, K]`, which lies in the cache where it fits.

    That is where the layer before has left it. A copy of x moves 4 bytes an element, the kernel 3.
    """
    library = Library()
    return [_row(library, m, k, rounds, warm_up_seconds) for k in WIDTHS for m in GEMM_ROWS]


def _row(library: Library, m: int, k: int, rounds: int, warm_up_seconds: float) -> dict[str, Any]:
    x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
    q = torch.empty(m, padded_size(k), device="cuda", dtype=torch.float8_e4m3fn)
    scale, copy = torch.empty(m, device="cuda"), torch.empty_like(x)
    moved = 2 * m * k + m * padded_size(k) + 4 * m
    launches = launches_for(2e-6 + moved / 4e12, copies=20)
    contestants = {
        "quantize": GraphContestant(lambda _: library.quantize(x, q, scale), launches),
        "copy": GraphContestant(lambda _: copy.copy_(x), launches),
    }
    q.view(torch.uint8).fill_(0x7F)  # NaN, so that a code not written is seen
    warm_up(contestants, warm_up_seconds)
    seconds = interleave(contestants, rounds)
    ours = statistics.median(seconds["quantize"])
    return {
        "m": m,
        "k": k,
        "microseconds": 1e6 * ours,
        "gigabytes_per_second": moved / ours * 1e-9,
        "copy_over_ours": pairwise_ratio(seconds["copy"], seconds["quantize"]),
        "wrong_codes": wrong_codes(x, q, scale),
    }


def wrong_codes(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> int:
    """Codes, padding included, and scales that are not to the bit those of torch in float32."""
    wide = x.float()
    expected_scale = wide.abs().amax(1) * torch.tensor(1.0 / 448.0, device=x.device)
    scaled = (wide * (1.0 / expected_scale)[:, None]).clamp(-448.0, 448.0)
    expected = torch.zeros_like(q, dtype=torch.uint8)
    expected[:, : x.shape[1]] = scaled.to(q.dtype).view(torch.uint8)
    return int((q.view(torch.uint8) != expected).sum() + (scale != expected_scale).sum())
