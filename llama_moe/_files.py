"""Files that are complete or not there at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives another name in the file's folder; what the body writes there gets the file's own when all of it is on the disk.

    A link is followed: the file that it stands for is written. Errors name `path`.

    Raises:
        OSError: `path` is there and is no regular file, such as a device or a pipe, which a new file would replace; or what goes wrong
            with writing.
    """
    _refuse_special(path)
    target = Path(os.path.realpath(path))  # or the link itself would be replaced
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # such as a folder that is none: what went wrong first is what to tell
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            _rename(error, str(partial), os.fspath(path))
        raise


def check_writable(path: str | os.PathLike[str]) -> None:
    """Finds out whether `written_whole()` could write a file, before the work whose result it is to have.

    Raises:
        OSError: it could not.
    """
    _refuse_special(path)
    target = Path(os.path.realpath(path))
    probe = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        _rename(error, str(probe), os.fspath(path))
        raise


def _refuse_special(path: str | os.PathLike[str]) -> None:
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a directory; the name of a file is needed", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file, which is the only kind that can be written", os.fspath(path))


def _rename(error: OSError, partial: str, target: str) -> None:
    """Makes an error tell of the target, where it tells of the partial file."""
    if error.filename is not None and os.fspath(error.filename) == partial:
        error.filename = target
        error.filename2 = None  # of a rename, the target again
    if isinstance(error.strerror, str):
        error.strerror = error.strerror.replace(partial, target)
    error.args = tuple(arg.replace(partial, target) if isinstance(arg, str) else arg for arg in error.args)
