"""A thin driver: CMake is the source of truth for what is built and where it goes."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configures, builds and installs the native parts beside the Python package."""

    def run(self) -> None:
        build_dir = ROOT / "build" / f"cmake-cp{sys.version_info.major}{sys.version_info.minor}"
        prefix = ROOT if self.inplace else Path(self.build_lib).resolve()
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_BUILD_TYPE={os.environ.get('RTPURBO_BUILD_TYPE', 'Release')}",
            f"-DRTPURBO_CUDA={os.environ.get('RTPURBO_CUDA', 'auto')}",
            f"-DRTPURBO_TESTS={os.environ.get('RTPURBO_TESTS', '0')}",
        ]  # fmt: skip
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir)], check=True)
        subprocess.run(["cmake", "--install", str(build_dir), "--prefix", str(prefix)], check=True)

    def get_source_files(self) -> list[str]:
        return []

    def get_outputs(self) -> list[str]:
        package = Path(self.build_lib) / "rtpurbo"
        folders = ("lib", "include", "share")
        files = [p for folder in folders for p in (package / folder).rglob("*") if p.is_file()]
        return [str(p) for p in [*files, *package.glob("_C*")]]


setup(ext_modules=[Extension("rtpurbo._C", [])], cmdclass={"build_ext": CMakeBuild})
