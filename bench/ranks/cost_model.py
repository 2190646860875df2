"""Bytes of the curvature's collectives, counted, and what they would take on 8 to 1,024 GPUs, predicted.

    python -m bench.ranks.cost_model

A prediction, not a measurement: nothing of it ran on several GPUs. Ring all-reduce of n bytes over W ranks takes
2 (W - 1) alpha + 2 (W - 1)/W n/beta, a tree 2 ceil(log2 W) alpha + 2 n/beta; on nodes of 8 GPUs the sum is made inside
the node, then of an eighth across nodes. Latencies and rates below are assumed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from bench import documents
from kfac_ext.distributed import shared_work

GPUS_A_NODE = 8
INSIDE = (6e-6, 300e9)  # seconds a hop, bytes a second of one GPU: NVLink
ACROSS = (12e-6, 45e9)  # 400 Gbit/s for each GPU
INVERSE_RATE = 20e12  # operations a second, 2 n^3 an inverse
BYTES = 4
UPDATE_EVERY = 10
RANKS = (1, 8, 16, 64, 256, 1024)


class Network(NamedTuple):
    """What of a network decides the bytes.

    Attributes:
        name: for the table.
        inputs: rows of each A, the constant included.
        outputs: rows of each G.
        parameters: of the network.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    parameters: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of all factors."""
        return self.inputs + self.outputs

    @property
    def triangles(self) -> int:
        """Bytes of an update of the factors."""
        return BYTES * sum(n * (n + 1) // 2 for n in self.sizes)

    @property
    def whole(self) -> int:
        """Bytes of the factors as matrices."""
        return BYTES * sum(n * n for n in self.sizes)

    @property
    def fresh(self) -> int:
        """Bytes of the fresh A of an event: of all layers that read neurons."""
        return BYTES * sum(n * (n + 1) // 2 for n in self.inputs[1:])

    @property
    def gradients(self) -> int:
        """Bytes of a step's gradients."""
        return BYTES * self.parameters


def resnet50() -> Network:
    """53 convolutions with folded batch norms and a Linear, for 224 x 224 images."""
    layers, channels = [(3 * 49, 64)], 64
    for width, blocks, out in ((64, 3, 256), (128, 4, 512), (256, 6, 1024), (512, 3, 2048)):
        for block in range(blocks):
            layers += [(channels, width), (9 * width, width), (width, out)]
            layers += [(channels, out)] if block == 0 else []
            channels = out
    layers.append((2048, 1000))
    return Network("ResNet50", tuple(d + 1 for d, _ in layers), tuple(o for _, o in layers), 25_557_032)


def vit_b16() -> Network:
    """12 blocks of width 768."""
    block = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]
    layers = [(768, 768), *(12 * block), (768, 1000)]
    return Network("ViT-B/16", tuple(d + 1 for d, _ in layers), tuple(o for _, o in layers), 86_567_656)


def all_reduce(size: float, ranks: int) -> float:
    """Seconds."""
    inside = min(ranks, GPUS_A_NODE)
    nodes = ranks // inside
    across = min(_ring(size / inside, nodes, *ACROSS), _tree(size / inside, nodes, *ACROSS))
    return _ring(size, inside, *INSIDE) + across


def _ring(size: float, ranks: int, alpha: float, beta: float) -> float:
    return 0.0 if ranks == 1 else 2 * (ranks - 1) * alpha + 2 * (ranks - 1) / ranks * size / beta


def _tree(size: float, ranks: int, alpha: float, beta: float) -> float:
    return 0.0 if ranks == 1 else 2 * math.ceil(math.log2(ranks)) * alpha + 2 * size / beta


def inverses(network: Network, ranks: int) -> float:
    """Seconds of all damped inverses: the busiest rank's, and the gathering of all."""
    costs = [float(n) ** 3 for n in network.sizes]
    owners = shared_work(costs, ranks)
    busiest = max(sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(ranks))
    return 2 * busiest / INVERSE_RATE + 0.5 * all_reduce(network.triangles, ranks)


def table(networks: Sequence[Network]) -> str:
    """Markdown: bytes counted, then seconds predicted."""
    rows = {
        "gradients a step, MB": lambda n: f"{n.gradients / 1e6:.0f}",
        "factors an update, MB (as whole matrices)": lambda n: f"{n.triangles / 1e6:.0f} ({n.whole / 1e6:.0f})",
        f"a step at one update in {UPDATE_EVERY}, MB": lambda n: f"{n.triangles / UPDATE_EVERY / 1e6:.0f}",
        "fresh A of an event, MB": lambda n: f"{n.fresh / 1e6:.0f}",
    }
    for ranks in RANKS[1:]:
        rows[f"all-reduce of the factors, {ranks:,} GPUs, ms (predicted)"] = lambda n, ranks=ranks: (
            f"{1e3 * all_reduce(n.triangles, ranks):.1f}"
        )
    for ranks in RANKS:
        rows[f"inverses shared by {ranks:,} GPUs, ms (predicted)"] = lambda n, ranks=ranks: (
            f"{1e3 * inverses(n, ranks):.1f}"
        )
    head = ["", *(network.name for network in networks)]
    return "\n".join(documents.table(head, ([name, *map(cell, networks)] for name, cell in rows.items())))


if __name__ == "__main__":
    print(table([resnet50(), vit_b16()]))
