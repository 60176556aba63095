"""GradDropSGD: equation 2 of the paper itself, on a small network that reads handwritten digits.

    w = w - lr * mask * gradient / q         the mask keeps each element with probability q = 1 - p

Shows: keep_mask, which says beforehand what a step will keep; the equation, computed by hand beside the optimizer.
Run:   python examples/sgd_equation2.py
"""

import torch
from sklearn.datasets import load_digits

from graddrop_fused import GradDrop, GradDropSGD

images, labels = (torch.tensor(values) for values in load_digits(return_X_y=True))
images, labels = images.float() / 16, labels.long()
shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train, test = shuffled[:1400], shuffled[1400:]


def train_on_digits(p: float, epochs: int = 15) -> float:
    """Accuracy on images that it has not seen."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    weight = model[0].weight
    optimizer = GradDropSGD(model.named_parameters(), lr=0.5, drop=GradDrop(p=p), seed=0)
    for epoch in range(epochs):
        for batch in train[torch.randperm(len(train))].split(50):
            loss = torch.nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            kept = optimizer.keep_mask(weight)  # of the coming step
            by_hand = weight.detach() - 0.5 * kept * weight.grad / (1 - p)
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(weight.detach(), by_hand)
        if epoch % 5 == 4:
            print(f"p = {p}: epoch {epoch}, loss {loss.item():.3f}, {kept.float().mean():.0%} of the weights moved")
    return (model(images[test]).argmax(1) == labels[test]).float().mean().item()


for p in (0.0, 0.5, 0.875):  # other p are rounded to a multiple of 2**-16, and q with them
    print(f"p = {p}: accuracy {train_on_digits(p):.3f}, every step as equation 2 says")
