"""The build backend of the plugin: scikit-build-core, told where the compiler and the headers are.

It adds nvcc from the package index to the build requirements where no CUDA toolkit is installed.
"""

from __future__ import annotations

from typing import Any

import toolchain
from scikit_build_core import build as scikit_build
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_wheel,
)


__all__ = [
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_wheel",
]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """scikit-build-core's own requirements (CMake and Ninja, if missing) and ours."""
    requires = scikit_build.get_requires_for_build_wheel(config_settings)
    return [*requires, *toolchain.compiler_requirements()]


def build_wheel(
    wheel_directory: str,
    config_settings: dict[str, Any] | None = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile the library and pack it; the user's own config settings win over ours."""
    ours = {f"cmake.define.{key}": value for key, value in toolchain.cmake_defines().items()}
    return scikit_build.build_wheel(
        wheel_directory, {**ours, **(config_settings or {})}, metadata_directory
    )
