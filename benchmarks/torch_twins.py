"""PyTorch networks of the same sizes as the U-Net and the DiT here, trained one step at a time.

Run by `train_step_vs_torch.py` with a Python that has PyTorch: reads the sizes as one line of JSON,
answers with the parameter count, then runs as many steps as each further line says and answers
with the seconds they took. Written for speed as PyTorch users would on CPU: channels-last
convolutions, fused attention, fused AdamW.
"""

from __future__ import annotations

import json
import math
import sys
import time

import torch
from torch import nn
from torch.nn import functional as F


def sinusoidal(position, dim):
    frequencies = torch.exp(-math.log(1e4) * torch.arange(dim // 2) / (dim // 2))
    angles = position[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Condition(nn.Module):
    def __init__(self, features, dim, num_classes):
        super().__init__()
        self.features = features
        self.fc1, self.fc2 = nn.Linear(features, dim), nn.Linear(dim, dim)
        self.label = nn.Embedding(num_classes + 1, dim)

    def forward(self, noise, label):
        hidden = F.silu(self.fc1(sinusoidal(25 * noise, self.features)))
        return F.silu(self.fc2(hidden) + self.label(label))


def attend(qkv, heads):
    b, n, d = qkv.shape
    q, k, v = qkv.view(b, n, heads, 3, d // 3 // heads).permute(3, 0, 2, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d // 3)


class Residual(nn.Module):
    def __init__(self, source, width, condition, heads, resample=""):
        super().__init__()
        self.resample = {
            "": lambda x: x,
            "down": lambda x: F.avg_pool2d(x, 2),
            "up": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        }[resample]
        self.norm1, self.conv1 = nn.GroupNorm(32, source), nn.Conv2d(source, width, 3, padding=1)
        self.ada = nn.Linear(condition, 2 * width)
        self.norm2, self.conv2 = nn.GroupNorm(32, width), nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Identity() if source == width else nn.Conv2d(source, width, 1)
        self.heads = heads
        if heads:
            self.norm3 = nn.GroupNorm(32, width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, condition):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        x = self.resample(x)
        scale, shift = self.ada(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        x = self.skip(x) + h
        if self.heads:
            tokens = self.norm3(x).permute(0, 2, 3, 1).flatten(1, 2)
            h = self.out(attend(self.qkv(tokens), self.heads))
            x = x + h.view(*h.shape[:1], *x.shape[2:], -1).permute(0, 3, 1, 2)
        return x


class Resample(nn.Module):
    def __init__(self, width, up):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1)

    def forward(self, x, _):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class UNet(nn.Module):
    def __init__(
        self,
        shape,
        channels,
        multipliers,
        blocks,
        attention_resolutions,
        classes,
        heads=4,
        head_dim=None,
        resample="conv",
    ):
        super().__init__()
        widths = [channels * m for m in multipliers]
        levels = range(len(widths))

        def residual(source, level, attention):
            attention = attention or shape[0] >> level in attention_resolutions
            count = widths[level] // head_dim if head_dim else heads
            return Residual(source, widths[level], 4 * channels, count if attention else 0)

        def resampler(width, kind):
            if resample == "block":
                return Residual(width, width, 4 * channels, 0, resample=kind)
            return Resample(width, up=kind == "up")

        self.condition = Condition(channels, 4 * channels, classes)
        self.stem = nn.Conv2d(shape[-1], channels, 3, padding=1)
        self.down, self.up, skips, width = nn.ModuleList(), nn.ModuleList(), [channels], channels
        for level in levels:
            for _ in range(blocks):
                self.down.append(residual(width, level, False))
                width = widths[level]
                skips.append(width)
            if level + 1 < len(widths):
                self.down.append(resampler(width, "down"))
                skips.append(width)
        last = len(widths) - 1
        self.middle = nn.ModuleList(
            [
                residual(width, last, True),
                Residual(width, width, 4 * channels, 0),
            ]
        )
        # Whether a skip joins before the layer, layer by layer.
        self.joins = []
        for level in reversed(levels):
            for _ in range(blocks + 1):
                self.up.append(residual(width + skips.pop(), level, False))
                width = widths[level]
                self.joins.append(True)
            if level:
                self.up.append(resampler(width, "up"))
                self.joins.append(False)
        self.norm, self.head = nn.GroupNorm(32, width), nn.Conv2d(width, shape[-1], 3, padding=1)

    def forward(self, x, noise, label):
        condition = self.condition(noise, label)
        h = self.stem(x.permute(0, 3, 1, 2))
        skips = [h]
        for layer in self.down:
            h = layer(h, condition)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, condition)
        for layer, joins in zip(self.up, self.joins, strict=True):
            if joins:
                h = torch.cat([h, skips.pop()], dim=1)
            h = layer(h, condition)
        return self.head(F.silu(self.norm(h))).permute(0, 2, 3, 1)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ada, self.qkv, self.out = (nn.Linear(dim, n * dim) for n in (6, 3, 1))
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x, condition):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(condition)[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        x = x + gate1 * self.out(attend(self.qkv(h), self.heads))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    def __init__(self, shape, patch, dim, depth, heads, classes):
        super().__init__()
        self.patch, self.grid = patch, [size // patch for size in shape[:2]]
        self.condition = Condition(256, dim, classes)
        self.stem = nn.Linear(patch * patch * shape[-1], dim)
        self.register_buffer("positions", torch.randn(math.prod(self.grid), dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.ada, self.head = nn.Linear(dim, 2 * dim), nn.Linear(dim, patch * patch * shape[-1])

    def forward(self, x, noise, label):
        (b, h, w, c), p = x.shape, self.patch
        tokens = x.view(b, h // p, p, w // p, p, c).transpose(2, 3).reshape(b, -1, p * p * c)
        hidden = self.stem(tokens) + self.positions
        condition = self.condition(noise, label)
        for block in self.blocks:
            hidden = block(hidden, condition)
        shift, scale = self.ada(condition)[:, None].chunk(2, -1)
        out = self.head(F.layer_norm(hidden, hidden.shape[-1:]) * (1 + scale) + shift)
        return out.view(b, h // p, w // p, p, p, c).transpose(2, 3).reshape(b, h, w, c)


def main() -> None:
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    kind = {"unet": UNet, "dit": DiT}[request["network"]]
    model = kind(**request["sizes"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-2, fused=True)
    batch, shape = request["batch"], request["sizes"]["shape"]
    x, target = torch.randn(batch, *shape), torch.randn(batch, *shape)
    noise, label = torch.randn(batch), torch.randint(request["sizes"]["classes"], (batch,))
    print(sum(p.numel() for p in model.parameters()), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            optimizer.zero_grad(set_to_none=True)
            loss = F.mse_loss(model(x, noise, label), target)
            loss.backward()
            optimizer.step()
        loss.item()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
