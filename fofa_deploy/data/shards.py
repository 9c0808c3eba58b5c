"""Data sets in tar shards, as WebDataset lays them out: pairs of members ``KEY.jpg`` (or png, ...) and ``KEY.cls``.

Only where each image lies is held in memory, about 28 bytes per image; an image is read by its offset when it is asked for. So
shards are shuffled, split, resumed and shared by processes as any other images are. Nothing is ever extracted.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.data.decode import SUFFIXES
from fofa_deploy.errors import DataError
from fofa_deploy.store import digest
from fofa_deploy.types import digest_file

LARGEST = 2**28
"""Bytes of an encoded image that are believed; more would be read into memory whole."""

CLASSES = "classes.txt"
"""Names of the classes, one a line, beside the shards."""


class _Place(NamedTuple):
    offset: int
    size: int
    label: int


class Shards:
    """The images of some tar files, in the shape of a timm reader: ``shards[i]`` is a stream and a label.

    Raises:
        DataError: a file is no whole tar file, or an image in it has no label.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        found = [np.asarray(list(_places(path)), np.int64).reshape(-1, 3) for path in files]
        self._shard: NDArray[np.int32] = np.repeat(np.arange(len(files), dtype=np.int32), [len(rows) for rows in found])
        self._offsets, self._sizes, self.targets = np.ascontiguousarray(np.concatenate(found).T)

    @property
    def digest(self) -> str:
        """Of every file's content, in order; reads each once."""
        return digest([digest_file(path) for path in self.files])

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        with self.files[self._shard[index]].open("rb", buffering=0) as shard:
            content = os.pread(shard.fileno(), int(self._sizes[index]), int(self._offsets[index]))
        return io.BytesIO(content), int(self.targets[index])

    def name(self, index: int) -> str:
        """Shard and member, as ``tar -t`` tells it."""
        path, offset = self.files[self._shard[index]], self._offsets[index]
        return next(f"{path}, member {member.name}" for member, _ in _members(path) if member.offset_data == offset)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """The regular files of an uncompressed tar file, which must be whole, each with the open file's descriptor.

    Raises:
        DataError: it is no tar file, or it ends too early.
    """
    try:
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    yield member, stream.fileno()
            # Headers that are cut or damaged count as the end for tarfile; the real one is marked by zeros.
            stream.seek(tar.offset)
            whole = stream.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{path} is not a whole, uncompressed tar file: {error}", "make or download this shard again") from error
    if not whole:
        raise DataError(f"{path} is cut short or damaged: tar's end mark is missing", "make or download this shard again")


def _places(path: Path) -> Iterator[_Place]:
    """Where each image of a shard lies, in the order of the file."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    for member, file in _members(path):
        folder, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        key = f"{folder}/{stem}"
        if suffix == "cls":
            _refuse_twice(key in labels, path, member.name)
            labels[key] = _label(path, member, file)
        elif suffix.lower() in SUFFIXES:
            _refuse_twice(key in images, path, member.name)
            if member.size > LARGEST:
                raise DataError(f"{path}, member {member.name} has {member.size} bytes", f"keep images below {LARGEST}")
            images[key] = member.offset_data, member.size
    if odd := sorted(images.keys() ^ labels.keys()):
        what = "label (.cls)" if odd[0] in images else f"image ({', '.join(sorted(SUFFIXES))})"
        problem = f"{path}: {odd[0].lstrip('/')!r} has no {what}, one of {len(odd)} such"
        raise DataError(problem, "write every image as KEY.jpg, or another type, next to KEY.cls")
    for key, (offset, size) in images.items():
        yield _Place(offset, size, labels[key])


def _refuse_twice(twice: bool, path: Path, name: str) -> None:
    if twice:
        raise DataError(f"{path}: {name} has the key of another member", "give every image of a shard a key of its own")


def _label(path: Path, member: tarfile.TarInfo, file: int) -> int:
    text = os.pread(file, min(member.size, 10), member.offset_data)
    if not text.strip().isdigit() or len(text) > 9:
        raise DataError(f"{path}, member {member.name} holds {text!r}", "write the number of the class, counted from 0, into it")
    return int(text)


def open_shards(root: Path, split: str) -> Shards:
    """The shards ``SPLIT-000000.tar``, ... of a folder, in the order of their names."""
    files = _shards_of(root, split)
    if not files:
        action = "write some: python -m fofa_deploy.data.write_shards PLAN FOLDER"
        raise DataError(f"{root} holds no {split}-000000.tar or the like", action)
    return Shards(files)


def _shards_of(root: Path, split: str) -> list[Path]:
    """A number follows the split's name: ``train-*`` would take those of ``train-extra``, too."""
    try:
        return sorted(root.glob(f"{glob.escape(split)}-[0-9]*.tar"))
    except (NotImplementedError, ValueError) as error:
        action = "name data.train_split and data.test_split as their files begin"
        raise DataError(f"{split!r} names no shards: {error}", action) from error


def numbered(found: int, known: int | None) -> tuple[str, ...]:
    """Names of classes that have none: as many as labels were found of, or as the plan knows of."""
    return tuple(map(str, range(max(found, known or 0))))


def class_names(root: Path, known: int | None, *parts: Shards) -> tuple[str, ...]:
    """Those in `CLASSES` beside the shards; where it is missing, numbers up to the largest label, or the ``known`` number's."""
    listed = root / CLASSES
    if listed.is_file():
        try:
            names = tuple(listed.read_text(encoding="utf-8").rstrip().splitlines())
        except UnicodeDecodeError as error:
            raise DataError(f"{listed} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
        if empty := [number for number, name in enumerate(names, 1) if not name.strip()]:
            raise DataError(f"{listed}, line {empty[0]} names no class", "write one name a line, in the order of the labels")
        return names
    largest = max(int(part.targets.max(initial=0)) for part in parts)
    if largest >= (images := sum(len(part.targets) for part in parts)):
        problem = f"{root} has {images} images, and the largest label is {largest}"
        raise DataError(problem, f"count labels from 0, or name the classes, one per line, in {listed}")
    return numbered(1 + largest, known)


def write_shards(images: Iterable[tuple[bytes, str, int]], folder: Path, split: str, per_shard: int = 10_000) -> list[Path]:
    """Write ``SPLIT-000000.tar``, ...; the same images make the same bytes. Shards of 100 MB to 1 GB serve best.

    Args:
        images: encoded image, its suffix such as ``jpg``, and its label.

    Raises:
        DataError: the folder has shards of this split already, which would be read with the new ones. An error while images
            are read leaves no shard either.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if found := _shards_of(folder, split):
        raise DataError(f"{folder} has shards of {split!r} already, such as {found[0].name}", "remove them, or name another folder")
    written: list[Path] = []
    tar: tarfile.TarFile | None = None
    try:
        for number, (content, suffix, label) in enumerate(images):
            if tar is None or number % per_shard == 0:
                if tar is not None:
                    tar.close()
                written.append(folder / f"{split}-{len(written):06d}.tar")
                tar = tarfile.open(written[-1], "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
            for kind, data in ((suffix, content), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{number:09d}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    except BaseException:
        for path in written:  # a part would open as the whole
            path.unlink(missing_ok=True)
        raise
    finally:
        if tar is not None:
            tar.close()
    return written
