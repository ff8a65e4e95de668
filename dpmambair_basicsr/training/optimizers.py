"""Whether a training state is of the optimizers that continue it; torch names neither file nor option."""

from collections.abc import Iterator
from itertools import chain

from torch import Tensor, nn
from torch.optim import Optimizer

from dpmambair_basicsr.files.errors import CheckpointError
from dpmambair_basicsr.files.image_folders import some

MOMENTS = ('exp_avg', 'momentum_buffer', 'square_avg', 'sum')  # in torch.optim, of their parameter's shape
# Keys of a group that torch adds when it reads a state of one of its earlier versions
ADDED_BY_TORCH = {'foreach', 'maximize', 'capturable', 'differentiable', 'fused', 'decoupled_weight_decay'}


def describe_optimizers(model) -> list[dict]:
    """Of each optimizer its type, and the names of its parameters by group: the entry `trained` of a state."""
    names = {
        parameter: f'{label}.{name}'
        for label, net in vars(model).items()
        if label.startswith('net_') and isinstance(net, nn.Module)
        for name, parameter in model.get_bare_model(net).named_parameters()
    }
    return [
        {
            'type': type(optimizer).__name__,
            'parameters': [[names.get(part, '') for part in group['params']] for group in optimizer.param_groups],
        }
        for optimizer in model.optimizers
    ]


def check_optimizers(model, state: dict) -> None:
    """Raises CheckpointError, naming the file, if a state is of other optimizers than the model's."""
    if difference := next(differences(model, state), None):
        file = model.opt['path'].get('resume_state') or f'the training state of iteration {state["iter"]}'
        raise CheckpointError(
            f'{file}: {difference}. To resume, model_type, network_*, train.freeze and the types of train.optim_* '
            'must be unchanged; to continue with others, start a new run from the checkpoint (path.pretrain_network_g)'
        )


def differences(model, state: dict) -> Iterator[str]:
    saved, own = state['optimizers'], model.optimizers
    if len(saved) != len(own):
        yield f'the number of its optimizers is {len(saved)}, and {len(own)} for {type(model).__name__}'
    elif 'trained' in state:
        for pair in zip(state['trained'], describe_optimizers(model), strict=True):
            yield from differences_of_records(*pair)
    else:  # of BasicSR itself, or an earlier version
        for pair in zip(saved, own, strict=True):
            yield from differences_of_contents(*pair)


def differences_of_records(before: dict, now: dict) -> Iterator[str]:
    if before['type'] != now['type']:
        yield f'its optimizer is {before["type"]}, now {now["type"]}'
    old, new = (dict.fromkeys(chain(*record['parameters'])) for record in (before, now))
    gone, added = [name for name in old if name not in new], [name for name in new if name not in old]
    texts = [f'no longer trained: {some(gone)}'] * bool(gone) + [f'not trained before: {some(added)}'] * bool(added)
    if texts:
        yield '; '.join(texts)
    if before['parameters'] != now['parameters']:
        yield 'the parameters of its optimizer are in other groups, or in another order'


def differences_of_contents(saved: dict, own: Optimizer) -> Iterator[str]:
    groups = saved['param_groups']
    before, now = (' + '.join(str(len(group['params'])) for group in part) for part in (groups, own.param_groups))
    if before != now:
        yield f'its optimizer has {before} parameters, now {now} are trained'
        return
    for old, new in zip(groups, own.param_groups, strict=True):
        if missing := new.keys() - old.keys() - ADDED_BY_TORCH:
            yield f'its optimizer has no {some(sorted(missing))}, and is thus not {type(own).__name__}'
        if not type(own).__module__.startswith('torch.optim'):
            continue
        for index, parameter in zip(old['params'], new['params'], strict=True):
            values = saved['state'].get(index, {})
            for value in (values[name] for name in MOMENTS if isinstance(values.get(name), Tensor)):
                if value.shape != parameter.shape:
                    yield f'a parameter of its optimizer is {tuple(value.shape)}, now {tuple(parameter.shape)}'
