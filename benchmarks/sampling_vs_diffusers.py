"""Sampling against diffusers in PyTorch: same scheduler config, grid and network, alternating.

    python benchmarks/sampling_vs_diffusers.py --torch_python=PATH

PATH is a Python that has PyTorch and diffusers (this project uses neither). Each has a process of
its own; they take turns, warm, and the ratio printed is the median over turns of seconds in PyTorch
over seconds in JAX for a whole loop of 50 steps: above 1, JAX is faster. How each loop is turned
into ours is `diffusion_jax.interop.plan`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

from train_step_vs_torch import CASES, Worker

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {**BETAS, "clip_sample": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {**BETAS, "use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", BETAS),
    "euler": ("EulerDiscreteScheduler", BETAS),
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


def jax_worker() -> None:
    """Answers the protocol of `torch_sampling.py` with the networks and solvers of this package."""
    import functools
    import time

    import jax
    import jax.numpy as jnp

    from diffusion_jax import interop
    from diffusion_jax.networks import NETWORKS, compiler_options, functional
    from diffusion_jax.parallel.memory import keep_freed_memory

    keep_freed_memory()
    request = json.loads(sys.stdin.readline())
    sizes = {**request["sizes"], **request.get("jax", {})}
    shape, classes = tuple(sizes.pop("shape")), sizes.pop("classes")
    net = functional(
        functools.partial(NETWORKS[request["network"]], shape, num_classes=classes, **sizes)
    )
    params = jax.jit(net.init, compiler_options=compiler_options(run_once=True))(jax.random.key(0))
    label = {"label": jnp.arange(request["batch"]) % classes}
    config = {"_class_name": request["scheduler"], **request["config"]}
    plan = interop.plan(config, request["steps"])

    def sample(params: Any, key: jax.Array) -> jax.Array:
        x = plan.initial_scale * jax.random.normal(key, (request["batch"], *shape))
        return interop.sample(plan, lambda x, t: net.apply(params, x, t / 1000, label), x)

    run = jax.jit(sample, compiler_options=compiler_options())
    print(sum(leaf.size for leaf in jax.tree.leaves(params)), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for k in range(int(line)):
            run(params, jax.random.key(k)).block_until_ready()
        print(time.perf_counter() - start, flush=True)


def compare(
    scheduler: str, network: str, batch: int, steps: int, torch_python: str, turns: int
) -> None:
    """Prints the seconds of a loop in both and their ratio."""
    name, config = SCHEDULERS[scheduler]
    case = {
        **CASES[network],
        "batch": batch,
        "threads": os.cpu_count(),
        "scheduler": name,
        "config": config,
        "steps": steps,
    }
    here = Path(__file__).resolve()
    ours = Worker([sys.executable, str(here), "--worker"], case)
    theirs = Worker([torch_python, str(here.with_name("torch_sampling.py"))], case)
    ours.seconds(1), theirs.seconds(1)
    loops = max(1, round(1.0 / ours.seconds(1)))
    rows = [(theirs.seconds(loops), ours.seconds(loops)) for _ in range(turns)]
    torch_time, jax_time = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(t / j for t, j in rows)
    print(
        f"{scheduler}, {network} ({ours.parameters:,} parameters, PyTorch {theirs.parameters:,}), "
        f"batch {batch}, {steps} steps: JAX {jax_time:.3f} s, PyTorch {torch_time:.3f} s; "
        f"PyTorch/JAX {ratio:.2f} (turns: {', '.join(f'{t / j:.2f}' for t, j in rows)})",
        flush=True,
    )
    ours.close()
    theirs.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python")
    parser.add_argument("--networks", nargs="*", default=["digits"], choices=list(CASES))
    parser.add_argument("--schedulers", nargs="*", default=list(SCHEDULERS), choices=SCHEDULERS)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return jax_worker()
    if not args.torch_python:
        parser.error("--torch_python=PATH is needed: a Python that has PyTorch and diffusers")
    for network in args.networks:
        for scheduler in args.schedulers:
            for batch in args.batch:
                compare(scheduler, network, batch, args.steps, args.torch_python, args.turns)


if __name__ == "__main__":
    main()
