"""What fairseq's Trainer does differently: stages, optimizer, resume, ends of a run."""
