"""Parts of a linear layer, computed by ranks one after the other, against the whole layer."""

import pytest
import torch
from torch import nn

from shardes.backends.split_linear import linears_of, use_plain_tensors

STYLES = {
    "columns": "colwise",
    "gathered": "colwise_gather_output",
    "rows": "rowwise",
    "split": "rowwise_split_input",
}


class Ranks:
    """Stands for the group of each rank in turn: what ranks give is kept, and then what all gave is known."""

    def __init__(self, world_size):
        self.rank, self.world_size = 0, world_size
        self._given = []

    def gather_tensor(self, local, output):
        self._given.append(local.clone())
        if len(self._given) >= self.world_size:
            output.copy_(torch.cat(self._given[-self.world_size :]))

    def sum_tensor(self, tensor):
        self._given.append(tensor)
        return sum(self._given)


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        for name in STYLES:
            setattr(self, name, nn.Linear(5, 7))
        self.norm = nn.LayerNorm(5)
        self.other = type("Other", (nn.Linear,), {})(5, 7)


def part(module, style, *, rank, world_size):
    """What a rank holds of a layer whose sizes no number of ranks divides; some ranks hold nothing."""

    def mine(tensor, dim):
        chunks = tensor.chunk(world_size, dim)
        return chunks[rank] if rank < len(chunks) else tensor.narrow(dim, 0, 0)

    layer = nn.Linear(5, 7)
    rows = style.startswith("rowwise")
    layer.weight = nn.Parameter(mine(module.weight, 1 if rows else 0), requires_grad=False)
    bias = module.bias if rows else mine(module.bias, 0)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


@torch.no_grad()
@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_parts_make_up_the_layer(name, world_size):
    torch.manual_seed(0)
    layers, inputs = Layers(), torch.randn(4, 3, 5)
    wanted = getattr(layers, name)(inputs)
    ranks = Ranks(world_size)
    shares = inputs.chunk(world_size, -1)
    found = []
    for rank in range(world_size):
        held = part(getattr(layers, name), STYLES[name], rank=rank, world_size=world_size)
        model = nn.ModuleDict({name: held})
        ranks.rank, mine = rank, inputs
        use_plain_tensors(model, {name: STYLES[name]}, group=ranks)
        if name == "rows":
            mine = shares[rank] if rank < len(shares) else inputs[..., :0]
        found.append(held(mine))
    whole = torch.cat(found, -1) if name == "columns" else found[-1]
    torch.testing.assert_close(whole, wanted, rtol=1e-6, atol=1e-6)


def test_only_plain_linear_layers_of_known_styles_are_taken():
    plan = STYLES | {"columns.weight": "colwise", "norm": "colwise", "other": "colwise", "absent": "rowwise"}
    assert linears_of(Layers(), plan) == STYLES
    assert linears_of(Layers(), {"rows": "packed_rowwise"}) == {}
