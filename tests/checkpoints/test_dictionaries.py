"""The dictionaries that fairseq's speech tasks keep in their state come back as they were; code in them is refused."""

import os

import pytest
import torch
from fairseq.data import Dictionary
from toys import refuses

from fairseq_quant_noise.checkpoints.dictionaries import SavedDictionary
from fairseq_quant_noise.checkpoints.safe_load import safe_load
from fairseq_quant_noise.errors import DamagedFileError
from fairseq_quant_noise.plugin.loading import load_state


def letters():
    dictionary = Dictionary(extra_special_symbols=["<sep>"])
    for word in ["e", "t", "a"]:
        dictionary.add_symbol(word, n=7)
    return dictionary


def checkpoint(folder, **task_state):
    state = {"model": {"w": torch.ones(2)}, "cfg": None, "args": None, "task_state": task_state}
    torch.save(state, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def test_a_dictionary_and_a_list_of_them_come_back(tmp_path, monkeypatch):
    """As audio_finetuning has one and hubert_pretraining a list."""
    monkeypatch.setattr("fairseq_quant_noise.plugin.loading._upgrade_state_dict", lambda state: state)
    saved = {"target_dictionary": letters(), "dictionaries": [letters(), Dictionary()], "plain": [1, 2]}
    path = checkpoint(tmp_path, **saved)
    found = load_state(path)["task_state"]
    assert found["plain"] == [1, 2]
    for one, other in zip(
        [found["target_dictionary"], *found["dictionaries"]],
        [saved["target_dictionary"], *saved["dictionaries"]],
        strict=True,
    ):
        assert type(one) is Dictionary
        assert vars(one) == vars(other)
    assert isinstance(safe_load(path)["task_state"]["target_dictionary"], SavedDictionary)


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("where", ["count", "symbols", "indices"])
def test_code_in_a_dictionary_is_refused(tmp_path, where):
    dictionary = letters()
    vars(dictionary)[where] = Attack(tmp_path / "mark")
    path = checkpoint(tmp_path, target_dictionary=dictionary)
    with refuses("refused", DamagedFileError):
        safe_load(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("wrong", [{1, 2}, [1.5], [[1]], {"a": torch.ones(1)}, [letters()]])
def test_a_dictionary_holds_words_and_whole_numbers_alone(tmp_path, wrong):
    dictionary = letters()
    dictionary.count = wrong
    with refuses("refused, its pickle .*diction", DamagedFileError):
        safe_load(checkpoint(tmp_path, target_dictionary=dictionary))


def test_another_class_of_fairseq_is_refused_as_before(tmp_path):
    from fairseq.data.legacy.masked_lm_dictionary import BertDictionary

    with refuses("refused", DamagedFileError):
        safe_load(checkpoint(tmp_path, target_dictionary=BertDictionary()))
