"""A CPU that `_send` takes for a GPU, with small pieces, and what happens to them there."""

from __future__ import annotations

import jax
import numpy as np

from jaxfp8 import _pieces, _send


PIECE, AHEAD = 1024, 16 * 1024


def array(shape, dtype):
    return np.random.default_rng(0).integers(-9, 9, shape).astype(dtype)


def small(piece):
    return piece.nbytes <= max(PIECE, piece.nbytes // len(piece))


class Watched:
    """What happens to pieces: `sent` and `waited` count bytes, `taken` what programs took."""

    def __init__(self, monkeypatch):
        self.calls, self.sent, self.waited = 0, 0, 0
        self.fails_at = -1
        self.taken: list[int] = []
        self.most_ahead = 0
        device_put, wait = jax.device_put, jax.block_until_ready
        begun, placed = _pieces.begun, _pieces.placed

        def sending(x, *args, **kwargs):
            self.calls += 1
            if self.calls == self.fails_at:
                raise RuntimeError("out of memory")
            arrays = [a for a in jax.tree.leaves(x) if isinstance(a, np.ndarray) and a.ndim]
            self.sent += sum(a.nbytes for a in arrays)
            self.most_ahead = max(self.most_ahead, self.sent - self.waited)
            return device_put(x, *args, **kwargs)

        def waiting(x):
            self.waited += sum(a.nbytes for a in x) if isinstance(x, list) else 0
            return wait(x)

        def beginning(shape, pieces):
            assert all(small(piece) for piece in pieces)
            self.taken.append(len(pieces))
            return begun(shape, pieces)

        def placing(whole, start, pieces):
            assert all(small(piece) for piece in pieces)
            self.taken.append(len(pieces))
            return placed(whole, start, pieces)

        monkeypatch.setattr(_pieces, "PIECE", PIECE)
        monkeypatch.setattr(_send, "AHEAD", AHEAD)
        monkeypatch.setattr(_pieces, "begun", beginning)
        monkeypatch.setattr(_pieces, "placed", placing)
        monkeypatch.setattr(jax, "device_put", sending)
        monkeypatch.setattr(jax, "block_until_ready", waiting)


def as_on_a_gpu(monkeypatch) -> Watched:
    is_on = _pieces.is_on
    monkeypatch.setattr(
        _pieces, "is_on", lambda a, platform: is_on(a, "cpu" if platform == "gpu" else "gpu")
    )
    return Watched(monkeypatch)
