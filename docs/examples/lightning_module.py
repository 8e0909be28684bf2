"""VICReg with Lightning, on any number of devices: python docs/examples/lightning_module.py"""

import sys

import lightning as L
import torch
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


class VICReg(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(encoder, vk.Projector(256, [512, 128])).train()

    def training_step(self, batch, index):
        x, y = (self.model(view(batch)) for _ in range(2))
        self.loss = vk.vicreg_loss(x, y, process_group=self.trainer.world_size > 1 or None)
        return self.loss

    def on_train_epoch_end(self):
        print(f"epoch {self.current_epoch}: loss {self.loss:.3f}")

    def configure_optimizers(self):
        torch.manual_seed(self.global_rank)  # each rank draws views of its own
        return torch.optim.AdamW(self.model.parameters(), lr=3e-3)


print(f"untrained: accuracy {accuracy(encoder):.3f}")
quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
trainer = L.Trainer(max_epochs=epochs, **quiet)
trainer.fit(VICReg(), DataLoader(images, batch_size=256, shuffle=True, drop_last=True))
print(f"trained: accuracy {accuracy(encoder):.3f}")
