"""Prune your own network on your own data: replace what stands between the two lines (python examples/own_data.py)."""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatprune

torch.manual_seed(0)
# ----- yours: images, labels, network
images, labels = load_digits(return_X_y=True)
x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16.0
y = torch.tensor(labels)
test, train = torch.randperm(len(x), generator=torch.Generator().manual_seed(1)).split([400, len(x) - 400])
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
# ----- end of yours

epochs, batch_size = 30, 32
steps = epochs * (len(train) // batch_size)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
curvature = flatprune.Curvature(model)
flatness = flatprune.Flatness(curvature, total_steps=steps)
goal = flatprune.Target(params=0.2)
pruner = flatprune.Pruner(model, optimizer, curvature, x[:2], target=goal, total_steps=steps)

for _ in range(epochs):
    order = train[torch.randperm(len(train))]
    for index in order[: len(order) // batch_size * batch_size].split(batch_size):
        optimizer.zero_grad()
        logits = model(x[index])
        loss = nn.functional.cross_entropy(logits, y[index])
        (loss + flatness.penalty(x[index], logits, loss)).backward()
        optimizer.step()
        pruner.step()
        scheduler.step()

curvature.remove()  # takes the hooks off, so that the network is an ordinary one again
model.eval()
accuracy = 100 * (model(x[test]).argmax(1) == y[test]).float().mean()
print(f"test accuracy {accuracy:.1f} % with {pruner.params} of {pruner.params_start} parameters")
torch.save(model, sys.argv[1] if len(sys.argv) > 1 else "pruned.pt")
