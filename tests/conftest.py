"""Eight virtual CPU devices for every test, set before JAX starts; types checked at run time."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
# Eight devices on two cores deadlock in collectives under the concurrency-optimised scheduler.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_cpu_enable_concurrency_optimized_scheduler=false"
)

# A device that waits in a collective holds a thread: with one thread a device, collectives that do
# not depend on each other can deadlock under any scheduler.
os.environ.setdefault("PJRT_NPROC", "32")

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)
install_import_hook("diffusion_jax", "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests at once run in two processes, file by file; chosen files run in this one."""
    whole = config.args == config.getini("testpaths")
    if not whole or not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


class Door:
    """A running `python -m diffusion_jax.<door>`."""

    def __init__(self, folder: Path, pid: int) -> None:
        self.folder, self.pid = folder, pid

    def signal(self, number: int) -> None:
        """Sends a signal; one that comes after the end is lost."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def running(self) -> bool:
        return not (self.folder / "code").exists()

    def wait(self, timeout: float = 60.0) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); the code is -n for signal n."""
        deadline = time.monotonic() + timeout
        while self.running:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"{timeout} s: {(self.folder / 'err').read_text()}")
            time.sleep(0.005)
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        return int((self.folder / "code").read_text()), out, err


@pytest.fixture(scope="session")
def start_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Door]]:
    """`start_door("main", "--config=...", ids=None, DIFFUSION_JAX_...=...)` starts a process."""
    root = tmp_path_factory.mktemp("doors")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(root / "cache")}
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("door_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **cache},
        text=True,
    )
    numbers = itertools.count()

    def start(
        name: str,
        *argv: str,
        ids: Path | None = None,
        kill: tuple[int, float] | None = None,
        file_limit: int | None = None,
        **environment: object,
    ) -> Door:
        folder = root / str(next(numbers))
        folder.mkdir()
        for file in ("out", "err"):
            (folder / file).touch()
        request = {
            "module": f"diffusion_jax.{name}",
            "argv": argv,
            "env": {key: str(value) for key, value in environment.items()},
            "ids": str(ids) if ids else None,
            "kill": kill,
            "file_limit": file_limit,
            **{file: str(folder / file) for file in ("out", "err", "code")},
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        return Door(folder, int(server.stdout.readline()))

    yield start
    server.stdin.close()
    server.stdout.close()
    server.wait()


@pytest.fixture(scope="session")
def write_tfds() -> Callable[..., Path]:
    """`tfds_files.write_data_set`, which conftest files of other folders can reach only here."""
    spec = importlib.util.spec_from_file_location(
        "tfds_files", Path(__file__).with_name("tfds_files.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_data_set


@pytest.fixture
def without_rights(tmp_path):
    """`with without_rights():` runs as nobody where the tests run as root, whom no mode binds."""
    # One level more where several processes share the tests.
    for folder in [tmp_path, *tmp_path.parents][: 4 if "PYTEST_XDIST_WORKER" in os.environ else 3]:
        folder.chmod(0o755)

    @contextlib.contextmanager
    def drop():
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(user)

    return drop
