"""Reports of our models on a run: the results table of a test, averages, sample images, the degradations drawn."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import basicsr
import torch
from basicsr.metrics import calculate_metric
from basicsr.utils import get_root_logger, tensor2img
from basicsr.utils.options import copy_opt_file
from torch import Tensor
from torch.nn import functional as F

import dpmambair_basicsr
from dpmambair_basicsr.files.atomic import sha256
from dpmambair_basicsr.files.codec import write_image
from dpmambair_basicsr.models.best_checkpoint import validated_sets
from dpmambair_basicsr.results.run import Run, Sample, SetResult, mean, to_markdown, write_run
from dpmambair_basicsr.training.command_line import command_line

SAMPLES = 2  # images of each validation set in TensorBoard
SAMPLE_HEIGHT = 256


class ValidationMonitor:
    """Watches validation and testing, set by set, and aggregates over sets, which BasicSR does not.

    A round comprises all sets of `datasets`.
        Test: after the last set, the table is logged and written to the results folder: `results.run`.
        Training: the metrics of the unrestored input are logged once, the average over the sets each time. TensorBoard
            gets the averages and sample images: input, output, ground truth.

    Args:
        opt: of the training or the test.
    """

    def __init__(self, opt: dict):
        self.opt, self.is_train = opt, opt['is_train']
        self.drawn: Counter[str] = Counter()  # degradation -> training items so far
        self.checkpoint = {'checkpoint': '', 'param_key': '', 'sha256': ''}
        self.round: list[SetResult] = []
        self.current: SetResult | None = None  # while a set is being validated
        self.inputs_measured: set[str] = set()  # validation sets of a training

    # The training items

    def note_items(self, data: dict) -> None:
        """Records the items of a training or validation batch."""
        kinds = [kind for kind in data.get('degradation', ()) if kind]
        if self.current is None:
            self.drawn.update(kinds)
        else:
            self.current_path = data['lq_path'][0]
            self.is_stored = data.get('gt_path') != data['lq_path']  # else it was degraded on the fly
            self.current_kinds.update(kinds)

    def log_drawn(self) -> None:
        if self.drawn and 'degradation' not in self.opt['datasets']['train']:  # otherwise there is only one
            total = sum(self.drawn.values())
            counts = ', '.join(f'{kind} {n} ({n / total:.1%})' for kind, n in sorted(self.drawn.items()))
            get_root_logger().info(f'Drawn so far by this process: {counts}.')

    # One set

    @contextmanager
    def watching(self, dataloader, tb_logger, current_iter: int | str) -> Iterator[None]:
        """Active while BasicSR validates a set."""
        self.current = SetResult(dataloader.dataset.opt['name'], count=len(dataloader))
        self.current_kinds, self.totals, self.position = set(), Counter(), 0
        self.samples = [] if tb_logger and self.is_train else None
        try:
            yield
        finally:
            self.done, self.current = self.current, None
        for index, sample in enumerate(self.samples or ()):
            tb_logger.add_image(f'{self.done.name}/{index}', sample, current_iter)

    def note_image(self, degraded: Tensor, is_lq: bool, visuals: dict[str, Tensor]) -> None:
        """Records one image of the set.

        Args:
            degraded: the input of the network, (1, 3, h, w).
            is_lq: whether it is `lq` of the dataset.
            visuals: the images that BasicSR compares, `result` and possibly `gt`.
        """
        if self.current is None:
            return
        degraded = degraded.detach().cpu()
        if not self.is_train:
            self.note_input_file(self.current, degraded, is_lq)
            self.note_sample(self.current, degraded, visuals)
        if not self.is_train or self.current.name not in self.inputs_measured:
            self.measure_input(degraded, visuals)
        if self.samples is not None and len(self.samples) < SAMPLES:
            truth = [visuals['gt']] if 'gt' in visuals else []
            self.samples.append(side_by_side([degraded, visuals['result'], *truth]))

    def note_input_file(self, result: SetResult, degraded: Tensor, is_lq: bool) -> None:
        """Records the file of the network's input; saves the input if there is none."""
        path = os.path.abspath(self.current_path)
        name = Path(path).stem
        is_file = self.is_stored and is_lq and os.path.isfile(path)
        if self.opt['val'].get('save_img') and not is_file:
            path = os.path.join(self.opt['path']['results_root'], 'input', result.name, f'{name}.png')
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_image(path, tensor2img([degraded]))
        result.images[name] = path

    def note_sample(self, current: SetResult, degraded: Tensor, visuals: dict[str, Tensor]) -> None:
        """Record what `verify` needs: hashes, and the values of the first, middle and last image."""
        name, index, count = Path(self.current_path).stem, self.position, current.count
        self.position += 1
        current.hashes[name] = hash_of(degraded)
        if index in (0, count // 2, count - 1):
            truth = hash_of(visuals['gt']) if 'gt' in visuals else ''
            pair = measured_pair(visuals['result'], visuals)
            values = {
                metric: float(calculate_metric(pair, options))
                for metric, options in (self.opt['val'].get('metrics') or {}).items()
            }
            restored = hashlib.sha256(pair['img'].tobytes()).hexdigest()
            current.samples[name] = Sample(index, truth, restored, values)

    def measure_input(self, degraded: Tensor, visuals: dict[str, Tensor]) -> None:
        """Adds the metrics of the network's input to `totals`, if it has the size of the result."""
        if degraded.shape == visuals['result'].shape:
            pair = measured_pair(degraded, visuals)
            for metric, options in (self.opt['val'].get('metrics') or {}).items():
                self.totals[metric] += calculate_metric(pair, options)

    # All sets

    def finish_set(self, restored: dict[str, float], tb_logger, current_iter: int | str) -> dict[str, float] | None:
        """Records the metrics of a set.

        Returns:
            In training, after the last set of a round: the averages over the sets.
        """
        done = self.done
        if not self.opt['val'].get('metrics'):
            return None
        done.degradation = self.current_kinds.pop() if len(self.current_kinds) == 1 else ''
        done.restored = {metric: float(value) for metric, value in restored.items()}
        done.unrestored = {metric: float(total) / done.count for metric, total in self.totals.items()}
        if self.is_train and done.name not in self.inputs_measured:
            self.inputs_measured.add(done.name)
            values = ', '.join(f'{metric} {value:.4f}' for metric, value in done.unrestored.items())
            get_root_logger().info(f'Validation {done.name}: the unrestored input has {values or "another size"}.')
        self.round.append(done)
        if len(self.round) != len(validated_sets(self.opt)):
            return None
        complete, self.round = self.round, []
        if self.is_train:
            return self.average(complete, tb_logger, current_iter)
        self.write_results(complete)
        return None

    def average(self, sets: list[SetResult], tb_logger, current_iter: int | str) -> dict[str, float]:
        averages = mean([part.restored for part in sets])
        if len(sets) > 1:
            values = ''.join(f'\t # {metric}: {value:.4f}\n' for metric, value in averages.items())
            get_root_logger().info(f'Validation average of {len(sets)} sets\n{values}')
        if tb_logger:
            for metric, value in averages.items():
                tb_logger.add_scalar(f'metrics/average/{metric}', value, current_iter)
        return averages

    def note_checkpoint(self, file: str, param_key: str | None) -> None:
        """Records the tested checkpoint when it is read, as a running training may overwrite it."""
        if not self.is_train:
            self.checkpoint = {'checkpoint': str(file), 'param_key': param_key or '', 'sha256': sha256(file)}

    def circumstances(self) -> dict[str, str]:
        """What the last bits of results depend on: the device, and {package: version}."""
        packages = {'torch': torch, 'basicsr': basicsr, 'dpmambair_basicsr': dpmambair_basicsr}
        versions = {name: str(package.__version__) for name, package in packages.items()}
        return {'device': device_name(self.opt), **versions}

    def write_results(self, sets: list[SetResult]) -> None:
        file, forced = command_line()
        opt = self.opt
        versions = self.circumstances()
        device = versions.pop('device')
        run = Run(
            name=opt['name'],
            options=file or '',
            forced=forced,
            **self.checkpoint,
            versions=versions,
            metrics={name: dict(metric) for name, metric in opt['val']['metrics'].items()},
            suffix=opt['val'].get('suffix') or opt['name'],
            sets=sets,
            device=device,
        )
        folder = opt['path'].get('results_root')
        if folder is not None:
            if file:
                copy_opt_file(file, folder)
            write_run(run, folder)
        get_root_logger().info(f'Results of {run.name}\n\n{to_markdown(run)}')


@contextmanager
def folder_of_set(opt: dict, name: str) -> Iterator[None]:
    """In training with several validation sets: saves their images below the set's name, as a test does.

    BasicSR's names are the images' alone, so those of one set would replace those of another.
    """
    paths, folder = opt['path'], opt['path'].get('visualization')
    if folder is None or not opt['is_train'] or len(validated_sets(opt)) == 1:
        yield
        return
    paths['visualization'] = os.path.join(folder, name)
    try:
        yield
    finally:
        paths['visualization'] = folder


def measured_pair(image: Tensor, visuals: dict[str, Tensor]) -> dict:
    """The arguments of a metric: 8-bit images, the second only with a ground truth."""
    return {'img': tensor2img([image])} | ({'img2': tensor2img([visuals['gt']])} if 'gt' in visuals else {})


def hash_of(image: Tensor) -> str:
    """SHA-256 of the float32 values, (1, 3, h, w) in C order."""
    return hashlib.sha256(image.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()


def device_name(opt: dict) -> str:
    """The device, in as much detail as the last bits of results may depend on."""
    if opt['num_gpu'] and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    kind = 'mps' if opt['num_gpu'] and torch.backends.mps.is_available() else 'cpu'
    return f'{kind} ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)'


def side_by_side(images: list[Tensor]) -> Tensor:
    """(1, 3, h, w) of any sizes -> one (3, h, n w) of the last one's size, at most SAMPLE_HEIGHT high, in [0, 1]."""
    height, width = images[-1].shape[-2:]
    factor = min(1.0, SAMPLE_HEIGHT / height)
    size = round(height * factor), max(1, round(width * factor))
    return torch.cat([F.interpolate(image.float(), size, mode='area') for image in images], dim=3)[0].clamp(0, 1)
