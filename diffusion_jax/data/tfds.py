"""Image data sets of tensorflow-datasets (TFDS), by name or from a prepared folder.

They are stored as array_record, which gives random access without TensorFlow. A data set that is
missing is downloaded and prepared, which is the one thing here that needs TensorFlow.
"""

from __future__ import annotations

import logging
import os
import socket
import urllib.parse
import urllib.request
from typing import Any

import numpy as np

from diffusion_jax.data.held import held_if_it_fits
from diffusion_jax.data.own import check_limits
from diffusion_jax.data.picture_source import Faults, PictureSource
from diffusion_jax.data.pictures import check_view, view
from diffusion_jax.data.shards import check_disjoint, shards_of
from diffusion_jax.data.spec import DataSpec, Source, Split
from diffusion_jax.data.transforms import HorizontalFlip
from diffusion_jax.data.workers import workers as shared_workers
from diffusion_jax.errors import ConfigError, DataError, nearest

_LOG = logging.getLogger(__name__)
_FIELD = "data.tfds"
_CONNECT_SECONDS = 5.0


def tfds(
    split: Split,
    *,
    name: str = "mnist",
    data_dir: str | os.PathLike[str] | None = None,
    train: str = "train",
    validation: str = "test",
    image_size: int | None = None,
    crop: str = "center",
    flip: bool = False,
    memory: int = 2 << 30,
    max_unreadable: int = 0,
    workers: int | None = None,
) -> Source:
    """Images in [-1, 1] with their class labels; the id is the record's number in all splits.

    Args:
      split: which of the two split expressions to load.
      name: TFDS name, with its config and version where wanted: "mnist", "name/config:1.0.0".
      data_dir: where prepared data sets lie; None for TFDS_DATA_DIR or ~/tensorflow_datasets.
      train: TFDS split expression for training, such as "train[:90%]".
      validation: split expression for validation; it must not overlap that for training.
      image_size, crop, flip, memory, max_unreadable, workers: see `own.Options`.

    Raises:
      ConfigError: unknown name or split expression, overlapping splits, or images of mixed sizes
        without `image_size`.
      DataError: the data set is missing and cannot be downloaded, is not stored as array_record,
        has no 8-bit images, or is damaged.
    """
    check_view(_FIELD, image_size=image_size, crop=crop)
    check_limits(_FIELD, max_unreadable=max_unreadable, memory=memory, workers=workers)
    builder = _prepared_builder(name, data_dir)
    chosen = {"train": train, "validation": validation}
    shards = _chosen_shards(builder, name, chosen, split)
    store, spec = _store(builder, shards, chosen[split], image_size)
    title = f"{name} {chosen[split]}"
    source = PictureSource(
        spec=spec,
        store=store,
        example_ids=store.example_ids(),
        view=view(_FIELD, image_size=image_size, channels=spec.shape[2], crop=crop),
        faults=Faults(max_unreadable, title),
        workers=shared_workers(workers),
    )
    held = held_if_it_fits(source, memory, title)
    return HorizontalFlip(source=held) if flip and split == "train" else held


def _store(builder: Any, shards: Any, split: str, image_size: int | None) -> tuple[Any, DataSpec]:
    # These pull in TFDS itself, which takes half a second that other sources need not spend.
    import tensorflow_datasets as lib

    from diffusion_jax.data.records import RecordStore

    image_key, label_key, spec = _features(builder, image_size)
    raw = lib.decode.DeserializeMethod.RAW_BYTES
    store = RecordStore(
        shards=shards,
        records=builder.as_data_source(split=split, deserialize_method=raw).data_source,
        image_key=image_key,
        label_key=label_key,
        num_classes=spec.num_classes,
    )
    return store, spec


def _chosen_shards(builder: Any, name: str, chosen: dict[str, str], split: Split) -> Any:
    """The shards of one split, once the two are known to be apart."""
    shards = {key: shards_of(builder, f"data.tfds.{key}", value) for key, value in chosen.items()}
    check_disjoint(shards["train"], shards["validation"], chosen["train"], chosen["validation"])
    if not shards[split]:
        raise ConfigError(f"data.tfds.{split}={chosen[split]!r} has no examples in {name}")
    return shards[split]


def _prepared_builder(name: str, data_dir: str | os.PathLike[str] | None) -> Any:
    import tensorflow_datasets as lib

    if data_dir is not None:
        data_dir = os.path.expanduser(data_dir)
    try:
        builder = lib.builder(name, data_dir=data_dir)
    except lib.core.DatasetNotFoundError:
        known = lib.list_builders(with_community_datasets=False)
        close = nearest(name, known)
        raise ConfigError(
            f"data.tfds.name={name!r} is no TFDS data set"
            + (f" and none lies under data_dir={data_dir}" if data_dir else "")
            + (f" (did you mean {close!r}?)" if close else "")
        ) from None
    except Exception as error:
        raise ConfigError(f"data.tfds.name={name!r}: {_one_line(error)}") from error
    if not builder.is_prepared():
        _download(builder, name)
        return builder
    stored = builder.info.file_format
    if stored is not lib.core.FileFormat.ARRAY_RECORD:
        raise DataError(
            f"{builder.data_path} is stored as {stored.value if stored else 'nothing'}; expected "
            f"array_record. To convert it into a folder DIR of your choice, without downloading, "
            f"type: {_conversion(builder, name)}; then: --config.data.data_dir=DIR"
        )
    return builder


def _conversion(builder: Any, name: str) -> str:
    """What to type to write prepared records again as array_record, images byte for byte.

    TFDS's own `tfds convert_format` needs Apache Beam to start.
    """
    import tensorflow_datasets as lib

    images = [key for key, f in builder.info.features.items() if type(f) is lib.features.Image]
    raw = ", ".join(f"'{key}': t.decode.SkipDecoding()" for key in images)
    config = f", config='{builder.builder_config.name}'" if builder.builder_config else ""
    return (
        f'python -c "import tensorflow_datasets as t; '
        f"b = t.builder('{name}', data_dir='{_root(builder)}'); "
        "t.dataset_builders.store_as_tfds_dataset(b.name, b.version, b.info.features, "
        f"b.as_dataset(decoders={{{raw}}}){config}, data_dir='DIR', file_format='array_record', "
        'disable_shuffling=True)"'
    )


def _root(builder: Any) -> str:
    """The folder of prepared data sets that a data set lies in, or would."""
    return str(builder.data_path).removesuffix(builder.info.full_name).rstrip("/")


def _command(name: str, data_dir: str) -> str:
    """What to type to prepare a data set; TFDS's own `tfds build` needs Apache Beam to start."""
    call = f"t.builder('{name}', data_dir='{data_dir}')"
    return (
        f'python -c "import tensorflow_datasets as t; {call}'
        ".download_and_prepare(file_format='array_record')\""
    )


def _download(builder: Any, name: str) -> None:
    root = _root(builder)
    remedy = (
        f"where there is a network, type: {_command(name, root)}; "
        "if it is prepared elsewhere: --config.data.data_dir=DIR"
    )
    if not _network(builder):
        raise DataError(f"{name} is not under {root} and no server of it answers; {remedy}")
    _LOG.warning("%s is not under %s: downloading and preparing it", name, root)
    try:
        builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise DataError(
            f"{name} is not under {root} and its download failed ({_one_line(error)}); {remedy}"
        ) from error


def _network(builder: Any) -> bool:
    """Whether a server of the data set's files answers, as far as that can be known.

    Without a network TFDS retries for minutes before it gives up.
    """
    servers = {
        (url.hostname, url.port or (80 if url.scheme == "http" else 443))
        for url in map(urllib.parse.urlsplit, builder.url_infos or {})
        if url.hostname
    }
    # A proxy may reach what this machine cannot. Other entries than these are not proxies: every
    # variable that ends in _proxy makes one, also those that list exceptions.
    if not servers or urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return True
    for server in servers:
        try:
            socket.create_connection(server, timeout=_CONNECT_SECONDS).close()
            return True
        except OSError:
            continue
    return False


def _features(builder: Any, image_size: int | None) -> tuple[str, str | None, DataSpec]:
    """Names of the image and label features, and the shape of the examples."""
    import tensorflow_datasets as lib

    features = dict(builder.info.features.items())
    images = [key for key, feature in features.items() if type(feature) is lib.features.Image]
    labels = [key for key, f in features.items() if isinstance(f, lib.features.ClassLabel)]
    if len(images) != 1 or features[images[0]].np_dtype != np.uint8:
        raise DataError(
            f"{builder.info.full_name} has the features {', '.join(features)}; "
            "expected exactly one image of 8 bits"
        )
    height, width, channels = features[images[0]].shape
    if channels not in (1, 3, 4):
        raise DataError(
            f"{builder.info.full_name}: images of {channels} channels; expected 1, 3, 4"
        )
    if image_size is not None:
        height = width = image_size
    if height is None or width is None:
        raise ConfigError(
            f"data.tfds.image_size is not set: the images of {builder.info.full_name} differ in "
            "size; set it, for example to 64"
        )
    label_key = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
    feature = features[label_key] if label_key else None
    spec = DataSpec(
        shape=(height, width, channels),
        kind="image",
        num_classes=feature.num_classes if feature else 0,
        classes=tuple(feature.names or ()) if feature else (),
    )
    return images[0], label_key, spec


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
