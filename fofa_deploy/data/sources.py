"""Where images and labels come from, decoded, checked and brought to one size.

Every source yields uint8 (B,C,H,W). Normalization is the sidecar's (`Preprocessing.apply`), so that training, calibration,
verification and the deployed model see the same numbers.
"""

from __future__ import annotations

import copy
import gzip
import hashlib
import io
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fofa_deploy.config import DataPlan
from fofa_deploy.data.decode import WHOLE, Pixels, open_image, png, to_pixels
from fofa_deploy.data.shards import SUFFIXES, Shards, class_names, open_shards
from fofa_deploy.errors import DataError
from fofa_deploy.store import digest
from fofa_deploy.types import Preprocessing, digest_file

LEAST_IMAGES = 16
"""Fewer cannot be split into calibration, validation and test images."""

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
        self._samples = getattr(self._items, "samples", None)
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
            rows = [
                [_below(path, root), digest_file(path), int(label)] for path, label in zip(self.files, self.labels, strict=True)
            ]
            return digest(rows)
        chunks = [np.arange(start, min(start + 64, len(self.labels))) for start in range(0, len(self.labels), 64)]
        return digest([array_digest(self.labels), *(array_digest(self.images(chunk)) for chunk in chunks)])

    def at(self, plan: DataPlan) -> FileSource:
        twin = copy.copy(self)
        twin._plan, twin._original = plan, self._original or self
        return twin

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

    def _pixels(self, index: int, box: Sequence[float]) -> Pixels:
        found = self._items[index][0]
        if isinstance(found, Image.Image):
            return to_pixels(found, self._plan, box)
        with found as stream, open_image(stream) as image:
            return to_pixels(image, self._plan, box)

    def encoded(self, index: int) -> tuple[bytes, str]:
        """A file's own bytes; what a data set has decoded already is encoded again, losslessly."""
        with self._naming(index):
            found = self._items[index][0]
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


# --- where images come from -----------------------------------------------------------------------------------


def _digits(plan: DataPlan) -> tuple[Source, Source]:
    """scikit-learn's 1,797 scans of handwritten digits (UCI, 8x8, 17 gray levels); every fifth one is the test split."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    raw = (np.asarray(bunch.images) * (255.0 / 16.0)).round().astype(np.uint8)
    labels = np.asarray(bunch.target, np.int64)
    test = np.arange(len(labels)) % 5 == 4
    names = tuple(str(i) for i in range(10))
    train = ArraySource(raw[~test], labels[~test], names, plan, "digits")
    return train, ArraySource(raw[test], labels[test], names, plan, "digits (test)")


def _read_idx(folder: Path, stem: str, dimensions: int) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes, plain or gzipped; its header must agree with its length."""
    path = next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder / stem}[.gz] does not exist", "point data.root at a folder of IDX files, as MNIST's")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}", "download it again") from error
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions))
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) != header + math.prod(shape):
        raise DataError(f"{path} is not a whole IDX file of {dimensions}-dimensional bytes", "download it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _idx(plan: DataPlan) -> tuple[Source, Source]:
    folder = _root(plan)
    parts = []
    for prefix in ("train", "t10k"):
        raw = _read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
        labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1).astype(np.int64)
        if len(raw) != len(labels):
            raise DataError(f"{folder}: {len(raw)} images but {len(labels)} labels in {prefix}", "download the set again")
        if not len(raw):
            raise DataError(f"{folder}: there are no images in {prefix}", "download the set again")
        names = plan.class_names or tuple(str(i) for i in range(int(labels.max()) + 1))
        parts.append(ArraySource(raw, labels, names, plan, f"{folder}/{prefix}"))
    return parts[0], parts[1]


_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})


class _ImageFiles:
    """Files without labels, in the shape of a timm data set."""

    class_to_idx: Mapping[str, int]

    def __init__(self, files: Sequence[Path], names: Sequence[str]) -> None:
        self.reader = self
        self.samples = [(path, 0) for path in files]
        self.class_to_idx = {name: number for number, name in enumerate(names)}

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        return self.samples[index][0].open("rb"), 0


def _shards(plan: DataPlan) -> tuple[Source, Source]:
    root = _root(plan)
    train, test = (open_shards(root, split) for split in (plan.train_split, plan.test_split))
    named = plan.model_copy(update={"class_names": plan.class_names or class_names(root, train, test)})
    return FileSource(train, named, str(root)), FileSource(test, named, str(root))


def _images(plan: DataPlan) -> tuple[Source, Source]:
    """Every image file below the root, every fifth one for testing; or, where there are both, the folders of the two splits."""
    root = _root(plan)
    folders = root / plan.train_split, root / plan.test_split
    if all(folder.is_dir() for folder in folders):
        parts = tuple(_image_files(folder) for folder in folders)
    else:
        found = _image_files(root)
        parts = ([file for i, file in enumerate(found) if i % 5 != 4], found[4::5])
    files = [file for part in parts for file in part]
    if len(files) < LEAST_IMAGES:
        raise DataError(f"{root} holds {len(files)} images", f"give at least {LEAST_IMAGES}")
    names = plan.class_names or tuple(str(number) for number in range(plan.classes or 1))
    train, test = (FileSource(_ImageFiles(part, names), plan, str(root)) for part in parts)
    return train, test


def _image_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)
    if odd := [path for path in found if not path.is_file()]:
        raise DataError(f"{odd[0]} is no file, or leads to none", "remove it")
    return found


def _timm(plan: DataPlan) -> tuple[Source, Source]:
    from timm.data.dataset_factory import create_dataset

    name = "" if plan.name == "folder" else plan.name
    sources = []
    for split in (plan.train_split, plan.test_split):
        try:
            dataset = create_dataset(name, root=str(_root(plan)) if plan.root else None, split=split)
        except (RuntimeError, ValueError, AssertionError, OSError, ImportError) as error:
            raise DataError(
                f"timm cannot open data set {plan.name!r}, split {split!r}: {error}", "check data.name, data.root"
            ) from error
        if not hasattr(dataset, "__len__"):
            raise DataError(f"data set {plan.name!r} is a stream", "download it first: splits and resuming need random access")
        sources.append(FileSource(dataset, plan, f"{plan.name} {split}"))
    _refuse_same_files(sources[0], sources[1], plan)
    _check_folders(sources[0], sources[1], plan)
    return sources[0], sources[1]


def _check_folders(train: FileSource, test: FileSource, plan: DataPlan) -> None:
    """Each split numbers its own folders: with one missing, the names of a plan would hide that the others' numbers differ."""
    if sorted(train.folders) != sorted(test.folders):
        lacking = [(plan.train_split, {*test.folders} - {*train.folders}), (plan.test_split, {*train.folders} - {*test.folders})]
        told = "; ".join(f"{split} has no images of {', '.join(sorted(names)[:5])}" for split, names in lacking if names)
        raise DataError(f"training and test splits have different classes: {told}", "give both splits images of every class")
    alike = [names for names in _by_rank(train.folders) if len(names) > 1]
    if alike:
        raise DataError(f"the class folders {' and '.join(alike[0])} have no order: labels would change", "rename one of them")
    if train.folders and plan.class_names and len(train.folders) != len(plan.class_names):
        problem = f"data.class_names has {len(plan.class_names)} names, and there are {len(train.folders)} classes"
        raise DataError(problem, "name every class once, in the order of the folders' names")


def _refuse_same_files(train: FileSource, test: FileSource, plan: DataPlan) -> None:
    """timm takes the root itself for a split that it does not find."""
    if set(train.files) & set(test.files):
        problem = f"training split {plan.train_split!r} and test split {plan.test_split!r} share images below {plan.root}"
        raise DataError(problem, "make train/ and validation/ folders there, or name data.train_split and data.test_split")


def _by_rank(folders: Sequence[str]) -> list[list[str]]:
    """Names that timm, which numbers them in this order, cannot tell apart: it ignores case, and zeros in front of a number."""
    from timm.utils.misc import natural_key

    return [list(names) for _, names in groupby(sorted(folders, key=lambda name: (natural_key(name), name)), natural_key)]


def _root(plan: DataPlan) -> Path:
    if plan.root is None or not plan.root.is_dir():
        raise DataError(f"data.root {str(plan.root or '')!r} is not a folder", f"point it at the images of {plan.name!r}")
    return plan.root


def open_sources(plan: DataPlan) -> tuple[Source, Source]:
    """The plan's training source and test source, labels checked.

    Raises:
        DataError: nothing there, a file is broken, or a label is out of range.
    """
    train, test = {"digits": _digits, "idx": _idx, "images": _images, "shards": _shards}.get(plan.name, _timm)(plan)
    for source in (train, test):
        check_labels(source)
    if train.class_names != test.class_names:
        raise DataError("training and test splits have different classes", "give both splits the same class folders")
    return train, test


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
