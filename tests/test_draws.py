"""The randomness contract: against Random123's known answers and a Philox of plain Python integers; the counter's fields apart."""

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from wherefrom.pipeline.draws import (
    PICTURE,
    Purpose,
    check_family_names,
    family_word,
    integer,
    named_seed,
    philox,
    random_words,
    random_words_of_tensors,
    uniform,
)
from wherefrom.pipeline.laws import Center
from wherefrom.pipeline.records import draw_records, keyed_permutations, keyed_uniform
from wherefrom.pipeline.view_recipe import ViewFamily, ViewRecipe
from wherefrom.pipeline.views import ViewGeometry

pytestmark = pytest.mark.core

words32 = st.integers(0, 2**32 - 1)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's own integers, after Salmon et al., SC'11."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers_of_random123(counter: str, key: str, answer: str) -> None:
    words = [[int(word, 16) for word in text.split()] for text in (counter, key, answer)]
    assert philox(np.array(words[0], np.uint32), words[1]).tolist() == words[2]
    assert plain_philox(words[0], words[1]) == words[2]


@given(st.lists(st.tuples(*[words32] * 4), min_size=1, max_size=5), st.tuples(words32, words32))
def test_philox_agrees_with_plain_integers(counters: list[tuple[int, ...]], key: tuple[int, int]) -> None:
    given_counters = np.array(counters, np.uint32)
    kept = given_counters.copy()
    assert philox(given_counters, key).tolist() == [plain_philox(list(counter), list(key)) for counter in counters]
    np.testing.assert_array_equal(given_counters, kept)


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**24 - 1),
    st.integers(0, 2**40 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(0, 255),
    st.sampled_from(Purpose),
    st.integers(0, 2**32 - 1),
)
def test_counter_is_laid_out_as_written(seed: int, epoch: int, sample: int, family: int, view: int, purpose: Purpose, block: int) -> None:
    counter = [sample % 2**32, (sample // 2**32) * 2**24 + epoch, family * 2**16 + view * 2**8 + purpose, block]
    expected = plain_philox(counter, [seed % 2**32, seed // 2**32])
    assert random_words(seed, epoch, sample, family, view, purpose, block).tolist() == expected


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**24 - 1),
    st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=3),
    st.integers(0, 2**16 - 1),
    st.lists(st.integers(0, 255), min_size=1, max_size=2),
    st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3),
)
def test_tensors_draw_the_same_words(seed: int, epoch: int, samples: list[int], family: int, views: list[int], blocks: list[int]) -> None:
    sample, view, block = np.array(samples)[:, None, None], np.array(views)[:, None], np.array(blocks)
    expected = random_words(seed, epoch, sample, family, view, Purpose.REGION, block)
    ids, of_family, numbers = (torch.from_numpy(value) for value in (sample, view, block))
    drawn = random_words_of_tensors(seed, epoch, ids, family, of_family, Purpose.REGION, numbers)
    np.testing.assert_array_equal(drawn.numpy(), expected)


def test_purposes_are_frozen() -> None:
    """Numbers drawn by an older version stay what they were: this list may only grow at its end."""
    names = ["BOX", "PLACE", "MIRROR", "TURN", "JITTER", "COLOR", "BLUR", "ORDER", "REGION", "NAMED"]
    assert [purpose.name for purpose in Purpose][: len(names)] == names
    assert [purpose.value for purpose in Purpose] == list(range(len(Purpose)))


def test_drawn_numbers_stay_what_they_were() -> None:
    """A guard on results: whoever changes these numbers changes every record and says so in the changelog."""
    assert family_word("local") == int.from_bytes(hashlib.blake2b(b"local", digest_size=2).digest(), "big")
    words = random_words(seed=2**40 + 7, epoch=3, sample=np.array([0, 2**33 + 1]), family=family_word("local"), view=2, purpose=Purpose.BOX)
    assert words.tolist() == [
        plain_philox([0, 3, family_word("local") * 2**16 + 2 * 2**8, 0], [7, 256]),
        plain_philox([1, 2 * 2**24 + 3, family_word("local") * 2**16 + 2 * 2**8, 0], [7, 256]),
    ]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("seed", -1, r"seed=-1: needs 0 <= seed < 2\*\*64"),
        ("seed", 2**64, r"seed=18446744073709551616: needs 0 <= seed < 2\*\*64"),
        ("epoch", 2**24, r"epoch=16777216: needs 0 <= epoch < 2\*\*24"),
        ("family", 2**16, r"family=65536: needs 0 <= family < 2\*\*16"),
        ("sample", np.array([3, 2**40]), r"sample from 3 to 1099511627776: needs 0 <= sample < 2\*\*40"),
        ("sample", -1, r"sample from -1 to -1: needs 0 <= sample < 2\*\*40"),
        ("view", np.arange(257), r"view from 0 to 256: needs 0 <= view < 2\*\*8"),
        ("block", 2**32, r"block from 4294967296 to 4294967296: needs 0 <= block < 2\*\*32"),
    ],
)
def test_a_number_that_would_overflow_its_field_is_refused(field: str, value: object, message: str) -> None:
    arguments = {"seed": 0, "epoch": 0, "sample": 0, "family": 1, "view": 0, "purpose": Purpose.BOX, "block": 0}
    with pytest.raises(ValueError, match=f"^{message}$"):
        random_words(**(arguments | {field: value}))


def test_largest_numbers_of_every_field_do_not_touch_their_neighbors() -> None:
    top = {"seed": 2**64 - 1, "epoch": 2**24 - 1, "sample": 2**40 - 1, "family": 2**16 - 1, "view": 255, "purpose": 255, "block": 2**32 - 1}
    none = dict.fromkeys(top, 0)
    drawn = {tuple(random_words(**(none | {name: top[name]})).tolist()) for name in top}
    drawn.add(tuple(random_words(**none).tolist()))
    assert len(drawn) == len(top) + 1


def test_draws_along_every_field_are_uncorrelated() -> None:
    """Neighbors in sample, view, block, epoch, seed, family and purpose; a generator keyed by seed + index is the negative control."""
    n = 4096
    numbers = {
        "sample": random_words(0, 0, np.arange(n), 9, 0, Purpose.BOX),
        "block": random_words(0, 0, 0, 9, 0, Purpose.BOX, np.arange(n)),
        "epoch": np.stack([random_words(0, epoch, 0, 9, 0, Purpose.BOX) for epoch in range(n)]),
        "seed": np.stack([random_words(seed, 0, 0, 9, 0, Purpose.BOX) for seed in range(n)]),
        "family": np.stack([random_words(0, 0, 0, family, 0, Purpose.BOX) for family in range(1, n + 1)]),
    }
    for words in numbers.values():
        u = uniform(words)
        assert stats.kstest(u.ravel(), "uniform").pvalue > 0.001
        for a, b in itertools.combinations(range(4), 2):
            assert abs(np.corrcoef(u[:, a], u[:, b])[0, 1]) < 4 / np.sqrt(n)
        assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 4 / np.sqrt(n)
    samples = np.arange(n)
    fields = [(0, 0, 9, 0, Purpose.BOX), (1, 0, 9, 0, Purpose.BOX), (0, 1, 9, 0, Purpose.BOX), (0, 0, 10, 0, Purpose.BOX)]
    fields += [(0, 0, 9, 1, Purpose.BOX), (0, 0, 9, 0, Purpose.PLACE)]
    streams = [uniform(random_words(seed, epoch, samples, family, view, purpose))[:, 0] for seed, epoch, family, view, purpose in fields]
    for a, b in itertools.combinations(streams, 2):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / np.sqrt(n)
    shifted = [np.random.default_rng(seed + np.arange(2)).random() for seed in (0, 1)]
    assert shifted[0] != shifted[1]
    by_sum = [uniform(random_words(0, 0, seed + samples, 9, 0, Purpose.BOX))[:, 0] for seed in (0, 1)]
    assert np.corrcoef(by_sum[0][1:], by_sum[1][:-1])[0, 1] > 0.999


def test_uniform_is_open_and_integers_are_equally_likely() -> None:
    ends = np.array([0, 2**32 - 1], np.uint32)
    assert uniform(ends).tolist() == [0.5 / 2**32, 1 - 0.5 / 2**32]
    assert integer(ends, 7).tolist() == [0, 6] and integer(ends, 1).tolist() == [0, 0]
    assert integer(ends, 2**31).tolist() == [0, 2**31 - 1]
    words = random_words(1, 0, np.arange(20_000), 3, 0, Purpose.BOX)
    assert stats.chisquare(np.bincount(integer(words, 7).ravel(), minlength=7)).pvalue > 0.01
    assert integer(words, np.array([1, 2, 3, 4])).max(0).tolist() == [0, 1, 2, 3]


def colliding_names() -> tuple[str, str]:
    """Two names with one word: among 2^16 words some hundred names always hold such a pair."""
    words: dict[int, str] = {}
    for number in itertools.count():
        name = f"family{number}"
        if family_word(name) in words:
            return words[family_word(name)], name
        words[family_word(name)] = name
    raise AssertionError


def test_names_that_share_a_word_are_refused() -> None:
    first, second = colliding_names()
    with pytest.raises(ValueError, match=f"families '{first}' and '{second}' share the draw word [0-9]+; rename one"):
        check_family_names([first, "other", second])
    families = tuple(ViewFamily(name=name, views=1, size_px=(8, 8), law=Center()) for name in (first, second))
    with pytest.raises(ValueError, match="share the draw word"):
        ViewRecipe(families=families)
    check_family_names(["global", "local", "pair"])


def test_a_name_with_the_pictures_own_word_is_refused() -> None:
    found = (f"n{i}" for i in itertools.count() if hashlib.blake2b(f"n{i}".encode(), digest_size=2).digest() == bytes(2))
    with pytest.raises(ValueError, match=f"hashes to the reserved word {PICTURE}; take another name"):
        family_word(next(found))


def record_of(drawn_for: list[int], *, views: int = 3, seed: int = 2**63 + 5, epoch: int = 4, family: str = "global") -> ViewGeometry:
    recipe = ViewRecipe(families=(ViewFamily(name=family, views=views, size_px=(8, 8), law=Center()),))
    size = np.full((len(drawn_for), 2), 40, np.int32)
    (record,) = draw_records(recipe, seed=seed, epoch=epoch, drawn_for=np.array(drawn_for), source_size=size)
    return record.geometry


def test_numbers_under_a_free_name_belong_to_the_view_and_to_nothing_around_it() -> None:
    ids = [0, 7, 2**33 + 1, 7, 12]
    whole = keyed_uniform(record_of(ids), "mae/mask", (2, 7))
    assert whole.shape == (5, 3, 2, 7) and whole.dtype == torch.float64
    assert (whole > 0).all() and (whole < 1).all()
    for part in (slice(0, 2), slice(2, 5)):  # another rank or micro-batch
        assert torch.equal(keyed_uniform(record_of(ids[part]), "mae/mask", (2, 7)), whole[part])
    assert torch.equal(keyed_uniform(record_of(ids)[3:, 1:], "mae/mask", (2, 7)), whole[3:, 1:])
    assert torch.equal(whole[1], whole[3])  # by the sample
    assert torch.equal(keyed_uniform(record_of(ids), "mae/mask", (14,)), whole.flatten(2))
    assert torch.equal(keyed_uniform(record_of(ids), "mae/mask"), whole[:, :, 0, 0])
    assert torch.equal(keyed_permutations(record_of(ids), "mae/mask", 14), whole.flatten(2).argsort(-1))
    # by Philox itself, once more
    words = random_words(named_seed(2**63 + 5, "mae/mask"), 4, 12, family_word("global"), 2, Purpose.NAMED, np.arange(4))
    np.testing.assert_array_equal(uniform(words).ravel()[:14], whole[4, 2].flatten().numpy())


def test_names_seeds_epochs_families_samples_and_views_draw_independently() -> None:
    n = 4096
    ids = list(range(n))
    rows = {
        "": keyed_uniform(record_of(ids, views=2), "mask"),
        "name": keyed_uniform(record_of(ids, views=2), "masks"),
        "seed": keyed_uniform(record_of(ids, views=2, seed=2**63 + 6), "mask"),
        "epoch": keyed_uniform(record_of(ids, views=2, epoch=5), "mask"),
        "family": keyed_uniform(record_of(ids, views=2, family="local"), "mask"),
        "sample": keyed_uniform(record_of([*ids[1:], n], views=2), "mask"),
        "view": keyed_uniform(record_of(ids, views=2), "mask").flip(1),
    }
    correlation = np.corrcoef(np.stack([row[:, 0].numpy() for row in rows.values()]))
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5 / np.sqrt(n)
    assert stats.kstest(rows[""].flatten().numpy(), "uniform").pvalue > 1e-3
    # control: a name that only shifts the seed would give one seed's numbers to another
    assert torch.equal(rows["sample"][:-1], rows[""][1:])
    assert len({named_seed(seed, name) for seed in range(50) for name in ("a", "b", "ab", "")}) == 200


def test_every_place_of_a_permutation_is_as_likely() -> None:
    n, places = 6000, 5
    drawn = keyed_permutations(record_of(list(range(n)), views=1), "mask", places)[:, 0]
    assert torch.equal(drawn.sort(-1).values, torch.arange(places).expand(n, -1))
    counts = torch.stack([(drawn == place).sum(0) for place in range(places)])
    assert stats.chisquare(counts.flatten().numpy()).pvalue > 1e-3
