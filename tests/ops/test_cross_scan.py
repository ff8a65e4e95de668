import pytest
import torch

from dpmambair_basicsr.ops import cross_merge, cross_scan


def images(b=2, c=3, h=5, w=7):
    """5 x 7: a swapped height and width cannot hide."""
    return torch.arange(float(b * c * h * w)).view(b, c, h, w)


@pytest.mark.parametrize(('direction', 'order'), [(0, 'abcdef'), (1, 'adbecf'), (2, 'fedcba'), (3, 'fcebda')])
def test_each_direction_has_its_order(direction, order):
    """On the image  a b c
    d e f."""
    image = torch.tensor([[[[0, 1, 2], [3, 4, 5]]]])
    letters = ''.join('abcdef'[i] for i in cross_scan(image, directions=(direction,)).flatten())
    assert letters == order
    assert torch.equal(cross_scan(image)[:, direction], cross_scan(image, directions=(direction,))[:, 0])


@pytest.mark.parametrize('directions', [(0, 1, 2, 3), (0,), (3,), (2, 1), (0, 2), (1, 1)], ids=str)
def test_merge_undoes_scan(directions):
    x = images()
    sequences = cross_scan(x, directions)
    assert sequences.shape == (2, len(directions), 3, 35)
    assert torch.equal(cross_merge(sequences, (5, 7), directions), len(directions) * x)


@pytest.mark.parametrize('directions', [(0, 1, 2, 3), (0,), (3, 0)], ids=str)
def test_merge_is_the_adjoint_of_scan(directions):
    """<scan(x), y> = <x, merge(y)>, and each is the other's gradient."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, len(directions), 3, 35, generator=rng, dtype=torch.float64, requires_grad=True)
    scanned, merged = cross_scan(x, directions), cross_merge(y, (5, 7), directions)
    torch.testing.assert_close((scanned * y).sum(), (x * merged).sum())
    (dx,) = torch.autograd.grad(scanned, x, y.detach())
    torch.testing.assert_close(dx, merged)
    (dy,) = torch.autograd.grad(merged, y, x.detach())
    torch.testing.assert_close(dy, scanned)


def test_one_row_wise_direction_is_a_view():
    x = images()
    sequences = cross_scan(x, directions=(0,))
    assert sequences.data_ptr() == x.data_ptr()
    assert cross_merge(sequences, (5, 7), directions=(0,)).data_ptr() == x.data_ptr()


def test_strided_images_give_equal_sequences():
    x = images().to(memory_format=torch.channels_last)
    assert torch.equal(cross_scan(x), cross_scan(images()))


def test_invalid_directions_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r'directions must be one or more of \(0, 1, 2, 3\), got \(0, 4\)'):
        cross_scan(images(), directions=(0, 4))
    with pytest.raises(ValueError, match='directions'):
        cross_scan(images(), directions=())
    with pytest.raises(ValueError, match=r'x must be \(b, c, h, w\)'):
        cross_scan(images()[0])
    with pytest.raises(ValueError, match=r'ys must be \(b, 4, c, 36\) for size 6 x 6'):
        cross_merge(cross_scan(images()), (6, 6))
