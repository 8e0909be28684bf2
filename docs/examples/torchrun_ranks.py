"""VICReg over ranks: torchrun --nproc-per-node 2 docs/examples/torchrun_ranks.py"""

import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

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
dist.init_process_group("gloo")  # on GPUs "nccl", a device a rank, nn.SyncBatchNorm
rank = dist.get_rank()
print(f"rank {rank}, untrained: accuracy {accuracy(encoder):.3f}\n", end="")

model = DistributedDataParallel(nn.Sequential(encoder, vk.Projector(256, [512, 128])).train())
vicreg = vk.VICRegLoss(process_group=True)  # the loss of the batch of all ranks
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
sampler = DistributedSampler(images)
rows = 256 // dist.get_world_size()
loader = DataLoader(images, batch_size=rows, sampler=sampler, drop_last=True)
torch.manual_seed(rank)  # each rank draws views of its own
for epoch in range(epochs):
    sampler.set_epoch(epoch)
    for batch in loader:
        x, y = model(torch.cat((view(batch), view(batch)))).chunk(2)
        loss = vicreg(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"rank {rank}, epoch {epoch}: loss {loss:.3f}\n", end="")
print(f"rank {rank}, trained: accuracy {accuracy(encoder):.3f}\n", end="")
dist.destroy_process_group()
