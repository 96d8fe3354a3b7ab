"""A model of captions from its folder to the door that samples it."""

from __future__ import annotations

import numpy as np
import pytest

import diffusion_jax
from diffusion_jax import api
from diffusion_jax.examples import held_out_conditions

pytestmark = pytest.mark.usefixtures("quick_programs")


def test_previews_take_captions_that_are_held_out(captioned_run):
    _, run = captioned_run
    given = run.model.conditions, run.validation_data, run.config.sampling.num
    shown = held_out_conditions(*given)["prompts"]
    held_out = {f"grey {n}"[:8] for n in range(40)}
    assert len(shown) == min(8, len(run.validation_data))
    assert set(shown) <= held_out
    rows = run.train_data.fetch(np.arange(len(run.train_data)))["conditioning"]["text"]
    assert not set(shown) & set(api.data.decode_text(rows))


def test_a_folder_of_captions_samples_by_prompt(captioned_run):
    pipeline = diffusion_jax.load(captioned_run[0])
    samples = pipeline.sample(3, prompts=["grey 1", "grey 2"], guidance=2.0)
    assert samples.x.shape == (3, 8, 8, 3)
    assert samples.text.tolist() == ["grey 1", "grey 2", "grey 1"]


def test_the_sampling_door_takes_prompts(start_door, captioned_run, tmp_path):
    folder = f"--workdir={captioned_run[0]}"
    flags = ["--num=3", "--prompt=grey 1", "--prompt=grün", f"--out={tmp_path}/out"]
    door = start_door("sample", folder, *flags)
    wrong = start_door("sample", folder, "--labels=1", f"--out={tmp_path}/wrong")
    code, _, err = door.wait(120)
    assert code == 0, err
    with np.load(tmp_path / "out" / "samples.npz") as samples:
        assert samples["x"].shape == (3, 8, 8, 3)
        assert samples["text"].tolist() == ["grey 1", "grün", "grey 1"]
    code, _, err = wrong.wait(120)
    assert code == 78
    assert err.count("\n") == 1
    assert "labels=[1]: the model is not conditioned by label" in err
