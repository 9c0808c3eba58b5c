"""Where the time goes and how devices compare, as the reports show it: every figure, no name as markup, nothing made up."""

from test_report import HOSTILE, Page, chosen_row, environment, row, sample

from fofa_deploy.report import limits, render, summary
from fofa_deploy.results import LayerCost, Peaks

PEAKS = Peaks(gops={"int8": 400.0, "fp32": 100.0}, gbps=12.5, threads=2, measured_at="2026-11-22T21:04:11Z", fingerprint="f" * 64)


def layers(names=("conv1", "conv2", "reorder")) -> tuple[LayerCost, ...]:
    known = {"macs": 4_000_000, "bytes": 90_000, "of_limit": 0.25}
    return tuple(
        LayerCost(name=name, operator="Conv", precision="int8", ms=0.08 / (n + 1), share=0.5 / (n + 1), **(known if n < 2 else {}))
        for n, name in enumerate(names)
    )


def profiled(**changes):
    chosen = chosen_row().model_copy(update={"layers": layers(), "peaks": PEAKS, "of_limit": 0.384, **changes})
    there = row(target="cpu on pi@camera", recipe="int8", p50=9.5, top1=None, chosen=True, reason="gives the right outputs there")
    there = there.model_copy(update={"environment": environment("e" * 64)})
    return sample(targets=(chosen, there))


def test_the_slowest_layers_and_the_share_of_the_limit_are_told():
    for text in (render.markdown(profiled()), Page(render.html(profiled())).text):
        for fact in ("conv1", "reorder", "38.4 % of what this machine can do", "25.0 %", "50.0 %", "12.5 GB/s"):
            assert fact in text


def test_only_the_first_ten_layers_are_shown():
    many = profiled(layers=layers(tuple(f"layer{n:02d}" for n in range(30))))
    for text in (render.markdown(many), Page(render.html(many)).text):
        assert "layer09" in text
        assert "layer10" not in text


def test_without_limits_nothing_is_claimed():
    unknown = profiled(peaks=None, of_limit=None)
    assert limits.rooflines(unknown) == {}
    assert "is not known" in render.markdown(unknown)
    plain = render.markdown(sample())
    assert "Where the time goes" not in plain
    assert "several devices" not in plain
    assert limits.fleet_plot(sample()) == ""


def test_the_same_artifact_on_two_devices_stands_side_by_side():
    report = profiled()
    ((rows),) = summary.fleet(report).values()
    assert [r.target for r in rows] == ["cpu", "cpu on pi@camera"]
    assert "median latency" in Page(limits.fleet_plot(report)).text
    page = Page(render.html(report))
    assert "The same artifact on several devices" in page.text
    assert page.text.count("cpu on pi@camera") >= 2


def test_pictures_and_tables_take_hostile_names_as_text():
    report = profiled(layers=layers(HOSTILE))
    page = Page(render.html(report))
    assert "script" not in page.tags
    assert "onerror" not in page.attributes
    assert all(link.startswith("#") for link in page.links)
    assert "<img" not in render.markdown(report)
