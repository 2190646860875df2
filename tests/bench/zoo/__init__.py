"""Networks that people train, and the parts of `bench.zoo` that judge them."""
