"""How many layers a checkpoint's network has, for the command line of a training that goes on from it.

python -m recipes.n_layers CKPT
"""

import sys

from fairseq_quant_noise.checkpoints.checkpoint import Checkpoint
from fairseq_quant_noise.structure.state import stack_sizes

print(*stack_sizes(Checkpoint(sys.argv[1]).weights).values())
