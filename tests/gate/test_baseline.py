"""Baselines from anywhere: what is wrong is named, with what to do, before anything of it is used."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest
from tiny import build, write_graph

from fofa_deploy import environment
from fofa_deploy.errors import IntegrityError, UserError
from fofa_deploy.gate.baseline import Kept, Said, baseline_file, write_baseline
from fofa_deploy.gate.sources import open_source
from fofa_deploy.gate.verdicts import Figures, GateReport, Verdict
from fofa_deploy.types import Artifact, digest_file


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("baseline")
    folder = build(write_graph(root / "graph"), "cpu-onnxruntime", root / "artifact")
    artifact = Artifact.load(folder)
    figures = Figures(
        recipe="fp32",
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        peak_rss_bytes=10**8,
        p50_ms=1.0,
        p90_ms=1.1,
        p99_ms=1.2,
        accuracy=0.9,
    )
    report = GateReport(
        verdict=Verdict.PASS,
        candidate="run",
        baseline=None,
        findings=(),
        figures={"cpu": figures},
        seconds=1.0,
        created_at=datetime.now(UTC).isoformat(),
        tool_version="0",
        environment=environment.describe(),
    )
    kept = {"cpu": Kept(folder, root / "graph" / "golden.npz", Said((0, 1, 2), "digest of the labels"))}
    return root, report, kept


@pytest.fixture
def base(written, tmp_path):
    _, report, kept = written
    return write_baseline(tmp_path / "base", report, kept)


def change(file, *keys, value):
    """Set a field of the JSON, or remove it."""
    data = table = json.loads(file.read_text())
    for key in keys[:-1]:
        table = table[key]
    table.pop(keys[-1]) if value is ... else table.update({keys[-1]: value})
    file.write_text(json.dumps(data))


def test_what_was_written_is_read_back(base, written):
    source = open_source(base)
    assert source.environment == written[1].environment
    assert source.recorded["cpu"].figures == written[1].figures["cpu"]
    assert source.subjects["cpu"].said == Said((0, 1, 2), "digest of the labels")
    assert source.subjects["cpu"].artifact.sha256 == written[1].figures["cpu"].sha256
    assert open_source(base.parent).subjects.keys() == source.subjects.keys()


def test_without_labels_it_keeps_what_the_answers_are_right_by(written, tmp_path):
    _, report, kept = written
    said = Said((0, 1, -1), "digest of the images", (0, 2, 1))
    file = write_baseline(tmp_path / "base", report, {"cpu": replace(kept["cpu"], said=said)})
    assert open_source(file).subjects["cpu"].said == said


def test_a_baseline_keeps_its_own_files_alone(base, written):
    mine = base.parent / "files" / "mine"
    mine.mkdir()
    before = files_of(base)
    folder = before / "artifact" / "model.onnx"
    seen = folder.stat().st_ino
    write_baseline(base.parent, *written[1:])
    assert folder.stat().st_ino == seen, "what is there already is not written again"
    _, report, kept = written
    write_baseline(base.parent, report, {"cpu": replace(kept["cpu"], said=None)})
    assert not before.exists(), "of the baseline before"
    assert open_source(base).subjects["cpu"].said is None
    assert sorted(base.parent.joinpath("files").iterdir()) == sorted([mine, files_of(base)])


def test_a_json_path_keeps_its_files_in_a_folder_of_its_name(written, tmp_path):
    file = write_baseline(tmp_path / "gate" / "main.json", *written[1:])
    assert file == baseline_file(tmp_path / "gate" / "main.json")
    assert sorted(path.name for path in file.parent.iterdir()) == ["main", "main.json"]
    assert open_source(file).subjects.keys() == {"cpu"}


def test_writing_again_replaces_it_and_is_the_same(base, written):
    before = base.read_text()
    assert write_baseline(base.parent, *written[1:]).read_text() == before


FIGURES = ("targets", "cpu", "figures")


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (("schema_version",), 2, "schema_version 2"),
        (("schema_version",), ..., "schema_version None"),
        ((*FIGURES, "p50_ms"), ..., r"figures\.p50_ms: Field required"),
        ((*FIGURES, "p50_ms"), float("nan"), "NaN is not a JSON number"),
        ((*FIGURES, "p50_ms"), float("inf"), "Infinity is not a JSON number"),
        ((*FIGURES, "p50_ms"), -1.0, "greater than or equal to 0"),
        ((*FIGURES, "p50_ms"), "fast", "valid number"),
        ((*FIGURES, "accuracy"), ..., "Field required"),
        ((*FIGURES, "size_bytes"), 10**30, r"claims 1e\+30 bytes"),
        ((*FIGURES, "faster"), True, "Extra inputs"),
        (("targets",), {}, "at least 1 item"),
        (("environment", "fingerprint"), ..., "Field required"),
        (("targets", "cpu", "folder"), "../../elsewhere", "leaves"),
        (("targets", "cpu", "folder"), "/etc", "leaves"),
        (("targets", "cpu", "folder"), ".", "leaves"),
    ],
)
def test_a_hostile_field_is_named_with_what_to_do(base, keys, value, told):
    change(base, *keys, value=value)
    with pytest.raises(UserError, match=told) as caught:
        open_source(base)
    assert "again" in caught.value.action


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "not valid JSON"),
        (b"[]", "schema_version None"),
        (b"{" * 100_000, "not valid JSON"),
        (b'{"schema_version": 1}', "Field required"),
        (b" " * ((1 << 20) + 1), "larger than 1 MiB"),
        (b'{"schema_version": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_baseline(tmp_path, content, told):
    file = tmp_path / "baseline.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told):
        open_source(file)


def files_of(base):
    return base.parent / json.loads(base.read_text())["targets"]["cpu"]["folder"]


@pytest.mark.parametrize("name", ["artifact/model.onnx", "artifact/artifact.json", "golden.npz", "answers.npy"])
@pytest.mark.parametrize("how", ["altered", "missing"])
def test_every_file_is_the_recorded_one(base, name, how):
    path = files_of(base) / name
    if how == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"{path.name} is missing or altered") as caught:
        open_source(base)
    assert "restore the artifact" in caught.value.action


@pytest.mark.parametrize("name", ["artifact/artifact.json", "golden.npz", "answers.npy"])
def test_a_file_that_is_not_recorded_is_not_used(base, name):
    change(base, "targets", "cpu", "files", name, value=...)
    with pytest.raises(IntegrityError, match=f"records no {name}"):
        open_source(base)


def test_a_recorded_path_that_leaves_the_folder_is_not_followed(base):
    secret = base.parent / "secret"
    secret.write_text("x")
    change(base, "targets", "cpu", "files", "../../secret", value="0" * 64)
    with pytest.raises(IntegrityError, match="secret is missing or altered"):
        open_source(base)


def test_symbolic_links_are_refused(base):
    folder = files_of(base)
    (folder / "more").symlink_to("/etc")
    with pytest.raises(UserError, match="symbolic links"):
        open_source(base)


def huge(path):
    """A header that claims far more than there is."""
    path.write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1, 10000000000000), }".ljust(117) + b"\n"
    )


@pytest.mark.parametrize(
    "write",
    [
        lambda path: np.save(path, np.array([object()]), allow_pickle=True),
        lambda path: np.save(path, np.full((1, 3), np.inf)),
        lambda path: np.save(path, np.zeros((1, 3), [("class", np.int32)])),
        lambda path: np.save(path, np.zeros((3, 3), np.int32)),
        lambda path: np.save(path, np.int32(3)),
        lambda path: path.write_bytes(b""),
        huge,
    ],
    ids=["pickle", "floats", "records", "three rows", "one number", "nothing", "huge"],
)
def test_answers_that_are_none_are_refused(base, write):
    path = files_of(base) / "answers.npy"
    write(path)
    change(base, "targets", "cpu", "files", "answers.npy", value=digest_file(path))
    with pytest.raises(IntegrityError, match="the files of cpu cannot be read"):
        open_source(base)


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "files/" + "a" * 300])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_names_that_are_none_are_refused(base, name, place):
    keys = ("folder",) if place == "folder" else ("files", name)
    change(base, "targets", "cpu", *keys, value=name if place == "folder" else "0" * 64)
    with pytest.raises(UserError):
        open_source(base)


@pytest.mark.parametrize("path", ["../model.onnx", "/etc/passwd"])
def test_an_artifact_whose_record_leaves_its_folder_is_refused(written, tmp_path, path):
    folder = shutil.copytree(written[2]["cpu"].artifact, tmp_path / "artifact")
    shutil.copyfile(folder / "model.onnx", tmp_path / "model.onnx")
    record = json.loads((folder / "artifact.json").read_text())
    record["files"][0]["path"] = path
    (folder / "artifact.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match="leaves its folder"):
        open_source(folder)


def test_an_artifact_of_links_into_a_store_of_large_files_is_one_like_any_other(written, tmp_path):
    folder = shutil.copytree(written[2]["cpu"].artifact, tmp_path / "artifact")
    (folder / "model.onnx").rename(tmp_path / "blob")
    (folder / "model.onnx").symlink_to(tmp_path / "blob")
    assert open_source(folder).subjects
    (tmp_path / "blob").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"model\.onnx"):
        open_source(folder)


def test_an_artifact_without_a_readable_record_is_told(tmp_path):
    (tmp_path / "artifact.json").write_text("{}")
    with pytest.raises(IntegrityError, match="no record of an artifact"):
        open_source(tmp_path)
