"""Lines in a log: how far it is, and how long it takes yet."""

import re

from fofa_deploy import progress


def test_a_line_tells_the_time_that_is_left_at_the_pace_of_this_run(monkeypatch, capsys):
    monkeypatch.setattr(progress, "LINE_SECONDS", -1.0)
    task = progress._Lines("train", 100, 40)  # a resumed run: the first 40 cost it nothing
    task._started -= 300
    task.advance(30, note="loss 1.0")
    line = capsys.readouterr().err
    assert re.fullmatch(r"  train: 70/100, 0:05:0\d left  loss 1\.0\n", line)
