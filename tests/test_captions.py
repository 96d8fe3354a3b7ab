"""A model of captions from its folder to the door that samples it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import diffusion_jax
from diffusion_jax import api, workdir
from diffusion_jax import config as configs
from diffusion_jax.examples import held_out_conditions

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of forty captioned pictures that saved its first state: (workdir, the run)."""
    root = tmp_path_factory.mktemp("captions")
    for number in range(40):
        (root / "pictures").mkdir(exist_ok=True)
        picture = Image.fromarray(np.full((8, 8, 3), 6 * number, np.uint8))
        picture.save(root / "pictures" / f"{number}.png")
        (root / "pictures" / f"{number}.txt").write_text(f"grey {number}")
    config = configs.base()
    config.data.update({"name": "image_folder", "path": str(root / "pictures")})
    config.data.image_folder.update(
        {"captions": "files", "text_length": 8, "validation_share": 0.3}
    )
    config.network.name, config.text.name = "dit", "bytes"
    config.network.dit.update({"dim": 16, "heads": 2, "depth": 1, "patch": 4, "expansion": 1})
    config.text.bytes.update({"dim": 16, "depth": 1, "heads": 2})
    config.steps, config.batch_size, config.optimizer.warmup_steps = 1, 8, 1
    config.sampling.update({"num": 8, "steps": 2, "batch_size": 8})
    run = api.Run.build(config, root / "run")
    state = run.compiled.init()
    run.save(state, 0)
    run._saves.close()
    workdir.write_config(
        root / "run", run.config, run.model.spec, len(run.train_data), run.train_ids
    )
    run.held.release()
    return root / "run", run


def test_previews_take_captions_that_are_held_out(saved):
    _, run = saved
    given = run.model.conditions, run.validation_data, run.config.sampling.num
    shown = held_out_conditions(*given)["prompts"]
    held_out = {f"grey {n}"[:8] for n in range(40)}
    assert len(shown) == min(8, len(run.validation_data))
    assert set(shown) <= held_out
    rows = run.train_data.fetch(np.arange(len(run.train_data)))["conditioning"]["text"]
    assert not set(shown) & set(api.data.decode_text(rows))


def test_a_folder_of_captions_samples_by_prompt(saved):
    pipeline = diffusion_jax.load(saved[0])
    samples = pipeline.sample(3, prompts=["grey 1", "grey 2"], guidance=2.0)
    assert samples.x.shape == (3, 8, 8, 3)
    assert samples.text.tolist() == ["grey 1", "grey 2", "grey 1"]


def test_the_sampling_door_takes_prompts(start_door, saved, tmp_path):
    folder = f"--workdir={saved[0]}"
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
