"""Checks names of files and folders."""

MAX_BYTES = 200  # a file system has 255, and BasicSR adds `train_<name>_<time>.log`, `<name>_archived_<time>`


def name_problem(name: str) -> str:
    """Why a text cannot be the name of a file or folder on every system; '' if it can.

    `../datasets`, an absolute path, `.` or an empty name would refer to other folders, which BasicSR would rename.
    """
    if name in ('', '.', '..'):
        return f'must be a name, not {name!r}'
    if any(char in '/\\' or ord(char) < 32 or ord(char) == 127 for char in name):
        return f'must be one name, without / \\ and control characters, not {name[:60]!r}'
    if name[-1] in '. ':
        return f'must not end in a dot or a space, as {name[-60:]!r} does'
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return f'must be text that can be encoded, not {name[:60]!r}'
    return f'must have at most {MAX_BYTES} bytes, not {length}' if length > MAX_BYTES else ''
