"""The files that BasicSR's own image datasets read."""


def paths_by_folder(dataset, opt: dict) -> list[tuple[str, list[str]]]:
    """The folders of a BasicSR image dataset on disk, each with the paths that it will read; [] for any other.

    Args:
        opt: the options of its constructor.
    """
    on_disk = (opt.get('io_backend') or {}).get('type', 'disk') == 'disk'
    if not on_disk or not type(dataset).__module__.startswith('basicsr.'):
        return []
    only = 'gt' if 'dataroot_gt' in opt else 'lq'  # whose paths are not named
    found = []
    for role in ('lq', 'gt'):
        paths = [
            path.get(f'{role}_path') if isinstance(path, dict) else path
            for path in getattr(dataset, 'paths', ())
            if isinstance(path, dict) or role == only
        ]
        if isinstance(opt.get(f'dataroot_{role}'), str):
            found.append((opt[f'dataroot_{role}'], [*filter(None, paths)]))
    return found


def channels(kind: str, opt: dict) -> int | None:
    """Channels of the images of a dataset of type `kind`; None if only the dataset itself knows."""
    ours = ('PairedDegradationDataset', 'SyntheticDegradationDataset', 'MixedDegradationDataset')
    if kind in (*ours, 'RealESRGANDataset', 'RealESRGANPairedDataset'):
        return 3
    if kind in ('PairedImageDataset', 'SingleImageDataset'):
        return 1 if opt.get('color') == 'y' else 3
    return None
