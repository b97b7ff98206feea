"""What could only be answered wrongly is refused before anything is measured, and says whose fault it is."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import stabkit
from stabkit.algorithms import AGU, GradDiff
from stabkit.curvature.jacobian import vjp_block
from stabkit.measure import UNDIFFERENTIABLE
from stabkit.models import MLP
from stabkit.preconditioner import Diagonal
from stabkit.problem import UnlearningProblem

pytestmark = [
    pytest.mark.filterwarnings("ignore::stabkit.LowConfidenceWarning"),
    pytest.mark.filterwarnings("ignore::stabkit.UntrainedModelWarning"),
]


def data(n=60, classes=3):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=g)
    return x, x[:, :classes].argmax(1)


def trained(outputs=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, outputs))
    x, y = data()
    rule = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        rule.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        rule.step()
    rule.zero_grad(set_to_none=True)
    return model


def halves():
    x, y = data()
    return (x[:20], y[:20]), (x[20:], y[20:])


def problem_of(model=None, loss="cross_entropy", y=None):
    x, labels = data()
    y = labels if y is None else y
    return UnlearningProblem(model or trained(), (x[:20], y[:20]), (x[20:], y[20:]), loss=loss)


# ---------------------------------------------------------------------- losses


def test_a_loss_that_knows_the_other_samples_is_refused():
    def centred(outputs, targets):
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return each - each.mean()

    with pytest.raises(ValueError, match=r"`loss` must give a sample the same loss whatever else .* got 'centred'"):
        problem_of(loss=centred)


def test_a_loss_that_writes_into_the_outputs_is_blamed_for_it():
    x, y = torch.randn(40, 4), torch.randn(40, 3)

    def written(outputs, targets):
        return outputs.sub_(targets).square().mean(1)

    with pytest.raises(ValueError, match=r"`loss` must leave the outputs as they are; got 'written'"):
        UnlearningProblem(nn.Linear(4, 3), (x[:10], y[:10]), (x[10:], y[10:]), loss=written)


def test_losses_of_very_different_samples_pass():
    model = trained()
    with torch.no_grad():
        model[2].weight.mul_(30)  # losses from 0 to hundreds
    problem_of(model)
    problem_of(model, loss=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none"))


def test_a_loss_that_cuts_the_graph_is_named():
    def cut(outputs, targets):
        return nn.functional.cross_entropy(outputs.detach(), targets, reduction="none")

    with pytest.raises(ValueError, match=r"`loss` must be differentiable; got losses of 'cut' without derivatives"):
        problem_of(loss=cut)


# ---------------------------------------------------------------------- models


class Cut(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.inner, self.how = trained(), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.inner(x)
        return torch.from_numpy(self.inner(x).detach().numpy())


@pytest.mark.parametrize("how", ["no_grad", "numpy"])
def test_a_model_that_cuts_the_graph_is_named(how):
    with pytest.raises(ValueError, match=r"`model` must be differentiable; got outputs without derivatives"):
        problem_of(Cut(how))


def test_a_model_without_memory_is_told_how_to_get_some():
    with pytest.raises(ValueError, match=r"'0.weight' is on the meta device. .*to_empty\(device='cpu'\)"):
        problem_of(trained().to("meta"))


def test_a_model_that_counts_its_calls_in_a_buffer_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = trained()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    model = Counts()
    with pytest.raises(ValueError, match=r"`model` must not write into its buffers or weights in eval mode"):
        problem_of(model)
    assert float(model.calls) == 0


def test_a_first_layer_that_works_in_place_is_predicted_like_any_other():
    class Shifts(nn.Module):
        """Not the same twice on the same tensor."""

        def __init__(self, *, in_place):
            super().__init__()
            self.inner, self.in_place = trained(), in_place

        def forward(self, x):
            return self.inner(x.add_(0.1) if self.in_place else x + 0.1)

    x, y = data()
    kept = x.clone()
    reports = [
        stabkit.predict(
            Shifts(in_place=how), (x[:20], y[:20]), (x[20:], y[20:]), lr=0.05, batch_size=8, steps=10, mode="thorough"
        )
        for how in (True, False)
    ]
    assert torch.equal(x, kept)
    assert reports[0].critical_lr == reports[1].critical_lr
    assert reports[0].probability == reports[1].probability


# ---------------------------------------------------------------------- targets


def test_remedies_for_targets_fit_what_came():
    _, y = data()
    soft = torch.softmax(torch.randn(60, 3), 1)
    with pytest.raises(TypeError, match=r"taken by loss=nn.CrossEntropyLoss\(reduction='none'\)"):
        problem_of(y=soft)
    problem_of(y=soft, loss=nn.CrossEntropyLoss(reduction="none"))  # which does take them
    with pytest.raises(TypeError, match=r"Use targets.long\(\)"):
        problem_of(y=y.float())
    with pytest.raises(ValueError, match=r"Use targets.squeeze\(1\)"):
        problem_of(y=y.unsqueeze(1))


# ---------------------------------------------------------------------- algorithms


def test_residuals_of_another_shape_are_named():
    class Odd(GradDiff):
        name = "odd"
        given = None

        def forget_residual(self, loss, batch):
            return type(self).given

    x, y = data()
    for given, got in ((torch.ones(3), r"shape \(3,\)"), (None, "None")):
        Odd.given = given
        with pytest.raises(ValueError, match=rf"`forget_residual` of `Odd` must return .* got {got}"):
            stabkit.predict(
                trained(), (x[:20], y[:20]), (x[20:], y[20:]), algorithm=Odd(lr=0.05, batch_size=8), mode="fast", rank=5
            )
        problem = stabkit.UnlearningProblem(trained(), (x[:20], y[:20]), (x[20:], y[20:]))
        with pytest.raises(ValueError, match=rf"`forget_residual` of `Odd` must return .* got {got}"):
            stabkit.run(problem, Odd(lr=0.05, batch_size=8))


def test_a_residual_that_needs_the_trained_outputs_is_told_how_to_ask_for_them():
    class Moved(GradDiff):
        def forget_residual(self, loss, batch):
            return batch.outputs - batch.original

    x, y = data()
    problem = stabkit.UnlearningProblem(trained(), (x[:20], y[:20]), (x[20:], y[20:]))
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        stabkit.run(problem, Moved(lr=0.05, batch_size=8))
    assert "`batch.original` is None, as `Moved` does not ask" in caught.value.__notes__[0]
    Moved.needs_original = True
    stabkit.run(problem, Moved(lr=0.05, batch_size=8, steps=2))


class Halved(AGU):
    """Has the name that it inherits."""

    def preconditioner(self, problem):
        return Diagonal(torch.full((problem.size,), 0.5))


def test_an_algorithm_of_ones_own_is_not_taken_for_the_librarys(tmp_path):
    x, y = data()
    forget, retain, model = (x[:20], y[:20]), (x[20:], y[20:]), trained()
    own = Halved(lr=0.05, batch_size=8, steps=20)
    report = stabkit.predict(model, forget, retain, algorithm=own, mode="fast")
    read = stabkit.Report.from_json(report.to_json(tmp_path / "report.json"))
    for one in (report, read):
        assert one.run.own
        with pytest.raises(
            ValueError, match="`algorithm` of `verify` must be given, as the report's 'agu' is of a class"
        ):
            stabkit.verify(one, model, forget, retain)
        assert stabkit.verify(one, model, forget, retain, algorithm=own).algorithm == "agu"
    theirs = stabkit.predict(model, forget, retain, algorithm=AGU(lr=0.05, batch_size=8, steps=20), mode="fast")
    assert not theirs.run.own


def test_a_test_set_that_is_not_held_out_is_refused_by_verify_as_by_audit():
    x, y = data()
    forget, retain, model = (x[:20], y[:20]), (x[20:], y[20:]), trained()
    report = stabkit.predict(model, forget, retain, lr=0.05, batch_size=8, mode="fast", steps=10)
    with pytest.raises(ValueError, match="`test` of `verify` must hold no sample of `retain`; they share 40"):
        stabkit.verify(report, model, forget, retain, test=retain)


# ---------------------------------------------------------------------- tune


@pytest.mark.parametrize("name", ["lr", "mix"])
def test_tune_takes_nothing_that_it_chooses(name):
    x, y = data()
    with pytest.raises(TypeError, match=rf"`{name}` of `tune` must be left out, as it is what `tune` chooses; got 0.5"):
        stabkit.tune(trained(), (x[:20], y[:20]), (x[20:], y[20:]), **{name: 0.5})


def test_tune_says_so_where_the_target_is_reached_before_the_run():
    x, y = data()
    forget, retain, model = (x[:20], y[:20]), (x[20:], y[20:]), trained()
    with pytest.warns(stabkit.StabkitWarning, match=r"before the run, and so past its target, 1e-06: by this measure"):
        stabkit.tune(model, forget, retain, forget_loss=1e-6, batch_size=8, mode="fast", steps=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error", category=UserWarning)
        warnings.filterwarnings("ignore", category=stabkit.LowConfidenceWarning)
        warnings.filterwarnings("ignore", message="the forget loss is predicted to come to")
        stabkit.tune(model, forget, retain, forget_loss=0.8, batch_size=8, mode="fast", steps=10)


# ---------------------------------------------------------------------- the guard


@pytest.mark.parametrize("action", ["warn", "stop", "shrink"])
def test_a_guard_that_is_to_warn_does_so_once_in_a_loop_of_ones_own(action):
    guard = stabkit.Monitor(level=1.0, action=action)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alerts = [guard.update(retain_loss=1e-3 * 1.3**k) for k in range(40)]
    assert isinstance(alerts[0], stabkit.Alert)
    assert any(alert.state == "rising" for alert in alerts)
    said = [str(w.message) for w in caught]
    assert len(said) == (action == "warn")
    assert all(text.startswith("the run is watched: step ") for text in said)
    assert {w.filename for w in caught} <= {__file__}


def test_the_weights_of_the_factor_are_those_of_the_docstring():
    """The loop of the class's docstring, run as it stands."""
    assert 'group["lr"] = lr * alert.lr_factor' in stabkit.Monitor.__doc__
    lr, model = 0.5, MLP(4, 3, hidden=(8,))
    optimizer = torch.optim.SGD(model.parameters(), lr)
    guard, seen = stabkit.Monitor(level=1.0, action="shrink"), []
    for k in range(40):
        alert = guard.update(retain_loss=1e-3 * 1.3**k)
        if alert.stop:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr * alert.lr_factor
        seen.append(optimizer.param_groups[0]["lr"] / lr)
    assert seen[0] == 1.0
    assert 0 < seen[-1] < 1
    assert seen == sorted(seen, reverse=True)


# ---------------------------------------------------------------------- derivatives


class Doubled(torch.autograd.Function):
    """As functions were written before torch.func: forward and context in one."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Once(torch.autograd.Function):
    """Squares, with a derivative that has none."""

    @staticmethod
    def forward(x):
        return x.square()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.function = trained(), function

    def forward(self, x):
        outputs = self.inner(x)
        return outputs + 0.1 * self.function.apply(outputs)


def test_a_layer_that_is_differentiable_once_is_refused():
    """PyTorch's products with the Hessian would lack what lies beyond it, without a word."""
    with pytest.raises(ValueError, match=r"must be differentiable twice; got .*once_differentiable\. Write its"):
        stabkit.predict(Through(Once), *halves(), lr=0.01, steps=5, batch_size=8)
    assert (
        stabkit.run(problem_of(Through(Once)), GradDiff(lr=0.01, steps=2, batch_size=8)).steps == 2
    )  # needs one alone


@pytest.mark.parametrize("words", ["autograd.Function with functorch transforms (vmap)", "Invalid strides/sizes, got"])
def test_what_torch_cannot_differentiate_comes_with_a_remedy(words, monkeypatch):
    said = [words, "something else"]

    def failing(*_, **__):
        raise RuntimeError(said.pop(0))

    monkeypatch.setattr("stabkit.measure.linearised", failing)
    with pytest.raises(ValueError, match=r"must be differentiable twice; got .*setup_context.*set_experts_implement"):
        stabkit.predict(trained(), *halves(), lr=0.01, steps=5, batch_size=8)
    with pytest.raises(RuntimeError, match="something else"):
        stabkit.predict(trained(), *halves(), lr=0.01, steps=5, batch_size=8)


def test_the_words_are_those_of_torch():
    """Of the error for a function of the old form."""
    problem = problem_of(Through(Doubled))
    inputs, _ = problem.retain.batch(torch.arange(4))
    with pytest.raises(RuntimeError) as caught:
        vjp_block(problem, inputs, torch.ones(4, 3, 2))
    assert any(words in str(caught.value) for words in UNDIFFERENTIABLE)


def test_hooks_for_activation_checkpointing_are_left_off_the_copy():
    """Hugging Face's models keep it when checkpointing is switched off, and torch.func refuses what it does."""
    model = trained()

    def make_inputs_require_grads(module, inputs, output):
        output.requires_grad_(True)

    x, y = data()
    sets = (x[:20], y[:20]), (x[20:], y[20:])
    wanted = stabkit.predict(model, *sets, lr=0.01, steps=5, batch_size=8)
    model[0].register_forward_hook(make_inputs_require_grads)
    found = stabkit.predict(model, *sets, lr=0.01, steps=5, batch_size=8)
    assert (found.probability, found.critical_lr) == (wanted.probability, wanted.critical_lr)
    assert len(model[0]._forward_hooks) == 1


# ---------------------------------------------------------------------- inputs


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = trained()

    def forward(self, x, mask=None):
        return self.inner(x if mask is None else x * mask)


def test_sets_of_different_inputs_are_refused():
    x, y = data()
    mask = torch.ones_like(x)
    whole = {"x": x[20:], "mask": mask[20:], "labels": y[20:]}
    with pytest.raises(ValueError, match=r"`forget` and `retain` must hold the same inputs; got 'x' and 'mask', 'x'\."):
        UnlearningProblem(Masked(), {"x": x[:20], "labels": y[:20]}, whole)
    with pytest.raises(ValueError, match=r"got one tensor and a tuple of 2\."):
        UnlearningProblem(Masked(), (x[:20], y[:20]), ((x[20:], mask[20:]), y[20:]))
    first = {"x": x[:20], "mask": mask[:20], "labels": y[:20]}
    with pytest.raises(ValueError, match=r"`test` and `retain` must hold the same inputs; got 'x' and 'mask', 'x'\."):
        UnlearningProblem(Masked(), first, whole, test={"x": x, "labels": y})
    UnlearningProblem(Masked(), first, whole)


def test_an_encoder_and_decoder_is_told_what_it_lacks():
    class Decoding(Masked):
        def forward(self, x):
            raise ValueError("You have to specify either decoder_input_ids or decoder_inputs_embeds")

    with pytest.raises(ValueError, match=r"Labels go to the loss: add 'decoder_input_ids'"):
        problem_of(Decoding())


def test_a_decoder_that_would_read_the_inputs_is_told_so():
    """BART's takes the encoder's inputs where it is given none, and a loss of the labels is then another one."""

    class Decodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)

        def prepare_decoder_input_ids_from_labels(self, labels):
            return labels.roll(1, 1)

        def forward(self, input_ids, decoder_input_ids=None):
            ids = input_ids if decoder_input_ids is None else decoder_input_ids
            return self.head(self.embed(ids))

    ids = torch.randint(0, 6, (24, 5), generator=torch.Generator().manual_seed(0))
    labels = ids.flip(1)
    bare, whole = (
        {"input_ids": ids, "labels": labels},
        {"input_ids": ids, "labels": labels, "decoder_input_ids": labels},
    )

    def sets(data):
        return {k: v[:8] for k, v in data.items()}, {k: v[8:] for k, v in data.items()}

    model = Decodes()
    with pytest.raises(ValueError, match=r"the decoder of Decodes reads; got input_ids\. Labels go to the loss: add"):
        UnlearningProblem(model, *sets(bare))
    UnlearningProblem(model, *sets(whole))

    class Wrapped(nn.Module):
        """Gives the decoder what it reads."""

        def __init__(self):
            super().__init__()
            self.inner = Decodes()

        def forward(self, source, target):
            return self.inner(source, decoder_input_ids=target)

    UnlearningProblem(Wrapped(), *(((ids[k], labels[k]), labels[k]) for k in (slice(8), slice(8, 24))))
