"""The choice of parametrisations: every pair of values, few combinations, none lost."""

from itertools import combinations, product

from pairwise import all_pairs

AXES = ("abcdefg", (1, 2, 3, 4), (True, False), ("fp32", "fp16"))


def chosen(params):
    return [param.values for param in params if not param.marks]


def test_every_pair_is_chosen():
    together = chosen(all_pairs(*AXES))
    for (i, first), (j, second) in combinations(enumerate(AXES), 2):
        assert {(row[i], row[j]) for row in together} == set(product(first, second))


def test_the_choice_is_small_and_the_rest_is_slow():
    params = all_pairs(*AXES)
    assert [param.values for param in params] == list(product(*AXES))
    assert len(chosen(params)) <= 1.25 * 7 * 4
    assert {mark.name for param in params for mark in param.marks} == {"slow"}


def test_two_axes_are_their_product_and_one_is_itself():
    assert len(chosen(all_pairs("ab", "cde"))) == 6
    assert chosen(all_pairs("abc")) == [("a",), ("b",), ("c",)]
