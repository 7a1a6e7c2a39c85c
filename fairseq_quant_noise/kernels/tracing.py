"""Whether torch is making a graph of what runs."""

import torch


def in_graph() -> bool:
    """Whether torch.compile or torch.export is tracing: tensors then have no numbers."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()
