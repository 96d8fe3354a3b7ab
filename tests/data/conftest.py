"""Pictures that tell which they are, and ways to store them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

COUNT = 60
CLASSES = ("bird", "cat", "dog")


def encoded(pixels: np.ndarray, format_: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=format_, **options)
    return buffer.getvalue()


@dataclass
class Examples:
    """`COUNT` pictures of 6 x 6 of one colour each, with what comes with them."""

    pictures: list[bytes]
    labels: list[int]
    texts: list[str]
    weights: list[float]

    @staticmethod
    def colour(number: int) -> tuple[int, int, int]:
        return (4 * number, 255 - 4 * number, (37 * number) % 256)

    @classmethod
    def made(cls, size: tuple[int, int] = (6, 6)) -> Examples:
        numbers = range(COUNT)
        return cls(
            pictures=[encoded(np.full((*size, 3), cls.colour(n), np.uint8)) for n in numbers],
            labels=[n % 3 for n in numbers],
            texts=[f"picture {n}, naïve" for n in numbers],
            weights=[n / 8 for n in numbers],
        )


def numbers_of(x: np.ndarray) -> list[int]:
    """Which of the examples a batch shows, by the red of its pictures."""
    return np.rint((x[:, 0, 0, 0] + 1) * 127.5 / 4).astype(int).tolist()


def as_folder(root: Path, examples: Examples) -> dict:
    for number, picture in enumerate(examples.pictures):
        folder = root / CLASSES[examples.labels[number]]
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{number:03d}.png").write_bytes(picture)
    lines = [
        json.dumps(
            {
                "file_name": f"{CLASSES[examples.labels[number]]}/{number:03d}.png",
                "text": examples.texts[number],
                "weight": examples.weights[number],
            },
            ensure_ascii=number % 2 == 0,
        )
        for number in range(COUNT)
    ]
    (root / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {"path": root, "labels": "folders"}


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_shards(root: Path, examples: Examples, format_: int = tarfile.PAX_FORMAT) -> dict:
    root.mkdir(exist_ok=True, parents=True)
    for shard in range(3):
        with tarfile.open(root / f"part-{shard:02d}.tar", "w", format=format_) as tar:
            for number in range(shard * 20, shard * 20 + 20):
                # Keys start again in each shard, as many writers do.
                key = f"inner/{number % 20:04d}"
                weight = {"weight": examples.weights[number]}
                add_member(tar, f"{key}.png", examples.pictures[number])
                add_member(tar, f"{key}.txt", (examples.texts[number] + "\n").encode())
                add_member(tar, f"{key}.cls", str(examples.labels[number]).encode())
                add_member(tar, f"{key}.json", json.dumps(weight).encode())
    return {"path": root / "part-{00..02}.tar"}


def as_parquet(root: Path, examples: Examples, row_group_size: int = 7) -> dict:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(exist_ok=True, parents=True)
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for file in range(2):
        numbers = range(file * 30, file * 30 + 30)
        table = pa.table(
            {
                "image": pa.array(
                    [{"bytes": examples.pictures[n], "path": f"{n}.png"} for n in numbers],
                    pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
                ),
                "label": pa.array([examples.labels[n] for n in numbers], pa.int64()),
                "text": [examples.texts[n] for n in numbers],
                "weight": [examples.weights[n] for n in numbers],
            }
        ).replace_schema_metadata(metadata)
        pq.write_table(table, root / f"data-{file}.parquet", row_group_size=row_group_size)
    return {"path": root}


WRITERS = {"image_folder": as_folder, "webdataset": as_shards, "parquet": as_parquet}


@pytest.fixture(scope="session")
def made() -> SimpleNamespace:
    """The helpers of this file, which tests cannot import."""
    return SimpleNamespace(
        COUNT=COUNT,
        CLASSES=CLASSES,
        WRITERS=WRITERS,
        Examples=Examples,
        add_member=add_member,
        encoded=encoded,
        numbers_of=numbers_of,
    )
