"""The GPU experiments at a size that a test has time for: the list of jobs, resuming, predictions that come first."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.gpu import run as gpu_run
from benchmarks.gpu import shards, speed, tables
from benchmarks.gpu.run import Job, jobs, jobs_named, work
from benchmarks.gpu.scale import FULL, REDUCED, SCALES, SMALL, Scale, Training
from benchmarks.gpu.store import Store, arithmetic_now, canonical, device_name, sha256
from benchmarks.gpu.tasks import GOLD_SEED, PADDING, Task, augmented, fit
from benchmarks.gpu.unlearning import ADAM_LR, PUBLISHED, Cell, cell, problem_of, published
from stabkit.calibration import calibration, combined
from stabkit.checks import MAX_TF32_ERROR
from stabkit.curvature.room import OVERSAMPLING
from stabkit.curvature.sketch import OWN
from stabkit.datasets import digits
from stabkit.models import MLP, ResNet

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")

CPU = torch.device("cpu")


class OnDigits(Scale):
    """The small scale with images that are there without a download."""

    def data(self, task):
        return super().data(task) if task.startswith("lm") else digits()


TINY = OnDigits(**{
    **SMALL.__dict__,
    "people": {"people": 10, "test_people": 3, "facts": 1},
    "networks": {**SMALL.networks, "vit": {"patch": 4, "width": 8, "depth": 1, "heads": 2}},
    "training": {
        "resnet18": replace(SMALL.training["resnet18"], epochs=8, batch_size=64),
        "vit": replace(SMALL.training["vit"], epochs=3, batch_size=64),
        "lm": replace(SMALL.training["lm"], epochs=40),
        "lm-gpt2": replace(SMALL.training["lm-gpt2"], epochs=5),
    },
    "steps": dict.fromkeys(SMALL.steps, 8),
    "points": 4,
})


def chosen(*keys):
    found = {job.key: job for job in jobs()}
    return [found[key] for key in keys]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a call leaves: a trained network, one retrained, and two cells with the audits of what they left."""
    place = tmp_path_factory.mktemp("gpu")
    store, said = Store(place, "small", CPU), []
    keys = ("train-resnet18", "gold-resnet18-random10", "cell-resnet18-random10-graddiff", "cell-resnet18-random10-ga")
    work(store, TINY, chosen(*keys), minutes=100, say=said.append)
    store.pack()
    tables.write(place, place / "page.md", total=5)
    assert [line.split(":")[0] for line in said] == [f"ok {key}" for key in keys]
    return place


# ---------------------------------------------------------------------- the list of jobs


def test_every_job_comes_after_what_it_needs_and_fits_into_a_call():
    keys = [job.key for job in jobs()]
    assert len(set(keys)) == len(keys)
    for place, job in enumerate(jobs()):
        assert set(job.needs) <= set(keys[:place]), job.key
        assert 0 < job.minutes < 9, job.key


def test_jobs_cover_every_network_deletion_and_algorithm_that_is_asked_for():
    keys = {job.key for job in jobs()}
    for deletion in ("random10", "class", "random50"):
        for algorithm in ("ga", "graddiff", "agu", "sragu", "salun", "scrub", "sfr_on"):
            assert f"cell-resnet18-{deletion}-{algorithm}" in keys
        assert f"gold-resnet18-{deletion}" in keys
    assert {f"cell-lm-gpt2-people-{a}" for a in ("ga", "graddiff", "npo")} <= keys
    assert {"cell-resnet18-random10-graddiff-batch", "cell-vit-class-graddiff"} <= keys
    assert {f"published-{setting.name}" for setting in PUBLISHED} | {f"speed-{part}" for part in speed.PARTS} <= keys


def test_the_full_scale_has_the_networks_that_it_speaks_of():
    resnet = Task("resnet18", replace(FULL, images=40, test_images=10), CPU)
    resnet.__dict__["_split"] = (torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert (
        sum(p.numel() for p in resnet.build(0).parameters()) == 11_173_962
    )  # ResNet-18 with CIFAR's stem, ten classes
    settings = FULL.networks["lm-gpt2"]
    assert (settings["width"], settings["depth"], settings["heads"]) == (768, 12, 12)
    columns = FULL.measured["lm-gpt2"]["rank"] + OVERSAMPLING + OWN
    assert columns * 4 * 85.1e6 < 0.1 * 139e9  # of an H200's bytes: a sketch is there several times over


def test_the_reduced_scale_has_the_same_networks_but_narrower_and_as_long_runs_where_its_cost_is_set_beside():
    for name, settings in FULL.networks.items():
        assert REDUCED.networks[name].keys() <= settings.keys() | {"width"}, name
    resnet = Task("resnet18", REDUCED, CPU)
    resnet.__dict__["_split"] = (torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1), torch.zeros(1))
    found, full = resnet.build(0), ResNet(3, 10)
    names = [name for name, _ in full.named_parameters()]
    assert [name for name, _ in found.named_parameters()] == names
    for name, p in found.named_parameters():
        assert p.shape[0] in {full.get_parameter(name).shape[0] // 8, 10}, name
    assert (REDUCED.run_steps, REDUCED.batch) == (FULL.run_steps, FULL.batch)
    assert REDUCED.published_share == REDUCED.images / 50_000  # the published number of epochs


def test_jobs_by_name_come_with_what_they_need():
    every = [job.key for job in jobs_named(None)]
    assert every == [job.key for job in jobs()]
    cell = [job.key for job in jobs_named(["cell-resnet18-random10-graddiff-batch"])]
    assert cell[-1] == "cell-resnet18-random10-graddiff-batch"
    assert set(cell[:-1]) == {"train-resnet18", "gold-resnet18-random10"}
    assert [job.key for job in jobs_named(["train-vit"])] == ["train-vit"]
    for some in (["cell-lm"], ["published-", "speed-exponents"]):
        keys = [job.key for job in jobs_named(some)]
        assert keys == [key for key in every if key in set(keys)]
        assert all(set(job.needs) <= set(keys) for job in jobs_named(some))
    with pytest.raises(ValueError, match=r"begins with 'cell-resnt18' or 'spede-'; --list tells all names"):
        jobs_named(["cell-resnt18", "train-vit", "spede-"])


def called(monkeypatch, *options):
    """What a call from the command line began, were it to go so far."""
    begun = []
    monkeypatch.setattr(gpu_run, "work", lambda store, scale, wanted, **how: begun.extend(job.key for job in wanted))
    monkeypatch.setattr(sys, "argv", ["run.py", *map(str, options)])
    gpu_run.main()
    return begun


def test_the_full_scale_is_not_begun_without_a_gpu(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "out"
    with pytest.raises(SystemExit):
        called(monkeypatch, "--folder", folder, "--device", "cpu")
    assert "--scale full needs a GPU" in (said := capsys.readouterr().err)
    assert "Use --scale reduced" in said
    assert "or --scale small" in said
    assert not folder.exists()
    assert called(monkeypatch, "--folder", folder, "--device", "cpu", "--scale", "small", "--only", "train-lm")
    # What only tells or makes pages asks for no GPU.
    assert called(monkeypatch, "--folder", folder, "--device", "cpu", "--list") == []
    assert "speed-compiled: 6 min" in capsys.readouterr().out
    assert called(monkeypatch, "--folder", folder, "--device", "cpu", "--page", tmp_path / "page.md") == []
    assert (tmp_path / "page.md").exists()


def test_a_name_that_no_job_has_is_told(monkeypatch, tmp_path, capsys):
    for more in ([], ["--list"]):
        with pytest.raises(SystemExit):
            called(
                monkeypatch, "--folder", tmp_path, "--scale", "small", "--only", "train-lm", "speed-exponent_", *more
            )
        assert "no job's name begins with 'speed-exponent_'; --list tells all names" in capsys.readouterr().err


def test_every_scale_says_what_each_network_needs_and_is_what_a_folder_can_hold():
    assert list(SCALES) == ["full", "reduced", "small"]
    for name, scale in SCALES.items():
        assert scale.name == name
        tables_of = (scale.networks, scale.training, scale.steps, scale.batch_size, scale.measured)
        assert {tuple(sorted(table)) for table in tables_of} == {tuple(sorted({job.task for job in jobs()}))}
        assert tables.NETWORKS[name].keys() == scale.networks.keys()


# ---------------------------------------------------------------------- predictions first


def test_predictions_are_on_disk_before_the_first_run_and_are_what_is_run(folder):
    for key in ("cell-resnet18-random10-graddiff", "cell-resnet18-random10-ga"):
        result = json.loads((folder / "jobs" / f"{key}.json").read_text())["result"]
        text = (folder / "predictions" / f"{key}.json").read_text()
        said, mark = json.loads(text), result["predictions"]
        assert mark["sha256"] == sha256(text)
        assert mark["made"] == said["made"] < result["first_run"]
        lines = said["predictions"]["mixes"]
        assert [line["mix"] for line in lines] == ([1.0] if key.endswith("-ga") else list(TINY.mixes))
        told = [(line["mix"], point["lr"]) for line in lines for point in line["grid"]]
        assert [(s["mix"], s["lr"]) for s in result["settings"]] == told
        for line, edge in zip(lines, result["boundaries"], strict=True):
            assert edge["predicted"] == line["critical_lr"]
            assert edge["staged"] == line["staged"]["critical_lr"]
            assert line["grid"][0]["lr"] * TINY.span == pytest.approx(line["staged"]["critical_lr"])
            assert line["grid"][-1]["lr"] == pytest.approx(TINY.span**2 * line["grid"][0]["lr"])
        outcomes = [s["diverged"] for s in result["settings"]]
        assert {len(over_seeds) for over_seeds in outcomes} == {len(TINY.seeds)}
        assert {diverged for over_seeds in outcomes for diverged in over_seeds} == {True, False}


def test_runs_follow_the_file_of_predictions_whatever_it_says(folder):
    store, key = Store(folder, "small", CPU), "cell-resnet18-random10-graddiff"
    path = folder / "predictions" / f"{key}.json"
    kept = path.read_text()
    other = json.loads(kept)
    assert other["network"] == store.weights_sha256("train-resnet18")
    other["predictions"]["mixes"] = other["predictions"]["mixes"][:1]
    other["predictions"]["mixes"][0]["grid"] = [{**other["predictions"]["mixes"][0]["grid"][0], "lr": 1e-6}]
    path.write_text(canonical(other))
    try:
        found = cell(
            store, Task("resnet18", TINY, CPU), Cell(task="resnet18", deletion="random10", algorithm="graddiff"), key
        )
    finally:
        path.write_text(kept)
    assert [s["lr"] for s in found["settings"]] == [1e-6]
    assert found["settings"][0]["diverged"] == [False] * len(TINY.seeds)
    assert found["boundaries"][0]["observed"] is None
    assert found["predictions"]["sha256"] == sha256(canonical(other)) != sha256(kept)


def test_the_page_tells_predictions_that_were_changed_afterwards(folder, tmp_path):
    for name in ("results", "predictions"):
        (tmp_path / f"{name}.json").write_text((folder / f"{name}.json").read_text())
    assert "2 still have the SHA-256" in tables.write(tmp_path, tmp_path / "page.md", total=5).read_text()
    changed = json.loads((tmp_path / "predictions.json").read_text())
    changed["cell-resnet18-random10-ga"]["predictions"]["mixes"][0]["grid"][0]["probability"] = 1.0
    (tmp_path / "predictions.json").write_text(json.dumps(changed))
    page = tables.write(tmp_path, tmp_path / "page.md", total=5).read_text()
    assert "2 of 2 predictions were made before their first run; 1 still have the SHA-256" in page


def test_recorded_probabilities_are_made_a_reports():
    """By the boundary that was on record before the runs, and by the rollouts alone where there is none."""
    line = {
        "found": True,
        "critical_lr": 0.2,
        "interval": [0.05, 0.4],
        "staged": {"found": True, "critical_lr": 0.1, "low": 0.02},
    }
    staged = calibration("staged").interval(0.1, 0.02, 0.1)
    assert staged[0] == 0.02  # the halved-down interval is the wider one here
    assert tables._probability(0.3, 0.07, line, "one") == combined(0.3, 0.07, 0.2, (0.05, 0.4))
    assert tables._probability(0.3, 0.07, line, "staged") == combined(0.3, 0.07, 0.1, staged)
    line["found"] = line["staged"]["found"] = False
    for kind in ("one", "staged"):
        assert tables._probability(0.3, 0.07, line, kind) == tables._probability(0.3, 0.07, {}, kind) == 0.3


# ---------------------------------------------------------------------- resuming


def test_a_second_call_does_nothing_that_is_done(folder):
    said = []
    assert work(Store(folder, "small", CPU), TINY, chosen("train-resnet18"), minutes=100, say=said.append) == []
    assert said == []


def test_what_was_gathered_is_gone_on_from_and_lost_networks_are_trained_anew(folder, tmp_path):
    for name in ("results", "predictions"):
        (tmp_path / f"{name}.json").write_text((folder / f"{name}.json").read_text())
    with pytest.raises(ValueError, match=r"holds results of scale 'small'; got 'full'"):
        Store(tmp_path, "full", CPU)
    store, said = Store(tmp_path, "small", CPU), []
    key = "cell-resnet18-random10-ga"
    assert (tmp_path / "predictions" / f"{key}.json").read_text() == (
        folder / "predictions" / f"{key}.json"
    ).read_text()
    assert store.result(key) == Store(folder, "small", CPU).result(key)
    networks = ["train-resnet18", "gold-resnet18-random10"]
    kept = chosen(*networks, key)
    # Nothing asks for the networks, which the gathered files do not hold.
    assert work(store, TINY, kept, minutes=100, say=said.append) == []
    assert not store.ready("train-resnet18")
    assert store.ready(key)
    more = Job(
        key="more", task="resnet18", minutes=1.0, needs=tuple(networks), make=lambda store, task: {"kind": "more"}
    )
    store.write_failure("more", "no luck")  # nor for what failed, or will not be begun
    assert work(store, TINY, [*kept, more], minutes=100, say=said.append) == []
    (tmp_path / "failures" / "more.json").unlink()
    assert work(store, TINY, [*kept, more], minutes=0.6, say=said.append) == []
    assert not store.ready("train-resnet18")
    assert work(store, TINY, [*kept, more], minutes=100, say=said.append) == [*networks, "more"]
    before, after = (Store(place, "small", CPU).result("train-resnet18") for place in (folder, tmp_path))
    assert after["started"] > before["started"]
    assert after["result"]["test_accuracy"] == pytest.approx(before["result"]["test_accuracy"], abs=0.05)
    store.pack()
    assert json.loads((tmp_path / "results.json").read_text())[key] == store.result(key)


def test_predictions_that_no_run_followed_are_made_anew(folder, tmp_path):
    for name in ("results", "predictions"):
        (tmp_path / f"{name}.json").write_text((folder / f"{name}.json").read_text())
    found = json.loads((tmp_path / "predictions.json").read_text())
    found["cell-resnet18-random10-salun"] = found["cell-resnet18-random10-ga"]
    (tmp_path / "predictions.json").write_text(json.dumps(found))
    Store(tmp_path, "small", CPU)
    kept = {path.stem for path in (tmp_path / "predictions").glob("*.json")}
    assert kept == {"cell-resnet18-random10-ga", "cell-resnet18-random10-graddiff"}


def test_jobs_side_by_side_leave_what_they_leave_alone(tmp_path):
    """In processes of their own; what is to be alone is, and what needs another waits for it."""
    keys = ("train-lm", "train-lm-gpt2", "cell-lm-people-ga", "cell-lm-gpt2-people-ga")
    said = []
    both = Store(tmp_path / "both", "small", CPU)
    assert set(work(both, SMALL, chosen(*keys), minutes=100, workers=2, say=said.append)) == set(keys)
    one = Store(tmp_path / "one", "small", CPU)
    work(one, SMALL, chosen(*keys), minutes=100, say=said.append)
    for key in keys[2:]:
        assert [s["diverged"] for s in both.result(key)["result"]["settings"]] == [
            s["diverged"] for s in one.result(key)["result"]["settings"]
        ]
    spans = {key: (both.result(key)["started"], both.result(key)["finished"]) for key in keys}
    start, end = spans["cell-lm-gpt2-people-ga"]  # alone: the largest network
    assert all(end <= other[0] or other[1] <= start for key, other in spans.items() if key != "cell-lm-gpt2-people-ga")
    assert {key: both.result(key)["jobs_at_once"] for key in keys} == {**dict.fromkeys(keys, 2), keys[3]: 1}
    assert both.result("train-lm")["commit"]


def test_an_error_in_a_process_of_its_own_is_kept_like_any_other(tmp_path):
    store, said = Store(tmp_path, "small", CPU), []
    store.write("train-lm", {"kind": "training"}, started="", seconds=1, minutes=1)
    (tmp_path / "weights" / "train-lm.npz").write_bytes(b"no weights")
    assert work(store, SMALL, chosen("cell-lm-people-ga"), minutes=100, workers=2, say=said.append) == []
    assert said[0].startswith("!! cell-lm-people-ga: ")
    assert "Traceback" in json.loads((tmp_path / "failures.json").read_text())["cell-lm-people-ga"]["error"]


def test_a_process_that_is_killed_takes_nothing_along(tmp_path, monkeypatch):
    dying = replace(chosen("train-lm-gpt2")[0], key="gone")  # no job of that name: its process does not survive it
    store, said = Store(tmp_path, "small", CPU), []
    monkeypatch.setattr(gpu_run, "_in_worker", killed_if_unknown)
    # The other was done before, or went down with it and is done again.
    assert work(store, SMALL, [dying, *chosen("train-lm")], minutes=100, workers=2, say=said.append) == ["train-lm"]
    assert "!! gone: its process died" in said
    assert set(json.loads((tmp_path / "failures.json").read_text())) == {"gone"}
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"train-lm"}


def test_workers_do_not_outlive_a_call_that_is_killed(tmp_path):
    """Otherwise they would go on beside the next call, which does the same jobs."""
    program = (
        "from benchmarks.gpu import run\nfrom benchmarks.gpu.run import *\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, mp_context=get_context('spawn'), initializer=run._begin_worker,\n"
        f"        initargs=({str(tmp_path)!r}, 'small', 'cpu', 1, 0.9))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600).result()\n"
    )
    path = tmp_path / "program.py"
    path.write_text(program)
    root = Path(gpu_run.__file__).parents[2]
    caller = subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    worker = int(caller.stdout.readline())
    os.kill(worker, 0)  # is there
    caller.kill()
    caller.wait()
    caller.stdout.close()
    for _ in range(200):
        if gone(worker):
            break
        time.sleep(0.1)
    assert gone(worker)


def gone(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    status = Path(f"/proc/{process}/stat")  # nobody may have asked what became of it
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_network_trained_anew_is_predicted_anew(folder, tmp_path):
    """The same training comes out otherwise on a GPU, and a prediction is of one network."""
    store, key = Store(tmp_path, "small", CPU), "cell-resnet18-random10-ga"
    store.save_weights("train-resnet18", nn.Linear(2, 2))
    made = []

    def make():
        made.append(len(made))
        return {"number": made[-1]}

    assert store.predicted(key, "train-resnet18", make)[0] == {"number": 0}
    _, mark = store.predicted(key, "train-resnet18", make)
    assert made == [0]
    assert json.loads((tmp_path / "predictions" / mark["file"]).read_text())["network"] == store.weights_sha256(
        "train-resnet18"
    )
    store.save_weights("train-resnet18", nn.Linear(2, 2))
    assert store.predicted(key, "train-resnet18", make)[0] == {"number": 1}


def killed_if_unknown(key):
    """What a worker does, but for a job that ends it."""
    if key == "gone":
        os.kill(os.getpid(), signal.SIGKILL)
    return gpu_run._WORKER["here"].do(gpu_run._WORKER["jobs"][key])


def test_what_is_to_be_alone_waits_for_what_it_needs_wherever_that_stands(tmp_path):
    store, said = Store(tmp_path, "small", CPU), []
    first = Job(key="first", task="lm", minutes=1.0, needs=("second",), make=lambda s, t: {"kind": "n"}, alone=True)
    second = Job(key="second", task="lm", minutes=1.0, needs=(), make=lambda s, t: {"kind": "n"})
    assert work(store, TINY, [first, second], minutes=9, say=said.append) == ["second", "first"]


def test_what_was_done_since_has_not_failed(tmp_path):
    store = Store(tmp_path, "small", CPU)
    store.write_failure("it", "no luck")
    store.pack()
    store.write("it", {"kind": "luck"}, started="", seconds=1, minutes=1)
    assert not Store(tmp_path, "small", CPU).failed("it")


def test_shards_come_back_as_they_were(tmp_path):
    g = np.random.default_rng(0)
    x, y = g.integers(0, 256, (1100, 3, 32, 32), dtype=np.uint8), g.integers(0, 10, 1100)
    for folder in ("plain", "packed", "back"):
        (tmp_path / folder).mkdir()
    path = tmp_path / "plain" / "cifar10_test.npz"
    np.savez(path, x=x, y=y)
    shards.pack(path, tmp_path / "packed" / path.name)
    shards.unpack(tmp_path / "packed" / path.name, tmp_path / "back" / path.name)
    with np.load(tmp_path / "back" / path.name) as back:
        assert back["x"].dtype == np.uint8
        assert np.array_equal(back["x"], x)
        assert np.array_equal(back["y"], y)


def test_what_fails_stops_nothing_else_and_is_not_tried_again_unasked(tmp_path):
    store, said, tries = Store(tmp_path, "small", CPU), [], []

    def make(store, task):
        tries.append(task.name)
        if len(tries) == 1:
            raise ValueError("no such luck: 17")
        return {"kind": "luck", "tries": len(tries)}

    plain = Job(key="luck", task="lm", minutes=1.0, needs=(), make=make)
    waits = Job(key="waits", task="lm", minutes=1.0, needs=("luck",), make=make)
    goes_on = Job(key="goes-on", task="lm", minutes=1.0, needs=(), make=make)
    assert work(store, TINY, [plain, waits, goes_on], minutes=9, say=said.append) == ["goes-on"]
    assert said[:2] == ["!! luck: ValueError: no such luck: 17", "-- waits: needs luck"]
    assert "no such luck: 17" in json.loads((tmp_path / "failures.json").read_text())["luck"]["error"]
    (tmp_path / "failures" / "luck.json").unlink()
    assert Store(tmp_path, "small", CPU).failed("luck")  # what was gathered says so
    assert work(store, TINY, [plain], minutes=9, say=said.append) == []
    assert said[-1] == "-- luck: failed before"
    assert work(store, TINY, [plain, waits], minutes=9, retry=True, say=said.append) == ["luck", "waits"]
    assert store.result("luck")["result"] == {"kind": "luck", "tries": 3}
    assert not (tmp_path / "failures.json").exists()


def test_no_job_is_begun_that_would_outlast_the_call(tmp_path):
    store, said = Store(tmp_path, "full", CPU), []
    scale = OnDigits(**{**TINY.__dict__, "minutes": None})
    done = [Job(key=f"n{m}", task="lm", minutes=m, needs=(), make=lambda store, task: {"kind": "none"}) for m in (8, 2)]
    assert work(store, scale, done, minutes=7.9, say=said.append) == ["n2"]
    assert said[0] == "-- n8: would take some 8.0 minutes of the 7.9 left"
    # What took twice as long as estimated makes all others twice as long.
    store.write("n2", {"kind": "none"}, started="", seconds=240, minutes=2)
    assert store.pace() == pytest.approx(2)
    assert work(store, scale, done[:1], minutes=15.9, say=said.append) == []
    assert said[-1] == "-- n8: would take some 16.0 minutes of the 15.9 left"
    # A scale may have its own estimate of all of them.
    scale = OnDigits(**{**TINY.__dict__, "minutes": 3})
    assert work(store, scale, done[:1], minutes=5.9, say=said.append) == []
    assert said[-1] == "-- n8: would take some 6.0 minutes of the 5.9 left"
    assert work(store, scale, done[:1], minutes=6.1, say=said.append) == ["n8"]
    assert store.result("n8")["estimated_minutes"] == 3


def test_a_folder_holds_one_scale(folder):
    with pytest.raises(
        ValueError, match=r"holds results of scale 'small'; got 'full'\. Give another folder, or --scale small"
    ):
        Store(folder, "full", CPU)


def test_a_folder_holds_results_of_one_kind_of_device(tmp_path, monkeypatch, capsys):
    store = Store(tmp_path, "small", CPU)
    store.write("it", {"kind": "luck"}, started="", seconds=1, minutes=1)
    with pytest.raises(
        ValueError, match=r"of device 'cpu' \(cpu \(.+\)\); got 'cuda'.+another folder, or --device cpu"
    ):
        Store(tmp_path, "small", torch.device("cuda"))
    assert store.result("it")["device"] == device_name(CPU)
    path = tmp_path / "jobs" / "it.json"
    path.write_text(json.dumps({**store.result("it"), "device": "NVIDIA H200"}))
    with pytest.raises(
        ValueError, match=r"of device 'cuda' \(NVIDIA H200\); got 'cpu'.+another folder, or --device cuda"
    ):
        Store(tmp_path, "small", CPU)
    with pytest.raises(SystemExit):
        called(monkeypatch, "--folder", tmp_path, "--scale", "small", "--device", "cpu")
    assert "holds results of device 'cuda'" in capsys.readouterr().err
    for name in ("NVIDIA H200", "Tesla T4", "NVIDIA GeForce RTX 3090 (mobile)"):  # whichever GPUs there were
        path.write_text(json.dumps({**json.loads(path.read_text()), "device": name}))
        Store(tmp_path, "small", torch.device("cuda"))


def test_weights_come_back_bit_for_bit_and_without_pickle(tmp_path):
    store, model = Store(tmp_path, "small", CPU), ResNet(1, 3, blocks=(1,), width=4, seed=1)
    model(torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))  # running statistics, a counter
    store.save_weights("it", model)
    back = store.load_weights("it", ResNet(1, 3, blocks=(1,), width=4, seed=2))
    assert not back.training
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name
    with np.load(tmp_path / "weights" / "it.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(model.state_dict())


# ---------------------------------------------------------------------- training and settings


def test_images_are_moved_and_mirrored_one_by_one():
    x = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    still = torch.full((2, 3), PADDING)
    assert torch.equal(augmented(x, still, torch.zeros(3, dtype=torch.bool)), x)
    mirrored = augmented(x, still, torch.tensor([False, True, False]))
    assert torch.equal(mirrored, torch.stack([x[0], x[1].flip(-1), x[2]]))
    moved = augmented(x, torch.tensor([[PADDING + 2] * 3, [PADDING - 1] * 3]), torch.zeros(3, dtype=torch.bool))
    assert torch.equal(moved[:, :, :-2, 1:], x[:, :, 2:, :-1])  # two rows up, one column to the right
    assert torch.equal(moved[:, :, -1, 1:], x[:, :, -3, :-1])  # what comes in is mirrored at the edge


def test_training_that_leaves_the_numbers_says_so():
    x = torch.full((64, 4), 1e30)
    how = Training(epochs=2, batch_size=8, lr=1e10, optimiser="sgd", weight_decay=0.0)
    with pytest.raises(RuntimeError, match=r"left the numbers in epoch 1 at a step size of up to 1e\+10"):
        fit(MLP(4, 2, hidden=(4,)), x, torch.arange(64) % 2, how, loss="cross_entropy", seed=0)


def test_networks_learn_and_their_accuracy_is_measured_on_what_was_held_out(folder):
    result = json.loads((folder / "jobs" / "train-resnet18.json").read_text())["result"]
    task = Task("resnet18", TINY, CPU)
    model = Store(folder, "small", CPU).load_weights("train-resnet18", task.build(0))
    split = digits()
    with torch.no_grad():
        right = float((model(split.x_test).argmax(1) == split.y_test).float().mean())
    assert result["test_accuracy"] == pytest.approx(right)
    assert right > 0.3  # ten classes
    assert result["seeds"] == [0]
    gold = json.loads((folder / "jobs" / "gold-resnet18-random10.json").read_text())["result"]
    assert gold["seeds"] == [GOLD_SEED]


def test_the_first_step_is_as_long_as_adams():
    task = Task("lm", TINY, CPU)
    model, sets = task.build(0).eval(), task.sets("people")
    problem = problem_of(model, task, sets)
    setting = next(p for p in PUBLISHED if p.name == "graddiff-open-unlearning").make(problem, TINY)
    total = sum(
        sign * nn.functional.cross_entropy(model(x)[:, :-1].flatten(0, 1), y[:, 1:].flatten()) / 2
        for (x, y), sign in ((sets.retain, 1), (sets.forget, -1))
    )  # every answer has as many words here, so that the mean over words is the mean over answers
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))])
    assert setting.lr * float(gradient.norm()) == pytest.approx(ADAM_LR * math.sqrt(gradient.numel()), rel=1e-4)


def test_adamw_unlearns_at_the_step_size_it_was_trained_with():
    task = Task("lm", TINY, CPU)
    problem = problem_of(task.build(0).eval(), task, task.sets("people"))
    setting = next(p for p in PUBLISHED if p.name == "ga-open-unlearning-adamw").make(problem, TINY)
    assert (setting.optimizer, setting.lr, setting.weight_decay) == ("adamw", TINY.training["lm"].lr, 0.01)
    rates, epoch = setting.lr_schedule, setting.steps // 10
    assert rates[epoch - 1] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(0)
    assert list(rates[epoch - 1 :]) == sorted(rates[epoch - 1 :], reverse=True)


# ---------------------------------------------------------------------- the page


def test_the_page_says_what_it_is_and_scores_runs_by_what_was_said_of_them(folder):
    page = (folder / "page.md").read_text()
    assert "reduced proof at CPU scale and no GPU result" in page
    results = json.loads((folder / "results.json").read_text())
    predictions = json.loads((folder / "predictions.json").read_text())
    accuracy = {}
    for kind, read in (("one linearisation", lambda point: point), ("staged rollouts", lambda point: point["staged"])):
        said = {
            (key, line["mix"], point["lr"]): read(point)["probability"] >= 0.5
            for key, entry in predictions.items()
            for line in entry["predictions"]["mixes"]
            for point in line["grid"]
        }
        runs = [
            (said[key, s["mix"], s["lr"]], diverged)
            for key in predictions
            for s in results[key]["result"]["settings"]
            for diverged in s["diverged"]
        ]
        hits = {
            outcome: [call == outcome for call, diverged in runs if diverged == outcome] for outcome in (True, False)
        }
        accuracy[kind] = sum(sum(h) / len(h) for h in hits.values()) / 2
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| tiny ResNet | 2 |")]
    share = f"{sum(diverged for _, diverged in runs) / len(runs):.2f}"
    assert len(rows) == 6
    # What was on record before the runs, beside what a report makes of it.
    assert [row[4] for row in rows[:4:2]] == ["one linearisation", "staged rollouts"]
    for kind, row in zip(("one linearisation", "staged rollouts"), rows[1:4:2], strict=True):
        assert row[2:6] == [str(len(runs)), share, f"{kind}, as recorded", f"{accuracy[kind]:.3g}"]
    assert (folder / "figures" / "page.png").stat().st_size > 10_000
    assert "![critical step sizes and runs](figures/page.png)" in page
    audited = results["cell-resnet18-random10-ga"]["result"]["audit"]["models"]
    assert set(audited) == {"original", "gold", "unlearned"}
    assert f"| gold | {100 * audited['gold']['forget_accuracy']['value']:.2f} |" in page
    assert f"| ga | {100 * audited['unlearned']['forget_accuracy']['value']:.2f} |" in page


@pytest.mark.parametrize(("name", "page"), [("gpu", "results"), ("gpu_reduced", "reduced")])
def test_the_pages_are_what_is_stored(name, page, tmp_path):
    root = Path(gpu_run.__file__).parents[1]
    stored = root / "gpu" / f"{page}.md"
    made = tables.write(root / "results" / name, tmp_path / stored.name, total=len(jobs()))
    assert made.read_text(encoding="utf-8") == stored.read_text(encoding="utf-8")


def stored(name):
    root = Path(gpu_run.__file__).parents[1] / "results" / name
    found = [json.loads((root / f"{what}.json").read_text(encoding="utf-8")) for what in ("results", "predictions")]
    return {key: e["result"] for key, e in found[0].items() if e["result"]["kind"] == "cell"}, found[1]


@pytest.mark.parametrize(
    ("name", "scale", "apart"),
    [("gpu", FULL, "1.17 apart, a step of the grid (1.90) after 2 halvings"),
     ("gpu_reduced", REDUCED, "1.59 apart, a step of the grid (2.52) after 1 halving;")],
)  # fmt: skip
def test_the_page_says_how_near_an_observed_boundary_is_known(name, scale, apart):
    cells, _ = stored(name)
    (text,) = tables._resolution(cells, scale.halvings)
    assert apart in text
    step = scale.span ** (2 / (scale.points - 1))
    assert f"{step**0.5**scale.halvings:.2f}" == apart.split()[0]
    # What is left of a step of the grid lies around the observed one, to the ends that further runs had.
    half = step**0.5 ** (scale.halvings + 1)
    for found in cells.values():
        for edge in found["boundaries"]:
            if edge["observed"] is not None:
                lrs = [setting["lr"] for setting in found["settings"] if setting["mix"] == edge["mix"]]
                places = [math.log(edge["observed"] / half / lrs[0]), math.log(edge["observed"] * half / lrs[0])]
                units = [place / math.log(step) * 2**scale.halvings for place in places]
                assert units == pytest.approx([round(unit) for unit in units], abs=1e-6)
                assert round(units[1]) - round(units[0]) == 1
    assert list(tables._resolution({"alone": {"settings": [{"mix": 0.2, "lr": 1.0}]}}, 1)) == []


def test_the_page_says_where_tf32_is_too_rough(folder):
    cells, predictions = stored("gpu")
    (text,) = tables._rough(cells, predictions, tables.NETWORKS["full"])
    assert "more than 0.01" in text
    assert "float32: ResNet-18, 5 of 5 cells, 0.0236 to 0.0248." in text
    for key in cells:
        if key.startswith("cell-resnet18"):
            assert {line["confidence"] for line in predictions[key]["predictions"]["mixes"]} == {"low"}
    checks = predictions["cell-resnet18-random10-ga"]["predictions"]["checks"]
    checks["error of TF32"] = MAX_TF32_ERROR  # lets pass
    predictions["cell-lm-people-ga"]["predictions"]["checks"]["error of TF32"] = 0.5
    (text,) = tables._rough(cells, predictions, tables.NETWORKS["full"])
    assert "ResNet-18, 4 of 5 cells, 0.0237 to 0.0248; language model, 1 of 2 cells, 0.5 to 0.5." in text
    assert list(tables._rough(*stored("gpu_reduced"), tables.NETWORKS["reduced"])) == []  # a CPU has no TF32
    assert "TF32 is off" not in (folder / "page.md").read_text()


def test_the_order_of_methods_says_where_it_chose_between_two_runs():
    def entry(gap):
        return {"average_gap": {"value": gap}}

    models = {"gold": {}, "salun": entry(0.3), "ga": entry(0.2), "scrub": entry(0.4)}
    told = {"models": models, "sizes": [1, 2, 3], "attack": "a", "task": "resnet18", "deletion": "random10"}
    text = tables._audit(told, tables.NETWORKS["full"])
    assert "order takes" not in text
    assert "By gap, best first: ga < salun < scrub here" in text
    assert "the published settings are one run\neach" in text
    models["published-salun-torchunlearn"] = entry(0.1)
    text = tables._audit(told, tables.NETWORKS["full"])
    assert "By gap, best first: salun < ga < scrub here" in text
    assert "Of salun there are two runs, at the advised step and at a published setting; the order takes\n" in text
    assert "order takes" not in tables._audit({**told, "deletion": "class"}, tables.NETWORKS["full"])


def test_the_page_says_what_is_one_run(folder, tmp_path):
    assert "what became of it is one run's" in (folder / "page.md").read_text()
    results = json.loads((Path(gpu_run.__file__).parents[1] / "results/gpu/results.json").read_text(encoding="utf-8"))
    kept = {key: entry for key, entry in results.items() if key == "published-ga-open-unlearning"}
    (tmp_path / "results.json").write_text(json.dumps(kept))
    page = tables.write(tmp_path, tmp_path / "page.md", total=5).read_text()
    assert "## Published settings\n\nEach was run once: what happened here is one run's." in page


def right(cells, predictions, kind):
    """How many runs a kind of prediction was right about, and of how many."""
    every = [r for key in cells for r in tables._records(cells[key], predictions[key]["predictions"]["mixes"], True)]
    return sum((getattr(r, kind).probability >= 0.5) == r.diverged for r in every), len(every)


def test_the_papers_pages_say_what_is_stored():
    papers = Path(gpu_run.__file__).parents[2] / "papers"
    theory, agu = ((papers / name).read_text(encoding="utf-8") for name in ("theory.md", "agu_2025.md"))
    theory, flat = (" ".join(text.split()) for text in (theory, agu))
    for name, where in (("gpu", "306 runs on a GPU"), ("gpu_reduced", "468 runs on a CPU")):
        cells, predictions = stored(name)
        sgd = {key: found for key, found in cells.items() if tables._optimizer(found["cell"]) == "sgd"}
        assert f"{right(sgd, predictions, 'one')[1]} runs on a" in where
        scored = [
            tables._scores({key: found for key, found in sgd.items() if found["cell"]["task"] == task}, predictions)
            for task in ("resnet18", "vit", "lm", "lm-gpt2")
        ]
        said = theory[theory.index(where) :]
        for kind in ("one", "staged"):
            *first, last = [f"{getattr(found, kind).balanced_accuracy:.3f}" for found in scored]
            assert f"{', '.join(first)} and {last}" in said, (name, kind)
    adamw = {key: cells[key] for key in cells.keys() - sgd.keys()}
    assert [right(adamw, predictions, kind) for kind in ("one", "staged")] == [(45, 60), (60, 60)]
    assert "one linearisation was right about 45 of 60 runs by AdamW, staged predictions about all 60" in theory
    named = {("resnet18", "gpu_reduced"): "ResNet-18/8", ("vit", "gpu_reduced"): "narrow transformer"}
    deletions = {"random10": "random 10%", "random50": "random 50%", "class": "class 3"}
    for name in ("gpu", "gpu_reduced"):
        cells, predictions = stored(name)
        for key, found in cells.items():
            if found["cell"]["algorithm"] == "agu":
                scored, (edge,) = tables._scores({key: found}, predictions), found["boundaries"]
                counted = f"{round(scored.share_diverged * scored.settings)} of {scored.settings}"
                accuracies = (scored.one, scored.staged, scored.step_limit)
                row = (
                    named.get((found["cell"]["task"], name), "transformer"),
                    deletions[found["cell"]["deletion"]],
                    counted,
                    *(f"{quality.balanced_accuracy:.3f}" for quality in accuracies),
                    " / ".join(f"{edge[side]:.3g}" for side in ("predicted", "staged", "observed")),
                )
                assert f"\n| {' | '.join(row)} |\n" in agu
                assert not found["advised"]["diverged"]
                if found["audit"]:
                    gap, before = (
                        f"{100 * found['audit']['models'][model]['average_gap']['value']:.2f} %"
                        for model in ("unlearned", "original")
                    )
                    assert f"{gap} where " in flat
                    assert f" is {before} ({deletions[found['cell']['deletion']]})" in flat


def test_nothing_done_is_a_page_too(tmp_path):
    assert "No job has left a result yet." in tables.write(tmp_path, tmp_path / "page.md", total=5).read_text()


# ---------------------------------------------------------------------- speed


def test_lower_precision_is_told_by_its_error(folder):
    before = arithmetic_now()
    found = speed.precision(Store(folder, "small", CPU), Task("resnet18", TINY, CPU))
    for errors in found["errors"].values():
        assert errors["float32"]["relative_error"] < 1e-4 < errors["bfloat16 autocast"]["relative_error"] < 0.5
    assert arithmetic_now() == before


def test_products_are_timed_in_gradients(folder):
    found = speed.products(Store(folder, "small", CPU), Task("resnet18", TINY, CPU))
    for name in ("hvp", "hvp_of_8", "hvp_of_8_batched", "hvp_not_kept", "ggn", "ggn_of_8", "ggn_not_kept"):
        assert 0.2 < found[name] < 50, name


def test_what_is_compiled_is_the_same_gradient_and_the_same_product(folder, monkeypatch):
    monkeypatch.setattr(speed, "COMPILER", "aot_eager")  # traces, and needs no C++ compiler
    monkeypatch.setattr(speed, "STEP_BATCHES", (4,))
    found = speed.compiled(Store(folder, "small", CPU), Task("resnet18", TINY, CPU))
    for what in ("gradient", "hvp"):
        assert found[f"compiled_{what}_4_difference"] < 1e-4
        assert found[f"compiled_{what}_4"] > 0


@pytest.mark.parametrize("part", list(speed.PARTS))
def test_what_is_timed_says_its_seeds(part, monkeypatch):
    monkeypatch.setitem(speed.PARTS, part, lambda store, task: {"kind": part})
    found = chosen(f"speed-{part}")[0].make(None, Task("resnet18", FULL, CPU))
    rollouts = {"predictions": [0, 1, 2], "sfr_on": [0, 1, 2]}
    drawn = {"products": [0, 1], "compiled": [0, 1], "precision": [0, 2]}
    assert found == {"kind": part, "seeds": (rollouts | drawn).get(part, [0])}


def test_the_seeds_of_timed_vectors_are_those_that_they_are_drawn_with():
    for part in speed.PARTS:
        sources = [inspect.getsource(f) for f in (speed.PARTS[part], getattr(speed, f"_{part}", None)) if f is not None]
        seeds = re.findall(r"manual_seed\((\w+)\)", "".join(sources))
        assert tuple(map(int, seeds)) == gpu_run.VECTOR_SEEDS.get(part, ()), part


@pytest.mark.parametrize("name", ["gpu", "gpu_reduced"])
def test_every_stored_result_says_its_seeds(name):
    root = Path(gpu_run.__file__).parents[1]
    entries = json.loads((root / "results" / name / "results.json").read_text(encoding="utf-8"))
    for key, entry in entries.items():
        scale, result = SCALES[entry["scale"]], entry["result"]
        if result["kind"] == "published":
            sizes = scale.measured_long if result["task"] == "resnet18" else scale.measured[result["task"]]
            expected = [*range(sizes["seeds"]), 777]
        elif result["kind"] == "training":
            expected = [0 if result["deletion"] is None else 100]
        elif result["kind"] == "cell":
            expected = list(scale.seeds)
        else:
            rollouts = range(3 if result["kind"] in {"predictions", "sfr_on"} else 0)
            expected = sorted({0, *gpu_run.VECTOR_SEEDS.get(result["kind"], ()), *rollouts})
        assert result["seeds"] == expected, key


@pytest.mark.parametrize("part", ["predictions", "sfr_on", "spectrum", "exponents", "steps"])
def test_what_else_is_timed_comes_out_as_numbers(folder, part):
    found = speed.PARTS[part](Store(folder, "small", CPU), Task("resnet18", TINY, CPU))
    kind = found.pop("kind")
    assert kind == part
    numbers = [value for value in found.values() if isinstance(value, float)]
    assert all(math.isfinite(value) and value >= 0 for value in numbers if value != found.get("smallest"))
    if part in {"predictions", "sfr_on"}:
        names = (
            ("run", "predict_fast", "predict_standard") if part == "predictions" else ("run_sfr_on", "predict_sfr_on")
        )
        for name in names:
            assert found[name] > 0
            assert found[f"{name}_gradients"] > 0
        assert not found[f"{names[0]}_diverged"]  # what a prediction is set beside takes all of its steps


@pytest.mark.parametrize("setting", [s for s in PUBLISHED if s.task == "resnet18"], ids=lambda s: s.name)
def test_published_settings_are_predicted_and_run(folder, setting):
    store, key = Store(folder, "small", CPU), f"published-{setting.name}"
    found = published(store, Task("resnet18", TINY, CPU), setting, key)
    assert found["predictions"]["made"] < found["first_run"]
    assert found["said"]["verdict"] in {"stable", "marginal", "diverges"}
    run = found["run"]
    assert run["diverged"] == (run["divergence_step"] is not None)
    assert run["diverged"] or run["steps"] == found["settings"]["steps"]
    assert (found["audit"] is None) == run["diverged"]
    assert found["seeds"] == [*range(TINY.measured_long["seeds"]), 777]
