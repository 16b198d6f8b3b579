"""What is built: build info, the Catch2 tests and a C++ program that links the package."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
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


def tool(name: str) -> str:
    """A program of this environment, or else of PATH."""
    own = Path(sysconfig.get_path("scripts")) / name
    return str(own) if own.exists() else name


def test_build_info_names_versions():
    info = rtpurbo.build_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["version"] == "0.1.0"
    assert {"cuda", "cuda_architectures", "compiler", "cxx_standard"} <= info.keys()


def test_cpp_program_links_the_package(tmp_path):
    python = f"-DPython_EXECUTABLE={sys.executable}"
    prefix = f"-Drtpurbo_DIR={PACKAGE / 'share' / 'cmake' / 'rtpurbo'}"
    ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"
    source = ROOT / "examples" / "cpp"
    run(tool("cmake"), "-S", source, "-B", tmp_path, "-G", "Ninja", ninja, python, prefix)
    run(tool("cmake"), "--build", tmp_path)
    assert "of the mass" in run(tmp_path / "consumer")


def test_one_cpp_runtime():
    """A libstdc++ linked in statically stands beside torch's, and raising an error crashes."""
    needed = run("readelf", "--dynamic", PACKAGE / "lib" / "librtpurbo.so")
    assert "[libstdc++.so.6]" in needed


def test_catch2():
    folder = ROOT / "build" / f"cmake-cp{sys.version_info.major}{sys.version_info.minor}"
    cache = folder / "CMakeCache.txt"
    setting = re.search(
        r"^RTPURBO_TESTS:\w+=(\w+)", cache.read_text() if cache.is_file() else "", re.M
    )
    if setting is None or setting[1] not in ("1", "ON"):
        pytest.skip("built without RTPURBO_TESTS=1 (make test builds with it)")
    assert "All tests passed" in run(folder / "tests" / "cpp" / "rtpurbo_tests")


STUB = """#!/bin/sh
echo "$(basename "$0") $* RTPURBO_TESTS=$RTPURBO_TESTS" >> "$(dirname "$0")/../log"
"""


@pytest.fixture
def make(tmp_path):
    """Runs make on a copy whose environment only writes down what is asked of it."""
    for name in ("Makefile", "pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "cmake", "tests/cpp", "tools", ".venv/bin", "build/newest-transformers"):
        (tmp_path / name).mkdir(parents=True)
    log = tmp_path / ".venv" / "log"
    for name in ("pip", "python", "rtpurbo", "ruff", "mypy", "clang-format"):
        stub = tmp_path / ".venv" / "bin" / name
        stub.write_text(STUB)
        stub.chmod(0o755)
    (tmp_path / "tools" / "debian_packages.sh").write_text(f'echo "packages $*" >> {log}\n')

    def call(*arguments):
        log.write_text("")
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RTPURBO")}
        done = subprocess.run(
            ["make", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return log.read_text()

    return call


def test_make_installs_what_torch_and_transformers_say(make):
    assert "--upgrade torch==2.11.* transformers==5.17.*" in make("demo")
    assert "pip" not in make("demo")
    newest = make("demo", "TORCH=torch")
    assert "--upgrade torch transformers==5.17.*" in newest and " -e ." in newest
    assert "pip" not in make("demo", "TORCH=torch")
    assert "--upgrade torch==2.11.* transformers==5.17.*" in make("demo")
    assert "transformers==5.18.*" in make("demo", "TRANSFORMERS=transformers==5.18.*")


def test_make_demo_needs_no_tools_of_tests_and_lint(make):
    demo = make("demo")
    assert "-e .[demo] RTPURBO_TESTS=\n" in demo and "rtpurbo demo" in demo
    assert "packages \n" in demo and "catch2" not in demo and "clang-format" not in demo
    test = make("test")
    assert "packages catch2\n" in test and "dev] RTPURBO_TESTS=1\n" in test
    assert "--upgrade torch" not in test and "-e .[demo]" not in test and "clang" not in test
    assert test.count(" -m pytest") == 2
    lint = make("format")
    assert "packages clang-format\n" in lint and "-e ." not in lint
    for again in ("demo", "test", "format"):
        assert "pip" not in make(again)


def test_debian_packages_asks_only_for_what_is_missing(tmp_path):
    script = ROOT / "tools" / "debian_packages.sh"
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("g++", "id", "python3"):
        (commands / name).write_text("#!/bin/sh\necho 1000\n")
        (commands / name).chmod(0o755)
    environment = {"PATH": str(commands), "PYTHON": "python3"}

    def ask(*packages):
        return subprocess.run(
            ["/bin/sh", script, *packages], env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip

    assert ask().returncode == 0
    refused = ask("clang-format")
    assert refused.returncode == 1 and "As root: apt-get install clang-format" in refused.stderr
    assert ask("nothing").returncode == 2


def test_the_sdist_holds_what_make_needs(tmp_path):
    skipped = shutil.ignore_patterns(
        ".*", "__pycache__", "build", "dist", "out", "*.so*", "*.egg-info", "include", "share"
    )
    shutil.copytree(ROOT, tmp_path / "tree", ignore=skipped)
    shutil.copy(ROOT / ".clang-format", tmp_path / "tree")
    wanted = {
        file.relative_to(tmp_path / "tree").as_posix()
        for file in (tmp_path / "tree").rglob("*")
        if file.is_file()
    }
    run(
        sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path,
        tmp_path / "tree",
    )  # fmt: skip
    (archive,) = tmp_path.glob("rtpurbo-*.tar.gz")
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert not wanted - held
    assert {"Makefile", "tools/debian_packages.sh", "tests/cpp/CMakeLists.txt"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
