"""What our models tell about a run: the table of a test, the best checkpoint, sample images, the degradations drawn."""

import math
import os
from collections import Counter, OrderedDict
from pathlib import Path

import basicsr
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import get_root_logger, imwrite, tensor2img
from torch import Tensor
from torch.nn import functional as F

import dpmambair_basicsr
from dpmambair_basicsr.files.atomic import sha256
from dpmambair_basicsr.files.checkpoints import plain, read_checkpoint
from dpmambair_basicsr.results.run import Run, SetResult, mean, to_markdown, write_run
from dpmambair_basicsr.training.command_line import command_line
from dpmambair_basicsr.training.state import read_nets, write

SAMPLES = 2  # images of each validation set in TensorBoard
SAMPLE_HEIGHT = 256


class MonitoringHooks:
    """Mix-in for SRModel and its descendants; each public method of theirs is extended, none replaced.

    BasicSR validates set by set and compares nothing across sets; here a round is all sets of `datasets`.
        Test: after the last set the table is logged, and written to the results folder: `results.run`.
        Training: the metrics of the unrestored input are logged once, the average over the sets each time, and the
            network with the best average of the first metric of `val.metrics` is kept as net_g_best.pth. Its value is
            in the same file, so a resumed training goes on from there. TensorBoard gets the averages and sample images:
            input, output, truth.
    """

    def __init__(self, opt: dict):
        self.drawn = Counter()  # degradation -> training items so far
        self.checkpoint = {'checkpoint': '', 'param_key': '', 'sha256': ''}
        self.best: dict | None = None
        self.round: list[SetResult] = []
        self.current: SetResult | None = None  # while a set is being validated
        self.inputs_measured: set[str] = set()  # validation sets of a training
        super().__init__(opt)

    # The training items

    def feed_data(self, data: dict) -> None:
        super().feed_data(data)
        kinds = [kind for kind in data.get('degradation', ()) if kind]
        if self.current is None:
            self.drawn.update(kinds)
        else:
            self.current_path = data['lq_path'][0]
            self.is_stored = data.get('gt_path') != data['lq_path']  # else it was degraded on the fly
            self.current_kinds.update(kinds)

    def get_current_log(self) -> dict:
        """BasicSR asks for it every `logger.print_freq` iterations."""
        if self.drawn and 'degradation' not in self.opt['datasets']['train']:  # where it is, there is but one
            counts = ', '.join(f'{kind} {n} ({n / self.drawn.total():.1%})' for kind, n in sorted(self.drawn.items()))
            get_root_logger().info(f'Drawn so far by this process: {counts}.')
        return super().get_current_log()

    # One set

    def nondist_validation(self, dataloader, current_iter: int | str, tb_logger, save_img: bool) -> None:
        self.current = SetResult(dataloader.dataset.opt['name'], count=len(dataloader))
        self.current_kinds, self.totals = set(), Counter()
        self.samples = [] if tb_logger and self.opt['is_train'] else None
        try:
            super().nondist_validation(dataloader, current_iter, tb_logger, save_img)
        finally:
            done, self.current = self.current, None
        for index, sample in enumerate(self.samples or ()):
            tb_logger.add_image(f'{done.name}/{index}', sample, current_iter)
        if not self.opt['val'].get('metrics'):
            return
        done.degradation = self.current_kinds.pop() if len(self.current_kinds) == 1 else ''
        done.restored = {metric: float(value) for metric, value in self.metric_results.items()}
        done.unrestored = {metric: float(total) / done.count for metric, total in self.totals.items()}
        if self.opt['is_train'] and done.name not in self.inputs_measured:
            self.inputs_measured.add(done.name)
            values = ', '.join(f'{metric} {value:.4f}' for metric, value in done.unrestored.items())
            get_root_logger().info(f'Validation {done.name}: the unrestored input has {values or "another size"}.')
        self.round.append(done)
        if len(self.round) == len(self.set_names()):
            complete, self.round = self.round, []
            if self.opt['is_train']:
                self.finish_validation(complete, current_iter, tb_logger)
            else:
                self.finish_test(complete)

    def get_current_visuals(self) -> 'OrderedDict[str, Tensor]':
        """BasicSR's validation asks for it once per image."""
        visuals = super().get_current_visuals()
        if self.current is not None:
            degraded = self.network_inputs()[0].detach().cpu()
            if not self.opt['is_train']:
                self.note_image(degraded)
            if not self.opt['is_train'] or self.current.name not in self.inputs_measured:
                self.measure_input(degraded, visuals)
            if self.opt['is_train'] and self.samples is not None and len(self.samples) < SAMPLES:
                truth = [visuals['gt']] if 'gt' in visuals else []
                self.samples.append(side_by_side([degraded, visuals['result'], *truth]))
        return visuals

    def note_image(self, degraded: Tensor) -> None:
        """Where the network's input can be seen: saved if there is no file of it."""
        path = os.path.abspath(self.current_path)
        name = Path(path).stem
        is_file = self.is_stored and self.network_inputs()[0] is self.lq and os.path.isfile(path)
        if self.opt['val'].get('save_img') and not is_file:
            path = os.path.join(self.opt['path']['results_root'], 'input', self.current.name, f'{name}.png')
            imwrite(tensor2img([degraded]), path)
        self.current.images[name] = path

    def measure_input(self, degraded: Tensor, visuals: dict[str, Tensor]) -> None:
        """Add the metrics of the network's input to `totals`, if it has the size of the result."""
        if degraded.shape == visuals['result'].shape:
            pair = {'img': tensor2img([degraded])} | ({'img2': tensor2img([visuals['gt']])} if 'gt' in visuals else {})
            for metric, options in (self.opt['val'].get('metrics') or {}).items():
                self.totals[metric] += calculate_metric(pair, options)

    # All sets

    def set_names(self) -> list[str]:
        """The sets that BasicSR's train.py or test.py validates."""
        sets = self.opt['datasets'].items()
        return [data['name'] for phase, data in sets if phase.split('_')[0] == 'val' or not self.opt['is_train']]

    def note_checkpoint(self, file: str, param_key: str | None) -> None:
        """The tested network's, at the time it is read: a training may go on and write it again."""
        if not self.opt['is_train']:
            self.checkpoint = {'checkpoint': str(file), 'param_key': param_key or '', 'sha256': sha256(file)}

    def finish_test(self, sets: list[SetResult]) -> None:
        file, forced = command_line()
        opt = self.opt
        packages = {'torch': torch, 'basicsr': basicsr, 'dpmambair_basicsr': dpmambair_basicsr}
        run = Run(
            name=opt['name'],
            options=file or '',
            forced=forced,
            **self.checkpoint,
            versions={name: str(package.__version__) for name, package in packages.items()},
            metrics={name: dict(metric) for name, metric in opt['val']['metrics'].items()},
            suffix=opt['val'].get('suffix') or opt['name'],
            sets=sets,
        )
        folder = opt['path'].get('results_root')
        if folder is not None:
            write_run(run, folder)
        get_root_logger().info(f'Results of {run.name}\n\n{to_markdown(run)}')

    def finish_validation(self, sets: list[SetResult], current_iter: int, tb_logger) -> None:
        averages = mean([part.restored for part in sets])
        if len(sets) > 1:
            values = ''.join(f'\t # {metric}: {value:.4f}\n' for metric, value in averages.items())
            get_root_logger().info(f'Validation average of {len(sets)} sets\n{values}')
        if tb_logger:
            for metric, value in averages.items():
                tb_logger.add_scalar(f'metrics/average/{metric}', value, current_iter)
        self.keep_best(averages, current_iter)

    # The best checkpoint

    def best_file(self) -> Path:
        return Path(self.opt['path']['models']) / 'net_g_best.pth'

    def measure(self) -> dict:
        """What the best network is best in: values of another measure cannot be compared with it."""
        metric, options = next(iter(self.opt['val']['metrics'].items()))
        return {'metric': metric, 'options': dict(options), 'sets': self.set_names()}

    def keep_best(self, averages: dict[str, float], current_iter: int) -> None:
        """Saves the network if it is better than the best. Raises what `training.state.write` and `read_nets` do."""
        measure = self.measure()
        value = averages[measure['metric']]
        lower_is_better = measure['options'].get('better') == 'lower'
        if not math.isfinite(value):
            return
        if self.best is not None and not (
            value < self.best['value'] if lower_is_better else value > self.best['value']
        ):
            return
        # BasicSR counts one too many after the last iteration.
        best = measure | {'value': value, 'iter': min(current_iter, int(self.opt['train']['total_iter']))}
        nets = {'params': self.net_g, 'params_ema': getattr(self, 'net_g_ema', None)}
        file = self.best_file()
        content = read_nets(self, {key: net for key, net in nets.items() if net is not None}, file.name)
        write(content | {'network_g': plain(self.opt['network_g']), 'best': best}, file)
        self.best = best
        get_root_logger().info(f'Best {best["metric"]} so far, {value:.4f}: saved as {file.name}.')

    def resume_training(self, resume_state: dict) -> None:
        """Goes on from the best that the interrupted training has saved."""
        super().resume_training(resume_state)
        file, metrics = self.best_file(), (self.opt.get('val') or {}).get('metrics')
        if not metrics or not file.is_file():
            return
        try:
            best = read_checkpoint(str(file)).get('best') or {}
        except ValueError as error:
            get_root_logger().warning(f'{error}. The best network is looked for anew.')
            return
        measure = self.measure()
        if {key: best.get(key) for key in measure} != measure:
            get_root_logger().warning(
                f'{file}: is the best by another measure, and is replaced by the best from now on.'
            )
            return
        self.best = best
        get_root_logger().info(f'Best {best["metric"]} so far: {best["value"]:.4f}, of iteration {best["iter"]}.')


def side_by_side(images: list[Tensor]) -> Tensor:
    """(1, 3, h, w) of any sizes -> one (3, h, n w) of the last one's size, at most SAMPLE_HEIGHT high, in [0, 1]."""
    height, width = images[-1].shape[-2:]
    factor = min(1.0, SAMPLE_HEIGHT / height)
    size = round(height * factor), max(1, round(width * factor))
    return torch.cat([F.interpolate(image.float(), size, mode='area') for image in images], dim=3)[0].clamp(0, 1)
