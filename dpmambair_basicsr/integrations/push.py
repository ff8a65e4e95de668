"""Upload a trained network to the Hugging Face Hub: `dpmambair push net_g_best.pth user/name`.

Uploads the network that `restore` would use as model.safetensors with its options, the options as config.json, and a
README.md with usage instructions, unless there is one. `dpmambair restore -w hf:user/name` and
`load('hf:user/name')` load it from there. You must be logged in: `hf auth login`, or HF_TOKEN.
"""

import argparse
import json
import tempfile
from pathlib import Path

from dpmambair_basicsr.files.errors import InputError, exit_on_error

CARD = """---
library_name: dpmambair_basicsr
pipeline_tag: image-to-image
tags:
- image-restoration
- mamba
---

# {name}

A {type} of dpmambair_basicsr with {parameters:,} parameters, which maps an RGB image to a restored one.

```bash
dpmambair restore -w hf:{name} pictures/ -o restored/
```

```python
import dpmambair_basicsr

restored = dpmambair_basicsr.load('hf:{name}').restore(image)  # (H, W, 3) of uint8 or uint16
```

Describe the training data and the intended use here.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog='dpmambair push', description=(__doc__ or '').partition('\n\n')[2])
    parser.add_argument('checkpoint', help='net_g_*.pth or a .safetensors file')
    parser.add_argument('repository', metavar='user/name', help='repository, created if missing')
    parser.add_argument('--private', action='store_true', help='create a private repository')
    arguments = parser.parse_args()
    with exit_on_error('dpmambair push', ValueError, OSError), tempfile.TemporaryDirectory() as folder:
        write_files(arguments.checkpoint, arguments.repository, Path(folder))
        print(upload(Path(folder), arguments.repository, arguments.private))


def write_files(checkpoint: str, name: str, folder: Path) -> None:
    """Writes the files to upload, and checks them by loading the network as users of the hub will.

    Raises:
        FileNotFoundError, ValueError: it is not a checkpoint that `load` supports without further options.
    """
    from dpmambair_basicsr.archs.recognition import network_options, own_names
    from dpmambair_basicsr.files.checkpoints import WRAPPINGS, read_checkpoint, select_weights, write_safetensors
    from dpmambair_basicsr.files.hub import FILE
    from dpmambair_basicsr.inference.restorer import load

    content = read_checkpoint(checkpoint)
    weights = own_names(select_weights(checkpoint, content, *WRAPPINGS))
    options = content.get('network_g') or network_options(weights)
    write_safetensors(str(folder / FILE), weights, options, content.get('degradation_classifier'))
    try:
        load(folder / FILE, device='cpu')
    except ValueError as error:
        raise InputError(str(error).replace(str(folder / FILE), checkpoint)) from error
    (folder / 'config.json').write_text(json.dumps({'network_g': options}, indent=2) + '\n', encoding='utf-8')
    parameters = sum(value.numel() for value in weights.values())
    assert options is not None, 'the network has just been loaded with them'
    card = CARD.format(name=name, type=options['type'], parameters=parameters)
    (folder / 'README.md').write_text(card, encoding='utf-8')


def upload(folder: Path, name: str, private: bool) -> str:
    """Uploads the files; returns the URL of the repository.

    Raises:
        MissingLibraryError: huggingface_hub is not installed.
        InputError: naming the repository, with the hub's message.
    """
    from dpmambair_basicsr.files.hub import import_hub

    hub = import_hub()
    try:
        api = hub.HfApi()
        url = api.create_repo(name, private=private, exist_ok=True)
        if api.file_exists(name, 'README.md'):
            (folder / 'README.md').unlink()
        api.upload_folder(repo_id=name, folder_path=folder, commit_message='Upload by dpmambair push')
    except Exception as error:  # any: the hub and the HTTP libraries raise many types
        reason = ' '.join(str(error).split())[:300]
        raise InputError(f'{name}: not uploaded ({type(error).__name__}: {reason})') from error
    return str(url)


if __name__ == '__main__':
    main()
