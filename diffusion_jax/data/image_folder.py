"""Any folder of pictures, with classes by subfolder or captions by a file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Int32, Int64

from diffusion_jax.data import metadata
from diffusion_jax.data.annotations import Annotations, Conditioning, Strings
from diffusion_jax.data.listing import check_path, pictures_under
from diffusion_jax.data.own import PATH_FLAG, Options, build, check_choice, options_among
from diffusion_jax.data.pictures import PictureError
from diffusion_jax.data.spec import Source, Split
from diffusion_jax.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)
_FIELD = "data.image_folder"
_LABELS = ("auto", "folders", "none")
_CAPTIONS = ("auto", "metadata", "files", "none")
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "eval"}


def image_folder(
    split: Split,
    *,
    path: str | os.PathLike[str],
    image_size: int | None = None,
    channels: int = 3,
    crop: str = "center",
    flip: bool = False,
    background: str = "white",
    labels: str = "auto",
    captions: str = "auto",
    text_column: str = "text",
    text_length: int = 128,
    scalars: Sequence[str] = (),
    validation_share: float = 0.05,
    max_unreadable: int = 0,
    memory: int = 2 << 30,
    workers: int | None = None,
) -> Source:
    """Pictures of a folder and all folders below it; other options: see `own.Options`.

    The id, and whether a picture is held out, are hashes of its path below the folder.

    Args:
      split: which part of the folder.
      path: the folder.
      labels: "folders": the class is the first subfolder; "auto": so where there are two or more,
        no picture lies beside them, and there are no captions; or "none".
      captions: "metadata": by `metadata.jsonl` or `metadata.csv`; "files": by `stem.txt` beside
        each picture; "auto": by such a metadata file where there is one; or "none".
      text_column: key or column of the caption in the metadata file.

    Raises:
      ConfigError: an option out of range, one class only, or mixed sizes without a size.
      DataError: the folder is missing or empty, links loop, captions do not fit the pictures, or
        more than `max_unreadable` pictures cannot be read.
    """
    options = options_among(locals())
    options.check(_FIELD)
    check_choice(f"{_FIELD}.labels", labels, _LABELS)
    check_choice(f"{_FIELD}.captions", captions, _CAPTIONS)
    root = check_path(path, "a folder of pictures")
    known = frozenset({*metadata.FILES, *({".txt"} if captions == "files" else ())})
    names = pictures_under(root, known)
    annotations = _annotations(root, names, captions, text_column, options)
    classes, numbers = _classes(root, names, labels, annotations.texts is not None)
    store = FolderStore(
        root=root,
        names=Strings(map(os.fsencode, names)),
        annotations=replace(annotations, labels=numbers),
    )
    return build(split, store, names, classes, options, field=_FIELD, title=root)


@dataclass(frozen=True, kw_only=True)
class FolderStore:
    """Pictures in files of their own.

    Attributes:
      root: the folder.
      names: paths below it.
      annotations: what comes with them.
    """

    root: str
    names: Strings
    annotations: Annotations

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Int64[np.ndarray, " m"]) -> FolderStore:
        """The store of the pictures at `rows`."""
        return FolderStore(
            root=self.root, names=self.names.take(rows), annotations=self.annotations.take(rows)
        )

    def read(
        self, indices: Int64[np.ndarray, " n"]
    ) -> tuple[list[bytes | PictureError], Conditioning]:
        """The files of the pictures at `indices`, and what comes with them."""
        files = [self._read(index) for index in indices.tolist()]
        return files, self.annotations.conditioning(indices)

    def _read(self, index: int) -> bytes | PictureError:
        try:
            with open(self.place(index), "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            return PictureError(f"it cannot be read ({error.strerror})")

    def place(self, index: int) -> str:
        """Path of a picture."""
        return os.path.join(self.root, os.fsdecode(self.names[index]))


def _annotations(
    root: str, names: Sequence[str], captions: str, text_column: str, options: Options
) -> Annotations:
    """Captions and numbers, as chosen or as found."""
    if captions == "files" and options.scalars:
        raise ConfigError(f"{_FIELD}.scalars needs {metadata.FILES[0]}, not captions='files'")
    if captions == "files":
        return metadata.from_text_files(root, names, options.text_length)
    wanted = captions == "metadata" or bool(options.scalars)
    path = metadata.file_in(root) if wanted or captions == "auto" else None
    if wanted and path is None:
        needed = "captions='metadata'" if captions == "metadata" else f"scalars={options.scalars}"
        raise DataError(
            f"{root} has no {' or '.join(metadata.FILES)}, which {needed} needs: one line for "
            'each picture, such as {"file_name": "a/b.png", "text": "a red kite"}'
        )
    read_texts = captions != "none"
    if path is None or not (read_texts or options.scalars):
        return Annotations()
    return metadata.from_metadata(
        root,
        path,
        names,
        text_column=text_column if read_texts else None,
        length=options.text_length,
        scalars=options.scalars,
    )


def _to_train_on(splits: Sequence[str]) -> str:
    """The folder for training among folders of splits; the first where none is called so."""
    return next((name for name in splits if name.lower().startswith("train")), splits[0])


def _classes(
    root: str, names: Sequence[str], labels: str, captioned: bool
) -> tuple[list[str], Int32[np.ndarray, " n"] | None]:
    """Names of the classes and the class of each picture; none where there are no classes."""
    if labels == "none" or (labels == "auto" and captioned):
        return [], None
    firsts = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    counts = Counter(firsts)
    loose = counts.pop("", 0)
    classes = sorted(counts)
    if len(classes) > 1 and {name.lower() for name in classes} <= _SPLIT_NAMES:
        chosen = os.path.join(root, _to_train_on(classes))
        raise ConfigError(
            f"data.path={root} holds {', '.join(classes)}, which are no classes; "
            f"name one: {PATH_FLAG}={chosen}, or set labels='none'"
        )
    if labels == "auto" and (loose or len(classes) < 2):
        return [], None
    if loose:
        first = names[firsts.index("")]
        raise DataError(
            f"{root}: {loose} pictures lie in no subfolder, the first {first!r}; "
            "with labels='folders' each needs one"
        )
    if len(classes) == 1:
        raise ConfigError(
            f"{_FIELD}.labels='folders': {root} has the one subfolder {classes[0]!r}; "
            "expected two classes or more, or labels='none'"
        )
    index = {name: number for number, name in enumerate(classes)}
    return classes, np.array([index[first] for first in firsts], np.int32)
