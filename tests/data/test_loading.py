"""Batches in record order; training items that depend on (seed, epoch, index) alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.data import DataLoader

from ampdeploy.data.decode import open_rgb
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import TrainImages, iter_batches, load_all
from ampdeploy.data.transforms import eval_transform
from ampdeploy.errors import ConfigError, DataError
from tests.data.samples import fill, make_spec, noise

SPEC = make_spec()


@pytest.fixture
def images(tmp_path):
    fill(tmp_path, 7)
    return scan_folder(tmp_path, limit=None, seed=0)


def train_images(images, *, seed: int = 0, strong: bool = True) -> TrainImages:
    return TrainImages(images, SPEC, min_scale=0.3, strong=strong, seed=seed)


def test_batches_are_in_record_order_and_the_last_is_short(images):
    batches = list(iter_batches(images, SPEC, 3))
    assert [tuple(batch.shape) for batch in batches] == [
        (3, 3, 24, 24),
        (3, 3, 24, 24),
        (1, 3, 24, 24),
    ]
    transform = eval_transform(SPEC)
    expected = torch.stack([transform(open_rgb(record.path)) for record in images.records])
    assert torch.equal(torch.cat(batches), expected)
    assert torch.equal(load_all(images, SPEC), expected)


def test_batch_size_is_checked_before_anything_is_loaded(images):
    with pytest.raises(ConfigError, match="batch size is 0"):
        iter_batches(images, SPEC, 0)


def test_nothing_to_load(images):
    none = dataclasses.replace(images, records=())
    assert list(iter_batches(none, SPEC, 4)) == []
    with pytest.raises(DataError, match="nothing to load"):
        load_all(none, SPEC)


@pytest.mark.parametrize(("change", "reason"), [("vanish", "no such file"), ("edit", "content")])
def test_files_must_be_what_was_scanned(images, change, reason):
    path = images.records[4].path
    path.unlink()
    if change == "edit":
        noise(99).save(path)
    with pytest.raises(DataError, match=reason) as caught:
        list(iter_batches(images, SPEC, 2))
    assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=reason):
        train_images(images)[4]


def test_item_depends_on_seed_epoch_and_index_alone(images):
    data = train_images(images)
    forward = [data[index] for index in range(len(data))]
    torch.manual_seed(123)
    again = train_images(images)
    backward = [again[index] for index in reversed(range(len(data)))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))

    assert not torch.equal(train_images(images, seed=1)[0], forward[0])
    again.set_epoch(1)
    assert not torch.equal(again[0], forward[0])
    again.set_epoch(0)
    assert torch.equal(again[0], forward[0])


def test_equal_files_are_augmented_differently(images):
    first = images.records[0]
    twice = dataclasses.replace(images, records=(first, first))
    data = train_images(twice)
    assert not torch.equal(data[0], data[1])


def test_workers_do_not_change_the_items(images):
    data = train_images(images)
    data.set_epoch(3)
    alone = torch.cat(list(DataLoader(data, batch_size=2)))
    shared = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2)))
    assert torch.equal(alone, shared)


def test_error_in_a_worker_keeps_its_type_and_message(images):
    images.records[0].path.unlink()
    alone = dataclasses.replace(images, records=images.records[:1])
    loader = DataLoader(train_images(alone), num_workers=1)
    with pytest.raises(DataError, match="no such file"):
        next(iter(loader))


def test_callers_generator_is_left_alone(images):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    data = train_images(images)
    for index in range(len(data)):
        data[index]
    assert torch.equal(torch.rand(4), expected)


def test_length_and_ends(images):
    data = train_images(images)
    assert len(data) == 7
    assert data[0].shape == (3, 24, 24)
    assert torch.equal(data[-1], data[6])
    with pytest.raises(IndexError):
        data[7]
