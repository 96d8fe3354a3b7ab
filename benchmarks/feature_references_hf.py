"""Records what transformers and PyTorch make of random weights, for the tests of feature networks.

    python -m venv hf && hf/bin/pip install torch transformers pillow
    hf/bin/python benchmarks/feature_references_hf.py --out=tests/golden/features

That Python needs nothing of this project. Recorded with torch 2.13.0 (CPU), transformers 5.23.0,
Pillow 13.0.0. A file holds 8-bit pictures or tokens, the outputs in single precision, and as JSON
(`about`) the seed and the names and shapes as transformers writes them to a file; the weights are
those of `tests/shared/drawn_tensors.py`, which both sides draw.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shared"))
from drawn_tensors import draw

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def with_drawn_weights(kind, config, seed, folder, **loading):
    """The model after its weights were drawn, written to a file, and read by transformers."""
    kind(config).save_pretrained(folder)
    file = Path(folder) / "model.safetensors"
    shapes = {name: list(value.shape) for name, value in load_file(file).items()}
    save_file(draw(shapes, seed), file, metadata={"format": "pt"})
    model, report = kind.from_pretrained(folder, output_loading_info=True, **loading)
    faults = {name: value for name, value in report.items() if value}
    if faults:
        raise SystemExit(f"{kind.__name__}: {faults}")
    return model.eval(), json.dumps({"seed": seed, "shapes": shapes})


def scaled(images, mean, deviation):
    """Pictures [b, h, w, 3] as PyTorch's networks want them."""
    pixels = (torch.tensor(images).float() / 255 - torch.tensor(mean)) / torch.tensor(deviation)
    return pixels.permute(0, 3, 1, 2).contiguous()


def pictures(*shape, seed):
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def by_pillow(image, size):
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def interpolation():
    image = np.random.default_rng(0).standard_normal((1, 37, 23, 2)).astype(np.float32)
    tensor = torch.tensor(image).permute(0, 3, 1, 2)
    arrays = {"image": image}
    for kind in ("bilinear", "bicubic"):
        for antialias in (True, False):
            for shape in ((16, 11), (41, 60)):
                new = torch.nn.functional.interpolate(
                    tensor, size=shape, mode=kind, align_corners=False, antialias=antialias
                )
                name = f"{kind}_{'antialias' if antialias else 'plain'}_{shape[0]}_{shape[1]}"
                arrays[name] = new.permute(0, 2, 3, 1).numpy()
        factors = (16.1 / 37, 11.1 / 23)
        new = torch.nn.functional.interpolate(tensor, scale_factor=factors, mode=kind)
        arrays[f"{kind}_plain_16_11_step"] = new.permute(0, 2, 3, 1).numpy()
    return arrays


def dinov2(kind, config, seed):
    """Class tokens at the size of the position embeddings (98), smaller, and not square."""
    images = pictures(2, 98, 98, seed=seed)
    odd = pictures(1, 40, 30, seed=seed + 1)[0]
    with tempfile.TemporaryDirectory() as folder:
        model, about = with_drawn_weights(kind, config, seed, folder)
    inputs = {
        "same": images,
        "small": images[:, :56, :56],
        "oblong": images[:, :56, :84],
        "whole": by_pillow(odd, (224, 224))[None],
    }
    arrays = {"about": about, "images": images, "odd": odd}
    for name, part in inputs.items():
        arrays[name] = model(scaled(part, *IMAGENET)).pooler_output
    return model, arrays


def dinov2_by_the_authors(model, arrays):
    """The same, with the position embeddings resized as in the authors' code: a step of old /
    (new + 0.1)."""
    table = model.embeddings.position_embeddings.data
    side = int((table.shape[1] - 1) ** 0.5)
    cells = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)

    def resized(embeddings, height, width):
        factors = tuple((size // 14 + 0.1) / side for size in (height, width))
        new = torch.nn.functional.interpolate(cells, scale_factor=factors, mode="bicubic")
        new = new.permute(0, 2, 3, 1).flatten(1, 2)
        return torch.cat([table[:, :1], new], dim=1)

    model.embeddings.interpolate_pos_encoding = resized
    for name, part in {
        "small_original": arrays["images"][:, :56, :56],
        "oblong_original": arrays["images"][:, :56, :84],
    }.items():
        arrays[name] = model(scaled(part, *IMAGENET)).pooler_output


def clip(seed):
    """Both towers of the kind of OpenAI, in a config of old; token 98, the largest, is the end."""
    text = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    text |= dict(num_attention_heads=1, max_position_embeddings=12, hidden_act="quick_gelu")
    vision = dict(hidden_size=128, intermediate_size=160, num_hidden_layers=2, image_size=32)
    vision |= dict(num_attention_heads=2, patch_size=8, hidden_act="quick_gelu")
    old = dict(eos_token_id=2, bos_token_id=0, pad_token_id=1)
    config = transformers.CLIPConfig(
        text_config=text | old, vision_config=vision, projection_dim=48
    )
    with tempfile.TemporaryDirectory() as folder:
        model, about = with_drawn_weights(transformers.CLIPModel, config, seed, folder)
    images = pictures(3, 32, 32, seed=seed)
    odd = pictures(1, 45, 60, seed=seed + 1)[0]
    whole = by_pillow(odd, (42, 32))[:, 5:37]
    tokens = np.random.default_rng(seed).integers(1, 98, (4, 12))
    tokens[:, 0] = 97
    for row, end in zip(tokens, (3, 7, 9, 11), strict=True):
        row[end:] = 98
    out = model(pixel_values=scaled(images, *OPENAI), input_ids=torch.tensor(tokens))
    return {
        "about": about,
        "images": images,
        "odd": odd,
        "tokens": tokens.astype(np.int32),
        "image_embeds": out.image_embeds,
        "text_embeds": out.text_embeds,
        "logits_per_text": out.logits_per_text,
        "whole": model.get_image_features(scaled(whole[None], *OPENAI)).pooler_output,
    }


def clip_vision(seed):
    """A picture tower by itself, with gelu and heads of 24."""
    config = transformers.CLIPVisionConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=28, patch_size=14, hidden_act="gelu", projection_dim=40,
    )  # fmt: skip
    kind = transformers.CLIPVisionModelWithProjection
    with tempfile.TemporaryDirectory() as folder:
        model, about = with_drawn_weights(kind, config, seed, folder)
    images = pictures(2, 28, 28, seed=seed)
    embeds = model(scaled(images, *OPENAI)).image_embeds
    return {"about": about, "images": images, "image_embeds": embeds}


def clip_text(seed):
    """A text tower by itself, with gelu, whose end (50) is not its largest token."""
    config = transformers.CLIPTextConfig(
        vocab_size=70, hidden_size=96, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=3, max_position_embeddings=10, hidden_act="gelu", projection_dim=40,
        eos_token_id=50, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection
    tokens = np.random.default_rng(seed).integers(2, 50, (3, 10))
    tokens[:, 2], tokens[0, 4], tokens[1, 6:8], tokens[2, 9] = 60, 50, 50, 50
    with tempfile.TemporaryDirectory() as folder:
        model, about = with_drawn_weights(kind, config, seed, folder)
        old = kind.from_pretrained(folder, eos_token_id=2).eval()
    ids = torch.tensor(tokens)
    return {
        "about": about,
        "tokens": tokens.astype(np.int32),
        "text_embeds": model(ids).text_embeds,
        "text_embeds_old": old(ids).text_embeds,
    }


CAPTIONS = (
    "a photo of a cat",
    "  The\tCAT'S   hat,  it's 2024!! ",
    "ein gro\u00dfes Stra\u00dfencaf\u00e9 \u2014 na\u0131\u0308ve",
    "\u732b \U0001f408 cat<|endoftext|>",
    "",
    "the cat sat on the mat and the hat " * 4,
)


def clip_tokens():
    """Tokens by a small vocabulary of CLIP's kind: all bytes, and a few pairs."""
    bytes_ = sorted(ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>"), ("c", "at</w>"), ("h", "at</w>")]
    pieces = [*bytes_, *(f"{byte}</w>" for byte in bytes_), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokens = tokenizer(list(CAPTIONS), padding="max_length", truncation=True, max_length=24)
    about = {"vocabulary": vocabulary, "merges": merges, "captions": CAPTIONS}
    return {"about": json.dumps(about), "tokens": np.array(tokens["input_ids"], np.int32)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    small = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2)
    small |= dict(image_size=98, patch_size=14)
    with torch.no_grad():
        plain, arrays = dinov2(
            transformers.Dinov2Model, transformers.Dinov2Config(**small, mlp_ratio=2), 1
        )
        dinov2_by_the_authors(plain, arrays)
        _, registers = dinov2(
            transformers.Dinov2WithRegistersModel,
            transformers.Dinov2WithRegistersConfig(
                **small, mlp_ratio=2, use_swiglu_ffn=True, num_register_tokens=4
            ),
            2,
        )
        recordings = {
            "interpolate": interpolation(),
            "dinov2": arrays,
            "dinov2_registers": registers,
            "clip": clip(3),
            "clip_vision": clip_vision(4),
            "clip_text": clip_text(5),
            "clip_tokens": clip_tokens(),
        }
    for name, arrays in recordings.items():
        np.savez_compressed(out / f"{name}.npz", **{k: np.asarray(v) for k, v in arrays.items()})
        print(name, (out / f"{name}.npz").stat().st_size, "bytes")


if __name__ == "__main__":
    main()
