"""A small BERT with the Trainer of transformers: heads, MLPs and the residual stream go while it trains.

pip install '.[prune]' transformers accelerate && python examples/transformers_bert.py
"""

import logging

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

from flatprune.integrations.transformers import PruningTrainer, load_pruned


class Sums(Dataset[dict[str, torch.Tensor]]):
    """Sequences of digits, and whether their sum is large: a text that needs no download."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.tokens = torch.randint(0, 10, (size, 12), generator=generator)
        self.labels = (self.tokens.sum(dim=1) > 54).long()

    def __len__(self) -> int:
        """Sequences."""
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """As the Trainer wants it."""
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


def main(steps: int = 300, folder: str = "runs/bert") -> None:
    """Train, prune, save, load, print what is left."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("flatprune").setLevel(logging.INFO)
    config = BertConfig(vocab_size=10, max_position_embeddings=16, hidden_size=64, intermediate_size=128)
    config.num_hidden_layers, config.num_attention_heads, config.num_labels = 2, 4, 2
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3, report_to=[], save_strategy="no"
    )
    trainer = PruningTrainer(model, arguments, train_dataset=Sums(4096, seed=0), target=0.4)
    trainer.train()
    print(trainer.pruning.summary())
    trainer.save_model(folder)
    loaded, test = load_pruned(BertForSequenceClassification, folder), Sums(1024, seed=1)
    with torch.no_grad():
        right = (loaded(test.tokens).logits.argmax(dim=1) == test.labels).float().mean()
    print(f"accuracy of the loaded network: {right:.1%}")


if __name__ == "__main__":
    main()
