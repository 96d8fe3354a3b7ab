"""Pictures a second of each feature network against PyTorch: same weights, same run, alternating.

    python benchmarks/feature_speed.py --torch_python=PATH [--networks inception_v3] [--batch=16]

PATH is a Python that has PyTorch (this project does not use it); `torch_feature_twins.py` runs
there. Weights are random, the same in both, and pictures have the size that the network sees: what
is timed begins with 8-bit pixels and ends with features, which have to agree before the first turn.
Each framework has a process of its own on the same processors; they take turns, and the ratio
printed is the median over turns of seconds in PyTorch over seconds in JAX: above 1, JAX is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_step_vs_torch import Worker

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
import drawn_tensors
import feature_recipe

from diffusion_jax.evaluation.features import clip, dinov2, efficientnet_lite0, inception

Shapes = dict[str, tuple[int, ...]]
AGREE = 1e-4
"""The largest difference of features, over the largest feature."""
BUILD = {
    "inception_v3": inception.build,
    "efficientnet_lite0": efficientnet_lite0.build,
    "dinov2_vits14": dinov2.build,
    "clip_vit_b32": clip.build,
}


def inception_sizes() -> dict[str, Any]:
    """The parts of each branch: the name of a pool, or a list of convolutions beside each other."""

    def plain(branch: inception.Branch) -> list[Any]:
        parts: list[Any] = []
        for part in branch:
            if isinstance(part, str):
                parts.append(part)
            else:
                convs = (part,) if isinstance(part, inception.Conv) else part
                parts.append([conv._asdict() for conv in convs])
        return parts

    blocks = {name: [plain(b) for b in block] for name, block in inception.BLOCKS.items()}
    return {"side": inception.SIZE, "stem": plain(inception.STEM), "blocks": blocks}


def efficientnet_sizes() -> dict[str, Any]:
    return {"side": efficientnet_lite0.SIZE, "blocks": list(efficientnet_lite0.blocks())}


def transformer_sizes(width: int, mean: Any, deviation: Any) -> dict[str, Any]:
    return {"side": 224, "width": width, "depth": 12, "mean": mean, "deviation": deviation}


def norms(*names: str, width: int) -> Shapes:
    return {f"{name}.{kind}": (width,) for name in names for kind in ("weight", "bias")}


def layers(**sizes: tuple[int, int]) -> Shapes:
    """Of linear layers (outputs, inputs); `__` in a name stands for a dot."""
    found: Shapes = {}
    for name, (outside, inside) in sizes.items():
        dotted = name.replace("__", ".")
        found |= {f"{dotted}.weight": (outside, inside), f"{dotted}.bias": (outside,)}
    return found


def dinov2_shapes(width: int = 384, depth: int = 12) -> Shapes:
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + 37**2, width),
        "patch_embed.proj.weight": (width, 3, 14, 14),
        "patch_embed.proj.bias": (width,),
        **norms("norm", width=width),
    }
    block = layers(
        attn__qkv=(3 * width, width),
        attn__proj=(width, width),
        mlp__fc1=(4 * width, width),
        mlp__fc2=(width, 4 * width),
    )
    block |= {"ls1.gamma": (width,), "ls2.gamma": (width,)} | norms("norm1", "norm2", width=width)
    for number in range(depth):
        shapes |= {f"blocks.{number}.{name}": shape for name, shape in block.items()}
    return shapes


def clip_shapes(width: int = 768, depth: int = 12) -> Shapes:
    start = "vision_model."
    shapes: Shapes = {
        f"{start}embeddings.class_embedding": (width,),
        f"{start}embeddings.patch_embedding.weight": (width, 3, 32, 32),
        f"{start}embeddings.position_embedding.weight": (1 + 7**2, width),
        **norms(f"{start}pre_layrnorm", f"{start}post_layernorm", width=width),
        "visual_projection.weight": (512, width),
    }
    attention = {f"self_attn__{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    block = layers(**attention, mlp__fc1=(4 * width, width), mlp__fc2=(width, 4 * width))
    block |= norms("layer_norm1", "layer_norm2", width=width)
    for number in range(depth):
        names = f"{start}encoder.layers.{number}."
        shapes |= {names + name: shape for name, shape in block.items()}
    return shapes


CASES: dict[str, Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]]] = {
    "inception_v3": lambda: (feature_recipe.weights(inception.shapes()), inception_sizes()),
    "efficientnet_lite0": lambda: (
        feature_recipe.weights(efficientnet_lite0.shapes()),
        efficientnet_sizes(),
    ),
    "dinov2_vits14": lambda: (
        drawn_tensors.draw(dinov2_shapes(), 0),
        transformer_sizes(384, dinov2.MEAN, dinov2.DEVIATION),
    ),
    "clip_vit_b32": lambda: (
        drawn_tensors.draw(clip_shapes(), 0),
        transformer_sizes(768, clip.MEAN, clip.DEVIATION),
    ),
}


def jax_worker() -> None:
    """Answers the protocol of `torch_feature_twins.py` with the networks of this package."""
    request = json.loads(sys.stdin.readline())
    # Before JAX counts them.
    os.sched_setaffinity(0, request["processors"])
    import jax

    from diffusion_jax.networks import compiler_options
    from diffusion_jax.parallel.memory import keep_freed_memory

    keep_freed_memory()
    with np.load(request["weights"]) as file:
        tensors = dict(file)
    network = BUILD[request["network"]](tensors, request["weights"])
    assert network.name == request["network"], network.name
    params = jax.device_put(network.params)
    batch = jax.device_put(np.load(request["pictures"]))
    run = jax.jit(lambda p, x: network.apply(p, x)["features"], compiler_options=compiler_options())
    np.save(request["out"], np.asarray(run(params, batch)))
    print(sum(leaf.size for leaf in tensors.values()), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            run(params, batch).block_until_ready()
        print(time.perf_counter() - start, flush=True)


def compare(name: str, folder: Path, args: argparse.Namespace) -> None:
    """Prints pictures a second of both, and their ratio."""
    tensors, sizes = CASES[name]()
    np.savez(folder / "weights.npz", **tensors)
    shape = (args.batch, sizes["side"], sizes["side"], 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(folder / "pictures.npy", pixels)
    case = {
        "network": name,
        "sizes": sizes,
        "processors": sorted(os.sched_getaffinity(0))[: args.threads],
        "weights": str(folder / "weights.npz"),
        "pictures": str(folder / "pictures.npy"),
    }
    here = Path(__file__).resolve()
    ours = Worker([sys.executable, str(here), "--worker"], {**case, "out": str(folder / "a.npy")})
    twin = [args.torch_python, str(here.with_name("torch_feature_twins.py"))]
    theirs = Worker(twin, {**case, "out": str(folder / "b.npy")})
    found, expected = np.load(folder / "a.npy"), np.load(folder / "b.npy")
    gap = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not gap < AGREE:
        raise SystemExit(f"{name}: the features differ by {gap:.1e} of the largest")
    ours.seconds(1), theirs.seconds(1)
    batches = max(1, round(args.seconds / ours.seconds(1)))
    rows = [(theirs.seconds(batches), ours.seconds(batches)) for _ in range(args.turns)]
    torch_rate, jax_rate = (
        args.batch / statistics.median(column) for column in zip(*rows, strict=True)
    )
    ratio = statistics.median(t / j for t, j in rows)
    print(
        f"{name}: {ours.parameters:,} parameters, batch {args.batch}, {len(case['processors'])} "
        f"threads, features agree to {gap:.0e}; JAX {jax_rate:.1f}, PyTorch {torch_rate:.1f} "
        f"pictures/s; PyTorch/JAX {ratio:.2f} (turns: "
        f"{', '.join(f'{t / j:.2f}' for t, j in rows)})",
        flush=True,
    )
    ours.close()
    theirs.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python")
    parser.add_argument("--networks", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, help="processors of both; by default all")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return jax_worker()
    if not args.torch_python:
        parser.error("--torch_python=PATH is needed: a Python that has PyTorch")
    for name in args.networks:
        with tempfile.TemporaryDirectory() as folder:
            compare(name, Path(folder), args)


if __name__ == "__main__":
    main()
