"""Which tensors belong to a neuron, and taking neurons out of all of them at once."""
