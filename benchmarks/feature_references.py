"""Records what PyTorch's feature networks answer, for the tests of ours.

Run in an environment of its own that has PyTorch (the package never does):

    python -m venv torch_env
    torch_env/bin/pip install torch torchvision pytorch-fid
    torch_env/bin/pip install --no-deps efficientnet-lite-pytorch
    torch_env/bin/python benchmarks/feature_references.py --out=tests/golden/features

Weights are drawn from a seed by `tests/shared/feature_recipe.py`, here and in the tests alike; no
published ones are needed or kept. Written with torch 2.13.0, torchvision 0.28.0, pytorch-fid 0.3.0,
efficientnet-lite-pytorch 0.1.0 on a CPU:

    inception_v3.npz        pytorch-fid's InceptionV3, 32x32, 64x48 and 299x299
    efficientnet_lite0.npz  efficientnet-lite-pytorch, resized by F.interpolate(antialias=True)
    tensors_zip.pth, tensors_stream.pth, tensors.npz
                            tensors of every kind in both forms of torch.save, and their values
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
import feature_recipe as recipe

SIZES = ((32, 32), (64, 48), (299, 299))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("tests/golden/features"))
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    np.savez_compressed(out / "inception_v3.npz", **inception())
    np.savez_compressed(out / "efficientnet_lite0.npz", **efficientnet())
    kinds = kinds_of_tensors()
    torch.save(kinds, out / "tensors_zip.pth")
    torch.save(kinds, out / "tensors_stream.pth", _use_new_zipfile_serialization=False)
    np.savez_compressed(out / "tensors.npz", **values(kinds["state_dict"]))


def drawn(model) -> dict[str, torch.Tensor]:
    """Weights for the model's names, but for the counters of its batch normalisation."""
    state = model.state_dict()
    shapes = {
        name: tuple(tensor.shape) for name, tensor in state.items() if tensor.is_floating_point()
    }
    return recipe.weights(shapes)


def on_pictures(answer) -> dict[str, np.ndarray]:
    recorded = {}
    for height, width in SIZES:
        picture = recipe.picture(height, width)
        x = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        for name, values in answer(x).items():
            recorded[f"{name}_{height}x{width}"] = values.numpy().astype(np.float32)
        recorded[f"picture_{height}x{width}"] = np.array(recipe.digest({"picture": picture}))
    return recorded


def inception() -> dict[str, np.ndarray]:
    from pytorch_fid import inception as fid

    weights: dict[str, np.ndarray] = {}

    def in_place_of_download(url, progress):
        bare = fid._inception_v3(num_classes=1008, aux_logits=False, weights=None)
        weights.update(drawn(bare))
        return {name: torch.from_numpy(array) for name, array in weights.items()}

    fid.load_state_dict_from_url = in_place_of_download
    model = fid.InceptionV3([2, 3]).eval()
    maps = {}
    # The blocks of output 2 begin with three of 35x35 and one that halves; 6d is the seventh.
    mixed_6d = model.blocks[2][6]
    mixed_6d.branch1x1.register_forward_hook(lambda _, inputs, output: maps.update(conv=output))

    def answer(x):
        features = model(x / 255)[1].flatten(1)
        spatial = maps["conv"][:, :7].permute(0, 2, 3, 1).flatten(1)
        logits = features @ torch.from_numpy(weights["fc.weight"]).T
        return {"features": features, "spatial": spatial, "logits": logits}

    return {**on_pictures(answer), "weights": np.array(recipe.digest(weights))}


def efficientnet() -> dict[str, np.ndarray]:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    weights = drawn(model)
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
    model.load_state_dict(tensors, strict=False)

    def answer(x):
        x = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False, antialias=True)
        maps = model.extract_features((x - 127) / 128)
        features = maps.mean((2, 3))
        return {"features": features, "logits": model._fc(features)}

    return {**on_pictures(answer), "weights": np.array(recipe.digest(weights))}


def kinds_of_tensors() -> dict:
    """A training checkpoint whose state dict has a tensor of each kind."""
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    for parameter in module.state_dict().values():
        parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 8)
    # Its own class of dictionary, with the modules' versions as an attribute.
    state = module.state_dict()
    state["parameter"] = torch.nn.Parameter(base[0].clone())
    state["whole"], state["transposed"], state["part"] = base, base.permute(2, 0, 1), base[1, ::2]
    state["expanded"] = torch.tensor([1.5, 2.5]).expand(3, 2)
    state["scalar"], state["empty"] = torch.tensor(7.25), torch.zeros(0, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32):
        state[str(dtype).removeprefix("torch.")] = (base[0] / 3).to(dtype)
    for dtype in (torch.int16, torch.int8, torch.uint8, torch.bool):
        state[str(dtype).removeprefix("torch.")] = (base[0] % 2).to(dtype)
    return {"epoch": 3, "note": "of a run", "state_dict": state, "lr": [1e-3, None, True]}


def values(state) -> dict[str, np.ndarray]:
    half = (torch.float16, torch.bfloat16)
    return {
        name: (tensor.detach().float() if tensor.dtype in half else tensor.detach()).numpy()
        for name, tensor in state.items()
    }


if __name__ == "__main__":
    main()
