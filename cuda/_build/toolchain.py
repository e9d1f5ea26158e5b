"""Where the compiler and the headers of the plugin come from: this machine, or the package index.

Shared by the wheel's build backend (`backend.py`) and by the incremental build (`incremental.py`),
so that both compile the same thing.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path


SOURCE_DIR = Path(__file__).resolve().parent.parent
# One CUDA release throughout: ptxas refuses the output of a newer nvvm.
NVCC_REQUIREMENTS = (
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
)
# CUTLASS 4.2 wants CUDA 12.4 or newer for its sm_90a kernels at full speed (its README,
# "Compatibility").
OLDEST_CUDA = (12, 4)


def build_requirements() -> list[str]:
    """The fixed build requirements of `cuda/pyproject.toml`."""
    with open(SOURCE_DIR / "pyproject.toml", "rb") as file:
        return tomllib.load(file)["build-system"]["requires"]


def cuda_version(nvcc: str | Path) -> tuple[int, int]:
    """The release `nvcc --version` reports, as (major, minor)."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", text)
    if found is None:
        raise RuntimeError(f"`{nvcc} --version` names no CUDA release; it printed: {text!r}")
    return int(found[1]), int(found[2])


def installed_nvcc() -> Path | None:
    """The nvcc of an installed CUDA toolkit, or None if that has to come from the package index.

    `JAXFP8_NVCC` decides if it is set: a path, or the word "index". Else the first of CUDA_HOME,
    PATH and /usr/local/cuda is taken, if it is new enough.
    """
    wish = os.environ.get("JAXFP8_NVCC")
    if wish == "index":
        return None
    if wish:
        if shutil.which(wish) is None:
            raise RuntimeError(
                f"`JAXFP8_NVCC` is {wish!r}, which is no program. Set it to the path of an nvcc, "
                'or to "index" to take nvcc from the package index.'
            )
        return Path(shutil.which(wish) or wish)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin/nvcc")] if home else []
    if on_path := shutil.which("nvcc"):
        places.append(Path(on_path))
    places.append(Path("/usr/local/cuda/bin/nvcc"))
    nvcc = next((place for place in places if os.access(place, os.X_OK)), None)
    if nvcc is None:
        return None
    version = cuda_version(nvcc)
    if version < OLDEST_CUDA:
        say(
            f"{nvcc} is CUDA {version[0]}.{version[1]}, older than "
            f"{OLDEST_CUDA[0]}.{OLDEST_CUDA[1]}: taking nvcc from the package index instead"
        )
        return None
    return nvcc


def packaged_nvcc() -> Path:
    """The nvcc that `NVCC_REQUIREMENTS` installed for this interpreter."""
    spec = importlib.util.find_spec("nvidia")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        nvcc = Path(place, "cu13", "bin", "nvcc")
        if nvcc.is_file():
            return nvcc
    raise RuntimeError(
        "There is no CUDA compiler: none is installed on this machine (looked at JAXFP8_NVCC, "
        "CUDA_HOME, PATH and /usr/local/cuda), and the packages that bring one are missing from "
        f"the build environment. Install them with `pip install {' '.join(NVCC_REQUIREMENTS)}`, "
        "or build with pip's build isolation, which does."
    )


def compiler_requirements() -> list[str]:
    """What to install besides `build_requirements` so that the plugin compiles here.

    Raises:
        RuntimeError: if this machine cannot compile it at all.
    """
    if sys.platform != "linux":
        raise RuntimeError(f"The plugin is built on Linux only, but this is {sys.platform}.")
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise RuntimeError(
            "There is no C++ compiler on PATH, and nvcc needs one. On Debian: apt-get install g++"
        )
    return [] if installed_nvcc() else list(NVCC_REQUIREMENTS)


def package_dir(module: str) -> Path | None:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(module)
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def headers_installed() -> bool:
    """Whether this interpreter has the build requirements, at their pinned versions."""
    for requirement in build_requirements():
        name, pinned, version = requirement.partition("==")
        try:
            if pinned and importlib.metadata.version(name) != version:
                return False
        except importlib.metadata.PackageNotFoundError:
            return False
    return True


def cmake_defines() -> dict[str, str]:
    """The CMake variables that name the compiler and the headers of this build environment."""
    cutlass, jaxlib = package_dir("cutlass_library"), package_dir("jaxlib")
    if cutlass is None or jaxlib is None or not headers_installed():
        raise RuntimeError(
            "The headers of CUTLASS and of the XLA FFI are missing from the build environment, or "
            f"have other versions than {' and '.join(build_requirements()[1:])}. Build with pip's "
            "build isolation (leave out --no-build-isolation), which installs them."
        )
    nvcc = installed_nvcc()
    if nvcc is None:
        nvcc = packaged_nvcc()
        # nvcc has the host compiler look in lib64, but the packages have the static runtime in lib.
        paths = [str(nvcc.parent.parent / "lib"), os.environ.get("LIBRARY_PATH", "")]
        os.environ["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
    say(f"nvcc: {nvcc} (CUDA {'.'.join(map(str, cuda_version(nvcc)))})")
    return {
        "CMAKE_CUDA_COMPILER": str(nvcc),
        "JAXFP8_CUTLASS_DIR": str(cutlass / "source"),
        "JAXFP8_FFI_INCLUDE_DIR": str(jaxlib / "include"),
    }


def say(text: str) -> None:
    """A line of progress, at once and not when a buffer is full."""
    print(f"jaxfp8-cuda13: {text}", flush=True)
