"""Start-up of the JAX distributed runtime: always, also for one process on a laptop.

The runtime is what turns SIGTERM into a step that all processes agree on, and what notices a dead
process, so a run behaves alike on one machine and on many.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from diffusion_jax.errors import ConfigError, DataError

T = TypeVar("T")

COORDINATOR = "DIFFUSION_JAX_COORDINATOR"
NUM_PROCESSES = "DIFFUSION_JAX_NUM_PROCESSES"
PROCESS_ID = "DIFFUSION_JAX_PROCESS_ID"
CPU_DEVICES = "DIFFUSION_JAX_CPU_DEVICES"

# Hosts that gRPC, and nothing but gRPC, reaches without the proxy of the environment.
GRPC_EXEMPT = "no_grpc_proxy"
PROXY_EXEMPT = "no_proxy"

# A process alone waits for nobody; with a limit it would die of its own silence on waking up, after
# Ctrl-Z or the suspension of a virtual machine. Seconds: as good as never.
_HEARTBEAT_ALONE = 10**7

# Milliseconds that processes wait for one that downloads or computes something: a day.
_PATIENCE = 86_400_000


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    cpu_devices: int | None = None,
    agree_on_sigterm: bool = True,
    heartbeat_timeout: int = 100,
    initialization_timeout: int = 300,
) -> None:
    """Starts the distributed runtime; does nothing when it runs already.

    Values come from the arguments, else from the environment (`DIFFUSION_JAX_COORDINATOR`,
    `DIFFUSION_JAX_NUM_PROCESSES`, `DIFFUSION_JAX_PROCESS_ID`, `DIFFUSION_JAX_CPU_DEVICES`), else
    from the cluster that JAX detects (Slurm, Open MPI, Cloud TPU, GKE, Kubernetes), else the run
    is one process on localhost. Must run before anything touches a device.

    Args:
      coordinator: "host:port" of process 0.
      num_processes, process_id: how many, and which; 0 <= process_id < num_processes.
      cpu_devices: number of virtual devices of the CPU platform in this process.
      agree_on_sigterm: whether SIGTERM, instead of ending this process, makes `reached_preemption`
        true at a common step. False for programs that do not ask at every step.
      heartbeat_timeout: seconds without a sign of life after which one of several processes counts
        as dead.
      initialization_timeout: seconds to wait for the other processes.

    Raises:
      ConfigError: for values that do not fit together, or a call that comes too late.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = coordinator or os.environ.get(COORDINATOR)
    num_processes = _integer("num_processes", num_processes, NUM_PROCESSES)
    process_id = _integer("process_id", process_id, PROCESS_ID)
    cpu_devices = _integer("cpu_devices", cpu_devices, CPU_DEVICES)
    _check_numbers(coordinator, num_processes, process_id, cpu_devices)
    timeouts = {
        "heartbeat_timeout_seconds": heartbeat_timeout,
        "initialization_timeout": initialization_timeout,
    }
    try:
        if cpu_devices is not None:
            jax.config.update("jax_num_cpu_devices", cpu_devices)
        jax.config.update("jax_enable_preemption_service", agree_on_sigterm)
        if coordinator is not None:
            _check_port_free(coordinator, process_id)
            _start(coordinator, num_processes, process_id, timeouts)
        elif not _start_on_cluster(timeouts):
            _start_alone(timeouts)
    except RuntimeError as error:
        if "before" not in str(error) or "backend" not in str(error).lower():
            raise
        raise ConfigError(
            "distributed.initialize comes too late: a device is in use already; expected it "
            "before the first JAX computation; nearest: call it first in the program"
        ) from error


def _integer(field: str, value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    try:
        return int(os.environ[variable])
    except ValueError:
        raise ConfigError(
            f"{variable}={os.environ[variable]!r} ({field}) is no whole number"
        ) from None


def _check_numbers(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    cpu_devices: int | None,
) -> None:
    if cpu_devices is not None and cpu_devices < 1:
        raise ConfigError(f"cpu_devices={cpu_devices} ({CPU_DEVICES}) must be at least 1")
    given = {
        f"coordinator ({COORDINATOR})": coordinator,
        f"num_processes ({NUM_PROCESSES})": num_processes,
        f"process_id ({PROCESS_ID})": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        present = next(name for name, value in given.items() if value is not None)
        raise ConfigError(f"{present} is given without {' and '.join(missing)}; expected all three")
    if coordinator is None or num_processes is None or process_id is None:
        return
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        raise ConfigError(f"coordinator={coordinator!r} is no address; expected host:port")
    if num_processes < 1:
        raise ConfigError(f"num_processes={num_processes} must be at least 1")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"process_id={process_id} is outside 0..{num_processes - 1} "
            f"(num_processes={num_processes})"
        )


def _check_port_free(coordinator: str, process_id: int | None) -> None:
    """A coordinator port in use would end process 0 with a segmentation fault."""
    if process_id != 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(coordinator.rpartition(":")[2])))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"coordinator={coordinator!r}: its port cannot be used: {error}; expected a free "
                f"port on the host of process 0"
            ) from error


def _start_alone(options: dict) -> None:
    """Starts one process on localhost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    alone = {
        "heartbeat_timeout_seconds": _HEARTBEAT_ALONE,
        "coordinator_bind_address": address,
    }
    _start(address, 1, 0, options | alone)


def _start(
    coordinator: str, num_processes: int | None, process_id: int | None, options: dict
) -> None:
    """Starts with everything given, past proxies: gRPC would send even localhost through one."""
    host = urlsplit(f"//{coordinator}").hostname or coordinator
    exempt = os.environ.get(GRPC_EXEMPT) or os.environ.get(PROXY_EXEMPT)
    os.environ[GRPC_EXEMPT] = f"{exempt},{host}" if exempt else host
    checks_proxy = jax.config.read("jax_check_proxy_envs")
    jax.config.update("jax_check_proxy_envs", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",
            **options,
        )
    finally:
        jax.config.update("jax_check_proxy_envs", checks_proxy)


def _start_on_cluster(options: dict) -> bool:
    """Lets JAX detect a cluster; False where there is none."""
    try:
        jax.distributed.initialize(**options)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return False
    return True


def reached_preemption(step: int) -> bool:
    """Whether all processes should save at `step` and leave, since one received SIGTERM.

    True at the same step in every process, and then no more. Must be called at every step, by every
    process.
    False when the runtime was not started, or started without `agree_on_sigterm`.
    """
    if not jax.distributed.is_initialized():
        return False
    if not jax.config.jax_enable_preemption_service:  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return bool(multihost_utils.reached_preemption_sync_point(step))


class Preemption:
    """Asks `reached_preemption` as often as it likes, also within a step, and remembers a yes.

    Every process must ask equally often: the questions are counted in place of the steps.
    """

    def __init__(self) -> None:
        self._asked, self._reached = 0, False

    def reached(self) -> bool:
        """Whether all processes should save and leave."""
        if not self._reached:
            self._asked += 1
            self._reached = reached_preemption(self._asked)
        return self._reached


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns, made by process 0 before the others: a data set that is missing is then
    downloaded once, and found by the rest. Every process must call it."""
    if jax.process_count() == 1:
        return make()
    if jax.process_index() == 0:
        made = make()
        _wait("main_first")
        return made
    _wait("main_first")
    return make()


_PASSED = itertools.count()


def _wait(name: str) -> None:
    """Returns when all processes are here, however long one of them is at work; a collective of
    devices gives up after a while."""
    barrier = multihost.get_barrier_sync_fn()
    barrier(key=f"diffusion_jax_{name}_{next(_PASSED)}", timeout_ms=_PATIENCE)


def gather_json(value: Any) -> list[Any]:
    """What each process gave, in the order of the processes. Every process must call it.

    Args:
      value: what `json` can write; may be of another length in each process.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(text.size)))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def by_main(make: Callable[[], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `make` returns in process 0, the same in all. Every process must call it.

    For what one alone should compute, read or write: disks of other hosts may hold something else.

    Raises:
      ConfigError, DataError: what `make` raises, in every process.
    """
    if jax.process_count() == 1:
        return dict(make())
    content, error = b"", None
    if jax.process_index() == 0:
        try:
            content = _packed(make())
        except (ConfigError, DataError) as mistake:
            error = mistake
    _wait("by_main")
    said = [type(error).__name__, str(error)] if error is not None else None
    size, said = gather_json([len(content), said])[0]
    if error is not None:
        raise error
    if said is not None:
        kind = ConfigError if said[0] == ConfigError.__name__ else DataError
        raise kind(f"process 0 of the run: {said[1]}")
    mine = np.frombuffer(content, np.uint8) if content else np.zeros(size, np.uint8)
    whole = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    with np.load(io.BytesIO(whole.tobytes()), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _packed(arrays: Mapping[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    # As bytes: a device would cut 64 bits to 32.
    np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]
    return file.getvalue()
