"""What all doors do: read flags, start the distributed runtime, end with an exit code.

A mistake of the user ends in one line on stderr and the code that launch scripts rely on; only a
fault of ours shows a traceback.
"""

from __future__ import annotations

import ast
import contextlib
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from absl import app, flags

from diffusion_jax import sigterm
from diffusion_jax.errors import ConfigError, DiffusionJaxError
from diffusion_jax.flag_errors import explain

N = TypeVar("N")

INTERRUPTED = 130
"""Exit code after Ctrl-C, the one shells give."""
PATIENCE = 10.0
"""Seconds that a process which failed waits for the others to end as well."""
HELP = {"--help", "-help", "-?", "--helpshort", "--helpfull", "--helpxml"}


def enter(
    run: Callable[[], None],
    *,
    required: Sequence[str],
    argv: Sequence[str] | None = None,
    agree_on_sigterm: bool = False,
) -> None:
    """Parses the flags, runs, and exits with the code of the outcome.

    Args:
        run: the work; reads its flags from where it defined them.
        required: flags that must be given.
        argv: command line; the process's own by default.
        agree_on_sigterm: whether `run` asks at every step if the machine is wanted back; SIGTERM
            ends the process otherwise. Before the runtime is up it then ends with 75.
    """
    start = sigterm.leaves_at_once() if agree_on_sigterm else contextlib.nullcontext()
    try:
        with start:
            parse(sys.argv if argv is None else argv, required)
            _quiet()
            from diffusion_jax.parallel import distributed, memory

            distributed.initialize(agree_on_sigterm=agree_on_sigterm)
        if jax_backend() == "cpu":
            memory.keep_freed_memory()
        run()
    except DiffusionJaxError as error:
        leave(error)
    except KeyboardInterrupt:
        print("interrupted: what is saved stands; the same command goes on", file=sys.stderr)
        _end(INTERRUPTED)
    except Exception:
        traceback.print_exc()
        _end(1)
    sys.exit(0)


def leave(error: DiffusionJaxError) -> NoReturn:
    """Prints the one line of an error and exits with its code."""
    message = " ".join(str(error).split())
    print(f"{type(error).__name__}: {message}", file=sys.stderr, flush=True)
    _end(error.exit_code)


def _end(code: int) -> NoReturn:
    """Ends the process, also one that fails alone among many.

    At a regular exit the distributed runtime waits minutes for all processes and then aborts, which
    would hide the code. Processes that fail together still leave together.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized():
        sys.exit(code)

    def shut_down() -> None:
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()

    thread = threading.Thread(target=shut_down, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def parse(argv: Sequence[str], required: Sequence[str]) -> None:
    """Parses absl flags.

    Raises:
        ConfigError: an unknown flag or config field, a wrong type, a missing flag or file.
    """
    app.define_help_flags()
    try:
        rest = flags.FLAGS(list(argv))
        for name in required:
            # A config file that cannot be opened shows itself only when its value is used.
            hasattr(flags.FLAGS[name].value, "lock")
    except SystemExit as shown:
        # absl ends --help with 1, as if it were a mistake.
        sys.exit(0 if HELP & set(argv) else shown.code)
    except Exception as error:  # a config file may raise anything
        raise ConfigError(explain(error, argv)) from error
    if len(rest) > 1:
        raise ConfigError(f"argument {rest[1]!r} is no flag; flags look like --name=value")
    for name in required:
        if not flags.FLAGS[name].value:
            raise ConfigError(f"--{name} is missing")


def _quiet() -> None:
    """Keeps the libraries' own chatter off the terminal; our lines and warnings stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    import logging

    for name in ("absl", "orbax", "jax._src.xla_bridge"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # When one of many reads or writes of a checkpoint fails, orbax raises its error, which we show,
    # and closes the event loop (asyncio_utils._run_sync_via_new_loop); each of the others then
    # fails in a thread of tensorstore, or is dropped, with a trace of its own.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    previous = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not _is_left_behind(unraisable):
            previous(unraisable)

    sys.unraisablehook = hook


def _is_left_behind(unraisable: Any) -> bool:
    """Whether it comes from a read or write of a checkpoint that nobody waits for any more."""
    error, code = unraisable.exc_value, getattr(unraisable.object, "cr_code", None)
    if code is not None and os.path.join("orbax", "checkpoint") in code.co_filename:
        return True
    return isinstance(error, RuntimeError) and str(error) == "Event loop is closed"


def jax_backend() -> str:
    """The platform of this process; starts it."""
    import jax

    return jax.default_backend()


def numbers(flag: str, text: str, kind: Callable[[str], N], example: str) -> list[N] | None:
    """A comma-separated list; None for an empty one.

    Args:
        flag: its name, for the message.
        text: what was given.
        kind: `int` or `float`, which reads one of them.
        example: of a list, for the message.

    Raises:
        ConfigError: something else stands there.
    """
    try:
        return [kind(part) for part in text.split(",")] if text else None
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ConfigError(f"--{flag}={text!r}: expected {what}, such as {example}") from None


def values(given: Any) -> list[Any]:
    """The values of a setting such as ddim|heun or 5|10, each as in Python or else a text."""
    result: list[Any] = []
    for part in given.split("|") if isinstance(given, str) else [given]:
        try:
            result.append(ast.literal_eval(part) if isinstance(part, str) else part)
        except (ValueError, SyntaxError):
            result.append(part)
    return result


def settings(flag: str, text: str) -> dict[str, Any] | None:
    """Comma-separated name=value pairs, values as in Python or else texts; None for an empty list.

    Raises:
        ConfigError: something else stands there.
    """
    result: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, given, value = part.partition("=")
        if not (given and name.strip().isidentifier()):
            raise ConfigError(f"--{flag}={text!r}: expected pairs, such as eta=0.5")
        if name.strip() in result:
            raise ConfigError(f"--{flag}={text!r}: {name.strip()} is given twice; leave one")
        try:
            result[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError):
            result[name.strip()] = value.strip()
    return result or None


def note(message: str) -> None:
    """One line on the terminal, from process 0."""
    import jax

    if jax.process_index() == 0:
        print(message, flush=True)
