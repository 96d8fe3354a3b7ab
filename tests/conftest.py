"""Eight virtual CPU devices for every test, set before JAX starts; types checked at run time."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

# One cache of programs for this run: all its processes inherit it, and the user's own stays as it
# is. Who sets the variable keeps one from run to run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="diffusion_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])

# A few small steps cost less than optimising their program, which so compiles in a third of the
# time. For the programs of all doors, and of the files that use `quick_programs`.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All tests at once run in two processes, file by file; chosen files run in this one."""
    whole = config.args == config.getini("testpaths")
    if not whole or not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    if config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses, config.option.dist = 2, "loadfile"


def pytest_collection_finish() -> None:
    """Nothing that was imported is looked at again by each collection of garbage."""
    gc.collect()
    gc.freeze()


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
    flags = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("door_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flags}"},
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
        if file_limit:  # which would leave the programs of all others cut, too
            environment.setdefault("JAX_COMPILATION_CACHE_DIR", folder / "cache")
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


@contextlib.contextmanager
def compiled_quickly() -> Iterator[None]:
    """Programs of runs, networks and pipelines that are made in here are not optimised."""
    from diffusion_jax.networks import compiling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "_CPU", compiling._CPU | QUICK)
        yield


@pytest.fixture(scope="module")
def quick_programs() -> Iterator[None]:
    with compiled_quickly():
        yield


@pytest.fixture(scope="session")
def moons_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir after the one step of `toys.moons()`, for all: copy it before a change."""
    import toys

    import diffusion_jax

    folder = tmp_path_factory.mktemp("moons") / "run"
    with compiled_quickly():
        diffusion_jax.train(toys.moons(), folder)
    return folder


@pytest.fixture(scope="session")
def captioned_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(workdir, run) of `toys.captioned`, for all: copy the workdir before a change."""
    import toys

    with compiled_quickly():
        return toys.captioned(tmp_path_factory.mktemp("captions"))


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
