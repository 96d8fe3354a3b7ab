"""Images with labels out of the array_record shards of a prepared TFDS data set.

The records hold `tf.train.Example` messages. Reading the raw bytes and decoding two features here
is several times faster than TFDS's general decoder (60,000 MNIST images in about 3 s instead of
10), and nothing of it imports TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError
from jaxtyping import Int64
from tensorflow_datasets.proto import tf_example_pb2

from diffusion_jax.data.annotations import Conditioning
from diffusion_jax.data.pictures import PictureError
from diffusion_jax.data.shards import Shard
from diffusion_jax.errors import DataError

_READ_ERRORS = (RuntimeError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class RecordStore:
    """Encoded images and labels, read when they are asked for.

    Attributes:
      shards: where the records lie, in order.
      records: the raw records, with `__getitems__(list of indices) -> list of bytes`.
      image_key: name of the image feature.
      label_key: name of the label feature, or None.
      num_classes: labels are below it.
    """

    shards: Sequence[Shard]
    records: Any
    image_key: str
    label_key: str | None = None
    num_classes: int = 0

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    def example_ids(self) -> Int64[np.ndarray, " n"]:
        """Number of each record in all splits of the data set, in their stored order."""
        runs = [np.arange(s.first_id, s.first_id + s.count, dtype=np.int64) for s in self.shards]
        return np.concatenate(runs)

    def read(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[bytes | PictureError], Conditioning]:
        """The images and labels at `indices`.

        Raises:
          DataError: a shard cannot be read.
        """
        images: list[bytes | PictureError] = []
        labels = np.zeros(len(indices), np.int32)
        for row, record in enumerate(self._read(indices.tolist())):
            try:
                image, labels[row] = self._parse(record)
            except PictureError as error:
                image = error
            images.append(image)
        return images, {} if self.label_key is None else {"label": labels}

    def place(self, index: int) -> str:
        """The file and record number of an example, for messages."""
        for shard in self.shards:
            if index < shard.count:
                return f"{shard.path}, record {shard.first_record + index}"
            index -= shard.count
        raise IndexError(index)

    def _read(self, wanted: list[int]) -> list[bytes]:
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

    def _parse(self, record: bytes) -> tuple[bytes, int]:
        try:
            # Its classes are made at import, where a type checker cannot see them.
            example = tf_example_pb2.Example.FromString(record)  # pyright: ignore
            features = example.features.feature
        except DecodeError as error:
            raise PictureError(f"not a tf.train.Example ({error})") from error
        label = self._label(features)
        values = features[self.image_key].bytes_list.value
        if len(values) != 1:
            raise PictureError(f"{len(values)} values of {self.image_key!r}; expected 1 image")
        return values[0], label

    def _label(self, features: Any) -> int:
        if self.label_key is None:
            return 0
        values = features[self.label_key].int64_list.value
        if len(values) != 1 or not 0 <= values[0] < self.num_classes:
            raise PictureError(
                f"{self.label_key}={list(values)}; expected one of 0 to {self.num_classes - 1}"
            )
        return values[0]
