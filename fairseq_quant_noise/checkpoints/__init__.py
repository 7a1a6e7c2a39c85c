"""Read what others wrote, safely: checkpoints of fairseq, of any age; and write what stock fairseq reads."""
