#!/usr/bin/env bash
# Installs the package in fresh environments, as docs/install.md says, and uses it: `bash scripts/check_install.sh python3.12 python3.13`.
# For each Python: restoring without BasicSR, then training with it; pip check after both, times and sizes. Needs 8 GB each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout="$PWD"
unset PYTHONPATH
for python in "${@:-python3}"; do
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    say() { echo "$("$python" --version), $SECONDS s: $1"; }
    SECONDS=0
    "$python" -m venv "$work/venv"
    export PATH="$work/venv/bin:$PATH"
    pip install --quiet --disable-pip-version-check "$checkout"
    pip check
    say "core installed, $(du -sm "$work/venv" | cut -f1) MB"
    cd "$work"
    python - <<'PYTHON'
import importlib.util, json
import cv2, numpy as np, torch
from dpmambair_basicsr.archs import VmambaIR
assert importlib.util.find_spec('basicsr') is None
options = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
torch.manual_seed(0)
net = VmambaIR(**options)
torch.save({'params': net.state_dict(), 'network_g': {'type': 'VmambaIR', **options}}, 'net.pth')
for folder, size in (('pictures', 70), ('pairs/lq', 48), ('pairs/gt', 48)):
    import os
    os.makedirs(folder)
    for name in 'ab':
        cv2.imwrite(f'{folder}/{name}.png', np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8))
PYTHON
    dpmambair restore -w net.pth pictures -o without
    dpmambair convert net.pth net.safetensors
    if dpmambair train -opt train_your_own.yml > train.log 2>&1; then echo "trained without BasicSR?"; exit 1; fi
    grep -q "install_basicsr" train.log
    say "restored without BasicSR"
    pip install --quiet --disable-pip-version-check "$checkout[train]"
    dpmambair install_basicsr --quiet --disable-pip-version-check
    pip check
    say "BasicSR installed, $(du -sm "$work/venv" | cut -f1) MB"
    dpmambair restore -w net.pth pictures -o with
    cmp without/a.png with/a.png && cmp without/b.png with/b.png
    dpmambair init .
    dpmambair train -opt options/train_your_own.yml --force_yml num_gpu=0 "datasets:train:dataroot_lq=$work/pairs/lq" \
        "datasets:train:dataroot_gt=$work/pairs/gt" "datasets:val:dataroot_lq=$work/pairs/lq" "datasets:val:dataroot_gt=$work/pairs/gt" \
        datasets:train:gt_size=16 train:total_iter=2 val:val_freq=2 logger:save_checkpoint_freq=2 network_g:dim=16 > train.log 2>&1 || { cat train.log; exit 1; }
    ls experiments/*/models/net_g_2.pth
    say "trained two iterations"
    cd "$checkout"
    rm -rf "$work"
done
