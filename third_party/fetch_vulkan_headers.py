#!/usr/bin/env python3
"""Print an include directory with Vulkan headers new enough for llama.cpp's Vulkan backend, fetching them when there is none.

In this order:

1. ``$VULKAN_SDK/include``, ``/usr/local/include`` and ``/usr/include``, if their headers are at least as new as the pinned ones;
2. the cache (see ``fetch_llama_cpp.py``); the pinned package's file that lies there is unpacked;
3. the pinned package, of a later Debian release than this machine's: apt fetches it from the mirror that this machine uses.
   Nothing is installed, and apt's own lists stay as they are.

A file is used only if its SHA-256 is the pinned one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from fetch_llama_cpp import FetchError, cache_dir, say, scratch_directory, sha256_of

HERE = Path(__file__).resolve().parent
HEADER = Path("vulkan") / "vulkan_core.h"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
Version = tuple[int, int, int]


class Pin(NamedTuple):
    """The contents of vulkan_headers.pin."""

    package: str
    version: str
    release: str
    sha256: str

    @property
    def archive(self) -> str:
        """File name of the package."""
        return f"{self.package}_{self.version}_amd64.deb"

    @property
    def headers(self) -> Version:
        """Version of the headers in it."""
        major, minor, patch = re.findall(r"\d+", self.version)[:3]
        return int(major), int(minor), int(patch)


def read_pin(path: Path = HERE / "vulkan_headers.pin") -> Pin:
    """Read the pin file."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return Pin(**dict(line.split("=", 1) for line in lines if line and not line.startswith("#")))


def version_in(include: Path) -> Version | None:
    """Version of the Vulkan headers in an include directory; None when it has none."""
    try:
        text = (include / HEADER).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    patch = re.search(r"#define VK_HEADER_VERSION (\d+)", text)
    # VK_MAKE_API_VERSION(variant, major, minor, patch)
    complete = re.search(r"#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(\d+, (\d+), (\d+),", text)
    return (int(complete[1]), int(complete[2]), int(patch[1])) if patch and complete else None


def find(pin: Pin, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Headers that are already on this machine and new enough; None when there are none."""
    system = [Path("/usr/local/include"), Path("/usr/include")]
    if environ.get("VULKAN_SDK"):
        system.insert(0, Path(environ["VULKAN_SDK"]) / "include")
    for include in system:
        found = version_in(include)
        if found is not None and found >= pin.headers:
            return include
    include = unpacked(pin, environ)
    if version_in(include) == pin.headers:
        return include
    archive = cache_dir(environ) / pin.archive
    return unpack(pin, archive, include) if archive.is_file() else None


def unpacked(pin: Pin, environ: Mapping[str, str]) -> Path:
    """Where the pinned headers lie in the cache."""
    return cache_dir(environ) / f"vulkan-headers-{pin.version}" / "include"


def fetch(pin: Pin, environ: Mapping[str, str] = os.environ) -> Path:
    """An include directory; downloads the pinned package when :func:`find` has none."""
    include = find(pin, environ)
    if include is not None:
        return include
    with scratch_directory(cache_dir(environ)) as scratch:
        return unpack(pin, download(pin, scratch), unpacked(pin, environ))


def download(pin: Pin, scratch: Path) -> Path:
    """Have apt download the package, with lists and settings that are in `scratch` alone."""
    if shutil.which("apt-get") is None or not KEYRING.is_file():
        raise FetchError(f"no Vulkan headers here.\n{advice(pin)}")
    say(f"fetching Vulkan headers: {pin.package} {pin.version} of Debian {pin.release} (1.6 MB, once, and 10 MB of lists)")
    sources = scratch / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {debian_mirror(pin)} {pin.release} main\n", encoding="utf-8")
    (scratch / "lists" / "partial").mkdir(parents=True)
    (scratch / "archives" / "partial").mkdir(parents=True)
    settings = {
        "APT::Architecture": "amd64",  # of the headers: they are the same for all, the file that is pinned is not
        "APT::Architectures": "amd64",
        "APT::Sandbox::User": "",  # who owns the scratch directory downloads
        "Acquire::Languages": "none",
        "Dir::Cache": str(scratch),
        "Dir::Etc::sourcelist": str(sources),
        "Dir::Etc::sourceparts": "-",
        "Dir::State::lists": str(scratch / "lists"),
    }
    options = [argument for name, value in settings.items() for argument in ("-o", f"{name}={value}")]
    for action in (["update"], ["download", f"{pin.package}={pin.version}"]):
        run(["apt-get", "-q", *options, *action], scratch, pin)
    return scratch / pin.archive


def debian_mirror(pin: Pin) -> str:
    """The address from which this machine has its Debian packages."""
    command = [
        "apt-get",
        "indextargets",
        "--format",
        "$(CODENAME) $(REPO_URI)",
        "Origin: Debian",
        "Component: main",
        "Created-By: Packages",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in result.stdout.splitlines():
        codename, _, address = line.partition(" ")
        if address and "-" not in codename:  # the release itself: updates and security fixes may be elsewhere
            return address
    raise FetchError(f"apt knows no mirror of Debian; it may help to run: apt-get update\n{advice(pin)}")


def unpack(pin: Pin, archive: Path, include: Path) -> Path:
    """Check the package's file and move its headers into the cache in one step."""
    actual = sha256_of(archive)
    if actual != pin.sha256:
        raise FetchError(f"{archive} has sha256 {actual}, expected {pin.sha256}; remove it, or check where it comes from")
    with scratch_directory(cache_dir()) as scratch:
        run(["dpkg-deb", "--extract", str(archive), str(scratch / "package")], scratch, pin)
        tree = scratch / "tree"
        (scratch / "package" / "usr").rename(tree)
        if version_in(tree / "include") != pin.headers:
            raise FetchError(f"{archive} has no Vulkan headers {'.'.join(map(str, pin.headers))}")
        try:
            tree.rename(include.parent)
        except OSError:
            if version_in(include) != pin.headers:  # else another process was faster, which is as good
                raise
    return include


def run(command: list[str], folder: Path, pin: Pin) -> None:
    """Run a program of Debian's."""
    result = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise FetchError(f"{command[0]} failed:\n{result.stdout.strip()}\n{advice(pin)}")


def advice(pin: Pin) -> str:
    """What to do when they cannot be had."""
    version = ".".join(map(str, pin.headers))
    return (
        f"Install the headers of Vulkan {version} or newer, or the Vulkan SDK (and set VULKAN_SDK), or put the file {pin.archive}\n"
        f"of Debian {pin.release} (sha256 {pin.sha256}) into {cache_dir()}"
    )


def main() -> int:
    """Print the directory, or say on stderr what is wrong."""
    try:
        print(fetch(read_pin()))
    except FetchError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
