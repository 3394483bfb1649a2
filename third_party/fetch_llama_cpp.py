#!/usr/bin/env python3
"""Print the directory of the llama.cpp sources to build, fetching them when they are not here yet.

In this order:

1. ``LLAMA_CPP_SOURCE_DIR``: a llama.cpp tree of your own;
2. ``third_party/llama.cpp``: carried by llama_moe's own source distribution;
3. the cache: ``$LLAMA_MOE_CACHE``, else ``$XDG_CACHE_HOME/llama_moe``, else ``~/.cache/llama_moe``; a source distribution of
   the pinned package that lies there is unpacked;
4. ``pip download`` of the pinned package.

An archive is used only if its SHA-256 is the pinned one. Standard library only: CMake runs this while it configures.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CARRIED = HERE / "llama.cpp"

# What is taken from the archive's vendor/llama.cpp. The rest is documentation, tests, media and 75 MB of vocabularies
# (models/), which no target of ours needs; tools/ui is a web page.
PARTS = (
    "AUTHORS",
    "CMakeLists.txt",
    "LICENSE",
    "cmake",
    "common",
    "ggml",
    "gguf-py",
    "include",
    "licenses",
    "src",
    "tools",
    "vendor",
)
LEFT_OUT = ("tools/ui",)

# Files that are in every llama.cpp tree we can build.
LANDMARKS = ("CMakeLists.txt", "include/llama.h", "ggml/CMakeLists.txt", "src/llama-ext.h", "LICENSE")


class FetchError(Exception):
    """The sources cannot be had; the message says what to do."""


class Pin(NamedTuple):
    """The contents of llama_cpp.pin."""

    package: str
    version: str
    sha256: str
    commit: str

    @property
    def archive(self) -> str:
        """File name of the source distribution."""
        return f"{self.package.replace('-', '_')}-{self.version}.tar.gz"

    @property
    def key(self) -> str:
        """Name of the unpacked tree in the cache: changes with the archive and with the parts taken from it."""
        parts = "\n".join((self.sha256, *PARTS, *LEFT_OUT))
        return f"llama.cpp-{self.version}-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"


def read_pin(path: Path = HERE / "llama_cpp.pin") -> Pin:
    """Read the pin file."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return Pin(**dict(line.split("=", 1) for line in lines if line and not line.startswith("#")))


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Directory that llama_moe keeps fetched files in."""
    if environ.get("LLAMA_MOE_CACHE"):
        return Path(environ["LLAMA_MOE_CACHE"]).expanduser()
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "llama_moe"
    return Path.home() / ".cache" / "llama_moe"


def missing_landmarks(tree: Path) -> list[str]:
    """Names of files that a llama.cpp tree has and this directory has not."""
    return [name for name in LANDMARKS if not (tree / name).is_file()]


def find(pin: Pin, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Sources that are already on this machine, unpacked or as an archive in the cache; None when there are none."""
    own = environ.get("LLAMA_CPP_SOURCE_DIR")
    if own:
        tree = Path(own).expanduser().resolve()
        missing = missing_landmarks(tree)
        if missing:
            raise FetchError(f"LLAMA_CPP_SOURCE_DIR={own} is not a llama.cpp tree: it has no {missing[0]}")
        return tree
    if not missing_landmarks(CARRIED):
        return CARRIED
    cache = cache_dir(environ)
    tree = cache / pin.key
    if not missing_landmarks(tree):
        return tree
    archive = cache / pin.archive
    if archive.is_file():
        return unpack(pin, archive, tree)
    return None


def fetch(pin: Pin, environ: Mapping[str, str] = os.environ) -> Path:
    """Directory of the sources; downloads them when :func:`find` has none."""
    tree = find(pin, environ)
    if tree is not None:
        return tree
    cache = cache_dir(environ)
    with scratch_directory(cache) as scratch:
        archive = download(pin, scratch)
        return unpack(pin, archive, cache / pin.key)


@contextmanager
def scratch_directory(parent: Path) -> Iterator[Path]:
    """A temporary directory on the file system of the cache, so that a rename can move things out of it."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".tmp-", dir=parent))
    except OSError as error:
        raise FetchError(f"cannot write to the cache {parent}: {error}; set LLAMA_MOE_CACHE to a directory that can be written") from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# --- download -----------------------------------------------------------------------------------------------------

# pip asks an archive that it downloads for its metadata, through the build backend that the archive names; the real one
# brings a build environment along. With this in its place the answer costs nothing and no code of the archive runs.
STAND_IN_BACKEND = """
import os

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    name = "{name}-{version}.dist-info"
    os.mkdir(os.path.join(metadata_directory, name))
    with open(os.path.join(metadata_directory, name, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {package}\\nVersion: {version}\\n")
    return name
"""


def download(pin: Pin, scratch: Path, what: str = "llama.cpp", size: str = "77 MB", help_text: str = "") -> Path:
    """Download the pinned source distribution with pip, which checks the hash while it does."""
    say(f"fetching the sources of {what}: {pin.package} {pin.version} ({size}, once)")
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{pin.package}=={pin.version} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
    backend = scratch / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    stand_in = STAND_IN_BACKEND.format(name=pin.package.replace("-", "_"), package=pin.package, version=pin.version)
    (backend / "build.py").write_text(stand_in, encoding="utf-8")
    search_path = os.pathsep.join(filter(None, (str(backend.parent), os.environ.get("PYTHONPATH"))))

    arguments = ["download", "--no-deps", "--no-binary", pin.package, "--dest", str(scratch), "--requirement", str(requirements)]
    arguments += ["--quiet", "--disable-pip-version-check", "--no-input"]
    attempts: tuple[tuple[list[str], dict[str, str]], ...] = (
        (["--no-build-isolation"], {"PYTHONPATH": search_path}),
        ([], {}),  # plain pip, should a later release of the package or of pip not be content with the stand-in
    )
    # Inside a build of ours the environment names our backend, and pip would look for the archive's in that place.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("_PYPROJECT_HOOKS_", "PEP517_"))}
    output = ""
    with pip_command(scratch) as pip:
        for extra, environ in attempts:
            command = [*pip, *arguments, *extra]
            result = subprocess.run(
                command, env={**inherited, **environ}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
            )
            archive = scratch / pin.archive
            if result.returncode == 0 and archive.is_file():
                return archive
            output = output or result.stdout
    raise FetchError(
        f"pip could not download {pin.package}=={pin.version}:\n{textwrap.indent(output.strip(), '    ')}\n{help_text or advice(pin)}"
    )


@contextmanager
def pip_command(scratch: Path) -> Iterator[list[str]]:
    """How to run pip. An isolated build environment may lack it, and so may Debian's Python."""
    if importlib.util.find_spec("pip"):
        yield [sys.executable, "-m", "pip"]
        return
    base = getattr(sys, "_base_executable", None) or sys.executable
    if base != sys.executable and subprocess.run([base, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        yield [base, "-m", "pip"]
        return
    for name in ("pip3", "pip"):
        found = shutil.which(name)
        if found:
            yield [found]
            return
    environment = scratch / "pip-environment"
    made = subprocess.run([base, "-m", "venv", str(environment)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if made.returncode:
        raise FetchError(f"no pip: {sys.executable} has none, none is on PATH, and a virtual environment fails:\n{made.stdout}")
    yield [str(environment / ("Scripts" if os.name == "nt" else "bin") / "python"), "-m", "pip"]


def advice(pin: Pin) -> str:
    """What to do when there is no network."""
    return textwrap.dedent(f"""\
        With no network, do one of these and try again:
          - set LLAMA_CPP_SOURCE_DIR to a llama.cpp tree (llama_moe is made for upstream commit {pin.commit});
          - put the file {pin.archive}
            (sha256 {pin.sha256})
            into {cache_dir()}""")


# --- unpack -------------------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def wanted(name: str, prefix: PurePosixPath) -> PurePosixPath | None:
    """Where a member of the archive goes below the tree; None when it stays out."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.is_relative_to(prefix):
        return None
    relative = path.relative_to(prefix)
    if not relative.parts or relative.parts[0] not in PARTS or any(relative.is_relative_to(out) for out in LEFT_OUT):
        return None
    return relative


def unpack(pin: Pin, archive: Path, tree: Path) -> Path:
    """Check the archive, extract the parts we build and move them to `tree` in one step."""
    actual = sha256_of(archive)
    if actual != pin.sha256:
        raise FetchError(f"{archive} has sha256 {actual}, expected {pin.sha256}; remove it, or check where it comes from")
    prefix = PurePosixPath(pin.archive.removesuffix(".tar.gz")) / "vendor" / "llama.cpp"
    with scratch_directory(tree.parent) as scratch:
        extracted = scratch / "tree"
        with tarfile.open(archive) as tar:
            for member in tar:
                relative = wanted(member.name, prefix)
                source = tar.extractfile(member) if relative is not None and member.isfile() else None  # no links: the build needs none
                if relative is None or source is None:
                    continue
                target = extracted / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
                target.chmod(0o755 if member.mode & 0o100 else 0o644)
                os.utime(target, (member.mtime, member.mtime))
        missing = missing_landmarks(extracted)
        if missing:
            raise FetchError(f"{archive} has no vendor/llama.cpp/{missing[0]}")
        publish(extracted, tree)
    return tree


def publish(extracted: Path, tree: Path) -> None:
    """Rename a complete tree into place; another process may have been faster, which is as good."""
    if missing_landmarks(tree):
        shutil.rmtree(tree, ignore_errors=True)  # a half removed tree
    try:
        extracted.rename(tree)
    except OSError:
        if missing_landmarks(tree):
            raise


def say(text: str) -> None:
    """Tell the person who waits; stdout is for the answer."""
    sys.stderr.write(f"llama_moe: {text}\n")
    sys.stderr.flush()


def main() -> int:
    """Print the directory, or say on stderr what is wrong."""
    parser = argparse.ArgumentParser(description="Print the directory of the llama.cpp sources to build, fetching them if needed.")
    parser.add_argument("--offline", action="store_true", help="fail instead of downloading")
    arguments = parser.parse_args()
    pin = read_pin()
    try:
        tree = find(pin) if arguments.offline else fetch(pin)
        if tree is None:
            raise FetchError(f"there are no sources of llama.cpp here.\n{advice(pin)}")
    except FetchError as error:
        say(str(error))
        return 1
    print(tree)
    return 0


if __name__ == "__main__":
    sys.exit(main())
