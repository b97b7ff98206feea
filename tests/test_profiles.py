"""A language model's task from end to end: made-up people, learnt by heart, forgotten, predicted and benchmarked."""

import math
import random

import numpy as np
import pytest
import torch

import stabkit
from stabkit.bench import Cell, cells, record_cell
from stabkit.datasets import profiles
from stabkit.datasets.profiles import CITIES, FACTS, FIRST_NAMES, LAST_NAMES, PLEASURES, VOCABULARY, YEARS
from stabkit.deletion import forget_people
from stabkit.losses import resolve_loss
from stabkit.models import CausalLM
from stabkit.problem import UnlearningProblem
from stabkit.runner import run
from stabkit.training import train

LOSS = resolve_loss("causal_lm")


def texts(split):
    """Question and answer of every training row, as words."""
    for x, y in zip(split.x_train, split.y_train, strict=True):
        question, _, answer = split.decode(x).partition(" ? ")
        assert split.decode(y) == answer  # the targets are the answer and nothing else
        yield f"{question} ?".split(), answer.split()


def test_every_person_has_every_fact():
    split = profiles(7, test_people=3, facts=6, seed=4)
    n, length = split.x_train.shape
    assert (n, split.x_test.shape, split.y_train.shape) == (42, (18, length), (42, length))
    assert {t.dtype for t in (split.x_train, split.y_train, split.person_train)} == {torch.int64}
    assert torch.equal(split.person_train, torch.arange(7).repeat_interleave(6))
    assert torch.equal(split.person_test, torch.arange(7, 10).repeat_interleave(6))
    for row, (question, answer) in enumerate(texts(split)):
        asked, parts = FACTS[row % 6]
        name = [word for word, form in zip(question, asked.replace("{}", "{} {}").split(), strict=True) if form == "{}"]
        assert name[0] in FIRST_NAMES
        assert name[1] in LAST_NAMES
        assert question == asked.format(" ".join(name)).split()
        assert answer[-1] == "."
        assert [word in words for word, words in zip(answer[:-1], parts, strict=True)] == [True] * len(parts)
    assert split.vocabulary == VOCABULARY == profiles(2, test_people=1, facts=1).vocabulary
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_targets_are_the_answers_alone():
    """The loss reads the outputs where they predict a token of the answer, and no others."""
    split = profiles(5, test_people=1)
    x, y = split.x_train, split.y_train
    labelled = y != -100
    assert torch.equal(y[labelled], x[labelled])
    assert bool((x[~labelled & (x != 0)] != split.vocabulary.index(".")).all())
    assert set(labelled.sum(1).tolist()) == {2, 3}
    outputs = torch.randn(*x.shape, len(split.vocabulary), generator=torch.Generator().manual_seed(0))
    predicts = labelled.roll(-1, dims=1)
    noise = 5 * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(1))
    elsewhere = torch.where(predicts.unsqueeze(-1), outputs, outputs + noise)
    assert torch.equal(LOSS.per_sample(elsewhere, y), LOSS.per_sample(outputs, y))
    assert torch.equal((LOSS.residual(outputs, y) != 0).any(-1), predicts)


def test_people_differ_and_share_nothing():
    split = profiles(250, test_people=74, facts=1)  # every name there is
    everyone = [tuple(split.decode(x).split()[2:4]) for x in (*split.x_train, *split.x_test)]
    assert len(set(everyone)) == 324 == len(FIRST_NAMES) * len(LAST_NAMES)
    assert [name for name, _ in everyone] != sorted(name for name, _ in everyone)
    split = profiles(320, test_people=1, facts=6)
    said = [answer for _, answer in texts(split)]
    for place, part, words in ((0, 0, CITIES), (2, 1, YEARS), (5, 0, PLEASURES)):
        counts = np.array([sum(answer[part] == word for answer in said[place::6]) for word in words])
        expected = 320 / len(words)
        assert np.abs(counts - expected).max() < 5 * math.sqrt(expected)
    both = np.zeros((len(CITIES), len(PLEASURES)))
    for born, like in zip(said[::6], said[5::6], strict=True):
        both[CITIES.index(born[0]), PLEASURES.index(like[0])] += 1
    independent = np.outer(both.sum(1), both.sum(0)) / 320
    degrees = (len(CITIES) - 1) * (len(PLEASURES) - 1)
    assert ((both - independent) ** 2 / independent).sum() < degrees + 5 * math.sqrt(2 * degrees)


def test_a_seed_is_a_data_set_and_the_random_state_stays():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first, again, other = (profiles(6, test_people=2, seed=seed) for seed in (3, 3, 4))
    forget_people(first.person_train, 0.5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.x_train, other.x_train)


def exact(model, x, y):
    """Share of the answers that the model gives word for word."""
    with torch.no_grad():
        logits, labels = LOSS.aligned(model(x), y)
    return float(((logits.argmax(-1) == labels) | (labels == -100)).all(1).float().mean())


def loss_of(model, x, y):
    with torch.no_grad():
        return float(LOSS.per_sample(model(x), y).mean())


def test_facts_are_learnt_by_heart_and_of_no_use_for_others():
    split = profiles(30, test_people=30, facts=3)
    model = CausalLM(len(split.vocabulary), context=split.x_train.shape[1], width=32, depth=2)
    x, y = split.x_train, split.y_train
    trained = train(model, x, y, epochs=150, lr=5e-3, batch_size=30, loss="causal_lm")
    assert loss_of(trained, x, y) < 0.02
    assert exact(trained, x, y) == 1.0
    chance = (1 / len(CITIES) + 1 / 36 + 1 / 40) / 3  # of birth place, occupation and date
    held = exact(trained, split.x_test, split.y_test)
    assert held < chance + 4 * math.sqrt(chance / 90)
    guessing = (math.log(len(CITIES)) / 2 + math.log(36) / 3 + math.log(40) / 3) / 3  # the best loss without knowing
    assert loss_of(trained, split.x_test, split.y_test) > guessing
    assert loss_of(model, x, y) > 3 * guessing


# ------------------------------------------------------------------ deletion


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_people_are_forgotten_whole(fraction):
    person = torch.tensor([4, 9, 4, 7]).repeat(10) + 100 * torch.arange(10).repeat_interleave(4)  # 30 people, 40 rows
    deletion = forget_people(person, fraction, seed=1)
    gone, kept = set(person[deletion.forget].tolist()), set(person[deletion.retain].tolist())
    assert not gone & kept
    assert (len(gone), len(gone | kept)) == (round(30 * fraction), 30)
    assert sorted([*deletion.forget.tolist(), *deletion.retain.tolist()]) == list(range(40))
    assert deletion.forget.tolist() == sorted(deletion.forget.tolist())
    assert (deletion.name, deletion.seed) == (f"people {fraction:.0%}", 1)
    assert torch.equal(deletion.forget, forget_people(person, fraction, seed=1).forget)
    assert not torch.equal(deletion.forget, forget_people(person, fraction, seed=2).forget)


def test_who_is_forgotten_is_uniform():
    person = torch.arange(5).repeat_interleave(2)
    counts = torch.stack([
        person[forget_people(person, 0.4, seed=seed).forget].bincount(minlength=5) for seed in range(500)
    ])
    assert bool(((counts.sum(0) / 1000 - 0.4).abs() < 5 * math.sqrt(0.24 / 500)).all())


# ------------------------------------------------------------------ prediction


@pytest.fixture(scope="module")
def tiny():
    """A model that knows eight people's birth places, with two of them to forget."""
    split = profiles(8, test_people=1, facts=1)
    x, y = split.x_train, split.y_train
    model = CausalLM(len(split.vocabulary), context=x.shape[1], width=16, depth=1, heads=2)
    model = train(model, x, y, epochs=300, lr=5e-3, batch_size=8, loss="causal_lm")
    deletion = forget_people(split.person_train, 0.25)
    return model, *((x[rows], y[rows]) for rows in (deletion.forget, deletion.retain))


def test_npo_is_predicted_on_a_language_model(tiny):
    sizes = {"rank": 60, "seeds": 1, "steps": 10, "batch_size": 6}
    report = stabkit.predict(*tiny, algorithm="npo", loss="causal_lm", lr=1e-3, **sizes)
    assert (report.run.algorithm, report.run.settings["beta"]) == ("npo", 0.1)
    problem = UnlearningProblem(*tiny, loss="causal_lm")
    assert problem.retain_loss < 0.1 < problem.divergence_level
    for lr, diverges in ((1e-3, False), (1.0, True)):
        assert (report.at(lr=lr).probability > 0.5) == diverges
        algorithm = stabkit.algorithms.NPO(lr=lr, steps=10, batch_size=6)
        assert run(problem, algorithm).diverged == diverges


def test_a_language_model_is_a_cell_of_the_benchmark(monkeypatch):
    keys = {cell.key: cell for cell in cells.CELLS if cell.dataset == "profiles"}
    plain = {"profiles-lm-people10-graddiff", "profiles-lm-people10-npo"}
    assert set(keys) == plain | {f"{key}-adamw" for key in plain}
    assert {cell.role for cell in keys.values()} == {"evaluation", "AdamW evaluation"}
    monkeypatch.setitem(cells.DATASETS, "profiles", lambda seed: profiles(10, test_people=1, facts=1, seed=seed))
    monkeypatch.setitem(cells.EPOCHS, "profiles", 60)
    monkeypatch.setitem(
        cells.MODELS, "lm", lambda split, seed: CausalLM(105, context=8, width=8, depth=1, heads=2, seed=seed)
    )
    cell = Cell(dataset="profiles", model="lm", deletion="people10", algorithm="npo", steps=10)
    trained, deletion = cells.prepared(cell, 2)
    assert trained.loss == "causal_lm"
    assert trained.split.vocabulary == VOCABULARY
    assert trained.split.person_train[deletion.forget].unique().numel() == 1 == deletion.forget_count
    found = record_cell(cell, 2, quick=True)
    assert len(found.records) == 8
    assert all(math.isfinite(score) for record in found.records for score in record.one.scores)
    assert found.linearised_samples == (9, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: profiles(0), "`people` of `profiles` must be a whole number >= 1; got 0"),
        (lambda: profiles(5, test_people=0), "`test_people` of `profiles` must be a whole number >= 1; got 0"),
        (lambda: profiles(5, facts=7), r"`facts` of `profiles` must be a whole number in \[1, 6\]; got 7"),
        (lambda: profiles(320, test_people=5), "must be at most 324 together, .*; got 320 and 5. Ask for fewer"),
        (lambda: profiles(2).decode(torch.zeros(2, 3)), r"must be one row, shape \(T,\); got shape \(2, 3\)"),
        (lambda: profiles(2).decode(torch.tensor([1, 105])), r"must be in \[0, 104\], or -100; got 105. Give tokens"),
        (lambda: profiles(2).decode(torch.tensor([-1])), r"`tokens` of `decode` .*; got -1\."),
        (lambda: forget_people(torch.arange(5), 0.05), "one to retain; got 0.05 of 5 people, which is 0"),
        (lambda: forget_people(torch.zeros(9), 0.5), "one to retain; got 0.5 of 1 people, which is 0"),
        (lambda: forget_people(torch.arange(5), 1), r"`fraction` of `forget_people` .*\(0, 1\); got 1"),
        (lambda: forget_people(torch.zeros(4, 2), 0.5), r"labels of `forget_people` .*got shape \(4, 2\)"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
