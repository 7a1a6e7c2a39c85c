"""Puts this folder on the path, so that every test can import `toys`, and keeps torch to one thread.

pytest's default import mode does the first for a folder with a conftest.py.
"""

import torch

torch.set_num_threads(1)
