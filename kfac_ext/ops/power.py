"""Power iteration (placeholder over the reference until the native kernels land)."""

from kfac_ext.reference.power import PowerIteration, covariance_power_iteration, power_iteration, start_vector


def power_iteration_(matrices, vectors, *, tol=1e-3, max_iter=100):
    result = power_iteration(matrices, vectors, tol=tol, max_iter=max_iter)
    for v, w in zip(vectors, result.eigenvectors):
        v.copy_(w)
    return result._replace(eigenvectors=list(vectors))
