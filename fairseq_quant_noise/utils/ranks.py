"""Coordinate the processes that train one network: seeds, division of work, a check that all hold the same bits."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError


def rank_and_world() -> tuple[int, int]:
    """This process's number, from 0, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def seed_of_rank(seed: int) -> int:
    """This process's own seed, made from one that all processes have: independent between ranks, fixed for each.

    Rank 0 keeps `seed`, so that a single process draws what it would draw without others. For rank r it is output
    number r of SplitMix64 (Steele, Lea and Flood 2014) from `seed`: all its bits differ, of which torch's generator on
    the CPU takes the lower 32. The number of processes does not count.

    Args:
        seed: 0 <= seed < 2^62.

    Returns:
        Another such number.
    """
    rank, _ = rank_and_world()
    if rank == 0:
        return seed
    z = (seed + rank * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) % 2**62


def divide(sizes: Sequence[int], world: int) -> list[int]:
    """The rank that does each piece of work: the largest goes first, each to the rank with the least so far."""
    owners, load = [0] * len(sizes), [0] * world
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = load.index(min(load))
        load[owners[i]] += sizes[i]
    return owners


def gather(mine: Any) -> list[Any]:
    """The `mine` of every process, in the order of ranks; tensors in it must be on the CPU."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everything: list[Any] = [None] * world
    dist.all_gather_object(everything, mine)
    return everything


def check_same(tensors: Mapping[str, Tensor], when: str) -> None:
    """Check by hash that all processes hold these tensors with the same bits; nothing is done in a single one.

    Args:
        tensors: of any shape (…), by name; every process has the same names.
        when: for the message, such as "before stage 1".

    Raises:
        UserError: some differ; in every process, with the name of the first.
    """
    if rank_and_world()[1] == 1:
        return
    of_rank = gather([digest(tensor) for tensor in tensors.values()])
    for i, name in enumerate(tensors):
        others = [str(rank) for rank, digests in enumerate(of_rank) if digests[i] != of_rank[0][i]]
        if others:
            raise UserError(
                f"{name}: {when}, rank {', '.join(others)} holds other numbers than rank 0; start every rank again "
                "from the last checkpoint with the same command and software"
            )


def check_whole(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Check that this process holds all numbers of these tensors.

    Args:
        tensors: names and tensors of any shape (…), as of `named_parameters`.
        what: what needs them, for the message.

    Raises:
        UserError: a tensor is divided among the processes, as torch's `fully_shard` does.
    """
    for name, tensor in tensors:
        if hasattr(tensor, "full_tensor"):
            raise UserError(
                f"{name}: divided among processes (fully_shard), and {what} needs whole weights; load the full state "
                "(get_model_state_dict with full_state_dict=True) into a network that is not sharded"
            )


def digest(tensor: Tensor) -> bytes:
    """SHA-256 of the dtype, shape and bits of a tensor of any shape (…): 32 bytes."""
    stored = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{stored.dtype} {tuple(stored.shape)}".encode())
    found.update(stored.reshape(-1).view(torch.uint8).numpy().data)
    return found.digest()
