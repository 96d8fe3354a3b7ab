"""Starts doors as processes of their own, by forking: importing costs more than most of them do.

Reads one JSON object a line: `module` and `argv` of `python -m`, `env`, the files `out`, `err` and
`code`; `ids`, a file for the example ids of every batch that the training loop took; `kill`,
when kill -9 strikes; `file_limit`, the bytes that a file may have, in place of a full disk. Answers
with the process id; the exit code appears in `code`, negative for a signal.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path

import diffusion_jax.api
import diffusion_jax.pipelines.output
from diffusion_jax.data import Loader, Prefetcher


def record_ids(path, kill):
    """Notes which examples the loop takes: `{"position": n, "ids": [...]}` a batch.

    `kill` = (batches, seconds) has kill -9 strike so long after that batch: from here, since a
    busy machine may hold up the test itself until the run is over.
    """
    count = itertools.count(1)
    fetched, make, take = {}, Loader.batch, Prefetcher.__next__

    def batch(self, position):
        result = make(self, position)
        fetched[position] = result["id"].tolist()
        return result

    def following(self):
        position, item = take(self)
        with open(path, "a") as file:
            file.write(json.dumps({"position": position, "ids": fetched.pop(position)}) + "\n")
        if kill and next(count) == kill[0]:
            threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
        return position, item

    Loader.batch, Prefetcher.__next__ = batch, following


def become(request):
    """Turns this process into the door; ends as `python -m` would, at-exit functions included."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
    os.environ.update(request["env"])
    # A shell that started the tests in the background has Ctrl-C ignored for all below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["ids"]:
        record_ids(request["ids"], request["kill"])
    if request["file_limit"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    sys.argv = [request["module"], *request["argv"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def keep(request):
    """Starts the door, says its process id and waits for its end."""
    pid = os.fork()
    if pid == 0:
        become(request)
        sys.exit(0)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    code = Path(request["code"])
    code.with_suffix(".part").write_text(str(os.waitstatus_to_exitcode(status)))
    code.with_suffix(".part").rename(code)
    os._exit(0)


def serve():
    """Never waits for a door itself, so that several run at once."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while line := sys.stdin.readline():
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(json.loads(line))


if __name__ == "__main__":
    assert diffusion_jax.api
    # No collection in a door touches the objects of the imports, whose pages it would have to copy:
    # most of what a short door costs.
    gc.collect()
    gc.freeze()
    serve()
