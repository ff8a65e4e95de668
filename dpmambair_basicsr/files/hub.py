"""Networks on the Hugging Face Hub: a repository with model.safetensors, which includes the network options."""

from types import ModuleType

from dpmambair_basicsr.files.errors import CheckpointError, MissingLibraryError

SCHEME = 'hf:'
FILE = 'model.safetensors'


def import_hub() -> ModuleType:
    """The package huggingface_hub. Raises MissingLibraryError with the install command."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise MissingLibraryError(
            f"the hub needs huggingface_hub ({error}): pip install 'dpmambair_basicsr[hub]'"
        ) from error
    return huggingface_hub


def local_file(weights: str) -> str:
    """Path of the weights: `hf:user/name`, or `hf:user/name@revision`, is downloaded first; anything else is a path.

    The file is kept in the hub's own cache; HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and HF_TOKEN apply as usual.

    Raises:
        CheckpointError: naming the repository, if it cannot be downloaded.
        MissingLibraryError: huggingface_hub is not installed.
    """
    if not weights.startswith(SCHEME):
        return weights
    hub = import_hub()
    repository, _, revision = weights.removeprefix(SCHEME).partition('@')
    try:
        return hub.hf_hub_download(repository, FILE, revision=revision or None)
    except Exception as error:  # any: the hub and the HTTP libraries raise many types
        reason = ' '.join(str(error).split())[:300]
        raise CheckpointError(f'{weights}: {FILE} cannot be downloaded ({type(error).__name__}: {reason})') from error
