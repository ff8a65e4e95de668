"""Keeps the best network of a training, by the first metric of `val.metrics` averaged over the validation sets."""

import math
from pathlib import Path

from basicsr.utils import get_root_logger

from dpmambair_basicsr.files.checkpoints import plain, read_checkpoint
from dpmambair_basicsr.training.state import network_file, read_nets, write_alone


def validated_sets(opt: dict) -> list[str]:
    """Names of the datasets that BasicSR's train.py or test.py validates."""
    sets = opt['datasets'].items()
    return [data['name'] for phase, data in sets if phase.split('_')[0] == 'val' or not opt['is_train']]


class BestCheckpoint:
    """Keeps net_g_best.pth. Its value is in the same file, so a resumed training continues from there.

    Args:
        opt: of the training.
        suffix: .pth or .safetensors.
    """

    def __init__(self, opt: dict, suffix: str = '.pth'):
        self.opt, self.suffix = opt, suffix
        self.best: dict | None = None

    @property
    def file(self) -> Path:
        return Path(self.opt['path']['models']) / f'net_g_best{self.suffix}'

    def measure(self) -> dict:
        """The measure of the best network; values of another measure are not comparable."""
        metric, options = next(iter(self.opt['val']['metrics'].items()))
        tiles = {key: value for key, value in self.opt['val'].items() if key in ('tile', 'overlap', 'one_pass')}
        return {
            'metric': metric,
            'options': dict(options),
            'sets': validated_sets(self.opt),
            'tiles': tiles if tiles.get('tile') else None,  # None also in files from before there were tiles
        }

    def is_better(self, value: float, better: str) -> bool:
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        return value < self.best['value'] if better == 'lower' else value > self.best['value']

    def offer(self, model, averages: dict[str, float], current_iter: int) -> None:
        """Saves the model's network if its averages are the best so far. Raises what `training.state.write` does."""
        measure = self.measure()
        value = averages[measure['metric']]
        if not self.is_better(value, measure['options'].get('better', 'higher')):
            return
        # BasicSR counts one too many after the last iteration.
        best = measure | {'value': value, 'iter': min(current_iter, int(self.opt['train']['total_iter']))}
        nets = {'params': model.net_g, 'params_ema': getattr(model, 'net_g_ema', None)}
        content = read_nets(model, {key: net for key, net in nets.items() if net is not None}, self.file.name)
        write_alone(content | {'network_g': plain(self.opt['network_g']), 'best': best}, self.file)
        self.best = best
        get_root_logger().info(f'Best {best["metric"]} so far, {value:.4f}: saved as {self.file.name}.')

    def resume(self) -> None:
        """Continues from the best network saved by the interrupted training."""
        file = network_file(self.file.parent, self.file.stem)
        if not (self.opt.get('val') or {}).get('metrics') or not file.is_file():
            return
        try:
            best = read_checkpoint(str(file)).get('best') or {}
        except ValueError as error:
            get_root_logger().warning(f'{error}. The search for the best network starts over.')
            return
        measure = self.measure()
        if {key: best.get(key) for key in measure} != measure:
            get_root_logger().warning(
                f'{file}: was the best by another measure, and will be replaced by the best from now on.'
            )
            return
        self.best = best
        get_root_logger().info(f'Best {best["metric"]} so far: {best["value"]:.4f}, of iteration {best["iter"]}.')
