from tests.pruning.trained_nets import double_nets, kept_couplings, trained_nets  # noqa: F401
