"""What an installed package must do, in any environment that has torch: `python tests/smoke.py`, from anywhere else."""

import importlib.util
import sys
from pathlib import Path

import torch
from torch import nn

import flatprune
import kfac_ext

assert Path(kfac_ext.__file__).parents[1] != Path(__file__).parents[1], "the source was imported, not the package"

torch.manual_seed(0)
x, g = torch.randn(4, 3, 8, 8), torch.randn(4, 5, 8, 8)
A = kfac_ext.conv2d_covariance(x, 3, padding=1, bias=True)
torch.testing.assert_close(A, kfac_ext.reference.conv2d_covariance(x, 3, padding=1, bias=True))
G = kfac_ext.gradient_covariance(g)
for inverse, matrix in zip(kfac_ext.damped_inverse([A, G], 0.1), (A, G)):
    torch.testing.assert_close(inverse @ (matrix + 0.1 * torch.eye(len(matrix))), torch.eye(len(matrix)))
assert (kfac_ext.power_iteration([A, G]).eigenvalues > 0).all()

model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
curvature = flatprune.Curvature(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
steps = []
if importlib.util.find_spec("scipy"):
    target = flatprune.Target(params=0.5)
    steps.append(flatprune.Pruner(model, optimizer, curvature, x[:1], target=target, total_steps=4).step)
for _ in range(4):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
    optimizer.step()
    for step in steps:
        step()
assert curvature.factors["0.A"].any()
pruned = sum(p.numel() for p in model.parameters())
assert not steps or pruned <= 0.5 * 5354 + 600, pruned

for compiled in (False, True):  # what versions of torch differ in
    net = nn.Sequential(nn.Linear(6, 5))
    watching = kfac_ext.Curvature(net)
    forward = torch.compile(net, backend="eager") if compiled else net
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not compiled):
        assert forward(torch.randn(7, 6)).requires_grad
    assert all(watching.factors[key].any() for key in ("0.A", "0.G")), "factors are not updated"

what = f"pruned to {pruned} parameters" if steps else "without flatprune's extras"
print(f"kfac-ext {kfac_ext.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}: works, {what}")
