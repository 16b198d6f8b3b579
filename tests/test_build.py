"""What is built: build info, the Catch2 tests and a C++ program that links the package."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rtpurbo

ROOT = Path(__file__).parent.parent
PACKAGE = Path(rtpurbo.__file__).parent


def run(*command: str | Path) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def test_build_info_names_versions():
    info = rtpurbo.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["version"] == "0.1.0"
    assert {"cuda", "cuda_architectures", "compiler", "cxx_standard"} <= info.keys()


def test_cpp_program_links_the_package(tmp_path):
    python = f"-DPython_EXECUTABLE={sys.executable}"
    prefix = f"-Drtpurbo_DIR={PACKAGE / 'share' / 'cmake' / 'rtpurbo'}"
    run("cmake", "-S", ROOT / "examples" / "cpp", "-B", tmp_path, "-G", "Ninja", python, prefix)
    run("cmake", "--build", tmp_path)
    assert "of the mass" in run(tmp_path / "consumer")


def test_one_cpp_runtime():
    """A libstdc++ linked in statically stands beside torch's, and raising an error crashes."""
    needed = run("readelf", "--dynamic", PACKAGE / "lib" / "librtpurbo.so")
    assert "[libstdc++.so.6]" in needed


def test_catch2():
    binaries = sorted((ROOT / "build").glob("cmake-*/tests/cpp/rtpurbo_tests"))
    if not binaries:
        pytest.skip("built without RTPURBO_TESTS=1 (make test builds with it)")
    assert "All tests passed" in run(binaries[-1])
