"""Networks of PyTorch Geometric: layers that pass messages, stacked by its own models or by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo.network import Builder, Inputs, Network

PACKAGE = "torch_geometric.nn"
FEATURES, CLASSES = 16, 5


def graph(n: int) -> Inputs:
    """Features of 8 n nodes on a ring with chords, and the ring."""
    nodes = 8 * n
    start = torch.arange(nodes)
    edges = [torch.stack([start, (start + step) % nodes]) for step in (1, 3)]
    edge_index = torch.cat([torch.cat([e, e.flip(0)], 1) for e in edges], 1)
    return torch.randn(nodes, FEATURES), edge_index


def graphs(n: int) -> Inputs:
    """The same as n graphs of 8 nodes: features, edges, the graph of each node."""
    features, edge_index = graph(n)
    return features, edge_index, torch.arange(n).repeat_interleave(8)


def model(kind: str, **options: Any) -> Builder:
    """A model of PyTorch Geometric that classifies nodes."""

    def build() -> Network:
        from torch_geometric.nn import models

        return Network(getattr(models, kind)(FEATURES, 64, 3, CLASSES, **options).train(), graph)

    return build


class Stack(nn.Module):
    """Layers with ReLU between them; a mean over the nodes of each graph where there is a graph of each node."""

    def __init__(self, layers: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), head

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor | None = None) -> Tensor:
        """Logits of each node, or of each graph."""
        for layer in self.layers:
            x = torch.relu(layer(x, edge_index))
        if batch is not None:
            from torch_geometric.nn import global_mean_pool

            x = global_mean_pool(x, batch)
        return self.head(x)


def stack(kind: str, inputs: Callable[[int], Inputs] = graph, **options: Any) -> Builder:
    """Two layers `kind` and a linear one."""

    def build() -> Network:
        from torch_geometric import nn as pyg

        layer = getattr(pyg, kind)
        return Network(
            Stack([layer(FEATURES, 32, **options), layer(32, 32, **options)], nn.Linear(32, CLASSES)), inputs
        )

    return build


NETWORKS: dict[str, Builder] = {
    "pyg_gcn": model("GCN"),
    "pyg_gcn_jumping": model("GCN", norm="batch", jk="cat"),
    "pyg_sage": model("GraphSAGE"),
    "pyg_sage_norm": model("GraphSAGE", norm="layer", project=True),
    "pyg_gin": model("GIN"),
    "pyg_gat": model("GAT", heads=4),
    "pyg_gatv2": model("GAT", heads=4, v2=True),
    "pyg_pna": model("PNA", aggregators=["mean", "max"], scalers=["identity"], deg=torch.tensor([0, 0, 0, 0, 8])),
    "pyg_graphconv": stack("GraphConv", graphs),
    "pyg_transformer": stack("TransformerConv", graphs),
    "pyg_tag": stack("TAGConv", K=2),
    "pyg_cheb": stack("ChebConv", K=2),
    "pyg_resgated": stack("ResGatedGraphConv"),
}
