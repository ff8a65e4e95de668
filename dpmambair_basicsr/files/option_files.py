"""Option files as BasicSR reads them."""


def read_options(file: str):
    """The option file as BasicSR reads it.

    Raises:
        SystemExit: if it cannot be read, is no text or no YAML, or holds a tag that would call Python, see `safe_yaml`.
    """
    import yaml
    from basicsr.utils import options

    try:
        with open(file) as stream:
            return yaml.load(stream, Loader=options.ordered_yaml()[0])
    except OSError as error:
        raise SystemExit(f'{file}: {error.strerror}') from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SystemExit(f'{file}: {error}') from None
