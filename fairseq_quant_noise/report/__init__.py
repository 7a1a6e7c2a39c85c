"""Report finished runs on one page: score against size, stages, distortion, codebooks, time. It never trains.

runs.py       the folders that hold a run, and what is in each
scores.py     points of score and size, from eval logs, result.json and tables of JSON lines
logs.py       fairseq's training logs: validations, stages, errors of the encoding, the noise's distortion, time
paper.py      the paper's points
pictures.py   PNGs (matplotlib)
page.py       the HTML page, which needs no other file
"""

from .write import write_report

__all__ = ["write_report"]
