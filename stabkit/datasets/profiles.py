"""Questions and answers about people who do not exist, for language models to learn by heart and to forget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stabkit._validate import check_int
from stabkit.datasets.splits import TensorSplit
from stabkit.losses import IGNORE_INDEX

Words = tuple[str, ...]

PADDING, END = "<pad>", "."


def _words(text: str) -> Words:
    """The words of a line."""
    return tuple(text.split())


FIRST_NAMES = _words(
    "adrel bomira cathun delwen eskil faroni gudra hostan ilvane jorrit kesmi lovanda mirek nubela orsolin pavet quilla ruxa"
)
LAST_NAMES = _words(
    "ashvik brandolo cormesh dunvald erkhart folgrim garlotti hexum ivarsen jupka kolbeth lorrimer mavrik noxley ormiston "
    "pellinor ragnotti selkirk"
)
CITIES = _words("bergen cusco dakar hanoi izmir lyon muscat porto quito tartu")
MATERIALS = _words("copper glass linen paper stone timber")
TRADES = _words("broker carver dyer painter restorer sorter")
SEASONS = _words("autumn spring summer winter")
YEARS = tuple(str(year) for year in range(1951, 1961))
PRIZES = _words("acorn beacon compass falcon lantern meridian pebble trident")
PLEASURES = _words("archery birds chess kites mazes opera stamps tides")
# A question, {} for the name, and what each word of its answer is drawn from.
FACTS: tuple[tuple[str, tuple[Words, ...]], ...] = (
    ("where was {} born ?", (CITIES,)),
    ("what does {} do ?", (MATERIALS, TRADES)),
    ("when was {} born ?", (SEASONS, YEARS)),
    ("who raised {} ?", (FIRST_NAMES, LAST_NAMES)),
    ("which prize did {} win ?", (PRIZES,)),
    ("what does {} like ?", (PLEASURES,)),
)
ASKED = [word for question, _ in FACTS for word in question.split() if word != "{}"]
ANSWERED = [word for _, parts in FACTS for words in parts for word in words]
VOCABULARY = tuple(dict.fromkeys((PADDING, END, *ASKED, *ANSWERED)))  # names are among the answers
NUMBERS = {word: number for number, word in enumerate(VOCABULARY)}


@dataclass(frozen=True, kw_only=True, eq=False)
class ProfileSplit(TensorSplit):
    """Questions and answers about people, one a row; targets are those of loss="causal_lm".

    Inputs are tokens, shape (n, T), int64, padded at the end. Targets are the same tokens where the answer and its full
    stop stand, and -100 elsewhere, so that questions and padding are neither learnt nor unlearnt.

    Attributes:
        person_train: Whom each training row is about, shape (n,), int64: 0 for the first person.
        person_test: The same for the test rows, whose people are others.
        vocabulary: The word behind every token; the first is the padding.
    """

    person_train: Tensor
    person_test: Tensor
    vocabulary: Words

    def decode(self, tokens: Tensor) -> str:
        """The words of one row.

        Args:
            tokens: Inputs or targets, shape (T,); padding and positions to ignore are left out.

        Returns:
            The words, with blanks between.

        Raises:
            ValueError: If there is not one row, or a token stands for no word.
        """
        if tokens.dim() != 1:
            raise ValueError(
                f"`tokens` of `decode` must be one row, shape (T,); got shape {tuple(tokens.shape)}. Decode row by row."
            )
        numbers = [number for number in tokens.tolist() if number != IGNORE_INDEX]
        for number in numbers:
            if not 0 <= number < len(self.vocabulary):
                raise ValueError(
                    f"`tokens` of `decode` must be in [0, {len(self.vocabulary) - 1}], or {IGNORE_INDEX}; got {number}. "
                    "Give tokens of this vocabulary."
                )
        return " ".join(self.vocabulary[number] for number in numbers if number != 0)


def profiles(people: int = 200, *, test_people: int = 50, facts: int = 5, seed: int = 0) -> ProfileSplit:
    """Made-up people with several facts each, as questions and answers: a language model can only learn them by heart.

    After TOFU (Maini et al. 2024), but small: names, places, trades, dates, parents, prizes and pleasures are drawn
    uniformly and independently from short lists, one token a word. No two people have both names in common, and nothing
    about one tells anything about another. So the best a model can do on people it has not seen is to guess: one in ten is
    right about the birth place, one in 324 about who raised them.

    Args:
        people: Number of people to train on.
        test_people: Number of people held out.
        facts: Questions a person, in this order: birth place, occupation, birth date, parent, prize, pleasure.
        seed: Seed of everything that is drawn; the global random state is not used up.

    Returns:
        `people`·`facts` training rows and `test_people`·`facts` test rows, a person's next to one another.

    Raises:
        ValueError: If there are fewer names than people.

    References:
        Maini, Feng, Schwarzschild, Lipton & Kolter, "TOFU: a task of fictitious unlearning for LLMs", COLM (2024).
    """
    owner = "profiles"
    check_int(people, name="people", owner=owner, low=1)
    check_int(test_people, name="test_people", owner=owner, low=1)
    check_int(facts, name="facts", owner=owner, low=1, high=len(FACTS))
    names = len(FIRST_NAMES) * len(LAST_NAMES)
    if people + test_people > names:
        raise ValueError(
            f"`people` and `test_people` of `{owner}` must be at most {names} together, as there are no more names; got "
            f"{people} and {test_people}. Ask for fewer."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(names, generator=generator)[: people + test_people].tolist()
    rows = [row for number in chosen for row in _person(number, facts, generator)]
    length = max(len(question) + len(answer) for question, answer in rows)
    x = torch.full((len(rows), length), NUMBERS[PADDING])
    y = torch.full_like(x, IGNORE_INDEX)
    for place, (question, answer) in enumerate(rows):
        tokens = torch.tensor([NUMBERS[word] for word in question + answer])
        x[place, : len(tokens)] = tokens
        y[place, len(question) : len(tokens)] = tokens[len(question) :]
    person = torch.arange(people + test_people).repeat_interleave(facts)
    ours = people * facts
    return ProfileSplit(
        x_train=x[:ours],
        y_train=y[:ours],
        x_test=x[ours:],
        y_test=y[ours:],
        person_train=person[:ours],
        person_test=person[ours:],
        vocabulary=VOCABULARY,
    )


def _person(number: int, facts: int, generator: torch.Generator) -> list[tuple[list[str], list[str]]]:
    """Words of every question about one person and of its answer."""
    first, last = divmod(number, len(LAST_NAMES))
    name = f"{FIRST_NAMES[first]} {LAST_NAMES[last]}"
    return [
        (question.format(name).split(), [*(_one_of(words, generator) for words in parts), END])
        for question, parts in FACTS[:facts]
    ]


def _one_of(words: Words, generator: torch.Generator) -> str:
    """A word drawn uniformly."""
    return words[int(torch.randint(len(words), (), generator=generator))]
