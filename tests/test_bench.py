"""The predict-verify benchmark: cells, scores against closed forms, resuming, the page and the command."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import stabkit.bench.verification as verification
from benchmarks import algorithms
from stabkit import bench
from stabkit._serialise import dumps, from_plain, to_plain
from stabkit.bench.cells import DATASETS, EPOCHS, MODELS, Cell, prepared
from stabkit.cli import main

NAME = "digits-mlp-class-graddiff"


def record(lr, mix, probability, diverged, *, predicted_step=None, staged=None, score=0.0, **changes):
    plain = {"growth": 0.0, "step_limit": 1.0, "coherence_rule": False, "divergence_step": None, "again": diverged}
    one = bench.Prediction(probability=probability, scores=(score,), step=predicted_step)
    other = one if staged is None else replace(one, probability=staged)
    return bench.Record(lr=lr, mix=mix, one=one, staged=other, diverged=diverged, **(plain | changes))


def result(records, *, role="evaluation", name="digits-cnn-class-graddiff", seed=0, boundaries=(), again=2.0):
    (cell,) = (c for c in bench.CELLS if c.key == name)
    return bench.CellResult(
        cell=replace(cell, role=role),
        seed=seed,
        records=tuple(records),
        boundaries=tuple(
            bench.Boundary(mix=mix, observed=observed, one=one, staged=staged, again=observed and again * observed)
            for mix, observed, one, staged in boundaries
        ),
        measure_seconds=3.0,
        frontier_seconds=1.0,
        staged_seconds=4.0,
        run_seconds=2.0,
        staged_gradients=10.0,
        run_gradients=40.0,
        linearised_samples=(5, 4),
        most_samples=(896, 448),
        captured=0.9,
        path_steps=4,
        path_held=True,
    )


@pytest.fixture(scope="module")
def quick():
    return bench.record_cell(bench.cells_named([NAME])[0], 0, quick=True)


def test_cells_have_names_of_their_own_and_known_parts():
    keys = [cell.key for cell in bench.CELLS]
    assert len(set(keys)) == len(keys)
    assert {cell.dataset for cell in bench.CELLS} == set(DATASETS)
    assert {cell.model for cell in bench.CELLS} == set(MODELS)
    roles = {"calibration", "evaluation", "AdamW calibration", "AdamW evaluation"}
    assert {cell.role for cell in bench.CELLS} == roles
    keys = {role: {c.key for c in bench.CELLS if c.role == role} for role in roles}
    assert sum(map(len, keys.values())) == len(set().union(*keys.values()))
    assert all((cell.optimizer == "adamw") == cell.role.startswith("AdamW") for cell in bench.CELLS)
    # Nothing is calibrated on what an evaluation has, whosever steps it takes.
    plain = {role: {key.removesuffix("-adamw") for key in names} for role, names in keys.items()}
    assert not (plain["calibration"] | plain["AdamW calibration"]) & (plain["evaluation"] | plain["AdamW evaluation"])


def test_cells_are_chosen_by_the_beginning_of_their_names():
    assert [cell.key for cell in bench.cells_named([NAME])] == [NAME]
    assert bench.cells_named(None) == bench.CELLS
    assert {cell.model for cell in bench.cells_named(["digits-vit"])} == {"vit"}
    with pytest.raises(ValueError, match=r"`cells` of `verify_cells` must name cells; got 'digts', with which no key"):
        bench.cells_named(["digts"])


@pytest.mark.parametrize("deletion", ["random50", "class", "influence", "mislabelled"])
def test_deletions_are_of_the_data_the_network_saw(deletion, monkeypatch):
    from stabkit.bench import cells

    monkeypatch.setitem(cells.EPOCHS, "digits", 2)
    cell = bench.Cell(dataset="digits", model="mlp", deletion=deletion, algorithm="graddiff")
    trained, chosen = prepared(cell, 1)
    n = trained.split.x_train.shape[0]
    assert sorted([*chosen.forget.tolist(), *chosen.retain.tolist()]) == list(range(n))
    clean = DATASETS["digits"](1).y_train
    changed = (clean != trained.split.y_train).nonzero().flatten()
    assert torch.equal(changed, chosen.forget) if deletion == "mislabelled" else changed.numel() == 0
    if deletion == "class":
        assert trained.split.y_train[chosen.forget].unique().numel() == 1


def test_a_cell_is_predicted_and_run_at_every_setting(quick):
    assert len(quick.records) == 8
    assert {r.mix for r in quick.records} == {0.2, 0.6}
    assert 0 < sum(r.diverged for r in quick.records) < 8  # the grid brackets the boundary
    for r in quick.records:
        assert (r.divergence_step is None) == (not r.diverged)
        for said in (r.one, r.staged):
            assert 0 <= said.probability <= 1
            assert (said.step is not None) == (said.probability >= 0.5)
        assert len(r.one.scores) == 3
        assert r.growth >= 0
    assert min(quick.measure_seconds, quick.frontier_seconds, quick.run_seconds, quick.staged_seconds) > 0
    assert quick.run_gradients == 100 * 128
    lrs = sorted({r.lr for r in quick.records})
    for boundary in quick.boundaries:
        line = sorted((r for r in quick.records if r.mix == boundary.mix), key=lambda r: r.lr)
        for found, crossed in (
            (boundary.observed, [r.diverged for r in line]),
            (boundary.again, [r.again for r in line]),
            (boundary.one, [r.one.probability >= 0.5 for r in line]),
            (boundary.staged, [r.staged.probability >= 0.5 for r in line]),
        ):
            place = crossed.index(True)
            assert found == pytest.approx(math.sqrt(lrs[place - 1] * lrs[place]))
        assert boundary.error_below > 0
    again = bench.record_cell(quick.cell, 0, quick=True)
    assert again.records == quick.records


def test_an_algorithm_with_a_mix_of_its_own_is_run_at_that(monkeypatch):
    from stabkit.bench import records

    monkeypatch.setattr(records, "HALVINGS", 1)
    (cell,) = (c for c in bench.CELLS if c.key == "adult-tabular-random10-ga")
    found = bench.record_cell(replace(cell, dataset="digits", model="mlp", steps=20), 0)
    assert [r.mix for r in found.records] == [1.0] * records.POINTS
    assert len({r.lr for r in found.records}) == records.POINTS
    assert [b.mix for b in found.boundaries] == [1.0]
    assert {r.diverged for r in found.records} == {True, False}
    assert 0.3 < bench.boundary_ratios(found, "staged")[0] < 3


def test_scores_are_those_of_the_definitions():
    records = [
        record(0.1, 0.5, 0.1, False, growth=1.0, again=True),
        record(0.2, 0.5, 0.6, False, growth=8.0, coherence_rule=True),
        record(0.4, 0.5, 0.7, True, growth=7.0, predicted_step=20.0, divergence_step=10, step_limit=0.3),
        record(0.8, 0.5, 0.4, True, growth=9.0, predicted_step=5.0, divergence_step=10),
        record(1.6, 0.5, 0.9, True, growth=9.5, divergence_step=3),
    ]
    found = bench.scores(records)
    assert found.settings == 5
    assert found.share_diverged == pytest.approx(0.6)
    assert found.one.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert found.one.auc == pytest.approx(5 / 6)
    assert found.one.brier == pytest.approx(np.mean([0.01, 0.36, 0.09, 0.36, 0.01]))
    assert found.one.log_loss == pytest.approx(-np.mean(np.log([0.9, 0.4, 0.7, 0.4, 0.9])))
    assert found.step_limit.balanced_accuracy == pytest.approx((2 / 3 + 1) / 2)
    assert found.growth.balanced_accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert found.growth.auc == pytest.approx(5 / 6)
    assert found.coherence_rule.balanced_accuracy == pytest.approx((0 + 1 / 2) / 2)
    assert found.again.balanced_accuracy == pytest.approx((1 + 1 / 2) / 2)
    assert found.one.step_ratio == pytest.approx(np.median([2.0, 0.5]))
    alone = bench.scores(records[:2])
    assert math.isnan(alone.one.auc)
    assert alone.one.brier == pytest.approx((0.01 + 0.36) / 2)
    better = bench.scores([replace(r, staged=replace(r.staged, probability=float(r.diverged))) for r in records])
    assert (better.staged.balanced_accuracy, better.staged.brier) == (1.0, 0.0)
    assert better.staged.log_loss == pytest.approx(-math.log(0.999))  # certainty is not taken at its word
    assert math.isnan(found.step_limit.log_loss)
    assert better.one == found.one


def test_boundaries_are_compared_where_both_are_bracketed():
    found = result([], boundaries=[(0.2, 10.0, 1.0, 5.0), (0.4, 2.0, 2.0, None), (0.6, None, 3.0, 3.0)])
    assert bench.boundary_ratios(found, "one") == [0.1, 1.0]
    assert bench.boundary_ratios(found, "staged") == [0.5]
    assert bench.boundary_ratios(found, "again") == [2.0, 2.0]


def test_files_that_do_not_say_were_made_with_fewer_samples(tmp_path):
    plain = {"schema": verification.SCHEMA, **to_plain(result([record(1.0, 0.5, 0.2, False)]))}
    path = tmp_path / "cell.json"
    path.write_text(dumps(plain))
    assert verification.read_cell(path).most_samples == (896, 448)
    del plain["most_samples"]
    path.write_text(dumps(plain))
    assert verification.read_cell(path).most_samples == (512, 256)


def test_what_was_calibrated_on_is_never_pooled():
    one = [record(1.0, 0.5, 0.2, False), record(2.0, 0.5, 0.8, True)]
    with pytest.raises(ValueError, match=r"`results` of `pooled` must be of one role; got calibration, evaluation"):
        bench.pooled([result(one), result(one, role="calibration")])
    with pytest.raises(ValueError, match=r"`records` of `scores` must hold at least one setting; got none"):
        bench.scores([])
    mine = result(one, boundaries=[(0.5, 1.0, 1.0, 3.0)])
    summary = verification.summarise([mine, result(one, role="calibration"), replace(mine, seed=1)])
    assert summary["roles"]["evaluation"]["pooled"]["settings"] == 4
    assert summary["roles"]["calibration"]["pooled"]["settings"] == 2
    assert summary["grid_factor"] == pytest.approx(2.0)
    assert summary["roles"]["evaluation"]["most_samples"] == [[896, 448]]
    assert summary["missing"] == [cell.key for cell in bench.CELLS if cell.key != "digits-cnn-class-graddiff"]
    assert summary["roles"]["evaluation"]["boundary_runs"] == 6
    assert summary["roles"]["evaluation"]["boundary"]["staged"]["within_2"] == 0.0
    assert summary["roles"]["evaluation"]["boundary"]["one"] == {
        "boundaries": 2,
        "median_ratio": pytest.approx(1.0),
        "within_1.5": 1.0,
        "within_2": 1.0,
        "over_2": 0.0,
        "in_interval": 1.0,
    }
    assert summary["roles"]["evaluation"]["one_by_error"]["near"]["boundaries"] == 2
    assert summary["roles"]["evaluation"]["one_by_error"]["far"]["boundaries"] == 0
    # 3 for boundaries at 1 and, by other batches, 2; the factor of staged rollouts lies between 1.5 and 3
    assert summary["roles"]["evaluation"]["boundary"]["staged"]["in_interval"] == 0.0
    wide = verification.summarise([result(one, boundaries=[(0.5, 1.0, 1.45, 1.7)])])["roles"]["evaluation"]["boundary"]
    assert (wide["one"]["in_interval"], wide["staged"]["in_interval"]) == (1.0, 0.5)
    assert wide["again"]["in_interval"] is None
    assert summary["roles"]["evaluation"]["cost"] == {
        "measure_over_run": 1.5,
        "frontier_over_run": 0.5,
        "staged_over_run": 2.0,
        "staged_over_run_gradients": 0.25,
    }
    assert summary["roles"]["evaluation"]["reliability"]["one"] == [
        {"said": 0.2, "happened": 0.0, "settings": 2},
        {"said": 0.8, "happened": 1.0, "settings": 2},
    ]


def test_misses_are_counted_by_kind_side_and_distance():
    records = [
        record(0.5, 0.2, 0.9, False, staged=0.1),  # one: called diverging, held, half the observed step
        record(0.9, 0.2, 0.9, False, staged=0.8, again=True),  # both, and the other batches diverged
        record(
            4.1, 0.2, 0.3, True, staged=0.7, divergence_step=91
        ),  # one: called stable, beyond twice the observed step
        record(1.0, 0.6, 0.2, True, staged=0.2, divergence_step=90),  # both; no boundary observed at this mix
        record(9.0, 0.6, 0.9, True, staged=0.9, again=False),
    ]
    found = result(records, boundaries=[(0.2, 1.0, 1.0, 1.0)])
    other = result(records[-2:], name="digits-cnn-class-agu")
    assert bench.misses([found, other], "one") == bench.Misses(
        runs=5,
        called_stable=3,
        late=1,
        by_batches=1,
        near=2,
        cells={"digits-cnn-class-graddiff": 4, "digits-cnn-class-agu": 1},
    )
    staged = bench.misses([found, other], "staged")
    assert (staged.runs, staged.called_stable, staged.late, staged.by_batches, staged.near) == (3, 2, 0, 1, 1)
    summary = verification.summarise([found, other])
    assert summary["roles"]["evaluation"]["misses"]["one"]["runs"] == 5
    panels = summary["roles"]["evaluation"]["worst"]
    assert [panel["cell"] for panel in panels] == ["digits-cnn-class-graddiff", "digits-cnn-class-agu"]
    assert panels[0]["settings"][1] == [0.9, 0.2, False, 0.8]
    assert panels[0]["boundaries"] == [[0.2, 1.0, 1.0, 1.0]]
    # The worst of a cell's seeds alone is drawn, and no more cells than there are panels.
    better = replace(result([record(1.0, 0.2, 0.9, True), record(0.1, 0.2, 0.1, False)]), seed=1)
    assert [panel["seed"] for panel in verification.summarise([better, found])["roles"]["evaluation"]["worst"]] == [0]
    many = [replace(found, cell=cell) for cell in bench.CELLS if cell.role == "evaluation"]
    assert len(verification.summarise(many)["roles"]["evaluation"]["worst"]) == 6


def test_a_cut_off_benchmark_goes_on(tmp_path, monkeypatch, quick):
    made = []

    def fake(cell, seed, *, quick):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append((cell.key, seed))
        return replace(result(quick_records, name=cell.key), seed=seed)

    quick_records = quick.records
    monkeypatch.setattr(verification, "record_cell", fake)
    arguments = {"cells": ["digits-vit-random10", "digits-vit-class-graddiff"], "seeds": (0, 1), "quick": True}
    with pytest.raises(KeyboardInterrupt):
        bench.verify_cells(tmp_path, **arguments)
    assert len(list(tmp_path.glob("*.json"))) == 3
    made.clear()
    summary = bench.verify_cells(tmp_path, **arguments)
    assert len(made) == 1
    made.clear()
    assert bench.verify_cells(tmp_path, **arguments) == summary
    assert made == []
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["roles"]["evaluation"]["pooled"]["settings"] == 32
    (tmp_path / "digits-vit-random10-graddiff-s1-quick.json").unlink()
    found = bench.verify_cells(tmp_path, **arguments, stored=True)  # what is not there is not made
    assert made == []
    assert found["roles"]["evaluation"]["pooled"]["settings"] == 24
    with pytest.raises(ValueError, match=r"`folder` of `verify_cells` must hold .*; got '.*empty'"):
        bench.verify_cells(tmp_path / "empty", **arguments, stored=True)
    with pytest.raises(ValueError, match="must name cells; got 'no-such'"):
        bench.verify_cells(tmp_path / "empty", cells=["no-such"])
    assert not (tmp_path / "empty").exists()
    (tmp_path / "digits-vit-class-graddiff-s0-quick.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"'.*digits-vit-class-graddiff-s0-quick\.json' must be a cell's file of schema 5"
    ):
        bench.verify_cells(tmp_path, **arguments)


def test_the_command_writes_a_page(tmp_path, capsys, monkeypatch, quick):
    monkeypatch.setattr(verification, "record_cell", lambda cell, seed, *, quick: saved)
    saved = quick
    folder = str(tmp_path / "deep" / "bench")
    assert main(["bench", "verify", "--folder", folder, "--cells", NAME, "--seeds", "0", "--quick"]) == 0
    page = capsys.readouterr().out
    assert "## Calibration" in page
    assert f"| {NAME} | 8 |" in page
    assert "Not run: digits-mlp-random10-graddiff, " in page
    for name in ("verify_calibration.png", "verify_calibration_worst.png"):
        assert (tmp_path / "deep" / "bench" / "figures" / name).stat().st_size > 5_000
    assert "Where predictions were wrong:" in page
    assert "(figures/verify_calibration_worst.png)" in page
    other = tmp_path / "page.md"
    elsewhere = ["--page", str(other), "--json"]
    assert main(["bench", "verify", "--folder", folder, "--cells", NAME, "--seeds", "0", "--quick", *elsewhere]) == 0
    assert other.read_text(encoding="utf-8") == page.rstrip("\n") + "\n"
    assert json.loads(capsys.readouterr().out)["roles"]["calibration"]["pooled"]["settings"] == 8
    assert main(["bench", "verify", "--folder", folder, "--cells", "nothing"]) == 2
    assert (
        main(["bench", "verify", "--folder", folder, "--stored", "--page", f"{folder}/{NAME}-quick-s0.json/page.md"])
        == 2
    )
    assert "got 'nothing'" in capsys.readouterr().err


# ------------------------------------------------------------------ calibration


def drawn(count, slope, seed):
    """A cell whose runs diverge as a known logistic of their scores says, and boundaries of another mix."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(0, 1.5, size=count)
    happened = generator.random(count) < 1 / (1 + np.exp(-slope * scores))
    records = [record(1.0, 0.5, 0.5, bool(y), score=float(x)) for x, y in zip(scores, happened, strict=True)]
    ratios = np.exp(generator.normal(0, 0.4, size=count // 10))
    return result(
        records, role="calibration", boundaries=[(0.1, 1.0, float(r), 1.0) for r in ratios], again=1.0
    ), ratios


def test_a_calibration_measures_the_probability_on_its_runs():
    found, ratios = drawn(4000, 4.0, 0)
    fitted = bench.fit_calibration([found], "one")
    assert fitted.runs == 4000
    assert fitted.brier == pytest.approx(
        np.mean([(p - r.diverged) ** 2 for p, r in zip(_said(fitted, found), found.records, strict=True)])
    )
    for b in fitted.reliability:
        assert b.said == pytest.approx(b.happened, abs=5 * math.sqrt(0.25 / b.settings))
    # Conformal: nine in ten of further boundaries lie within the factor.
    assert np.mean(np.abs(np.log(ratios)) <= math.log(fitted.step_factor)) >= 0.9
    _, others = drawn(40_000, 1.0, 1)
    assert np.mean(np.abs(np.log(others)) <= math.log(fitted.step_factor)) == pytest.approx(0.9, abs=0.04)
    assert bench.fit_calibration([found], "staged").step_factor == pytest.approx(1.0)
    assert bench.fit_calibration([replace(found, boundaries=())], "one").step_factor is None


def test_an_interval_is_of_runs_with_any_batches():
    """Predictions that hit every observed boundary, of which other batches break at three times the step size."""
    records = [record(1.0, 0.5, 0.5, True, score=1.0)]
    for again, factor in ((1.0, 1.0), (3.0, 3.0)):
        found = result(records, role="calibration", boundaries=[(0.1, 1.0, 1.0, 1.0)] * 40, again=again)
        assert bench.fit_calibration([found], "staged").step_factor == pytest.approx(factor)


def test_boundaries_below_which_the_linearisation_is_wrong_have_a_calibration_of_their_own():
    from stabkit.calibration import calibration

    records = [record(lr, mix, 0.5, lr > 1, score=math.log(lr)) for mix in (0.2, 0.4, 0.6) for lr in (0.5, 2.0)]
    found = result(records, role="calibration", boundaries=[(0.2, 1.0, 1.0, None), (0.4, 1.0, 4.0, None)], again=1.0)
    near, far = found.boundaries
    found = replace(found, boundaries=(replace(near, error_below=0.1), replace(far, error_below=2.0)))
    ((left,), (right,)) = bench.by_error([found])
    assert [b.mix for b in left.boundaries] == [0.2]
    assert {r.mix for r in left.records} == {0.2, 0.6}  # of 0.6 no boundary is known
    assert [b.mix for b in right.boundaries] == [0.4]
    assert {r.mix for r in right.records} == {0.4}
    assert bench.by_error([right]) == ([], [right])
    kinds = {name: replace(calibration("one"), step_factor=f) for name, f in (("one", 2.0), ("far", 50.0))}
    said = {(r.mix, r.lr): r.one.probability for r in bench.with_probabilities(found, kinds).records}
    alone = {(r.mix, r.lr): r.one.probability for r in bench.with_probabilities(found, {"one": kinds["one"]}).records}
    assert said[0.2, 0.5] == alone[0.2, 0.5]
    assert said[0.4, 0.5] > alone[0.4, 0.5]  # less sure that it holds


def test_each_end_of_an_interval_may_have_a_factor():
    """Boundaries predicted at a tenth of the observed ones, give or take little: the interval reaches up, hardly down."""
    generator = np.random.default_rng(0)
    ratios = 0.1 * np.exp(generator.normal(0, 0.2, size=400))
    records = [record(1.0, 0.5, 0.5, True, score=1.0)]
    found = result(records, role="AdamW calibration", boundaries=[(0.1, 1.0, float(r), 1.0) for r in ratios], again=1.0)
    fitted = bench.fit_calibration([found], "one", name="adamw", sided=True)
    assert (fitted.kind, fitted.step_factor) == ("adamw", 1.0)
    assert fitted.step_factor_above == pytest.approx(10 * math.exp(0.2 * 1.645), rel=0.05)
    assert fitted.interval(1.0, 0.9, 1.1) == (0.9, fitted.step_factor_above)
    assert fitted.margin(0.05) == 1.0
    turned = result(
        records, role="AdamW calibration", boundaries=[(0.1, 1.0, float(1 / r), 1.0) for r in ratios], again=1.0
    )
    other = bench.fit_calibration([turned], "one", sided=True)
    assert (other.step_factor, other.step_factor_above) == (pytest.approx(fitted.step_factor_above, rel=0.1), 1.0)


def test_an_adamw_cell_is_rolled_out_and_run_by_adamw(tmp_path):
    cell = next(c for c in bench.CELLS if c.key == "digits-mlp-random10-graddiff-adamw")
    found = bench.record_cell(replace(cell, steps=20), 0, quick=True)
    assert found.captured == 1.0  # of sampled parameters
    assert {r.diverged for r in found.records} == {False, True}
    right = sum((r.staged.probability >= 0.5) == r.diverged for r in found.records)
    assert right >= len(found.records) - 1
    summary = verification.summarise([found])
    assert set(summary["roles"]) == {"AdamW calibration"}
    page = bench.write_page(summary, tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## AdamW calibration" in page
    assert (tmp_path / "figures" / "verify_adamw_calibration.png").exists()


def _said(fitted, found):
    scores = torch.tensor([r.one.scores for r in found.records], dtype=torch.float64).T
    return fitted.probability(scores).tolist()


def test_probabilities_take_in_the_boundary_where_the_grid_brackets_one():
    from stabkit.calibration import calibration, combined

    records = [record(lr, mix, 0.7, False, score=-2.0) for mix in (0.2, 0.4, 0.6) for lr in (0.1, 0.9, 5.0)]
    found = result(records, boundaries=[(0.2, 1.0, 1.0, None), (0.4, None, 1.0, 2.0), (0.6, 1.0, None, None)])
    said = bench.with_probabilities(found, {kind: calibration(kind) for kind in ("one", "staged")})
    for kind, edges in (("one", {0.2: 1.0, 0.4: 1.0}), ("staged", {0.4: 2.0})):
        used = calibration(kind)
        rolled = 1 / (1 + math.exp(2 * used.slope))
        for r in said.records:
            edge, p = edges.get(r.mix), getattr(r, kind).probability
            if edge is None:
                assert p == pytest.approx(rolled)
            else:
                interval = used.interval(edge, edge, edge)
                assert p == pytest.approx(combined(rolled, r.lr, edge, interval))
                assert p != pytest.approx(rolled)
    again = bench.with_probabilities(replace(found, boundaries=()), {"one": calibration("one")})
    assert [r.one.probability for r in again.records] == pytest.approx([rolled] * 9)
    assert {r.staged.probability for r in again.records} == {0.7}  # nothing is said of what no calibration is given for


def test_a_boundary_makes_the_probability_honest():
    """Rollouts that are certain on either side of a boundary which is wrong by some factor: half of them are too sure."""
    from stabkit.calibration import calibration

    generator = np.random.default_rng(3)
    found = []
    for _ in range(300):  # predicted at 1, observed a logistic of scale 0.4 away
        observed = math.exp(generator.logistic(0, 0.4))
        lrs = np.exp(generator.uniform(-2, 2, size=20)).tolist()
        records = [record(lr, 0.5, 0.5, lr >= observed, score=2.0 if lr >= 1 else -2.0) for lr in lrs]
        found.append(result(records, role="calibration", boundaries=[(0.5, observed, 1.0, 1.0)], again=1.0))
    fitted = bench.fit_calibration(found, "one")
    assert math.log(fitted.step_factor) == pytest.approx(0.4 * math.log(19), rel=0.1)

    def scored(results):
        return bench.pooled([bench.with_probabilities(r, {"one": fitted}) for r in results]).one

    whole, alone = scored(found), scored([replace(r, boundaries=()) for r in found])
    assert whole.log_loss < 0.7 * alone.log_loss
    assert whole.brier < alone.brier
    assert whole.balanced_accuracy == alone.balanced_accuracy
    assert calibration("one").slope == fitted.slope


def test_records_from_before_the_look_at_the_path_are_read_and_named(tmp_path):
    records = [record(lr, 0.5, 0.5, lr > 0.3, score=lr) for lr in (0.1, 0.2, 0.4, 0.8)]
    found = result(records, boundaries=[(0.5, 0.3, 0.3, 0.3)])
    plain = {"schema": verification.SCHEMA, **to_plain(found)}
    del plain["path_held"]
    path = tmp_path / f"{NAME}-s0.json"
    path.write_text(dumps(plain), encoding="utf-8")
    assert not verification.read_cell(path).path_held
    for kept, named in ((found, False), (verification.read_cell(path), True)):
        page = bench.write_page(verification.summarise([kept]), tmp_path / "page.md").read_text(encoding="utf-8")
        assert ("1 of 1 records are from before staged rollouts held the last steps" in page) == named
        assert (f"real ones: {found.cell.key}." in page) == named


def test_evaluation_cells_are_no_calibration():
    with pytest.raises(ValueError, match=r"`results` of `fit_calibration` must be .*; got digits-cnn-class-graddiff\."):
        bench.fit_calibration([result([record(1.0, 0.5, 0.5, True)])], "one")
    with pytest.raises(ValueError, match="at least one; got none"):
        bench.fit_calibration([], "one")


def test_the_command_calibrates(tmp_path, capsys):
    from stabkit.calibration import Calibration, calibration

    found, _ = drawn(300, 2.0, 2)
    path = tmp_path / f"{NAME}-s0.json"
    path.write_text(dumps({"schema": verification.SCHEMA, **to_plain(found)}), encoding="utf-8")
    written = tmp_path / "calibration.json"
    assert main(["bench", "calibrate", "--folder", str(tmp_path), "--output", str(written)]) == 0
    assert "one: slope" in capsys.readouterr().out
    plain = json.loads(written.read_text(encoding="utf-8"))
    assert from_plain(Calibration, plain["one"]) == bench.fit_calibration([found], "one", sided=True)
    assert from_plain(Calibration, plain["far"]) == calibration("far")  # of which there is no cell
    other = replace(drawn(200, 2.0, 3)[0], cell=bench.cells_named([f"{NAME}-adamw"])[0])
    (tmp_path / f"{NAME}-adamw-s0.json").write_text(
        dumps({"schema": verification.SCHEMA, **to_plain(other)}), encoding="utf-8"
    )
    assert main(["bench", "calibrate", "--folder", str(tmp_path), "--output", str(written)]) == 0
    plain = json.loads(written.read_text(encoding="utf-8"))
    assert [plain[kind]["runs"] for kind in ("one", "staged", "adamw")] == [300, 500, 200]
    assert from_plain(Calibration, plain["staged"]) == bench.fit_calibration([found, other], "staged")
    (tmp_path / "none").mkdir()
    assert main(["bench", "calibrate", "--folder", str(tmp_path / "none"), "--output", str(written)]) == 2
    assert "got none" in capsys.readouterr().err
    assert main(["bench", "calibrate", "--folder", str(tmp_path / "nowhere"), "--output", str(written)]) == 2
    assert "`folder` of `calibrate` must be there" in capsys.readouterr().err
    assert main(["bench", "verify", "--folder", str(written), "--cells", NAME, "--seeds", "0", "--quick"]) == 2
    assert "stabkit bench verify: [Errno" in capsys.readouterr().err


def test_the_shipped_calibration_is_of_its_kind():
    from stabkit.calibration import KINDS, calibration

    for kind in KINDS:
        shipped = calibration(kind)
        assert shipped.kind == kind
        assert shipped.slope > 0  # P(diverge) rises with the score
        roles = {"calibration", "AdamW calibration"} if kind == "staged" else {"calibration"}
        known = {cell.key for cell in bench.CELLS if cell.role in ({"AdamW calibration"} if kind == "adamw" else roles)}
        assert set(shipped.cells) <= known
        assert kind in {"one", "far"} or set(shipped.cells) == known
    with pytest.raises(ValueError, match=r"`kind` of `calibration` must be one of .*; got 'two'"):
        calibration("two")


def test_golds_of_the_algorithms_train_as_long_as_their_originals(monkeypatch):
    """A gold of fewer epochs is one that any algorithm which harms the retain set comes near to."""

    class TrainedError(Exception):
        pass

    def noted(*_, epochs, **__):
        raise TrainedError(epochs)

    monkeypatch.setitem(EPOCHS, "digits", 3)
    monkeypatch.setattr(algorithms, "train", noted)
    cell = Cell(dataset="digits", model="mlp", deletion="random10", algorithm="", steps=2)
    with pytest.raises(TrainedError, match=r"^3$"):
        algorithms.one(cell, 0, ())
