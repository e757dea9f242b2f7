"""The reconstructor and its training step in PyTorch, built from our parameters: the peer of `scripts/benchmark.py`.

Plain, but not naive: one fused projection for the queries and keys of self-attention, `scaled_dot_product_attention`,
fused AdamW. Dropout has our rate and our places, the attention weights among them. Layout [B,h,w,C] float32; without
dropout the outputs, and the losses of a few training steps, equal ours.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pushpull_jax.models.reconstructor import Reconstructor


def tensor(leaf: Any) -> torch.Tensor:
    """A copy of an array, contiguous as torch's own parameters are."""
    return torch.tensor(np.asarray(leaf, np.float32)).contiguous()


def linear(*parameters: dict[str, Any]) -> nn.Linear:
    """One dense layer [.., n] -> [.., m] from our kernels [n,m_i] and biases [m_i], side by side where several."""
    weight = torch.cat([tensor(np.asarray(p["kernel"]).T) for p in parameters])
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.cat([tensor(p["bias"]) for p in parameters]))
    return layer


def norm(parameters: dict[str, Any]) -> nn.LayerNorm:
    layer = nn.LayerNorm(len(parameters["scale"]), eps=1e-5)
    layer.weight, layer.bias = nn.Parameter(tensor(parameters["scale"])), nn.Parameter(tensor(parameters["bias"]))
    return layer


class Attention(nn.Module):
    """[B,T,D] x [B,S,D] -> [B,T,D]; the query and key of self-attention are one tensor, projected at once."""

    def __init__(self, parameters: dict[str, Any], *, heads: int, dropout: float, self_attention: bool):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        if self_attention:
            self.query_key = linear(parameters["query"], parameters["key"])
        else:
            self.query, self.key = linear(parameters["query"]), linear(parameters["key"])
        self.value, self.out = linear(parameters["value"]), linear(parameters["out"])

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k = self.query_key(query).chunk(2, dim=-1) if query is key else (self.query(query), self.key(key))
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, self.value(value)))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """One encoder layer, or, given a memory, one decoder layer: post-norm, ReLU."""

    def __init__(self, parameters: dict[str, Any], *, heads: int, dropout: float):
        super().__init__()
        settings = {"heads": heads, "dropout": dropout}
        self.self_attention = Attention(parameters["self_attention"], self_attention=True, **settings)
        self.norm_self = norm(parameters["norm_self"])
        if "cross_attention" in parameters:
            self.cross_attention = Attention(parameters["cross_attention"], self_attention=False, **settings)
            self.norm_cross = norm(parameters["norm_cross"])
        feed_forward = parameters["feed_forward"]
        self.feed_forward = nn.Sequential(
            linear(feed_forward["in"]), nn.ReLU(), nn.Dropout(dropout), linear(feed_forward["out"])
        )
        self.norm_feed_forward = norm(parameters["norm_feed_forward"])
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        at = x + positions
        x = self.norm_self(x + self.drop(self.self_attention(at, at, x)))
        if memory is not None:
            update = self.cross_attention(x + positions, memory + positions, memory)
            x = self.norm_cross(x + self.drop(update))
        return self.norm_feed_forward(x + self.drop(self.feed_forward(x)))


class TorchReconstructor(nn.Module):
    """The twin of `Reconstructor` with attention, a query and row and column positions: [B,h,w,C] -> [B,h,w,C]."""

    def __init__(self, module: Reconstructor, parameters: dict[str, Any]):
        super().__init__()
        self.fold = module.fold
        settings = {"heads": module.heads, "dropout": module.dropout}
        self.project_in, self.project_out = linear(parameters["project_in"]), linear(parameters["project_out"])
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(parameters[f"{side}_{i}"], **settings) for i in range(count))
            for side, count in (("encoder", module.encoder_layers), ("decoder", module.decoder_layers))
        )
        self.query, self.row_positions, self.column_positions = (
            nn.Parameter(tensor(parameters[name])) for name in ("query", "row_positions", "column_positions")
        )
        self.norm = norm(parameters["norm"])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        batch, h, w, channels = features.shape
        rows, columns, fold = h // self.fold, w // self.fold, self.fold
        cells = features.reshape(batch, rows, fold, columns, fold, channels).transpose(2, 3)
        memory = self.project_in(cells.reshape(batch, rows * columns, fold * fold * channels))
        along_row = self.column_positions.expand(rows, -1, -1)
        along_column = self.row_positions[:, None].expand(-1, columns, -1)
        positions = torch.cat([along_row, along_column], dim=-1).flatten(0, 1)
        for layer in self.encoder:
            memory = layer(memory, positions)
        x = self.query.expand(batch, -1, -1)
        for layer in self.decoder:
            x = layer(x, positions, memory)
        cells = self.project_out(self.norm(x)).reshape(batch, rows, columns, fold, fold, channels)
        return cells.transpose(2, 3).reshape(batch, h, w, channels)


def torch_reconstructor(module: Reconstructor, parameters: dict[str, Any]) -> nn.Module:
    """A twin with copies of the parameters, in training mode; `.eval()` turns dropout off.

    Args:
        module: with attention, a query and factorised positions.
        parameters: its tree, without the "params" of flax.

    Returns:
        [B,h,w,C] -> [B,h,w,C], float32.
    """
    if not (module.attention and module.query and module.positions == "factorised"):
        raise ValueError(f"expected attention, a query and factorised positions, got {module}")
    return TorchReconstructor(module, parameters)


def torch_train_step(
    model: nn.Module, *, learning_rate: float, weight_decay: float, clip_norm: float
) -> Callable[[torch.Tensor], float]:
    """AdamW on a gradient clipped by its global norm, loss eq. 1 over C: features [B,h,w,C] -> the loss before it.

    Args:
        model: a twin, or what `torch.compile` made of one.
        learning_rate: constant.
        weight_decay: of all parameters.
        clip_norm: of the global norm.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=True
    )

    def step(features: torch.Tensor) -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(model(features), features)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        return loss.item()

    return step
