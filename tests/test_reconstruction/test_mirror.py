"""Mirrored images are further data."""

import torch
from mmcls.structures import ClsDataSample
from reconstructing import batches, calibrated, reconstruct, same_state

from mmrazor_quant.reconstruction.mirror import mirrored


def test_only_images_are_mirrored():
    image, numbers, sample = torch.arange(12).reshape(1, 3, 4), torch.arange(3), ClsDataSample()

    made = mirrored(dict(inputs=[image], data_samples=[sample], ids=numbers))

    assert torch.equal(made['inputs'][0][0, 0], torch.tensor([3, 2, 1, 0]))
    assert made['data_samples'] == [sample]
    assert torch.equal(made['ids'], numbers)


def test_mirroring_is_as_more_data(tmp_path):
    data = batches(2)
    model, other, plain = (calibrated(data=data) for _ in range(3))

    reconstruct(model, tmp_path / 'a', data=data, mirror=True)
    reconstruct(other, tmp_path / 'b', data=[*data, *map(mirrored, data)], mirror=False)
    reconstruct(plain, tmp_path / 'c', data=data, mirror=False)

    assert same_state(model, other)
    assert not same_state(model, plain)
