"""The demonstration from the command line, as `make demo` runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from stabkit import __version__
from stabkit.cli import main


def test_the_demo_predicts_runs_and_reports(tmp_path, capfd):
    assert main(["demo", "--output", str(tmp_path / "out"), "--seed", "0"]) == 0
    shown = capfd.readouterr()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.json", "report.html"]
    data = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))

    runs = data["runs"]
    cells = {(r["deletion"], r["algorithm"]) for r in runs}
    assert cells == {(d, a) for d in ("random 10%", "class 3") for a in ("graddiff", "agu", "sragu")}
    assert len(runs) == 12
    for safe, unsafe in zip(runs[::2], runs[1::2], strict=True):
        assert safe["lr"] < safe["critical_lr"] == unsafe["critical_lr"] < unsafe["lr"]
        assert (safe["verdict"], unsafe["verdict"]) == ("stable", "diverges")
    hits = sum((r["probability"] >= 0.5) == r["diverged"] for r in runs)
    assert hits >= 9  # a coin reaches this in 7 of 100 demos
    assert f"{hits} of 12 predictions right; hit rate {hits / 12:.2f}" in shown.out
    assert data["test_accuracy"] > 0.95
    assert {m["diverged"] for m in data["marks"]} == {True, False}

    # Predictions stand before outcomes, and the narration keeps out of the data.
    assert shown.out.index("Predictions, before any run") < shown.out.index("Outcomes of the real runs")
    assert re.search(r"Wrote .*report\.html in \d+ s\.", shown.err)
    assert "Wrote" not in shown.out
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2
    assert f"{hits} of 12 predictions right" in page
    assert "<script" not in page
    assert "http" not in page


def test_the_module_is_a_command():
    shown = subprocess.run([sys.executable, "-m", "stabkit", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == f"stabkit {__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_wrong_usage_has_its_own_exit_status(arguments, message, capfd):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    shown = capfd.readouterr()
    assert message in shown.err
    assert shown.out == ""


def test_a_bad_seed_is_wrong_usage(tmp_path, capsys):
    assert main(["demo", "--seed", "-1", "--output", str(tmp_path)]) == 2
    assert "`seed` of `run_demo` must be a whole number >= 0; got -1" in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_told_before_the_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    monkeypatch.setattr("stabkit.demo.train", lambda *a, **k: pytest.fail("the work has begun"))
    assert main(["demo", "--output", str(tmp_path / "file")]) == 2
    assert "stabkit demo: [Errno" in capsys.readouterr().err
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
