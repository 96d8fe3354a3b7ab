"""Draws held-out captions of a run: the real picture, beside it a sample for the same caption.

python benchmarks/caption_grid.py runs/emoji --out=captions.png [--num=36] [--guidance=3]
"""

from __future__ import annotations

import argparse

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import diffusion_jax
from diffusion_jax import builders, workdir
from diffusion_jax.data.text import decode
from diffusion_jax.visual import to_uint8

SIDE, GAP, COLUMNS, TEXT_LINES = 64, 6, 6, 2
CELL = (2 * SIDE + 4 * GAP, SIDE + 12 * TEXT_LINES + 2 * GAP)


def lines_of(text: str, width: int = 26) -> list[str]:
    """Words in lines of at most `width` letters."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        lines[-1:] = [joined] if len(joined) <= width else [lines[-1], word]
    return lines[:TEXT_LINES]


def drawn(real: np.ndarray, samples: np.ndarray, captions: list[str]) -> Image.Image:
    """One cell a caption."""
    rows = -(-len(captions) // COLUMNS)
    canvas = Image.new("RGB", (COLUMNS * CELL[0], rows * CELL[1]), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(9)
    for number, caption in enumerate(captions):
        row, column = divmod(number, COLUMNS)
        x, y = column * CELL[0] + GAP, row * CELL[1]
        for place, pixels in enumerate((real[number], samples[number])):
            image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            canvas.paste(image, (x + place * (SIDE + GAP), y))
        for place, line in enumerate(lines_of(caption)):
            pen.text((x, y + SIDE + 12 * place), line, fill="black", font=font)
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir")
    parser.add_argument("--out", required=True)
    parser.add_argument("--num", type=int, default=36)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    held_out = builders.source(workdir.read_config(args.workdir), "validation")
    chosen = np.random.default_rng(args.seed).permutation(len(held_out))[: args.num]
    batch = held_out.fetch(np.sort(chosen))
    captions = decode(batch["conditioning"]["text"])
    samples = diffusion_jax.load(args.workdir).sample(
        len(captions), prompts=captions, seed=args.seed, guidance=args.guidance
    )
    drawn(to_uint8(batch["x"]), samples.x, captions).save(args.out)


if __name__ == "__main__":
    main()
