"""The best option of each weight within a budget, against every combination."""

import itertools
import random

import pytest

from fairseq_quant_noise.quantization.budget import knapsack
from fairseq_quant_noise.quantization.budget.knapsack import Alternative, choose, choose_among


def cost(options, choice):
    """(bytes, loss) of a choice."""
    taken = [pairs[i] for pairs, i in zip(options, choice, strict=True)]
    return sum(size for size, _ in taken), sum(loss for _, loss in taken)


def by_trying_all(options, budget):
    """The least loss within the budget."""
    every = (cost(options, choice) for choice in itertools.product(*(range(len(pairs)) for pairs in options)))
    return min(loss for size, loss in every if size <= budget)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed):
    rng = random.Random(seed)
    options = [[(rng.randint(1, 300), rng.random()) for _ in range(rng.randint(1, 5))] for _ in range(6)]
    smallest = sum(min(size for size, _ in pairs) for pairs in options)
    for budget in (smallest, smallest + 40, smallest + 400, 10**6):
        size, loss = cost(options, choose(options, budget))
        assert size <= budget
        assert loss == pytest.approx(by_trying_all(options, budget))


@pytest.mark.parametrize("seed", range(5))
def test_with_coarse_cells_it_is_at_least_the_best_for_a_cell_a_weight_less(seed, monkeypatch):
    monkeypatch.setattr(knapsack, "CELLS", 50)
    rng = random.Random(seed)
    options = [[(rng.randint(1000, 90000), rng.random()) for _ in range(5)] for _ in range(6)]
    smallest = sum(min(size for size, _ in pairs) for pairs in options)
    spare = 100_000
    size, loss = cost(options, choose(options, smallest + spare))
    assert size <= smallest + spare
    assert loss <= by_trying_all(options, smallest + spare - 6 * spare // 50)


def test_below_the_smallest_options_it_takes_these():
    assert choose([[(10, 0.0), (4, 1.0)], [(3, 2.0), (30, 0.0)]], 5) == [1, 0]


@pytest.mark.parametrize("seed", range(20))
def test_of_each_group_the_best_alternative_is_taken(seed):
    """An alternative's fixed bytes are spent once; by trying all."""
    rng = random.Random(seed)

    def alternative():
        lists = [[(rng.randint(1, 60), rng.random()) for _ in range(rng.randint(1, 3))] for _ in range(2)]
        return Alternative(rng.randint(0, 60), lists)

    groups = [[alternative() for _ in range(rng.randint(1, 3))] for _ in range(3)]
    smallest = sum(min(one.least_bytes for one in group) for group in groups)
    for budget in (smallest, smallest + 30, smallest + 90, 10**5):
        found = choose_among(groups, budget)
        taken = [group[which] for group, (which, _) in zip(groups, found, strict=True)]
        costs = [cost(one.options, choice) for one, (_, choice) in zip(taken, found, strict=True)]
        assert sum(size for size, _ in costs) + sum(one.fixed for one in taken) <= budget
        least = float("inf")
        for some in itertools.product(*groups):
            left = budget - sum(one.fixed for one in some)
            options = [pairs for one in some for pairs in one.options]
            if left >= sum(min(size for size, _ in pairs) for pairs in options):
                least = min(least, by_trying_all(options, left))
        assert sum(loss for _, loss in costs) == pytest.approx(least)
