"""Mixup and CutMix of a batch: degraded and clean images stay pairs."""

import pytest
import torch
from basicsr.models import build_model
from support import forked
from support.forked import changed

import dpmambair_basicsr
from dpmambair_basicsr.models.batch_augment import BatchAugment, rectangle

dpmambair_basicsr.register()
COUNT, SCALE = 4, 3


def numbered():
    """Degraded image i has the value i everywhere; clean image i, three times as large, 10 + i."""
    number = torch.arange(float(COUNT)).view(COUNT, 1, 1, 1)
    return {'lq': number.expand(COUNT, 2, 8, 12).clone(), 'gt': 10 + number.expand(COUNT, 2, 24, 36).clone()}


def mix(seed, **kinds):
    torch.manual_seed(seed)
    return BatchAugment({'train': {'batch_augment': kinds}}).apply(numbered())


@pytest.mark.parametrize('seed', range(5))
def test_mixup_blends_each_image_with_another_by_one_factor(seed):
    mixed = mix(seed, mixup={'alpha': 2.0, 'prob': 1})
    values = {name: value.flatten(1) for name, value in mixed.items()}
    assert all(torch.allclose(value, value[:, :1]) for value in values.values()), 'constant images stay constant'
    torch.testing.assert_close(values['gt'][:, 0], 10 + values['lq'][:, 0])
    shift = values['lq'][:, 0] - torch.arange(COUNT)  # (1 - lam) (other - own), where the other is k images further on
    further = [
        k for k in range(1, COUNT) if is_multiple(shift, (torch.arange(COUNT) + k) % COUNT - torch.arange(COUNT))
    ]
    assert len(further) == 1


def is_multiple(value, of):
    factor = (value @ of.float()) / (of @ of)
    return bool(torch.allclose(value, factor * of, atol=1e-5)) and 0 < factor < 1


@pytest.mark.parametrize('seed', range(5))
def test_cutmix_pastes_one_rectangle_of_another_image_at_its_place_in_both(seed):
    mixed, before = mix(seed, cutmix={'prob': 1}), numbered()
    pasted = (mixed['lq'] != before['lq'])[:, 0]
    assert all(torch.equal(mask, pasted[0]) for mask in pasted)
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert torch.equal(pasted[0], rows[:, None] & columns), 'a rectangle'
    large = pasted[:, None].repeat_interleave(SCALE, 2).repeat_interleave(SCALE, 3).expand_as(mixed['gt'])
    assert torch.equal(mixed['gt'] != before['gt'], large)
    for image in range(COUNT):
        sources = mixed['lq'][image][:, pasted[image]].unique().tolist()
        assert len(sources) <= 1 and (mixed['gt'][image][large[image]].unique() - 10).tolist() == sources


def test_rectangles_have_the_requested_area_and_reach_every_pixel():
    torch.manual_seed(0)
    hits, full = torch.zeros(12, 16), 0
    for _ in range(400):
        top, bottom, left, right = rectangle(12, 16, 0.25)
        assert 0 <= top <= bottom <= 12 and 0 <= left <= right <= 16
        assert (bottom - top) * (right - left) <= 0.25 * 12 * 16
        full += (bottom - top) * (right - left) == 0.25 * 12 * 16
        hits[top:bottom, left:right] += 1
    assert full > 100 and hits.min() > 0


def test_each_kind_occurs_with_its_probability():
    before, counts = numbered()['lq'], {'mixup': 0, 'cutmix': 0, 'none': 0}
    torch.manual_seed(0)
    augment = BatchAugment({'train': {'batch_augment': {'mixup': {'prob': 0.2}, 'cutmix': {'alpha': 9, 'prob': 0.5}}}})
    for _ in range(600):
        mixed = augment.apply(numbered())['lq']
        kind = (
            'none'
            if torch.equal(mixed, before)
            else 'cutmix'
            if set(mixed.unique().tolist()) <= {0, 1, 2, 3}
            else 'mixup'
        )
        counts[kind] += 1
    assert {kind: count / 600 for kind, count in counts.items()} == pytest.approx(
        {'mixup': 0.2, 'cutmix': 0.5, 'none': 0.3}, abs=0.06
    )


def test_without_the_option_no_random_number_is_drawn():
    state = torch.random.get_rng_state()
    images = numbered()
    assert BatchAugment({'train': {}}).apply(images) is images
    assert torch.equal(torch.random.get_rng_state(), state)


def build(**changes):
    changes = {'train.batch_augment': {'mixup': {'prob': 0.5}, 'cutmix': {'prob': 0.5}}, **changes}
    opt = changed(forked.options({}), changes)
    torch.manual_seed(0)
    return build_model(opt | {'is_train': True, 'dist': False, 'rank': 0, 'world_size': 1})


def test_a_model_trains_on_mixed_pairs_and_validates_whole_images():
    model, seen = build(), []
    model.net_g.register_forward_pre_hook(lambda net, inputs: seen.append(inputs[0].clone()))
    batch = torch.rand(2, 3, 8, 8)
    model.feed_data({'lq': batch, 'gt': batch.clone()})
    for iteration in (1, 2, 3):
        model.optimize_parameters(iteration)
        assert torch.allclose(model.lq, model.gt), 'the same pixels of the same image'
        assert torch.equal(seen[-1], model.lq)
    assert not torch.equal(seen[-1], batch)
    model.feed_data({'lq': batch, 'gt': batch, 'lq_path': ['x']})
    model.test()
    assert torch.equal(model.lq, batch)


LABELS = {'type': 'DPMambaIR', 'dim': 4, 'num_blocks': [1] * 4, 'num_refinement_blocks': 1, 'd_inner': [4] * 4}
LABELS |= {'d_state': 2, 'degradation': 'class', 'embed_dim': 8}


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'train.batch_augment': {'mixupp': {'prob': 1}}}, r'\.mixupp: unknown key, did you mean mixup\?'),
        ({'train.batch_augment': {'mixup': {'probb': 1}}}, r'\.mixup\.probb: unknown key, did you mean prob\?'),
        ({'train.batch_augment': {'mixup': {'alpha': 1}}}, r'\.mixup\.prob: missing'),
        ({'train.batch_augment': {'mixup': 0.5}}, r'\.mixup: expected a section with prob and alpha, got 0\.5'),
        ({'train.batch_augment': {'cutmix': {'prob': -1}}}, r'\.cutmix\.prob: expected number >= 0, got -1'),
        ({'train.batch_augment': {'cutmix': {'prob': 1, 'alpha': 0}}}, r'\.cutmix\.alpha: must be above 0'),
        (
            {'train.batch_augment': {'mixup': {'prob': 0.6}, 'cutmix': {'prob': 0.6}}},
            r': the values of prob must sum to at most 1, got 1\.2',
        ),
        ({'datasets.train.batch_size_per_gpu': 1}, ': a batch of one image cannot be mixed'),
        (
            {'datasets.train.progressive': {'gt_sizes': [8, 8], 'batch_sizes': [2, 1], 'iters': [4, 4]}},
            ': a batch of one image cannot be mixed',
        ),
        ({'network_g': LABELS}, ': mixed images have no single degradation label'),
        (
            {
                'model_type': 'DegradationExtractorModel',
                'network_g': {
                    'type': 'DegradationAutoencoder',
                    'embed_dim': 8,
                    'extractor_channels': [4, 4],
                    'channels': 4,
                },
            },
            ': mixed images have no single degradation label',
        ),
    ],
)
def test_batches_that_cannot_be_mixed_are_refused(changes, message):
    with pytest.raises(ValueError, match=rf'^train\.batch_augment{message}'):
        build(**changes)
