from shards.support.progress import Progress, track


def test_off_a_terminal_a_closing_line_says_how_much_was_done(capsys):
    assert list(track(range(5), total=5, description="build")) == [0, 1, 2, 3, 4]
    err = capsys.readouterr().err
    assert "build: 5/5 images" in err
    assert err.count("\n") == 1


def test_lines_come_now_and_then(capsys):
    with Progress(3, "work", unit="step", interval_seconds=0.0) as progress:
        progress.update(note="loss 1.0")
        progress.update()
    err = capsys.readouterr().err
    assert "work: 1/3 steps" in err
    assert "s left, loss 1.0" in err


def test_silent_shows_nothing(capsys):
    with Progress(3, "work", silent=True, interval_seconds=0.0) as progress:
        progress.update()
    assert capsys.readouterr().err == ""
