"""Images and labels, decoded, checked and brought to one size.

Every source yields uint8 (B,C,H,W). Normalization is the sidecar's (`Preprocessing.apply`), so that training, calibration,
verification and the deployed model see the same numbers.
"""

from __future__ import annotations

import copy
import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fofa_deploy.config import DataPlan
from fofa_deploy.data.decode import SUFFIXES, WHOLE, Pixels, open_image, png, to_pixels
from fofa_deploy.data.shards import Shards
from fofa_deploy.errors import DataError
from fofa_deploy.store import digest
from fofa_deploy.types import Preprocessing, digest_file

Indices = NDArray[np.int64]
Boxes = NDArray[np.float64]


class Source(Protocol):
    """A labelled set of images. ``labels`` is int64 (N,); unlabelled sets carry zeros."""

    labels: Indices
    class_names: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of all images and labels, wherever they lie."""
        ...

    def images(self, indices: Indices, boxes: Boxes | None = None) -> Pixels:
        """uint8 (B,C,H,W); ``boxes`` (B,4) cuts left, top, right, bottom fractions out of each image first."""
        ...

    def at(self, plan: DataPlan) -> Source:
        """The same images, by a plan that differs in the size alone: made from the originals anew."""
        ...

    def name(self, index: int) -> str:
        """What to call an image in an error message."""
        ...

    def encoded(self, index: int) -> tuple[bytes, str]:
        """An image as a file would hold it, and the suffix of such a file."""
        ...


def preprocessing(plan: DataPlan) -> Preprocessing:
    """The plan's data section as the sidecar tells it; one mean stands for all channels."""
    return Preprocessing(
        image_size=plan.image_size,
        channels=plan.channels,
        mean=plan.mean * (plan.channels if len(plan.mean) == 1 else 1),
        std=plan.std * (plan.channels if len(plan.std) == 1 else 1),
        interpolation=plan.interpolation,
        crop_fraction=plan.crop_fraction,
    )


class ArraySource:
    """Images that fit in memory, resized once for each size that is asked for."""

    def __init__(self, raw: Pixels, labels: Indices, names: tuple[str, ...], plan: DataPlan, where: str) -> None:
        self._raw, self._plan, self._where = raw, plan, where
        self._others: dict[DataPlan, ArraySource] = {}
        self._pixels = np.stack([to_pixels(Image.fromarray(image), plan) for image in raw])
        self.labels, self.class_names = labels, names
        self.digest = digest([raw.shape, array_digest(raw), array_digest(labels)])

    def at(self, plan: DataPlan) -> ArraySource:
        if plan not in self._others:
            self._others[plan] = ArraySource(self._raw, self.labels, self.class_names, plan, self._where)
        return self._others[plan]

    def images(self, indices: Indices, boxes: Boxes | None = None) -> Pixels:
        if boxes is None:
            return self._pixels[indices]
        squeezed = [self._pixels[i].transpose(1, 2, 0).squeeze() for i in indices]
        return np.stack([to_pixels(Image.fromarray(p), self._plan, b) for p, b in zip(squeezed, boxes, strict=True)])

    def name(self, index: int) -> str:
        return f"{self._where}, image {index}"

    def encoded(self, index: int) -> tuple[bytes, str]:
        return png(self._pixels[index]), "png"


def array_digest(array: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


class FileSource:
    """A timm data set, decoded on access; every decoder warning, such as a decompression bomb's, is an error."""

    def __init__(self, dataset: Any, plan: DataPlan, where: str) -> None:  # noqa: ANN401 - timm's data sets share no class
        # Past timm's ImageDataset to its reader: it puts the next image in place of a broken one, and clips 16 bits to white.
        self._items, self._plan, self._where = getattr(dataset, "reader", dataset), plan, where
        self._samples = getattr(self._items, "samples", getattr(self._items, "imgs", None))
        self.labels = np.asarray(_labels(self._items), np.int64)
        numbers = getattr(self._items, "class_to_idx", None) or {}
        self.folders = tuple(numbers) if len(set(numbers.values())) == len(numbers) else ()  # else synonyms, as ImageNet's
        self.class_names = plan.class_names or _class_names(dataset, self.labels)
        self._original: FileSource | None = None

    @cached_property
    def digest(self) -> str:
        """Of every file's content and place below the root; of the decoded images where there are no files."""
        if self._original:
            return self._original.digest  # of the same originals, even where it is taken of decoded images
        if isinstance(self._items, Shards):
            return digest([self._items.digest, self.class_names])  # which lie beside them
        if self.files:
            root = self._plan.root or Path()
            found = zip(self.files, self.file_digests, self.labels, strict=True)
            return digest([[_below(path, root), sha256, int(label)] for path, sha256, label in found])
        chunks = [np.arange(start, min(start + 64, len(self.labels))) for start in range(0, len(self.labels), 64)]
        return digest([array_digest(self.labels), *(array_digest(self.images(chunk)) for chunk in chunks)])

    def at(self, plan: DataPlan) -> FileSource:
        twin = copy.copy(self)
        twin._plan, twin._original = plan, self._original or self
        return twin

    @cached_property
    def file_digests(self) -> tuple[str, ...]:
        """SHA-256 per file."""
        if self._original:
            return self._original.file_digests
        return tuple(digest_file(path) for path in self.files)

    @property
    def places(self) -> frozenset[tuple[Path, str]]:
        """Of its files, or of the shards that hold its images: folder, wherever links lead, and name."""
        files = self._items.files if isinstance(self._items, Shards) else self.files
        folders = {folder: folder.resolve() for folder in {file.parent for file in files}}
        return frozenset((folders[file.parent], file.name) for file in files)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """One per image; empty for archives and data sets that are not made of files."""
        paths = tuple(Path(sample[0]) for sample in self._samples or () if isinstance(sample[0], str | Path))
        return paths if len(paths) == len(self.labels) else ()

    def images(self, indices: Indices, boxes: Boxes | None = None) -> Pixels:
        chosen = [WHOLE] * len(indices) if boxes is None else [tuple(box) for box in boxes]
        return np.stack([self._decode(int(i), box) for i, box in zip(indices, chosen, strict=True)])

    def _decode(self, index: int, box: Sequence[float]) -> Pixels:
        with self._naming(index):
            return self._pixels(index, box)

    @contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Say which image could not be read."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                yield
        except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombWarning) as error:
            raise DataError(f"{self.name(index)} cannot be decoded: {error}", "replace or remove the file") from error
        except Image.DecompressionBombError as error:
            raise DataError(f"{self.name(index)} is too large: {error}", "replace or remove the file") from error

    def _found(self, index: int) -> Any:  # noqa: ANN401 - an image, or a file of one
        """As the data set has it; a file that it names is opened here: torchvision's loader starts programs, and clips 16 bits."""
        return self.files[index].open("rb") if self.files else self._items[index][0]

    def _pixels(self, index: int, box: Sequence[float]) -> Pixels:
        found = self._found(index)
        if isinstance(found, Image.Image):
            return to_pixels(found, self._plan, box)
        with found as stream, open_image(stream) as image:
            return to_pixels(image, self._plan, box)

    def encoded(self, index: int) -> tuple[bytes, str]:
        """A file's own bytes; what a data set has decoded already is encoded again, losslessly."""
        with self._naming(index):
            found = self._found(index)
            if isinstance(found, Image.Image):
                return png(to_pixels(found, self._plan)), "png"
            with found as stream:
                content: bytes = stream.read()
            with open_image(io.BytesIO(content)) as image:
                suffix = (image.format or "").lower()
            return content, suffix if suffix in SUFFIXES else "jpg"  # of multi-picture files, which cameras write

    def name(self, index: int) -> str:
        if isinstance(self._items, Shards):
            return self._items.name(index)
        if self._samples is None:
            return f"{self._where}, image {index}"
        first = self._samples[index][0]
        path = Path(first if isinstance(first, str | Path) else first.name)
        size = path.stat().st_size if path.is_file() else 0
        return f"{path} ({size} bytes)" if size else str(path)


def _below(path: Path, root: Path) -> str:
    return (path.relative_to(root) if path.is_relative_to(root) else Path(path.name)).as_posix()


def _labels(items: Any) -> Sequence[int]:  # noqa: ANN401
    """Without decoding an image, where the data set lets us."""
    if hasattr(items, "targets"):
        targets: Sequence[int] = items.targets
        return targets
    return [label for _, label in items.samples] if hasattr(items, "samples") else [int(items[i][1]) for i in range(len(items))]


def _class_names(dataset: Any, labels: Indices) -> tuple[str, ...]:  # noqa: ANN401
    mapping = getattr(getattr(dataset, "reader", dataset), "class_to_idx", None)
    if mapping:
        return tuple(sorted(mapping, key=mapping.__getitem__))
    return tuple(str(i) for i in range(int(labels.max()) + 1 if len(labels) else 0))


def check_labels(source: Source) -> None:
    """Refuse labels outside 0..classes-1, -100 too, which cross-entropy would silently ignore."""
    if not len(source.labels):
        raise DataError("a split has no images", "check data.root, data.train_split and data.test_split")
    bad = np.flatnonzero((source.labels < 0) | (source.labels >= len(source.class_names)))
    if len(bad):
        first = int(bad[0])
        raise DataError(
            f"{source.name(first)} has label {source.labels[first]}, but there are {len(source.class_names)} classes"
            f" ({len(bad)} such labels)",
            "mend the labels; they count from 0",
        )
