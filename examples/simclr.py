"""SimCLR in plain PyTorch on wherefrom's views: python examples/simclr.py [--data SHARDS]. Without data: drawn pictures, on any CPU.

Source: arXiv 2002.05709: two views a picture, a projector, NT-Xent over all other views of the batch; AdamW in place of LARS.
"""

import argparse

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wherefrom.pipeline import ColorLaw, Independent, ViewFamily, ViewRecipe, demo_shards, make_loader


def two_views(side_px: int) -> ViewRecipe:
    """Return SimCLR's views, milder for small pictures: a fifth of the picture or more, mirrored or not, recolored, at times blurred."""
    color = ColorLaw(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur_prob=0.2)
    law = Independent(area_frac=(0.2, 1.0))
    family = ViewFamily(name="global", views=2, size_px=(side_px, side_px), law=law, mirror="view", color=color)
    return ViewRecipe(families=(family,))


def nt_xent(z: Tensor, temperature: float) -> Tensor:
    """Return the cross-entropy of finding each view's partner among all other views: z (B, 2, D) -> ()."""
    each = F.normalize(z.flatten(0, 1), dim=-1)  # views 2 i and 2 i + 1 are partners
    similarity = each @ each.mT / temperature
    similarity.fill_diagonal_(-torch.inf)  # no view finds itself
    partners = torch.arange(len(each), device=z.device) ^ 1
    return F.cross_entropy(similarity, partners)


def train(
    data: str, *, updates: int, batch: int, side_px: int, lr: float = 1e-3, temperature: float = 0.2, device: str = "cpu"
) -> list[float]:
    """Train a ResNet-18 and its projector; return the loss of every update."""
    encoder = timm.create_model("resnet18", num_classes=0)
    width = encoder.num_features
    projector = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 128))
    model = nn.Sequential(encoder, projector).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4)
    losses = []
    with make_loader(data, two_views(side_px), global_batch=batch, device=device) as loader:
        for update, views in zip(range(updates), (each.family("global") for each in loader.forever()), strict=False):
            z = model(views.pixels.flatten(0, 1)).unflatten(0, (-1, 2))  # (B, 2, 128)
            loss = nt_xent(z, temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if update % 10 == 0:
                print(f"update {update}: loss {losses[-1]:.3f}", flush=True)
    return losses


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", help="shards, a folder of them, or a pattern; default: the demo's pictures")
    options.add_argument("--updates", type=int, default=200)
    options.add_argument("--batch", type=int, default=64)
    options.add_argument("--side-px", type=int, default=64)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    chosen = vars(options.parse_args())
    train(chosen.pop("data") or demo_shards().train, **chosen)
