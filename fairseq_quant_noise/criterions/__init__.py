"""The criteria that fairseq gets from this package."""
