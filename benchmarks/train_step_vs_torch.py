"""Training steps (forward, backward, AdamW) against PyTorch: same sizes, same run, alternating.

    python benchmarks/train_step_vs_torch.py --torch_python=PATH [--network=dit] [--plain]

PATH is a Python that has PyTorch (this project does not use it). Each framework has a process of
its own; they take turns, and the ratio printed is the median over turns of seconds in PyTorch over
seconds in JAX: above 1, JAX is faster. Both unroll the blocks, and as in the doors of this project
freed memory is kept for the next step.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "unet": {
        "network": "unet",
        "batch": 64,
        "sizes": {
            "shape": [32, 32, 3],
            "channels": 64,
            "multipliers": [1, 2, 2],
            "blocks": 1,
            "attention_resolutions": [16],
            "heads": 4,
            "classes": 10,
        },
    },
    "dit": {
        "network": "dit",
        "batch": 64,
        "sizes": {
            "shape": [32, 32, 3],
            "patch": 2,
            "dim": 256,
            "depth": 4,
            "heads": 4,
            "classes": 10,
        },
        "jax": {"scan": False},
    },
    # The network of configs/cifar10_dit.py.
    "dit_s": {
        "network": "dit",
        "batch": 8,
        "sizes": {
            "shape": [32, 32, 3],
            "patch": 2,
            "dim": 384,
            "depth": 12,
            "heads": 6,
            "classes": 10,
        },
        "jax": {"scan": False},
    },
    # ADM's kind of U-Net with a third of its width.
    "adm_small": {
        "network": "unet",
        "batch": 16,
        "sizes": {
            "shape": [32, 32, 3],
            "channels": 64,
            "multipliers": [1, 2, 3, 4],
            "blocks": 1,
            "attention_resolutions": [16, 8],
            "head_dim": 64,
            "resample": "block",
            "classes": 10,
        },
    },
    "digits": {
        "network": "unet",
        "batch": 128,
        "sizes": {
            "shape": [8, 8, 1],
            "channels": 32,
            "multipliers": [1, 2],
            "blocks": 1,
            "attention_resolutions": [4],
            "heads": 4,
            "classes": 10,
        },
    },
}


def jax_worker() -> None:
    """Answers the protocol of `torch_twins.py` with the networks of this package."""
    import functools

    import jax
    import jax.numpy as jnp
    import optax

    from diffusion_jax.networks import NETWORKS, compiler_options, functional
    from diffusion_jax.parallel.memory import keep_freed_memory

    keep_freed_memory()
    request = json.loads(sys.stdin.readline())
    sizes = {**request["sizes"], **request.get("jax", {})}
    shape, classes = tuple(sizes.pop("shape")), sizes.pop("classes")
    make = functools.partial(NETWORKS[request["network"]], shape, num_classes=classes, **sizes)
    net = functional(make)
    keys = jax.random.split(jax.random.key(0), 5)
    params = jax.jit(net.init, compiler_options=compiler_options(run_once=True))(keys[0])
    tx = optax.adamw(1e-4, weight_decay=1e-2)
    opt_state = tx.init(params)
    full = (request["batch"], *shape)
    x, target = jax.random.normal(keys[1], full), jax.random.normal(keys[2], full)
    noise = jax.random.normal(keys[3], full[:1])
    label = jax.random.randint(keys[4], full[:1], 0, classes)

    def step(params, opt_state):
        def loss_of(params):
            return jnp.mean(jnp.square(net.apply(params, x, noise, {"label": label}) - target))

        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    options = {} if request["plain"] else compiler_options()
    step = jax.jit(step, donate_argnums=(0, 1), compiler_options=options)
    print(sum(leaf.size for leaf in jax.tree.leaves(params)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            params, opt_state, loss = step(params, opt_state)
        loss.block_until_ready()
        print(time.perf_counter() - start, flush=True)


class Worker:
    """A framework in a process of its own that runs steps when told to."""

    def __init__(self, command: list[str], case: dict[str, Any]):
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.parameters = int(self.ask(json.dumps(case)))

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def seconds(self, steps: int) -> float:
        """Seconds a step, over `steps` steps."""
        return float(self.ask(str(steps))) / steps

    def close(self) -> None:
        """Ends the process by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(name: str, torch_python: str, turns: int, plain: bool) -> None:
    """Prints the seconds a step of both and their ratio for one case."""
    case = {**CASES[name], "threads": os.cpu_count(), "plain": plain}
    here = Path(__file__).resolve()
    ours = Worker([sys.executable, str(here), "--worker"], case)
    theirs = Worker([torch_python, str(here.with_name("torch_twins.py"))], case)
    ours.seconds(2), theirs.seconds(2)
    steps = max(1, round(1.0 / ours.seconds(2)))
    rows = [(theirs.seconds(steps), ours.seconds(steps)) for _ in range(turns)]
    torch_time, jax_time = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(t / j for t, j in rows)
    print(
        f"{name}: parameters {ours.parameters:,} (PyTorch {theirs.parameters:,}); "
        f"JAX {jax_time:.3f} s, PyTorch {torch_time:.3f} s a step; "
        f"PyTorch/JAX {ratio:.2f} (turns: {', '.join(f'{t / j:.2f}' for t, j in rows)})",
        flush=True,
    )
    ours.close()
    theirs.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python")
    parser.add_argument("--network", choices=[*CASES, "all"], default="all")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="XLA's own options")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return jax_worker()
    if not args.torch_python:
        parser.error("--torch_python=PATH is needed: a Python that has PyTorch")
    for name in CASES if args.network == "all" else [args.network]:
        compare(name, args.torch_python, args.turns, args.plain)


if __name__ == "__main__":
    main()
