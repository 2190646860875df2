"""Plain PyTorch for sequences: its transformer layers, recurrent layers, convolutions over time, mixed experts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.zoo.network import Builder, Network, classes_last, normal, whole_numbers

WORDS, CLASSES, WIDTH = 200, 5, 64


def sentence(n: int) -> tuple[Tensor]:
    """Twelve words."""
    return (whole_numbers(n, 12),)


class Encoder(nn.Module):
    """nn.TransformerEncoder over vectors [n, t, 16], the mean of its positions, a linear layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes]."""
        return self.head(self.encoder(self.embed(x)).mean(1))


class LanguageModel(nn.Module):
    """Words in, the next words out: embedding, positions, causal nn.TransformerEncoder; tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 128, batch_first=True, norm_first=True, activation="gelu")
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, t, words]."""
        t = words.shape[1]
        x = self.embed(words) + self.positions(torch.arange(t, device=words.device))
        mask = nn.Transformer.generate_square_subsequent_mask(t, device=words.device)
        return self.head(self.norm(self.blocks(x, mask=mask, is_causal=True)))


class Translator(nn.Module):
    """nn.Transformer between two vocabularies, positions first as its default is."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 128)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits [t, n, words] of words [n, s] and [n, t]."""
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(self.source(source).transpose(0, 1), self.target(target).transpose(0, 1), tgt_mask=mask)
        return self.head(y)


class CrossAttention(nn.Module):
    """nn.MultiheadAttention whose keys and values have widths of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.memory = nn.Linear(16, WIDTH), nn.Linear(16, 48)
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=48, vdim=48, batch_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of [n, t, 16]."""
        queries, memory = self.queries(x[:, :4]), self.memory(x)
        attended, _ = self.attention(queries, memory, memory)
        return self.head(self.norm(queries + attended).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer over embedded words; its last state is classified."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.recurrent = kind(32, 48, batch_first=True, **options)
        width = (options.get("proj_size") or 48) * (2 if options.get("bidirectional") else 1)
        self.hidden, self.head = nn.Linear(width, 32), nn.Linear(32, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes]."""
        states, _ = self.recurrent(self.embed(words))
        return self.head(torch.relu(self.hidden(states[:, -1])))


class Cells(nn.Module):
    """An LSTM cell that is stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.head = nn.Embedding(WORDS, 32), nn.LSTMCell(32, 48), nn.Linear(48, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes]."""
        h = c = torch.zeros(len(words), self.cell.hidden_size, dtype=self.head.weight.dtype)
        for x in self.embed(words).unbind(1):
            h, c = self.cell(x, (h, c))
        return self.head(h)


class Listener(nn.Module):
    """Convolutions over a spectrogram, then a bidirectional GRU: text recognition and speech are built so."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.MaxPool2d((2, 1)),
        )
        self.recurrent = nn.GRU(24 * 4, 32, bidirectional=True)
        self.head = nn.Linear(64, 20)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [t / 2, n, letters] of [n, 1, 16, t]."""
        x = self.convolutions(x).flatten(1, 2).permute(2, 0, 1)
        return self.head(self.recurrent(x)[0])


class GatedBlock(nn.Module):
    """WaveNet's: two dilated convolutions, tanh of one times sigmoid of the other, a residual and a skip."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.both = nn.Conv1d(width, 2 * width, 2, dilation=dilation)
        self.residual, self.skip = nn.Conv1d(width, width, 1), nn.Conv1d(width, 24, 1)
        self.dilation = dilation

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The next input and the skip, both as long as x."""
        value, gate = self.both(F.pad(x, (self.dilation, 0))).chunk(2, 1)
        y = torch.tanh(value) * torch.sigmoid(gate)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    """Gated dilated convolutions with summed skips."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 16, 1)
        self.blocks = nn.ModuleList(GatedBlock(16, 2**i) for i in range(4))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv1d(24, 20, 1), nn.ReLU(), nn.Conv1d(20, CLASSES, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes, t]."""
        x, total = self.first(x), 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.head(total)


class Experts(nn.Module):
    """A mixture of experts in a residual stream; each word goes to the best one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.router = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        """Logits [n, classes]."""
        x = self.embed(words)
        y = self.norm(x).flatten(0, 1)
        weight, choice = self.router(y).softmax(-1).max(-1)
        out = torch.zeros_like(y)
        for number, expert in enumerate(self.experts):
            rows = (choice == number).nonzero().flatten()
            out = out.index_add(0, rows, expert(y[rows]) * weight[rows, None])
        return self.head((x + out.view_as(x)).mean(1))


class Mixer(nn.Module):
    """MLP-Mixer over patches: one perceptron over positions, one over channels."""

    def __init__(self, tokens: int = 16, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.across = nn.ModuleList(self._perceptron(tokens, 32) for _ in range(2))
        self.within = nn.ModuleList(self._perceptron(width, 96) for _ in range(2))
        self.head = nn.Linear(width, CLASSES)

    @staticmethod
    def _perceptron(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, classes] of images [n, 3, 32, 32]."""
        x = self.patches(x).flatten(2).transpose(1, 2)
        for across, within, first, second in zip(self.across, self.within, self.norms[::2], self.norms[1::2]):
            x = x + across(first(x).transpose(1, 2)).transpose(1, 2)
            x = x + within(second(x))
        return self.head(x.mean(1))


def recurrent(kind: type[nn.RNNBase], **options: Any) -> Builder:
    """A classifier of sentences."""
    return lambda: Network(Recurrent(kind, **options), sentence)


def over_time(output: Any) -> Tensor:
    """[t, n, classes] -> [n, classes, t]."""
    return output.permute(1, 2, 0)


NETWORKS: dict[str, Builder] = {
    "plain_encoder": lambda: Network(Encoder(), normal(12, 16)),
    "plain_encoder_prenorm": lambda: Network(Encoder(norm_first=True, activation="gelu"), normal(12, 16)),
    "plain_language_model": lambda: Network(LanguageModel(tied=False), sentence, classes_last()),
    "plain_language_model_tied": lambda: Network(LanguageModel(tied=True), sentence, classes_last()),
    "plain_translator": lambda: Network(Translator(), lambda n: (whole_numbers(n, 12), whole_numbers(n, 8)), over_time),
    "plain_cross_attention": lambda: Network(CrossAttention(), normal(12, 16)),
    "plain_lstm": recurrent(nn.LSTM),
    "plain_lstm_deep": recurrent(nn.LSTM, num_layers=2, bidirectional=True),
    "plain_lstm_projected": recurrent(nn.LSTM, proj_size=24),
    "plain_gru": recurrent(nn.GRU, num_layers=2),
    "plain_rnn": recurrent(nn.RNN),
    "plain_lstm_cells": lambda: Network(Cells(), sentence),
    "plain_listener": lambda: Network(Listener(), normal(1, 16, 20), over_time),
    "plain_wavenet": lambda: Network(WaveNet(), normal(4, 24)),
    "plain_experts": lambda: Network(Experts(), sentence),
    "plain_mixer": lambda: Network(Mixer(), normal(3, 32, 32)),
}
