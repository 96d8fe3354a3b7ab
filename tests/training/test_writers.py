"""What is on disk after a run: metrics.jsonl, TensorBoard events, and what a crash leaves."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from diffusion_jax.training import writers


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_numbers_that_are_not_finite_stay_valid_json(tmp_path):
    writer = writers.JsonlWriter(tmp_path, 0)
    writer.scalars(1, {"a": float("nan"), "b": float("-inf"), "c": 0.5})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    (row,) = [json.loads(text, parse_constant=lambda name: pytest.fail(name))]
    assert math.isnan(float(row["a"]))
    assert float(row["b"]) == -math.inf
    assert row == {"step": 1, "a": "nan", "b": "-inf", "c": 0.5}


def test_a_resume_cuts_what_will_be_written_again(tmp_path):
    writer = writers.JsonlWriter(tmp_path, 0)
    for step in (2, 4, 6):
        writer.scalars(step, {"train/loss": step / 2})
    writer.scalars(4, {"val/loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/lo')  # torn by a kill
    again = writers.JsonlWriter(tmp_path, 4)
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 4]
    again.scalars(6, {"train/loss": 3.0})
    again.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 4, 6]
    writers.JsonlWriter(tmp_path, 0).close()
    assert rows(tmp_path) == []


def test_only_process_0_writes(tmp_path):
    writer = writers.create(tmp_path, start_step=0, tensorboard=True, process_index=1)
    writer.scalars(1, {"a": 1.0})
    writer.image(1, "b", np.zeros((2, 2, 3), np.uint8))
    writer.hparams({"c": 1})
    writer.close()
    assert list(tmp_path.iterdir()) == []


# In a process of its own: TensorFlow brings warnings that are not ours, and stays loaded.
WRITE = """
import sys
import numpy as np
from diffusion_jax.training import writers
if sys.argv[2] == "without":
    sys.modules["tensorflow"] = None
writer = writers.create(sys.argv[1], start_step=0, tensorboard=True, process_index=0)
writer.hparams({"steps": 3, "network.unet.multipliers": [1, 2], "checkpoint.keep_every": None})
for step in (1, 2):
    writer.scalars(step, {"train/loss": step / 4})
image = np.zeros((6, 5, 3), np.uint8)
image[2, 3] = 200, 100, 50
writer.image(2, "samples", image)
writer.close()
"""


def write(folder, how):
    return subprocess.run(
        [sys.executable, "-c", WRITE, folder, how],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


READ = """
import io, json, sys, warnings
warnings.simplefilter("ignore")
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
events = EventAccumulator(sys.argv[1], size_guidance={"tensors": 0})
events.Reload()
tags = events.Tags()
shown = {"scalars": [], "summary": sorted(tags["tensors"])}
for event in events.Tensors("train/loss"):
    shown["scalars"].append([event.step, float(tensor_util.make_ndarray(event.tensor_proto))])
(event,) = events.Tensors("samples")
width, height, png = tensor_util.make_ndarray(event.tensor_proto)
shown["image"] = [event.step, int(width), int(height)]
shown["pixel"] = np.asarray(Image.open(io.BytesIO(png)))[2, 3].tolist()
metadata = events.summary_metadata
shown["hparams"] = any("hparams" in m.plugin_data.plugin_name for m in metadata.values())
print(json.dumps(shown))
"""


def test_tensorboard_shows_scalars_images_and_hparams(tmp_path):
    done = write(tmp_path, "with")
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("events.*"))
    read = subprocess.run(
        [sys.executable, "-c", READ, tmp_path], capture_output=True, text=True, timeout=120
    )
    shown = json.loads(read.stdout.splitlines()[-1] if read.stdout else pytest.fail(read.stderr))
    assert shown["scalars"] == [[1, 0.25], [2, 0.5]]
    assert shown["image"] == [2, 5, 6]
    assert shown["pixel"] == [200, 100, 50]
    assert shown["hparams"]
    assert [row["train/loss"] for row in rows(tmp_path)] == [0.25, 0.5]


def test_without_tensorflow_one_warning_and_the_metrics(tmp_path):
    done = write(tmp_path, "without")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") + done.stderr.count("\n") == 1
    assert "metrics.jsonl" in done.stdout + done.stderr
    assert [row["train/loss"] for row in rows(tmp_path)] == [0.25, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
