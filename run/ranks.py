"""Several processes, called ranks, that compute what one process would.

torchrun starts every rank with the same script and flags; all read the same data in the same order.
In a step each rank computes the forward and backward pass of its share of the rows, and `gather`
gives every rank the values of the whole batch. So everything after the forward pass (divisors,
group baselines, metrics) is about the whole batch, as in one process. PyTorch's DDP averages the
gradients. Every rank samples all replies, with the same generator: this keeps one process's curve
but saves no time. Only rank 0 writes files and prints.
"""

import gc
import os
import re

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .flags import require


def environment(name, default=0):
    """An integer that torchrun sets: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE."""
    return int(os.environ.get(name, default))


def device(name):
    """auto, cpu, cuda or cuda:N -> torch.device. Raises ValueError for a device that is missing."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    cuda = re.fullmatch(r"cuda(?::(\d+))?", name)
    count = torch.cuda.device_count()
    require(cuda or name == "cpu", f"--device must be auto, cpu, cuda or cuda:N, not {name}")
    present = not cuda or int(cuda[1] or 0) < count
    require(present, f"--device {name} is not on this machine, which has {count} CUDA devices")
    return torch.device(name)


def default_dtype(device):
    """bfloat16 on a GPU that multiplies it (compute capability 8.0 and newer), else float32."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if fast else torch.float32


def device_of_rank(name):
    """This process's device under --device NAME. Raises ValueError if it has none of its own."""
    chosen = device(name)
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention plans anew for each shape
    ranks = environment("WORLD_SIZE", 1)
    if ranks == 1 or chosen.type == "cpu":
        return chosen
    one_for_all = f"--device {name} is one for all processes: leave the choice to torchrun"
    require(chosen.index is None, one_for_all)
    local, count = environment("LOCAL_WORLD_SIZE", ranks), torch.cuda.device_count()
    need = f"{local} processes need a CUDA device each, and this machine has {count}"
    require(local <= count, f"{need}: start fewer")
    return torch.device("cuda", environment("LOCAL_RANK"))


def join(device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")


class Replica(DistributedDataParallel):
    """PyTorch's DDP, with the module's other attributes too: `head_weight`, `score`, `config`."""

    def __init__(self, model):
        super().__init__(model, gradient_as_bucket_view=True)
        # The only buffers are tables of positions, which never change. Set here because the
        # argument's name differs between versions of torch.
        self.broadcast_buffers = False

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def shard(model):
    """Divides weights, gradients and moments among the ranks with PyTorch's FSDP2, in place. A
    block's weights are gathered when the pass reaches it, so every rank must go forward and
    backward equally often."""
    from torch.distributed.fsdp import fully_shard  # slow to import, and seldom needed

    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)  # embedding and head stay gathered from forward to backward


def share(rows, rank, ranks):
    """This rank's part of a list or tensor: every ranks-th row.

    Never empty: DDP needs a backward pass on every rank. Spare ranks repeat row 0, and `gather`
    discards the result.
    """
    rows_here = rows[rank::ranks]
    return rows_here if len(rows_here) else rows[:1]


def gather(values, counts, rank, ranks):
    """values (n, ...) of this rank's rows -> the whole batch's (N, ...), in order, on every rank.

    counts: how many values each row of the batch has. The other ranks' values carry no gradient.
    This rank's gradient is multiplied by the number of ranks, so that DDP's average becomes the sum
    over the whole batch. (A parameter that is used after this line gets the same gradient on every
    rank, and an average does not change it.)
    """
    row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))  # (N,) of each value
    here = (row % ranks == rank).to(values.device)  # (N,) values that this rank computed
    values = values[: int(here.sum())]
    batch = torch.zeros(len(here), *values.shape[1:], dtype=values.dtype, device=values.device)
    batch[here] = values.detach()
    dist.all_reduce(batch)  # every other rank adds zeros: exact
    if values.requires_grad:
        values.register_hook(lambda gradient: gradient * ranks)
        batch[here] = values
    return batch


def largest(number, device):
    """The largest of all ranks' numbers, on every rank."""
    numbers = torch.tensor(number, device=device)  # ()
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


def leave(learners, sharded=None):
    """Waits for all ranks, then ends their group. learners: {id: Replica}, which is emptied."""
    for module in [*sharded.blocks, sharded] if sharded else []:
        module.unshard()  # a checkpoint holds whole tensors
    dist.barrier()
    learners.clear()  # or DDP, the group's last owner, joins its threads with the GIL,
    gc.collect()  # which they may be waiting for
    dist.destroy_process_group()
