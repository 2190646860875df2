"""The runner's processes and limits, its JSON, the table."""

import importlib
import json
import os

import pytest
import torch
from torch import nn

from bench.zoo.network import Network, normal
from bench.zoo.networks import FILES, QUICK
from bench.zoo.runner import Limits, Runner, chosen
from bench.zoo.table import table, verdict


def perceptron():
    return Network(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3)), normal(6))


class Odd(nn.Module):
    """Something happens when it is called."""

    def __init__(self, happens):
        super().__init__()
        self.layer, self.happens = nn.Linear(6, 3), happens

    def forward(self, x):
        self.happens()
        return self.layer(x)


def endless():
    while True:
        torch.ones(9).sum()


def odd(happens):
    return lambda: Network(Odd(happens), normal(6))


def absent():
    raise ImportError("no such package")


@pytest.fixture
def outcome(tmp_path):
    def run(**builders):
        runner = Runner(tmp_path / "zoo.json", Limits(seconds=20, total=3, gigabytes=20))
        runner.run(builders)
        return json.loads((tmp_path / "zoo.json").read_text())

    return run


def test_a_network_is_examined_and_not_again(outcome):
    record = outcome(small=perceptron)["networks"]["small"]
    assert record["finished"] and record["parameters"] == 163
    assert record["coupling"]["groups"] == 1 and record["coupling"]["could_go"] > 0.95
    assert record["half"]["float64"]["share"] < 1e-12 and record["one"]["neurons"] == 1
    assert record["l1"]["left"] <= 0.51 and record["obs"]["left"] <= 0.51
    assert verdict(record) == "whole"
    assert outcome(small=absent)["networks"]["small"] == record  # what is in the JSON is not run again


def test_processes_that_end_badly_leave_a_record(outcome):
    records = outcome(slow=odd(endless), dead=odd(lambda: os._exit(3)), missing=absent)["networks"]
    assert records["slow"]["error"] == "ended: over 3 CPU s, or out of memory"
    assert records["dead"]["error"] == "ended with exit code 3"
    assert records["missing"]["error"] == "ImportError: no such package"
    assert {verdict(record) for record in records.values()} == {"fails"}


def test_a_model_that_raises_says_so(outcome):
    def broken():
        raise RuntimeError("it is broken\nin many ways")

    document = outcome(broken=odd(broken))
    assert "it is broken" in document["networks"]["broken"]["coupling"]["error"]
    text = table(document)
    assert "0 whole, 0 partly, 1 fails" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


def test_names():
    names = [name for file in FILES for name in importlib.import_module(f"bench.zoo.{file}").NETWORKS]
    assert len(names) == len(set(names)) >= 120
    assert set(QUICK) < set(names)
    assert set(chosen(dict.fromkeys(names), ["^hf_bert", "_gat$"])) >= {"hf_bert", "hf_bert_mlm", "pyg_gat"}
