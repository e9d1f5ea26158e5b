"""The shared library of CUTLASS kernels that `jaxfp8` calls on Hopper GPUs.

This package only says where the library is and how it was built. It imports nothing but the
standard library, so that looking for the plugin costs nothing.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any


__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent


def library_path() -> str:
    """The absolute path of `libjaxfp8_cuda13.so`, to be opened with `ctypes.CDLL`.

    Raises:
        FileNotFoundError: if the package lies here without its library.
    """
    path = _HERE / "libjaxfp8_cuda13.so"
    if not path.is_file():
        raise FileNotFoundError(
            f"`jaxfp8_cuda13` was imported from {_HERE}, but its library {path.name} is not there. "
            "That is the source tree or a broken installation: build and install the plugin with "
            "`pip install ./cuda`."
        )
    return str(path)


def build_info() -> dict[str, Any]:
    """How the library was built: CUDA, the XLA FFI, the kernels, a hash of the sources.

    Raises:
        FileNotFoundError: if the package lies here without its library.
    """
    library = ctypes.CDLL(library_path())
    library.jaxfp8_build_info.restype = ctypes.c_char_p
    return json.loads(library.jaxfp8_build_info())
