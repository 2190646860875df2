"""Texts that every Python of one version brings along, and small transformers of Hugging Face's that read them.

    flatprune run --data bench.studies.texts:sources --model bench.studies.texts:bert --optimizer adamw
    flatprune run --data bench.studies.texts:manual --model bench.studies.texts:decoder --classes 128 --optimizer adamw

Tokens go through `flatprune run` as images of one row: a column is a token, a channel one of its bits. Of normalised
bits the sign is left, so that the networks read the tokens whatever mean and deviation the training images have.
"""

from __future__ import annotations

import re
import sysconfig
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

PACKAGES = ("asyncio", "email", "importlib", "multiprocessing", "unittest", "xml")
WORDS, WORD_BITS, PIECE = 24, 9, 24  # tokens a text; the vocabulary; texts in a row that are all trained or tested on
PIECES = 900  # of each package
BYTES, BYTE_BITS = 64, 7  # tokens a text
BERT_WIDTHS = (64, 256, 4)  # of the residual stream, of the perceptrons, heads
DECODER_WIDTHS = (64, 192, 4)
HEAD_DIM = 16
_TESTED = 5  # every fifth


def bits(tokens: np.ndarray, count: int) -> np.ndarray:
    """Tokens [n, t] as uint8 images [n, 1, t, count] of their bits."""
    return (tokens[:, None, :, None] >> np.arange(count) & 1).astype(np.uint8)


def tokens(images: Tensor) -> Tensor:
    """The tokens [n, t] of normalised `bits` [n, count, 1, t]."""
    place = 2 ** torch.arange(images.shape[1], device=images.device).view(-1, 1)
    return ((images[:, :, 0] > 0) * place).sum(1)


def sources() -> dict[str, np.ndarray]:
    """24 words of a source file of the standard library each, and which package of `PACKAGES` it belongs to.

    Words are letters in a row, in small letters; the vocabulary are the 511 most frequent ones of the training texts,
    0 is any other. Of 5 times 24 texts that follow each other in a package, the last 24 are tested on.
    """
    texts = {name: _pieces(_words(name)) for name in PACKAGES}
    trained = [text for pieces in texts.values() for place, text in enumerate(pieces) if not _is_tested(place)]
    counts = Counter(word for text in trained for word in text)
    number = {
        word: place for place, (word, _) in enumerate(sorted(counts.items(), key=_by_count)[: 2**WORD_BITS - 1], 1)
    }
    found: dict[str, list[np.ndarray]] = {"x_train": [], "y_train": [], "x_test": [], "y_test": []}
    for label, pieces in enumerate(texts.values()):
        coded = np.array([[number.get(word, 0) for word in text] for text in pieces])
        tested = np.array([_is_tested(place) for place in range(len(pieces))])
        for part, chosen in (("train", ~tested), ("test", tested)):
            found[f"x_{part}"].append(bits(coded[chosen], WORD_BITS))
            found[f"y_{part}"].append(np.full(int(chosen.sum()), label))
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


def _words(package: str) -> list[str]:
    folder = Path(sysconfig.get_path("stdlib")) / package
    files = [path for path in sorted(folder.rglob("*.py")) if not {"test", "tests"} & set(path.parts)]
    return [word for path in files for word in re.findall(r"[a-z]+", path.read_text(encoding="utf-8").lower())]


def _pieces(words: list[str]) -> list[list[str]]:
    return [words[start : start + WORDS] for start in range(0, WORDS * PIECES, WORDS)]


def _is_tested(place: int) -> bool:
    return place // PIECE % _TESTED == _TESTED - 1


def _by_count(entry: tuple[str, int]) -> tuple[int, str]:
    return -entry[1], entry[0]


def manual() -> dict[str, np.ndarray]:
    """64 bytes of the manual that `help` shows (`pydoc_data.topics`) each, and the byte that follows each of them.

    ASCII, "?" for any other character. Paragraphs that stand in several topics count once. Every fifth 24 texts are
    tested on.
    """
    paragraphs = dict.fromkeys(text for name in sorted(topics) for text in topics[name].split("\n\n"))
    codes = np.frombuffer("\n\n".join(paragraphs).encode("ascii", "replace"), np.uint8).astype(np.int64)
    count = (len(codes) - 1) // BYTES
    x, y = (codes[start : start + count * BYTES].reshape(count, BYTES) for start in (0, 1))
    tested = np.array([_is_tested(place) for place in range(count)])
    images = bits(x, BYTE_BITS)
    return {"x_train": images[~tested], "y_train": y[~tested], "x_test": images[tested], "y_test": y[tested]}


class OfTokens(nn.Module):
    """A network of Hugging Face's behind `tokens`; of predictions at all places the classes come first."""

    def __init__(self, network: PreTrainedModel) -> None:
        super().__init__()
        self.network = network
        for module in network.modules():  # as `scratch_of` draws them, so that all begin alike
            if callable(getattr(module, "reset_parameters", None)):
                module.reset_parameters()

    def forward(self, images: Tensor) -> Tensor:
        """Logits [n, classes] or [n, classes, t] of bits [n, count, 1, t]."""
        logits: Tensor = self.network(input_ids=tokens(images)).logits
        return logits if logits.dim() == 2 else logits.transpose(1, 2)


def bert(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] = BERT_WIDTHS) -> nn.Module:
    """A BERT of two layers that classifies a text; `widths`: of the residual stream, of the perceptrons, heads."""
    config = BertConfig(**_sizes(image_shape, widths), type_vocab_size=1, num_labels=classes)
    return OfTokens(BertForSequenceClassification(config))


def decoder(image_shape: tuple[int, int, int], classes: int, widths: Sequence[int] = DECODER_WIDTHS) -> nn.Module:
    """A Llama of two layers that predicts the next token at every place; `widths` as of `bert`."""
    sizes = _sizes(image_shape, widths)
    heads = sizes["num_attention_heads"]
    config = LlamaConfig(**sizes, num_key_value_heads=heads, head_dim=HEAD_DIM, use_cache=False)
    if classes != config.vocab_size:
        raise ValueError(f"{classes} classes, expected as many as there are tokens, {config.vocab_size}")
    return OfTokens(LlamaForCausalLM(config))


def _sizes(image_shape: tuple[int, int, int], widths: Sequence[int]) -> dict[str, Any]:
    """What the configurations of transformers call them."""
    count, _, length = image_shape
    features, hidden, heads = widths
    return {
        "vocab_size": 2**count,
        "hidden_size": features,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": 2,
        "max_position_embeddings": length,
    }
