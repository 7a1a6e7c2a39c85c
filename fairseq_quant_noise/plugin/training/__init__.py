"""Change what fairseq's Trainer does: stages, optimizer, resuming, the end of a run."""
