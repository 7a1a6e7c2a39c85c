"""A save_dir with the checkpoint of another network is refused, unless the command asks for that checkpoint."""

import pytest
from lm_fixture import one_error, split

NOISE = split("--quant-noise-pq 0.1")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (NOISE, "--quant-noise-pq 0.2", "quant_noise_pq 0.1, and the command says 0.2"),
        (NOISE, "--quant-noise-pq 0.1 --quant-noise-kind int8", "quant_noise_kind proxy, and the command says int8"),
        ([], "--decoder-ffn-embed-dim 96", "decoder_ffn_embed_dim 64, and the command says 96"),
        ([], "--dropout 0.3 --share-layers 2", "dropout 0.1, and the command says 0.3 (and share_layers)"),
    ],
)
def test_another_networks_checkpoint_is_refused_by_name(lab, capsys, before, after, said):
    """fairseq goes on from it: a sweep in one save_dir trained its first job alone, and the others ended at once."""
    run = lab.train(*before, updates=1)
    with pytest.raises(SystemExit) as end:
        lab.train(*split(after), save=run.folder, updates=1)
    assert end.value.code == 2
    message = one_error(capsys.readouterr())
    assert message.startswith(f"{run.path}: was trained with {said}; give each training a --save-dir of its own")


def test_a_checkpoint_that_is_asked_for_is_taken(lab):
    run = lab.train(*NOISE, updates=1)
    again = lab.train("--quant-noise-pq", 0.2, "--restore-file", run.path, save=run.folder, updates=2)
    assert [log["num_updates"] for log in again.updates] == [2]


def test_what_watches_the_network_or_says_how_long_it_trains_may_change(lab):
    run = lab.train(*NOISE, updates=1)
    flags = split("--quant-noise-log-interval 7 --lr 0.001 --clip-norm 2 --tokens-per-sample 16")
    again = lab.train(*NOISE, *flags, save=run.folder, updates=2)
    assert [log["num_updates"] for log in again.updates] == [2]
