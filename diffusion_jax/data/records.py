"""Images with labels out of the array_record shards of a prepared TFDS data set.

The records hold `tf.train.Example` messages. Reading the raw bytes and decoding two features here
is several times faster than TFDS's general decoder (60,000 MNIST images in about 3 s instead of
10), and nothing of it imports TensorFlow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Int32, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from tensorflow_datasets.proto import tf_example_pb2

from diffusion_jax.data.arrays import from_uint8
from diffusion_jax.data.shards import Shard
from diffusion_jax.data.spec import Batch, DataSpec
from diffusion_jax.data.transforms import resize
from diffusion_jax.errors import DataError

_READ_ERRORS = (RuntimeError, OSError, ValueError)
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableError(Exception):
    """One record that cannot be decoded; the text says why."""


@dataclass(frozen=True, kw_only=True)
class RecordSource:
    """Images that are read and decoded when they are asked for.

    Attributes:
      spec: of the examples, after resizing.
      shards: where the records lie, in order.
      records: the raw records, with `__getitems__(list of indices) -> list of bytes`.
      image_key: name of the image feature.
      label_key: name of the label feature, or None.
      image_size: side to crop and resize to, or None.
    """

    spec: DataSpec
    shards: Sequence[Shard]
    records: Any
    image_key: str
    label_key: str | None = None
    image_size: int | None = None

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    def ids(self, indices: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        """Number of each record in all splits of the data set, in their stored order."""
        starts = np.cumsum([0] + [shard.count for shard in self.shards])
        shard = np.searchsorted(starts, indices, side="right") - 1
        first_ids = np.array([shard.first_id for shard in self.shards], np.int64)
        return first_ids[shard] + indices - starts[shard]

    def fetch(
        self,
        indices: Int64[np.ndarray, " n"],
        positions: Int64[np.ndarray, " n"] | None = None,
    ) -> Batch:
        """Read and decode the examples at `indices`; positions change nothing here.

        Raises:
          DataError: a record or its shard is damaged.
        """
        pixels, labels, errors = self.decode(indices)
        if errors:
            index, reason = next(iter(errors.items()))
            raise DataError(f"{self.place(index)}: {reason}")
        return {
            "x": from_uint8(pixels),
            "conditioning": {} if labels is None else {"label": labels},
            "id": self.ids(indices),
        }

    def decode(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[
        UInt8[np.ndarray, "n height width channels"], Int32[np.ndarray, " n"] | None, dict[int, str]
    ]:
        """Pixels, labels, and the reason for each index that cannot be decoded (left at 0).

        Raises:
          DataError: a shard cannot be read.
        """
        pixels = np.zeros((len(indices), *self.spec.shape), np.uint8)
        labels = np.zeros(len(indices), np.int32)
        errors: dict[int, str] = {}
        for row, (index, record) in enumerate(zip(indices, self._read(indices), strict=True)):
            try:
                pixels[row], labels[row] = self._decode_record(record)
            except UnreadableError as error:
                errors[int(index)] = str(error)
        return pixels, None if self.label_key is None else labels, errors

    def place(self, index: int) -> str:
        """The file and record number of an example, for messages."""
        for shard in self.shards:
            if index < shard.count:
                return f"{shard.path}, record {shard.first_record + index}"
            index -= shard.count
        raise IndexError(index)

    def _read(self, indices: Int64[np.ndarray, " n"]) -> list[bytes]:
        wanted = [int(i) for i in indices]
        try:
            return self.records.__getitems__(wanted)
        except _READ_ERRORS:
            # The reader does not always name the file: one at a time shows which it is.
            return [self._read_one(index) for index in wanted]

    def _read_one(self, index: int) -> bytes:
        try:
            return self.records.__getitems__([index])[0]
        except _READ_ERRORS as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.place(index)}: the shard cannot be read ({reason})") from error

    def _decode_record(self, record: bytes) -> tuple[np.ndarray, int]:
        try:
            # Its classes are made at import, where a type checker cannot see them.
            example = tf_example_pb2.Example.FromString(record)  # pyright: ignore
            features = example.features.feature
        except DecodeError as error:
            raise UnreadableError(f"not a tf.train.Example ({error})") from error
        label = self._decode_label(features)
        values = features[self.image_key].bytes_list.value
        if len(values) != 1:
            raise UnreadableError(f"{len(values)} values of {self.image_key!r}; expected 1 image")
        return self._decode_image(values[0]), label

    def _decode_label(self, features: Any) -> int:
        if self.label_key is None:
            return 0
        values = features[self.label_key].int64_list.value
        if len(values) != 1 or not 0 <= values[0] < self.spec.num_classes:
            raise UnreadableError(
                f"{self.label_key}={list(values)}; expected one of 0 to {self.spec.num_classes - 1}"
            )
        return values[0]

    def _decode_image(self, encoded: bytes) -> np.ndarray:
        height, width, channels = self.spec.shape
        try:
            with Image.open(io.BytesIO(encoded)) as image:
                image = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
                if self.image_size is not None:
                    image = resize(image, self.image_size)
                pixels = np.asarray(image)
        except UnidentifiedImageError as error:
            raise UnreadableError("its image is of no known format") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableError(f"its image cannot be decoded ({error})") from error
        if pixels.shape[:2] != (height, width):
            raise UnreadableError(
                f"its image is {pixels.shape[0]} x {pixels.shape[1]}; expected {height} x {width}"
            )
        return pixels.reshape(height, width, channels)
