"""VmambaIR's recipes: each option file trains, resumes and tests, reduced; what the GAN and real-world models add."""

import copy
import re

import in_process
import pytest
import torch
import yaml
from basicsr.losses import build_loss
from basicsr.models import build_model
from basicsr.utils import set_random_seed
from basicsr.utils.options import ordered_yaml
from basicsr_runs import python
from torchvision.models import vgg

TINY_NET = {'dim': 4, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1}
RECIPES = {
    'derain': ['l_pix'],
    'sisr_x4': ['l_pix'],
    'sisr_x4_gan': ['l_g_pix', 'l_g_percep', 'l_g_gan', 'l_d_real', 'out_d_real', 'l_d_fake', 'out_d_fake'],
    'realsr_x4': ['l_pix'],
    'realsr_x4_gan': ['l_g_pix', 'l_g_percep', 'l_g_gan', 'l_d_real', 'out_d_real', 'l_d_fake', 'out_d_fake'],
}


def option_file(stage, recipe):
    return in_process.ROOT / 'options' / f'{stage}_vmambair_{recipe}.yml'


def options(stage, recipe):
    return yaml.load(option_file(stage, recipe).read_text(), Loader=ordered_yaml()[0])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """{scale: data set options}, and under 'photos' those of RealESRGANDataset."""
    folder = tmp_path_factory.mktemp('data')
    pairs = {
        scale: in_process.write_pairs(folder / f'x{scale}', [(44, 52), (40, 40), (60, 44), (48, 48)], scale)
        for scale in (1, 4)
    }
    return pairs | {'photos': in_process.write_photos(folder / 'photos')}


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """{'vgg19', 'vgg16'}: files like torchvision's, of random numbers; {'sisr_x4', 'realsr_x4'}: first stages."""
    folder = tmp_path_factory.mktemp('weights')
    torch.manual_seed(0)
    files = {}
    for name, channels in {'vgg19': vgg.cfgs['E'], 'vgg16': vgg.cfgs['D']}.items():
        state = vgg.make_layers(channels).state_dict()
        state = {f'features.{key}': torch.randn_like(value) * value.std() for key, value in state.items()}
        for key, value in vgg_head().items():
            state[f'classifier.{key}'] = value
        files[name] = folder / f'{name}.pth'
        torch.save(state, files[name])
    for recipe in ('sisr_x4', 'realsr_x4'):
        net = build_model(reduced(options('test', recipe))).net_g
        files[recipe] = folder / f'{recipe}.pth'
        torch.save({'params_ema': net.state_dict()}, files[recipe])  # as released, but both keys are there
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
        changes['val:metrics:lpips:weights'] = weights['vgg16']
    return changes


@pytest.mark.parametrize('recipe', RECIPES)
def test_recipe_trains_resumes_and_tests(recipe, data, weights, tmp_path):
    """In this process, but for one recipe, which runs as the commands that users type."""

    def run(stage, *arguments, file=recipe):
        if recipe != 'derain':
            return getattr(in_process, stage)(option_file(stage, file), *arguments, cwd=tmp_path)
        result = python('-m', f'dpmambair_basicsr.{stage}', '-opt', option_file(stage, file), *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
        return result.stdout

    changes = changes_for_train(recipe, data, weights)
    log = run('train', *forced(changes))
    for name in RECIPES[recipe]:
        assert len(re.findall(rf'iter: .* {name}: ', log)) == 4, f'{name} in every iteration'
    assert re.search(r'# psnr: \d+\.\d+', log)
    experiment = tmp_path / 'experiments' / f'train_vmambair_{recipe}'
    saved = torch.load(experiment / 'models/net_g_4.pth', weights_only=True)
    assert list(saved) == (['params'] if recipe == 'derain' else ['params', 'params_ema'])
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
    with pytest.raises(ValueError, match=r"other\.pth: holds no key 'params_ema'"):
        load_test_model('sisr_x4', tmp_path / 'other.pth')


# The GAN model.


def sisr_gan_model(**train_changes):
    opt = reduced(options('train', 'sisr_x4_gan'))
    opt['train'] |= train_changes
    torch.manual_seed(0)
    model = build_model(opt)
    model.feed_data({'lq': torch.rand(2, 3, 8, 8), 'gt': torch.rand(2, 3, 32, 32)})
    return model


def test_both_networks_and_the_average_learn():
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


def test_each_network_has_its_schedule():
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
        ('train', 'fft_opt', {'type': 'FFTLoss'}, r'^train\.fft_opt: .* pixel_opt, perceptual_opt, gan_opt only'),
    ],
)
def test_incomplete_gan_options_name_the_key(section, key, value, message):
    opt = reduced(options('train', 'sisr_x4_gan'))
    (opt if section is None else opt[section])[key] = value
    with pytest.raises(ValueError, match=message):
        build_model(opt)


def test_cosine_that_ends_too_early_is_refused():
    """BasicSR's would fail with a TypeError at the end of its periods."""
    opt = reduced(options('train', 'sisr_x4'))
    opt['train']['scheduler'] = {'type': 'CosineAnnealingRestartLR', 'periods': [99999], 'eta_min': 1e-6}
    with pytest.raises(ValueError, match=r'periods sum to 99999, train\.total_iter is 100000'):
        build_model(opt)


# The real-world models.


def degraded_batches(model, count, level=lambda index: 0.5):
    """Feeds `count` batches of two noise pictures of mean `level(index)` and yields after each."""
    set_random_seed(0)
    kernel = torch.zeros(2, 21, 21)
    kernel[:, 10, 10] = 1
    for index in range(count):
        gt = level(index) + 0.3 * (torch.rand(2, 3, 96, 96) - 0.5)
        model.feed_data({'gt': gt, 'kernel1': kernel, 'kernel2': kernel, 'sinc_kernel': kernel})
        yield model.lq, model.gt


@pytest.mark.parametrize('recipe', ['realsr_x4', 'realsr_x4_gan'])
def test_degradation_on_the_cpu(recipe):
    model = build_model(reduced(options('train', recipe)))
    for lq, gt in degraded_batches(model, 5):
        assert lq.shape == (2, 3, 8, 8) and gt.shape == (2, 3, 32, 32)
        assert lq.device.type == gt.device.type == 'cpu'
        assert torch.equal(lq, (lq * 255).round() / 255) and 0 <= lq.min() <= lq.max() <= 1
        model.optimize_parameters(1)
        assert all(value == value for value in model.log_dict.values())


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
def test_bad_degradation_options_name_the_key(change, message):
    opt = reduced(options('train', 'realsr_x4_gan')) | change
    opt = {key: value for key, value in opt.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        build_model(opt)


# The perceptual loss.

LAYERS = {'conv1_2': 0.1, 'conv2_2': 0.1}


def test_perceptual_loss_of_given_weights(weights, tmp_path, monkeypatch):
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
    (usual / 'vgg19-dcbb9e9d.pth').symlink_to(weights['vgg16'])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r'experiments/pretrained_models/vgg19-dcbb9e9d\.pth does not hold vgg19'):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS})


def test_absent_weights_say_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    place = r'experiments/pretrained_models/vgg19-dcbb9e9d\.pth'
    with pytest.raises(
        FileNotFoundError, match=rf'vgg19; there is no {place} and no .*torch/hub.*Download http.* to {place}'
    ):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS})
    with pytest.raises(FileNotFoundError, match=r'there is no nowhere\.pth\. '):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS, 'weights': 'nowhere.pth'})
    with pytest.raises(ValueError, match="vgg_type: 'vgg99' is not one of vgg11, "):
        build_loss({'type': 'VGGPerceptualLoss', 'layer_weights': LAYERS, 'vgg_type': 'vgg99'})
