"""What the examples watch while they reload: programs compiled, buffers moved, the path taken."""

from __future__ import annotations

import functools
from typing import Any

import jax

from jaxfp8.doctor import doctor


def addresses(tree: Any) -> list[int]:
    """Where each leaf lies in memory."""
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def moved(tree: Any, first: list[int]) -> int:
    """How many leaves lie elsewhere than `addresses` found them at first."""
    return sum(a != b for a, b in zip(addresses(tree), first, strict=True))


@functools.cache
def path_used() -> str:
    """Which implementation the served layers take here, and on what."""
    return f"{doctor().implementation} on {jax.devices()[0].device_kind}"


_compilations: list[str] = []


def _count(event: str, duration: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
    """How many programs this process has compiled so far."""
    return len(_compilations)
