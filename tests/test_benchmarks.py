"""The picture of benchmark results: which cases become lines, and what is refused."""

import pytest

pytest.importorskip("matplotlib")

from benchmarks.plot import curves, plot


def result(keys, seconds, **parameters):
    return {
        **parameters,
        "keys": keys,
        "seconds": seconds,
        "baseline_seconds": {"flash": 2 * seconds},
        "ratios": {},
    }


def report(*results):
    return {"hardware": {"gpus": [], "cpu": "a CPU"}, "results": {"decode": list(results)}}


def test_a_line_has_the_cases_that_differ_in_keys_alone():
    results = [
        result(2048, 3.0, batch=1, selected=9),
        result(1024, 1.0, batch=1, selected=9),
        result(1024, 5.0, batch=4, selected=9),
        result(2048, 7.0, batch=4, selected=9),
        result(2048, 8.0, batch=16, selected=9),
    ]
    assert curves(results) == {
        "batch 1": [(1024, 1.0), (2048, 3.0)],
        "flash, batch 1": [(1024, 2.0), (2048, 6.0)],
        "batch 4": [(1024, 5.0), (2048, 7.0)],
        "flash, batch 4": [(1024, 10.0), (2048, 14.0)],
    }


def test_a_baseline_that_cases_share_is_one_line():
    results = [
        {**result(keys, seconds, mode=mode), "baseline_seconds": {"flash": 9.0 * keys}}
        for mode, seconds in (("near", 1.0), ("dense", 2.0))
        for keys in (1024, 2048)
    ]
    assert list(curves(results)) == ["mode near", "flash", "mode dense"]


def test_the_picture(tmp_path):
    figure = plot(report(result(1024, 1.0), result(2048, 3.0)), tmp_path / "decode.png")
    assert [line.get_label() for line in figure.axes[0].lines] == ["ours", "flash"]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [1000.0, 3000.0]
    assert (tmp_path / "decode.png").stat().st_size > 1000


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="several numbers of keys, got decode"):
        plot(report(result(1024, 1.0)), tmp_path / "decode.png")
    assert not list(tmp_path.iterdir())
