"""Which tensors are coupled: the neurons of any network that runs under PyTorch, found by labels that ride along.

The model runs once under a `TorchDispatchMode`; each tensor carries labels that say which parameter entry its entries
stand or fall with (`values`, `tracer`). What meets is one (`algebra`, `operators`), connected components are neurons
(`components`, `slices`), and a trial cut proves them (`trial`).
"""

from flatprune.coupling.coupling import find_coupling
from flatprune.coupling.cuts import Cut, cut_tensor, tensor_cuts
from flatprune.coupling.neurons import (
    CHANNELWISE,
    CONSUMER,
    PRODUCER,
    Attribute,
    Coupling,
    Member,
    NeuronGroup,
    Refusal,
)
from kfac_ext.curvature.recent import Call

__all__ = [
    "CHANNELWISE",
    "CONSUMER",
    "PRODUCER",
    "Attribute",
    "Call",
    "Coupling",
    "Cut",
    "Member",
    "NeuronGroup",
    "Refusal",
    "cut_tensor",
    "find_coupling",
    "tensor_cuts",
]
