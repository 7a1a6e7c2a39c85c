"""Regular expressions for some of a model's names, and no others."""

import random
import re

import pytest

from fairseq_quant_noise.quantization.budget.names import expression

NAMES = [
    *(
        f"decoder.layers.{i}.{part}"
        for i in range(12)
        for part in ("fc1", "fc2", "self_attn.q_proj", "self_attn.k_proj")
    ),
    *(f"decoder.embed_tokens.embeddings.{i}.{j}" for i in range(3) for j in range(2)),
    "decoder.layers.1_fc1",
    "lstm.weight_ih_l0",
    "0",
    "3",
]


@pytest.mark.parametrize("seed", range(30))
def test_it_matches_the_names_and_no_others(seed):
    names = random.Random(seed).sample(NAMES, seed + 1)
    found = expression(names, NAMES)
    assert {name for name in NAMES if re.fullmatch(found, name)} == set(names)


@pytest.mark.parametrize(
    ("chosen", "short"),
    [
        (r"decoder\.layers\.\d+\.fc1", r"decoder\.layers\.\d+\.fc1"),
        (r"decoder\.layers\.\d+\.fc.", r"decoder\.layers\.\d+\.(fc1|fc2)"),
        (r"decoder\.layers\.[13]\.fc.", r"decoder\.layers\.(1|3)\.(fc1|fc2)"),
        (r"decoder\.embed.*\.0", r"decoder\.embed_tokens\.embeddings\.(0|1|2)\.0"),
        (r"decoder\.embed.*", r"decoder\.embed_tokens\.embeddings\.\d+\.\d+"),
        (r"lstm.*|3", r"lstm\.weight_ih_l0|3"),
    ],
)
def test_names_with_a_pattern_are_short(chosen, short):
    assert expression([name for name in NAMES if re.fullmatch(chosen, name)], NAMES) == short
