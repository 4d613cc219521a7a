"""Which part of every weight a rank has, and where the ranks' results are put together.

Projections into heads and into the middle of the MLP are cut by rows of their weight, those back by
columns, so that a layer needs two sums over the ranks; the output head is cut by vocabulary. The
embedding and the norms are whole on every rank. [Shoeybi et al., 2019, Megatron-LM]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tokenflow.replicas.errors import CheckpointError
from tokenflow.replicas.executor.checkpoint import ModelSpec
from tokenflow.replicas.executor.weights import Part, Weights

_BY_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_COLUMNS = ("o_proj", "down_proj")
_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `size` ranks."""

    rank: int = 0
    size: int = 1

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The model as this rank sees it: with its own heads."""
        return replace(
            whole, num_heads=whole.num_heads // self.size, kv_heads=whole.kv_heads // self.size
        )

    def part(self, module: str, name: str, shape: tuple[int, ...]) -> Part | None:
        """This rank's part of the parameter `name` of a module; None is all of it.

        Raises CheckpointError when it cannot be divided.
        """
        if self.size == 1:
            return None
        kind = module.rpartition(".")[2]
        if kind in _BY_ROWS or (kind == _HEAD and shape[0] % self.size == 0):
            dim = 0
        elif kind in _BY_COLUMNS and name == "weight":
            dim = 1
        else:
            return None
        length, rest = divmod(shape[dim], self.size)
        if rest:
            raise CheckpointError(
                f"{module}.{name} of shape {list(shape)} cannot be divided over {self.size} "
                "devices; choose another engine.tensor_parallel."
            )
        return Part(dim, self.rank * length, length)


def fill(model: nn.Module, weights: Weights, shard: Shard, *, tied: bool) -> None:
    """Give a model on the meta device this rank's weights, in the dtypes it has, and make its ranks
    work together. `tied`: the output head is the embedding.

    Raises CheckpointError when a weight cannot be divided.
    """
    made: dict[tuple[str, Part | None], nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            source = "model.embed_tokens.weight" if tied and path == _HEAD else f"{path}.{name}"
            shape = tuple(parameter.shape)
            part = shard.part(path, name, shape)
            if (source, part) not in made:
                tensor = weights.take(source, shape, part, parameter.dtype)
                if shard.rank > 0 and name == "bias" and path.endswith(_BY_COLUMNS):
                    tensor.zero_()  # added once, by the first rank
                made[source, part] = nn.Parameter(tensor, requires_grad=False)
            setattr(module, name, made[source, part])
        if isinstance(module, nn.Linear):
            _join(path, module, shard)


def _join(path: str, module: nn.Linear, shard: Shard) -> None:
    """Put the results of a divided module together."""
    rows, columns = module.weight.shape
    if columns < module.in_features:
        module.register_forward_hook(_sum_over_ranks)
    elif path == _HEAD and rows < module.out_features:
        module.register_forward_hook(_gather_from_ranks)
    module.out_features, module.in_features = rows, columns


def _sum_over_ranks(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(out)
    return out


def _gather_from_ranks(module: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(out) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, out.contiguous())
    return torch.cat(parts, -1)
