from tests.command_line import flatprune, kept_couplings, npz  # noqa: F401
