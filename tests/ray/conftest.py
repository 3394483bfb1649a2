"""A Ray of two CPUs in this machine, for the tests that need processes."""

from __future__ import annotations

import importlib.util
import logging
import secrets
import tempfile
from collections.abc import Iterator

import pytest

# Without Ray, nothing here can even be imported.
collect_ignore_glob = [] if importlib.util.find_spec("ray") else ["test_*.py"]


@pytest.fixture(scope="session")
def ray_machine() -> Iterator[None]:
    import ray

    # Ray's sockets are in its folder, and their paths must be short.
    with pytest.MonkeyPatch.context() as environment, tempfile.TemporaryDirectory(prefix="ray-") as folder:
        environment.setenv("RAY_AUTH_TOKEN", secrets.token_hex(16))  # else it writes one to the home folder
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(
                num_cpus=2,
                include_dashboard=False,
                object_store_memory=96 << 20,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=folder,
            )
            yield
        finally:
            ray.shutdown()
