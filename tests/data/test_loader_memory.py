"""The memory of a loader follows the batch, not the data set."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SIDE = 32
PROGRAM = """
import sys
from pathlib import Path
from diffusion_jax import data

name, path, count, batches = sys.argv[1:]
source = data.load(
    name, "train", path=path, image_size={side}, labels="none", memory=0, workers=2
)
assert len(source) > 0.9 * int(count)
loader = data.Loader(source=source, batch_size=64, seed=0)
for position in range(0, 64 * int(batches), 64):
    loader.batch(position)
# Not getrusage: what it tells includes the process that started this one.
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


def pictures(made) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [
        made.encoded(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), "JPEG")
        for _ in range(50)
    ]


def write_folder(root: Path, count: int, made) -> Path:
    """Hard links to a few files: reading them takes no less memory than files of their own."""
    for number, content in enumerate(pictures(made)):
        (root / f"original{number}").write_bytes(content)
    for number in range(count):
        folder = root / "set" / f"{number // 1000:03d}"
        if number % 1000 == 0:
            folder.mkdir(parents=True)
        os.link(root / f"original{number % 50}", folder / f"picture_{number:06d}.jpg")
    return root / "set"


def write_shards(root: Path, count: int, made) -> Path:
    import tarfile

    contents = pictures(made)
    for shard in range(count // 1000):
        with tarfile.open(root / f"{shard:03d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(shard * 1000, shard * 1000 + 1000):
                made.add_member(tar, f"picture_{number:06d}.jpg", contents[number % 50])
    return root


def peak(name: str, path: Path, count: int, batches: int = 150) -> int:
    """Bytes of the largest resident set of a process that loads `batches` of 64."""
    arguments = [name, str(path), str(count), str(batches)]
    program = [sys.executable, "-c", PROGRAM.format(side=SIDE), *arguments]
    done = subprocess.run(program, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "write"), [("image_folder", write_folder), ("webdataset", write_shards)]
)
def test_peak_memory_does_not_grow_with_the_number_of_files(name, write, made, tmp_path):
    peaks = {}
    for count in (1_000, 100_000):
        root = tmp_path / str(count)
        root.mkdir()
        path = write(root, count, made)
        peaks[count] = peak(name, path, count)
    grown = peaks[100_000] - peaks[1_000]
    # Names and ids of the files have to be known; decoded, each would take 3072 bytes.
    assert grown < 99_000 * 350, peaks


def write_parquet(root: Path, count: int, made) -> Path:
    """Groups of 16 pictures of 100 kB each, which nothing compresses."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, filling = np.random.default_rng(0), 100_000
    picture = pictures(made)[0]
    schema = pa.schema([("image", pa.binary())])
    plain = {"compression": "none", "use_dictionary": False}
    with pq.ParquetWriter(root / "set.parquet", schema, **plain) as writer:
        for _ in range(count // 16):
            # What follows the end of a JPEG is not read by its decoder.
            rows = [picture + rng.bytes(filling) for _ in range(16)]
            writer.write_table(pa.table({"image": rows}, schema), row_group_size=16)
    return root


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_of_parquet_follows_the_groups_that_are_kept(made, tmp_path):
    """80 and 480 MB; both are more than the 64 MiB of groups that are kept at least."""
    peaks = {}
    for count in (800, 4800):
        (tmp_path / str(count)).mkdir()
        path = write_parquet(tmp_path / str(count), count, made)
        assert sum(file.stat().st_size for file in path.iterdir()) > count * 100_000
        peaks[count] = peak("parquet", path, count, batches=12)
    assert peaks[4800] - peaks[800] < 40e6, peaks
