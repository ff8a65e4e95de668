#!/usr/bin/env bash
# Install the package in fresh environments as in README.md, and use it: `bash scripts/check_install.sh python3.12 python3.13`.
# For each Python: restoring without BasicSR, every extra in a copy of this environment, then training with BasicSR; `pip check`
# after each. Prints the rows of the table in docs/install.md. Installs the committed state; needs 9 GB of disk. EXTRAS= skips the extras,
# UV=uv installs with uv instead of pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH

install() {
    if [ -n "${UV:-}" ]; then
        "$UV" pip install --quiet --python "$environment/bin/python" "$@"
    else
        python -m pip install --quiet --disable-pip-version-check "$@"
    fi
}

row() { # what was installed, and in how many seconds
    python -m pip check > pip_check.log || { cat pip_check.log; exit 1; }
    echo "| $version | $1 | $2 s | $(du -sm "$environment" | cut -f1) MB |"
}

use() { # use what the extra provides
    case $1 in
        app)
            python -u -m dpmambair_basicsr app --no-browser --port 0 > page.log 2>&1 &
            until grep http://127 page.log; do kill -0 $! || return 1; sleep 1; done
            kill $!
            ;;
        export) python -m dpmambair_basicsr export -w net.pth -o net.onnx ;;
        hub)
            mkdir -p hub/models--someone--net/{refs,snapshots/1}
            printf 1 > hub/models--someone--net/refs/main
            cp net.safetensors hub/models--someone--net/snapshots/1/model.safetensors
            HF_HUB_OFFLINE=1 HF_HUB_CACHE=hub python -m dpmambair_basicsr restore -w hf:someone/net pictures -o from_hub
            cmp without/a.png from_hub/a.png ;;
        losses) python -c 'import torch; from dpmambair_basicsr.losses import MSSSIMLoss as L; assert L()(*torch.rand(2, 1, 3, 192, 192)) > 0' ;;
        spandrel) python -c 'import spandrel; from dpmambair_basicsr.integrations.spandrel import install; install(); spandrel.ModelLoader().load_from_file("net.pth")' ;;
        video)
            python -c 'import av, numpy as np
with av.open("video.mp4", "w") as file:
    stream = file.add_stream("mpeg4", rate=5, width=64, height=64)
    for frame in [av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8))] * 3:
        file.mux(stream.encode(frame))
    file.mux(stream.encode())'
            python -m dpmambair_basicsr restore -w net.pth video.mp4 -o videos
            ;;
        viewer) python -m dpmambair_basicsr degradation -w "$weights" pictures --clean pictures -o map.png --map tsne && test -s map.png ;;
        test) (cd checkout && ruff check . && python -m build --no-isolation --outdir ../dist . && twine check --strict ../dist/*) ;;
    esac
}

for base in "${@:-python3}"; do
    work="$(mktemp -d)"
    trap 'rm -rf "$work"' EXIT
    git clone --quiet . "$work/checkout"
    pushd "$work" > /dev/null
    version="$("$base" -c 'import platform; print(platform.python_version())')"
    weights=checkout/dpmambair_basicsr/weights/dpmambair_small_trial.safetensors
    environment="$work/core"
    "$base" -m venv "$environment"
    path="$PATH"
    export PATH="$environment/bin:$path"

    SECONDS=0
    (cd checkout && install .)
    row 'pictures' $SECONDS
    python - << 'PYTHON'
import importlib.util
from pathlib import Path
import cv2, numpy as np, torch
from dpmambair_basicsr.archs import VmambaIR
assert importlib.util.find_spec('basicsr') is None
options = {'dim': 16, 'num_blocks': [1, 1, 1, 1], 'num_refinement_blocks': 1, 'd_state': 2}
torch.manual_seed(0)
torch.save({'params': VmambaIR(**options).state_dict(), 'network_g': {'type': 'VmambaIR', **options}}, 'net.pth')
for folder in ('pictures', 'pairs/lq', 'pairs/gt'):
    Path(folder).mkdir(parents=True)
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        cv2.imwrite(f'{folder}/{"abc"[seed]}.png', noise)
PYTHON
    dpmambair restore -w net.pth pictures -o without
    dpmambair restore pictures -o by_shipped_weights
    dpmambair convert net.pth net.safetensors
    if dpmambair train -opt train_your_own.yml > train.log 2>&1; then echo 'trained without BasicSR?'; exit 1; fi
    grep -q 'install_basicsr' train.log

    for extra in ${EXTRAS-app export hub losses spandrel video viewer test}; do
        cp -al core "$extra"
        environment="$work/$extra"
        sed -i "s|$work/core|$environment|" "$environment/pyvenv.cfg"
        export PATH="$environment/bin:$path"
        SECONDS=0
        (cd checkout && install ".[$extra]")
        row "$extra" $SECONDS
        use "$extra" > "$extra.log" 2>&1 || { cat "$extra.log"; exit 1; }
        rm -rf "$environment"
    done

    environment="$work/core"
    export PATH="$environment/bin:$path"
    SECONDS=0
    (cd checkout && install -e '.[train]' && dpmambair install_basicsr --quiet --disable-pip-version-check)
    row 'training' $SECONDS
    python - << 'PYTHON'
import sys
from dpmambair_basicsr.restore import main
sys.argv[1:] = ['-w', 'net.pth', 'pictures', '-o', 'with']
assert main() == 0 and 'basicsr' not in sys.modules
PYTHON
    for name in a b c; do cmp without/$name.png with/$name.png; done
    dpmambair train -opt train_your_own.yml --force_yml num_gpu=0 datasets:{train,val}:dataroot_lq="$work/pairs/lq" \
        datasets:{train,val}:dataroot_gt="$work/pairs/gt" datasets:train:gt_size=16 network_g:dim=16 \
        train:total_iter=4 val:val_freq=4 logger:save_checkpoint_freq=4 > train.log 2>&1 || { cat train.log; exit 1; }
    dpmambair restore -w experiments/*/models/net_g_4.pth pictures -o trained
    popd > /dev/null
    export PATH="$path"
    rm -rf "$work"
done
