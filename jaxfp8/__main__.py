"""`python -m jaxfp8`: which path this machine takes and why, and whether it computes right."""

from __future__ import annotations

import sys

from jaxfp8.doctor import doctor


def main() -> int:
    """Print the report; 0 if the self-test passed, else 1."""
    report = doctor()
    print(report)
    return 0 if report.self_test.passed else 1


if __name__ == "__main__":
    sys.exit(main())
