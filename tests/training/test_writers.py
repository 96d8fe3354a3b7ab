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


def test_rows_that_cannot_be_read_cost_one_line(tmp_path, capsys):
    file = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1, "a": 1.0}', b'{"step": 2, "a": 2.0}']
    bad = [b"7", b'{"a": 1.0}', b'{"step": "3"}', b'{"step": 2, "a\xff": 1}', b"\0\0", b'{"ste']
    file.write_bytes(b"\n".join([good[0], *bad, good[1], b'{"step": 2, "\xe2']))
    writers.JsonlWriter(tmp_path, 2).close()
    assert file.read_bytes().splitlines() == good
    err = capsys.readouterr().err
    assert err == f"Warning: {file}: no rows of metrics in line 2, 3, 4, 5, 6, 7: dropped\n"


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
image = np.zeros((6, 5, 3), np.uint8)
image[2, 3] = 200, 100, 50
for start, scale in ((0, 4), (1, 8), (0, 16), (2, 32))[: int(sys.argv[3])]:
    writer = writers.create(sys.argv[1], start_step=start, tensorboard=True, process_index=0)
    writer.hparams({"steps": 3, "network.unet.multipliers": [1, 2], "checkpoint.keep_every": None})
    for step in range(start + 1, start + 3):
        writer.scalars(step, {"train/loss": step / scale})
    writer.image(2, "samples", image)
    writer.close()
"""


def write(folder, how, lives=1):
    return subprocess.run(
        [sys.executable, "-c", WRITE, folder, how, str(lives)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )


READ = """
import io, json, os, sys, warnings
sys.modules["tensorflow"] = None  # what reads needs none of it, and it takes seconds to import
warnings.simplefilter("ignore")
import numpy as np
from PIL import Image
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.util import tensor_util
events = EventAccumulator(sys.argv[1], size_guidance={"tensors": 0})
events.Reload()
tags = events.Tags()
shown = {"scalars": [], "summary": sorted(tags["tensors"])}
for event in events.Tensors("train/loss"):
    shown["scalars"].append([event.step, float(tensor_util.make_ndarray(event.tensor_proto))])
event = events.Tensors("samples")[-1]
width, height, png = tensor_util.make_ndarray(event.tensor_proto)
shown["image"] = [event.step, int(width), int(height)]
shown["pixel"] = np.asarray(Image.open(io.BytesIO(png)))[2, 3].tolist()
metadata = events.summary_metadata
shown["hparams"] = any("hparams" in m.plugin_data.plugin_name for m in metadata.values())
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
logs = [e for f in sorted(os.listdir(sys.argv[1])) if f.startswith("events")
        for e in EventFileLoader(os.path.join(sys.argv[1], f)).Load()]
shown["hparams written"] = sum(
    v.metadata.plugin_data.plugin_name == "hparams" for e in logs for v in e.summary.value)
print(json.dumps(shown))
"""


def read(folder):
    done = subprocess.run(
        [sys.executable, "-c", READ, folder], capture_output=True, text=True, timeout=120
    )
    return json.loads(done.stdout.splitlines()[-1] if done.stdout else pytest.fail(done.stderr))


@pytest.mark.parametrize(
    ("lives", "scalars"),
    [
        (2, [[1, 1 / 4], [2, 2 / 8], [3, 3 / 8]]),
        pytest.param(
            4, [[1, 1 / 16], [2, 2 / 16], [3, 3 / 32], [4, 4 / 32]], marks=pytest.mark.slow
        ),
    ],
)
def test_tensorboard_shows_what_is_written_and_forgets_what_a_resume_writes_again(
    tmp_path, lives, scalars
):
    """As metrics.jsonl does; and the config is written in the first life alone."""
    done = write(tmp_path, "with", lives)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.glob("events.*"))
    shown = read(tmp_path)
    assert shown["scalars"] == scalars
    assert shown["image"] == [2, 5, 6]
    assert shown["pixel"] == [200, 100, 50]
    assert [[row["step"], row["train/loss"]] for row in rows(tmp_path)] == scalars
    assert shown["hparams"]
    assert shown["hparams written"] == 1


def test_without_tensorflow_one_warning_and_the_metrics(tmp_path):
    done = write(tmp_path, "without")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") + done.stderr.count("\n") == 1
    assert "metrics.jsonl" in done.stdout + done.stderr
    assert [row["train/loss"] for row in rows(tmp_path)] == [0.25, 0.5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
