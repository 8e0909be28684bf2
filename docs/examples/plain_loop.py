"""VICReg on scikit-learn's digits in a plain PyTorch loop: python plain_loop.py --epochs 20"""

import argparse

import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import vicreg_kernels as vk


def make_encoder():
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
    layers += [nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())  # [N, 1, 8, 8] -> [N, 256]


def view(images):
    """Each image turned, scaled and moved at random, with noise."""
    moves = torch.eye(2, 3, device=images.device) + 0.15 * torch.randn(
        len(images), 2, 3, device=images.device
    )
    moved = F.grid_sample(images, F.affine_grid(moves, images.shape, False), align_corners=False)
    return moved + 0.1 * torch.randn_like(moved)


@torch.no_grad()
def score(encoder, images, labels):
    """Accuracy on four fifths of the images, of a linear classifier that is fitted to one fifth."""
    encoder.eval()
    parts = train_test_split(encoder(images).cpu(), labels, train_size=0.2, random_state=0)
    x, x_test, y, y_test = parts
    return LogisticRegression(max_iter=1000).fit(x, y).score(x_test, y_test)


parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--widths", type=int, nargs="+", default=[512, 512])
options = parser.parse_args()
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
images, labels = load_digits(return_X_y=True)
images = torch.tensor(images, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 16
encoder = make_encoder().to(device)
print(f"untrained: accuracy {score(encoder, images, labels):.3f}")

projector = vk.Projector(256, options.widths).to(device)
loss_of = vk.VICRegLoss()
parameters = [*encoder.parameters(), *projector.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=1e-3)
encoder.train()
for epoch in range(options.epochs):
    losses = []
    for batch in images[torch.randperm(len(images), device=device)].split(256):
        x, y = (projector(encoder(view(batch))) for _ in range(2))
        loss = loss_of(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.3f}")
print(f"trained: accuracy {score(encoder, images, labels):.3f}")
