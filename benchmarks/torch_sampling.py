"""Sampling loops of diffusers in PyTorch over the networks of `torch_twins.py`.

Run by `sampling_vs_diffusers.py` with a Python that has both: reads the sizes, the class of the
scheduler and its config as one line of JSON, answers with the parameter count, then samples a batch
as many times as each further line says and answers with the seconds that took. The loop is that of
a diffusers pipeline, in inference mode.
"""

from __future__ import annotations

import json
import sys
import time

import diffusers
import torch
from torch_twins import DiT, UNet


def main() -> None:
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    kind = {"unet": UNet, "dit": DiT}[request["network"]]
    model = kind(**request["sizes"]).to(memory_format=torch.channels_last).eval()
    scheduler = getattr(diffusers, request["scheduler"]).from_config(request["config"])
    shape = (request["batch"], *request["sizes"]["shape"])
    label = torch.arange(request["batch"]) % request["sizes"]["classes"]

    @torch.inference_mode()
    def sample() -> torch.Tensor:
        scheduler.set_timesteps(request["steps"])
        # The flow-matching classes have neither of the two.
        x = torch.randn(shape) * getattr(scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
        for t in scheduler.timesteps:
            given = scaled(x, t)
            output = model(given, (t / 1000).float().expand(shape[0]), label)
            x = scheduler.step(output, t, x).prev_sample
        return x

    print(sum(p.numel() for p in model.parameters()), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            sample().sum().item()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
