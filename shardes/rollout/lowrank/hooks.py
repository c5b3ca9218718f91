"""Add the low-rank terms of members to the outputs of a model's layers.

The model stays at the centre. Where a layer computes ``x W^T``, a member's layer computes ``x W^T`` plus
``sigma (x B) A^T``: two products with a few columns. Rows of one forward may be different members', and the
weights, which backends gather and free as they like, are never touched. Hooks need only the inputs and the
outputs of a layer, so they do not interfere with those of backends.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from shardes import noise
from shardes.backends.base import Backend
from shardes.backends.shard import Shard
from shardes.errors import UserError
from shardes.es.update import Perturbation
from shardes.noise import GAUSSIAN, LowRank, Region, matrix_shape
from shardes.rollout.lowrank.member_factors import factors_of
from shardes.rollout.lowrank.modules import (
    Names,
    adding,
    class_name,
    heads_of,
    hooked,
    is_cohere_norm,
    is_layer_norm,
    is_linear,
    is_plain_experts,
    linear_part_of,
    norm_epsilon,
    replaced,
)
from shardes.weights.master import Weights

Patch = Callable[[nn.Module, Names], Callable[[], None]]
"""Has a module compute the members' outputs; returns a function that undoes it."""


class LowRankHooks:
    """Hooks by which the rows of a forward belong to different members.

    Args:
        backend: Backend whose model is at the centre.
        weights: Master shards, whose noise is of kind ``LowRank``.

    Raises:
        UserError: A trained parameter is in a kind of module for which there is no rule.
    """

    def __init__(self, backend: Backend, weights: Weights) -> None:
        assert isinstance(weights.kind, LowRank), "checked with the configuration"
        self._kind = weights.kind
        self._seed = weights.seed
        self._dtype = backend.dtype
        self._device = backend.device
        self._shards = {shard.name: shard for shard in weights.trained}
        self._left: dict[str, torch.Tensor] = {}
        self._right: dict[str, torch.Tensor] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        self._num_members = 0
        self._members = torch.zeros(0, dtype=torch.int64)
        self._is_split = backend.needs_same_batch
        self._uses = self._find_uses(backend.sharded_model)

    def _find_uses(self, model: nn.Module) -> dict[str, tuple[Patch, Names]]:
        """Return the patch and the trained parameters of each module that has any, by the module's path."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        uses: dict[str, tuple[Patch, Names]] = {}
        for path, module in model.named_modules():
            part = linear_part_of(module)
            before = module._parameters if part is None else part.held
            held = {
                # A part of a tied weight is no parameter of the model, but what it is a part of is.
                key: names.get(id(before[key])) or names[id(each)]
                for key, each in module._parameters.items()
                if each is not None
            }
            held = {key: name for key, name in held.items() if name in self._shards}
            if not held:
                continue
            patch = self._rule(module)
            if patch is None:
                raise UserError(
                    f"rollout.members_per_forward: {next(iter(held.values()))} is a parameter of {path}, a "
                    f"{class_name(module)}, for which there is no batched rule; freeze it (es.trainable), "
                    "or set rollout.members_per_forward: 1, which evaluates the same members one by one"
                )
            uses[path] = (patch, held)
        return uses

    def _rule(self, module: nn.Module) -> Patch | None:
        """Return the patch for a kind of module; None if there is no rule for it."""
        name, keys = class_name(module), set(module._parameters)
        forward = type(module).forward
        if linear_part_of(module) is not None:
            return self._patch_part
        is_split = self._is_split and any(isinstance(each, DTensor) for each in module._parameters.values())
        if is_split and not isinstance(module, nn.Embedding):
            return None  # of experts and the like a hook sees a part; of an embedding it sees all
        if is_linear(module):
            return functools.partial(hooked, self._linear)
        if forward is nn.Embedding.forward or (
            isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")
        ):
            return functools.partial(hooked, self._embedding)
        if isinstance(module, nn.Embedding) and not is_split:
            return self._patch_lookup
        if isinstance(module, Conv1D):
            return functools.partial(hooked, self._conv1d)
        if is_layer_norm(module):
            return functools.partial(hooked, self._layer_norm)
        if is_cohere_norm(module):
            return functools.partial(hooked, self._cohere_norm)
        if name.endswith("RMSNorm") and keys == {"weight"} and norm_epsilon(module) is not None:
            return functools.partial(hooked, self._rms_norm)
        if name.endswith("Router") and keys == {"weight"}:
            return self._patch_router
        if keys == {"gate_up_proj", "down_proj"} and is_plain_experts(module):
            return self._patch_experts
        return None

    @property
    def num_bytes(self) -> int:
        """Return the bytes of one member's factors and vectors, in the model's dtype."""
        count = 0
        for shard in self._shards.values():
            view = matrix_shape(shard.shape)
            rows = shard.num_elements if view is None else view[0] * (view[1] + view[2]) * self._kind.rank
            count += rows
        return count * self._dtype.itemsize

    def load(self, members: Sequence[Perturbation]) -> None:
        """Compute the factors and vectors of some members, in place of those loaded before."""
        self._num_members = len(members)
        sigmas = torch.tensor([member.sigma for member in members], device=self._device)
        for name, shard in self._shards.items():
            if matrix_shape(shard.shape) is None:
                self._vectors[name] = self._vectors_of(shard, members).mul_(sigmas[:, None]).to(self._dtype)
                continue
            left, right = factors_of(shard, members, kind=self._kind, seed=self._seed, device=self._device)
            scaled = left * sigmas.view(-1, *[1] * (left.ndim - 1))
            self._left[name], self._right[name] = scaled.to(self._dtype), right.to(self._dtype)

    def _vectors_of(self, shard: Shard, members: Sequence[Perturbation]) -> torch.Tensor:
        """Return the noise of each member for a vector, float32 of shape [members, elements]."""
        size = shard.num_elements
        out = torch.empty(len(members), size, device=self._device)
        nothing = torch.full((size,), -0.0, device=self._device)
        for row, member in zip(out, members, strict=True):
            noise.perturb(
                nothing,
                row,
                region=Region(shard.param_id, size, 0, size),
                sigma=1.0,
                seed=self._seed,
                iteration=member.iteration,
                direction=member.direction,
                kind=GAUSSIAN,
            )
        return out

    def on_rows(self, rows: torch.Tensor) -> None:
        """Set the rows of the micro-batch that the next forward computes, int64 of shape [rows].

        Row i is of member ``i % members``.
        """
        self._members = rows % self._num_members

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Have a model at the centre compute the members' outputs, within the context."""
        undo = []
        try:
            for path, module in model.named_modules():
                if path in self._uses:
                    patch, names = self._uses[path]
                    undo.append(patch(module, names))
            yield
        finally:
            for each in undo:
                each()

    # What is added. ``x`` and ``out`` begin with the rows of the forward, or with rows times tokens.

    def _by_row(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view of ``x`` of shape [rows, tokens, features]."""
        num_rows = len(self._members)
        return x.reshape(num_rows, math.prod(x.shape[:-1]) // num_rows, x.shape[-1])

    def _of_rows(self, of_members: torch.Tensor) -> torch.Tensor:
        """Return the member's entry for each row of the forward, of shape [rows, ...]."""
        return of_members.index_select(0, self._members)

    def _moved(
        self, x: torch.Tensor, out: torch.Tensor, right: torch.Tensor, left: torch.Tensor
    ) -> torch.Tensor:
        """Add ``(x right) left^T`` to ``out`` in place; factors are of shape [members, features, rank]."""
        inputs, outputs = self._by_row(x), self._by_row(out)
        right, left = self._of_rows(right), self._of_rows(left)
        if self._kind.rank == 1:
            # Libraries have no quick matrix product with a single column, of every row with another.
            inner = (inputs * right.mT).sum(dim=-1, keepdim=True)
            outputs.addcmul_(inner, left.mT)
        else:
            outputs.baddbmm_(torch.bmm(inputs, right), left.mT)
        return outputs.view_as(out)

    def _shifted(self, out: torch.Tensor, name: str | None, *, outputs: slice = slice(None)) -> torch.Tensor:
        """Return ``out`` plus the noise of a vector, or of a part of it; ``out`` itself if not trained."""
        if name is None:
            return out
        noise_of_rows = self._of_rows(self._vectors[name][:, outputs])
        return (self._by_row(out) + noise_of_rows[:, None]).view_as(out)

    def _linear(self, module: Any, x: torch.Tensor, out: torch.Tensor, names: Names) -> torch.Tensor:
        if (name := names.get("weight")) is not None:
            out = self._moved(x, out, self._right[name], self._left[name])
        return self._shifted(out, names.get("bias"))

    def _patch_part(self, module: Any, names: Names) -> Callable[[], None]:
        """Add the terms to this rank's part of a split linear layer, before the ranks combine theirs."""
        part = linear_part_of(module)
        assert part is not None
        weight, bias = names.get("weight"), names.get("bias")

        def add(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            if weight is not None:
                right, left = self._right[weight][:, part.inputs], self._left[weight][:, part.outputs]
                out = self._moved(x, out, right, left)
            return out if part.is_sum else self._shifted(out, bias, outputs=part.outputs)

        def undo() -> None:
            part.terms = None
            unhook()

        part.terms = add
        last = bias if part.is_sum else None
        unhook = hooked(lambda module, x, out, names: self._shifted(out, last), module, names)
        return undo

    def _conv1d(self, module: Any, x: torch.Tensor, out: torch.Tensor, names: Names) -> torch.Tensor:
        # y = x W: the weight is the transpose of that of a linear layer, so the factors change places.
        if (name := names.get("weight")) is not None:
            out = self._moved(x, out, self._left[name], self._right[name])
        return self._shifted(out, names.get("bias"))

    def _embedding(self, module: Any, ids: torch.Tensor, out: torch.Tensor, names: Names) -> torch.Tensor:
        out, term = self._looked_up(ids, out, names["weight"])
        return out + term * getattr(module, "embed_scale", 1.0)

    def _looked_up(
        self, ids: torch.Tensor, out: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of an embedding for all rows, and the terms of the rows' members."""
        rows = len(self._members)
        if len(ids) == 1 < rows:  # positions that all rows share
            ids, out = ids.expand(rows, -1), out.expand(rows, -1, -1)
        left = self._left[name][self._members[:, None], ids.reshape(rows, -1)]
        return out, torch.bmm(left, self._of_rows(self._right[name]).mT).view_as(out)

    def _patch_lookup(self, module: Any, names: Names) -> Callable[[], None]:
        """Add the terms to the lookup in an embedding that makes its ids, or changes what it looked up."""

        def add(arguments: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
            ids, table = arguments[:2]
            if table is not module.weight:
                return out
            out, term = self._looked_up(ids, out, names["weight"])
            return out + term

        return adding(module, functional.embedding, add)

    def _layer_norm(self, module: Any, x: torch.Tensor, out: torch.Tensor, names: Names) -> torch.Tensor:
        if (name := names.get("weight")) is not None:
            normal = functional.layer_norm(x, module.normalized_shape, None, None, module.eps)
            out = out + self._scaled(normal, name)
        return self._shifted(out, names.get("bias"))

    def _rms_norm(self, module: Any, x: torch.Tensor, out: torch.Tensor, names: Names) -> torch.Tensor:
        wide = x.float()
        normal = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm_epsilon(module))
        return out + self._scaled(normal, names["weight"]).to(out.dtype)

    def _cohere_norm(self, module: Any, x: torch.Tensor, out: torch.Tensor, names: Names) -> torch.Tensor:
        wide = x.float()
        wide = wide - wide.mean(-1, keepdim=True)
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm_epsilon(module))
        name = names["weight"]
        if name in self._vectors:
            return out + self._scaled(normal, name).to(out.dtype)
        # A matrix of heads by features: its noise, of which this rank may have some heads, is small.
        heads = heads_of(module)
        left, right = self._of_rows(self._left[name][:, heads]), self._of_rows(self._right[name])
        noise_of_rows = torch.bmm(left.float(), right.float().mT)
        by_row = normal.reshape(len(self._members), -1, *normal.shape[-2:])
        return out + (by_row * noise_of_rows[:, None]).view_as(out).to(out.dtype)

    def _scaled(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Return ``x`` times the noise of a vector; ``x`` may have dimensions in between, such as heads."""
        noise_of_rows = self._of_rows(self._vectors[name])
        return (self._by_row(x) * noise_of_rows[:, None]).view_as(x)

    def _patch_router(self, module: Any, names: Names) -> Callable[[], None]:
        """Add the terms to the one linear product in a router, whose other computations stay as they are."""
        name = names["weight"]

        def add(arguments: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor:
            return self._moved(arguments[0], out, self._right[name], self._left[name])

        return adding(module, functional.linear, add)

    def _patch_experts(self, module: Any, names: Names) -> Callable[[], None]:
        """Compute the experts one after the other, each with the terms of the rows routed to it."""

        def product(key: str, expert: int, x: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
            out = functional.linear(x, getattr(module, key)[expert])
            if (name := names.get(key)) is None:
                return out
            inner = torch.bmm(x[:, None], self._right[name][members, expert])
            return torch.baddbmm(out[:, None], inner, self._left[name][members, expert].mT)[:, 0]

        def moved(hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(hidden)
            of_token = self._members.repeat_interleave(len(hidden) // len(self._members))
            for expert in chosen.unique().tolist():
                token, place = torch.where(chosen == expert)
                members = of_token[token]
                inner = module._apply_gate(product("gate_up_proj", expert, hidden[token], members))
                found = product("down_proj", expert, inner, members) * weights[token, place, None]
                out.index_add_(0, token, found.to(out.dtype))
            return out

        return replaced(module, moved)
