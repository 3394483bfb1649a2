"""Builds ik_llama.cpp's library for this machine, once, into the cache: `python benchmarks/peers/ik_llama_cpp_build.py`.

pip fetches the pinned source distribution of ik-llama-cpp-python, whose wheel is made for no machine in particular. Its programs cannot be
built from what it has, so that only the library `llama` is. It takes 20 minutes of one core or more.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).parents[2] / "third_party"))
from fetch_llama_cpp import FetchError, Pin, cache_dir, download, read_pin, say, scratch_directory, sha256_of

_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DGGML_NATIVE=ON",
    # Attention over a quantised KV cache, which nothing here has, is half of the time that compiling takes.
    "-DGGML_IQK_FA_ALL_QUANTS=OFF",
    "-DLLAMA_ALL_WARNINGS=OFF",
    "-DGGML_ALL_WARNINGS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
)


def pin() -> Pin:
    """What is fetched."""
    return read_pin(Path(__file__).with_name("ik_llama_cpp.pin"))


def source_folder() -> Path:
    """Where its sources are, and the build in them."""
    return cache_dir() / f"ik_llama.cpp-{pin().version}"


def library_path() -> Path:
    """Where its library is, once it is built."""
    return source_folder() / "build" / "src" / "libllama.so"


def build() -> Path:
    """Fetches and builds what is not there yet.

    Returns:
        The library.

    Raises:
        FetchError: pip cannot fetch the sources, or they are others than the pinned ones.
        subprocess.CalledProcessError: they do not compile.
    """
    source, library = source_folder(), library_path()
    if library.is_file():
        return library
    if not (source / "CMakeLists.txt").is_file():
        with scratch_directory(source.parent) as scratch:
            archive = source.parent / pin().archive
            if not archive.is_file():
                help_text = f"With no network, put the file {pin().archive} into {source.parent}"
                archive = download(pin(), scratch, "ik_llama.cpp, for the benchmarks", "42 MB", help_text)
            _unpack(archive, source, scratch)
    say("building ik_llama.cpp for the benchmarks, once: 20 minutes of one core or more")
    command = ["cmake", "-S", str(source), "-B", str(source / "build"), *_OPTIONS]
    subprocess.run([*command, *(["-G", "Ninja"] if shutil.which("ninja") else [])], check=True, stdout=sys.stderr)
    subprocess.run(["cmake", "--build", str(source / "build"), "--target", "llama"], check=True, stdout=sys.stderr)
    return library


def _unpack(archive: Path, source: Path, scratch: Path) -> None:
    if sha256_of(archive) != pin().sha256:
        raise FetchError(f"{archive} is not the pinned {pin().archive}; remove it")
    prefix = PurePosixPath(pin().archive.removesuffix(".tar.gz")) / "vendor" / "ik_llama.cpp"
    with tarfile.open(archive) as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            content = tar.extractfile(member) if member.isfile() and path.is_relative_to(prefix) and ".." not in path.parts else None
            if content is not None:
                target = scratch / "tree" / path.relative_to(prefix)
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, target.open("wb") as file:
                    shutil.copyfileobj(content, file)
                target.chmod(0o755 if member.mode & 0o100 else 0o644)
    (scratch / "tree").rename(source)


def main() -> int:
    """Prints the library's path, or why there is none."""
    os.environ.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(len(os.sched_getaffinity(0))))
    try:
        print(build())
    except (FetchError, OSError, subprocess.CalledProcessError) as error:
        say(f"{error}\nik_llama.cpp cannot be built: the benchmarks go without it")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
