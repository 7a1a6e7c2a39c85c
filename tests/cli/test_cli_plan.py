"""What `plan` says of the memory that tuning takes, and of a checkpoint that is quantized already."""

import json

import pytest
from lm_fixture import PLANS, one_error

from fairseq_quant_noise.cli.main import main


def test_plan_says_what_codes_that_train_take_in_memory(lab, runs, capsys):
    int8 = {"match": PLANS["plain"]["stages"][1]["match"], "scheme": "int8"}  # the embedding; has no codes to train
    plan = {"stages": [PLANS["plain"]["stages"][0], int8], "codes": "train"}
    arguments = ["plan", "--path", str(runs.stock("plain").path), "--plan", lab.plan(plan)]
    main([*arguments, "--json"])
    numbers = 2 * 2 * 32 * 64  # of fc1 and fc2 in two layers
    assert json.loads(capsys.readouterr().out)["latent_bytes"] == 4 * numbers
    main(arguments)
    assert "codes: train keeps 0.03 MiB of latent weights while the network is tuned" in capsys.readouterr().out


def test_a_checkpoint_that_is_quantized_already_is_refused(lab, runs, capsys):
    """Its codes and centroids came as rows of a dense network, at x1.00."""
    path = runs.ipq("plain").path
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--path", str(path), "--plan", lab.plan(PLANS["plain"])])
    assert one_error(capsys.readouterr()).startswith(f"plan: {path} holds quantized weights already; give the dense")
