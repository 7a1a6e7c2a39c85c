"""List the words that a plan may use. Tests check them against the code that implements them."""

#: Kinds of noise (`noise/distortions.py`): int2 to int8 besides those of blocks.
KINDS = ("proxy", "mean", "pq", *(f"int{bits}" for bits in range(2, 9)))
#: How blocks are hit: independently, or with all blocks of their centroid (`noise/psi.py`).
CHOICES = ("subvectors", "clusters")
#: Schedules of the noise's p (`noise/schedule.py`).
SCHEDULES = ("constant", "linear", "cosine", "step")
#: An interval between fits.
EPOCH = "epoch"

#: A codebook for each weight, or one for all weights of a stage that have the same d and K.
OWN, SHARED = "own", "shared"
CODEBOOKS = (OWN, SHARED)
#: Bits of a centroid's number, by its type.
CENTROID_BITS = {"fp16": 16, "int8": 8}
#: Bits of a number without codes, by its type.
DENSE_BITS = {"fp32": 32, "fp16": 16}
#: The learning rate's schedule, as a stage begins.
CONTINUE, RESTART = "continue", "restart"
#: Stages that follow one another, or begin together.
IN_TURN, JOINT = "in-turn", "joint"
#: Codes of product quantization that stay as k-means found them, or are found anew while a dense weight trains.
FIXED, TRAIN = "fixed", "train"
#: How codes are found: by k-means alone, or by what the outputs of a layer lose too (`pq/feedback.py`).
PLAIN, FEEDBACK = "plain", "feedback"
