"""VmambaIR's recipes: each option file trains, resumes and tests, reduced; additions of GAN and real-world models."""

import copy
import re

import pytest
import torch
import yaml
from basicsr.archs import build_network
from basicsr.losses import build_loss
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from basicsr.utils.options import ordered_yaml
from support import pipelines
from support.commands import command
from torchvision.models import AlexNet, vgg

TINY_NET = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
RECIPES = {
    'derain': ['l_pix'],
    'sisr_x4': ['l_pix'],
    'sisr_x4_gan': ['l_g_pix', 'l_g_percep', 'l_g_gan', 'l_d_real', 'out_d_real', 'l_d_fake', 'out_d_fake'],
    'realsr_x4': ['l_pix'],
    'realsr_x4_gan': ['l_g_pix', 'l_g_percep', 'l_g_gan', 'l_d_real', 'out_d_real', 'l_d_fake', 'out_d_fake'],
}


def option_file(stage, recipe):
    return pipelines.ROOT / 'options' / f'{stage}_vmambair_{recipe}.yml'


def options(stage, recipe):
    return yaml.load(option_file(stage, recipe).read_text(), Loader=ordered_yaml()[0])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """{scale: dataset options}, and under 'photos' those of RealESRGANDataset."""
    folder = tmp_path_factory.mktemp('data')
    pairs = {
        scale: pipelines.write_pairs(folder / f'x{scale}', [(44, 52), (40, 40), (60, 44), (48, 48)], scale)
        for scale in (1, 4)
    }
    return pairs | {'photos': pipelines.write_photos(folder / 'photos')}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """{'vgg19', 'vgg', 'alex'}: files like torchvision's, of random values; {'sisr_x4', 'realsr_x4'}: first stages."""
    folder = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    files = {}
    networks = {
        'vgg19': vgg.make_layers(vgg.cfgs['E']),
        'vgg': vgg.make_layers(vgg.cfgs['D']),
        'alex': AlexNet().features,
    }
    for name, features in networks.items():
        state = features.state_dict()
        state = {f'features.{key}': torch.randn_like(value) * value.std() for key, value in state.items()}
        for key, value in vgg_head().items():
            state[f'classifier.{key}'] = value
        files[name] = folder / f'{name}.pth'
        torch.save(state, files[name])
    for recipe in ('sisr_x4', 'realsr_x4'):
        net = build_model(reduced(options('test', recipe))).net_g
        files[recipe] = folder / f'{recipe}.pth'
        torch.save({'params_ema': net.state_dict()}, files[recipe])  # as released, but with both keys
    return files


def vgg_head():
    """VGG's 120 million classifier weights, all equal and stored once."""
    shapes = {'0': (4096, 25088), '3': (4096, 4096), '6': (1000, 4096)}
    head = {f'{layer}.weight': torch.zeros(()).expand(shape) for layer, shape in shapes.items()}
    return head | {f'{layer}.bias': torch.zeros(()).expand(shape[0]) for layer, shape in shapes.items()}


def reduced(opt):
    """Parsed options of a model alone, on the CPU, with a tiny network and no files."""
    opt = copy.deepcopy(opt)
    opt |= {'num_gpu': 0, 'dist': False, 'rank': 0, 'world_size': 1, 'is_train': 'train' in opt}
    opt['network_g'] |= TINY_NET
    opt['path'] = {}
    if 'train' in opt:
        opt['train']['pbar'] = False
    if 'network_d' in opt:
        opt['network_d']['num_feat'] = 4
        del opt['train']['perceptual_opt']
    if 'queue_size' in opt:
        opt |= {'queue_size': 4, 'gt_size': 32}
        opt['datasets']['train']['batch_size_per_gpu'] = 2
    return opt


def forced(changes):
    return ['--force_yml', *(f'{key}={value}'.replace(' ', '') for key, value in changes.items())]


def changes_for_train(recipe, data, weights):
    """`--force_yml` entries that make a recipe small."""
    scale = 1 if recipe == 'derain' else 4
    realworld, gan = recipe.startswith('realsr'), recipe.endswith('gan')
    changes = {'num_gpu': 0} | {f'network_g:{key}': value for key, value in TINY_NET.items()}
    changes |= {
        'train:total_iter': 4, 'train:pbar': 'false', 'val:val_freq': 2,
        'logger:print_freq': 1, 'logger:save_checkpoint_freq': 2, 'logger:use_tb_logger': 'false',
        'datasets:train:num_worker_per_gpu': 0, 'datasets:train:batch_size_per_gpu': 2,
    }  # fmt: skip
    changes |= {f'datasets:val:{key}': value for key, value in data[scale].items()}
    changes |= {f'datasets:train:{key}': value for key, value in data['photos' if realworld else scale].items()}
    if recipe == 'derain':
        progressive = {'gt_sizes': [16, 48], 'batch_sizes': [2, 1], 'iters': [3, 3]}
        changes |= {f'datasets:train:progressive:{key}': value for key, value in progressive.items()}
        changes |= {'datasets:train:gt_size': 48}  # more than some pictures have
        changes |= {'train:scheduler:periods': [2, 4], 'train:scheduler:eta_mins': [0.0003, 0.0]}
    elif realworld:
        changes |= {'queue_size': 4, 'gt_size': 32, 'datasets:train:dataset_enlarge_ratio': 8}
    else:
        changes |= {'datasets:train:gt_size': 32}
    if gan:
        changes |= {'path:pretrain_network_g': weights[recipe.removesuffix('_gan')], 'network_d:num_feat': 4}
        changes |= {'train:perceptual_opt:weights': weights['vgg19']}
    return changes


def changes_for_test(recipe, data, weights, checkpoint):
    opt = options('test', recipe)
    changes = {'num_gpu': 0, 'path:pretrain_network_g': checkpoint, 'val:pbar': 'false'}
    changes |= {f'network_g:{key}': value for key, value in TINY_NET.items()}
    for phase in opt['datasets']:
        changes |= {f'datasets:{phase}:{key}': value for key, value in data[opt['scale']].items()}
    if 'lpips' in opt['val']['metrics']:
        changes['val:metrics:lpips:weights'] = weights[opt['val']['metrics']['lpips']['net']]
    return changes


@pytest.mark.parametrize('recipe', RECIPES)
def test_every_recipe_trains_resumes_and_tests(recipe, data, weights, tmp_path):
    """In this process, except for one recipe, which runs by the commands that users type."""

    def run(stage, *arguments, file=recipe):
        if recipe != 'derain':
            return getattr(pipelines, stage)(option_file(stage, file), *arguments, cwd=tmp_path)
        result = command(stage, '-opt', option_file(stage, file), *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
        return result.stdout

    changes = changes_for_train(recipe, data, weights)
    log = run('train', *forced(changes))
    for name in RECIPES[recipe]:
        assert len(re.findall(rf'iter: .* {name}: ', log)) == 4, f'{name} in every iteration'
    assert re.search(r'# psnr: \d+\.\d+', log)
    experiment = tmp_path / 'experiments' / f'train_vmambair_{recipe}'
    saved = torch.load(experiment / 'models/net_g_4.pth', weights_only=True)
    assert list(saved) == [*(['params'] if recipe == 'derain' else ['params', 'params_ema']), 'network_g']
    assert (experiment / 'models/net_d_4.pth').is_file() == recipe.endswith('gan')

    log = run('train', '--auto_resume', *forced(changes | {'train:total_iter': 6}))
    assert re.search(r'Start training from epoch: \d+, iter: 4', log)
    assert re.findall(r'iter: +(\d+),', log) == ['5', '6']
    assert (experiment / 'training_states/6.state').is_file()

    task = recipe.removesuffix('_gan')
    checkpoint = experiment / 'models/net_g_6.pth'
    log = run('test', *forced(changes_for_test(task, data, weights, checkpoint)), file=task)
    opt = options('test', task)
    assert len(re.findall(r'# psnr: \d+\.\d+', log)) == len(opt['datasets'])
    assert log.count('# lpips: 0.') == (0 if task == 'derain' else len(opt['datasets']))
    name = opt['datasets']['test_1']['name']
    images = tmp_path / 'results' / f'test_vmambair_{task}' / 'visualization' / name
    assert sorted(path.name for path in images.iterdir()) == [f'{i:02}_test_vmambair_{task}.png' for i in range(4)]


# The released option files (28 for deraining) and, where its code overrides them, what the code does: the real-world
# generator's rate, 1e-4 * 0.5 ** (iteration // 300000). Dots separate keys.
SCHEDULE = {'train.scheduler.type': 'MultiStepLR', 'train.scheduler.gamma': 0.5}
ADAM = {'type': 'Adam', 'weight_decay': 0, 'betas': [0.9, 0.99]}
SISR = {
    'scale': 4, 'manual_seed': 0, 'network_g.scale': 4,
    'network_g.num_blocks': [15, 1, 1, 1], 'network_g.num_refinement_blocks': 15,
    'network_g.channel_scan': 'lifted', 'network_g.channel_fusion': 'modulate',
    'datasets.train.gt_size': 256, 'datasets.train.batch_size_per_gpu': 8, 'datasets.train.dataset_enlarge_ratio': 100,
    'datasets.train.use_hflip': True, 'datasets.train.use_rot': True,
    'train.ema_decay': 0.999, 'train.optim_g': ADAM | {'lr': 2e-4},
    'train.pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0}, 'train.grad_clip_norm': None,
    'val.val_freq': 10_000, 'logger.save_checkpoint_freq': 10_000,
}  # fmt: skip
KERNELS = ['iso', 'aniso', 'generalized_iso', 'generalized_aniso', 'plateau_iso', 'plateau_aniso']
BLUR = {
    'blur_kernel_size': 21, 'kernel_list': KERNELS, 'kernel_prob': [0.45, 0.25, 0.12, 0.03, 0.12, 0.03],
    'sinc_prob': 0.1, 'betag_range': [0.5, 4], 'betap_range': [1, 2],
}  # fmt: skip
REALSR = {
    'scale': 4, 'manual_seed': 0, 'network_g.scale': 4,
    'network_g.num_blocks': [6, 2, 2, 1], 'network_g.num_refinement_blocks': 6,
    'network_g.channel_scan': 'scalar', 'network_g.channel_fusion': 'modulate',
    'gt_size': 256, 'queue_size': 180,
    'gt_usm': None, 'l1_gt_usm': None, 'percep_gt_usm': None, 'gan_gt_usm': None,  # false where absent
    'resize_prob': [0.2, 0.7, 0.1], 'resize_range': [0.15, 1.5], 'resize_prob2': [0.3, 0.4, 0.3],
    'resize_range2': [0.3, 1.2], 'gaussian_noise_prob': 0.5, 'gaussian_noise_prob2': 0.5, 'noise_range': [1, 30],
    'noise_range2': [1, 25], 'poisson_scale_range': [0.05, 3], 'poisson_scale_range2': [0.05, 2.5],
    'gray_noise_prob': 0.4, 'gray_noise_prob2': 0.4, 'jpeg_range': [30, 95], 'jpeg_range2': [30, 95],
    'second_blur_prob': 0.8, 'datasets.train.final_sinc_prob': 0.8,
    'datasets.train.blur_sigma': [0.2, 3], 'datasets.train.blur_sigma2': [0.2, 1.5],
    **{f'datasets.train.{key}{order}': value for key, value in BLUR.items() for order in ('', '2')},
    'datasets.train.batch_size_per_gpu': 9, 'datasets.train.use_hflip': True, 'datasets.train.use_rot': False,
    'train.ema_decay': 0.999, 'train.pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0}, 'train.grad_clip_norm': None,
}  # fmt: skip
GAN = {
    'network_d': {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 64, 'skip_connection': True},
    'path.param_key_g': 'params_ema', 'train.optim_d': ADAM | {'lr': 1e-4},
    'train.net_d_iters': 1, 'train.net_d_init_iters': 0,
    'train.gan_opt': {
        'type': 'GANLoss', 'gan_type': 'vanilla', 'real_label_val': 1.0, 'fake_label_val': 0.0, 'loss_weight': 1.0,
    },
    'train.perceptual_opt.layer_weights': {
        'conv1_2': 0.1, 'conv2_2': 0.1, 'conv3_4': 1, 'conv4_4': 1, 'conv5_4': 1,
    },
    'train.perceptual_opt.vgg_type': 'vgg19', 'train.perceptual_opt.use_input_norm': True,
    'train.perceptual_opt.range_norm': False, 'train.perceptual_opt.perceptual_weight': 1.0,
    'train.perceptual_opt.style_weight': 0, 'train.perceptual_opt.criterion': 'l1',
}  # fmt: skip
PSNR_0 = {'psnr': {'type': 'calculate_psnr', 'crop_border': 0, 'test_y_channel': True}}
PSNR_4 = {'psnr': {'type': 'calculate_psnr', 'crop_border': 4, 'test_y_channel': True}}
SSIM_4 = {'ssim': {'type': 'calculate_ssim', 'crop_border': 4, 'test_y_channel': True}}
RELEASED = {
    'derain': {
        'scale': 1, 'manual_seed': 100,
        'network_g.num_blocks': [3, 5, 7, 9], 'network_g.num_refinement_blocks': 2,
        'network_g.channel_scan': 'lifted', 'network_g.channel_fusion': 'add',
        'datasets.train.gt_size': 384, 'datasets.train.batch_size_per_gpu': 8, 'datasets.train.pad_small': True,
        'datasets.train.use_hflip': True, 'datasets.train.use_rot': True,
        'datasets.train.progressive': {
            'gt_sizes': [128, 160, 192, 256, 320, 384], 'batch_sizes': [8, 5, 3, 2, 1, 1],
            'iters': [92_000, 64_000, 48_000, 36_000, 36_000, 24_000],
        },
        'train.total_iter': 300_000, 'train.ema_decay': 0, 'train.grad_clip_norm': 0.01,
        'train.optim_g': {'type': 'AdamW', 'lr': 3e-4, 'weight_decay': 1e-4, 'betas': [0.9, 0.999]},
        'train.scheduler': {
            'type': 'CosineAnnealingRestartCyclicLR', 'periods': [92_000, 208_000], 'restart_weights': [1, 1],
            'eta_mins': [3e-4, 1e-6],
        },
        'train.pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0},
        'val.val_freq': 4000, 'logger.save_checkpoint_freq': 4000, 'val.metrics': PSNR_0,
    },
    'sisr_x4': SISR | SCHEDULE | {
        'train.scheduler.milestones': [50_000, 70_000], 'train.total_iter': 100_000, 'val.metrics': PSNR_4,
    },
    'sisr_x4_gan': SISR | GAN | SCHEDULE | {
        'train.scheduler.milestones': [150_000], 'train.scheduler_d': None, 'train.total_iter': 300_000,
        'val.metrics': PSNR_0,
    },
    'realsr_x4': REALSR | SCHEDULE | {
        'train.optim_g': ADAM | {'lr': 2e-4}, 'train.scheduler.milestones': [250_000, 350_000],
        'train.total_iter': 500_000, 'val.val_freq': 5000, 'logger.save_checkpoint_freq': 5000, 'val.metrics': PSNR_0,
    },
    'realsr_x4_gan': REALSR | GAN | SCHEDULE | {
        'train.optim_g': ADAM | {'lr': 1e-4}, 'train.scheduler.milestones': [300_000],
        'train.scheduler_d': {'type': 'MultiStepLR', 'milestones': [400_000], 'gamma': 0.5},
        'train.total_iter': 400_000, 'val.val_freq': 10_000, 'logger.save_checkpoint_freq': 10_000,
        'val.metrics': PSNR_4 | SSIM_4,
    },
}  # fmt: skip
COMMON = {
    'network_g.type': 'VmambaIR', 'network_g.dim': 48, 'network_g.ffn_expansion_factor': 2.66,
    'train.warmup_iter': -1,
}  # fmt: skip


@pytest.mark.parametrize('recipe', RELEASED)
def test_option_values_match_the_released_ones(recipe):
    given = options('train', recipe)
    for path, value in (COMMON | RELEASED[recipe]).items():
        found = given
        for key in path.split('.'):
            found = None if found is None else found.get(key)
        assert found == value, path


def load_test_model(recipe, file, param_key='params_ema', **changes):
    opt = reduced(options('test', recipe))
    opt['network_g'] |= changes
    opt['path'] = {'pretrain_network_g': str(file), 'param_key_g': param_key, 'strict_load_g': True}
    return build_model(opt)


def test_released_style_file_loads(weights):
    net = load_test_model('realsr_x4', weights['realsr_x4']).net_g
    expected = torch.load(weights['realsr_x4'], weights_only=True)['params_ema']
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


def test_file_of_another_width_gives_one_report(weights):
    with pytest.raises(ValueError, match=r'sisr_x4\.pth: does not fit VmambaIR:') as error:
        load_test_model('sisr_x4', weights['sisr_x4'], dim=8)
    report = str(error.value)
    assert 'of another shape: ' in report and '(4, 3, 3, 3) instead of (8, 3, 3, 3)' in report
    assert 'missing' not in report and len(report.splitlines()) == 2


def test_file_of_another_task_gives_one_report(weights):
    with pytest.raises(ValueError, match='does not fit VmambaIR:') as error:
        load_test_model('realsr_x4', weights['sisr_x4'])
    _, extra, shapes = str(error.value).splitlines()
    assert 'not in the network: ' in extra and 'conv_cin' in extra
    assert 'of another shape: ' in shapes and 'xc_proj_weight (2, 38, 4) instead of (2, 33, 1)' in shapes


def test_file_with_another_key_names_the_key(weights, tmp_path):
    torch.save({'weights': {}}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match=r"other\.pth: has no key 'params_ema'"):
        load_test_model('sisr_x4', tmp_path / 'other.pth')


# The GAN model.


def sisr_gan_model(**train_changes):
    opt = reduced(options('train', 'sisr_x4_gan'))
    opt['train'] |= train_changes
    torch.manual_seed(0)
    model = build_model(opt)
    model.feed_data({'lq': torch.rand(2, 3, 8, 8), 'gt': torch.rand(2, 3, 32, 32)})
    return model


def test_both_networks_and_the_average_are_updated():
    model = sisr_gan_model()
    nets = {'net_g': model.net_g, 'net_d': model.net_d, 'net_g_ema': model.net_g_ema}
    before = {name: copy.deepcopy(net.state_dict()) for name, net in nets.items()}
    model.optimize_parameters(1)
    for name, net in nets.items():
        moved = [key for key, value in net.state_dict().items() if not torch.equal(value, before[name][key])]
        assert len(moved) > len(before[name]) / 2, name
    key = 'patch_embed.proj.weight'
    average = 0.999 * before['net_g'][key] + 0.001 * model.net_g.state_dict()[key]
    torch.testing.assert_close(model.net_g_ema.state_dict()[key], average)


def learning_rates(model):
    for optimizer in model.optimizers:
        optimizer.step()  # PyTorch warns of schedulers that step before
    return [optimizer.param_groups[0]['lr'] for optimizer in model.optimizers]


def test_each_network_follows_its_own_schedule():
    """Released real-world GAN stage: the generator's rate halves at 300000, the discriminator's stays."""
    opt = reduced(options('train', 'realsr_x4_gan'))
    opt['train']['scheduler']['milestones'] = [3]
    model = build_model(opt)
    rates = []
    for iteration in range(1, 6):
        model.update_learning_rate(iteration)
        rates.append(learning_rates(model))
    assert rates == [[1e-4, 1e-4]] * 3 + [[5e-5, 1e-4]] * 2
    both = sisr_gan_model(scheduler={'type': 'MultiStepLR', 'milestones': [1], 'gamma': 0.5})
    assert learning_rates(both) == [2e-4, 1e-4]
    both.update_learning_rate(2)
    assert learning_rates(both) == [1e-4, 5e-5]


def test_gradient_of_the_generator_is_clipped():
    """SGD moves the parameters by lr times the gradient."""
    model = sisr_gan_model(optim_g={'type': 'SGD', 'lr': 1.0}, grad_clip_norm=1e-2)
    before = torch.nn.utils.parameters_to_vector(model.net_g.parameters()).detach().clone()
    model.optimize_parameters(1)
    step = torch.nn.utils.parameters_to_vector(model.net_g.parameters()) - before
    assert step.norm().item() == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize(
    ('section', 'key', 'value', 'message'),
    [
        (None, 'network_d', None, '^network_d: missing'),
        ('train', 'optim_d', None, r'^train\.optim_d: missing'),
        ('train', 'gan_opt', None, r'^train\.gan_opt: missing'),
        (
            'train',
            'fft_opt',
            {'type': 'FFTLoss'},
            r'^train\.fft_opt: RestorationGANModel supports only pixel_opt, perceptual_opt, gan_opt, ldl_opt',
        ),
    ],
)
def test_errors_about_incomplete_gan_options_name_the_key(section, key, value, message):
    opt = reduced(options('train', 'sisr_x4_gan'))
    (opt if section is None else opt[section])[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(opt)


def test_a_loss_without_a_value_is_no_loss():
    assert sisr_gan_model(fft_opt=None).cri_pix


def dpmambair_gan_options():
    opt = reduced(options('train', 'sisr_x4_gan'))
    opt['scale'] = 1
    opt['network_g'] = TINY_NET | {'type': 'DPMambaIR', 'd_inner': [4] * 4, 'd_state': 2}
    opt['network_g'] |= {'embed_dim': 8, 'extractor_channels': [4] * 6}
    return opt


def test_a_frozen_extractor_of_random_numbers_is_refused(tmp_path):
    opt = dpmambair_gan_options()
    with pytest.raises(ValueError, match=r'^path\.pretrain_network_e: missing'):
        build_model(copy.deepcopy(opt))
    stage_1 = {'embed_dim': 8, 'extractor_channels': [4] * 6, 'channels': 4}
    stage_1 = build_network({'type': 'DegradationAutoencoder'} | stage_1).state_dict()
    torch.save({'params': stage_1}, tmp_path / 'stage_1.pth')
    net = build_network(copy.deepcopy(opt['network_g']))
    net.load_extractor(stage_1)
    opt['path']['pretrain_network_e'] = str(tmp_path / 'stage_1.pth')
    model = build_model(opt)
    for trained in (model.net_g, model.net_g_ema):
        for name, value in net.extractor.state_dict().items():
            assert torch.equal(trained.extractor.state_dict()[name], value), name
    model.feed_data({'lq': torch.rand(1, 3, 16, 16), 'gt': torch.rand(1, 3, 16, 16)})
    model.optimize_parameters(1)


def test_a_network_that_needs_labels_is_refused():
    opt = dpmambair_gan_options()
    opt['network_g']['degradation'] = 'class'
    with pytest.raises(ValueError, match='^network_g: DPMambaIR needs labels, which RestorationGANModel does not'):
        build_model(opt)


def test_cosine_that_ends_too_early_is_refused():
    """BasicSR's fails with a TypeError after its periods; 99999 would do, iteration i asks for position i - 1."""
    opt = reduced(options('train', 'sisr_x4'))
    opt['train']['scheduler'] = {'type': 'CosineAnnealingRestartLR', 'periods': [99998], 'eta_min': 1e-6}
    with pytest.raises(ValueError, match=r'periods sum to 99998, train\.total_iter is 100000'):
        build_model(opt)


# The real-world models.


def degraded_batches(model, count, level=lambda index: 0.5):
    """Feeds `count` batches of two noise images with mean `level(index)` and yields after each."""
    set_random_seed(0)
    kernel = torch.zeros(2, 21, 21)
    kernel[:, 10, 10] = 1
    for index in range(count):
        gt = level(index) + 0.3 * (torch.rand(2, 3, 96, 96) - 0.5)
        model.feed_data({'gt': gt, 'kernel1': kernel, 'kernel2': kernel, 'sinc_kernel': kernel})
        yield model.lq, model.gt


@pytest.mark.parametrize('recipe', ['realsr_x4', 'realsr_x4_gan'])
def test_degradation_runs_on_the_cpu(recipe):
    model = build_model(reduced(options('train', recipe)))
    for lq, gt in degraded_batches(model, 5):
        assert lq.shape == (2, 3, 8, 8) and gt.shape == (2, 3, 32, 32)
        assert lq.device.type == gt.device.type == 'cpu'
        assert torch.equal(lq, (lq * 255).round() / 255) and 0 <= lq.min() <= lq.max() <= 1
        model.optimize_parameters(1)
        assert all(value == value for value in model.log_dict.values())


def test_artefact_loss_of_the_real_world_model_is_logged():
    opt = reduced(options('train', 'realsr_x4_gan'))
    opt['train']['ldl_opt'] = {'type': 'L1Loss'}
    with pytest.raises(ValueError, match=r'^train\.ema_decay: missing, required by train\.ldl_opt'):
        build_model(copy.deepcopy(opt) | {'train': copy.deepcopy(opt['train']) | {'ema_decay': 0}})
    model = build_model(opt)
    for _ in degraded_batches(model, 1):
        model.optimize_parameters(1)
    assert model.log_dict['l_g_ldl'] >= 0


def artefact_map(truth, output, average):
    """Liang et al. 2022, Eq. 2 to 5, pixel by pixel."""
    residual, of_average = ((truth - image).abs().sum(1) for image in (output, average))  # (b, h, w)
    height, width = residual.shape[-2:]
    result = torch.zeros_like(residual)
    for index, image in enumerate(residual):
        of_patch = image.flatten().var() ** 0.2
        for y in range(height):
            for x in range(width):
                rows = [mirrored(y + step, height) for step in range(-3, 4)]
                columns = [mirrored(x + step, width) for step in range(-3, 4)]
                if image[y, x] >= of_average[index, y, x]:
                    result[index, y, x] = of_patch * image[rows][:, columns].flatten().var()
    return result[:, None]


def mirrored(place, size):
    return abs(place) if place < size else 2 * (size - 1) - place


def test_ldl_matches_its_paper_and_changes_no_other_loss():
    without, model = (
        sisr_gan_model(perceptual_opt=None),
        sisr_gan_model(perceptual_opt=None, ldl_opt={'type': 'L1Loss', 'loss_weight': 0.5}),
    )
    for other in (without, model):
        for parameter in other.net_g_ema.parameters():
            parameter.data.mul_(0.9)  # otherwise the average equals the network, and there are no artefacts
    with torch.no_grad():
        output, average = model.net_g(model.lq), model.net_g_ema(model.lq)
    weight = artefact_map(model.gt, output, average)
    assert 0 < (weight > 0).float().mean() < 1
    expected = 0.5 * (weight * (output - model.gt)).abs().mean()
    before = copy.deepcopy(model.net_g.state_dict())
    for other in (without, model):
        other.optimize_parameters(1)
    assert model.log_dict['l_g_ldl'] == pytest.approx(expected.item(), rel=1e-4)
    for name in ('l_g_pix', 'l_g_gan', 'l_d_real', 'out_d_real'):
        assert model.log_dict[name] == without.log_dict[name], name
    moved = [
        name
        for name, value in model.net_g.state_dict().items()
        if not torch.equal(value, without.net_g.state_dict()[name])
    ]
    assert moved and all(not torch.equal(before[name], model.net_g.state_dict()[name]) for name in moved)


def test_ldl_without_a_discriminator_is_refused():
    opt = reduced(options('train', 'sisr_x4'))
    opt['train']['ldl_opt'] = {'type': 'L1Loss'}
    with pytest.raises(ValueError, match=r'^train\.ldl_opt: LDL needs a GAN model'):
        build_model(opt)


def test_pool_mixes_batches_and_keeps_pairs_together():
    model = build_model(reduced(options('train', 'realsr_x4')))
    found = []
    for lq, gt in degraded_batches(model, 30, level=lambda index: (0.2, 0.8)[index % 2]):
        found.append((gt.mean(dim=(1, 2, 3)) > 0.5).tolist())
        assert (lq.mean(dim=(1, 2, 3)) > 0.5).tolist() == found[-1]
    assert all(a == b for a, b in found[:2]), 'the pool fills up first'
    assert sum(a != b for a, b in found[2:]) > 5


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'queue_size': 5},
            r'^queue_size: 5 is not a multiple of the batch size 2 \(datasets\.train\.batch_size_per_gpu',
        ),
        ({'gt_usm': True}, '^gt_usm: True, but RealWorldSRGANModel does not sharpen'),
        ({'jpeg_range2': None}, '^jpeg_range2: missing'),
    ],
)
def test_errors_about_degradation_options_name_the_key(change, message):
    opt = reduced(options('train', 'realsr_x4_gan')) | change
    opt = {key: value for key, value in opt.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        build_model(opt)


# The perceptual loss.

LAYERS = {'conv1_2': 0.1, 'conv2_2': 0.1}


def test_perceptual_loss_uses_the_given_weights(weights, tmp_path, monkeypatch):
    loss = build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS, 'weights': str(weights['vgg19'])})
    state = torch.load(weights['vgg19'], weights_only=True)
    assert torch.equal(loss.vgg.vgg_net.conv2_2.weight, state['features.7.weight'])
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    percep, style = loss(x, torch.rand(1, 3, 16, 16))
    percep.backward()
    assert percep > 0 and style is None and x.grad.abs().max() > 0
    assert loss(x, x)[0] == 0
    assert not any(parameter.requires_grad for parameter in loss.parameters())

    usual = tmp_path / 'experiments' / 'pretrained_models'
    usual.mkdir(parents=True)
    (usual / 'vgg19-dcbb9e9d.pth').symlink_to(weights['vgg'])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r'experiments/pretrained_models/vgg19-dcbb9e9d\.pth does not contain vgg19'):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS})


def test_errors_say_where_to_put_missing_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    place = r'experiments/pretrained_models/vgg19-dcbb9e9d\.pth'
    with pytest.raises(
        FileNotFoundError,
        match=rf'vgg19; there is no {place} and no .*torch/hub.*`dpmambair fetch vgg19` downloads http',
    ):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS})
    with pytest.raises(FileNotFoundError, match=r'there is no nowhere\.pth\. '):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS, 'weights': 'nowhere.pth'})
    with pytest.raises(ValueError, match="vgg_type: must be one of vgg11, .*, got 'vgg99'"):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS, 'vgg_type': 'vgg99'})
