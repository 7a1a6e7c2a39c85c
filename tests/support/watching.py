"""A look at a run after each of its updates, and noise that keeps something to look at."""

from contextlib import contextmanager
from unittest import mock

import fairseq_cli.train

NOISE = [
    {"match": r".*\.fc[12]", "kind": "pq", "p": 0.1, "choice": "clusters", "n_centroids": 16, "refresh": "epoch"},
    {"match": r".*self_attn.*", "kind": ["pq", "int8"], "p": 0.2, "n_centroids": 16, "refresh": 2},
    {"match": r".*embed.*", "p": 0.1},
]


@contextmanager
def watched(look):
    """Call `look(trainer, log)` after each update of the runs inside."""
    step = fairseq_cli.train.Trainer.train_step

    def stepped(trainer, *args, **kwargs):
        log = step(trainer, *args, **kwargs)
        look(trainer, log)
        return log

    with mock.patch.object(fairseq_cli.train.Trainer, "train_step", stepped):
        yield
