"""Data: splits that stay apart, randomness that nothing but its seed can change, broken files that are all named."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from fofa_deploy.config import DataPlan
from fofa_deploy.data import augmented, epoch_batches, eval_batches, load_data, preprocessing, scan, sources, write_split
from fofa_deploy.data.batches import uniform
from fofa_deploy.data.decode import to_pixels
from fofa_deploy.data.sources import FileSource, check_labels
from fofa_deploy.data.splits import ORIGIN, Split, stratified
from fofa_deploy.errors import DataError
from fofa_deploy.inference import Normalize
from fofa_deploy.progress import Quiet

FASHION = Path("/usr/share/datasets/fashion-mnist")


class Source:
    """Labels, and images that are constants."""

    digest = "d"

    def __init__(self, labels, classes: int) -> None:
        self.labels = np.asarray(labels, np.int64)
        self.class_names = tuple(str(i) for i in range(classes))

    def images(self, indices, boxes=None):
        return np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 1, 8, 8))

    def name(self, index: int) -> str:
        return f"image {index}"


@pytest.fixture(scope="module")
def digits():
    return load_data(digits_plan(), seed=0)


def digits_plan(**options) -> DataPlan:
    return DataPlan(name="digits", image_size=(8, 8), channels=1, **options)


# --- splits


def test_splits_do_not_overlap(digits):
    train, validation = set(digits.train.indices), set(digits.validation.indices)
    assert not train & validation
    assert len(train) + len(validation) == len(digits.train.source.labels)
    assert digits.train.source is not digits.test.source
    assert sorted(digits.test.indices) == list(range(len(digits.test.source.labels)))


def test_every_prefix_holds_the_classes_in_proportion(digits):
    for split in (digits.train, digits.validation, digits.test):
        share = np.bincount(split.labels, minlength=10) / len(split)
        for count in (20, 100):
            assert np.abs(np.bincount(split.head(count).labels, minlength=10) - count * share).max() <= 1.01


def test_the_seed_alone_decides_the_split():
    labels = np.arange(200) % 4
    first, again, other = (stratified(labels, 0.25, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])
    assert len(first[1]) == 50


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.999])
@pytest.mark.parametrize("count", [2, 3, 50])
def test_neither_side_of_a_split_is_empty(fraction, count):
    rest, held_out = stratified(np.zeros(count, np.int64), fraction, 0)
    assert len(rest) >= 1
    assert len(held_out) >= 1
    assert len(rest) + len(held_out) == count


def test_a_limit_is_class_balanced_and_leaves_validation_alone(digits):
    limited = load_data(digits_plan(limit=50), seed=0)
    assert np.bincount(limited.train.labels, minlength=10).tolist() == pytest.approx([5] * 10, abs=1)
    assert np.array_equal(limited.validation.indices, digits.validation.indices)


def test_the_digest_tells_data_apart(digits):
    assert load_data(digits_plan(), seed=0).digest == digits.digest
    assert load_data(digits_plan(), seed=1).digest != digits.digest
    assert load_data(digits_plan(limit=50), seed=0).digest != digits.digest


# --- randomness


def test_uniform_does_not_depend_on_order_or_batch_size():
    indices = np.arange(1000)
    whole = uniform(3, 5, indices, 4)
    order = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(uniform(3, 5, order, 4), whole[order])
    assert np.array_equal(np.concatenate([uniform(3, 5, part, 4) for part in np.split(indices, 10)]), whole)
    assert np.array_equal(uniform(3, 5, indices, 2), whole[:, :2])


def test_uniform_depends_on_seed_epoch_and_index():
    one = uniform(0, 0, np.arange(100), 3)
    for other in (uniform(1, 0, np.arange(100), 3), uniform(0, 1, np.arange(100), 3), uniform(0, 0, np.arange(100, 200), 3)):
        assert not np.intersect1d(one, other).size


def test_uniform_is_uniform():
    values = uniform(0, 0, np.arange(20_000), 3)
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(np.histogram(values, 10, (0, 1))[0] / 6000 - 1).max() < 0.06  # four sigma is 0.05
    assert np.abs(np.corrcoef(values.T) - np.eye(3)).max() < 0.03


def test_augmentation_does_not_depend_on_the_order_of_visit(digits):
    plan = digits_plan(shift=2, flip=True, scale=0.5)
    order = np.random.default_rng(0).permutation(64)
    whole = augmented(digits.train, np.arange(64), plan, seed=1, epoch=2)
    assert np.array_equal(augmented(digits.train, order, plan, 1, 2), whole[order])
    single = [augmented(digits.train, np.asarray([i]), plan, 1, 2)[0] for i in range(64)]
    assert np.array_equal(np.stack(single), whole)
    assert not np.array_equal(augmented(digits.train, np.arange(64), plan, 1, 3), whole)


def test_augmentation_belongs_to_the_image_and_not_to_its_place(digits):
    plan = digits_plan(shift=2, flip=True, scale=0.5)
    moved = Split(digits.train.source, digits.train.indices[32:])
    whole = augmented(digits.train, np.arange(64), plan, 1, 2)
    assert np.array_equal(augmented(moved, np.arange(32), plan, 1, 2), whole[32:])


def test_each_augmentation_does_what_it_says(digits):
    first, plain = np.arange(64), digits.train.source.images(digits.train.indices[:64])
    assert np.array_equal(augmented(digits.train, first, digits_plan(), 0, 0), plain)
    flipped = augmented(digits.train, first, digits_plan(flip=True), 0, 0)
    mirrored = [np.array_equal(new, old[..., ::-1]) for new, old in zip(flipped, plain, strict=True)]
    assert all(m or np.array_equal(new, old) for m, new, old in zip(mirrored, flipped, plain, strict=True))
    assert 16 < sum(mirrored) < 48
    shifted = augmented(digits.train, first, digits_plan(shift=1), 0, 0)
    padded = np.pad(plain, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    for new, old in zip(shifted, padded, strict=True):
        assert any(np.array_equal(new, old[:, y : y + 8, x : x + 8]) for y in range(3) for x in range(3))


def test_an_epoch_visits_every_image_once_in_a_seeded_order():
    batches = epoch_batches(103, 10, seed=0, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(103))
    assert [len(batch) for batch in batches] == [10] * 10 + [3]
    assert np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(103, 50, 0, 0)))
    assert not np.array_equal(np.concatenate(batches), np.concatenate(epoch_batches(103, 10, 0, 1)))


def test_a_last_batch_of_one_joins_the_one_before():
    assert [len(batch) for batch in epoch_batches(21, 10, 0, 0)] == [10, 11]
    assert [len(batch) for batch in epoch_batches(1, 10, 0, 0)] == [1]


def test_evaluation_keeps_the_order_and_every_image(digits):
    pairs = list(eval_batches(digits.validation, 50))
    assert np.array_equal(np.concatenate([labels for _, labels in pairs]), digits.validation.labels)
    assert [len(images) for images, _ in pairs[:-1]] == [50] * (len(pairs) - 1)
    assert 0 < len(pairs[-1][0]) <= 50


# --- labels


@pytest.mark.parametrize("bad", [-100, -1, 3, 255])
def test_a_label_out_of_range_is_named_with_its_place(bad):
    with pytest.raises(DataError, match=f"image 2 has label {bad}, but there are 3 classes") as caught:
        check_labels(Source([0, 1, bad, 2, bad], 3))
    assert "(2 such labels)" in caught.value.message


def test_a_split_without_images_is_refused():
    with pytest.raises(DataError, match="no images"):
        check_labels(Source([], 3))


# --- IDX files


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 60), ("t10k", 20)):
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (count, 8, 8))))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(count) % 5)))
    return tmp_path


def mnist_plan(folder: Path, **options) -> DataPlan:
    return DataPlan(name="idx", root=folder, image_size=(8, 8), channels=1, **options)


def test_idx_files_are_read_plain_and_gzipped(mnist):
    data = load_data(mnist_plan(mnist), 0)
    assert (len(data.train) + len(data.validation), len(data.test), data.class_names) == (60, 20, tuple("01234"))
    raw = np.frombuffer((mnist / "train-images-idx3-ubyte").read_bytes()[16:], np.uint8).reshape(60, 1, 8, 8)
    assert np.array_equal(data.train.source.images(np.arange(60)), raw)
    assert np.array_equal(data.train.source.labels, np.arange(60) % 5)


def test_classes_of_idx_files_are_those_of_both_splits(mnist):
    (mnist / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(20) % 4)))
    assert load_data(mnist_plan(mnist), 0).class_names == tuple("01234")


def cut(content: bytes) -> bytes:
    return content[:-3]


def flip_middle(content: bytes) -> bytes:
    return content[:20] + bytes(byte ^ 0xFF for byte in content[20:])


@pytest.mark.parametrize("damage", [cut, flip_middle, lambda _: b"", lambda _: b"\0\0\x08\x03", lambda c: b"\x1f\x8b" + c])
@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte.gz"])
def test_a_damaged_idx_file_is_named(mnist, name, damage):
    before = (mnist / name).read_bytes()
    (mnist / name).write_bytes(damage(before))
    if damage is flip_middle and not name.endswith(".gz"):
        load_data(mnist_plan(mnist), 0)  # other pixels are still pixels
        return
    with pytest.raises(DataError, match=name):
        load_data(mnist_plan(mnist), 0)


def test_missing_empty_and_unequal_idx_files_are_refused(mnist):
    images, labels = mnist / "t10k-images-idx3-ubyte", mnist / "t10k-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(19))))
    with pytest.raises(DataError, match="20 images but 19 labels"):
        load_data(mnist_plan(mnist), 0)
    labels.write_bytes(gzip.compress(idx(np.zeros(0))))
    images.write_bytes(idx(np.zeros((0, 8, 8))))
    with pytest.raises(DataError, match="no images in t10k"):
        load_data(mnist_plan(mnist), 0)
    images.unlink()
    with pytest.raises(DataError, match="does not exist"):
        load_data(mnist_plan(mnist), 0)


def test_more_labels_than_class_names_are_refused(mnist):
    with pytest.raises(DataError, match="has label 3, but there are 3 classes"):
        load_data(mnist_plan(mnist, class_names=("a", "b", "c")), 0)


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"Debian's dataset-fashion-mnist is not installed in {FASHION}")
def test_fashion_mnist_is_read_whole():
    data = load_data(DataPlan(name="idx", root=FASHION, image_size=(28, 28), channels=1), 0)
    assert (len(data.train), len(data.validation), len(data.test)) == (54_000, 6_000, 10_000)
    assert np.bincount(data.test.labels).tolist() == [1000] * 10
    assert np.bincount(data.validation.labels).tolist() == [600] * 10


# --- image folders


def picture(path: Path, mode: str = "RGB", size=(12, 10), shade: int = 100, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, shade if len(mode) == 1 else (shade,) * len(mode)).save(path, **options)
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes, eight images each, in both splits."""
    for split, offset in (("train", 0), ("validation", 8)):
        for number in range(8):
            for kind, shade in (("cat", 50), ("dog", 200)):
                picture(tmp_path / split / kind / f"{number}.png", shade=shade + offset + number)
    return tmp_path


def folder_plan(root: Path, **options) -> DataPlan:
    return DataPlan(root=root, image_size=(8, 8), **{"name": "folder", "validation_fraction": 0.25, **options})


def test_an_image_folder_is_read_through_timm(folder):
    data = load_data(folder_plan(folder), 0)
    assert data.class_names == ("cat", "dog")
    images = data.train.source.images(data.train.indices)
    assert images.shape == (12, 3, 8, 8)
    assert np.array_equal(images.mean((1, 2, 3)) > 128, data.train.labels == 1)


def broken(split: Split) -> str:
    with pytest.raises(DataError) as caught:
        scan(split, Quiet(), "training")
    return caught.value.message


def test_every_broken_image_is_named_and_none_is_replaced_by_another(folder):
    cats, dogs = folder / "train" / "cat", folder / "train" / "dog"
    whole = picture(cats / "truncated.jpg", size=(64, 64)).read_bytes()
    (cats / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (cats / "text.jpg").write_text("this is no image")
    (dogs / "empty.png").write_bytes(b"")
    data = load_data(folder_plan(folder, validation_fraction=0.01), 0)
    everything = Split(data.train.source, np.arange(len(data.train.source.labels)))
    message = broken(everything)
    assert message.startswith("3 broken images:")
    for name in ("cat/truncated.jpg", "cat/text.jpg", "dog/empty.png"):
        assert str(folder / "train" / name) in message


def test_broken_images_are_found_while_writing_a_split_too(folder, tmp_path):
    (folder / "train" / "cat" / "0.png").write_bytes(b"\x89PNG")
    (folder / "train" / "dog" / "0.png").write_bytes(b"\x89PNG")
    source = load_data(folder_plan(folder), 0).train.source
    with pytest.raises(DataError, match="2 broken images"):
        write_split(Split(source, np.arange(16)), tmp_path / "out", Quiet(), "train")


def test_a_decompression_bomb_is_named_before_it_goes_off(folder, monkeypatch):
    picture(folder / "train" / "cat" / "bomb.png", size=(60, 60))
    picture(folder / "train" / "dog" / "nuke.png", size=(90, 90))
    source = load_data(folder_plan(folder), 0).train.source
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # a warning above it, an error above twice it
    message = broken(Split(source, np.arange(len(source.labels))))
    assert "2 broken images" in message
    assert "bomb.png" in message
    assert "nuke.png" in message


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "CMYK"])
def test_every_kind_of_image_becomes_the_plans_channels(tmp_path, mode, channels):
    for split in ("train", "validation"):
        for number in range(2):
            suffix = "jpg" if mode == "CMYK" else "png"
            picture(tmp_path / split / "only" / f"{number}.{suffix}", mode=mode, size=(30, 10), shade=255 if mode == "1" else 90)
    data = load_data(folder_plan(tmp_path, channels=channels, validation_fraction=0.5), 0)
    assert data.train.source.images(np.asarray([0])).shape == (1, channels, 8, 8)


def test_sixteen_bits_of_gray_are_scaled_and_not_clipped(folder):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "train" / "cat" / "0.png")
    source = load_data(folder_plan(folder, channels=1), 0).train.source
    index = next(i for i in range(16) if source.name(i).split()[0].endswith("cat/0.png"))
    assert np.abs(source.images(np.asarray([index]))[0, 0].astype(int) - ramp // 257).max() <= 1


def test_a_wide_image_is_cropped_in_its_middle_and_not_squeezed(folder):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 255
    Image.fromarray(wide).save(folder / "train" / "cat" / "0.png")
    source = load_data(folder_plan(folder), 0).train.source
    index = next(i for i in range(16) if source.name(i).split()[0].endswith("cat/0.png"))
    assert source.images(np.asarray([index])).min() == 255


def test_splits_with_different_classes_are_refused(folder):
    picture(folder / "validation" / "eel" / "0.png")
    with pytest.raises(DataError, match="different classes"):
        load_data(folder_plan(folder), 0)


def test_a_root_that_is_not_there_is_named(tmp_path):
    for name in ("folder", "idx", "images"):
        with pytest.raises(DataError, match="nowhere"):
            load_data(DataPlan(name=name, root=tmp_path / "nowhere", classes=2), 0)


def test_unlabelled_images_are_split_and_every_one_is_used(tmp_path):
    for number in range(20):
        picture(tmp_path / "ä b" / f"{number}.png", shade=number)
    data = load_data(DataPlan(name="images", root=tmp_path, classes=7, image_size=(8, 8), validation_fraction=0.25), 0)
    assert (len(data.train), len(data.validation), len(data.test), len(data.class_names)) == (12, 4, 4, 7)
    shades = [part.source.images(part.indices)[:, 0, 0, 0] for part in (data.train, data.validation, data.test)]
    assert sorted(np.concatenate(shades)) == list(range(20))


def test_too_few_unlabelled_images_are_refused(tmp_path):
    for number in range(3):
        picture(tmp_path / f"{number}.png")
    with pytest.raises(DataError, match="holds 3 images"):
        load_data(DataPlan(name="images", root=tmp_path, classes=2), 0)


# --- what children read


def test_a_written_split_is_the_split(digits, tmp_path):
    write_split(digits.validation, tmp_path / "validation", Quiet(), "validation")
    images = np.load(tmp_path / "validation" / "images.npy", allow_pickle=False)
    assert np.array_equal(images, digits.validation.source.images(digits.validation.indices))
    assert np.array_equal(np.load(tmp_path / "validation" / "labels.npy"), digits.validation.labels)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5,), (0.5,)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.1307,), (0.3081,))]
)
def test_numpy_and_torch_normalize_alike_bit_for_bit(mean, std):
    known = preprocessing(DataPlan(name="digits", mean=mean, std=std, image_size=(16, 16)))
    images = np.arange(2 * 3 * 256, dtype=np.int64).reshape(2, 3, 16, 16).astype(np.uint8)
    ours = known.apply(images)
    assert ours.dtype == np.float32
    assert np.array_equal(ours.view(np.int32), Normalize(known)(torch.from_numpy(images)).numpy().view(np.int32))
    for channel in range(3):
        textbook = (images[:, channel] / 255 - known.mean[channel]) / known.std[channel]
        assert np.allclose(ours[:, channel], textbook, atol=1e-6)


def test_a_split_tells_which_images_it_has_whatever_their_size_and_labels(digits, tmp_path):
    splits = {
        "same": digits.validation,
        "larger": digits.at((12, 12)).validation,
        "fewer": digits.validation.head(10),
        "others": Split(digits.validation.source, digits.validation.indices[::-1]),
    }
    told = {}
    for name, split in splits.items():
        write_split(split, tmp_path / name, Quiet(), name)
        told[name] = (tmp_path / name / ORIGIN).read_text()
    assert told["same"] == told["larger"]
    assert len(set(told.values())) == 3


def test_a_random_crop_keeps_proportions_and_reaches_every_place():
    """Training must see objects as they are deployed: a photograph of 3:2 is not squeezed into a square."""
    columns, rows = np.meshgrid(np.arange(120), np.arange(80))
    photo = Image.fromarray(columns.astype(np.uint8)), Image.fromarray(rows.astype(np.uint8))
    plan = DataPlan(name="digits", image_size=(40, 40), channels=1)

    def cut(*box):
        return tuple((int(seen[0].min()), int(seen[0].max())) for seen in (to_pixels(image, plan, box) for image in photo))

    # Half of the largest square, 80 by 80: 40 pixels, which are not resized.
    assert cut(0.0, 0.0, 0.5, 0.5) == ((0, 39), (0, 39))
    assert cut(0.5, 0.5, 1.0, 1.0) == ((80, 119), (40, 79))
    assert cut(0.25, 0.25, 0.75, 0.75) == ((40, 79), (20, 59))
    tall = to_pixels(Image.new("L", (30, 90)), plan.model_copy(update={"image_size": (20, 40)}), (0.1, 0.2, 0.6, 0.9))
    assert tall.shape == (1, 20, 40)


def test_the_plans_names_do_not_hide_that_a_split_lacks_a_class(folder):
    picture(folder / "train" / "eel" / "0.png")
    for names in ((), ("Cat", "Dog", "Eel")):
        with pytest.raises(DataError, match="different classes: validation has no images of eel"):
            load_data(folder_plan(folder, class_names=names), 0)


def test_every_class_has_one_of_the_plans_names(folder):
    assert load_data(folder_plan(folder, class_names=("Cat", "Dog")), 0).class_names == ("Cat", "Dog")
    with pytest.raises(DataError, match="class_names has 3 names, and there are 2 classes"):
        load_data(folder_plan(folder, class_names=("Cat", "Dog", "Eel")), 0)


def test_class_folders_that_have_no_order_are_refused(folder):
    """timm sorts a set of them: which label is whose would change from process to process."""
    for split in ("train", "validation"):
        picture(folder / split / "Cat" / "0.png")
    with pytest.raises(DataError, match="the class folders Cat and cat have no order"):
        load_data(folder_plan(folder), 0)


def test_several_names_of_one_class_are_no_folders(folder):
    """ImageNet's data set in torchvision maps every synonym."""
    from timm.data import create_dataset

    plan = folder_plan(folder, class_names=("Cat", "Dog"))
    dataset = create_dataset("", root=str(folder), split="train")
    assert FileSource(dataset, plan, "train").folders == ("cat", "dog")
    dataset.reader.class_to_idx = {"cat": 0, "kitty": 0, "dog": 1, "hound": 1}
    assert FileSource(dataset, plan, "train").folders == ()


def test_another_size_of_a_data_set_is_not_read_for_its_digest(folder, monkeypatch):
    """Of several processes that train only the first one needs it, and the others would wait."""
    data, read = load_data(folder_plan(folder), 0), []
    digest_file = sources.digest_file
    monkeypatch.setattr(sources, "digest_file", lambda path: (read.append(path), digest_file(path))[1])
    twin = data.train.source.at(data.plan.model_copy(update={"image_size": (4, 4)}))
    assert not read
    assert twin.digest == data.train.source.digest
    assert len(read) == 16


@pytest.fixture
def ran(tmp_path, monkeypatch) -> Path:
    """A file that is there once Ghostscript, to which Pillow hands PostScript, has been started."""
    script, ran = tmp_path / "bin" / "gs", tmp_path / "ran"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho ran > {ran}\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin:/bin")
    return ran


def test_no_other_program_is_started_for_an_image(folder, ran):
    """Pillow hands PostScript to Ghostscript, whatever the file's name."""
    bad = folder / "train" / "cat" / "0.png"
    bad.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    data = load_data(folder_plan(folder), 0)
    with pytest.raises(DataError, match=r"cat/0\.png .* cannot be decoded"):
        data.train.source.images(np.arange(16))
    assert not ran.exists()


def torch_folder(root: Path, **options) -> DataPlan:
    """torchvision's own reader, which has decoded an image before anybody asks."""
    return folder_plan(root, name="torch/image_folder", **options)


def test_torchvisions_own_loader_is_not_asked_for_files(folder, ran):
    """It would start Ghostscript for PostScript, and clip 16 bits to white."""
    gray = folder / "train" / "dog" / "0.png"
    Image.fromarray(np.full((10, 12), 0x8000, np.uint16)).save(gray)
    data = load_data(torch_folder(folder), 0)
    source = data.train.source
    place = source.files.index(gray)
    assert set(np.unique(source.images(np.array([place])))) == {0x8000 // 257}
    gray.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(DataError, match=r"dog/0\.png .* cannot be decoded"):
        source.images(np.array([place]))
    assert not ran.exists()


# --- test images that are training images


def test_a_link_to_the_training_images_is_no_test_split(folder):
    shutil.rmtree(folder / "validation")
    (folder / "validation").symlink_to(folder / "train")
    with pytest.raises(DataError, match="share images below"):
        load_data(folder_plan(folder), 0)


def test_a_copy_of_the_training_images_is_no_test_split(folder):
    shutil.rmtree(folder / "validation")
    shutil.copytree(folder / "train", folder / "validation")
    with pytest.raises(DataError, match="all 16 test images are training images, too"):
        _ = load_data(folder_plan(folder), 0).digest
    picture(folder / "validation" / "cat" / "other.png", shade=1)
    assert load_data(folder_plan(folder), 0).digest, "some copies are usual"


@pytest.mark.parametrize("splits", [("Train", "test"), ("train", "train"), ("test", "validation")])
def test_splits_of_torchvision_that_are_the_same_images_are_refused(tmp_path, splits):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for number, prefix in enumerate(("train", "t10k")):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(np.full((20, 28, 28), number, np.uint8)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(20, dtype=np.uint8) % 10))
    plan = DataPlan(name="torch/mnist", root=tmp_path, image_size=(8, 8), channels=1)
    assert load_data(plan, 0).class_names
    train, test = splits
    with pytest.raises(DataError, match="are the same images"):
        load_data(plan.model_copy(update={"train_split": train, "test_split": test}), 0)


# --- names


@pytest.mark.parametrize(
    ("name", "words"),
    [("foldr", "no data set 'foldr'"), *((name, "data.root '' is not") for name in ("folder", "torch/cifar10", "shards"))],
)
def test_a_name_that_is_none_or_lacks_its_root_is_told(name, words):
    with pytest.raises(DataError, match=words) as caught:
        load_data(DataPlan(name=name), 0)
    assert name != "foldr" or "did you mean 'folder'?" in caught.value.action


def test_one_training_image_is_too_few(tmp_path):
    for split in ("train", "validation"):
        picture(tmp_path / split / "cat" / "0.png", shade=len(split))
    with pytest.raises(DataError, match="leaves none to train on"):
        load_data(folder_plan(tmp_path), 0)


def test_what_leads_to_no_image_is_named(tmp_path):
    for number in range(20):
        picture(tmp_path / "a" / f"{number}.png")
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"gone\.png is no file"):
        load_data(DataPlan(name="images", root=tmp_path, classes=2, image_size=(8, 8)), 0)


def test_a_broken_image_without_a_label_is_named_with_its_folder(tmp_path):
    for number in range(40):
        picture(tmp_path / "a" / f"{number:02}.png")
    (tmp_path / "a" / "05.png").write_bytes(b"no image")
    assert "a/05.png (8 bytes)" in broken(load_data(DataPlan(name="images", root=tmp_path, classes=2, image_size=(8, 8)), 0).train)


def test_a_class_folder_without_an_image_is_refused(folder):
    """timm numbers the folders that it finds images in: the labels of those behind would shift."""
    for split in ("train", "validation"):
        (folder / split / "ant").mkdir()
        (folder / split / ".hidden").mkdir()
        (folder / split / "cat" / "@thumbnails").mkdir()
    with pytest.raises(DataError, match=r"class folder .*train/ant holds nothing"):
        load_data(folder_plan(folder), 0)
    for split in ("train", "validation"):
        (folder / split / "ant" / "0.avif").write_bytes(b"?")
    with pytest.raises(DataError, match=r"holds 1 files, and no image among them .*jpg"):
        load_data(folder_plan(folder), 0)


@pytest.mark.parametrize("below", ["@thumbnails", ".thumbnails", "a/b"])
def test_a_folder_of_images_below_a_class_is_refused(folder, below):
    """timm makes a class of it, and every number behind it is another."""
    for split in ("train", "validation"):
        picture(folder / split / "cat" / below / "0.png")
    with pytest.raises(DataError, match=r"holds images, below the class folder .*/train/cat, and would be a class of its own"):
        load_data(folder_plan(folder), 0)


@pytest.mark.parametrize("suffix", ["webp", "bmp", "gif", "tiff", "PPM"])
def test_every_kind_of_file_that_is_decoded_makes_a_class(folder, suffix):
    for split in ("train", "validation"):
        picture(folder / split / "ant" / f"0.{suffix}", shade=90)
    data = load_data(folder_plan(folder), 0)
    assert data.class_names == ("ant", "cat", "dog")
    index = next(i for i in range(len(data.test.source.labels)) if data.test.source.labels[i] == 0)
    assert abs(int(data.test.source.images(np.asarray([index])).mean()) - 90) < 3
    assert "webp" not in str(get_img_extensions()), "timm's own list is as it was"


def test_an_image_beside_the_class_folders_is_refused(folder):
    for split in ("train", "validation"):
        picture(folder / split / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies in no class folder"):
        load_data(folder_plan(folder), 0)


def test_a_wrong_number_of_classes_is_refused(folder):
    assert len(load_data(folder_plan(folder, classes=2), 0).class_names) == 2
    with pytest.raises(DataError, match=r"data\.classes is 3, and there are 2 classes"):
        load_data(folder_plan(folder, classes=3), 0)


@pytest.mark.parametrize("kind", ["float", "int"])
def test_numbers_of_which_nothing_tells_what_is_white_are_refused(folder, kind):
    numbers = np.full((8, 8), 0.5, np.float32) if kind == "float" else np.full((8, 8), 1 << 20, np.int32)
    Image.fromarray(numbers).save(folder / "train" / "cat" / "odd.tiff")
    train = load_data(folder_plan(folder), 0).train.source
    with pytest.raises(DataError, match=r"odd\.tiff .* save it as 8 or 16 bits"):
        scan(Split(train, np.arange(len(train.labels))), Quiet(), "training")
