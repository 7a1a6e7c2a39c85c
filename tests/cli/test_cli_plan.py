"""What `plan` says of the memory that tuning takes."""

import json

from lm_fixture import PLANS

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
