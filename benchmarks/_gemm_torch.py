"""One product on the GPU: ours and torch's, checked against float32, captured into CUDA graphs."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks._library import Library
from benchmarks._timing import Contestant, GraphContestant
from benchmarks.shapes import PROMOTED_FROM_ROWS, Gemm, Peak, copies_past_cache, launches_for
from jaxfp8._cutlass import TILE_ROWS


# bfloat16's rounding alone is 1.7e-3 in norm, fast accumulation at K = 16384 3.5e-3; operands
# quantized wrongly give 2e-2 and more.
ERROR_LIMIT = 5e-3
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
DEVICE = "cuda"


@dataclasses.dataclass
class Weights:
    """Copies of a weight, each of other random values, past the cache together."""

    q: torch.Tensor  # e4m3 [copies, N, K]
    scale: torch.Tensor  # float32 [copies, N]
    bf16: torch.Tensor  # [copies, N, K]

    @staticmethod
    def make(n: int, k: int) -> Weights:
        w = torch.randn(copies_past_cache(n * k), n, k, device=DEVICE)
        q, scale = quantize(w)
        return Weights(q, scale.squeeze(-1), w.to(torch.bfloat16))


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and a float32 scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).float() / FP8_MAX
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


@dataclasses.dataclass
class Prepared:
    """The contestants that gave right results, and why the others were left out."""

    contestants: dict[str, Contestant]
    faults: dict[str, str]
    launches: int
    copies: int


@dataclasses.dataclass(frozen=True)
class Selection:
    """Who takes part beside the table's kernel with fast accumulation.

    Attributes:
        peers: torch's products.
        kernels: whether a compiled kernel is timed by itself, by its name and M.
        promoted_from: the M from which promoted accumulation takes part.
    """

    peers: bool = True
    kernels: Callable[[str, int], bool] = lambda kernel, m: False
    promoted_from: int = PROMOTED_FROM_ROWS


class Bench:
    """Prepares shapes; weights are kept while consecutive shapes share them."""

    def __init__(self, peak: Peak, selection: Selection):
        self.library = Library()
        self.peak = peak
        self.selection = selection
        self._weights: tuple[tuple[int, int], Weights] | None = None
        # Each capture collects garbage; what the imports made need not be looked at again.
        gc.freeze()
        torch.manual_seed(0)

    def weights(self, n: int, k: int) -> Weights:
        if self._weights is None or self._weights[0] != (n, k):
            self._weights = None  # free the old ones first
            self._weights = ((n, k), Weights.make(n, k))
        return self._weights[1]

    def prepare(self, shape: Gemm) -> Prepared:
        """Capture every contestant for `shape`, run it once, and compare it with float32."""
        weights = self.weights(shape.n, shape.k)
        copies = len(weights.q)
        launches = launches_for(1.3 * shape.bound(self.peak) + 2e-6, copies)
        x = torch.randn(whole_tiles(shape.m), shape.k, device=DEVICE)
        qx, x_scale, x = (a[: shape.m] for a in (*quantize(x), x.to(torch.bfloat16)))
        operands = Operands(qx, x_scale, x, weights)
        reference = Reference(operands, (launches - 1) % copies)
        prepared = Prepared({}, {}, launches, copies)
        for name, launch, expected in self._entries(shape, operands, reference):
            try:
                contestant = GraphContestant(_rotating(launch, copies), launches)
                contestant.last.fill_(torch.nan)  # so that an element not written is seen
                contestant()()
                error = relative_error(contestant.last, expected())
            except RuntimeError as fault:
                prepared.faults[name] = str(fault).splitlines()[0]
                continue
            if error < ERROR_LIMIT:  # false for NaN
                prepared.contestants[name] = contestant
            else:
                prepared.faults[name] = f"relative error {error:.2e}, above {ERROR_LIMIT:.0e}"
        return prepared

    def _entries(
        self, shape: Gemm, operands: Operands, reference: Reference
    ) -> Iterator[tuple[str, Callable[[int], Any], Callable[[], torch.Tensor]]]:
        out = torch.empty(shape.m, shape.n, device=DEVICE, dtype=torch.bfloat16)

        def ours(**options: Any) -> Callable[[int], Any]:
            rows = whole_tiles(shape.m)
            return lambda i: self.library.gemm(*operands.scaled(i), out, lhs_rows=rows, **options)

        promoted = shape.m >= self.selection.promoted_from
        yield "ours", ours(), reference.scaled
        if self.selection.peers:
            yield "ours_alone", ours(dependent=False), reference.scaled
            yield "cublaslt", operands.per_tensor(fast=True), reference.unscaled
            yield "rowwise", operands.rowwise, reference.scaled
            yield "bf16", operands.bf16_product, reference.bf16_product
        if promoted:
            yield "ours_promoted", ours(promoted=True), reference.scaled
        if promoted and self.selection.peers:
            yield "cublaslt_exact", operands.per_tensor(fast=False), reference.unscaled
        for index, name in enumerate(self.library.kernels):
            exact = name.startswith("promoted")
            if self.selection.kernels(name, shape.m) and (promoted or not exact):
                yield f"kernel {name}", ours(kernel=index, promoted=exact), reference.scaled


def whole_tiles(m: int) -> int:
    """The rows of a layer's scratch, of which those behind M are read and not used."""
    return -(-m // TILE_ROWS) * TILE_ROWS


def _rotating(launch: Callable[[int], Any], copies: int) -> Callable[[int], Any]:
    return lambda i: launch(i % copies)


@dataclasses.dataclass
class Operands:
    """One x, quantized and in bfloat16, and the copies of the weight."""

    qx: torch.Tensor
    x_scale: torch.Tensor
    x: torch.Tensor
    weights: Weights

    def __post_init__(self) -> None:
        self.one = torch.ones((), device=DEVICE)

    def scaled(self, i: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.qx, self.weights.q[i], self.x_scale, self.weights.scale[i]

    def per_tensor(self, *, fast: bool) -> Callable[[int], torch.Tensor]:
        return lambda i: torch._scaled_mm(
            self.qx,
            self.weights.q[i].t(),
            scale_a=self.one,
            scale_b=self.one,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )

    def rowwise(self, i: int) -> torch.Tensor:
        return torch._scaled_mm(
            self.qx,
            self.weights.q[i].t(),
            scale_a=self.x_scale,
            scale_b=self.weights.scale[i].unsqueeze(0),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def bf16_product(self, i: int) -> torch.Tensor:
        return torch.mm(self.x, self.weights.bf16[i].t())


class Reference:
    """The same products in float32, for the copy that the last launch of a graph uses."""

    def __init__(self, operands: Operands, copy: int):
        self.operands, self.copy = operands, copy
        self._unscaled: torch.Tensor | None = None

    def unscaled(self) -> torch.Tensor:
        if self._unscaled is None:
            q = self.operands.weights.q[self.copy]
            self._unscaled = self.operands.qx.float() @ q.float().t()
        return self._unscaled

    def scaled(self) -> torch.Tensor:
        scale = self.operands.weights.scale[self.copy]
        return self.unscaled() * self.operands.x_scale * scale

    def bf16_product(self) -> torch.Tensor:
        return self.operands.x.float() @ self.operands.weights.bf16[self.copy].float().t()


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """||result - expected|| / ||expected||."""
    difference = torch.linalg.vector_norm(result.float() - expected)
    return float(difference / torch.linalg.vector_norm(expected))
