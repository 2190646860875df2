"""The four networks whose layers are measured and counted."""

from __future__ import annotations

from bench import worksets as w


def work_sets(quick: bool) -> dict[str, list[w.LayerShape]]:
    """The four networks; in a dry run the distinct kinds of their layers, small."""
    full = {
        "VGG19 b128": w.vgg(128, w.VGG19),
        "ResNet32 b128": w.resnet(128, 5),
        "ResNet50 b32": w.resnet50(32),
        "MLP b256": w.mlp(256),
    }
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
