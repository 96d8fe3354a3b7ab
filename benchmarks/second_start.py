"""What a second start saves: lower + compile of the train step, first and second process.

    python benchmarks/second_start.py --config=configs/digits.py

Two processes share a fresh compilation cache. Prints seconds of lower + compile and from process
start to the first finished step, and the ratio of the second to the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

from absl import flags

from diffusion_jax import config_flag, doors

CONFIG = config_flag.define("A file of configs/.")
CHILD = flags.DEFINE_bool("child", False, "Measure in this process.")


def child() -> None:
    """Builds, compiles and makes one step; prints its times."""
    import jax

    from diffusion_jax import api
    from diffusion_jax.parallel.arrays import global_batch

    config = CONFIG.value
    with tempfile.TemporaryDirectory() as workdir:
        run = api.Run.build(config, workdir)
        run.enable_cache()
        batch = global_batch(run.loader().batch(0), run.compiled.mesh)
        state = run.compiled.init()
        began = time.perf_counter()
        step = run.compiled.lower(batch, {}).compile()
        compiled = time.perf_counter() - began
        jax.block_until_ready(step(state, {}, batch))
        run.checkpoints.close()
    started = float(os.environ["BENCHMARK_STARTED"])
    print(json.dumps({"compile": compiled, "total": time.time() - started}))


def parent() -> None:
    """Runs two children on one cache."""
    with tempfile.TemporaryDirectory() as cache:
        rows = []
        for number in (1, 2):
            environment = {
                **os.environ,
                "JAX_COMPILATION_CACHE_DIR": cache,
                "BENCHMARK_STARTED": str(time.time()),
            }
            command = [sys.executable, *sys.argv, "--child"]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(
                f"start {number}: lower + compile {rows[-1]['compile']:.2f} s, "
                f"process start to first step {rows[-1]['total']:.2f} s"
            )
    for name in ("compile", "total"):
        print(f"second/first {name} {rows[1][name] / rows[0][name]:.2f}")


def main() -> None:
    """Parent or child, by flag."""
    child() if CHILD.value else parent()


if __name__ == "__main__":
    doors.enter(main, required=("config",))
