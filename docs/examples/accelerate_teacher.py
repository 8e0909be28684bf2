"""An EMA teacher with Accelerate: accelerate launch docs/examples/accelerate_teacher.py"""

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import vicreg_kernels as vk


def view(images):  # each turned, scaled and moved at random, with noise
    moves = torch.eye(2, 3) + 0.1 * torch.randn(len(images), 2, 3)
    grid = F.affine_grid(moves.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False) + 0.05 * torch.randn_like(images)


@torch.no_grad()
def accuracy(encoder):  # of the nearest of 100 labelled images
    z = encoder.eval()(images.to(next(encoder.parameters()).device)).cpu()
    return KNeighborsClassifier(1).fit(z[::18], labels[::18]).score(z[1::2], labels[1::2])


torch.manual_seed(0)
epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
pixels, labels = load_digits(return_X_y=True)
images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
layers = [nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
layers += [nn.Conv2d(32, 64, 3, 2, padding=1), nn.BatchNorm2d(64), nn.ReLU()]
encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
accelerator = Accelerator()
accelerator.print(f"untrained: accuracy {accuracy(encoder):.3f}")

student = nn.Sequential(encoder, vk.Projector(256, [512, 128])).train()
optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
loader = DataLoader(images, batch_size=256, shuffle=True, drop_last=True)
student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
torch.manual_seed(accelerator.process_index)  # each process draws views of its own
teacher = vk.EMA(student, 0.9, schedule="cosine", total_steps=epochs * len(loader))
# The variance and covariance of the student keep it from collapsing, over all processes' rows.
regularizer = vk.VCRegLoss(process_group=True if accelerator.num_processes > 1 else None)
for epoch in range(epochs):
    for batch in loader:
        z = student(view(batch))
        with torch.no_grad():
            target = teacher(view(batch))
        loss = 25 * F.mse_loss(z, target) + regularizer(z)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        teacher.update(student)
    accelerator.print(f"epoch {epoch}: loss {loss:.3f}")
accelerator.print(f"trained: accuracy {accuracy(teacher.module[0]):.3f}")
accelerator.end_training()
