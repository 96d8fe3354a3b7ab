"""Feature networks in PyTorch, of the same weights as those of this package.

Run by `feature_speed.py` with a Python that has PyTorch: reads the network, its sizes and the file
of its weights as one line of JSON, leaves the features of a batch in the file `out`, answers with
the parameter count, then runs as many batches as each further line says and answers with the
seconds that took. Written for speed as PyTorch users would on CPU: inference mode, channels-last
convolutions, fused attention.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]
POOLS: dict[str, Callable[[Any], Any]] = {
    "average": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
}


def normalise(x, weights, name):
    entries = (weights[f"{name}.{kind}"] for kind in ("running_mean", "running_var"))
    return F.batch_norm(x, *entries, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-3)


def inception(weights: Weights, sizes: dict[str, Any]):
    """Of a stem and blocks, each of branches of pools, convolutions and forks of these."""

    def convolve(x, prefix, conv):
        name = f"{prefix}{conv['name']}"
        same = conv["padding"] == "SAME"
        padding = [side // 2 if same else 0 for side in conv["size"]]
        x = F.conv2d(x, weights[f"{name}.conv.weight"], None, conv["stride"], padding)
        return F.relu(normalise(x, weights, f"{name}.bn"), inplace=True)

    def run(x, prefix, branch):
        for part in branch:
            if isinstance(part, str):
                x = POOLS[part](x)
            else:
                x = torch.cat([convolve(x, prefix, conv) for conv in part], 1)
        return x

    def apply(pictures):
        x = run(2 * (pictures / 255) - 1, "", sizes["stem"])
        for name, block in sizes["blocks"].items():
            x = torch.cat([run(x, f"{name}.", branch) for branch in block], 1)
        return x.mean((2, 3))

    return apply


def efficientnet(weights: Weights, sizes: dict[str, Any]):
    """Of inverted residuals [channels, out_channels, size, stride, expansion]."""

    def step(x, conv, norm, stride=1, groups=1, *, bend=True):
        kernel = weights[f"{conv}.weight"]
        size = kernel.shape[-1]
        # TensorFlow's padding: what the last step needs, the larger half behind.
        if stride == 1:
            x = F.conv2d(x, kernel, None, 1, size // 2, groups=groups)
        else:
            lasts = (-(-side // stride) * stride - stride for side in x.shape[2:])
            h, w = (
                max(0, last + size - side) for last, side in zip(lasts, x.shape[2:], strict=True)
            )
            x = F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
            x = F.conv2d(x, kernel, None, stride, groups=groups)
        x = normalise(x, weights, norm)
        return F.relu6(x, inplace=True) if bend else x

    def apply(pictures):
        x = step((pictures - 127) / 128, "_conv_stem", "_bn0", 2)
        for i, (channels, out, _, stride, expansion) in enumerate(sizes["blocks"]):
            name, width = f"_blocks.{i}.", channels * expansion
            h = step(x, f"{name}_expand_conv", f"{name}_bn0") if expansion > 1 else x
            h = step(h, f"{name}_depthwise_conv", f"{name}_bn1", stride, width)
            h = step(h, f"{name}_project_conv", f"{name}_bn2", bend=False)
            x = x + h if stride == 1 and channels == out else h
        return step(x, "_conv_head", "_bn1").mean((2, 3))

    return apply


def linear(weights, name, x):
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def layer_norm(weights, name, x, epsilon):
    return F.layer_norm(
        x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon
    )


def attend(qkv, heads):
    b, n, d = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, d // 3 // heads).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d // 3)


def scaled(pictures, mean, deviation):
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, deviation))
    return (pictures / 255 - mean) / deviation


def dinov2(weights: Weights, sizes: dict[str, Any]):
    """Names of the authors; position embeddings resized once."""
    heads, epsilon = sizes["width"] // 64, 1e-6
    kernel, table = weights["patch_embed.proj.weight"], weights["pos_embed"]
    old, new = int((table.shape[1] - 1) ** 0.5), sizes["side"] // kernel.shape[-1]
    cells = table[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    cells = F.interpolate(cells, scale_factor=((new + 0.1) / old,) * 2, mode="bicubic")
    cells = cells.permute(0, 2, 3, 1).flatten(1, 2)

    def apply(pictures):
        x = scaled(pictures, sizes["mean"], sizes["deviation"])
        x = F.conv2d(x, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[-1])
        x = x.flatten(2).transpose(1, 2) + cells
        first = weights["cls_token"] + table[:, :1]
        x = torch.cat([first.expand(x.shape[0], -1, -1), x], 1)
        for i in range(sizes["depth"]):
            b = f"blocks.{i}."
            h = linear(weights, f"{b}attn.qkv", layer_norm(weights, f"{b}norm1", x, epsilon))
            x = x + linear(weights, f"{b}attn.proj", attend(h, heads)) * weights[f"{b}ls1.gamma"]
            h = F.gelu(linear(weights, f"{b}mlp.fc1", layer_norm(weights, f"{b}norm2", x, epsilon)))
            x = x + linear(weights, f"{b}mlp.fc2", h) * weights[f"{b}ls2.gamma"]
        return layer_norm(weights, "norm", x[:, 0], epsilon)

    return apply


def clip(weights: Weights, sizes: dict[str, Any]):
    """The picture tower, with names of transformers; queries, keys, values joined once."""
    heads, epsilon, start = sizes["width"] // 64, 1e-5, "vision_model."
    kernel = weights[f"{start}embeddings.patch_embedding.weight"]
    positions = weights[f"{start}embeddings.position_embedding.weight"]
    joined: Weights = {}
    for i in range(sizes["depth"]):
        b = f"{start}encoder.layers.{i}.self_attn."
        for kind in ("weight", "bias"):
            joined[f"{i}.{kind}"] = torch.cat([weights[f"{b}{n}_proj.{kind}"] for n in "qkv"])

    def apply(pictures):
        x = scaled(pictures, sizes["mean"], sizes["deviation"])
        x = F.conv2d(x, kernel, None, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
        first = weights[f"{start}embeddings.class_embedding"].expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], 1) + positions
        x = layer_norm(weights, f"{start}pre_layrnorm", x, epsilon)
        for i in range(sizes["depth"]):
            b = f"{start}encoder.layers.{i}."
            h = linear(joined, str(i), layer_norm(weights, f"{b}layer_norm1", x, epsilon))
            x = x + linear(weights, f"{b}self_attn.out_proj", attend(h, heads))
            h = layer_norm(weights, f"{b}layer_norm2", x, epsilon)
            h = linear(weights, f"{b}mlp.fc1", h)
            x = x + linear(weights, f"{b}mlp.fc2", h * torch.sigmoid(1.702 * h))
        x = layer_norm(weights, f"{start}post_layernorm", x[:, 0], epsilon)
        return linear(weights, "visual_projection", x)

    return apply


TWINS = {
    "inception_v3": inception,
    "efficientnet_lite0": efficientnet,
    "dinov2_vits14": dinov2,
    "clip_vit_b32": clip,
}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, request["processors"])
    torch.set_num_threads(len(request["processors"]))
    with np.load(request["weights"]) as file:
        weights = {name: torch.from_numpy(file[name]) for name in file.files}
    for name, value in weights.items():
        if value.ndim == 4:
            weights[name] = value.contiguous(memory_format=torch.channels_last)
    apply = TWINS[request["network"]](weights, request["sizes"])
    batch = torch.from_numpy(np.load(request["pictures"])).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def features() -> torch.Tensor:
        return apply(batch.float())

    np.save(request["out"], features().numpy())
    print(sum(value.numel() for value in weights.values()), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            features()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
