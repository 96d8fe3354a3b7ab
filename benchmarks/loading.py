"""Images a second that each source delivers, against torch DataLoader and tf.data.

    python benchmarks/loading.py [--torch_python=PATH] [--path=DIR --image_size=64]

Makes pictures of 32 and of 256 pixels in a temporary folder (JPEG, quality 90), stores them in
every way that can be read here, and reads them shuffled in float32 batches, as a training run does:
decoded in threads ahead of the consumer. Each reader has a process of its own; they take turns, and
what fills their queues between the turns is not counted. PATH is a Python that has torch and
pillow; its DataLoader has as many worker processes as there are threads here. tf.data maps and
prefetches with AUTOTUNE. `--path` reads a folder of your own instead, once for each reader.
Prints the median over the turns, the processor time an image (which, unlike the rate, other
programs on the machine change little), and the ratio of each turn's rate to those of torch and of
tf.data on the folder.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BATCH = 64
# Batches that may lie ready when a turn begins.
QUEUED = 16
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def our_batches(request: dict[str, Any]) -> Iterator[Any]:
    """Of a source of this package."""
    from diffusion_jax import data
    from diffusion_jax.parallel.memory import keep_freed_memory

    # As the doors do on CPU.
    keep_freed_memory()
    source = data.load(request["name"], "train", **request["options"])
    loader = data.Loader(source=source, batch_size=BATCH, seed=0)
    with data.Prefetcher(loader.batch, 0, BATCH, depth=4) as batches:
        for _, batch in batches:
            yield batch["x"]


def pictures_in(folder: str) -> list[str]:
    """Paths of all pictures."""
    found = (path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES)
    return [str(path) for path in found]


def torch_batches(request: dict[str, Any]) -> Iterator[Any]:
    """Of a DataLoader over a folder, decoded by Pillow in worker processes."""
    import numpy
    import torch
    from PIL import Image, ImageOps

    size, paths = request["image_size"], pictures_in(request["folder"])

    class Folder(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            with Image.open(paths[index]) as opened:
                image = opened.convert("RGB")
            if image.size != (size, size):
                image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
            return torch.from_numpy(numpy.asarray(image) / numpy.float32(127.5) - 1)

    loader = torch.utils.data.DataLoader(
        Folder(),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=request["workers"],
        persistent_workers=True,
    )
    while True:
        yield from loader


def tensorflow_batches(request: dict[str, Any]) -> Iterator[Any]:
    """Of tf.data over a folder."""
    import tensorflow as tf

    size, paths = request["image_size"], pictures_in(request["folder"])

    def decode(path: Any) -> Any:
        image = tf.io.decode_image(tf.io.read_file(path), 3, expand_animations=False)
        image = tf.cast(image, tf.float32)
        if request["resize"]:
            side = tf.reduce_min(tf.shape(image)[:2])
            image = tf.image.resize_with_crop_or_pad(image, side, side)
            image = tf.image.resize(image, (size, size), "lanczos3", antialias=True)
        return tf.ensure_shape(image / 127.5 - 1, (size, size, 3))

    batches = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths)).repeat()
    batches = batches.map(decode, tf.data.AUTOTUNE, deterministic=False)
    batches = batches.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    yield from batches.as_numpy_iterator()


READERS: dict[str, Callable[[dict[str, Any]], Iterator[Any]]] = {
    "ours": our_batches,
    "torch": torch_batches,
    "tf.data": tensorflow_batches,
}


def processor_seconds() -> float:
    """Of this process and its children so far; 0 where there is no /proc."""
    me, total = str(os.getpid()), 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(") ")[2].split()
        except OSError:
            continue
        if me in (status.parent.name, fields[1]):
            total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def worker() -> None:
    """Reads a request, then answers each number of batches with the seconds, and the processor
    seconds, that they took."""
    answers = os.fdopen(os.dup(1), "w")
    # Libraries that print must not answer.
    os.dup2(2, 1)
    request = json.loads(sys.stdin.readline())
    try:
        batches = READERS[request["reader"]](request)
        shape = tuple(next(batches).shape)
        print(json.dumps({"shape": shape}), file=answers, flush=True)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        print(json.dumps({"error": reason}), file=answers, flush=True)
        return
    for line in sys.stdin:
        for _ in range(QUEUED):
            next(batches)
        began, busy = time.perf_counter(), processor_seconds()
        for _ in range(int(line)):
            next(batches)
        taken, busy = time.perf_counter() - began, processor_seconds() - busy
        print(json.dumps([taken, busy]), file=answers, flush=True)
    os._exit(0)


class Reader:
    """A reader in a process of its own that makes batches when told to."""

    def __init__(self, python: str, request: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"},
        )
        self.rates: list[float] = []
        self.costs: list[float] = []
        self.batches = 4
        answer = json.loads(self.ask(json.dumps(request)) or '{"error": "it ended"}')
        self.error = answer.get("error")
        expected = [BATCH, request["image_size"], request["image_size"], 3]
        assert self.error or answer["shape"] == expected, answer

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def turn(self, seconds: float) -> None:
        """Notes images a second, and processor seconds an image, over about so many seconds."""
        taken, busy = json.loads(self.ask(str(self.batches)))
        images = self.batches * BATCH
        self.rates.append(images / taken)
        self.costs.append(busy / images)
        self.batches = max(4, round(seconds * images / taken / BATCH))

    def close(self) -> None:
        """Ends the process by closing its input."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(
    title: str, requests: dict[str, dict[str, Any]], python: dict[str, str], args: Any
) -> None:
    """Prints the rates of all readers of one set, and the ratios to the peers."""
    readers = {}
    for name, request in requests.items():
        readers[name] = Reader(python[request["reader"]], request)
        if readers[name].error:
            print(f"{title}: {name} cannot be measured ({readers[name].error})", flush=True)
            readers.pop(name).close()
    for _ in range(args.turns + 1):
        for reader in readers.values():
            reader.turn(args.seconds)
    for reader in readers.values():
        # The first turn only tells how many batches the others take.
        del reader.rates[0], reader.costs[0]
    for name, reader in readers.items():
        rate, cost = statistics.median(reader.rates), statistics.median(reader.costs)
        line = f"{title}: {name:24s} {rate:8.0f} images/s, {cost * 1e3:6.3f} ms of processor"
        for peer in ("torch DataLoader", "tf.data"):
            if peer in readers and requests[name]["reader"] == "ours":
                pairs = zip(reader.rates, readers[peer].rates, strict=True)
                ratios = [mine / theirs for mine, theirs in pairs]
                spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
                line += f"; over {peer} {statistics.median(ratios):.2f} ({spread})"
        print(line, flush=True)
        reader.close()


def make(root: Path, size: int, count: int) -> dict[str, dict[str, Any]]:
    """Stores pictures in every way; the options that read each."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        # Smooth shapes with some grain compress about as photographs do.
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        pictures.append(buffer.getvalue())
    folder = root / "folder"
    for number, picture in enumerate(pictures):
        path = folder / f"{number % 10}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    for shard in range(4):
        with tarfile.open(root / f"{shard:04d}.tar", "w") as tar:
            for number in range(shard, count, 4):
                info = tarfile.TarInfo(f"{number:06d}.jpg")
                info.size = len(pictures[number])
                tar.addfile(info, io.BytesIO(pictures[number]))
    streamed = {"memory": 0}
    options: dict[str, dict[str, Any]] = {
        "image_folder": {"path": str(folder), **streamed},
        "webdataset": {"path": str(root / "{0000..0003}.tar"), **streamed},
        "tfds": {**write_tfds(root / "tfds", size, pictures), **streamed},
    }
    if write_parquet(root / "pictures.parquet", pictures):
        options["parquet"] = {"path": str(root / "pictures.parquet"), **streamed}
    return options


def write_parquet(path: Path, pictures: list[bytes]) -> bool:
    """Row groups of 100, as the `datasets` library writes pictures."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return False
    pq.write_table(pa.table({"image": pa.array(pictures, pa.binary())}), path, row_group_size=100)
    return True


def write_tfds(root: Path, size: int, pictures: list[bytes]) -> dict[str, Any]:
    """A prepared data set in the layout that TFDS documents."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = root / "loading" / "1.0.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(
        str(folder / "loading-train.array_record-00000-of-00001"), "group_size:1"
    )
    for picture in pictures:
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(picture)
        writer.write(example.SerializeToString())
    writer.close()
    split = {
        "name": "train",
        "shardLengths": [str(len(pictures))],
        "numBytes": "1",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    }
    info = {"name": "loading", "version": "1.0.0", "fileFormat": "array_record", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    python = "tensorflow_datasets.core.features"
    shape = {"dimensions": [str(size), str(size), "3"]}
    image = {
        "pythonClassName": f"{python}.image_feature.Image",
        "image": {"dtype": "uint8", "shape": shape, "encodingFormat": "jpeg"},
    }
    features = {
        "pythonClassName": f"{python}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"image": image}},
    }
    (folder / "features.json").write_text(json.dumps(features))
    return {
        "name": "loading",
        "data_dir": str(root),
        "train": "train[:95%]",
        "validation": "train[95%:]",
    }


def requests_for(
    options: dict[str, dict[str, Any]], folder: str, size: int, resize: bool, args: Any
) -> dict[str, dict[str, Any]]:
    """What each reader is told."""
    shared = {"image_size": size, "folder": folder, "workers": args.workers, "resize": resize}
    requests = {}
    for name, chosen in options.items():
        chosen = {"workers": args.workers, "image_size": size, **chosen}
        requests[name] = {"reader": "ours", "name": name, "options": chosen, **shared}
    held = {**requests["image_folder"]["options"], "memory": 2 << 30}
    requests["image_folder in memory"] = {**requests["image_folder"], "options": held}
    if args.torch_python:
        requests["torch DataLoader"] = {"reader": "torch", **shared}
    requests["tf.data"] = {"reader": "tf.data", **shared}
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python", help="a Python that has torch and pillow")
    parser.add_argument("--path", help="a folder of pictures of your own")
    parser.add_argument("--image_size", type=int, default=64, help="to which --path is resized")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--count", type=int, default=2000, help="pictures to make of each size")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker()
    python = {"ours": sys.executable, "tf.data": sys.executable, "torch": args.torch_python}
    print(f"batches of {BATCH}, {args.workers} workers, {args.turns} turns", flush=True)
    if args.path:
        options = {"image_folder": {"path": args.path, "memory": 0, "captions": "none"}}
        requests = requests_for(options, args.path, args.image_size, True, args)
        return compare(f"{args.path} at {args.image_size}", requests, python, args)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as root:
            options = make(Path(root), size, args.count)
            requests = requests_for(options, str(Path(root) / "folder"), size, False, args)
            compare(f"{size} px", requests, python, args)


if __name__ == "__main__":
    main()
