"""A U-Net, whose steps are not over at once: killed twice, it ends in the bits of a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion_jax import workdir
from diffusion_jax.api import Run

STEPS, EVERY = 12, 3
OPTIONS = (
    "--config=configs/digits.py:smoke",
    f"--config.steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    f"--config.logging.every={EVERY}",
    f"--config.validation.every={2 * EVERY}",
    "--config.sampling.every=0",
    "--config.logging.tensorboard=False",
)


def last_state(folder: Path):
    run = Run.build(workdir.read_config(folder), folder)
    state, metadata = run.checkpoints.restore(run.compiled.abstract_state)
    run.checkpoints.close()
    return state, metadata


def rows(folder: Path) -> list[dict]:
    """All that is logged, but for what a clock says."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k and "wait" not in k} for row in read]


@pytest.mark.slow
def test_killed_twice_a_unet_ends_in_the_same_bits(start_door, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    code, _, err = start_door("main", *OPTIONS, f"--workdir={whole}").wait(300)
    assert code == 0, err
    # Once the second save of a life has started, the first is whole.
    for life, kill in enumerate(((2 * EVERY + 1, 0.05), (EVERY + 1, 0.0), None)):
        door = start_door(
            "main", *OPTIONS, f"--workdir={folder}", ids=tmp_path / f"{life}.ids", kill=kill
        )
        code, out, err = door.wait(300)
        assert code == (0 if kill is None else -9), err
        assert ("resumed from step" in out) == (life > 0)
    (state, metadata), (expected, expected_metadata) = last_state(folder), last_state(whole)
    assert metadata == expected_metadata == {"step": STEPS, "examples": STEPS * 16}
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(expected), strict=True
    ):
        same = np.asarray(one).tobytes() == np.asarray(other).tobytes()
        assert same, jax.tree_util.keystr(path)
    assert rows(folder) == rows(whole)
