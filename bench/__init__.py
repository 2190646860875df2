"""The benchmark suite: native operations, plain PyTorch and installed peers on the same inputs, alternating."""
