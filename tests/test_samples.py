"""Every way of handing over data gives the same samples, and what is wrong with a set is said by name."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from stabkit import data as data_module
from stabkit.data import as_samples
from stabkit.samples import map_tensors, tensors_of

CPU = torch.device("cpu")
N = 23
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(1))


def read(data, name="forget", dtype=torch.float32):
    return as_samples(data, name=name, device=CPU, dtype=dtype)


class MapStyle(Dataset):
    """Rows of two tensors, targets as plain integers."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index], int(self.y[index])


class DictStyle(MapStyle):
    def __getitem__(self, index):
        return {"inputs": self.x[index], "labels": self.y[index]}


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(x, y) for x, y in zip(X, Y, strict=True)])


class Rows(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def generator(size=5):
    for start in range(0, N, size):
        yield X[start : start + size], Y[start : start + size]


class Reiterable:
    """Neither a sequence nor a data set."""

    def __iter__(self):
        return generator(7)


FORMS = {
    "pair": lambda: (X, Y),
    "numpy pair": lambda: (X.numpy(), Y.numpy()),
    "pair with a list of labels": lambda: (X, Y.tolist()),
    "dataset of lists": lambda: MapStyle(X.tolist(), Y),
    "stream of lists": lambda: Rows([(x, int(y)) for x, y in zip(X.tolist(), Y, strict=True)]),
    "dataset": lambda: MapStyle(),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "list of samples": lambda: [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "list of samples with tensor targets": lambda: [(x, y) for x, y in zip(X, Y, strict=True)],
    "subset": lambda: Subset(TensorDataset(torch.cat([X, X]), torch.cat([Y, Y])), list(range(N))),
    "concatenated": lambda: ConcatDataset([MapStyle(X[:9], Y[:9]), MapStyle(X[9:], Y[9:])]),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=6),
    "shuffling loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=6, shuffle=True),
    "loader that drops": lambda: DataLoader(TensorDataset(X, Y), batch_size=10, drop_last=True),
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=6),
    "stream": lambda: Stream(),
    "loader without batching": lambda: DataLoader(list(generator()), batch_size=None),
    "list of batches": lambda: list(generator()),
    "list of list batches": lambda: [list(batch) for batch in generator()],
    "tuple of batches": lambda: tuple(generator(12)),
    "one batch in a list": lambda: [(X, Y)],
    "generator": lambda: generator(),
    "iterable": lambda: Reiterable(),
}
DICT_FORMS = {
    "dict": lambda: {"inputs": X, "labels": Y},
    "dict, labels first": lambda: {"label": Y, "inputs": X},
    "dict of arrays": lambda: {"inputs": X.numpy(), "targets": Y.numpy()},
    "pair of dict and targets": lambda: ({"inputs": X}, Y),
    "dataset of dicts": lambda: DictStyle(),
    "dataset of dicts of lists": lambda: DictStyle(X.tolist(), Y.tolist()),
    "loader of dicts": lambda: DataLoader(DictStyle(), batch_size=4),
    "batches of dicts": lambda: [{"inputs": x, "target": y} for x, y in generator()],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(form):
    samples = read(FORMS[form]())
    inputs, targets = samples.batch(torch.arange(N))
    assert len(samples) == N
    assert targets.dtype == torch.int64
    torch.testing.assert_close(inputs, X, rtol=0, atol=0)
    torch.testing.assert_close(targets, Y, rtol=0, atol=0)
    torch.testing.assert_close(samples.targets(), Y, rtol=0, atol=0)


@pytest.mark.parametrize("form", DICT_FORMS)
def test_every_form_of_dicts_gives_the_same_rows(form):
    inputs, targets = read(DICT_FORMS[form]()).batch(torch.tensor([3, 1, 3]))
    assert list(inputs) == ["inputs"]
    torch.testing.assert_close(inputs["inputs"], X[[3, 1, 3]], rtol=0, atol=0)
    torch.testing.assert_close(targets, Y[[3, 1, 3]], rtol=0, atol=0)


def test_several_inputs_become_a_tuple():
    extra = X.square()
    forms = {
        "pair": ((X, extra), Y),
        "dataset": TensorDataset(X, extra, Y),
        "batches": [(X[:9], extra[:9], Y[:9]), (X[9:], extra[9:], Y[9:])],
        "generator": ((X[i : i + 4], extra[i : i + 4], Y[i : i + 4]) for i in range(0, N, 4)),
    }
    for name, data in forms.items():
        inputs, targets = read(data).batch(torch.arange(N))
        assert isinstance(inputs, tuple), name
        torch.testing.assert_close(inputs, (X, extra), rtol=0, atol=0)
        torch.testing.assert_close(targets, Y, rtol=0, atol=0)


def test_tables_are_read_by_column():
    pandas = pytest.importorskip("pandas")
    table, labels = pandas.DataFrame(X.numpy()), pandas.Series(Y.numpy())
    inputs, targets = read((table, labels)).batch(torch.arange(N))
    torch.testing.assert_close(inputs, X, rtol=0, atol=0)
    torch.testing.assert_close(targets, Y, rtol=0, atol=0)
    with pytest.raises(TypeError, match="`forget` must come with targets; got a single dataframe"):
        read(table)
    table["job"] = "cook"
    with pytest.raises(TypeError, match="inputs of `forget` must be numbers; got 'cook'"):
        read((table, labels))


def test_token_lists_become_rows_of_tokens():
    tokens = [[3, 1, 2], [4, 0, 5]]
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    batch = {"input_ids": tokens, "labels": tokens}
    for data, size in ((rows, 2), (rows[:1], 1), (batch, 2), ([batch, batch], 4)):
        assert read(data).size == size
        inputs, targets = read(data).batch(torch.tensor([0]))
        assert torch.equal(inputs["input_ids"], torch.tensor([[3, 1, 2]]))
        assert torch.equal(targets, torch.tensor([[3, 1, 2]]))
    two_inputs, _ = read([([X[0], X[1]], 0), ([X[2], X[3]], 1)]).batch(torch.arange(2))  # a list of tensors is not one
    torch.testing.assert_close(two_inputs, (X[[0, 2]], X[[1, 3]]))


def test_rows_of_images_by_name():
    images = torch.rand(5, 1, 3, 3)
    for rows in (
        [{"x": image, "label": i} for i, image in enumerate(images)],
        [{"x": images, "label": torch.arange(5)}],
    ):
        inputs, targets = read(rows).batch(torch.arange(5))
        torch.testing.assert_close(inputs, {"x": images})
        assert targets.tolist() == list(range(5))


def test_columns_of_batches_are_matched_by_name():
    first, second = ({"a": X[:9], "b": X[:9] + 1, "labels": Y[:9]}, {"b": X[9:] + 1, "labels": Y[9:], "a": X[9:]})
    inputs, targets = read([first, second]).batch(torch.arange(N))
    torch.testing.assert_close(inputs, {"a": X, "b": X + 1})
    torch.testing.assert_close(targets, Y)


@pytest.mark.parametrize("form", ["dataset", "shuffling loader"])
def test_sets_too_large_for_memory_are_read_by_index(form, monkeypatch):
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", 0)
    data = FORMS[form]()
    reads = []
    dataset = data.dataset if isinstance(data, DataLoader) else data
    fetch = type(dataset).__getitem__
    monkeypatch.setattr(type(dataset), "__getitem__", lambda self, i: reads.append(i) or fetch(self, i))
    samples = read(data)
    assert len(set(reads)) <= 8 < N  # a few rows, to learn their shape and that they are the same twice
    inputs, targets = samples.batch(torch.tensor([5, 2]))
    torch.testing.assert_close(inputs, X[[5, 2]])
    torch.testing.assert_close(targets, Y[[5, 2]])
    torch.testing.assert_close(samples.targets(), Y)


def test_a_sampler_chooses_the_rows():
    wanted = [7, 2, 11, 4]
    dataset = TensorDataset(X, Y)
    by_sampler = DataLoader(dataset, batch_size=3, sampler=SubsetRandomSampler(wanted))
    by_batches = DataLoader(dataset, batch_sampler=BatchSampler(SubsetRandomSampler(wanted), 3, drop_last=False))
    for loader in (by_sampler, by_batches):
        inputs, targets = read(loader).batch(torch.arange(4))
        torch.testing.assert_close(inputs, X[sorted(wanted)])
        torch.testing.assert_close(targets, Y[sorted(wanted)])
    assert read(DataLoader(dataset, sampler=RandomSampler(dataset, replacement=True))).size == N


def test_the_global_random_state_survives_a_shuffling_loader():
    def states():
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        return torch.get_rng_state().tolist(), python, [str(part) for part in numpy]

    before = states()
    for form in FORMS:
        read(FORMS[form]())
    read(DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * N, 5, replacement=False)))
    assert states() == before


PAD = 59  # by which models may know where a text ends


def texts(lengths):
    """Rows of tokens, and their collation padded to the longest of a batch."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 50, (int(length),), generator=g) for length in lengths]

    def collate(some, size=None):
        size = size or max(map(len, some))
        ids, mask, labels = (torch.full((len(some), size), fill) for fill in (PAD, 0, -100))
        for k, row in enumerate(some):
            ids[k, : len(row)], mask[k, : len(row)], labels[k, : len(row)] = row, 1, row
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    return rows, collate


def test_texts_padded_batch_by_batch_are_padded_to_one_length():
    lengths = torch.randint(2, 9, (1500,), generator=torch.Generator().manual_seed(1))
    lengths[1300] = 12  # the longest is in the second part that is read
    rows, collate = texts(lengths)
    whole = collate(rows)
    loader = DataLoader(rows, batch_size=4, collate_fn=collate)
    for data in (loader, list(loader)):
        inputs, targets = read(data).batch(torch.arange(1500))
        assert torch.equal(targets, whole["labels"])
        assert all(torch.equal(inputs[key], whole[key]) for key in ("input_ids", "attention_mask"))


def test_labels_of_texts_are_padded_where_they_are_labels_of_tokens():
    """Five labels a text are no tokens, though a batch of texts of five tokens has as many."""
    rows, collate = texts([5, 4, 9, 7])
    batches = [collate(rows[:2]), collate(rows[2:])]
    several = torch.arange(10).reshape(2, 5).float()
    inputs, targets = read([{**batch, "labels": several} for batch in batches]).batch(torch.arange(4))
    assert inputs["input_ids"].shape == (4, 9)
    assert torch.equal(targets, several.repeat(2, 1))


def test_texts_without_a_mask_or_padded_at_the_left_are_not_padded_unasked():
    rows, collate = texts([3, 5, 4, 6])
    batches = [collate(rows[:2]), collate(rows[2:])]
    bare = [{key: value for key, value in batch.items() if key != "attention_mask"} for batch in batches]
    left = [{key: value.flip(1) for key, value in batch.items()} for batch in batches]
    full = [{"input_ids": ids, "attention_mask": ids > -1, "labels": ids} for ids in (rows[1][None], rows[3][None])]
    for data in (bare, left, full):
        with pytest.raises(
            ValueError, match=r"samples of one shape; got \[\(5,\), \(6,\)\].*shows with what, at the right"
        ):
            read(data)


def test_a_data_set_without_a_length_is_refused():
    class Endless(torch.utils.data.Dataset):
        def __getitem__(self, index):
            return X[index], Y[index]

    for data in (Endless(), DataLoader(Endless(), sampler=torch.utils.data.SequentialSampler(X))):
        with pytest.raises(TypeError, match="`retain` must have a length; got Endless, which has none"):
            read(data, name="retain")


def test_dtypes():
    wide = X.double()
    for integers in (torch.uint8, torch.uint16, torch.int16, torch.uint32, torch.uint64):
        inputs, targets = read((wide, Y.to(integers)), dtype=torch.float32).batch(torch.arange(3))
        assert (inputs.dtype, targets.dtype) == (torch.float32, torch.int64)
        assert targets.tolist() == Y[:3].tolist()
    inputs, _ = read((X, Y), dtype=torch.float64).batch(torch.arange(3))
    assert inputs.dtype == torch.float64
    assert wide.dtype == torch.float64
    mask = {"inputs": X, "mask": X > 0, "labels": Y.int()}
    inputs, targets = read(mask).batch(torch.arange(3))
    assert (inputs["mask"].dtype, targets.dtype) == (torch.bool, torch.int64)


@given(size=st.integers(1, 40), batch=st.integers(1, 50), count=st.none() | st.integers(1, 60), seed=st.integers(0, 99))
def test_batches_and_subsets_cover_what_they_say(size, batch, count, seed):
    samples = read((torch.arange(size).float().unsqueeze(1), torch.arange(size)))
    chosen = samples.subset(count, seed)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen.numel() == (size if count is None else min(size, count))
    assert torch.equal(chosen, samples.subset(count, seed))
    parts = list(samples.batches(batch, chosen))
    assert torch.equal(torch.cat([targets for _, targets in parts]), chosen)
    assert torch.equal(torch.cat([inputs for inputs, _ in parts]).flatten().long(), chosen)
    assert all(len(targets) == batch for _, targets in parts[:-1])


def test_subsets_are_uniform():
    samples = read((X, Y))
    counts = torch.zeros(N)
    for seed in range(2000):
        counts[samples.subset(5, seed)] += 1
    share = 5 / N
    error = (share * (1 - share) / 2000) ** 0.5
    assert float((counts / 2000 - share).abs().max()) < 5 * error


# ------------------------------------------------------------------ overlap

DATA = TensorDataset(X, Y)
MAP = MapStyle()
LIST = [(x, int(y)) for x, y in zip(X, Y, strict=True)]
ARRAY, ARRAY_LABELS = X.numpy(), Y.numpy()
WIDE = torch.randn(20, 10)
POSITIONS = torch.arange(4)
OVERLAPS = {
    "the same tensors": ((X, Y), (X, Y), N),
    "views that overlap": ((X[:10], Y[:10]), (X[6:], Y[6:]), 4),
    "views of another shape": ((X[:10].reshape(10, 2, 2), Y[:10]), (X[6:], Y[6:]), 4),
    "interleaved views that meet": ((X[::2], Y[::2]), (X[::3], Y[::3]), 4),
    "disjoint views": ((X[:10], Y[:10]), (X[10:], Y[10:]), 0),
    "interleaved views": ((X[::2], Y[::2]), (X[1::2], Y[1::2]), 0),
    "arrays that overlap": ((ARRAY[:10], ARRAY_LABELS[:10]), (ARRAY[8:], ARRAY_LABELS[8:]), 2),
    "equal values elsewhere": ((X, Y), (X.clone(), Y), 0),
    "one Dataset object": (MAP, MAP, N),
    "equal Dataset objects": (MapStyle(), MapStyle(), 0),
    "one list of samples": (LIST, LIST, N),
    "Subset indices": (Subset(MAP, [1, 2, 3, 4]), Subset(MAP, [4, 5, 3]), 2),
    "disjoint Subset indices": (Subset(MAP, [1, 2]), Subset(MAP, [3, 4]), 0),
    "a Subset and its whole": (Subset(MAP, [1, 2]), MAP, 2),
    "nested Subsets": (Subset(Subset(MAP, [9, 8, 7, 6]), [0, 1]), Subset(MAP, [8, 1]), 1),
    "nested Subsets, disjoint": (Subset(Subset(MAP, [9, 8, 7, 6]), [0, 1]), Subset(MAP, [0, 1, 6]), 0),
    "concatenated": (ConcatDataset([Subset(MAP, [0, 1]), Subset(DATA, [5, 6])]), Subset(DATA, [6, 7]), 1),
    "concatenated twice": (ConcatDataset([MAP, MAP]), Subset(MAP, [6, 7]), 2),
    "TensorDatasets on one storage": (TensorDataset(X[:10], Y[:10]), TensorDataset(X[6:], Y[6:]), 4),
    "TensorDatasets on interleaved rows": (TensorDataset(X[::2], Y[::2]), TensorDataset(X[1::2], Y[1::2]), 0),
    "TensorDatasets on other columns": (TensorDataset(WIDE[:, :5], Y[:20]), TensorDataset(WIDE[:, 5:], Y[:20]), 0),
    "a TensorDataset and its tensors": (Subset(DATA, [1, 2, 3]), (X[2:], Y[2:]), 2),
    "loaders": (DataLoader(Subset(DATA, [1, 2]), batch_size=1), DataLoader(DATA, batch_size=9, shuffle=True), 2),
    "samplers": (
        DataLoader(DATA, sampler=SubsetRandomSampler([1, 2, 3])),
        DataLoader(DATA, sampler=SubsetRandomSampler([3, 4, 5])),
        1,
    ),
    "an expanded first input": (
        {"position": POSITIONS.expand(9, 4), "labels": Y[:9]},
        {"position": POSITIONS.expand(9, 4), "labels": Y[9:18]},
        0,
    ),
    "generators": (generator(), generator(), 0),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_overlap_is_counted_where_it_can_be_told(case):
    left, right, shared = OVERLAPS[case]
    first, second = read(left), read(right, "retain")
    assert (first.overlap(second), second.overlap(first)) == (shared, shared)


# ------------------------------------------------------------------ errors

EMPTY = {
    "pair": (X[:0], Y[:0]),
    "dict": {"inputs": X[:0], "labels": Y[:0]},
    "list": [],
    "tuple": (),
    "dataset": Subset(DATA, []),
    "loader": DataLoader(Subset(DATA, []), batch_size=2),
    "generator": (batch for batch in ()),
}


@pytest.mark.parametrize("name", ["forget", "retain"])
@pytest.mark.parametrize("form", EMPTY)
def test_an_empty_set_is_refused(form, name):
    with pytest.raises(ValueError, match=f"`{name}` must hold at least one sample; got an empty set"):
        read(EMPTY[form], name)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (X, TypeError, "`forget` must come with targets; got a single tensor"),
        (
            (X.to("meta"), Y),
            ValueError,
            r"inputs of `forget` must be numbers; got a tensor on the meta device, which has a shape \(23, 4\) .* Load the",
        ),
        ((X, Y.to("meta")), ValueError, "targets of `forget` must be numbers; got a tensor on the meta device"),
        (
            TensorDataset(X.to("meta"), Y.to("meta")),
            ValueError,
            "of `forget` must be numbers; got a tensor on the meta device",
        ),
        (3, TypeError, "`forget` must be a DataLoader.*; got int"),
        (None, TypeError, "got NoneType"),
        (X.numpy(), TypeError, "`forget` must come with targets; got a single ndarray"),
        ("digits.npz", TypeError, "`forget` must be a DataLoader.*; got str"),
        (b"digits", TypeError, "`forget` must be a DataLoader.*; got bytes"),
        ((X[:2], ["cat", "dog"]), TypeError, "targets of `forget` must be numbers; got 'cat'. Encode text as numbers"),
        ((X[:2], np.array(["cat", "dog"])), TypeError, "targets of `forget` must be numbers; got 'cat'"),
        (
            (X[:2], np.array([1, None], dtype=object)),
            TypeError,
            "targets of `forget` must be numbers; got None. Leave out",
        ),
        (
            (X[:2], [0, 1, [2]]),
            ValueError,
            "targets of `forget` must be numbers of one type and one shape; got TypeError",
        ),
        ((X[:2], None), TypeError, "targets of `forget` must be numbers; got None"),
        (
            {"a": X[:2], "text": ["ab", "cd"], "labels": Y[:2]},
            TypeError,
            "column 'text' of `forget` must be .* got 'ab'",
        ),
        ({"a": X[:2], "mask": None, "labels": Y[:2]}, TypeError, "column 'mask' of `forget` must be numbers; got None"),
        (({"text": ["ab", "cd"]}, Y[:2]), TypeError, "column 'text' of `forget` must be numbers; got 'ab'"),
        (
            {"input_ids": [[1, 2], [3]], "labels": [[1, 2], [3]]},
            ValueError,
            r"column 'input_ids' of `forget` must be .* one shape; got ValueError: .* at dim 1 \(got 1\). Pad or crop",
        ),
        (
            [{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}],
            ValueError,
            r"samples of `forget` must be .* one shape; got RuntimeError: .*got \[2\] at entry 0 and \[1\] at entry 1",
        ),
        (
            [(X[0], 0), (X[1, :3], 1)],
            ValueError,
            r"samples of `forget` must be .*got \[4\] at entry 0 and \[3\] at entry 1",
        ),
        ([(X[0], "cat"), (X[1], "dog")], TypeError, "targets of `forget` must be numbers; got 'cat'"),
        ([("a b", 0), ("c", 1)], TypeError, "inputs of `forget` must be numbers; got 'a b'"),
        ([(X[0], None), (X[1], 1)], TypeError, "samples of `forget` must be numbers; got None"),
        (
            [(object(), 0), (object(), 1)],
            TypeError,
            "samples of `forget` must be numbers; got <class 'object'>. Convert",
        ),
        (
            [(X[0], 0, "0.png"), (X[1], 1, "1.png")],
            TypeError,
            r"targets of `forget` must be numbers; got '0.png'. A sample's .* pass \[\(x, y\) for x, y, _ in data\]",
        ),
        (Rows([(X[0], 0), (X[1, :3], 1)]), ValueError, r"samples of `forget` must be .*got \[4\] at entry 0"),
        (
            [{"a": X[0], "b": X[0], "label": 0}, {"a": X[1], "label": 0}],
            ValueError,
            "samples of `forget`.*KeyError: 'b'",
        ),
        (
            [{"a": X, "b": X, "labels": Y}, {"a": X, "labels": Y}],
            ValueError,
            r"`forget` must have the same inputs in every batch; got \['a', 'b'\] and \['a'\]",
        ),
        ([(X, X, Y), (X, Y)], ValueError, "`forget` must have the same inputs in every batch; got 2 and 1"),
        ({"pixels": X, "mask": Y}, TypeError, "a key among labels, label, targets, target; got pixels, mask"),
        (list(X), TypeError, r"`forget` must give \(inputs, targets\) pairs.*of type Tensor"),
        (TensorDataset(X), TypeError, r"`forget` must give .* of type (list|tuple)"),
        ((X, Y[:5]), ValueError, r"as many inputs as targets; got leading sizes \[5, 23\]"),
        ({"a": X, "b": X[:4], "labels": Y}, ValueError, r"got leading sizes \[4, 23\]"),
        ([(X[:, :3], Y), (X, Y)], ValueError, r"`forget` must have samples of one shape; got \[\(3,\), \(4,\)\]"),
        (
            [(X, X[:, :1]), (X, X[:, :2])],
            ValueError,
            r"`forget` must have samples of one shape; got \[\(1,\), \(2,\)\]",
        ),
        (((x, y) for x, y in zip(X, Y, strict=True)), ValueError, "`forget` must give batches.*got single samples"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(data, error, message):
    with pytest.raises(error, match=message):
        read(data)


def test_random_augmentation_is_refused():
    class Noisy(MapStyle):
        def __getitem__(self, index):
            return self.x[index] + torch.randn(4), int(self.y[index])

    with pytest.raises(ValueError, match="`retain` must give the same sample each time; sample 0 read twice differs"):
        read(Noisy(), "retain")


def test_missing_values_do_not_look_like_augmentation():
    x = X.clone()
    x[0, 0] = float("nan")
    assert read(MapStyle(x, Y)).size == N


def test_trees_keep_their_structure():
    tree = {"a": (X, [Y, X]), "b": 3}
    assert [t.shape for t in tensors_of(tree)] == [X.shape, Y.shape, X.shape]
    doubled = map_tensors(lambda t: 2 * t, tree)
    assert torch.equal(doubled["a"][1][0], 2 * Y)
    assert doubled["b"] == 3


def test_a_sampler_is_read_once_and_its_generator_given_back():
    data = TensorDataset(X, Y)
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    chosen = SubsetRandomSampler(range(3, 9), generator=generator)
    assert read(DataLoader(data, batch_size=2, sampler=chosen)).size == 6
    assert torch.equal(generator.get_state(), before)
    weighted = WeightedRandomSampler(torch.ones(N), 10 * N, generator=generator)
    with pytest.raises(ValueError, match=rf"got WeightedRandomSampler, which drew {10 * N} and {N} different ones"):
        read(DataLoader(data, batch_size=2, sampler=weighted))


def test_rare_augmentation_is_found():
    class Flipping(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            self.reads = getattr(self, "reads", 0) + 1
            return X[index] + (self.reads % 2) * (index > N // 2), Y[index]

    with pytest.raises(ValueError, match=r"the same sample each time; sample \d+ read twice differs"):
        read(Flipping())


@pytest.mark.parametrize("room", [10**9, 10])
def test_data_move_to_an_accelerator_once_where_there_is_room(monkeypatch, room):
    """The meta device stands in for one."""
    monkeypatch.setattr(data_module, "free_memory", lambda device: room)
    x, y = {"a": torch.ones(6, 3), "mask": torch.ones(6, 2)}, torch.arange(6)
    samples = as_samples((x, y), name="retain", device=torch.device("meta"), dtype=torch.float32)
    for _ in range(2):
        inputs, targets = samples._fetch(torch.tensor([4, 1]))
        wanted = "meta" if room > 10 else "cpu"
        assert {t.device.type for t in (*inputs.values(), targets)} == {wanted}
        assert {t.device.type for t in samples.batch(torch.tensor([0]))[0].values()} == {"meta"}
    assert x["a"].device.type == "cpu"
