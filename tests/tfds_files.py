"""Writes a small data set in the layout that TFDS documents, record by record."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

NAME = "tiny_shapes"
SHARDS = {"test": [4], "train": [7, 5]}
"""Records a shard; ids count the splits in alphabetical order: test 0..3, train 4..15."""
_PYTHON = "tensorflow_datasets.core.features"


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _example(image: bytes, label: int) -> bytes:
    from tensorflow_datasets.proto import tf_example_pb2

    message = tf_example_pb2.Example()
    message.features.feature["image"].bytes_list.value.append(image)
    message.features.feature["label"].int64_list.value.append(label)
    return message.SerializeToString()


def _write_records(folder: Path, images, labels, damaged) -> list[dict]:
    number, splits = 0, []
    for split, lengths in SHARDS.items():
        for shard, length in enumerate(lengths):
            path = folder / f"{NAME}-{split}.array_record-{shard:05d}-of-{len(lengths):05d}"
            writer = ArrayRecordWriter(str(path), "group_size:1")
            for _ in range(length):
                image = b"no picture" if number in damaged else _png(images[number])
                writer.write(_example(image, labels[number]))
                number += 1
            writer.close()
        splits.append({"name": split, "shardLengths": [str(n) for n in lengths], "numBytes": "1"})
        splits[-1]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    return splits


def write_data_set(
    root: Path,
    images,
    labels,
    *,
    shape=("6", "5", "3"),
    damaged=(),
    format_="array_record",
    classes=("disc", "ring", "bar"),
) -> Path:
    """16 records under root/NAME/1.0.0; those numbered in `damaged` hold no image."""
    folder = Path(root) / NAME / "1.0.0"
    folder.mkdir(parents=True)
    splits = _write_records(folder, images, labels, damaged)
    info = {"name": NAME, "version": "1.0.0", "fileFormat": format_, "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    image = {"dtype": "uint8", "shape": {"dimensions": list(shape)}}
    label = {"numClasses": str(len(classes))}
    features = {
        "image": {"pythonClassName": f"{_PYTHON}.image_feature.Image", "image": image},
        "label": {
            "pythonClassName": f"{_PYTHON}.class_label_feature.ClassLabel",
            "classLabel": label,
        },
    }
    top = {
        "pythonClassName": f"{_PYTHON}.features_dict.FeaturesDict",
        "featuresDict": {"features": features},
    }
    (folder / "features.json").write_text(json.dumps(top))
    (folder / "label.labels.txt").write_text("\n".join(classes) + "\n")
    return folder
