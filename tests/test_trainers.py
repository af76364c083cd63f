"""The ART trainers: ART's contract, units, preprocessing, streams, and every bad input refused before anything changes."""

from __future__ import annotations

import copy
import inspect
import json
import math
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from art.attacks.evasion import AutoAttack, FastGradientMethod, ProjectedGradientDescent, SquareAttack
from art.data_generators import DataGenerator, NumpyDataGenerator, PyTorchDataGenerator
from art.defences.preprocessor import GaussianAugmentation, JpegCompression
from art.defences.trainer import AdversarialTrainerMadryPGD, Trainer
from torch import nn
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import art_saliency
from art_saliency.attacks import pgd
from art_saliency.errors import ArtSaliencyError, InputError, NoEffectWarning, UnknownOptionError, UnsupportedModelError
from art_saliency.evaluation.accuracy import pgd_accuracy
from art_saliency.methods import OBJECTIVES
from art_saliency.methods.fsr import fsr_layers, insert_fsr
from art_saliency.threat import ThreatModel
from art_saliency.trainers.base import ObjectiveTrainer
from art_saliency.trainers.methods import (
    TRAINERS,
    AALPTrainer,
    AdvGSCTTrainer,
    FGSMTrainer,
    FSRTrainer,
    JSIGRTrainer,
    PGDATTrainer,
    StandardTrainer,
)
from art_saliency.training import Extension
from tests.method_settings import ROWS, classifier, small_network

QUICK = {"nb_epochs": 1, "batch_size": 64, "seed": 0, "verbose": False}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_public_trainer_has_a_row_and_every_row_is_public():
    public = {name for name in art_saliency.__all__ if name.endswith("Trainer")}
    assert public == {row.trainer.__name__ for row in ROWS.values()}
    assert set(TRAINERS) == set(ROWS)


@pytest.mark.parametrize("method", ROWS)
def test_a_method_learns_and_keeps_arts_contract(method, digits):
    x, y, x_test, y_test = digits
    network = small_network(norm=True)
    art_classifier = classifier(network)
    trainer = ROWS[method].trainer(art_classifier, **ROWS[method].settings)
    next(
        module for module in network.modules() if isinstance(module, nn.BatchNorm2d)
    ).eval()  # its owner froze it on purpose
    modes = [module.training for module in network.modules()]
    images, before = x.numpy().copy(), x.numpy().copy()

    assert isinstance(trainer, Trainer)
    assert trainer.fit(images, y.numpy(), batch_size=64, nb_epochs=4, seed=0, verbose=False) is None
    assert trainer.get_classifier() is art_classifier
    assert [module.training for module in network.modules()] == modes
    assert np.array_equal(images, before), "the user's data was changed"
    assert trainer.predict(x_test.numpy()).shape == (len(x_test), 10)
    assert float((trainer.predict(x_test.numpy()).argmax(1) == y_test.numpy()).mean()) > 0.5
    assert trainer.history[-1]["loss"] < trainer.history[0]["loss"]
    assert trainer.history.meta["seed"] == 0
    assert trainer.history.meta["settings"] == trainer.objective.config()
    assert trainer.config().items() >= trainer.objective.config().items()


@pytest.mark.parametrize(("eps", "stays"), [(0.45, True), (0.1, False)])
def test_a_run_that_never_leaves_its_beginning_says_so(digits, eps, stays):
    trainer = PGDATTrainer(classifier(small_network()), eps=eps, max_iter=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(digits[0], digits[1], nb_epochs=10, batch_size=96, seed=0, verbose=False)
    assert any("has not left the plateau" in str(warning.message) for warning in caught) is stays
    assert (trainer.history[-1]["train_accuracy"] < 0.2) is stays


@pytest.mark.parametrize("method", ROWS)
def test_the_same_seed_gives_the_same_weights_and_the_global_generator_is_untouched(method, digits):
    found = []
    for _ in range(2):
        art_classifier = classifier()
        trainer = ROWS[method].trainer(art_classifier, **ROWS[method].settings)
        torch.manual_seed(123)
        expected = torch.rand(1)
        torch.manual_seed(123)
        trainer.fit(digits[0][:200], digits[1][:200], **QUICK)
        assert torch.equal(torch.rand(1), expected)
        found.append(weights(art_classifier.model))
    assert same(*found)
    other = classifier()
    ROWS[method].trainer(other, **ROWS[method].settings).fit(digits[0][:200], digits[1][:200], **{**QUICK, "seed": 1})
    assert not same(found[0], weights(other.model))


@pytest.mark.parametrize("method", ROWS)
def test_a_method_behaves_alike_on_0_to_1_and_on_0_to_255(method, digits):
    """eps is in the units of clip_values; penalties are formed in units of the range."""
    x, y = digits[0][:200], digits[1][:200]
    x = torch.round(x * 255) / 255
    unit, settings = classifier(), ROWS[method].settings

    def on_255():
        inner = small_network()
        inner.load_state_dict(start)
        scaled = nn.Sequential(OrderedDict([("scale", FromBytes()), *inner.named_children()]))
        return classifier(scaled, clip_values=(0.0, 255.0))

    start = weights(unit.model)
    wide = on_255()
    for art_classifier, scale in ((unit, 1), (wide, 255)):
        torch.manual_seed(1)  # an FSR layer draws its weights here
        trainer = ROWS[method].trainer(art_classifier, **{**settings, "eps": settings["eps"] * scale})
        trainer.fit(x * scale, y, **QUICK)
    for a, b in zip(unit.model.parameters(), wide.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)
    bytes_classifier = on_255()
    torch.manual_seed(1)
    trainer = ROWS[method].trainer(bytes_classifier, **{**settings, "eps": settings["eps"] * 255})
    trainer.fit((x * 255).to(torch.uint8).numpy(), y, **QUICK)
    for a, b in zip(wide.model.parameters(), bytes_classifier.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-2)


def test_bytes_stand_for_0_to_255_and_binary_bytes_are_refused(digits):
    x, y = torch.round(digits[0][:100] * 255).to(torch.uint8), digits[1][:100]
    floats, as_bytes = classifier(), classifier()
    FGSMTrainer(floats, eps=0.1).fit(x.float() / 255, y, **QUICK)
    trainer = FGSMTrainer(as_bytes, eps=0.1)
    trainer.fit(x.numpy(), y, **QUICK)
    assert same(weights(floats.model), weights(as_bytes.model))
    assert np.array_equal(trainer.predict(x), trainer.predict(x.float() / 255))
    with pytest.raises(InputError, match="uint8 of 0 and 1 alone"):
        trainer.fit((x > 100).to(torch.uint8), y, **QUICK)


class FromBytes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 255


def test_labels_as_indices_columns_and_one_hot_rows_are_the_same_and_soft_ones_are_taken_or_refused(digits):
    x, y = digits[0][:100], digits[1][:100]
    one_hot = nn.functional.one_hot(y, 10)
    found = []
    for labels in (y, y.numpy()[:, None], one_hot.numpy(), one_hot.float(), y.numpy().astype(np.uint8)):
        art_classifier = classifier()
        PGDATTrainer(art_classifier, eps=0.1, max_iter=2).fit(x, labels, **QUICK)
        found.append(weights(art_classifier.model))
    assert all(same(found[0], other) for other in found[1:])
    soft = 0.9 * one_hot + 0.01
    PGDATTrainer(classifier(), eps=0.1, max_iter=2).fit(x, soft, **QUICK)


def test_preprocessing_is_applied_once_in_training_and_seen_by_attacks(digits):
    """A classifier with mean and deviation trains like one whose network holds them."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner((x - 0.3) / 0.4)

    outside, inside = classifier(preprocessing=(0.3, 0.4)), classifier(Inside())
    inside.model.inner.load_state_dict(outside.model.state_dict())
    for art_classifier in (outside, inside):
        PGDATTrainer(art_classifier, eps=0.1, max_iter=3).fit(digits[0][:200], digits[1][:200], **QUICK)
    for a, b in zip(outside.model.parameters(), inside.model.inner.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_an_array_loader_and_a_generator_train(digits):
    x, y, x_test, y_test = digits
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    for generator in (loader, PyTorchDataGenerator(loader, size=len(x), batch_size=64)):
        trainer = FGSMTrainer(classifier(), eps=0.1)
        trainer.fit_generator(generator, nb_epochs=3, seed=0, verbose=False, validation_data=(x_test, y_test))
        assert len(trainer.history) == 3
        assert trainer.history[-1]["validation_accuracy"] > 0.6
        assert trainer.history.meta["steps_per_epoch"] == 23


@pytest.mark.parametrize("rows", [33, 40])
def test_a_stream_leaves_a_last_image_alone_out_as_an_array_does(digits, rows):
    trainer = StandardTrainer(classifier(small_network(norm=True)))
    loader = DataLoader(TensorDataset(digits[0][:rows], digits[1][:rows]), batch_size=8)
    trainer.fit_generator(loader, nb_epochs=2, seed=0, verbose=False, scheduler="onecycle")
    assert trainer.history.meta["steps_per_epoch"] == rows // 8
    assert trainer._classifier.optimizer.param_groups[0]["lr"] == 0.01


class EndlessArrays(DataGenerator):
    """ART's contract and no more: the next batch, pass after pass."""

    def __init__(self, x, y, batch_size):
        super().__init__(size=len(x), batch_size=batch_size)
        self.loader = DataLoader(TensorDataset(x, y), batch_size=batch_size)
        self.batches = iter(())

    def get_batch(self):
        if (batch := next(self.batches, None)) is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        return batch


class Unmeasured(torch.utils.data.Dataset):
    """A set that does not say how large it is: its sampler does."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __getitem__(self, index):
        return self.x[index], self.y[index]


def by_sampler(x, y, batch_size, sampler):
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, sampler=sampler)


def by_batches(x, y, sizes):
    places = iter(range(len(x)))
    return DataLoader(TensorDataset(x, y), batch_sampler=[[next(places) for _ in range(size)] for size in sizes])


EPOCHS = {
    "one by one": (lambda x, y: DataLoader(TensorDataset(x[:9], y[:9]), batch_size=1), [1] * 9),
    "ART's arrays one by one": (lambda x, y: NumpyDataGenerator(x[:9].numpy(), y[:9].numpy(), batch_size=1), [1] * 9),
    "a last image alone": (lambda x, y: DataLoader(TensorDataset(x[:33], y[:33]), batch_size=8), [8] * 4),
    "ART's loader": (
        lambda x, y: PyTorchDataGenerator(DataLoader(TensorDataset(x[:33], y[:33]), batch_size=8), 33, 8),
        [8] * 4,
    ),
    "ART's arrays": (
        lambda x, y: NumpyDataGenerator(x[:33].numpy(), y[:33].numpy(), batch_size=8, drop_remainder=False),
        [8] * 4,
    ),
    "ART's arrays, the rest dropped": (
        lambda x, y: NumpyDataGenerator(x[:36].numpy(), y[:36].numpy(), batch_size=8),
        [8] * 4,
    ),
    "ART's arrays, the rest kept": (
        lambda x, y: NumpyDataGenerator(x[:36].numpy(), y[:36].numpy(), batch_size=8, drop_remainder=False),
        [8] * 4 + [4],
    ),
    "any generator of ART's kind": (lambda x, y: EndlessArrays(x[:33], y[:33], 8), [8] * 4),
    "and one whose rest is a batch": (lambda x, y: EndlessArrays(x[:34], y[:34], 8), [8] * 4 + [2]),
    "some of the images": (lambda x, y: by_sampler(x[:65], y[:65], 32, SubsetRandomSampler(range(60))), [32, 28]),
    "more draws than images": (
        lambda x, y: by_sampler(x[:129], y[:129], 128, WeightedRandomSampler([1.0] * 129, 384)),
        [128] * 3,
    ),
    "images not counted": (
        lambda x, y: DataLoader(Unmeasured(x, y), batch_size=16, sampler=SubsetRandomSampler(range(36))),
        [16, 16, 4],
    ),
    "a small batch in between": (lambda x, y: by_batches(x, y, [8, 8, 2, 8, 8]), [8, 8, 2, 8, 8]),
    "a batch sampler's last image": (lambda x, y: by_batches(x, y, [8, 8, 1]), [8, 8]),
}


class Sizes(Extension):
    def __init__(self):
        self.seen = {}

    def after_step(self, run):
        self.seen.setdefault(run.epoch, []).append(len(run.batch.x))


@pytest.mark.parametrize("kind", EPOCHS)
def test_every_epoch_of_a_stream_has_all_its_batches_but_a_last_one_of_one_image(kind, digits):
    make, expected = EPOCHS[kind]
    sizes = Sizes()
    trainer = StandardTrainer(classifier(small_network(norm=min(expected) > 1)))
    trainer.fit_generator(make(*digits[:2]), nb_epochs=3, seed=0, verbose=False, extensions=[sizes])
    assert sizes.seen == {0: expected, 1: expected, 2: expected}


class Once(IterableDataset):
    """A stream that can be read once, or one that has no length."""

    def __init__(self, batches, length=None):
        self.batches = iter(batches)
        if length is not None:
            self.__class__ = type("Counted", (Once,), {"__len__": lambda _: length})

    def __iter__(self):
        return self.batches


STREAMS = {
    "no batch": (lambda x, y: DataLoader(TensorDataset(x, y), batch_size=99, drop_last=True), "without a batch"),
    "no length": (lambda x, y: DataLoader(Once([(x, y)]), batch_size=None), "Once without a length"),
    "three things": (
        lambda x, y: DataLoader(TensorDataset(x, y, y), batch_size=32),
        "got 3 things as a batch, expected pairs of images and labels",
    ),
    "one thing": (lambda x, y: DataLoader(x, batch_size=32), "got a Tensor as a batch"),
    "read once": (
        lambda x, y: DataLoader(Once([(x, y)], 1), batch_size=None),
        "got no batch in epoch 1, expected 1, in every epoch",
    ),
}


@pytest.mark.parametrize("kind", STREAMS)
def test_streams_that_cannot_be_trained_from_are_refused_by_name(kind, digits):
    make, words = STREAMS[kind]
    trainer = StandardTrainer(classifier())
    with pytest.raises(InputError, match=f"generator: .*{words}"):
        trainer.fit_generator(make(digits[0][:64], digits[1][:64]), nb_epochs=2, seed=0, verbose=False)


def test_soft_labels_are_validated_by_their_likeliest_class(digits):
    x, y, x_test, y_test = digits
    soft = 0.9 * nn.functional.one_hot(y_test, 10) + 0.01
    found = []
    for labels in (y_test, soft):
        trainer = StandardTrainer(classifier())
        trainer.fit(x[:64], y[:64], validation_data=(x_test, labels), **QUICK)
        found.append(trainer.history[-1]["validation_accuracy"])
    assert found[0] == found[1] > 0


def test_a_clipped_gradient_is_that_of_the_trained_weights_alone(digits):
    def trained(freeze):
        model = small_network(norm=True)
        model.features.requires_grad_(not freeze)
        head = torch.optim.SGD(model.linear.parameters(), lr=0.1)
        trainer = StandardTrainer(classifier(model, optimizer=head))
        with nullcontext() if freeze else pytest.warns(NoEffectWarning, match="leaves out 6 of 8"):
            trainer.fit(digits[0][:256], digits[1][:256], grad_clip=0.1, **{**QUICK, "nb_epochs": 2})
        return weights(model)

    assert same(trained(freeze=True), trained(freeze=False))


def test_numbers_of_numpy_are_written_as_numbers(digits, tmp_path):
    eps = np.float32(0.125)
    trainer = PGDATTrainer(classifier(), eps=eps, eps_step=np.float64(0.05))
    assert trainer.config()["eps"] == 0.125
    assert isinstance(trainer.config()["eps"], float)
    layer = FSRTrainer(classifier(), target="features", hidden=np.int64(8), tau=np.float32(0.5), eps=eps, max_iter=1)
    layer.fit(digits[0][:64], digits[1][:64], checkpoint_dir=tmp_path, **QUICK)
    assert layer.config()["hidden"] == 8
    numbers = {"batch_size": np.int64(32), "nb_epochs": np.int32(1), "seed": np.int64(3)}
    numbers |= {"deterministic": np.bool_(False), "patience": np.int64(2), "ema": np.float32(0.5)}
    trainer.fit(
        digits[0][:64],
        digits[1][:64],
        validation_split=np.float32(0.25),
        checkpoint_dir=tmp_path / "2",
        verbose=False,
        **numbers,
    )
    assert json.loads(trainer.history.to_json())["meta"]["epochs"] == 1


@pytest.mark.parametrize("trainer", [AdvGSCTTrainer, JSIGRTrainer])
def test_an_operation_without_a_second_derivative_is_named_before_any_work(trainer, digits, tmp_path):
    model = small_network(norm=True)
    model.features[2] = nn.Hardsigmoid()
    art_classifier = classifier(model)
    before = weights(model)
    with pytest.raises(UnsupportedModelError, match="hardsigmoid, of which torch has no second derivative"):
        trainer(art_classifier, eps=0.1).fit(*digits[:2], **QUICK, checkpoint_dir=tmp_path / "kept")
    assert same(before, weights(model))
    assert not (tmp_path / "kept").exists()
    trainer(art_classifier, eps=0.1, form="finite-difference").fit(digits[0][:64], digits[1][:64], **QUICK)


def test_an_art_attack_and_a_callable_serve_as_inner_maximisation(digits):
    x, y = digits[0][:150], digits[1][:150]
    by_art, by_callable = classifier(), classifier()
    attack = FastGradientMethod(by_art, eps=0.1, batch_size=64)
    PGDATTrainer(by_art, eps=0.1, attack=attack).fit(x, y, **QUICK)

    def same_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return pgd(model, images, labels, threat=ThreatModel("Linf", 0.1), max_iter=1, eps_step=0.1, random_start=False)

    PGDATTrainer(by_callable, eps=0.1, attack=same_step).fit(x, y, **QUICK)
    for a, b in zip(by_art.model.parameters(), by_callable.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_signature_shows_the_methods_own_parameters():
    parameters = inspect.signature(AdvGSCTTrainer).parameters
    assert next(iter(parameters)) == "classifier"
    assert {"eps", "rho", "consensus"} <= set(parameters)
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for name, p in parameters.items() if name != "classifier")


@pytest.mark.parametrize("method", ROWS)
def test_bfloat16_trains_first_order_methods_and_is_refused_for_the_others(method, digits):
    x, y, x_test, y_test = digits
    art_classifier = classifier()
    trainer = ROWS[method].trainer(art_classifier, **ROWS[method].settings)
    before = weights(art_classifier.model)
    options = {**QUICK, "nb_epochs": 6, "precision": "bf16-mixed"}
    if trainer.objective.double_backward:
        with pytest.raises(InputError, match="precision: got 'bf16-mixed', expected '32-true'"):
            trainer.fit(x[:64], y[:64], **options)
        assert same(before, weights(art_classifier.model))
        return
    trainer.fit(x, y, **options)
    assert all(
        value.dtype == torch.float32
        for value in art_classifier.model.state_dict().values()
        if value.is_floating_point()
    )
    assert float((trainer.predict(x_test).argmax(1) == y_test.numpy()).mean()) > 0.5
    assert trainer.history.meta["precision"] == "bf16-mixed"


def test_channels_last_ends_where_the_plain_layout_does_and_leaves_none_of_it(digits):
    x, y, *_ = digits
    ends = []
    for flag in (False, True):
        model = small_network(norm=True)
        # Adam's first steps are signs, which rounding turns over where a gradient is next to nothing.
        art_classifier = classifier(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
        trainer = ROWS["pgd-at"].trainer(art_classifier, **ROWS["pgd-at"].settings)
        trainer.fit(x[:96], y[:96], **QUICK, channels_last=flag)
        ends.append(art_classifier.model.state_dict())
        assert all(value.is_contiguous() for value in art_classifier.model.state_dict().values())
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=2e-3, rtol=2e-2)


def test_validation_never_touches_the_weights_and_is_measured_when_asked(digits):
    x, y, x_test, y_test = digits
    plain, validated = classifier(), classifier()
    PGDATTrainer(plain, eps=0.1, max_iter=2).fit(x[:200], y[:200], **QUICK)
    trainer = PGDATTrainer(validated, eps=0.1, max_iter=2)
    trainer.fit(x[:200], y[:200], validation_data=(x_test, y_test), **QUICK)
    assert same(weights(plain.model), weights(validated.model))
    expected = pgd_accuracy(validated.model, x_test, y_test, threat=ThreatModel("Linf", 0.1), max_iter=10, seed=0)
    assert trainer.history[-1]["validation_robust_accuracy"] == expected
    split = PGDATTrainer(classifier(), eps=0.1, max_iter=2)
    split.fit(x[:200], y[:200], validation_split=0.25, **{**QUICK, "batch_size": 50})
    assert split.history.meta["steps_per_epoch"] == 3


def test_a_named_schedule_gives_the_learning_rate_back_and_an_object_steps_once_an_epoch(digits):
    x, y = digits[0][:128], digits[1][:128]
    for name in ("cosine", "step", "onecycle"):
        art_classifier = classifier(lr=0.01)
        group = art_classifier.optimizer.param_groups[0]
        before = {key: value for key, value in group.items() if key != "params"}
        trainer = StandardTrainer(art_classifier)
        for _ in range(2):
            trainer.fit(x, y, **{**QUICK, "nb_epochs": 10, "batch_size": 32}, scheduler=name)
            assert {key: value for key, value in group.items() if key != "params"} == before
        rates = trainer.history.column("lr")
        assert rates[-1] < 0.2 * max(rates)
    art_classifier = classifier(lr=0.01)
    trainer = StandardTrainer(art_classifier)
    halving = torch.optim.lr_scheduler.StepLR(art_classifier.optimizer, 1, gamma=0.5)
    trainer.fit(x, y, **{**QUICK, "nb_epochs": 3}, scheduler=halving)
    assert trainer.history.column("lr") == pytest.approx([0.01, 0.005, 0.0025])
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(art_classifier.optimizer)
    trainer.fit(x, y, **QUICK, scheduler=plateau)
    assert plateau.last_epoch == 1


def test_the_seed_in_the_history_repeats_a_run_whose_validation_images_were_drawn_too(digits):
    def run(seed):
        trainer = StandardTrainer(classifier())
        trainer.fit(*digits[:2], **{**QUICK, "seed": seed}, validation_split=0.25)
        return trainer.history

    torch.manual_seed(1)
    drawn = run(None)
    assert run(drawn.meta["seed"]).column("clean_accuracy") == drawn.column("clean_accuracy")
    assert run(drawn.meta["seed"]).column("loss") == drawn.column("loss")
    assert run(2**63 - 1).column("loss") != drawn.column("loss")


@pytest.mark.parametrize("trainer", [StandardTrainer, PGDATTrainer, AdvGSCTTrainer, JSIGRTrainer])
def test_training_needs_gradients_also_where_the_caller_has_none(trainer, digits):
    settings = {} if trainer is StandardTrainer else {"eps": 0.1}
    ends = []
    for gradients in (True, False):
        art_classifier = classifier()
        with torch.set_grad_enabled(gradients):
            trainer(art_classifier, **settings).fit(digits[0][:64], digits[1][:64], **QUICK)
            assert torch.is_grad_enabled() is gradients
        ends.append(weights(art_classifier.model))
    assert same(*ends)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("reparametrised", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.parametrize(("trainer", "options"), [(JSIGRTrainer, {}), (PGDATTrainer, {"ema": 0.9})])
def test_networks_whose_weights_are_computed_can_be_copied(trainer, options, reparametrised, digits):
    model = small_network()
    model.linear = reparametrised(model.linear)
    before = weights(model)
    trained = trainer(classifier(model), eps=0.1)
    trained.fit(digits[0][:64], digits[1][:64], **QUICK, **options)
    assert not same(before, weights(model))
    assert math.isfinite(trained.history[-1]["loss"])


class _Detached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.detach())


BAD_DATA = {
    "rank": (lambda x, y: (x[:, 0], y), r"x: got shape \(64, 8, 8\), expected 4 axes.*x\[:, None\]"),
    "channels": (lambda x, y: (x.repeat(1, 3, 1, 1), y), r"expected \(N, 1, 8, 8\)"),
    "dtype": (lambda x, y: (np.array([["a"]]), y), "expected an array or tensor of numbers"),
    "range": (lambda x, y: (x * 16, y), r"values from 0 to 16, expected values in \[0, 1\]"),
    "normalised": (lambda x, y: (x - 0.5, y), "put the mean and standard deviation into the network"),
    "nan": (lambda x, y: (torch.where(x == x.max(), torch.nan, x), y), "NaN or Inf in image"),
    "inf": (lambda x, y: (torch.where(x == x.max(), torch.inf, x), y), "NaN or Inf in image"),
    "empty": (lambda x, y: (x[:0], y[:0]), "x: got an empty set"),
    "count": (lambda x, y: (x, torch.cat([y, y[:1]])), "y: got 65 labels, expected 64"),
    "label": (lambda x, y: (x, y + 1), "y: got labels from . to 10, expected labels from 0 to 9"),
    "negative": (lambda x, y: (x, y - 1), "labels from -1"),
    "columns": (lambda x, y: (x, nn.functional.one_hot(y, 11)), r"got shape \(64, 11\), expected \(64, 10\)"),
    "fractions": (lambda x, y: (x, y + 0.5), "fractions"),
}


@pytest.mark.parametrize("kind", BAD_DATA)
def test_bad_data_is_refused_in_one_sentence_and_nothing_changes(kind, digits):
    make, words = BAD_DATA[kind]
    art_classifier = classifier(small_network(norm=True))
    art_classifier.model.features[1].eval()
    before, modes = weights(art_classifier.model), [m.training for m in art_classifier.model.modules()]
    with pytest.raises(InputError, match=words) as caught:
        AdvGSCTTrainer(art_classifier, eps=0.1).fit(*make(digits[0][:64], digits[1][:64]), **QUICK)
    assert "\n" not in str(caught.value)
    assert same(before, weights(art_classifier.model))
    assert [m.training for m in art_classifier.model.modules()] == modes
    assert all(parameter.grad is None for parameter in art_classifier.model.parameters())


BAD_FITS = {
    "validation labels": (
        lambda c, x, y: StandardTrainer(c).fit(x, y, validation_data=(x, y + 5)),
        "labels of validation_data: got labels from 5 to",
    ),
    "one image": (lambda c, x, y: StandardTrainer(c).fit(x[:1], y[:1]), "batch of one image.*BatchNorm"),
    "batch of one": (
        lambda c, x, y: StandardTrainer(c).fit(x, y, batch_size=1),
        "batch_size: got a batch of one image",
    ),
    "batch size": (lambda c, x, y: StandardTrainer(c).fit(x, y, batch_size=0), "batch_size: got 0"),
    "epochs": (lambda c, x, y: StandardTrainer(c).fit(x, y, nb_epochs=0.5), "nb_epochs: got 0.5"),
    "keyword": (lambda c, x, y: StandardTrainer(c).fit(x, y, epochs=3), "unknown keyword 'epochs'"),
    "near keyword": (lambda c, x, y: StandardTrainer(c).fit(x, y, gradclip=3), "did you mean 'grad_clip'"),
    "scheduler": (lambda c, x, y: StandardTrainer(c).fit(x, y, scheduler="cosin"), "did you mean 'cosine'"),
    "scheduler type": (lambda c, x, y: StandardTrainer(c).fit(x, y, scheduler=3), "an object with step"),
    "eps": (lambda c, x, y: PGDATTrainer(c, eps=-0.1), "eps: got -0.1, expected 0 <= eps <= 1"),
    "eps in 255": (lambda c, x, y: PGDATTrainer(c, eps=8), "eps: got 8, expected 0 <= eps <= 1; .*8 / 255"),
    "no eps": (lambda c, x, y: AdvGSCTTrainer(c), "eps: got nothing"),
    "parameter": (lambda c, x, y: AdvGSCTTrainer(c, eps=0.1, roh=0.3), "did you mean 'rho'"),
    "clip": (lambda c, x, y: StandardTrainer(c).fit(x, y, grad_clip=0), "0 < grad_clip"),
    "validation": (lambda c, x, y: StandardTrainer(c).fit(x, y, validation_data=x), r"a pair \(x, y\)"),
    "split": (lambda c, x, y: StandardTrainer(c).fit(x, y, validation_split=1), "validation_split: got 1"),
    "layout": (lambda c, x, y: StandardTrainer(c).fit(x, y, channels_last=1), "channels_last: got 1"),
    "precision": (lambda c, x, y: StandardTrainer(c).fit(x, y, precision="fp16"), "'32-true', 'bf16-mixed'"),
    "extensions": (lambda c, x, y: StandardTrainer(c).fit(x, y, extensions=[3]), "extensions: got a int among them"),
    "layer type": (
        lambda c, x, y: AALPTrainer(c, eps=0.1, layer=3),
        "layer: got 3, expected None, a submodule's name, or several",
    ),
    "generator": (lambda c, x, y: StandardTrainer(c).fit_generator([x]), "ART DataGenerator or a torch DataLoader"),
    "classifier": (lambda c, x, y: StandardTrainer(c.model), "expected an ART PyTorchClassifier"),
}


@pytest.mark.parametrize("kind", BAD_FITS)
def test_bad_arguments_are_refused_before_any_work(kind, digits):
    call, words = BAD_FITS[kind]
    art_classifier = classifier(small_network(norm=True))
    before = weights(art_classifier.model)
    with pytest.raises(ArtSaliencyError, match=words) as caught:
        call(art_classifier, digits[0][:64], digits[1][:64])
    assert "\n" not in str(caught.value)
    assert same(before, weights(art_classifier.model))
    if "keyword" in kind or kind == "parameter":
        assert isinstance(caught.value, UnknownOptionError)


@pytest.mark.parametrize(
    ("trainer", "settings", "words"),
    [
        (AALPTrainer, {"layer": "featurs"}, "layer: got 'featurs'.*did you mean 'features'"),
        (AALPTrainer, {"layer": ["features", "lineer"]}, "layer: got 'lineer'.*did you mean 'linear'"),
        (AALPTrainer, {"layer": "foo"}, "layer: got 'foo'.*its children are features, flat, linear"),
        (AdvGSCTTrainer, {"form": "finite-difference"}, "'finite-difference' for a network with dropout"),
        (JSIGRTrainer, {"form": "finite-difference"}, "'finite-difference' for a network with dropout"),
    ],
    ids=["no layer", "no second layer", "nothing like it", "adv-gsct", "j-sigr"],
)
def test_a_method_refuses_a_network_before_a_checkpoint_is_written(trainer, settings, words, digits, tmp_path):
    model = small_network()
    model.linear = nn.Sequential(nn.Dropout(0.2), model.linear)
    art_classifier = classifier(model.eval())
    with pytest.raises(ArtSaliencyError, match=words):
        trainer(art_classifier, eps=0.1, **settings).fit(*digits[:2], **QUICK, checkpoint_dir=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    assert not any(module.training for module in model.modules())


class _Auxiliary(nn.Module):
    """Gives a second answer in train mode, as torchvision's GoogLeNet does; and counts what it was shown, as BatchNorm does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_network(norm=True)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.inner(x)
        return (logits, logits) if self.training else logits


BAD_CLASSIFIERS = {
    "auxiliary logits": (
        lambda: classifier(_Auxiliary()),
        UnsupportedModelError,
        r"got a tuple in train mode, expected logits of shape \(2, 10\)",
    ),
    "no clip values": (lambda: classifier(clip_values=None), InputError, "clip_values=None"),
    "no optimizer": (lambda: classifier(optimizer=None), InputError, "no optimizer"),
    "array preprocessing": (
        lambda: classifier(preprocessing_defences=JpegCompression((0, 1), channels_first=True)),
        UnsupportedModelError,
        "JpegCompression",
    ),
    "batch-changing preprocessing": (
        lambda: classifier(preprocessing_defences=GaussianAugmentation(augmentation=True)),
        UnsupportedModelError,
        "GaussianAugmentation",
    ),
    "detached": (lambda: classifier(_Detached()), UnsupportedModelError, "without a gradient to the images"),
    "classes": (
        lambda: classifier(small_network(classes=9)),
        UnsupportedModelError,
        r"expected logits of shape \(2, 10\)",
    ),
    "frozen": (lambda: classifier(small_network().requires_grad_(False)), UnsupportedModelError, "trainable parameter"),
    "probabilities": (
        lambda: classifier(nn.Sequential(small_network(), nn.Softmax(1))),
        UnsupportedModelError,
        "got probabilities, expected logits.*take the softmax out",
    ),
    "double": (
        lambda: classifier(small_network().double()),
        UnsupportedModelError,
        "weight in torch.float64, expected",
    ),
    "half": (lambda: classifier(small_network().half()), UnsupportedModelError, r"torch.float16.*\.float\(\)"),
}


@pytest.mark.parametrize("kind", BAD_CLASSIFIERS)
def test_classifiers_that_cannot_be_trained_are_refused_by_name(kind, digits):
    make, error, words = BAD_CLASSIFIERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        art_classifier = make()
    before = weights(art_classifier.model)
    with pytest.raises(error, match=words):
        StandardTrainer(art_classifier).fit(digits[0][:64], digits[1][:64], **QUICK)
    assert same(before, weights(art_classifier.model))


@pytest.mark.parametrize("base", ["pgd-at", "trades", "mart", "alp", "aalp", "j-sigr", "adv-gsct"])
def test_fsr_composes_with_every_base_and_its_auxiliary_loss_is_trained(base, digits):
    x, y, x_test, _ = digits
    art_classifier = classifier()
    plain = classifier()
    quick = {"max_iter": 2} if "max_iter" in OBJECTIVES[base].parameter_names() else {}
    trainer = FSRTrainer(art_classifier, target="features", base=base, hidden=8, eps=0.1, **quick)
    assert list(fsr_layers(art_classifier.model)) == ["features"]
    before = {name: value.clone() for name, value in art_classifier.model.state_dict().items() if ".fsr." in name}
    trainer.fit(x[:192], y[:192], **{**QUICK, "nb_epochs": 2})
    record, after = trainer.history[-1], art_classifier.model.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight")), (
        "a part was not trained"
    )
    added = set(record) - set(_terms_without_fsr(plain, base, quick, x, y))
    assert len(added) >= 2, added
    assert np.array_equal(trainer.predict(x_test), trainer.predict(x_test)), "noise outside of training"


def _terms_without_fsr(art_classifier, base, quick, x, y):
    trainer = TRAINERS[base](art_classifier, eps=0.1, **quick)
    trainer.fit(x[:64], y[:64], **QUICK)
    return trainer.history[-1]


def test_fsr_refuses_a_scheduler_that_does_not_know_its_parameters(digits):
    art_classifier = classifier()
    early = torch.optim.lr_scheduler.StepLR(art_classifier.optimizer, 1)
    trainer = FSRTrainer(art_classifier, target="features", hidden=8, eps=0.1, max_iter=2)
    with pytest.raises(InputError, match="build it after FSRTrainer"):
        trainer.fit(digits[0][:64], digits[1][:64], scheduler=early, **QUICK)
    late = torch.optim.lr_scheduler.StepLR(art_classifier.optimizer, 1)
    trainer.fit(digits[0][:64], digits[1][:64], scheduler=late, **QUICK)


def test_fsr_looks_for_its_parameters_in_every_part_of_a_scheduler(digits):
    art_classifier = classifier()
    lr = torch.optim.lr_scheduler
    parts = [lr.ConstantLR(art_classifier.optimizer), lr.StepLR(art_classifier.optimizer, 1)]
    early = lr.SequentialLR(art_classifier.optimizer, parts, milestones=[1])
    trainer = FSRTrainer(art_classifier, target="features", hidden=8, eps=0.1, max_iter=2)
    before = weights(art_classifier.model)
    with pytest.raises(InputError, match="build it after FSRTrainer"):
        trainer.fit(digits[0][:64], digits[1][:64], scheduler=early, **QUICK)
    assert same(before, weights(art_classifier.model))


def test_fsr_gives_the_optimizer_its_own_parameters_alone(digits):
    model = small_network(norm=True)
    head = torch.optim.SGD(model.linear.parameters(), lr=0.1)
    art_classifier = classifier(model, optimizer=head)
    features = {
        name: value for name, value in weights(model).items() if name in ("features.0.weight", "features.3.bias")
    }
    trainer = FSRTrainer(art_classifier, target="features", hidden=8, eps=0.1, max_iter=2)
    with pytest.warns(NoEffectWarning, match=r"\(features\.0\.weight, "):
        trainer.fit(digits[0][:64], digits[1][:64], **QUICK)
    trained = {id(parameter) for group in head.param_groups for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in trained}
    assert names == {name for name, _ in model.named_parameters() if "linear" in name or ".fsr." in name}
    assert all(any(torch.equal(value, now) for now in weights(model).values()) for value in features.values())


def test_fsr_that_cannot_be_inserted_leaves_network_and_optimizer_alone(digits):
    art_classifier = classifier()
    before, groups = weights(art_classifier.model), len(art_classifier.optimizer.param_groups)
    for bad, words in (
        ({"target": "layer9"}, "layer9"),
        ({"target": "linear"}, "linear"),
        ({"target": "features", "base": "pdg-at"}, "pgd-at"),
    ):
        with pytest.raises(ArtSaliencyError, match=words):
            FSRTrainer(art_classifier, eps=0.1, **bad)
        assert same(before, weights(art_classifier.model))
        assert len(art_classifier.optimizer.param_groups) == groups


def test_j_sigr_takes_a_teacher_and_keeps_its_maps(digits, tmp_path, capsys):
    x, y = digits[0][:128], digits[1][:128]
    teacher = classifier()
    StandardTrainer(teacher).fit(x, y, **{**QUICK, "nb_epochs": 3})
    teacher_before = weights(teacher.model)
    found = []
    for _ in range(2):
        art_classifier = classifier()
        trainer = JSIGRTrainer(art_classifier, eps=0.1, teacher=teacher, maps_file=tmp_path / "maps.pt")
        trainer.fit(x, y, **{**QUICK, "verbose": True})
        found.append(weights(art_classifier.model))
        made = (tmp_path / "maps.pt").stat().st_mtime_ns
    assert same(*found)
    assert (tmp_path / "maps.pt").stat().st_mtime_ns == made
    assert same(teacher_before, weights(teacher.model))
    untaught = JSIGRTrainer(classifier(), eps=0.1, teacher_epochs=1)
    capsys.readouterr()
    untaught.fit(x, y, **{**QUICK, "verbose": True})
    shown = capsys.readouterr().err
    assert "teacher" in shown
    assert "saliency maps" in shown
    with pytest.raises(InputError, match="a torch module, an ART classifier or None"):
        JSIGRTrainer(classifier(), eps=0.1, teacher="best.pt")


def test_pgd_training_agrees_with_arts_own_trainer(digits):
    """The same data, network, seed and budget: robust accuracy within the noise of the test set."""
    x, y, x_test, y_test = digits
    threat = ThreatModel("Linf", 0.15)
    robust = {"ours": [], "art": []}
    x, y = x[:700], y[:700]
    for seed in range(2):
        torch.manual_seed(seed)
        start = small_network().state_dict()
        for name in robust:
            art_classifier = classifier()
            art_classifier.model.load_state_dict(copy.deepcopy(start))
            if name == "ours":
                PGDATTrainer(art_classifier, eps=0.15, eps_step=0.04, max_iter=7).fit(
                    x, y, nb_epochs=8, batch_size=128, seed=seed, verbose=False
                )
            else:
                np.random.seed(seed)  # noqa: NPY002, ART draws from it
                trainer = AdversarialTrainerMadryPGD(
                    art_classifier, nb_epochs=8, batch_size=128, eps=0.15, eps_step=0.04, max_iter=7
                )
                trainer.fit(x.numpy(), nn.functional.one_hot(y, 10).numpy())
            robust[name].append(pgd_accuracy(art_classifier.model, x_test, y_test, threat=threat, max_iter=20))
    ours, art = (sum(robust[name]) / 2 for name in ("ours", "art"))
    assert ours > art - 0.06, robust
    assert min(robust["ours"]) > 0.2, robust


def test_a_subclass_declares_its_objective_and_nothing_else():
    for cls in TRAINERS.values():
        assert issubclass(cls, ObjectiveTrainer)
        own = {name for name in vars(cls) if not name.startswith("_")}
        if cls.__module__.endswith("trainers.methods"):
            assert own == {"objective_class"}, (cls, own)


# --- what a run hangs on ---------------------------------------------------------------------------------------------


def _attack(art_classifier, **options):
    return ProjectedGradientDescent(
        art_classifier, eps=0.2, eps_step=0.1, max_iter=1, num_random_init=1, verbose=False, **options
    )


def test_a_targeted_attack_is_refused(digits):
    art_classifier = classifier()
    with pytest.raises(InputError, match="attack: got ProjectedGradientDescent with targeted=True, expected an untarg"):
        PGDATTrainer(art_classifier, eps=0.2, attack=_attack(art_classifier, targeted=True))


def _seeded_with(kind, x, y):
    """Weights of a run with one of ART's parts that draw from NumPy's global generator."""
    torch.manual_seed(0)
    art_classifier = classifier(small_network())
    if kind == "attack":
        PGDATTrainer(art_classifier, eps=0.2, attack=_attack(art_classifier)).fit(x, y, **QUICK)
    else:
        stream = NumpyDataGenerator(x.numpy(), y.numpy(), batch_size=32, shuffle=True)
        StandardTrainer(art_classifier).fit_generator(stream, nb_epochs=1, seed=0, verbose=False)
    return weights(art_classifier.model)


@pytest.mark.parametrize("kind", ["attack", "stream"])
def test_the_seed_is_also_that_of_what_draws_from_numpy(kind, digits):
    x, y, found = digits[0][:96], digits[1][:96], []
    for state in (1, 2):
        np.random.seed(state)  # noqa: NPY002
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        found.append(_seeded_with(kind, x, y))
        assert np.array_equal(np.random.get_state()[1], before), "the user's own sequence was moved"  # noqa: NPY002
    assert same(*found)


def test_an_optimizer_of_another_network_is_refused_and_one_that_leaves_weights_out_is_told(digits):
    x, y = digits[0][:64], digits[1][:64]
    art_classifier = classifier(small_network())
    art_classifier._optimizer = torch.optim.SGD(copy.deepcopy(art_classifier.model).parameters(), lr=0.1)
    before = weights(art_classifier.model)
    with pytest.raises(InputError, match="optimizer: got none of the network's parameters"):
        StandardTrainer(art_classifier).fit(x, y, **QUICK)
    assert same(before, weights(art_classifier.model))
    art_classifier = classifier(small_network())
    insert_fsr(art_classifier.model, "features", 10, x[:2])  # after the optimizer was made
    with pytest.warns(NoEffectWarning, match=r"leaves out \d+ of \d+ trainable parameters \(features\.fsr\."):
        StandardTrainer(art_classifier).fit(x, y, **QUICK)
    for name, parameter in art_classifier.model.named_parameters():
        parameter.requires_grad_(".fsr." not in name)
    StandardTrainer(art_classifier).fit(x, y, **QUICK)  # and warns of nothing


def test_a_trainer_of_an_own_form_of_a_method_keeps_the_parameters_of_the_trainer_it_comes_from(digits):
    class Own(OBJECTIVES["j-sigr"]):
        name = "own"

    class OwnTrainer(JSIGRTrainer):
        objective_class = Own

    trainer = OwnTrainer(classifier(), eps=0.1, teacher=classifier(), teacher_epochs=1)
    trainer.fit(digits[0][:64], digits[1][:64], **QUICK)
    assert isinstance(trainer.objective, Own)
    assert (trainer.teacher_epochs, trainer.history.meta["objective"]) == (1, "own")


def test_an_attack_that_works_in_place_stays_in_the_ball_and_leaves_the_batch(digits):
    def in_place(model, x, y):
        return x.add_(0.5).clamp_(0, 1)

    class Watch(Extension):
        def before_step(self, run, batch):
            self.before = batch.x.clone()

        def after_step(self, run):
            self.equal = torch.equal(self.before, run.batch.x)

    watch, found = Watch(), []
    trainer = PGDATTrainer(classifier(), eps=0.1, attack=in_place)
    adversarial = trainer.objective.adversarial
    trainer.objective.adversarial = lambda model, batch: found.append(adversarial(model, batch)) or found[-1]
    trainer.fit(digits[0][:64], digits[1][:64], **QUICK, extensions=[watch])
    assert watch.equal
    assert float((found[0] - watch.before).abs().max()) == pytest.approx(0.1)


class _Noisy(TensorDataset):
    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return (x + 0.1 * torch.rand_like(x)).clamp(0, 1), y


def test_workers_that_outlive_an_epoch_are_refused_where_an_epoch_may_be_taken_up_again(digits, tmp_path):
    stream = DataLoader(_Noisy(digits[0][:32], digits[1][:32]), 16, num_workers=1, persistent_workers=True)
    words = "generator: got a DataLoader with persistent_workers, whose random states no checkpoint holds"
    with pytest.raises(InputError, match=words):
        StandardTrainer(classifier()).fit_generator(
            stream, nb_epochs=1, seed=0, checkpoint_dir=tmp_path / "run", verbose=False
        )
    assert not (tmp_path / "run").exists()


def test_preprocessing_that_is_set_later_is_the_trainers_too(digits):
    x, y = digits[0][:64], digits[1][:64]
    art_classifier = classifier()
    trainer = StandardTrainer(art_classifier)
    art_classifier.set_params(preprocessing_defences=[JpegCompression((0.0, 1.0), channels_first=True)])
    with pytest.raises(UnsupportedModelError, match="preprocessing: got JpegCompression"):
        trainer.fit(x, y, **QUICK)
    art_classifier = classifier()
    trainer = StandardTrainer(art_classifier)
    art_classifier.set_params(clip_values=(0.0, 255.0))
    with pytest.raises(InputError, match=r"clip_values: got \(0.0, 255.0\), which were \(0, 1\)"):
        trainer.fit(x, y, **QUICK)


def test_images_and_labels_made_under_inference_mode_are_taken(digits):
    with torch.inference_mode():
        x, y, x_test, y_test = (part * 1 for part in digits)
    trainer = StandardTrainer(classifier())
    trainer.fit(x[:64], y[:64], validation_data=(x_test[:20], y_test[:20]), **{**QUICK, "nb_epochs": 2})
    assert len(trainer.history) == 2
    words = r"fit: got a call under torch.inference_mode\(\), expected one outside it"
    with torch.inference_mode(), pytest.raises(InputError, match=words):
        trainer.fit(digits[0][:64], digits[1][:64], **QUICK)


def test_a_black_batch_of_bytes_is_an_image_like_another(digits):
    x = (255 * digits[0][:96]).to(torch.uint8)
    x[32:64] = 0
    trainer = StandardTrainer(classifier())
    trainer.fit_generator(DataLoader(TensorDataset(x, digits[1][:96]), 32), nb_epochs=1, seed=0, verbose=False)
    assert len(trainer.history) == 1
    assert trainer.predict(x[32:33]).shape == (1, 10)
    with pytest.raises(InputError, match="uint8 of 0 and 1 alone"):
        trainer.predict((x > 99).to(torch.uint8))


def test_trainings_in_two_threads_take_turns(digits):
    def trained(art_classifier):
        StandardTrainer(art_classifier).fit(digits[0][:96], digits[1][:96], **{**QUICK, "deterministic": True})
        return weights(art_classifier.model)

    def network():
        torch.manual_seed(0)
        return classifier(nn.Sequential(nn.Dropout(0.3), small_network()))

    alone, classifiers = trained(network()), [network(), network()]
    before = torch.get_rng_state()
    threads = torch.get_num_threads()  # each thread of Python's has a number of its own, on which bits depend
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        found = list(pool.map(trained, classifiers))
    assert all(same(alone, ended) for ended in found)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_history_has_the_rate_that_an_epoch_ended_with_by_whatever_schedule(digits):
    x, y = digits[0][:64], digits[1][:64]
    rates = []
    for make in (lambda _: "cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)):
        art_classifier = classifier(lr=0.1)
        trainer = StandardTrainer(art_classifier)
        trainer.fit(x, y, **{**QUICK, "nb_epochs": 4}, scheduler=make(art_classifier.optimizer))
        rates.append(trainer.history.column("lr"))
    assert rates[0] == pytest.approx(rates[1])  # one step an epoch
    assert rates[0][0] == pytest.approx(0.1)


def test_an_augmentation_that_drops_the_maps_is_refused(digits):
    def augment(x, random, maps):
        return x, None

    trainer = JSIGRTrainer(classifier(), eps=0.1, teacher=small_network())
    with pytest.raises(InputError, match="augment: got no maps back, expected those it was given"):
        trainer.fit(digits[0][:64], digits[1][:64], **QUICK, augment=augment)


def test_the_fsr_layers_weights_get_names_of_their_own_in_an_optimizer_of_names():
    art_classifier = classifier(small_network())
    art_classifier._optimizer = torch.optim.SGD(art_classifier.model.named_parameters(), lr=0.1)
    FSRTrainer(art_classifier, "features", eps=0.1)
    first, added = art_classifier.optimizer.param_groups
    assert len(added["params"]) == len(added["param_names"])
    assert all(name.startswith("features.fsr.") for name in added["param_names"])
    assert not set(first["param_names"]) & set(added["param_names"])


# --- what would be trained or measured as something else, silently --------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_rate_that_is_a_tensor_gives_the_run_of_the_number(kind, digits):
    x, y, found = digits[0][:64], digits[1][:64], []
    for rate in (0.01, torch.tensor(0.01)):
        art_classifier = classifier(
            smooth := nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.SiLU(), nn.Linear(16, 10))
        )
        art_classifier._optimizer = kind(smooth.parameters(), lr=rate)
        trainer = JSIGRTrainer(art_classifier, eps=0.1)  # whose teacher gets an optimizer of the same kind
        trainer.fit(x, y, **QUICK)
        found.append(weights(art_classifier.model))
        assert float(art_classifier.optimizer.param_groups[0]["lr"]) == pytest.approx(0.01)
        assert trainer.history[-1]["lr"] == pytest.approx(0.01)
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], atol=1e-5), name


class _ShiftedSequential(nn.Sequential):
    def forward(self, x):
        return super().forward((x - 0.5) / 0.25)


def test_a_classifier_that_predicts_with_another_function_than_its_model_is_refused(digits):
    x, y = digits[0][:64], digits[1][:64]
    hooked = small_network()
    hooked.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    for model in (_ShiftedSequential(nn.Flatten(), nn.Linear(64, 10)), hooked):
        art_classifier = classifier(model)
        before, modes = weights(model), [module.training for module in model.modules()]
        with pytest.raises(
            UnsupportedModelError, match=r"differ by .* ART calls the parts one by one, past its own fo"
        ):
            PGDATTrainer(art_classifier, eps=0.1).fit(x, y, **QUICK)
        assert same(before, weights(model))
        assert [module.training for module in model.modules()] == modes
    wrapped = nn.Module()
    wrapped.body, wrapped.forward = hooked, lambda x: wrapped.body(x)
    PGDATTrainer(classifier(wrapped), eps=0.1, max_iter=1).fit(x, y, **QUICK)  # the cure
    noisy = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    noisy[0].register_forward_hook(lambda module, inputs, out: out + torch.rand_like(out))
    PGDATTrainer(classifier(noisy), eps=0.1, max_iter=1).fit(x, y, **QUICK)  # noise is no other function


def test_network_of_a_classifier_is_the_function_that_it_predicts_with(digits):
    x = digits[0][:16]
    for options in ({}, {"clip_values": (0.0, 255.0)}, {"clip_values": (-1.0, 1.0), "preprocessing": (0.3, 0.37)}):
        art_classifier = classifier(**options)
        low, high = options.get("clip_values", (0.0, 1.0))
        network = art_saliency.network_of(art_classifier)
        with torch.no_grad():
            logits = network.eval()(x)
        predicted = torch.from_numpy(art_classifier.predict((x * (high - low) + low).numpy()))
        assert torch.allclose(logits, predicted, atol=1e-4 * float(predicted.abs().max()))
        assert (network is art_classifier.model) == (not options)
        assert {p.data_ptr() for p in network.parameters()} == {p.data_ptr() for p in art_classifier.model.parameters()}
    with pytest.raises(InputError, match=r"got a PyTorchClassifier, .*; pass art_saliency.network_of\(classifier\)"):
        art_saliency.accuracy(classifier(), x, digits[1][:16])
    with pytest.raises(UnsupportedModelError, match="preprocessing: got JpegCompression"):
        art_saliency.network_of(
            classifier(preprocessing_defences=JpegCompression(clip_values=(0, 1), channels_first=True))
        )


def test_pixels_and_radii_of_another_range_are_told(digits):
    x, y = digits[0][:64], digits[1][:64]
    art_classifier = classifier(clip_values=(0.0, 255.0))
    with pytest.raises(InputError, match="x: got values up to 1, expected values up to 255; multiply them by 255"):
        PGDATTrainer(art_classifier, eps=25).fit(x, y, **QUICK)
    PGDATTrainer(art_classifier, eps=25, max_iter=1).predict(torch.zeros_like(x))  # black images are black
    with pytest.warns(
        NoEffectWarning, match=r"eps: got 0.03137 where pixels range over 255.* eps=8 is what 0.03137 is"
    ):
        PGDATTrainer(art_classifier, eps=8 / 255)
    PGDATTrainer(art_classifier, eps=0.5)
    PGDATTrainer(classifier(), eps=1e-4)


@pytest.mark.parametrize("make", [SquareAttack, AutoAttack])
def test_attacks_that_arts_own_words_for_recurse_train_too(make, digits):
    art_classifier = classifier()
    attack = make(art_classifier, eps=0.1)
    trainer = PGDATTrainer(art_classifier, eps=0.1, attack=attack)
    assert trainer.config()["attack"]["callable"] == make.__name__
    assert json.dumps(trainer.config())
    if make is SquareAttack:
        attack.max_iter, attack.verbose = 2, False
        trainer.fit(digits[0][:32], digits[1][:32], **QUICK)
    else:
        assert len(trainer.config()["attack"]["attacks"]) == len(attack.attacks)


def test_a_scheduler_that_does_not_fit_the_epochs_is_refused_or_told(digits):
    x, y = digits[0][:64], digits[1][:64]

    def fit(make, epochs):
        art_classifier = classifier()
        scheduler = make(art_classifier.optimizer)
        PGDATTrainer(art_classifier, eps=0.1, max_iter=1).fit(
            x, y, **{**QUICK, "nb_epochs": epochs, "scheduler": scheduler}
        )

    def cycle(optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=3)

    fit(cycle, 3)
    with pytest.warns(NoEffectWarning, match="OneCycleLR of 3 steps, expected 2, as many as epochs; a scheduler"):
        fit(cycle, 2)
    with pytest.raises(InputError, match="OneCycleLR of 3 steps, expected 4"):
        fit(cycle, 4)
    with pytest.raises(InputError, match="ReduceLROnPlateau of mode 'max', expected mode 'min'"):
        fit(lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max"), 1)


def test_an_optimizer_that_wants_a_closure_is_refused_before_training(digits):
    model = small_network()
    art_classifier = classifier(model, optimizer=torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InputError, match="optimizer: got LBFGS, which computes the loss several times a step"):
        PGDATTrainer(art_classifier, eps=0.1).fit(digits[0][:64], digits[1][:64], **QUICK)


def test_a_compiled_network_is_refused_by_methods_with_input_gradients_in_their_loss(digits):
    x, y = digits[0][:64], digits[1][:64]
    model = small_network()
    art_classifier = classifier(torch.compile(model, backend="aot_eager"))
    with pytest.raises(UnsupportedModelError, match=r"network of torch.compile, whose backward pass has no derivative"):
        AdvGSCTTrainer(art_classifier, eps=0.1).fit(x, y, **QUICK)
    PGDATTrainer(art_classifier, eps=0.1, max_iter=1).fit(x, y, **QUICK)


def test_a_copied_trainer_trains_the_network_of_its_own_classifier(digits):
    trainer = copy.deepcopy(PGDATTrainer(classifier(), eps=0.1, max_iter=1))
    trainer.fit(digits[0][:64], digits[1][:64], **QUICK)
    assert trainer._network.network is trainer.get_classifier().model
