"""Option files: YAML in UTF-8, read in bounded time and memory, with errors that name the line."""

from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import yaml

from dpmambair_basicsr.files.errors import OptionError
from dpmambair_basicsr.files.regular import open_regular

MAX_BYTES = 2**20
MAX_DEPTH = 32  # of sections and lists in one another
MAX_VALUES = 10_000  # keys included; what stands behind an alias counts each time
MAX_INTEGER = 2**63 - 1


class OptionLoader(getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
    """YAML's safe loader, which refuses tags that call Python. Mappings are OrderedDicts, as in BasicSR.

    Also refused, with the line: duplicate keys (YAML's loaders take the last), and files that exceed the limits
    above after expanding aliases: 500 bytes can stand for 10^9 values.

    Raises:
        OptionError, yaml.YAMLError: see `parse_options_text`, which converts both to one kind.
    """

    def __init__(self, stream):
        text = read_text(stream)
        check_bounds(text)
        super().__init__(text)

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            if isinstance(error, OptionError):
                raise
            kind = node.tag.rpartition(':')[2]
            raise OptionError(f'{line_of(node.start_mark)}: {shortened(node.value)} is not a valid {kind}') from error

    def construct_ordered(self, node) -> OrderedDict:
        pairs, lines = self.construct_pairs(node), {}
        for (key, _), (key_node, _) in zip(pairs, node.value, strict=True):
            line = line_of(key_node.start_mark)
            if not isinstance(key, Hashable):
                raise OptionError(f'{line}: a key must be text, got a list or section')
            if key in lines:
                raise OptionError(f'{line}: duplicate key {shortened(key)}, first in {lines[key]}')
            lines[key] = line
        return OrderedDict(pairs)

    def construct_integer(self, node) -> int:
        value = self.construct_yaml_int(node)
        if abs(value) > MAX_INTEGER:
            raise OptionError(f'{line_of(node.start_mark)}: {shortened(node.value)} does not fit into 64 bits')
        return value


OptionLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, OptionLoader.construct_ordered)
OptionLoader.add_constructor('tag:yaml.org,2002:int', OptionLoader.construct_integer)


def packaged_folder() -> Path:
    """Folder of our option files: in the package if installed from a wheel, beside it in a source checkout."""
    package = Path(__file__).parents[1]
    in_wheel = package / 'option_files'
    return in_wheel if in_wheel.is_dir() else package.parent / 'options'


def packaged_files() -> list[Path]:
    """Our option files, and their JSON schema for editors."""
    return [*sorted(packaged_folder().glob('*.yml')), packaged_folder() / 'dpmambair.schema.json']


def read_options(file: str | Path):
    """The option file as BasicSR reads it, see `OptionLoader`.

    Raises:
        OptionError: naming the file, and the line if there is one.
    """
    return load(file, yaml.load)


def key_lines(file: str | Path) -> dict[str, int]:
    """{'train.optim_g.lr': line} of every key in the sections of an option file. Raises OptionError."""
    lines = {}

    def note(node, path: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            lines[f'{path}{key.value}'] = key.start_mark.line + 1
            note(value, f'{path}{key.value}.')

    note(load(file, yaml.compose), '')
    return lines


def load(file: str | Path, parse):
    try:
        with open_regular(file) as stream:
            return parse(stream, Loader=OptionLoader)
    except OSError as error:
        raise OptionError(f'{file}: {error.strerror}') from None
    except yaml.YAMLError as error:
        raise OptionError(f'{file}: {describe_yaml(error)}') from None
    except ValueError as error:
        message = str(error)
        raise OptionError(message if message.startswith(f'{file}: ') else f'{file}: {message}') from None


def parse_value(text: str):
    """Parses a value as in an option file. Raises OptionError, which does not name a file."""
    try:
        return yaml.load(text, Loader=OptionLoader)
    except yaml.YAMLError as error:
        raise OptionError(describe_yaml(error)) from None


def read_text(stream) -> str:
    """From text, bytes or a stream, whose own encoding is ignored: on Windows it is not UTF-8."""
    if hasattr(stream, 'read'):
        stream = getattr(stream, 'buffer', stream).read(MAX_BYTES + 1)
    if len(stream) > MAX_BYTES:
        raise OptionError(f'is larger than {MAX_BYTES} bytes')
    if isinstance(stream, bytes):
        try:
            stream = stream.decode('utf-8-sig')
        except UnicodeDecodeError as error:
            line = stream[: error.start].count(b'\n') + 1
            raise OptionError(f'line {line}: byte 0x{stream[error.start]:02x} is not UTF-8; save it as UTF-8') from None
    if wrong := yaml.reader.Reader.NON_PRINTABLE.search(stream):
        line = stream[: wrong.start()].count('\n') + 1
        raise OptionError(f'line {line}: the character U+{ord(wrong[0]):04X} is not allowed in YAML')
    return stream


def check_bounds(text: str) -> None:
    """Raises OptionError if a text exceeds the limits; it is scanned event by event, without expanding anything."""
    sizes = {}  # anchor -> number of values
    unfinished = [[None, 0]]  # anchor and number of values of each collection around the current place
    for event in yaml.parse(text, Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader)):
        anchor = getattr(event, 'anchor', None)
        if isinstance(event, yaml.CollectionStartEvent):
            unfinished.append([anchor, 1])
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = unfinished.pop()
            sizes[anchor] = size
            unfinished[-1][1] += size
        elif isinstance(event, yaml.ScalarEvent):
            sizes[anchor] = 1
            unfinished[-1][1] += 1
        elif isinstance(event, yaml.AliasEvent):
            if anchor in [name for name, _ in unfinished]:
                raise OptionError(f'{line_of(event.start_mark)}: *{anchor} contains itself')
            unfinished[-1][1] += sizes.get(anchor, 1)  # an unknown one is an error of the loader's
        if len(unfinished) > MAX_DEPTH:
            raise OptionError(f'{line_of(event.start_mark)}: more than {MAX_DEPTH} nested sections or lists')
        if unfinished[-1][1] > MAX_VALUES:
            raise OptionError(f'{line_of(event.start_mark)}: more than {MAX_VALUES} values, aliases expanded')


def line_of(mark) -> str:
    return f'line {mark.line + 1}'


def describe_yaml(error: yaml.YAMLError) -> str:
    """One line."""
    mark = getattr(error, 'problem_mark', None) or getattr(error, 'context_mark', None)
    parts = [getattr(error, 'context', None), getattr(error, 'problem', None)]
    text = ' '.join(' '.join(filter(None, parts) if mark else [str(error)]).split())
    return f'{line_of(mark)}: {text}' if mark else text


def shortened(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:50]}... ({len(text)} characters)'


def read_network(file: str) -> dict:
    """`network_g` of an option file. Raises OptionError, naming it, if there is none."""
    options = read_options(file)
    network = options.get('network_g') if isinstance(options, dict) else None
    if not isinstance(network, dict):
        raise OptionError(f'{file}: network_g: missing')
    return network
