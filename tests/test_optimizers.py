"""PyTorch optimizer objects: read as settings, their runs step for step, and what is refused."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stabkit
from stabkit.algorithms import GradDiff, optimizer_settings, resolve_algorithm
from stabkit.problem import UnlearningProblem
from stabkit.training import train

STEPS = 4


@pytest.fixture(scope="module")
def case():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 5, generator=g), torch.randint(0, 3, (12,), generator=g)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = train(model, x.double(), y, epochs=40, lr=0.02, seed=0)
    return model, (x[:4].double(), y[:4]), (x[4:].double(), y[4:])


def groups(model: nn.Module, rates: tuple[float, float]) -> list[dict[str, object]]:
    """The first layer at one step size, the second at another."""
    return [{"params": model[0].parameters(), "lr": rates[0]}, {"params": model[2].parameters(), "lr": rates[1]}]


def parted(model: nn.Module, rates: tuple[float, float], decays: tuple[float, float]) -> list[dict[str, object]]:
    """Both with a group of biases, which decay otherwise."""
    return [
        {"params": getattr(layer, part), "lr": rate, "weight_decay": decay}
        for layer, rate in ((model[0], rates[0]), (model[2], rates[1]))
        for part, decay in (("weight", decays[0]), ("bias", decays[1]))
    ]


def optimizers(model: nn.Module) -> st.SearchStrategy[torch.optim.Optimizer]:
    """SGD, AdamW and Adam with any settings, one group or two."""
    rate = st.floats(1e-3, 0.1)
    rates = st.tuples(rate, rate) | st.tuples(rate, st.just(0.0))
    momentum = st.sampled_from([0.0, 0.5, 0.9])
    decay = st.tuples(*[st.sampled_from([0.0, 0.1, 0.3])] * 2)
    sgd = st.builds(
        lambda r, m, n, d: torch.optim.SGD(parted(model, r, d), momentum=m, nesterov=n and m > 0),
        rates,
        momentum,
        st.booleans(),
        decay,
    )
    betas = st.tuples(st.sampled_from([0.0, 0.9]), st.sampled_from([0.5, 0.999]))
    adamw = st.builds(
        lambda r, b, e, d: torch.optim.AdamW(parted(model, r, d), betas=b, eps=e),
        rates,
        betas,
        st.sampled_from([1e-8, 1e-3]),
        decay,
    )
    adam = st.builds(lambda r: torch.optim.Adam(model.parameters(), lr=r), rate)
    first = st.builds(lambda r: torch.optim.SGD(model[0].parameters(), lr=r), rate)  # the others stay where they are
    return sgd | adamw | adam | first


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_run_by_its_settings_takes_its_steps(case, data):
    model, forget, retain = case
    optimizer = data.draw(optimizers(model))
    mix = data.draw(st.sampled_from([0.0, 0.3]))
    still = any(group["lr"] == 0 for group in optimizer.param_groups) or len(optimizer.param_groups) == 1
    clip = data.draw(st.sampled_from([None] if still else [None, 0.05]), "clip")
    algorithm = GradDiff(
        mix=mix,
        steps=STEPS,
        batch_size=8,
        forget_batch_size=4,
        max_gradient_norm=clip,
        **optimizer_settings(optimizer, model),
    )
    found = stabkit.run(UnlearningProblem(model, forget, retain), algorithm, stop_on_divergence=False).model
    mine = copy.deepcopy(model)
    names = {id(p): name for name, p in model.named_parameters()}
    here = dict(mine.named_parameters())
    again = type(optimizer)([
        {**group, "params": [here[names[id(p)]] for p in group["params"]]} for group in optimizer.param_groups
    ])
    for _ in range(STEPS):
        mine.zero_grad()
        loss = (1 - mix) * nn.functional.cross_entropy(mine(retain[0]), retain[1])
        (loss - mix * nn.functional.cross_entropy(mine(forget[0]), forget[1])).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(mine.parameters(), clip)
        again.step()
    for theirs, ours in zip(mine.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_predict_takes_the_object_as_it_takes_its_settings(case):
    model, forget, retain = case
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(groups(model, (0.05, 0.025)), momentum=0.9, weight_decay=1e-3)
    common = {"mix": 0.3, "steps": 10, "batch_size": 4, "mode": "standard", "seeds": 1}
    by_object = stabkit.predict(model, forget, retain, optimizer=optimizer, **common)
    named = GradDiff(lr=0.05, momentum=0.9, weight_decay=1e-3, layer_lr={"2.weight": 0.5, "2.bias": 0.5})
    by_name = stabkit.predict(model, forget, retain, algorithm=named, **common)
    assert by_object.run.settings == by_name.run.settings
    assert by_object.probability == by_name.probability
    assert by_object.critical_lr == by_name.critical_lr
    assert not optimizer.state
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    check = stabkit.verify(by_object, model, forget, retain, progress=False)
    assert check.algorithm == by_object.run.algorithm


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_arguments_go_before_the_object(case):
    model, forget, retain = case
    optimizer = torch.optim.AdamW(groups(model, (1e-3, 5e-4)), betas=(0.8, 0.99), eps=1e-6)
    report = stabkit.predict(
        model,
        forget,
        retain,
        optimizer=optimizer,
        lr=1e-4,
        weight_decay=0.0,
        steps=5,
        batch_size=4,
        mode="fast",
        seeds=1,
    )
    found = report.run.settings
    assert (found["optimizer"], found["lr"], found["weight_decay"]) == ("adamw", 1e-4, 0.0)
    assert (tuple(found["betas"]), found["eps"]) == ((0.8, 0.99), 1e-6)
    assert found["layer_lr"] == {"2.weight": 0.5, "2.bias": 0.5}
    estimate = stabkit.predict_cost(model, forget, retain, optimizer=optimizer, steps=5, batch_size=4, mode="fast")
    named = stabkit.predict_cost(model, forget, retain, optimizer="adamw", steps=5, batch_size=4, mode="fast")
    assert [c.gradient_equivalents for c in estimate.stages] == [c.gradient_equivalents for c in named.stages]


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_tune_takes_the_object(case):
    model, forget, retain = case
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    tuned = stabkit.tune(model, forget, retain, optimizer=optimizer, steps=10, batch_size=4, seeds=1, risk=0.4)
    assert (tuned.momentum, tuned.nesterov) == (0.9, True)


def test_usual_momentum_falls_to_the_objects(case):
    model = case[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert resolve_algorithm("scrub").momentum == 0.9
    assert resolve_algorithm("scrub", model=model, optimizer=optimizer).momentum == 0
    assert resolve_algorithm("scrub", model=model, optimizer=optimizer, momentum=0.5).momentum == 0.5


def test_wrapped_models_have_the_same_names(case):
    model = copy.deepcopy(case[0])
    optimizer = torch.optim.SGD(groups(model, (0.1, 0.05)))
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert optimizer_settings(optimizer, wrapped)["layer_lr"] == {"2.weight": 0.5, "2.bias": 0.5}


def test_wrappers_inside_have_the_same_names(case):
    model = copy.deepcopy(case[0])
    optimizer = torch.optim.SGD(groups(model, (0.1, 0.05)))
    model[2] = nn.DataParallel(model[2])
    _, forget, retain = case
    found = optimizer_settings(optimizer, model)
    assert found["layer_lr"] == {"2.weight": 0.5, "2.bias": 0.5}
    problem = UnlearningProblem(model, forget, retain)
    assert not stabkit.run(problem, GradDiff(steps=2, batch_size=8, **found)).diverged


def test_a_scheduler_leaves_the_step_size_as_it_was_given(case):
    model = case[0]
    for schedule in (
        lambda o: torch.optim.lr_scheduler.LinearLR(o, start_factor=0.1),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: step / 10),  # the first step's is 0
    ):
        optimizer = torch.optim.SGD(groups(model, (0.3, 0.1)))
        schedule(optimizer)
        found = optimizer_settings(optimizer, model)
        assert found["lr"] == 0.3
        assert found["layer_lr"] == {"2.weight": pytest.approx(1 / 3), "2.bias": pytest.approx(1 / 3)}


def test_tensors_become_numbers(case):
    model = case[0]
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=torch.tensor(0.01),
        betas=(torch.tensor(0.8), torch.tensor(0.9)),
        weight_decay=torch.tensor(0.5),
        capturable=True,
    )
    found = optimizer_settings(optimizer, model)
    assert GradDiff(**found).betas == pytest.approx((0.8, 0.9))
    assert (found["lr"], found["weight_decay"]) == (pytest.approx(0.01), 0.5)


def test_an_object_goes_before_an_algorithms_own_settings(case):
    model = case[0]
    own = GradDiff(lr=0.5, momentum=0.9, layer_lr={"0": 0.1}, weight_decay=0.1, steps=7)
    found = resolve_algorithm(own, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert found == GradDiff(lr=0.1, steps=7)
    found = resolve_algorithm(own, model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1))
    assert found == GradDiff(lr=0.1, steps=7, optimizer="adamw", weight_decay=0.01)


def test_what_groups_disagree_about_comes_with_advice_that_works(case):
    model = case[0]
    first, second = model[0].parameters(), model[2].parameters()
    momenta = [{"params": first, "momentum": 0.9}, {"params": second, "momentum": 0.5}]
    optimizer = torch.optim.SGD(momenta, lr=0.1)
    with pytest.raises(ValueError, match=r"got 0.9 and 0.5. Say which .* by given=\{'momentum': 0.9\}\."):
        optimizer_settings(optimizer, model)
    assert optimizer_settings(optimizer, model, given={"momentum": 0.9})["momentum"] == 0.9
    with pytest.raises(ValueError, match=r"`optimizer` of `predict` .*Say which .* by momentum=0.9\."):
        resolve_algorithm("graddiff", owner="predict", model=model, optimizer=optimizer)
    assert (
        resolve_algorithm("graddiff", owner="predict", model=model, optimizer=optimizer, momentum=0.9).momentum == 0.9
    )
    betas = [{"params": model[0].parameters(), "betas": (0.9, 0.9)}, {"params": model[2].parameters()}]
    with pytest.raises(
        ValueError, match=r"`optimizer` of `predict` must have one betas .*\. Give all its groups the same"
    ):
        resolve_algorithm("graddiff", owner="predict", model=model, optimizer=torch.optim.AdamW(betas, lr=0.1))


def test_frozen_parameters_in_a_group_do_not_count(case):
    model = copy.deepcopy(case[0])
    model[0].requires_grad_(False)
    found = optimizer_settings(torch.optim.SGD(groups(model, (0.5, 0.1))), model)
    assert (found["lr"], found["layer_lr"]) == (0.1, None)


def decays(model: nn.Module) -> list[dict[str, object]]:
    """Groups as they are usual for language models: no decay of biases."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def test_groups_without_decay_are_read(case):
    model = case[0]
    found = optimizer_settings(torch.optim.AdamW(decays(model), lr=1e-3), model)
    assert (found["weight_decay"], found["layer_lr"]) == (0.1, None)
    assert found["layer_weight_decay"] == {"0.bias": 0.0, "2.bias": 0.0}
    given = optimizer_settings(torch.optim.AdamW(decays(model), lr=1e-3), model, given={"weight_decay": 0.2})
    assert given == {**found, "weight_decay": 0.2}  # as with `lr`, the largest of them
    none = [{**group, "weight_decay": 0.0} for group in decays(model)]
    found = optimizer_settings(torch.optim.AdamW(none, lr=1e-3), model)
    assert (found["weight_decay"], found["layer_weight_decay"]) == (0.0, None)


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 5, dtype=torch.float64)).sum().backward()
    optimizer.step()
    return optimizer


def one_cycle(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    return optimizer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (stepped, "must be new, as the run begins without moments; got one with those of 4 parameters"),
        (lambda m: torch.optim.SGD(m.parameters(), lr=0.1, maximize=True), "must have maximize=False; got True"),
        (
            lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5),
            "must have dampening=0; got 0.5",
        ),
        (lambda m: torch.optim.AdamW(m.parameters(), amsgrad=True), "must have amsgrad=False; got True"),
        (lambda m: torch.optim.Adam(m.parameters(), weight_decay=0.1), "got Adam with weight_decay=0.1"),
        (one_cycle, "must not be on a cyclic schedule"),
        (
            lambda m: torch.optim.SGD([*m.parameters(), nn.Parameter(torch.zeros(2))], lr=0.1),
            "got 1 of 5 parameters that are not the model's",
        ),
        (
            lambda m: torch.optim.SGD(copy.deepcopy(m).parameters(), lr=0.1),
            "got 4 of 4 parameters that are not the model's",
        ),
        (
            lambda m: torch.optim.AdamW([
                {"params": m[0].parameters(), "betas": (0.9, 0.9)},
                {"params": m[2].parameters()},
            ]),
            r"one betas for all parameters; got \(0.9, 0.9\) and \(0.9, 0.999\)",
        ),
    ],
)
def test_what_no_prediction_covers_is_refused(case, make, words):
    model, forget, retain = case
    with pytest.raises(ValueError, match=rf"`optimizer` of `predict` .*{words}"):
        stabkit.predict(model, forget, retain, optimizer=make(model))


def test_other_optimizers_are_refused(case):
    model, forget, retain = case
    with pytest.raises(TypeError, match=r"`optimizer` of `predict` must be .*; got torch\.optim\.rmsprop\.RMSprop"):
        stabkit.predict(model, forget, retain, optimizer=torch.optim.RMSprop(model.parameters()))
    with pytest.raises(ValueError, match="`optimizer` of `GradDiff`"):
        stabkit.predict(model, forget, retain, optimizer="lion")
    with pytest.raises(TypeError, match=r"got a SGD object\. .*optimizer_settings\(optimizer, model\)"):
        GradDiff(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_clipping_and_parameters_that_stand_still_do_not_go_together(case):
    """torch.nn.utils.clip_grad_norm_ of all parameters takes in those that the optimizer lets be."""
    model, forget, retain = case
    words = r"`layer_lr` of `GradDiff` must be above 0 with max_gradient_norm=0\.1 and SGD.*; got 0 for '2\.weight'"
    optimizer = torch.optim.SGD(groups(model, (0.1, 0.0)))
    with pytest.raises(ValueError, match=words):
        stabkit.predict(model, forget, retain, optimizer=optimizer, max_gradient_norm=0.1)
    with pytest.raises(ValueError, match=words):
        GradDiff(max_gradient_norm=0.1, **optimizer_settings(optimizer, model))
    own = GradDiff(max_gradient_norm=0.1)
    with pytest.raises(ValueError, match=words):
        resolve_algorithm(own, model=model, optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1))
    moving = resolve_algorithm(own, model=model, optimizer=torch.optim.SGD(groups(model, (0.1, 0.05))))
    assert moving.layer_lr == {"2.weight": 0.5, "2.bias": 0.5}
    adamw = resolve_algorithm(own, model=model, optimizer=torch.optim.AdamW(groups(model, (0.1, 0.0))))
    assert adamw.layer_lr == {"2.weight": 0.0, "2.bias": 0.0}  # a factor of all of it changes none of its steps


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_advice_without_clipping_where_layers_stand_still(case):
    model, forget, retain = case
    optimizer = torch.optim.SGD(groups(model, (5.0, 0.0)))
    report = stabkit.predict(
        model, forget, retain, optimizer=optimizer, mix=0.5, steps=20, batch_size=4, mode="fast", seeds=1
    )
    items = {item.remedy for item in report.recommend().items}
    assert "step size" in items
    assert "clipping" not in items


def test_a_scheduler_that_nothing_was_said_of_is_told(case):
    model, forget, retain = case
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.02)
    with pytest.warns(stabkit.ScheduleWarning, match=r"`optimizer` of `predict` is on .*as `lr_schedule`") as told:
        stabkit.predict(model, forget, retain, optimizer=optimizer, steps=4, batch_size=4, mode="fast", seeds=1)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", stabkit.ScheduleWarning)
        resolve_algorithm("graddiff", model=model, optimizer=optimizer, lr_schedule=[0.02] * 4, steps=4)
        resolve_algorithm(GradDiff(lr_schedule="cosine"), model=model, optimizer=optimizer)
        resolve_algorithm("graddiff", model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_what_stands_still_says_nothing_of_the_decay(case):
    model = case[0]
    still = {"params": model[2].parameters(), "lr": 0.0, "weight_decay": 5.0}
    moving = parted(model, (0.1, 0.1), (0.2, 0.0))[:2]
    nothing = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1)
    assert optimizer_settings(nothing, model, given={"lr": 0.1})["weight_decay"] == 0.1
    found = optimizer_settings(torch.optim.AdamW([*moving, still]), model)
    assert (found["weight_decay"], found["layer_weight_decay"]) == (0.2, {"0.bias": 0.0})


@pytest.mark.filterwarnings("ignore::stabkit.StabkitWarning")
def test_a_report_says_whose_its_step_sizes_are(case):
    model, forget, retain = case
    common = {"steps": 10, "batch_size": 4, "mode": "fast", "seeds": 1, "lr_schedule": [k / 10 for k in range(10)]}
    found = str(stabkit.predict(model, forget, retain, optimizer=torch.optim.SGD(groups(model, (0.1, 0.05))), **common))
    assert "layers' factors" in found
    assert "0.5 of 2.weight, 2.bias" in found
    assert "lr_schedule=10 factors, 0 to 0.9" in found
    assert "layers' factors" not in str(stabkit.predict(model, forget, retain, lr=0.1, **common))


class TwoHeads(nn.Module):
    """A network one of whose two heads nothing is asked of, with experts of which a sample sees one."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.pooler = nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        self.pooler(hidden)
        return torch.where(x[:, :1] > 0, self.experts[0](hidden), self.experts[1](hidden))


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_what_no_loss_depends_on_stays_where_it_is_as_in_torch(case, data):
    _, forget, retain = case
    torch.manual_seed(1)
    model = TwoHeads().double()
    clip = data.draw(st.sampled_from([None, 0.05]), "clip")
    kind = data.draw(st.sampled_from([torch.optim.SGD, torch.optim.AdamW]), "kind")
    parts = [
        {"params": [*model.body.parameters(), *model.experts.parameters()]},
        {"params": model.pooler.parameters(), "weight_decay": data.draw(st.sampled_from([0.2, 0.5]), "its decay")},
    ]
    optimizer = kind(parts, lr=0.05, weight_decay=0.2)
    algorithm = GradDiff(
        mix=0.3,
        steps=STEPS,
        batch_size=8,
        forget_batch_size=4,
        max_gradient_norm=clip,
        **optimizer_settings(optimizer, model),
    )
    problem = UnlearningProblem(model, forget, retain)
    assert problem.unreached == ("pooler.weight", "pooler.bias")
    assert problem.size == sum(p.numel() for p in (*model.body.parameters(), *model.experts.parameters()))
    found = stabkit.run(problem, algorithm, stop_on_divergence=False).model
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = 0.7 * nn.functional.cross_entropy(model(retain[0]), retain[1])
        (loss - 0.3 * nn.functional.cross_entropy(model(forget[0]), forget[1])).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(found.pooler.parameters(), model.pooler.parameters(), strict=True))
    for theirs, ours in zip(model.parameters(), found.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


class Routed(nn.Module):
    """A mixture that computes an expert only for samples sent to it, so that few samples may leave one out."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x):
        chosen = (x[:, 0] > 2).long()
        out = x.new_zeros(len(x), 3)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]))
        return out


@pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning")
def test_an_expert_that_few_samples_are_sent_to_is_reached():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 5, generator=g).clamp(-1, 1), torch.randint(0, 3, (60,), generator=g)
    x[37, 0] = 3.0
    assert UnlearningProblem(Routed(), (x[:10], y[:10]), (x[10:], y[10:])).unreached == ()
    assert UnlearningProblem(Routed(), (x[30:40], y[30:40]), (x[:30], y[:30])).unreached == ()
    nobody = UnlearningProblem(Routed(), (x[:10], y[:10]), (x[10:30], y[10:30]))
    assert nobody.unreached == ("experts.1.weight", "experts.1.bias")
    assert nobody.checking_gradients == 30 / 3 + 30
