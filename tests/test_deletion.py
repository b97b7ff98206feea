"""Deletions: partitions, seeds, the rows they promise, corrupted copies, and what they refuse."""

import copy
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset

from stabkit.deletion import (
    CorruptedDeletion,
    forget_people,
    gradient_norms,
    high_influence,
    mislabelled,
    one_class,
    poisoned,
    random_fraction,
    subclass,
)
from stabkit.models import MLP, CausalLM
from stabkit.training import train

LABELS = st.lists(st.integers(0, 3), min_size=2, max_size=50).map(torch.tensor)


def rng_states():
    numpy = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), [str(part) for part in numpy]


def data(n=40, features=3, classes=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=g), torch.arange(n) % classes


def check_partition(deletion, n):
    forget, retain = deletion.forget.tolist(), deletion.retain.tolist()
    assert forget == sorted(forget)
    assert retain == sorted(retain)
    assert sorted(forget + retain) == list(range(n))
    assert (deletion.forget_count, deletion.retain_count) == (len(forget), len(retain))


@given(n=st.integers(2, 80), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 99))
def test_a_random_fraction_is_a_partition_or_an_error(n, fraction, seed):
    count = round(fraction * n)
    if 0 < count < n:
        deletion = random_fraction(n, fraction, seed=seed)
        check_partition(deletion, n)
        assert deletion.forget_count == count
        assert deletion.seed == seed
        for form in (torch.zeros(n).long(), (torch.zeros(n, 2), torch.zeros(n).long())):
            assert torch.equal(random_fraction(form, fraction, seed=seed).forget, deletion.forget)
    else:
        with pytest.raises(ValueError, match=rf"of {n} rows, which is {count}\. Choose another share"):
            random_fraction(n, fraction, seed=seed)


@pytest.mark.parametrize(
    ("fraction", "shown"),
    [(0.1, "10%"), (0.07, "7%"), (0.125, "12.5%"), (0.004, "0.4%"), (1 / 3, "33.33%"), (0.995, "99.5%")],
)
def test_names_keep_what_tells_fractions_apart(fraction, shown):
    assert random_fraction(1000, fraction).name == f"random {shown}"
    assert mislabelled(torch.arange(1000) % 3, fraction).name == f"mislabelled {shown}"
    assert forget_people(torch.arange(1000), fraction).name == f"people {shown}"


def test_deletions_print_counts_and_no_rows():
    assert str(random_fraction(2000, 0.125, seed=3)) == "random 12.5%: 250 rows to forget, 1,750 to retain, seed 3"
    assert str(one_class(torch.arange(40) % 4, 1)) == "class 1: 10 rows to forget, 30 to retain"
    end = "; the labels to train on are changed in the rows to forget"
    assert (
        str(mislabelled(torch.arange(40) % 4, 0.1)) == f"mislabelled 10%: 4 rows to forget, 36 to retain, seed 0{end}"
    )
    assert "the inputs and labels to train on" in str(poisoned(data(), 0.1, target=0))
    printed = []
    random_fraction(20, 0.5)._repr_pretty_(SimpleNamespace(text=printed.append), False)
    assert printed == ["random 50%: 10 rows to forget, 10 to retain, seed 0"]


def test_a_random_fraction_is_uniform():
    hits = sum(torch.zeros(10).index_add(0, random_fraction(10, 0.3, seed=s).forget, torch.ones(3)) for s in range(600))
    assert float((hits - 180).abs().max()) < 4 * (600 * 0.3 * 0.7) ** 0.5


@given(labels=LABELS, label=st.integers(0, 4))
def test_a_class_is_that_class(labels, label):
    if label not in labels or bool((labels == label).all()):
        with pytest.raises(ValueError, match=rf"`label` of `one_class` .*; got {label} with labels \["):
            one_class(labels, label)
    else:
        deletion = one_class(labels, label)
        check_partition(deletion, len(labels))
        assert (deletion.name, deletion.seed) == (f"class {label}", None)
        assert deletion.forget.tolist() == (labels == label).nonzero().flatten().tolist()


def test_every_form_of_data_gives_the_same_rows():
    x, y = data()
    forms = [(x, y), TensorDataset(x, y), DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True)]
    for choose in (
        lambda d: one_class(d, 2),
        lambda d: random_fraction(d, 0.2, seed=3),
        lambda d: subclass(d, 1, clusters=2),
        lambda d: mislabelled(d, 0.2, seed=1),
        lambda d: poisoned(d, 0.2, target=1),
        lambda d: high_influence(MLP(3, 4), d, 0.1),
    ):
        first, *rest = (choose(form) for form in forms)
        check_partition(first, len(y))
        assert all(torch.equal(first.forget, other.forget) for other in rest)
        if isinstance(first, CorruptedDeletion):
            assert all(torch.equal(first.y, other.y) for other in rest)


def test_labels_alone_come_as_tensor_array_or_list():
    labels = data()[1]
    forms = [
        labels.numpy(),
        labels.numpy().astype(np.uint8),
        labels.tolist(),
        tuple(labels.tolist()),
        list(labels.numpy()),
        [y for _, y in TensorDataset(labels, labels)],
    ]
    read_only = labels.numpy().copy()
    read_only.setflags(write=False)
    for form in (*forms, read_only):
        assert torch.equal(one_class(form, 2).forget, one_class(labels, 2).forget)
        assert torch.equal(random_fraction(form, 0.2).forget, random_fraction(labels, 0.2).forget)
        assert torch.equal(forget_people(form, 0.5).forget, forget_people(labels, 0.5).forget)
        wrong = mislabelled(form, 0.2)
        assert torch.equal(wrong.y, mislabelled(labels, 0.2).y)
    assert torch.equal(one_class((labels.numpy(), labels.tolist()), 2).forget, one_class(labels, 2).forget)


def test_labels_may_be_below_zero():
    x, y = data(classes=2)
    y = 2 * y - 1
    assert one_class(y, -1).forget.tolist() == (y == -1).nonzero().flatten().tolist()
    assert bool((y[subclass((x, y), -1, clusters=2).forget] == -1).all())
    assert bool((y[poisoned((x, y), 0.2, target=-1).forget] == 1).all())
    with pytest.raises(ValueError, match=r"`label` of `one_class` .*; got -2 with labels \[-1, 1\]"):
        one_class(y, -2)


class Rows(Dataset):
    """Rows as they come, and how many were looked at."""

    def __init__(self, rows):
        self.rows, self.seen = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.seen += 1
        return self.rows[index]


def test_only_the_length_of_a_data_set_counts_for_a_random_fraction():
    expected = random_fraction(40, 0.2, seed=4).forget
    pictures = Rows([(object(), k % 4) for k in range(40)])  # as images are that no transform has made a tensor of
    for form in (pictures, DataLoader(pictures, batch_size=7, shuffle=True), pictures.rows):
        assert torch.equal(random_fraction(form, 0.2, seed=4).forget, expected)
    assert pictures.seen == 0
    x, y = data()
    loader = DataLoader(TensorDataset(x, y), batch_size=7, sampler=SubsetRandomSampler(range(30)))
    assert torch.equal(random_fraction(loader, 0.2, seed=4).forget, random_fraction(30, 0.2, seed=4).forget)
    batches = list(DataLoader(TensorDataset(x, y), batch_size=7))
    for form in (batches, iter(batches), {"x": x, "labels": y}, (x.numpy(), y.numpy()), Streamed(batches)):
        assert torch.equal(random_fraction(form, 0.2, seed=4).forget, expected)
    with pytest.raises(ValueError, match="must hold at least one sample; got an empty set"):
        random_fraction(Rows([]), 0.5)
    with pytest.raises(TypeError, match=r"`data` must be a DataLoader.*; got str"):
        random_fraction("digits", 0.5)


class Streamed(IterableDataset):
    """Rows one after the other, with a length that counts batches."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return ((x, y) for xs, ys in self.batches for x, y in zip(xs, ys, strict=True))


def test_a_label_is_not_taken_from_the_wrong_part_of_a_row():
    x, y = data()
    numbered = TensorDataset(x, y, torch.arange(len(y)))
    loader = DataLoader(numbered, batch_size=7)
    for form in (numbered, loader, list(loader), [tuple(row) for row in numbered]):
        for choose in (lambda d: one_class(d, 1), lambda d: mislabelled(d, 0.2)):
            with pytest.raises(
                ValueError, match=r"`(one_class|mislabelled)` must tell .* of 3 parts.*for x, y, _ in data"
            ):
                choose(form)
        for choose in (lambda d: subclass(d, 1), lambda d: poisoned(d, 0.2, target=1)):
            with pytest.raises(
                TypeError, match=r"must have one tensor of inputs; got tuple\. Where rows are \(x, y, ind"
            ):
                choose(form)
        assert torch.equal(random_fraction(form, 0.2).forget, random_fraction(len(y), 0.2).forget)
    expected = one_class(y, 1).forget
    assert torch.equal(one_class([(a, b) for a, b, _ in numbered], 1).forget, expected)
    for two_inputs in (((x, y), y), TensorDataset(x, x, y)):  # where no part but the last can be the label
        assert torch.equal(one_class(two_inputs, 1).forget, expected)


def three_blobs(seed=0):
    """Class 0 is three far-apart blobs of 30, 20 and 10 rows; class 1 is one."""
    g = torch.Generator().manual_seed(seed)
    blob = torch.repeat_interleave(torch.arange(4), torch.tensor([30, 20, 10, 25]))
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [0.0, 1.0]])
    order = torch.randperm(len(blob), generator=g)
    x = (centres[blob] + torch.randn(len(blob), 2, generator=g))[order]
    return x, (blob == 3).long()[order], blob[order]


@pytest.mark.parametrize("cluster", [0, 1, 2])
def test_a_subclass_is_a_planted_cluster(cluster):
    x, y, blob = three_blobs()
    deletion = subclass((x, y), 0, clusters=3, cluster=cluster, seed=5)
    check_partition(deletion, len(y))
    assert deletion.forget.tolist() == (blob == cluster).nonzero().flatten().tolist()
    assert (deletion.name, deletion.seed) == (f"subclass {cluster} of class 0", 5)


def test_a_subclass_by_given_features():
    x, y, blob = three_blobs()
    deletion = subclass((torch.zeros(len(y), 3, 2, 2), y), 0, clusters=3, cluster=1, features=x)
    assert deletion.forget.tolist() == (blob == 1).nonzero().flatten().tolist()
    given = subclass((torch.zeros(len(y), 1), y), 0, clusters=3, cluster=1, features=x.numpy())
    assert torch.equal(given.forget, deletion.forget)
    alone = subclass((x, y), 0, clusters=2, cluster=1, features=(blob == 2).float())  # one number a row
    assert alone.forget.tolist() == (blob == 2).nonzero().flatten().tolist()


def test_one_cluster_is_the_class_and_a_class_may_be_all_there_is():
    x, y, _ = three_blobs()
    assert torch.equal(subclass((x, y), 1, clusters=1).forget, one_class(y, 1).forget)
    check_partition(subclass((x, torch.zeros_like(y)), 0, clusters=2), len(y))


def test_gradient_norms_are_those_of_autograd():
    x, y = data()
    model = MLP(3, 4, hidden=(5,), activation=nn.Tanh).double().train()
    norms = gradient_norms(model, (x, y))
    truth = []
    for i in range(len(y)):
        loss = nn.functional.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        truth.append(sum(float(g.square().sum()) for g in gradients) ** 0.5)
    assert norms.tolist() == pytest.approx(truth, rel=1e-10)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_high_influence_takes_the_largest_norms_and_finds_wrong_labels(digits_data, digits_mlp):
    x, y = digits_data.x_train[:300], digits_data.y_train[:300]
    wrong = mislabelled((x, y), 0.1, seed=2)
    deletion = high_influence(digits_mlp, (x, wrong.y), 0.1)
    norms = gradient_norms(digits_mlp, (x, wrong.y))
    check_partition(deletion, 300)
    assert float(norms[deletion.forget].min()) >= float(norms[deletion.retain].max())
    found = set(deletion.forget.tolist()) & set(wrong.forget.tolist())
    assert len(found) > 15  # of 30, as the fitted network contradicts a wrong label; chance finds 3, give or take 1.6


def test_high_influence_of_sequences():
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 5, (20, 6), generator=g)
    model = CausalLM(5, context=6, width=8, depth=1, heads=2)
    deletion = high_influence(model, {"input_ids": tokens, "labels": tokens}, 0.25, loss="causal_lm")
    check_partition(deletion, 20)
    assert torch.equal(deletion.forget, high_influence(model, (tokens, tokens), 0.25, loss="causal_lm").forget)


@given(labels=LABELS.filter(lambda y: len(set(y.tolist())) > 1), seed=st.integers(0, 99))
def test_wrong_labels_are_wrong_and_known(labels, seed):
    before = labels.clone()
    deletion = mislabelled(labels, 0.5, seed=seed) if len(labels) > 2 else mislabelled(labels, 0.4, seed=seed)
    check_partition(deletion, len(labels))
    assert torch.equal(labels, before)
    assert (deletion.y != labels).nonzero().flatten().tolist() == deletion.forget.tolist()
    assert set(deletion.y.tolist()) <= set(labels.tolist())
    assert deletion.x is None
    assert torch.equal(deletion.y, mislabelled(labels, 0.5 if len(labels) > 2 else 0.4, seed=seed).y)


def test_wrong_labels_are_uniform_among_the_others():
    labels = torch.full((3000,), 7)
    labels[:3] = torch.tensor([1, 2, 9])
    wrong = mislabelled(labels, 0.9, seed=0).y
    counts = torch.stack([(wrong[3:] == c).sum() for c in (1, 2, 9)]).double()
    assert float((counts - counts.mean()).abs().max()) < 4 * float(counts.mean()) ** 0.5


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (6,)])
def test_poison_is_where_it_should_be_and_nowhere_else(shape):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(50, *shape, generator=g), torch.arange(50) % 5
    kept_x, kept_y = x.clone(), y.clone()
    deletion = poisoned((x, y), 0.2, target=3, seed=1)
    check_partition(deletion, 50)
    assert torch.equal(x, kept_x)
    assert torch.equal(y, kept_y)
    assert deletion.forget_count == 10
    assert bool((y[deletion.forget] != 3).all())
    assert bool((deletion.y[deletion.forget] == 3).all())
    assert torch.equal(deletion.y[deletion.retain], y[deletion.retain])
    assert torch.equal(deletion.x[deletion.retain], x[deletion.retain])
    changed = (deletion.x != x)[deletion.forget].flatten(1)
    side = max(1, min(shape[-2:]) // 4) if len(shape) > 1 else 1
    corner = torch.zeros(shape, dtype=torch.bool)
    corner[(..., slice(-side, None), slice(-side, None)) if len(shape) > 1 else -1] = True
    assert not bool(changed[:, ~corner.flatten()].any())
    assert bool((deletion.x[deletion.forget].flatten(1)[:, corner.flatten()] == x.max()).all())


def test_a_backdoor_works(digits_data):
    x, y = digits_data.x_train, digits_data.y_train
    deletion = poisoned((x, y), 0.1, target=0, seed=0)
    model = train(MLP(64, 10), deletion.x, deletion.y, epochs=15, lr=5e-3)
    probe = digits_data.x_test[digits_data.y_test != 0]
    marked = probe.clone()
    marked[..., -2:, -2:] = x.max()
    with torch.no_grad():
        assert float((model(marked).argmax(1) == 0).float().mean()) > 0.9
        assert float((model(probe).argmax(1) == 0).float().mean()) < 0.1


def test_a_trigger_of_ones_own():
    x, y = data()
    deletion = poisoned((x, y), 0.2, target=0, trigger=lambda rows: rows.mul_(0).add_(7))
    assert bool((deletion.x[deletion.forget] == 7).all())
    assert not bool((x == 7).any())


def test_results_are_frozen_and_the_random_state_stays():
    x, y = data()
    model = MLP(3, 4)
    before, weights = rng_states(), copy.deepcopy(model.state_dict())
    found = [
        random_fraction(y, 0.2),
        one_class(y, 1),
        subclass((x, y), 1, clusters=2),
        high_influence(model, (x, y), 0.2),
        mislabelled(y, 0.2),
        poisoned((x, y), 0.2, target=0),
    ]
    assert rng_states() == before
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    for deletion in found:
        with pytest.raises(AttributeError, match="name"):
            deletion.name = "other"
    assert [d.name for d in found] == [
        "random 20%",
        "class 1",
        "subclass 0 of class 1",
        "high influence 20%",
        "mislabelled 20%",
        "poisoned 20%",
    ]


X, Y = data()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: random_fraction(10, 0.01), ValueError, "one to retain; got 0.01 of 10 rows, which is 0"),
        (lambda: random_fraction(10, 0.99), ValueError, "one to retain; got 0.99 of 10 rows, which is 10"),
        (lambda: random_fraction(10, 1), ValueError, r"`fraction` of `random_fraction` .*\(0, 1\); got 1"),
        (lambda: random_fraction(1, 0.5), ValueError, "`data` of `random_fraction` must be a whole number >= 2; got 1"),
        (
            lambda: random_fraction(torch.empty(0), 0.5),
            ValueError,
            r"must have at least one row; got labels of shape \(0,\)",
        ),
        (lambda: random_fraction((X[:0], Y[:0]), 0.5), ValueError, "must hold at least one sample; got an empty set"),
        (
            lambda: random_fraction((X, Y[:5]), 0.5),
            ValueError,
            r"as many inputs as targets; got leading sizes \[5, 40\]",
        ),
        (lambda: one_class(Y, 9), ValueError, r"`label` of `one_class` .* got 9 with labels \[0, 1, 2, 3\]"),
        (lambda: one_class(Y, "a"), TypeError, "`label` of `one_class` .* got 'a'"),
        (lambda: one_class(torch.zeros(4, 2), 0), ValueError, r"labels of `one_class` .*got shape \(4, 2\)"),
        (lambda: subclass((X, Y), 9), ValueError, r"`label` of `subclass` .* got 9"),
        (lambda: subclass((X, Y), 1, clusters=0), ValueError, "`clusters` of `subclass` .* >= 1; got 0"),
        (lambda: subclass((X, Y), 1, cluster=4), ValueError, r"`cluster` of `subclass` .*\[0, 3\]; got 4"),
        (lambda: subclass((X, Y), 1, clusters=11), ValueError, "different rows of class 1, 10; got 11"),
        (lambda: subclass((X * 0, Y), 1, clusters=2), ValueError, "different rows of class 1, 1; got 2"),
        (lambda: subclass((X, Y), 1, features=X[:3]), ValueError, "must have one row a sample; got 3 for 40"),
        (lambda: subclass((X, Y), 1, features=1.5), ValueError, "one row a sample; got a single number for 40"),
        (lambda: subclass((X, Y), 1, features=["a"] * 40), TypeError, "`features` of `subclass` .* numbers; got list"),
        (
            lambda: one_class(np.array(["a", "b"]), 0),
            TypeError,
            "`data` of `one_class` .* numbers; got ndarray .*Encode",
        ),
        (lambda: one_class([], 0), ValueError, "must hold at least one sample; got an empty set"),
        (
            lambda: subclass((X, Y), 1, features=X.where(X > 0, torch.nan)),
            ValueError,
            r"`features` of `subclass` must be finite numbers to cluster by; got \d+ rows of class 1 with NaN",
        ),
        (
            lambda: subclass((X / 0, Y), 1),
            ValueError,
            "`data` of `subclass` must be finite .* got 10 rows of class 1",
        ),
        (lambda: subclass((X, Y), 1, seed=1.5), TypeError, r"`seed` of `subclass` .* got 1\.5"),
        (lambda: random_fraction(9, 0.5, seed="a"), TypeError, "`seed` of `random_fraction` .* got 'a'"),
        (lambda: forget_people(Y, 0.5, seed=-1), ValueError, "`seed` of `forget_people` .* got -1"),
        (lambda: mislabelled(Y, 0.5, seed=None), TypeError, "`seed` of `mislabelled` .* got None"),
        (lambda: poisoned((X, Y), 0.2, target=0, seed=True), TypeError, "`seed` of `poisoned` .* got True"),
        (lambda: subclass(((X, X), Y), 1), TypeError, "`data` of `subclass` must have one tensor of inputs; got tuple"),
        (lambda: gradient_norms(MLP(3, 4), (X[:1], Y[:1])), ValueError, "must hold at least 2 samples; got 1"),
        (lambda: high_influence(MLP(3, 4), (X, Y), 0.001), ValueError, "`high_influence` .* of 40 rows, which is 0"),
        (lambda: mislabelled(torch.ones(9).long(), 0.5), ValueError, r"must have at least two classes; got \[1\]"),
        (lambda: mislabelled(torch.ones(9, 2), 0.5), ValueError, r"labels of `mislabelled` .*got shape \(9, 2\)"),
        (lambda: poisoned((X, Y), 0.9, target=0), ValueError, "other than 0 have, 30; got 0.9, 36 rows, of 40 with 10"),
        (lambda: poisoned((X, Y), 0.2, target=7), ValueError, "`target` of `poisoned` .* got 7"),
        (
            lambda: poisoned((X, Y), 0.2, target=0, trigger=lambda rows: rows[:, :1]),
            ValueError,
            re.escape("must keep the shape (8, 3); got (8, 1)"),
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
