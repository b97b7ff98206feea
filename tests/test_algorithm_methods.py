"""What each published method does in one step, against its formula written out with autograd or torch.optim."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stabkit.algorithms import NPO, SCRUB, FineTune, GradDiff, L1Sparse, RandomLabels, RemainNewton, SalUn, SFROn
from stabkit.algorithms.base import Batch
from stabkit.algorithms.random_labels import random_label_residual
from stabkit.losses import CrossEntropy, SquaredError, resolve_loss
from stabkit.models import MLP
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from tests.cases import CASES, dense_ggn, mean_loss
from tests.test_rollout import compare_to_run

pytestmark = pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")


def problem_of(seed=0, *, n_forget=6, n_retain=14, loss="cross_entropy"):
    g = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(4, 3, hidden=(5,), activation=nn.Tanh).double()
    n = n_forget + n_retain
    x, y = torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)
    y = y if loss == "cross_entropy" else F.one_hot(y, 3).double()
    return UnlearningProblem(model, (x[:n_forget], y[:n_forget]), (x[n_forget:], y[n_forget:]), loss=loss)


def full(problem):
    """Batches of whole sets, so that a step is one of full gradients."""
    return {"batch_size": problem.retain.size, "forget_batch_size": problem.forget.size}


def final_vector(problem, result):
    own = dict(result.model.named_parameters())
    return torch.cat([own[name].detach().reshape(-1) for name in problem.parameters])


def outputs_of(problem, samples, theta):
    return problem.outputs(problem.unflatten(theta), samples.batch(torch.arange(samples.size))[0])


def gradient(problem, objective, theta):
    leaf = theta.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf), leaf)[0]


def per_sample_gradients(problem, samples):
    rows = []
    for i in range(samples.size):
        inputs, target = samples.batch(torch.tensor([i]))
        leaf = problem.vector().requires_grad_()
        loss = problem.loss.per_sample(problem.outputs(problem.unflatten(leaf), inputs), target)[0]
        rows.append(torch.autograd.grad(loss, leaf)[0])
    return torch.stack(rows)


# ------------------------------------------------------------------ random labels, SalUn


def test_random_labels_descends_on_the_labels_it_draws():
    problem = problem_of()
    algorithm = RandomLabels(lr=0.3, mix=0.25, steps=3, **full(problem))
    theta = problem.vector()
    order = {s.name: torch.Generator().manual_seed(2 * 5 + i) for i, s in enumerate((problem.retain, problem.forget))}
    for step in range(1, 4):
        torch.randperm(problem.retain.size, generator=order["retain"])
        visited = torch.randperm(problem.forget.size, generator=order["forget"])
        drawn = np.random.default_rng([5, step]).integers(3, size=problem.forget.size)
        labels = torch.empty_like(visited)
        labels[visited] = torch.from_numpy(drawn)

        def objective(leaf, labels=labels):
            forget = F.cross_entropy(outputs_of(problem, problem.forget, leaf), labels)
            return 0.75 * mean_loss(problem, "retain")(leaf) + 0.25 * forget

        theta = theta - 0.3 * gradient(problem, objective, theta)
    result = run(problem, algorithm, seed=5, stop_on_divergence=False)
    torch.testing.assert_close(final_vector(problem, result), theta, rtol=1e-10, atol=1e-12)


def batch_of(outputs, targets, **changes):
    settings = {"original": None, "copies": 1, "step": 1, "seeds": (0,), **changes}
    return Batch(outputs=outputs, targets=targets, **settings)


def test_labels_are_uniform_fresh_at_every_step_and_the_same_for_all_settings():
    outputs, targets = torch.zeros(4000, 5), torch.zeros(4000, dtype=torch.int64)

    def labels(**changes):
        residual = random_label_residual(CrossEntropy(), batch_of(outputs, targets, **changes))
        return residual.argmax(1)  # minus (softmax - onehot): largest at the label

    first = labels()
    counts = torch.bincount(first, minlength=5) / 4000
    assert float((counts - 0.2).abs().max()) < 5 * (0.2 * 0.8 / 4000) ** 0.5
    assert torch.equal(first, labels())
    for other in (labels(step=2), labels(seeds=(1,))):
        assert float((first == other).double().mean()) == pytest.approx(0.2, abs=0.04)
    copies = labels(copies=4).view(4, 1000)
    assert bool((copies == copies[0]).all())


def test_positions_without_a_label_get_none():
    problem = CASES[4].problem()  # a language model
    inputs, targets = problem.forget.batch(torch.arange(problem.forget.size))
    outputs = problem.outputs(problem.parameters, inputs).detach()
    residual = random_label_residual(problem.loss, batch_of(outputs, targets))
    own = problem.loss.residual(outputs, targets)
    assert torch.equal((residual == 0).all(-1), (own == 0).all(-1))
    assert bool((own[0] == 0).all(-1).any())


@pytest.mark.parametrize("algorithm", [RandomLabels(batch_size=2), SalUn(batch_size=2)])
def test_random_labels_need_classes(algorithm):
    message = (
        f"`loss` of a problem for `{type(algorithm).__name__}` must be 'cross_entropy' .*; got 'mse'. Use GradDiff"
    )
    with pytest.raises(ValueError, match=message):
        run(problem_of(loss="mse"), algorithm)
    with pytest.raises(TypeError, match="`loss` of `random_label_residual` must be a cross-entropy; got 'mse'"):
        random_label_residual(SquaredError(), batch_of(torch.zeros(2, 1), torch.zeros(2, 1)))
    run(problem_of(loss="mse"), SalUn(steps=1, batch_size=2, forgetting="ascent"), stop_on_divergence=False)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_saluns_mask_is_of_the_largest_mean_gradients(share):
    problem = problem_of()
    mean = gradient(problem, mean_loss(problem, "forget"), problem.vector()).abs()
    mask = SalUn(share=share).preconditioner(problem).diagonal
    count = round(share * problem.size)
    assert sorted(mask.unique().tolist()) == ([1.0] if share == 1 else [0.0, 1.0])
    assert int(mask.sum()) == count
    kept, dropped = mean[mask == 1], mean[mask == 0]
    assert dropped.numel() == 0 or float(kept.min()) >= float(dropped.max())
    assert SalUn().preconditioner_cost(problem) == problem.forget.size


def test_salun_leaves_what_is_masked_exactly_where_it_is():
    problem = problem_of()
    algorithm = SalUn(lr=0.1, steps=5, batch_size=3, momentum=0.9, weight_decay=0.1)
    theta = final_vector(problem, run(problem, algorithm, stop_on_divergence=False))
    mask = algorithm.preconditioner(problem).diagonal
    moved = theta != problem.vector()
    assert torch.equal(moved, mask == 1)


def test_salun_of_all_weights_is_random_labels_or_ascent():
    problem = problem_of()
    settings = {"lr": 0.1, "steps": 4, "batch_size": 3}
    for forgetting, plain in (("random_labels", RandomLabels), ("ascent", GradDiff)):
        algorithm = SalUn(share=1.0, forgetting=forgetting, **settings)
        pair = [run(problem, a, stop_on_divergence=False) for a in (algorithm, plain(**settings))]
        torch.testing.assert_close(*(final_vector(problem, r) for r in pair), rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------ l1-sparse


def test_the_l1_pull_falls_to_zero_over_the_run():
    problem = problem_of()
    algorithm = L1Sparse(lr=0.2, steps=4, penalty=0.3, **full(problem))
    theta = problem.vector()
    for k in range(4):
        penalty = 0.3 * (1 - k / 4)

        def objective(leaf, penalty=penalty):
            return mean_loss(problem, "retain")(leaf) + penalty * leaf.abs().sum()

        theta = theta - 0.2 * gradient(problem, objective, theta)
    result = run(problem, algorithm, stop_on_divergence=False)
    torch.testing.assert_close(final_vector(problem, result), theta, rtol=1e-10, atol=1e-12)
    plain = run(problem, FineTune(lr=0.2, steps=4, **full(problem)), stop_on_divergence=False)
    bare = run(problem, algorithm.replace(penalty=0.0), stop_on_divergence=False)
    assert torch.equal(final_vector(problem, bare), final_vector(problem, plain))
    assert float(theta.abs().sum()) < float(final_vector(problem, plain).abs().sum())


# ------------------------------------------------------------------ shorter runs


@pytest.mark.parametrize(
    "algorithm",
    [
        GradDiff(steps=30, lr_schedule="cosine", forget_schedule="linear", forget_every=4),
        GradDiff(steps=30, lr_schedule="warmup"),
        GradDiff(steps=30, forget_schedule=[1 - k / 60 for k in range(30)]),
        SCRUB(steps=30),
        SCRUB(steps=30, forget_share=0.0),
        SFROn(steps=30),
        L1Sparse(steps=30, penalty=0.0),
    ],
    ids=lambda a: a.name,
)
def test_a_shortened_run_is_the_beginning_of_the_longer_one(algorithm):
    for steps in range(1, 31):
        cut = algorithm.shortened(steps)
        assert type(cut) is type(algorithm)
        assert cut.plan() == algorithm.plan()[:steps]
    assert algorithm.shortened(30) is algorithm


def test_a_run_that_no_settings_shorten_is_not_shortened():
    class FromTheEnd(GradDiff):
        name = "from_the_end"

        def plan(self):
            return tuple(dataclasses.replace(p, lr=self.steps - k) for k, p in enumerate(super().plan()))

    for algorithm in (L1Sparse(steps=30), FromTheEnd(steps=30)):
        assert algorithm.shortened(8) is None
        assert algorithm.shortened(30) is algorithm
    with pytest.raises(
        ValueError, match=r"`steps` of `GradDiff.shortened` must be .* in \[1, 30\]; got 31. The run has 30"
    ):
        GradDiff(steps=30).shortened(31)


# ------------------------------------------------------------------ SCRUB


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_scrub_climbs_the_divergence_and_descends_loss_and_divergence(loss):
    problem = problem_of(loss=loss)
    tau, gamma, delta = 2.0, 0.9, 0.2
    algorithm = SCRUB(
        lr=0.3,
        mix=0.4,
        steps=6,
        momentum=0.0,
        weight_decay=0.0,
        lr_schedule=None,
        forget_every=2,
        forget_share=0.5,
        temperature=tau,
        loss_weight=gamma,
        divergence_weight=delta,
        **full(problem),
    )
    start = {s.name: outputs_of(problem, s, problem.vector()) for s in (problem.retain, problem.forget)}

    def divergence(samples, leaf):
        before, now = start[samples.name], outputs_of(problem, samples, leaf)
        if loss == "mse":
            return (now - before).square().mean()
        kl = F.kl_div((now / tau).log_softmax(1), (before / tau).softmax(1), reduction="batchmean")
        return tau**2 * kl

    def down(leaf):
        return gamma * mean_loss(problem, "retain")(leaf) + delta * divergence(problem.retain, leaf)

    theta = problem.vector()
    for k in range(6):
        if k < 3 and k % 2 == 0:
            theta = theta + 0.3 * 0.8 * gradient(problem, lambda leaf: divergence(problem.forget, leaf), theta)
        else:
            theta = theta - 0.3 * 1.2 * gradient(problem, down, theta)
        if k == 0:
            torch.testing.assert_close(theta, problem.vector(), rtol=1e-12, atol=1e-14)  # KL has no gradient at θ*
    result = run(problem, algorithm, stop_on_divergence=False)
    torch.testing.assert_close(final_vector(problem, result), theta, rtol=1e-9, atol=1e-11)


def test_scrubs_max_steps_end_with_their_share_of_the_run():
    plan = SCRUB(steps=12, forget_every=3, forget_share=0.5).plan()
    assert [k for k, p in enumerate(plan) if p.forget] == [0, 3]  # step 6 begins the second half
    assert [(p.retain, p.forget) for p in plan[:2]] == [(0, 2), (2, 0)]
    assert all(p.retain == 2 for p in plan[4:])


def test_scrub_counts_the_original_models_passes():
    problem = problem_of()
    algorithm = SCRUB(steps=4, forget_every=2, forget_share=1.0, batch_size=6, forget_batch_size=3)
    result = run(problem, algorithm, monitor_samples=1, check_every=4, stop_on_divergence=False)
    assert result.gradient_equivalents == pytest.approx((2 * 6 + 2 * 3) * 4 / 3 + 5 * 2 / 3)


# ------------------------------------------------------------------ NPO


def answer(outputs, targets, causal):
    """ln π of every sample's whole answer, as the released code sums it."""
    if causal:
        outputs, targets = outputs[:, :-1].transpose(1, 2), targets[:, 1:]
    losses = F.cross_entropy(outputs, targets, ignore_index=-100, reduction="none")
    return -losses.sum(-1) if causal else -losses


def npo_loss(outputs, original, targets, beta, causal):
    """-(2/β) E log σ(-β log(π_θ/π_θ*)), as the paper writes it."""
    ratio = answer(outputs, targets, causal) - answer(original, targets, causal)
    return -2 / beta * F.logsigmoid(-beta * ratio).mean()


def answers(causal, seed=0):
    """Outputs now and at θ*, and targets: answers of one to four tokens after questions, or one label each."""
    g = torch.Generator().manual_seed(seed)
    shape = (12, 6, 5) if causal else (12, 5)
    outputs, original = (2 * torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, 5, shape[:-1], generator=g)
    for row in range(12 if causal else 0):
        targets[row, : 1 + row % 2] = -100
        targets[row, 2 + row % 4 + row % 2 :] = -100
    return outputs, original, targets, resolve_loss("causal_lm" if causal else "cross_entropy")


@pytest.mark.parametrize("causal", [False, True], ids=["classes", "answers"])
@pytest.mark.parametrize("beta", [0.02, 0.1, 2.0])
def test_npos_residual_is_the_derivative_of_its_loss(causal, beta):
    outputs, original, targets, loss = answers(causal)
    leaf = outputs.clone().requires_grad_()
    (down,) = torch.autograd.grad(12 * npo_loss(leaf, original, targets, beta, causal), leaf)
    climbed = NPO(beta=beta).forget_residual(loss, batch_of(outputs, targets, original=original))
    torch.testing.assert_close(climbed, -down, rtol=1e-12, atol=1e-14)
    repeated = [t.repeat(3, *[1] * (t.dim() - 1)) for t in (outputs, targets, original)]
    together = batch_of(repeated[0], repeated[1], original=repeated[2], copies=3)
    torch.testing.assert_close(
        NPO(beta=beta).forget_residual(loss, together), climbed.repeat(3, *[1] * (climbed.dim() - 1))
    )
    if causal:
        labelled = F.pad(targets[:, 1:], (0, 1), value=-100) != -100
        assert {1, 2, 4} <= set(labelled.sum(1).tolist())
        assert not bool(climbed[~labelled].any())


@pytest.mark.parametrize("causal", [False, True], ids=["classes", "answers"])
def test_without_temperature_npo_is_ascent_on_the_answers(causal):
    outputs, original, targets, loss = answers(causal)
    leaf = outputs.clone().requires_grad_()
    (up,) = torch.autograd.grad(-answer(leaf, targets, causal).sum(), leaf)  # gradient ascent on summed tokens
    batch = batch_of(outputs, targets, original=original)
    torch.testing.assert_close(NPO(beta=1e-9).forget_residual(loss, batch), up, rtol=1e-7, atol=1e-9)
    unmoved = batch_of(original, targets, original=original)
    own = loss.residual(original, targets).flatten(1)
    npo = NPO(beta=3.0).forget_residual(loss, unmoved).flatten(1)
    if causal:
        own = own * (targets[:, 1:] != -100).sum(1, keepdim=True)
    torch.testing.assert_close(npo, own, rtol=1e-12, atol=1e-14)  # all weights are 1 at θ*


def test_npos_curvature_where_it_starts():
    """n Λ - (β/2) n² s sᵀ in the outputs, where ascent on the loss has Λ."""
    _, original, targets, loss = answers(True)
    beta, n = 0.8, 4
    row = next(i for i in range(12) if int((targets[i, 1:] != -100).sum()) == n)
    f, y = original[row : row + 1], targets[row : row + 1]
    climbed = -torch.autograd.functional.hessian(lambda at: npo_loss(at, f, y, beta, True), f).reshape(30, 30)
    curvature = loss.hessian_apply(f, y, torch.eye(30, dtype=torch.float64).unsqueeze(0))[0]
    s = loss.residual(f, y).flatten()
    torch.testing.assert_close(climbed, n * curvature - beta / 2 * n**2 * torch.outer(s, s), rtol=1e-9, atol=1e-12)


def test_npos_weights_fall_as_answers_are_forgotten():
    targets = torch.zeros(4, dtype=torch.int64)
    original = torch.tensor([[3.0, 0.0]], dtype=torch.float64).expand(4, 2)
    outputs = torch.tensor([[3.0, 0.0], [0.0, 3.0], [-1e4, 0.0], [40.0, 0.0]], dtype=torch.float64)
    loss = CrossEntropy()
    residual = NPO(beta=1.0).forget_residual(loss, batch_of(outputs, targets, original=original))
    weights = residual[:3, 0] / loss.residual(outputs, targets)[:3, 0]
    odds = math.exp(-3)  # of the other class at θ*; it is e³ in the second row, so π falls by this factor
    assert weights.tolist() == pytest.approx([1.0, 2 * odds / (1 + odds), 0.0], abs=1e-12)
    assert bool(residual.isfinite().all())
    unlikely = batch_of(original[:1], targets[:1], original=outputs[2:3])
    recalled = NPO(beta=1.0).forget_residual(loss, unlikely) / loss.residual(original[:1], targets[:1])
    torch.testing.assert_close(recalled, torch.full_like(recalled, 2.0))


@pytest.mark.parametrize("causal", [False, True], ids=["classes", "answers"])
def test_npo_runs_as_written(causal):
    """Descent on the NPO loss and on the retain loss at once, in parameters, by autograd."""
    problem = CASES[4].problem() if causal else problem_of()
    algorithm = NPO(lr=0.3, mix=0.4, steps=4, beta=0.5, **full(problem))
    samples = problem.forget
    start = outputs_of(problem, samples, problem.vector()).detach()
    targets = samples.batch(torch.arange(samples.size))[1]

    def objective(leaf):
        forget = npo_loss(outputs_of(problem, samples, leaf), start, targets, 0.5, causal)
        return 0.6 * mean_loss(problem, "retain")(leaf) + 0.4 * forget

    theta = problem.vector()
    for _ in range(4):
        theta = theta - 0.3 * gradient(problem, objective, theta)
    result = run(problem, algorithm, stop_on_divergence=False)
    torch.testing.assert_close(final_vector(problem, result), theta, rtol=1e-9, atol=1e-11)
    assert float((theta - problem.vector()).norm()) > 0.1


def test_npos_rollout_of_a_linear_language_model_is_its_run():
    g = torch.Generator().manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Linear(3, 4).double()  # at every position
    x, y = torch.randn(20, 5, 3, generator=g, dtype=torch.float64), torch.randint(0, 4, (20, 5), generator=g)
    y[:, :2] = -100
    y[::2, 4] = -100  # answers of two and of three tokens
    problem = UnlearningProblem(model, (x[:8], y[:8]), (x[8:], y[8:]), loss="causal_lm")
    algorithm = NPO(lr=0.3, mix=0.5, steps=20, beta=0.3, batch_size=5, forget_batch_size=3, momentum=0.5)
    _, real = compare_to_run(problem, algorithm, seed=2, check_every=1)
    ascent = run(problem, GradDiff(**{k: v for k, v in algorithm.settings().items() if k != "beta"}), seed=2)
    assert real.trajectory[-1].forget_loss != pytest.approx(ascent.trajectory[-1].forget_loss, rel=0.01)


def test_npo_counts_the_original_models_passes():
    problem = problem_of()
    algorithm = NPO(steps=3, batch_size=6, forget_batch_size=3)
    result = run(problem, algorithm, monitor_samples=1, check_every=3, stop_on_divergence=False)
    assert result.gradient_equivalents == pytest.approx(3 * 9 * 4 / 3 + len(result.trajectory) * 2 / 3)


# ------------------------------------------------------------------ SFR-on


def test_the_mask_compares_per_sample_fisher_information():
    problem = problem_of()
    fisher = [per_sample_gradients(problem, s).square().mean(0) for s in (problem.forget, problem.retain)]
    for ratio in (0.5, 1.0, 2.0):
        mask = SFROn(threshold=ratio).preconditioner(problem).forget_mask
        assert torch.equal(mask == 1, fisher[0] >= ratio * fisher[1])
        assert 0 < float(mask.mean()) < 1
    few = [
        per_sample_gradients(problem, s)[s.subset(5, seed=0)].square().mean(0) for s in (problem.forget, problem.retain)
    ]
    mask = SFROn(fisher_samples=5).preconditioner(problem).forget_mask
    assert torch.equal(mask == 1, (few[0] >= few[1]) & (few[0] > 0))
    assert SFROn().preconditioner_cost(problem) == 20
    assert SFROn(fisher_samples=5).preconditioner_cost(problem) == 10
    assert SFROn(fisher_samples=None).preconditioner_cost(problem) == 20


def test_sfr_on_is_its_loop_written_with_torch():
    """Masked, weighted, clipped ascent opens each cycle; one SGD with momentum and decay takes all steps."""
    problem = problem_of()
    algorithm = SFROn(lr=0.05, steps=12, forget_every=4, forget_weight=3.0, max_gradient_norm=0.05, **full(problem))
    mask = algorithm.preconditioner(problem).forget_mask
    model = problem.new_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    (xf, yf), (xr, yr) = (s.batch(torch.arange(s.size)) for s in (problem.forget, problem.retain))
    clipped = spared = 0
    for k in range(12):
        cosine = (1 + math.cos(math.pi * k / 12)) / 2
        optimiser.param_groups[0]["lr"] = 0.05 * cosine
        optimiser.zero_grad()
        if k % 4 == 0:
            losses = F.cross_entropy(model(xf), yf, reduction="none")
            weights = losses.detach() ** -0.5
            (-3.0 * cosine * (weights / weights.sum() * losses).sum()).backward()
            for p, m in zip(model.parameters(), problem.unflatten(mask).values(), strict=True):
                p.grad *= m
            clipped += float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)) > 0.05
        else:
            F.cross_entropy(model(xr), yr).backward()
            spared += float(torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm()) > 0.05
        optimiser.step()
    assert clipped == 3
    assert spared > 0  # retain gradients are not clipped, however long
    expected = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    result = run(problem, algorithm, stop_on_divergence=False)
    torch.testing.assert_close(final_vector(problem, result), expected, rtol=1e-9, atol=1e-11)


def test_a_sample_fitted_exactly_does_not_take_the_batch_over():
    losses = torch.tensor([0.0, 0.04, 1.0, 3.0], dtype=torch.float64)
    outputs = (losses * 2).sqrt().unsqueeze(1) / 2**0.5
    batch = batch_of(outputs, torch.zeros(4, 1, dtype=torch.float64))
    loss = SquaredError()
    plain, weighted = loss.residual(outputs, batch.targets), SFROn().forget_residual(loss, batch)
    floor = 0.01 * float(losses.mean())
    weights = losses.clamp_min(floor) ** -0.5
    torch.testing.assert_close(weighted, plain * (4 * weights / weights.sum()).unsqueeze(1))
    assert torch.equal(SFROn(loss_power=0.0).forget_residual(loss, batch), plain)
    together = batch_of(outputs.repeat(3, 1) * 2, batch.targets.repeat(3, 1), copies=3)
    torch.testing.assert_close(SFROn().forget_residual(loss, together), 2 * weighted.repeat(3, 1))  # ω has no unit
    nothing = batch_of(torch.zeros(2, 1), torch.zeros(2, 1))
    assert torch.equal(SFROn().forget_residual(loss, nothing), torch.zeros(2, 1))


# ------------------------------------------------------------------ remain-Newton


def test_remain_newton_is_its_dense_formula():
    problem = problem_of()
    retain, forget = (dense_ggn(problem, which) for which in ("retain", "forget"))
    eye = torch.eye(problem.size, dtype=torch.float64)
    inverse = torch.linalg.inv(retain + 0.05 * eye)
    expected = inverse @ forget @ inverse
    expected = expected / torch.linalg.eigvalsh(expected)[-1]
    algorithm = RemainNewton(damping=0.05, rank=2 * problem.forget.size, curvature_samples=None)
    made = algorithm.preconditioner(problem)
    found = made.apply(eye)
    assert float((found - expected).norm() / expected.norm()) < 0.01  # the solves end at a thousandth
    retain = problem.retain.size
    assert algorithm.preconditioner_cost(problem) == 2 * ((8 * 12 + 100) * 6 + (12 + 8) * 120 * retain)
    assert RemainNewton(rank=20, curvature_samples=4).preconditioner_cost(problem) == 2 * (260 * 4 + 28 * 120 * 4)
    assert RemainNewton(inverse="diagonal", rank=20, curvature_samples=4).preconditioner_cost(problem) == 2 * 260 * 4
    spent = 2 * (made.products[0] * retain + made.products[1] * 6)
    assert made.gradient_equivalents == spent < algorithm.preconditioner_cost(problem)


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("kind", "setting", "value", "error", "message"),
    [
        (SalUn, "share", 0, ValueError, r"`share` of `SalUn` must be a finite number in \(0, 1\]; got 0"),
        (SalUn, "forgetting", "descent", ValueError, "`forgetting` of `SalUn` .* got 'descent'. Did you mean 'ascent'"),
        (L1Sparse, "penalty", -1, ValueError, r"`penalty` of `L1Sparse` must be .*\[0, inf\); got -1"),
        (NPO, "beta", 0, ValueError, r"`beta` of `NPO` must be .*\(0, inf\); got 0"),
        (NPO, "beta", "0.1", TypeError, "`beta` of `NPO` .*got '0.1'"),
        (SCRUB, "loss_weight", -0.5, ValueError, r"`loss_weight` of `SCRUB` .*got -0\.5"),
        (SCRUB, "divergence_weight", "0", TypeError, "`divergence_weight` of `SCRUB` .*got '0'"),
        (SCRUB, "temperature", 0, ValueError, r"`temperature` of `SCRUB` .*\(0, inf\); got 0"),
        (SCRUB, "forget_share", 1.5, ValueError, r"`forget_share` of `SCRUB` .*\[0, 1\]; got 1\.5"),
        (SFROn, "forget_weight", 0, ValueError, r"`forget_weight` of `SFROn` .*\(0, inf\); got 0"),
        (SFROn, "loss_power", -1, ValueError, "`loss_power` of `SFROn` .*got -1"),
        (SFROn, "threshold", math.nan, ValueError, "`threshold` of `SFROn` .*got nan"),
        (RemainNewton, "rank", 0, ValueError, "`rank` of `RemainNewton` must be a whole number >= 1; got 0"),
        (RemainNewton, "damping", 0.0, ValueError, r"`damping` of `RemainNewton` .*\(0, inf\); got 0\.0. None takes"),
        (RemainNewton, "inverse", "cgs", ValueError, "`inverse` of `RemainNewton` .* got 'cgs'. Did you mean 'cg'"),
        (RemainNewton, "curvature_samples", 0, ValueError, "`curvature_samples` of `RemainNewton` .*got 0. None takes"),
        (RemainNewton, "seed", -1, ValueError, "`seed` of `RemainNewton` .*got -1"),
        (SFROn, "fisher_samples", 0, ValueError, "`fisher_samples` of `SFROn` .*>= 1; got 0. None takes all"),
    ],
)
def test_settings_out_of_their_domain_are_refused(kind, setting, value, error, message):
    with pytest.raises(error, match=message):
        kind(**{setting: value})
