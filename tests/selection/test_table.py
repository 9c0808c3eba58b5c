"""The latency aid: found again in exactly the same setting, and nowhere else."""

import pytest

from fofa_deploy.select.table import FOLDER, Figures, LatencyTable, Setting, default_folder

SETTING = Setting(fingerprint="one", graph="abc", recipe="fp32", profile="p")
FIGURES = Figures(p50_ms=1.0, p90_ms=1.5, throughput_sps=900.0, size_bytes=10, peak_rss_bytes=20)


@pytest.fixture
def table(tmp_path):
    table = LatencyTable(tmp_path)
    table.keep(SETTING, FIGURES)
    return table


def test_what_was_kept_is_found_with_its_date(table):
    assert LatencyTable(table.folder).find(SETTING) == FIGURES
    assert FIGURES.measured_at.startswith("20")


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"graph": "d"}, {"recipe": "int8"}, {"profile": "q"}, {"batch": 2}])
def test_another_setting_has_not_been_measured(table, change):
    assert table.find(SETTING.model_copy(update=change)) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"schema_version": 1}'])
def test_a_damaged_file_is_as_none_and_is_replaced(table, content):
    (file,) = table.folder.rglob("*.json")
    file.write_bytes(content)
    assert table.find(SETTING) is None
    table.keep(SETTING, FIGURES)
    assert table.find(SETTING) == FIGURES


def test_a_later_form_of_the_file_is_not_read(table):
    (file,) = table.folder.rglob("*.json")
    file.write_text(file.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    assert table.find(SETTING) is None


def test_a_file_carried_to_another_settings_place_is_not_believed(table):
    (file,) = table.folder.rglob("*.json")
    other = SETTING.model_copy(update={"recipe": "int8"})
    table.keep(other, FIGURES)
    taken = next(path for path in table.folder.rglob("*.json") if path != file)
    taken.write_bytes(file.read_bytes())
    assert table.find(other) is None


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "fofa-deploy" / "latencies"
    monkeypatch.setenv(FOLDER, str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
