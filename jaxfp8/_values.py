"""The values of all loaded weights, measured before the first is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxfp8._bundles import Bundle
from jaxfp8._convert import Carry
from jaxfp8._in_flight import InFlight
from jaxfp8._send import arriving


# The names of parameters alike, and for each of them whether it is finite and its scales valid.
Flags = list[tuple[tuple[str, ...], Any]]


def measure_all(
    alike: Sequence[Bundle], advance: Callable[[int], None] = lambda amount: None
) -> tuple[list[Carry], Flags]:
    """What writing each bundle needs to know, and its flags; not waited for, but on the host's.

    Args:
        alike: the bundles.
        advance: told the bytes of each when it has been sent to be measured.
    """
    carries, flags = [], []
    window = InFlight()
    arrived = arriving((source, None) for bundle in alike for source in bundle.read)
    for bundle in alike:
        size = window.admit(bundle.read)
        carry, flag = bundle.measure(arrived)
        window.sent(size, flag)
        carries.append(carry)
        flags.append((bundle.names, flag))
        advance(bundle.nbytes)
    window.finish()
    return carries, flags


def value_problems(flags: Flags, *, allow_nonfinite: bool) -> list[str]:
    """A line for each parameter whose measured values cannot be served; one synchronisation."""
    concrete = [(names, flag) for names, flag in flags if not isinstance(flag, jax.core.Tracer)]
    values = jax.device_get([flag for _, flag in concrete])
    verdicts = [
        (name, *verdict)
        for (names, _), rows in zip(concrete, values, strict=True)
        for name, verdict in zip(names, rows, strict=True)
    ]
    problems = []
    for name, finite, scales_valid in sorted(verdicts):
        if not (finite or allow_nonfinite):
            problems.append(f"  {name}: a weight is NaN or infinite (in the parameter's dtype).")
        if not scales_valid:
            problems.append(f"  {name}: a scale is not positive, finite and at least 2^-126.")
    return problems


def check_values(flags: Flags, *, allow_nonfinite: bool) -> None:
    """Refuse what cannot be served.

    Raises:
        ValueError: with a line for each such parameter.
    """
    if problems := value_problems(flags, allow_nonfinite=allow_nonfinite):
        raise ValueError(
            "`loaded` holds values that cannot be served, and nothing has been changed. Look for "
            "a diverged training step or a damaged checkpoint (`reload_params` takes NaN and "
            "infinite weights with allow_nonfinite=True, bad scales never):\n" + "\n".join(problems)
        )
