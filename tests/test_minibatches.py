"""Batches are those of a plain loop over the loader, also after an interruption."""

import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from pyro_vi_ext.minibatches import Minibatches
from pyro_vi_ext.training import fit

from . import fitting
from .fitting import DATA, assert_same, make_svi
from .resuming import (
    Noisy,
    adam,
    check_refused,
    check_resumed,
    data,
    fresh,
    guide,
    interrupt_at,
    model,
    module,
    train,
    with_loader,
)

pytestmark = pytest.mark.usefixtures("float64")


# The arguments of a step.


def test_batches_stand_for_the_loader():
    seen = []

    def recording_model(before, x, y, after):
        seen.append((before, x.tolist(), y.tolist(), after))
        fitting.guide(None)

    pairs = TensorDataset(torch.arange(5), torch.arange(5) + 10)
    loader = DataLoader(pairs, batch_size=2, drop_last=False)
    fit(make_svi(recording_model, recording_model), 1, loader, 2, num_steps=4)
    expected = [(1, [0, 1], [10, 11], 2), (1, [2, 3], [12, 13], 2), (1, [4], [14], 2)]
    assert seen[::2] == expected + expected[:1]


def test_a_batch_that_is_no_tuple_is_one_argument():
    class Named(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return {"x": DATA[i]}

    shapes = []

    def dict_model(batch):
        shapes.append(batch["x"].shape)
        fitting.model(batch["x"])

    def dict_guide(batch):
        fitting.guide(None)

    fit(make_svi(dict_model, dict_guide), DataLoader(Named(), batch_size=2), num_steps=2)
    assert shapes == [(2,), (2,)]
    result = fit(make_svi(), DataLoader(DATA, batch_size=5), num_steps=3)
    assert result.num_steps == 3


def test_loaders_that_cannot_be_used():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    loader = DataLoader(DATA, batch_size=5)
    with pytest.raises(NotImplementedError, match="map-style"):
        fit(make_svi(), DataLoader(Stream(), batch_size=2), num_steps=1)
    with pytest.raises(ValueError, match="at most one DataLoader"):
        fit(make_svi(), loader, loader, num_steps=1)
    with pytest.raises(ValueError, match="positional"):
        fit(make_svi(), x=loader, num_steps=1)
    with pytest.raises(ValueError, match="no batches"):
        fit(make_svi(), DataLoader(DATA, batch_size=20, drop_last=True), num_steps=1)


def test_batches_are_those_of_a_plain_loop():
    for options in ({}, {"generator": torch.Generator()}):
        loader = DataLoader(Noisy(), batch_size=3, shuffle=True, **options)
        fresh(3)
        loader.generator and loader.generator.manual_seed(1)
        expected = [batch for _ in range(3) for batch in loader]
        fresh(3)
        loader.generator and loader.generator.manual_seed(1)
        feed = Minibatches((loader,), {})
        assert_same([feed.take()[0] for _ in expected], expected)


# Resuming.


def single_items():
    batches = TensorDataset(data().reshape(5, 2))
    loader = DataLoader(batches, batch_size=None, shuffle=True)
    return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}


def module_with_loader():
    target, _, options = module()
    options["scheduler"] = torch.optim.lr_scheduler.ReduceLROnPlateau
    loader = DataLoader(TensorDataset(data(), data()), batch_size=4, shuffle=True)
    target.model = lambda x, y: model(x)
    target.guide = AutoNormal(target.model)
    return target, (loader,), options


SCENARIOS = {
    "module, loader": module_with_loader,
    "loader": with_loader(batch_size=3, shuffle=True),
    "loader, generator": with_loader(batch_size=3, shuffle=True, generator=True),
    "loader, in order": with_loader(batch_size=4, drop_last=True),
    "loader, items": single_items,
}


@pytest.mark.parametrize("when", [1, 4, 9])
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_resumed_run_repeats_the_uninterrupted_one(name, when, tmp_path):
    check_resumed(SCENARIOS[name], when, tmp_path)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_keep_the_order(persistent, tmp_path):
    def make():
        options = dict(batch_size=3, shuffle=True, num_workers=1, persistent_workers=persistent)
        loader = DataLoader(data(), **options)
        return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}

    fresh(3)
    expected = train(make)
    fresh(3)
    with pytest.raises(KeyboardInterrupt):
        train(make, checkpoint=tmp_path / "a", callback=interrupt_at(6))
    fresh(77)
    found = train(make, checkpoint=tmp_path / "a")
    assert_same(found["losses"], expected["losses"])
    assert_same(found["store"], expected["store"])


def test_used_batches_are_skipped_without_loading_their_data(tmp_path):
    read = []

    class Counting(Noisy):
        def __getitem__(self, i):
            read.append(i)
            return data()[i]

    def make():
        loader = DataLoader(Counting(), batch_size=2, shuffle=True)
        return SVI(model, guide, adam(), Trace_ELBO()), (loader,), {}

    with pytest.raises(KeyboardInterrupt):
        train(make, checkpoint=tmp_path / "a", num_steps=5, callback=interrupt_at(4))
    assert len(read) == 8
    train(make, checkpoint=tmp_path / "a", num_steps=5)
    assert sorted(read) == list(range(10))


def test_a_changed_dataset_is_refused(tmp_path):
    train(SCENARIOS["loader"], checkpoint=tmp_path / "a", num_steps=2)
    check_refused(with_loader(batch_size=2, shuffle=True), "order of the epoch cannot be", tmp_path)
    check_refused(with_loader(batch_size=3, shuffle=True, generator=True), "1 generators", tmp_path)
