"""The four networks whose layers are measured and counted."""

from __future__ import annotations

from bench import worksets as w
from bench.gpu.names import NETWORKS


def work_sets(quick: bool) -> dict[str, list[w.LayerShape]]:
    """The four networks; in a dry run the distinct kinds of their layers, small."""
    full = dict(zip(NETWORKS, (w.vgg(128, w.VGG19), w.resnet(128, 5), w.resnet50(32), w.mlp(256))))
    if not quick:
        return full
    small = {}
    for name, layers in full.items():
        kinds = {(i.kernel, i.stride, i.is_convolution): i for i in layers}
        small[name] = [
            i._replace(batch=2, channels=min(i.channels, 12), outputs=min(i.outputs, 12), size=min(i.size, 10))
            for i in kinds.values()
        ]
    return small
