from tests.command_line import flatprune, kept_couplings  # noqa: F401
