"""Tar shards: the same images as from any other source, read by offset, and every fault named with its shard."""

import io
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fofa_deploy.config import DataPlan
from fofa_deploy.data import load_data, scan, shards
from fofa_deploy.data.layouts import open_sources
from fofa_deploy.data.shards import write_shards
from fofa_deploy.data.splits import Split
from fofa_deploy.data.write_shards import command, reshard
from fofa_deploy.errors import DataError
from fofa_deploy.progress import Quiet

DIGITS = DataPlan(name="digits", image_size=(8, 8), channels=1)


def plan_of(folder: Path, **options) -> DataPlan:
    return DataPlan(name="shards", root=folder, **{"image_size": (8, 8), "channels": 1, "validation_fraction": 0.25, **options})


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """scikit-learn's digits, 1,438 and 359 of them, 500 per shard."""
    folder = tmp_path_factory.mktemp("digits")
    assert [path.name for path in reshard(DIGITS, folder, 500)] == [
        *(f"train-{i:06d}.tar" for i in range(3)),
        "validation-000000.tar",
    ]
    return folder


def test_shards_hold_the_images_that_were_written(digits):
    for before, after in zip(open_sources(DIGITS), open_sources(plan_of(digits)), strict=True):
        assert np.array_equal(before.labels, after.labels)
        assert before.class_names == after.class_names
        some = np.random.default_rng(0).permutation(len(before.labels))[:200]
        assert np.array_equal(before.images(some), after.images(some))


def test_shards_that_are_there_already_are_not_mixed_with_new_ones(tmp_path):
    reshard(DIGITS, tmp_path, 500)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="has shards of 'train' already"):
        reshard(DIGITS, tmp_path, 900)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_part_of_a_split_is_not_left_to_be_taken_for_the_whole(tmp_path):
    def images():
        yield b"one", "png", 0
        yield b"two", "png", 1
        raise DataError("the third cannot be read", "look at it")

    with pytest.raises(DataError, match="the third"):
        write_shards(images(), tmp_path, "train", per_shard=1)
    assert not list(tmp_path.iterdir())


def test_splits_are_those_of_the_source_that_was_written(digits):
    before, after = load_data(DIGITS, 3), load_data(plan_of(digits, validation_fraction=0.1), 3)
    for split in ("train", "validation", "test"):
        assert np.array_equal(getattr(before, split).indices, getattr(after, split).indices)


def test_the_same_images_make_the_same_bytes_and_another_byte_another_digest(digits, tmp_path):
    reshard(DIGITS, tmp_path, 500)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in digits.iterdir()}
    before = load_data(plan_of(tmp_path), 0).digest
    assert before == load_data(plan_of(digits), 0).digest
    shard = tmp_path / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[tarfile.BLOCKSIZE + 40] ^= 1
    shard.write_bytes(content)
    assert load_data(plan_of(tmp_path), 0).digest != before


def test_images_are_read_when_asked_for_and_then_forgotten(digits):
    source = open_sources(plan_of(digits))[0]
    source.images(np.arange(2))
    tracemalloc.start()
    for start in range(0, 1400, 100):
        source.images(np.arange(start, start + 100))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 64 * 1024, "1,400 images of 64 bytes and their files would be more"


def test_files_are_copied_as_they_are(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "validation"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(4):
                picture = Image.fromarray(generator.integers(0, 256, (20, 16, 3), np.uint8))
                picture.save(tmp_path / split / kind / f"{number}.jpg", quality=90)
    folder_plan = DataPlan(name="folder", root=tmp_path, image_size=(8, 8))
    reshard(folder_plan, tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        assert tar.getnames()[:2] == ["000000000.jpeg", "000000000.cls"]
        assert tar.extractfile("000000000.jpeg").read() == (tmp_path / "train" / "cat" / "0.jpg").read_bytes()
    data = load_data(plan_of(tmp_path / "shards", channels=3), 0)
    assert data.class_names == ("cat", "dog")
    assert np.array_equal(data.train.source.images(np.arange(8)), load_data(folder_plan, 0).train.source.images(np.arange(8)))


def test_the_command_writes_shards(tmp_path):
    done = CliRunner().invoke(command, ["demo", str(tmp_path), "--per-shard", "1000", "--set", "data.image_size=8"])
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) == 3
    assert (tmp_path / "classes.txt").read_text().split() == [str(i) for i in range(10)]


# --- shards of other people's making


def png(shade: int = 0, size=(8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new("L", size, shade).save(stream, "png")
    return stream.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(count: int = 4) -> dict[str, bytes]:
    return {name: data for i in range(count) for name, data in ((f"{i}.png", png(i)), (f"{i}.cls", str(i % 2).encode()))}


@pytest.fixture
def folder(tmp_path) -> Path:
    for split in ("train", "validation"):
        write(tmp_path / f"{split}-0.tar", pairs())
    return tmp_path


def test_without_names_classes_are_numbers_alike_in_both_splits(folder):
    write(folder / "train-1.tar", {"x.png": png(), "x.cls": b"4\n"})
    assert load_data(plan_of(folder), 0).class_names == tuple("01234")
    with pytest.raises(DataError, match=r"train-1\.tar, member x\.png has label 4, but there are 2 classes"):
        load_data(plan_of(folder, class_names=("a", "b")), 0)


def test_shards_of_a_longer_name_are_another_split(folder):
    write(folder / "train-extra-0.tar", pairs(50))
    assert len(load_data(plan_of(folder), 0).train.source.labels) == 4


@pytest.mark.parametrize(("split", "words"), [("train", "share images"), ("/train", "names no shards"), ("tr[a]in", "holds no")])
def test_a_split_that_is_none_is_refused(folder, split, words):
    with pytest.raises(DataError, match=words):
        load_data(plan_of(folder, test_split=split), 0)


def test_other_members_do_not_matter_and_names_lead_nowhere(folder):
    """Metadata, folders and links are passed over; nothing is written, wherever a name points."""
    with tarfile.open(folder / "train-0.tar", "a") as tar:
        for name, kind in (("dir", tarfile.DIRTYPE), ("9.png", tarfile.SYMTYPE), ("8.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
    write(folder / "train-1.tar", {"../../evil.png": png(7), "../../evil.cls": b"1", "../../evil.json": b"{}", "/abs.txt": b""})
    source = open_sources(plan_of(folder))[0]
    assert len(source.labels) == 5
    assert source.images(np.asarray([4])).max() == 7
    assert source.name(4) == f"{folder / 'train-1.tar'}, member ../../evil.png"
    assert {path.name for path in folder.iterdir()} == {"train-0.tar", "train-1.tar", "validation-0.tar"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"x"}, "'a' has no label"),
        ({"a.cls": b"0"}, "'a' has no image"),
        ({"a.png": b"x", "a.jpg": b"x", "a.cls": b"0"}, r"a\.jpg has the key of another member"),
        ({"a.png": b"x", "a.cls": b"cat"}, r"a\.cls holds b'cat'"),
        ({"a.png": b"x", "a.cls": b"-1"}, r"a\.cls holds b'-1'"),
        ({"a.png": b"x", "a.cls": b"1" * 4000}, r"a\.cls holds"),
    ],
)
def test_a_shard_that_is_not_pairs_is_refused_with_its_member(folder, members, message):
    write(folder / "train-7.tar", members)
    with pytest.raises(DataError, match=rf"train-7\.tar.*{message}"):
        load_data(plan_of(folder), 0)


@pytest.mark.parametrize("keep", [0, 100, 512, 600, 1000, 1024, 3000, 512 * 16, 512 * 16 + 100])
def test_a_shard_that_was_cut_short_anywhere_is_refused(folder, keep):
    """Also between two members, where tarfile itself takes the end of the file for the end of the archive."""
    shard = folder / "train-0.tar"
    content = shard.read_bytes()
    assert content[512 * 16 :] == bytes(len(content) - 512 * 16), "eight members of two blocks, then the end mark"
    shard.write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"train-0\.tar"):
        load_data(plan_of(folder), 0)


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b"\x1f\x8b" + bytes(1000)])
def test_what_is_no_tar_file_is_refused(folder, content):
    (folder / "train-0.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"train-0\.tar is not a whole, uncompressed tar file"):
        load_data(plan_of(folder), 0)


def test_a_damaged_header_in_the_middle_is_not_the_end(folder):
    shard = folder / "train-0.tar"
    content = bytearray(shard.read_bytes())
    content[4 * 512 + 150] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"train-0\.tar is cut short or damaged"):
        load_data(plan_of(folder), 0)


def test_a_member_that_would_fill_the_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST", 50)
    with pytest.raises(DataError, match=r"train-0\.tar, member 0\.png has \d+ bytes"):
        load_data(plan_of(folder), 0)


def test_every_broken_image_is_named_with_its_shard(folder, monkeypatch):
    broken = {"text.png": b"no image", "text.cls": b"0", "half.png": png(size=(64, 64))[:60], "half.cls": b"1"}
    write(folder / "train-1.tar", {**broken, "bomb.png": png(size=(60, 60)), "bomb.cls": b"0", **pairs()})
    source = open_sources(plan_of(folder))[0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.raises(DataError, match="3 broken images") as caught:
        scan(Split(source, np.arange(len(source.labels))), Quiet(), "training")
    for name in ("text.png", "half.png", "bomb.png"):
        assert f"{folder / 'train-1.tar'}, member {name}" in caught.value.message


def test_a_folder_without_shards_says_how_to_make_some(folder):
    with pytest.raises(DataError, match=r"holds no test-000000\.tar") as caught:
        load_data(plan_of(folder, test_split="test"), 0)
    assert "fofa_deploy.data.write_shards" in caught.value.action


def test_names_beside_the_shards_are_part_of_the_data(tmp_path):
    reshard(DIGITS, tmp_path, 900)
    before = load_data(plan_of(tmp_path), 0).digest
    names = (tmp_path / shards.CLASSES).read_text().splitlines()
    (tmp_path / shards.CLASSES).write_text("\n".join(["zero", *names[1:]]) + "\n")
    assert load_data(plan_of(tmp_path), 0).digest != before


def test_a_line_without_a_name_is_no_class(tmp_path):
    reshard(DIGITS, tmp_path)
    listed = tmp_path / shards.CLASSES
    names = listed.read_text().splitlines()
    listed.write_text("\n".join(names) + "\n\n\n")
    assert open_sources(plan_of(tmp_path))[0].class_names == tuple(names)
    listed.write_text("\n".join([*names[:3], " ", *names[3:]]))
    with pytest.raises(DataError, match="line 4 names no class"):
        open_sources(plan_of(tmp_path))


def test_a_class_without_an_image_counts_where_the_plan_knows_of_it(digits):
    assert open_sources(plan_of(digits, classes=10))[0].class_names == tuple("0123456789")
    (digits / shards.CLASSES).rename(digits / "names")
    try:
        assert len(open_sources(plan_of(digits, classes=12))[0].class_names) == 12
        with pytest.raises(DataError, match=r"data\.classes is 9, and there are 10 classes"):
            open_sources(plan_of(digits, classes=9))
    finally:
        (digits / "names").rename(digits / shards.CLASSES)
