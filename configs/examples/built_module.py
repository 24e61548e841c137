"""Quantize a module that was built in Python: no config, no runner, no OpenMMLab model.

Trains a small network on the handwritten digits of scikit-learn, quantizes it to 8 bits after training and prints
both accuracies: python configs/examples/built_module.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mmrazor_quant.algorithms import GeneralQuant

TRAIN = 1200
"""Images to train on; the other 597 are to test on."""


def load_images() -> tuple[Tensor, Tensor]:
    """Return all images, shape [1797, 1, 8, 8], and their labels, in random order."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return images[order], torch.tensor(digits.target)[order]


def build_network() -> nn.Module:
    """Return a network that is any other module: GeneralQuant asks only that it can be called on images."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def train(network: nn.Module, images: Tensor, labels: Tensor, epochs: int = 8) -> None:
    """Train the float network."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()


@torch.no_grad()
def calibrate(model: GeneralQuant, images: Tensor) -> None:
    """Set the ranges of weights and activations, and quantize from now on."""
    model.eval()
    model.observe_weights()
    model.set_quant_state(act_observer=True)
    for batch in images.split(50):
        model(batch)
    model.compute_act_qparams()
    model.mark_calibrated()
    model.set_quant_state(weight_observer=False, weight_fake_quant=True, act_observer=False, act_fake_quant=True)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of right answers in percent."""
    return (model.eval()(images).argmax(1) == labels).float().mean().item() * 100


def main() -> dict[str, float]:
    """Return and print the accuracies of the float and of the quantized network."""
    torch.manual_seed(0)
    images, labels = load_images()
    network = build_network()
    train(network, images[:TRAIN], labels[:TRAIN])
    results = {'float': accuracy(network, images[TRAIN:], labels[TRAIN:])}

    qconfig = dict(w_qscheme=dict(bit=8, is_per_channel=True), a_qscheme=dict(bit=8, is_symmetry=False))
    model = GeneralQuant(
        architecture=network.eval(),
        quantizer=dict(type='mmrazor.CustomQuantizer', qconfig=qconfig),
        input_shape=(1, 8, 8),
    )
    calibrate(model, images[:200])
    results['w8a8'] = accuracy(model, images[TRAIN:], labels[TRAIN:])
    for name, value in results.items():
        print(f'{name:6s} {value:6.2f} %')
    return results


if __name__ == '__main__':
    main()
