"""How the compressed linearisation is made: Ritz residuals, power iterations, checkpoints, memory, progress."""

from __future__ import annotations

import gc
import itertools
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit.curvature import ScaledJacobian, linearise, ritz_residuals
from stabkit.curvature import jacobian as jacobian_module
from stabkit.curvature import room as room_module
from stabkit.models import MLP, SmallCNN
from stabkit.preconditioner import Diagonal, Identity
from stabkit.problem import UnlearningProblem
from tests.cases import CASES, go_by_rows
from tests.test_linearisation import dense_rows, everything, wide_problem

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
RESULTS = ("basis", "metric", "anchor", "singular_values")
SET_RESULTS = ("outputs", "features", "targets", "indices")


def random_diagonal(problem, seed=0):
    return Diagonal(torch.rand(problem.size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def same(first, second):
    """Bit for bit."""
    sets = [(getattr(first, name), getattr(second, name)) for name in ("retain", "forget")]
    return (
        all(torch.equal(getattr(first, name), getattr(second, name)) for name in RESULTS)
        and all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in sets for name in SET_RESULTS)
        and (first.captured, first.gradient_equivalents) == (second.captured, second.gradient_equivalents)
    )


# ---- Ritz residuals and power iterations


@given(
    case=st.sampled_from(CASES),
    rank=st.integers(1, 12),
    power_iterations=st.integers(0, 2),
    by_rows=st.booleans(),
    seed=st.integers(0, 100),
)
def test_ritz_residuals_are_those_of_the_dense_matrix(case, rank, power_iterations, by_rows, seed):
    problem = case.problem()
    p = random_diagonal(problem, seed)
    with pytest.MonkeyPatch.context() as patch:
        go_by_rows(patch, by_rows)
        network = everything(problem, p, rank=rank, power_iterations=power_iterations, seed=seed)
        residuals = ritz_residuals(problem, network)
    rows = torch.cat(dense_rows(problem, p.diagonal))
    matrix = rows.T @ rows
    energies = network.singular_values.square()
    dense = (matrix @ network.basis - network.basis * energies).norm(dim=0) / energies[0]
    torch.testing.assert_close(residuals, dense, rtol=1e-6, atol=1e-10)
    # What they are for: an eigenvalue lies within each.
    distance = (torch.linalg.eigvalsh(matrix).unsqueeze(1) - energies).abs().amin(0)
    assert bool((distance <= (residuals + 1e-10) * energies[0]).all())


def test_ritz_residuals_vanish_at_full_rank_and_where_nothing_moves():
    problem = wide_problem()
    assert float(ritz_residuals(problem, everything(problem, Identity(), rank=1000)).max()) < 1e-12
    still = everything(problem, Diagonal(torch.zeros(problem.size)), rank=3)
    assert ritz_residuals(problem, still).tolist() == [0.0]


def test_ritz_residuals_fall_with_power_iterations_and_with_rank():
    problem = wide_problem()
    by_power = [
        ritz_residuals(problem, everything(problem, Identity(), rank=10, power_iterations=q)) for q in (0, 1, 2, 4)
    ]
    for before, after in itertools.pairwise(by_power):
        assert float(after.norm()) < 0.7 * float(before.norm())
        assert float(after[0]) < 0.1 * float(before[0]) or float(after[0]) < 1e-12
    by_rank = [float(ritz_residuals(problem, everything(problem, Identity(), rank=r))[:5].norm()) for r in (5, 20, 60)]
    assert by_rank[0] > 2 * by_rank[1] > 4 * by_rank[2]


@pytest.mark.parametrize("rank", [3, 20])
def test_power_iterations_reach_the_best_of_the_rank(rank):
    """Halko et al. 2011, §4.5: the excess over the best shrinks geometrically."""
    problem = wide_problem()
    rows = torch.cat(dense_rows(problem, torch.ones(problem.size, dtype=torch.float64)))
    tail = float(torch.linalg.svdvals(rows)[rank:].square().sum())

    def excess(power_iterations):
        basis = everything(problem, Identity(), rank=rank, power_iterations=power_iterations).basis
        return float((rows - rows @ basis @ basis.T).square().sum()) / tail - 1

    found = [excess(q) for q in (0, 1, 3, 8)]
    assert found[0] > 0.01
    assert found[1] < 0.2 * found[0]
    assert found[2] < 0.2 * found[1]
    assert -1e-9 <= found[3] < 1e-4


def test_power_iterations_keep_the_gradients():
    """As without them: the mean gradients are in the sketch however faint, here of rank 7 + 10 + 2 with all of it kept."""
    problem = wide_problem()
    network = everything(problem, Identity(), rank=40, power_iterations=3)
    plain = everything(problem, Identity(), rank=40)
    for part in ("retain", "forget"):
        gradient = getattr(everything(problem, Identity(), rank=1000), part)
        whole = float(gradient.factors(problem.loss).mean_gradient().norm())
        for found in (network, plain):
            held = float(getattr(found, part).factors(problem.loss).mean_gradient().norm())
            assert held == pytest.approx(whole, rel=0.05)


@pytest.mark.parametrize("tolerance", [0.2, 0.02])
def test_growth_with_power_iterations_is_near_the_best_too(monkeypatch, tolerance):
    monkeypatch.setattr(room_module, "FIRST_RANK", 5)
    problem = wide_problem()
    found = everything(problem, Identity(), rank=None, tolerance=tolerance, power_iterations=1, seed=2)
    assert found.rank > 5
    rows = torch.cat(dense_rows(problem, torch.ones(problem.size, dtype=torch.float64)))
    tail = torch.linalg.svdvals(rows)[found.rank :].square().sum()
    error = (rows - rows @ found.basis @ found.basis.T).square().sum()
    assert float(error) <= 1.15 * float(tail)


def test_ritz_residuals_of_another_problem_are_refused():
    network = everything(wide_problem(), Identity(), rank=3)
    with pytest.raises(
        ValueError, match=r"`network` of `ritz_residuals` .* \(200, 49, 1\); got one of \(200, 35, 15\)"
    ):
        ritz_residuals(wide_problem(forget=1), network)


# ---- checkpoints


class KilledError(Exception):
    """What a test's kill raises."""


def killed_after(monkeypatch, problem, products):
    """Kill in the passes over the network that come after so many."""
    original, left = problem.outputs, [products]

    def dying(parameters, inputs):
        left[0] -= 1
        if left[0] < 0:
            raise KilledError
        return original(parameters, inputs)

    monkeypatch.setattr(problem, "outputs", dying)


SETTINGS = {"rank": 12, "power_iterations": 1, "seed": 4, "retain_samples": 30, "forget_samples": None}


@pytest.mark.parametrize(
    ("passes", "by_rows", "growing"),
    [
        *((p, b, False) for p in (7, 12, 20, 33, 45) for b in (True, False)),
        *((p, False, True) for p in (12, 70, 115, 145)),
        (70, True, True),
        *((p, b, None) for p in (7, 20, 33, 45) for b in (True, False)),
    ],
)
def test_a_killed_run_resumes_with_the_same_result(tmp_path, monkeypatch, passes, by_rows, growing):
    """Where it grows, where it does not, and where directions are drawn from few of the samples (None)."""
    problem, path = wide_problem(), tmp_path / "state.npz"
    p = random_diagonal(problem)
    monkeypatch.setattr(room_module, "FIRST_RANK", 5)
    monkeypatch.setattr(jacobian_module, "PRODUCT_BATCH", 4)
    go_by_rows(monkeypatch, by_rows)
    settings = {**SETTINGS, "rank": None, "tolerance": 0.15} if growing else SETTINGS
    if growing is None:
        settings = {**SETTINGS, "rank": 2, "sketch_samples": 25}
    whole = linearise(problem, p, checkpoint=tmp_path / "whole.npz", **settings)
    with monkeypatch.context() as patch:
        killed_after(patch, problem, passes)
        with pytest.raises(KilledError):
            linearise(problem, p, checkpoint=path, checkpoint_every=1, **settings)
    assert sorted(os.listdir(tmp_path)) == ["state.npz", "whole.npz"]
    resumed = linearise(problem, p, checkpoint=str(path), checkpoint_every=1, **settings)
    assert same(whole, resumed)
    quick = linearise(problem, p, **settings)  # keeps rows, which is a matter of cost alone
    assert quick.gradient_equivalents < whole.gradient_equivalents if by_rows else same(whole, quick)
    assert same(whole, replace(quick, gradient_equivalents=whole.gradient_equivalents))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("power_iterations", [0, 1])
def test_rows_are_kept_as_far_as_they_fit_and_change_nothing(monkeypatch, share, power_iterations):
    go_by_rows(monkeypatch, True)
    monkeypatch.setattr(jacobian_module, "PRODUCT_BATCH", 4)
    problem, asked = wide_problem(), {**SETTINGS, "rank": 2, "sketch_samples": 24, "power_iterations": power_iterations}
    one = 2 * problem.size * 8  # bytes of a sample's two rows
    kept, rows = [], jacobian_module.ScaledJacobian._rows

    def watched(self, inputs, place):
        found = rows(self, inputs, place)
        kept.append((id(self), self._kept_bytes()))
        return found

    monkeypatch.setattr(jacobian_module.ScaledJacobian, "_rows", watched)
    with monkeypatch.context() as patch:
        patch.setattr(room_module.Room, "spare", lambda self, rank: 0.0)
        plain = linearise(problem, Identity(), **asked)
    assert max(size for _, size in kept) == 0
    kept.clear()
    drawn = [24, 15] if power_iterations == 0 else [30, 15]  # with power iterations all that are held
    monkeypatch.setattr(room_module.Room, "spare", lambda self, rank: share * sum(drawn) * one)
    quick = linearise(problem, Identity(), **asked)
    assert same(plain, replace(quick, gradient_equivalents=plain.gradient_equivalents))
    most = [max(size for of, size in kept if of == which) for which in dict(kept)]
    assert sum(most) <= share * sum(drawn) * one
    walks = 1 + 2 * power_iterations  # after the first
    assert plain.gradient_equivalents - quick.gradient_equivalents == 2 * walks * sum(most) / one
    assert share == 0 or sum(most) > (share - 0.2) * sum(drawn) * one


def test_kept_rows_are_let_go_of_where_memory_runs_out(monkeypatch):
    go_by_rows(monkeypatch, True)
    monkeypatch.setattr(jacobian_module, "PRODUCT_BATCH", 4)
    problem, asked = wide_problem(), {**SETTINGS, "rank": 2, "power_iterations": 1}
    plain = linearise(problem, Identity(), **asked)
    rows, calls = jacobian_module.ScaledJacobian._rows, []

    def failing(self, inputs, place):
        if self._kept and len(calls) < 3 and place.start > 4:
            calls.append(place)
            raise torch.OutOfMemoryError("out of memory")
        return rows(self, inputs, place)

    monkeypatch.setattr(jacobian_module.ScaledJacobian, "_rows", failing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # batches are as large as before
        found = linearise(problem, Identity(), **asked)
    assert calls
    assert found.gradient_equivalents > plain.gradient_equivalents
    assert same(plain, replace(found, gradient_equivalents=plain.gradient_equivalents))


def test_a_budget_of_memory_is_kept_with_the_rows(monkeypatch):
    go_by_rows(monkeypatch, True)
    problem = wide_problem()
    given, keep = [], ScaledJacobian.keep_rows

    def watched(self, first, memory):
        given.append(memory)
        keep(self, first, memory)

    monkeypatch.setattr(ScaledJacobian, "keep_rows", watched)
    rows = 2 * 50
    needed = 2 * (problem.size + rows) * 8 * (12 + 10 + room_module.EXTRA)
    for budget in (4 * needed // 3 + 8, 3 * needed):
        given.clear()
        linearise(problem, Identity(), memory=budget, **{**SETTINGS, "retain_samples": None})
        assert sum(given) <= budget - budget // 4 - needed + 1 or sum(given) == 0
    assert sum(given) > 0


def test_a_resumed_run_repeats_no_more_than_it_says(tmp_path, monkeypatch):
    go_by_rows(monkeypatch, True)
    problem, path = wide_problem(), tmp_path / "state"
    monkeypatch.setattr(jacobian_module, "PRODUCT_BATCH", 4)
    rows, done, killed = jacobian_module.jacobian_rows, [0], []

    def counted(problem, inputs):
        result = rows(problem, inputs)
        done[0] += len(result)
        if not killed and done[0] >= 52:
            killed.append(True)
            raise KilledError
        return result

    monkeypatch.setattr(jacobian_module, "jacobian_rows", counted)
    with pytest.raises(KilledError):
        everything(problem, Identity(), rank=12, checkpoint=path, checkpoint_every=10)
    everything(problem, Identity(), rank=12, checkpoint=path, checkpoint_every=10)
    # Two walks over 50 samples; 10 and one batch of 4 at most were walked twice.
    assert 100 < done[0] <= 100 + 10 + 4
    done[0] = 100
    everything(problem, Identity(), rank=12, checkpoint=path)
    assert done[0] == 100  # it was finished


def test_a_found_rank_may_grow_on_with_a_tighter_tolerance(tmp_path, monkeypatch):
    problem, path = wide_problem(), tmp_path / "state"
    monkeypatch.setattr(room_module, "FIRST_RANK", 5)
    settings = {"rank": None, "seed": 1}
    first = everything(problem, Identity(), tolerance=0.3, checkpoint=path, **settings)
    second = everything(problem, Identity(), tolerance=0.02, checkpoint=path, **settings)
    assert first.rank < second.rank
    assert same(second, everything(problem, Identity(), tolerance=0.02, **settings))


@pytest.fixture
def written(tmp_path):
    problem, path = wide_problem(), tmp_path / "state"
    everything(problem, Identity(), rank=6, checkpoint=path)
    return problem, path


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"rank": 7}, r"`checkpoint` of `linearise`.*state' with rank 6, not 7"),
        ({"rank": None}, r"with rank 6, not None"),
        ({"seed": 1}, r"with seed 0, not 1"),
        ({"power_iterations": 1}, r"with power_iterations 0, not 1"),
        ({"retain_samples": 20}, r"with retain_samples 35, not 20"),
        ({"forget_samples": 3}, r"with forget_samples 15, not 3"),
        ({"sketch_samples": 20}, r"with sketch_samples 96, not 20"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(written, setting, message):
    problem, path = written
    with pytest.raises(ValueError, match=message):
        everything(problem, Identity(), **{"rank": 6, "checkpoint": path, **setting})


def test_a_checkpoint_of_another_problem_is_refused(written):
    problem, path = written
    sets = [list(samples.batch(torch.arange(samples.size))) for samples in (problem.forget, problem.retain)]

    def refused(message, model=None, preconditioner=None, **changed):
        forget, retain = sets
        other = UnlearningProblem(model or problem.new_model(), tuple(forget), tuple(retain), loss="mse", **changed)
        with pytest.raises(ValueError, match=message):
            everything(other, preconditioner or Identity(), rank=6, checkpoint=path)

    refused(r"with dtype 'torch\.float64', not 'torch\.float32'", dtype=torch.float32)
    refused(r"with order 200, not 211", model=MLP(8, 2, hidden=(19,), activation=nn.Tanh).double())
    moved = problem.new_model()
    with torch.no_grad():
        next(moved.parameters())[0, 0] += 1e-12
    refused(r"state', whose weights differs by \S+ where 0 is rounding", model=moved)
    refused(r"whose preconditioner differs by", preconditioner=random_diagonal(problem))
    sets[1][1] = sets[1][1] + 0.01
    refused(r"whose loss derivatives differs by")
    sets[1][0] = sets[1][0] + 0.01
    refused(r"whose outputs differs by")


def test_a_checkpoint_of_a_spectrum_is_refused(written, tmp_path):
    problem, path = written
    from stabkit.curvature import GGNOperator
    from stabkit.spectrum import spectral_density

    operator = GGNOperator(problem, problem.retain)
    with pytest.raises(ValueError, match=r"with format 'stabkit linearisation state 2', not 'stabkit density state 2'"):
        spectral_density(operator, n_probes=2, steps=3, checkpoint=path)


def test_a_damaged_checkpoint_is_refused(written):
    problem, path = written
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"`checkpoint` of `linearise` must be a file that it wrote; got '.*state'"):
        everything(problem, Identity(), rank=6, checkpoint=path)


def test_checkpoint_arguments_are_checked(tmp_path):
    problem = wide_problem()
    with pytest.raises(ValueError, match=r"must lie in an existing directory; got '.*missing/state'"):
        everything(problem, Identity(), checkpoint=tmp_path / "missing" / "state")
    with pytest.raises(TypeError, match=r"`checkpoint` of `linearise` must be a path or None; got 3"):
        everything(problem, Identity(), checkpoint=3)
    with pytest.raises(ValueError, match=r"`checkpoint_every` of `linearise` .* >= 1; got 0"):
        everything(problem, Identity(), checkpoint_every=0)
    with pytest.raises(ValueError, match=r"`power_iterations` of `linearise` .* >= 0; got -1"):
        everything(problem, Identity(), power_iterations=-1)
    with pytest.raises(TypeError, match=r"`memory` of `linearise` must be a whole number or text; got 1\.5"):
        everything(problem, Identity(), memory=1.5)


def test_the_file_holds_plain_arrays(written):
    _, path = written
    with np.load(path, allow_pickle=False) as file:
        assert all(file[name].dtype != object for name in file.files)
        assert file["basis"].shape == (200, 18)


# ---- memory


def bytes_of(problem, columns, samples=50, outputs=2):
    """Basis and features with as much again to make them from, in three quarters of the budget."""
    return 2 * 8 * (problem.size + samples * outputs) * columns * 4 // 3 + 4


def test_a_budget_is_an_error_before_anything_is_computed(monkeypatch):
    problem = wide_problem()
    enough = bytes_of(problem, 30 + 28)
    network = everything(problem, Identity(), rank=30, memory=enough)
    assert network.rank == 30
    killed_after(monkeypatch, problem, 4)  # what tells O of either set, twice
    with pytest.raises(
        ValueError,
        match=rf"`memory` of `linearise` must hold the basis and the features of rank 31, .* got {enough}, of which "
        r".* MB are for them\. Lower `rank` to 30, or `retain_samples` and `forget_samples`, or give more memory",
    ):
        everything(problem, Identity(), rank=31, memory=enough, hold=True)
    with pytest.raises(ValueError, match=r"features of rank 1, 0\.133 MB; got '10KB'.* Lower `retain_samples` and"):
        everything(problem, Identity(), rank=1, memory="10KB", hold=True)


def test_what_has_to_be_held_and_does_not_fit_is_refused_without_a_budget(monkeypatch):
    problem = wide_problem()
    monkeypatch.setattr(room_module, "free_memory", lambda device: 2 * 8 * 300 * (30 + 28))
    everything(problem, Identity(), rank=30)
    for settings in ({"hold": True}, {"power_iterations": 1}):
        with pytest.raises(ValueError, match=r"rank 31, .* got None, .* Lower `rank` to 30"):
            everything(problem, Identity(), rank=31, **settings)


def test_growth_stops_at_the_budget_and_says_so(monkeypatch):
    monkeypatch.setattr(room_module, "FIRST_RANK", 5)
    problem = wide_problem()
    settings = {"rank": None, "tolerance": 0.01}
    free = everything(problem, Identity(), **settings)
    assert free.rank > 10
    with pytest.warns(
        stabkit.MemoryWarning, match=r"stops at rank 10, which captures \d\d\.\d% .* not 99\.0%: .* rank 20"
    ):
        network = everything(problem, Identity(), memory=bytes_of(problem, 10 + 28), **settings)
    assert network.rank == 10


@pytest.mark.parametrize(("memory", "by_rows"), [(None, True), (10**9, True), (15_000, True), (3000, False)])
def test_the_memory_of_a_pass_decides_on_rows_and_batches(monkeypatch, memory, by_rows):
    """A row of two outputs takes 3200 bytes of which a pass needs twice as many; four vectors as many of one."""
    problem = wide_problem()
    seen = {"rows": [], "columns": []}
    rows, pull = jacobian_module.jacobian_rows, jacobian_module.vjp_block

    def noted_rows(problem, inputs):
        seen["rows"].append(len(inputs))
        return rows(problem, inputs)

    def noted_pull(problem, inputs, cotangents, *, at_once, **settings):
        seen["columns"].append(at_once)
        return pull(problem, inputs, cotangents, at_once=at_once, **settings)

    go_by_rows(monkeypatch, True)
    monkeypatch.setattr(jacobian_module, "jacobian_rows", noted_rows)
    monkeypatch.setattr(jacobian_module, "vjp_block", noted_pull)
    jacobian = ScaledJacobian(problem, problem.retain, torch.arange(35), Identity(), memory=memory)
    u = torch.randn(35, 2, 5, dtype=torch.float64)
    expected = (
        torch.einsum("mod,mok->dk", dense_rows(problem, torch.ones(200).double())[0].view(35, 2, -1), u) * 35**0.5
    )
    torch.testing.assert_close(jacobian.transpose_matmul(u), expected)
    assert jacobian.by_rows(5) == by_rows
    assert max(seen["rows"], default=0) == ({None: 35, 10**9: 35, 15_000: 2}[memory] if by_rows else 0)
    assert seen["columns"] == ([] if by_rows else [1])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), RuntimeError("CPU: can't allocate memory: 8")])
@pytest.mark.parametrize("by_rows", [True, False])
def test_out_of_memory_halves_the_samples_of_a_pass_and_is_told(monkeypatch, error, by_rows):
    problem = wide_problem()
    go_by_rows(monkeypatch, by_rows)
    expected = everything(problem, Identity(), rank=8, seed=1)
    passes = {n: getattr(jacobian_module, n) for n in ("jacobian_rows", "vjp_block", "jvp_block")}
    taken = []

    def small(n):
        def limited(problem, inputs, *rest, **settings):
            taken.append(len(inputs))
            if len(inputs) > 10:
                raise error
            return passes[n](problem, inputs, *rest, **settings)

        return limited

    for n in passes:
        monkeypatch.setattr(jacobian_module, n, small(n))
    with pytest.warns(stabkit.MemoryWarning) as caught:
        network = everything(problem, Identity(), rank=8, seed=1)
    told = [str(w.message) for w in caught]
    # 35 retain samples: 17 and then 8 at a time; 15 forget samples: 7. Thereafter it stays small.
    assert [t.split("go on with ")[1].split(" ")[0] for t in told] == ["17", "8", "7"]
    assert sum(t > 10 for t in taken) == 3
    torch.testing.assert_close(network.singular_values, expected.singular_values)
    torch.testing.assert_close(network.basis.abs(), expected.basis.abs(), rtol=1e-6, atol=1e-9)
    assert network.gradient_equivalents == expected.gradient_equivalents


@pytest.mark.parametrize("function", ["vjp", "jvp", "jacrev"])
def test_memory_that_runs_out_is_not_taken_for_a_missing_derivative(monkeypatch, function):
    """The slower way that stands in for an unsupported transform would need as much or more."""
    problem = wide_problem()
    inputs, _ = problem.retain.batch(torch.arange(3))

    def fails(*arguments, **settings):
        def failing(*_):
            raise torch.OutOfMemoryError("out of memory")

        return failing

    monkeypatch.setattr(jacobian_module, "vmap", fails)
    calls = {
        "vjp": lambda: jacobian_module.vjp_block(problem, inputs, torch.ones(3, 2, 2, dtype=torch.float64)),
        "jvp": lambda: jacobian_module.jvp_block(problem, inputs, torch.ones(200, 2, dtype=torch.float64)),
        "jacrev": lambda: jacobian_module.jacobian_rows(problem, inputs),
    }
    with pytest.raises(torch.OutOfMemoryError):
        calls[function]()


def test_nothing_left_to_halve_is_an_error_and_other_errors_pass(monkeypatch):
    go_by_rows(monkeypatch, True)
    problem = wide_problem()
    jacobian = ScaledJacobian(problem, problem.retain, torch.arange(2), Identity())

    def fails(error):
        def failing(*_):
            raise error

        monkeypatch.setattr(jacobian_module, "jacobian_rows", failing)

    fails(RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        jacobian @ torch.ones(200, 5, dtype=torch.float64)
    fails(torch.OutOfMemoryError("out of memory"))
    with (
        pytest.warns(stabkit.MemoryWarning, match="go on with 1 samples at a time"),
        pytest.raises(MemoryError, match=r"a product of 5 vectors with the Jacobian ran out of memory .* Lower `rank`"),
    ):
        jacobian @ torch.ones(200, 5, dtype=torch.float64)


# ---- progress and manners


def test_progress_goes_to_stderr_alone(capsys):
    problem = wide_problem()
    network = everything(problem, Identity(), rank=6, progress=True)
    ritz_residuals(problem, network, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "linearise, rank 6" in err
    assert "ritz_residuals" in err
    assert "/100 " in err  # two walks over 50 samples
    everything(problem, Identity(), rank=6)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("settings", [{"rank": 3}, {"rank": 3, "power_iterations": 2}, {"rank": None}])
def test_nothing_large_is_left_for_the_garbage_collector(settings):
    """An accelerator's memory would stay taken until Python next looks for cycles."""
    subject = wide_problem()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        linearise(subject, Identity(), retain_samples=8, forget_samples=4, **settings)
        gc.collect()
        left = [found for found in gc.garbage if isinstance(found, torch.Tensor) and found.numel() >= subject.size]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not left


def test_nothing_is_touched(tmp_path):
    problem = wide_problem()
    before, weights = torch.get_rng_state(), problem.vector().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error", stabkit.StabkitWarning)
        network = everything(
            problem, Identity(), rank=None, power_iterations=1, memory="1GB", checkpoint=tmp_path / "state"
        )
        ritz_residuals(problem, network)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(weights, problem.vector())


@pytest.mark.parametrize(("kind", "expected"), [("dense", False), ("convolutions", True)])
def test_rows_are_multiplied_where_that_is_less_work(monkeypatch, kind, expected):
    """Of fully connected layers a pass is no more work than a row times a vector; convolutions use weights many times."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), MLP(144, 3, hidden=(20,))) if kind == "dense" else SmallCNN(1, 12, 3)
    x, y = torch.randn(14, 1, 12, 12, generator=torch.Generator().manual_seed(1)), torch.arange(14) % 3
    problem = UnlearningProblem(model.double(), (x[:4].double(), y[:4]), (x[4:].double(), y[4:]))
    inputs, _ = problem.retain.batch(torch.arange(1))
    outputs, operations = jacobian_module.forward_size(problem, inputs)
    assert outputs == 3
    if kind == "dense":
        assert operations == 2 * sum(p.numel() for p in model.parameters() if p.dim() > 1)
    g = torch.Generator().manual_seed(2)
    block = torch.randn(problem.size, 30, generator=g, dtype=torch.float64)
    cotangents = torch.randn(10, 3, 30, generator=g, dtype=torch.float64)
    made = []
    rows = jacobian_module.jacobian_rows
    monkeypatch.setattr(jacobian_module, "jacobian_rows", lambda *given: made.append(1) or rows(*given))
    jacobian = ScaledJacobian(problem, problem.retain, torch.arange(10), Identity())
    pushed, pulled = jacobian @ block, jacobian.transpose_matmul(cotangents)
    assert bool(made) == expected == jacobian.by_rows(30)
    assert jacobian.passes(30) == 3  # what is less work than three passes counts as three
    other = ScaledJacobian(problem, problem.retain, torch.arange(10), Identity())
    monkeypatch.setattr(other, "by_rows", lambda vectors: not expected)
    torch.testing.assert_close(other @ block, pushed)
    torch.testing.assert_close(other.transpose_matmul(cotangents), pulled)
    assert not jacobian.by_rows(2)  # fewer vectors than outputs
    assert jacobian.passes(2) == 2


@given(outputs=st.integers(1, 50), vectors=st.integers(1, 200), size=st.integers(1, 10**6), reuse=st.floats(0.5, 300))
def test_rows_pay_the_more_often_a_pass_uses_each_weight(outputs, vectors, size, reuse):
    operations = int(2 * size * reuse) + 1

    def pays(operations):
        return jacobian_module.rows_pay(outputs, vectors, size=size, operations=operations)

    assert pays(operations) == (outputs * (operations + size * vectors) <= vectors * operations)
    assert pays(0)
    if outputs < vectors and pays(operations):
        assert pays(2 * operations)
