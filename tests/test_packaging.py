"""What the two wheels promise: one version, no hidden dependency, a compiler found or fetched."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import jaxfp8


ROOT = Path(__file__).resolve().parent.parent
# What only the extras bring. `import jaxfp8` must not need it.
OPTIONAL = [
    "flatbuffers",
    "hypothesis",
    "jaxtyping",
    "matplotlib",
    "optax",
    "rich",
    "safetensors",
    "sklearn",
]


def project(directory: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / directory / "pyproject.toml").read_text())["project"]


def load(path: str) -> ModuleType:
    """A module by its file, without putting its directory on the path."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toolchain() -> ModuleType:
    return load("cuda/_build/toolchain.py")


@pytest.fixture
def bare_machine(tmp_path, monkeypatch) -> Path:
    """A machine with a C++ compiler and no CUDA; returns the one directory on its PATH."""
    for name in ("JAXFP8_NVCC", "CUDA_HOME", "CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    really_executable = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: Path(path).is_relative_to(tmp_path) and really_executable(path, mode),
    )
    program(tmp_path / "g++", "")
    return tmp_path


def program(path: Path, prints: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{prints}'\n")
    path.chmod(0o755)
    return path


def nvcc(path: Path, release: str) -> Path:
    return program(path, f"Cuda compilation tools, release {release}, V{release}.88")


def test_both_wheels_and_the_extra_have_one_version():
    version = project(".")["version"]
    assert project("cuda")["version"] == version
    assert load("cuda/jaxfp8_cuda13/__init__.py").__version__ == version
    assert f"jaxfp8-cuda13=={version}" in project(".")["optional-dependencies"]["cuda13"]


def test_import_needs_only_jax_flax_and_numpy():
    names = {re.match(r"[a-z]+", line)[0] for line in project(".")["dependencies"]}
    assert names == {"jax", "flax", "numpy"}
    # None in sys.modules makes an import of that name fail. Flax imports some of them itself.
    script = (
        "import sys, flax, flax.linen\n"
        f"for name in {OPTIONAL!r}:\n"
        "    for loaded in [m for m in sys.modules if m.split('.')[0] == name]:\n"
        "        del sys.modules[loaded]\n"
        "    sys.modules[name] = None\n"
        "import jaxfp8\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_every_public_name_is_documented():
    names = [name for name in vars(jaxfp8) if not name.startswith("_")]
    public = [name for name in names if not isinstance(getattr(jaxfp8, name), ModuleType)]
    assert "PaddedKernel" in public
    missing = [name for name in public if not (getattr(jaxfp8, name).__doc__ or "").strip()]
    assert not missing
    readme = (ROOT / "README.md").read_text()
    assert not [name for name in public if name not in readme]


def test_plugin_package_says_how_to_build_its_missing_library():
    package = load("cuda/jaxfp8_cuda13/__init__.py")
    with pytest.raises(FileNotFoundError, match="pip install ./cuda"):
        package.library_path()


def test_nvcc_comes_from_the_index_where_no_cuda_is_installed(toolchain, bare_machine):
    assert toolchain.installed_nvcc() is None
    assert toolchain.compiler_requirements() == list(toolchain.NVCC_REQUIREMENTS)


def test_every_compiler_package_is_of_one_cuda_release(toolchain):
    releases = {re.search(r"==(\d+\.\d+)\.", line)[1] for line in toolchain.NVCC_REQUIREMENTS}
    assert releases == {"13.0"}


def test_an_installed_nvcc_is_taken(toolchain, bare_machine):
    path = nvcc(bare_machine / "nvcc", "13.0")
    assert toolchain.installed_nvcc() == path
    assert toolchain.compiler_requirements() == []


def test_cuda_home_goes_before_path(toolchain, bare_machine, monkeypatch):
    nvcc(bare_machine / "nvcc", "13.0")
    path = nvcc(bare_machine / "home" / "bin" / "nvcc", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(path.parent.parent))
    assert toolchain.installed_nvcc() == path


def test_an_nvcc_too_old_is_passed_over_aloud(toolchain, bare_machine, capsys):
    path = nvcc(bare_machine / "nvcc", "11.8")
    assert toolchain.installed_nvcc() is None
    assert f"{path} is CUDA 11.8, older than 12.4" in capsys.readouterr().out


def test_the_environment_variable_decides(toolchain, bare_machine, monkeypatch):
    nvcc(bare_machine / "nvcc", "13.0")
    monkeypatch.setenv("JAXFP8_NVCC", "index")
    assert toolchain.installed_nvcc() is None
    monkeypatch.setenv("JAXFP8_NVCC", "/nowhere/nvcc")
    with pytest.raises(RuntimeError, match="`JAXFP8_NVCC` is '/nowhere/nvcc', which is no program"):
        toolchain.installed_nvcc()


def test_a_missing_host_compiler_is_named_before_anything_is_fetched(toolchain, bare_machine):
    (bare_machine / "g++").unlink()
    with pytest.raises(RuntimeError, match="apt-get install g"):
        toolchain.compiler_requirements()
