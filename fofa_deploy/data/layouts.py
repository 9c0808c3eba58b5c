"""How data sets lie on a disk, each opened as a training source and a test source."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.config import DataPlan
from fofa_deploy.data.decode import SUFFIXES
from fofa_deploy.data.shards import class_names, numbered, open_shards
from fofa_deploy.data.sources import ArraySource, FileSource, Source, check_labels
from fofa_deploy.errors import DataError
from fofa_deploy.mistakes import suggestion

LEAST_IMAGES = 16
"""Fewer cannot be split into calibration, validation and test images."""

_ENDINGS = frozenset(f".{suffix}" for suffix in SUFFIXES)

_TORCH, _ROOTLESS = "torch/", ("hfds/", "hfids/", "tfds/", "wds/")
"""How timm's names of data sets begin: those that lie in data.root, and those that may be fetched."""


def open_sources(plan: DataPlan) -> tuple[Source, Source]:
    """The plan's training source and test source, labels checked.

    Raises:
        DataError: nothing there, a file is broken, or a label is out of range.
    """
    train, test = _LAYOUTS.get(plan.name, _timm)(plan)
    for source in (train, test):
        check_labels(source)
    if train.class_names != test.class_names:
        raise DataError("training and test splits have different classes", "give both splits the same class folders")
    if plan.classes not in (None, len(train.class_names)):
        problem = f"data.classes is {plan.classes}, and there are {len(train.class_names)} classes"
        raise DataError(problem, "correct it, or leave it out: labels and data.class_names tell it, too")
    return train, test


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
        parts.append((raw, labels, f"{folder}/{prefix}"))
    names = plan.class_names or numbered(1 + max(int(labels.max()) for _, labels, _ in parts), plan.classes)
    train, test = (ArraySource(raw, labels, names, plan, where) for raw, labels, where in parts)
    return train, test


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
    named = plan.model_copy(update={"class_names": plan.class_names or class_names(root, plan.classes, train, test)})
    sources = FileSource(train, named, str(root)), FileSource(test, named, str(root))
    _refuse_shared(*sources, plan)
    return sources


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
    names = plan.class_names or numbered(1, plan.classes)
    train, test = (FileSource(_ImageFiles(part, names), plan, str(root)) for part in parts)
    _refuse_shared(train, test, plan)
    return train, test


def _image_files(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if _is_image(path.name))
    if odd := [path for path in found if not path.is_file()]:
        raise DataError(f"{odd[0]} is no file, or leads to none", "remove it")
    return found


def _timm(plan: DataPlan) -> tuple[Source, Source]:
    from timm.data.dataset_factory import create_dataset
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    name = "" if plan.name == "folder" else plan.name
    if name and not name.startswith((_TORCH, *_ROOTLESS)):
        action = f"{suggestion(name, [*_LAYOUTS, 'folder'])}; or one of timm's, such as torch/cifar10 or hfds/NAME"
        raise DataError(f"there is no data set {name!r}", action)
    root = None if name.startswith(_ROOTLESS) and plan.root is None else str(_root(plan))
    sources, readers = [], []
    for split in (plan.train_split, plan.test_split):
        try:
            with _image_endings():
                dataset = create_dataset(name, root=root, split=split)
        except (RuntimeError, ValueError, TypeError, AssertionError, OSError, ImportError) as error:
            raise DataError(
                f"timm cannot open data set {plan.name!r}, split {split!r}: {error}", "check data.name, data.root"
            ) from error
        if not hasattr(dataset, "__len__"):
            raise DataError(f"data set {plan.name!r} is a stream", "download it first: splits and resuming need random access")
        sources.append(FileSource(dataset, plan, f"{plan.name} {split}"))
        readers.append(getattr(dataset, "reader", None))
    _refuse_shared(sources[0], sources[1], plan)
    for reader in readers:
        if isinstance(reader, ReaderImageFolder):
            _refuse_odd_folders(Path(reader.root))
    _check_folders(sources[0], sources[1], plan)
    return sources[0], sources[1]


@contextmanager
def _image_endings() -> Iterator[None]:
    """timm looks for three kinds of files, unless told; a class of other files would be none."""
    from timm.data.readers.img_extensions import get_img_extensions, set_img_extensions

    before = get_img_extensions()
    set_img_extensions(sorted(_ENDINGS))
    try:
        yield
    finally:
        set_img_extensions(before)


def _refuse_odd_folders(root: Path) -> None:
    """timm makes a class of every folder that holds images: one too few, or one too many, shifts the numbers of all others."""
    walked = [(Path(folder), below, files) for folder, below, files in os.walk(root, followlinks=True)]
    holding = {folder: name for folder, _, files in walked if (name := next(filter(_is_image, sorted(files)), None))}
    if root in holding:
        raise DataError(f"{root / holding[root]} lies in no class folder", "move it into one, or remove it")
    for folder, below, files in walked:
        inside = folder.relative_to(root)
        above = next((root / parent for parent in inside.parents if root / parent in holding), None)
        if above and folder in holding:
            problem = f"{folder} holds images, below the class folder {above}, and would be a class of its own"
            raise DataError(problem, "move it beside the class folders, or out of the split")
        if not (below or above or folder in holding or any(part.startswith(".") for part in inside.parts)):
            held = f"{len(files)} files, and no image among them" if files else "nothing"
            problem = f"class folder {folder} holds {held} (images end in {', '.join(sorted(SUFFIXES))})"
            raise DataError(problem, "put images of the class into it, or move it out of the split")


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _ENDINGS


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


def _refuse_shared(train: FileSource, test: FileSource, plan: DataPlan) -> None:
    """Images to learn from that are test images, too.

    timm takes the root itself for a split that it does not find, and torchvision's test images for a name that it does not know.
    """
    named = f"training split {plan.train_split!r} and test split {plan.test_split!r}"
    if train.places & test.places:
        action = "make train/ and validation/ folders there, or name data.train_split and data.test_split"
        raise DataError(f"{named} share images below {plan.root}", action)
    alike = plan.name.startswith(_TORCH) and train.digest == test.digest
    if not train.places and (alike or plan.train_split == plan.test_split):
        action = "name data.train_split and data.test_split, usually train and validation"
        raise DataError(f"{named} of {plan.name} are the same images", action)


def _by_rank(folders: Sequence[str]) -> list[list[str]]:
    """Names that timm, which numbers them in this order, cannot tell apart: it ignores case, and zeros in front of a number."""
    from timm.utils.misc import natural_key

    return [list(names) for _, names in groupby(sorted(folders, key=lambda name: (natural_key(name), name)), natural_key)]


def _root(plan: DataPlan) -> Path:
    if plan.root is None or not plan.root.is_dir():
        raise DataError(f"data.root {str(plan.root or '')!r} is not a folder", f"point it at the images of {plan.name!r}")
    return plan.root


_LAYOUTS: dict[str, Callable[[DataPlan], tuple[Source, Source]]] = {
    "digits": _digits,
    "idx": _idx,
    "images": _images,
    "shards": _shards,
}
