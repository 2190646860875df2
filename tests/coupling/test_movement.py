"""Operators that move entries: their labels take the same way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatprune.coupling import find_coupling
from tests.coupling.tiny_networks import Net, blocks, check, conv, image, pooled, rows


def between(operation, hidden: int = 6, columns: int = 6) -> Net:
    """A Linear to `hidden` entries, an operation on [N, hidden], a Linear that reads `columns` entries."""
    return Net(lambda m, x: m.b(operation(m.a(x))), a=nn.Linear(5, hidden), b=nn.Linear(columns, 3))


def images(operation, hidden: int = 6, columns: int = 6) -> Net:
    """A convolution to `hidden` channels, an operation, a convolution that reads `columns` channels, the mean."""
    return Net(lambda m, x: pooled(m.b(operation(m.a(x)))), a=conv(3, hidden), b=conv(columns, 4))


X = torch.randn(2, 5)
PLAIN = {"a": range(6), "b.weight[1]": range(6)}


def test_what_keeps_the_order_of_channels():
    for operation in (
        lambda x: x.view(len(x), -1),
        lambda x: x[:, :, None].squeeze(2),
        lambda x: x.t().contiguous().t(),
        lambda x: x.unsqueeze(1).expand(-1, 3, -1)[:, 1],
        lambda x: torch.stack([x, x], 1)[:, 0],
        lambda x: x.unflatten(1, (-1, 1)).flatten(1),
        lambda x: x.clone().detach(),
        lambda x: torch.stack(x.unbind(0)),
        lambda x: x[..., None].movedim(1, 2).swapaxes(1, 2)[..., 0],
        lambda x: x.reshape(len(x), 1, -1).mT.squeeze(-1),
    ):
        check(between(operation), X, PLAIN, refused={"b": "output of the model"})


def test_flattened_positions_are_columns_of_their_channel():
    net = Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(3, 4), b=nn.Linear(4 * 36, 3))
    check(net, image(), {"a": range(4), "b.weight[1]": blocks(4, 36)})


def test_channels_last_positions_are_interleaved_columns():
    net = Net(lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 4), b=nn.Linear(4 * 36, 3))
    check(net, image(), {"a": range(4), "b.weight[1]": rows(4, 4, 36)})


def test_flip_turns_the_columns_round():
    check(between(lambda x: x.flip(1)), X, {"a": range(6), "b.weight[1]": range(5, -1, -1)})


def test_concatenation_shifts_columns():
    net = Net(
        lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1)), a=nn.Linear(5, 4), b=nn.Linear(5, 3), out=nn.Linear(7, 2)
    )
    check(net, X, {"a": range(4), "out.weight[1]": range(4)}, {"b": range(3), "out.weight[1]": range(4, 7)})


def test_concatenation_leaves_the_columns_of_an_input():
    net = Net(lambda m, x: m.out(torch.cat([x, m.a(x)], 1)), a=nn.Linear(5, 4), out=nn.Linear(9, 2))
    check(net, X, {"a": range(4), "out.weight[1]": range(5, 9)})


def test_one_layer_twice_in_a_concatenation():
    net = Net(lambda m, x: m.out(torch.cat([m.a(x), m.a(2 * x).relu()], 1)), a=nn.Linear(5, 4), out=nn.Linear(8, 2))
    check(net, X, {"a": range(4), "out.weight[1]": rows(4, 4)})


def test_concatenation_along_positions_makes_channels_one():
    net = Net(
        lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1).mean(1)),
        a=nn.Linear(5, 4),
        b=nn.Linear(5, 4),
        out=nn.Linear(4, 2),
    )
    check(net, torch.randn(2, 3, 5), {"a": range(4), "b": range(4), "out.weight[1]": range(4)})


def test_concatenation_along_positions_with_an_input_is_refused():
    net = Net(lambda m, x: m.out(torch.cat([m.a(x), x], 1).mean(1)), a=nn.Linear(5, 5), out=nn.Linear(5, 2))
    check(net, torch.randn(2, 3, 5), refused={"a": ["input", "cat"]})


def test_stack_and_flatten_interleave():
    net = Net(
        lambda m, x: m.out(torch.stack([m.a(x), m.b(x)], 2).flatten(1)),
        a=nn.Linear(5, 4),
        b=nn.Linear(5, 4),
        out=nn.Linear(8, 2),
    )
    check(net, X, {"a": range(4), "b": range(4), "out.weight[1]": blocks(4, 2)})


def test_halves_that_meet_again_are_one_neuron():
    def halves(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, 1)
        return value * gate.sigmoid()

    gated = {"a": rows(4, 4), "b.weight[1]": range(4)}
    check(between(halves, 8, 4), X, gated)
    check(between(lambda x: F.glu(x, 1), 8, 4), X, gated)
    check(between(lambda x: x[:, : x.shape[1] // 2] + x[:, x.shape[1] // 2 :], 8, 4), X, gated)
    check(between(lambda x: x.view(len(x), 2, -1).sum(1), 8, 4), X, gated)


def test_neighbours_that_meet_are_one_neuron():
    check(between(lambda x: x[:, ::2] * x[:, 1::2], 8, 4), X, {"a": blocks(4, 2), "b.weight[1]": range(4)})


def test_pieces_that_feed_different_layers_go_in_step():
    """`chunk` cuts what is left into equal pieces, so one entry of each piece goes."""

    def forward(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x).chunk(2, 1)
        return m.left(left) + m.right(right)

    net = Net(forward, a=nn.Linear(5, 8), left=nn.Linear(4, 3), right=nn.Linear(4, 3))
    check(net, X, {"a": rows(4, 4), "left.weight[1]": range(4), "right.weight[1]": range(4)})


def test_split_concatenate_and_read_again():
    """YOLO's C2f: halves, one of them worked on, all joined."""

    def forward(m: Net, x: Tensor) -> Tensor:
        parts = list(F.silu(m.a(x)).chunk(2, 1))
        parts.append(F.silu(m.inner(parts[-1])))
        return pooled(m.out(torch.cat(parts, 1)))

    net = Net(forward, a=conv(3, 8), inner=conv(4, 5), out=conv(13, 3))
    check(
        net,
        image(),
        {"a": rows(4, 4), "inner.weight[1]": range(4), "out.weight[1]": rows(4, 4)},
        {"inner": range(5), "out.weight[1]": range(8, 13)},
    )


def test_split_by_integers_of_the_module():
    """Pieces whose sizes the module holds are neurons of their own; the integers go with them."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.small(x[:, : m.size]) + m.large(x[:, m.size :])

    net = Net(forward, a=nn.Linear(5, 9), small=nn.Linear(4, 3), large=nn.Linear(5, 3), size=4)
    check(
        net,
        X,
        {"a": range(4), "small.weight[1]": range(4)},
        {"a": range(4, 9), "large.weight[1]": range(5)},
    )


def test_split_by_written_integers_keeps_what_they_count():
    def forward(m: Net, x: Tensor) -> Tensor:
        small, large = m.a(x).split([4, 5], 1)
        return m.small(small) + m.large(large)

    check(
        Net(forward, a=nn.Linear(5, 9), small=nn.Linear(4, 3), large=nn.Linear(5, 3)),
        X,
        refused={"a": "split"},
    )


def test_pixel_shuffle_takes_squares_of_channels():
    check(images(nn.PixelShuffle(2), 12, 3), image(), {"a": blocks(3, 4), "b.weight[1]": range(3)})


def test_pixel_unshuffle_gives_squares_of_columns():
    check(images(nn.PixelUnshuffle(2), 3, 12), image(), {"a": range(3), "b.weight[1]": blocks(3, 4)})


def test_space_to_depth_by_slices():
    """YOLO's focus: four grids of positions joined as channels."""

    def focus(x: Tensor) -> Tensor:
        return torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1)

    check(images(focus, 3, 12), image(), {"a": range(3), "b.weight[1]": rows(3, 3, 4)})


def test_channel_shuffle_goes_in_step():
    """Interleaved halves stay interleaved only if the same place of each half goes."""

    def shuffle(x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        return x.view(n, 2, -1, h, w).transpose(1, 2).reshape(n, -1, h, w)

    expected = {"a": rows(4, 4), "b.weight[1]": blocks(4, 2)}
    check(images(shuffle, 8, 8), image(), expected)
    check(images(nn.ChannelShuffle(2), 8, 8), image(), expected)


def test_repeats():
    check(between(lambda x: x.repeat(1, 2), 4, 8), X, {"a": range(4), "b.weight[1]": rows(4, 4)})
    check(between(lambda x: x.repeat_interleave(2, 1), 4, 8), X, {"a": range(4), "b.weight[1]": blocks(4, 2)})
    check(between(lambda x: x.tile(1, 2), 4, 8), X, {"a": range(4), "b.weight[1]": rows(4, 4)})


def test_unfolded_patches_are_columns_of_their_channel():
    net = Net(lambda m, x: m.b(F.unfold(m.a(x), 3).mT).mean(1), a=conv(3, 4), b=nn.Linear(36, 5))
    check(net, image(), {"a": range(4), "b.weight[1]": blocks(4, 9)})


def test_positions_may_move_as_they_like():
    for operation in (
        lambda x: x.roll(1, 2),
        lambda x: x.flip(3).transpose(2, 3),
        lambda x: x[:, :, 1:, :-1],
        lambda x: x[..., torch.randperm(6)],
        lambda x: torch.stack(x.unbind(3)[::2], 3),
        lambda x: F.pad(x, (1, 1, 0, 2)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: x.unfold(2, 2, 2).amax(-1),
        lambda x: torch.cat([x, x.flip(2)], 2),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.adaptive_avg_pool2d(x, 3),
    ):
        check(images(operation), image(), {"a": range(6), "b.weight[1]": range(6)})


def test_windows_of_positions_keep_their_channels():
    """Swin's partition into windows and back."""

    def windows(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, c, h // 3, 3, w // 3, 3).permute(0, 2, 4, 3, 5, 1).reshape(-1, 9, c)
        return x.view(n, h // 3, w // 3, 3, 3, -1).permute(0, 5, 1, 3, 2, 4).reshape(n, -1, h, w)

    check(images(windows), image(), {"a": range(6), "b.weight[1]": range(6)})


def test_padded_channels_stay_empty():
    """A shortcut without parameters: what is added to the empty channels cannot go."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.a(x)
        return pooled(m.out(F.pad(x, (0, 0, 0, 0, 1, 1)) + m.b(x)))

    check(
        Net(forward, a=conv(3, 4), b=conv(4, 6), out=conv(6, 3)),
        image(),
        {"a": range(4), "b": range(1, 5), "b.weight[1]": range(4), "out.weight[1]": range(1, 5)},
    )


def test_a_roll_over_channels_is_refused():
    check(between(lambda x: x.roll(1, 1)), X, refused={"a": "trial cut"})


def test_a_permutation_of_channels_is_refused():
    order = [3, 1, 0, 5, 4, 2]
    check(between(lambda x: x[:, order]), X, refused={"a": "index"})


def test_channels_moved_into_the_batch_are_refused():
    """Each channel alone through a layer of its own: the labels ride on samples and come back."""
    net = Net(
        lambda m, x: m.out(m.each(m.a(x).view(-1, 1)).view(len(x), -1)),
        a=nn.Linear(5, 4),
        each=nn.Linear(1, 3),
        out=nn.Linear(12, 2),
    )
    coupling = check(net, X, {"a": range(4), "out.weight[1]": blocks(4, 3)})
    assert "each" in coupling.refused


def test_joined_pieces_of_several_layers():
    """A residual sum of one layer with the concatenation of two others couples both, piece by piece."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.out(m.a(x) + torch.cat([m.b(x), m.c(x)], 1))

    net = Net(forward, a=nn.Linear(5, 7), b=nn.Linear(5, 3), c=nn.Linear(5, 4), out=nn.Linear(7, 2))
    check(
        net,
        X,
        {"a": range(3), "b": range(3), "out.weight[1]": range(3)},
        {"a": range(3, 7), "c": range(4), "out.weight[1]": range(3, 7)},
    )


def test_one_position_beside_the_mean_of_others():
    """What one learned position was added to is an entry of it; its channels meet those of the mean of others."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = m.places + m.a(x)
        return m.c(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))

    net = Net(forward, a=nn.Linear(5, 6), places=nn.Parameter(torch.randn(1, 4, 6)), c=nn.Linear(12, 3))
    check(net, torch.randn(2, 4, 5), {"a": range(6), "places[2]": range(6), "c.weight[1]": rows(6, 6)})


@pytest.mark.parametrize(("width", "pieces"), [(12, 3), (11, 3)], ids=["equal", "a smaller last one"])
def test_chunks_keep_as_many_channels_each(width, pieces):
    """Each piece goes its own way; what the last piece has none beside of stays."""
    size, fewest = -(-width // pieces), width - (pieces - 1) * -(-width // pieces)

    def forward(m: Net, x: Tensor) -> Tensor:
        return sum(layer(part) for layer, part in zip(m.ends, m.a(x).chunk(pieces, -1)))

    ends = nn.ModuleList([nn.Linear(size, 3)] * (pieces - 1) + [nn.Linear(fewest, 3)])
    for i in range(pieces - 1):
        ends[i] = nn.Linear(size, 3)
    coupling = find_coupling(Net(forward, a=nn.Linear(5, width), ends=ends), torch.randn(2, 5))
    makers = {row for group in coupling.groups for row in group.of_role("producer")[0].index.flatten().tolist()}
    assert makers == {piece * size + i for piece in range(pieces) for i in range(fewest)}


def test_a_chunk_of_a_named_input():
    net = Net(
        lambda m, x: m.b(torch.prod(torch.stack(torch.chunk(input=m.a(x), chunks=2, dim=1)), 0)), a=nn.Linear(5, 8)
    )
    net.b = nn.Linear(4, 3)
    check(net, torch.randn(2, 5), {"a": rows(4, 4), "b.weight[1]": range(4)})
