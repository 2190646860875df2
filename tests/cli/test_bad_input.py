"""Whatever is wrong with what was given: one line that names it, exit code 2, nothing written."""

from __future__ import annotations

import numpy as np
import pytest

from tests.cli.small_images import image_arrays

ARRAYS = image_arrays()


def changed(key: str, index: object, value: object, dtype: object = None) -> dict[str, np.ndarray]:
    array = ARRAYS[key].astype(dtype or ARRAYS[key].dtype)
    array[index] = value
    return {key: array}


FLOAT_IMAGES = {key: (ARRAYS[key] / 255.0).astype(np.float32) for key in ("x_train", "x_test")}


def refused(outcome, out, *words: str) -> None:
    assert outcome.code == 2
    assert outcome.err.endswith("\n")
    assert outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert word in outcome.err
    assert outcome.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target-params", "0"], ["target_params", "0"]),
        (["--target-params", "1.5"], ["target_params", "1.5"]),
        (["--target-params", "-0.1"], ["target_params", "-0.1"]),
        (["--target-params", "nan"], ["target_params", "nan"]),
        (["--target-params", "ten"], ["--target-params"]),
        (["--target-macs", "0"], ["target_macs", "0"]),
        (["--target-params", "0.1", "--target-macs", "0.1"], ["target_params and target_macs", "one of them"]),
        (["--target-macs", "0.5", "--target-latency", "0.5"], ["target_macs and target_latency"]),
        (
            ["--target-macs", "0.0001"],
            ["target_macs", "of 17024 multiply-accumulates", "at least", "min_width 2"],
        ),
        (["--target-neurons", "0.1", "--round-to", "32"], ["target_neurons", "of 192 neurons", "at least 64", "32"]),
        (["--target-neurons", "0.1", "--min-width", "20"], ["at least 40", "min_width 20"]),
        (["--round-to", "0"], ["round_to", "0"]),
        (["--min-width", "0"], ["min_width", "0"]),
        (["--latency-batch", "0"], ["latency_batch", "0"]),
        (["--max-predicted-loss", "-1"], ["max_predicted_loss is -1"]),
        (
            ["--max-predicted-loss", "1", "--criterion", "l1"],
            ["max_predicted_loss", "criterion l1 predicts no loss"],
        ),
        (["--max-predicted-loss", "1", "--target-params", "1"], ["target_params is 1", "max_predicted_loss"]),
        (["--stop-accuracy-drop", "0"], ["stop_accuracy_drop is 0"]),
        (["--stop-accuracy-drop", "2", "--target-macs", "1"], ["target_macs is 1", "stop_accuracy_drop"]),
        (["--stop-accuracy-drop", "2", "--train-size", "14"], ["stop_accuracy_drop", "14 are too few"]),
        (["--epochs", "0"], ["epochs", "0"]),
        (["--epochs", "9" * 30], ["epochs is 999", "at most 10000000"]),
        (["--epochs", "10000000", "--prune-every", "1"], ["prune_every is 1", "removal events"]),
        (["--threads", "1000000"], ["threads is 1000000", "at most 1024"]),
        (["--epochs", "2.5"], ["--epochs"]),
        (["--batch-size", "1"], ["batch_size"]),
        (["--seed", "-1"], ["seed"]),
        (["--seed", "99999999999999999999"], ["seed", "99999999999999999999"]),
        (["--lr", "0"], ["lr is 0"]),
        (["--lr", "inf"], ["lr is inf"]),
        (["--optimizer", "adma"], ["optimizer is 'adma'", "did you mean adam"]),
        (["--optimizer", "lbfgs!"], ["optimizer is 'lbfgs!'", "sgd, adam, adamw"]),
        (["--momentum", "1"], ["momentum is 1.0", "0 or more and below 1"]),
        (["--momentum", "0", "--flatness", "msam"], ["momentum is 0.0", "msam"]),
        (["--momentum", "0", "--flatness", "on+msam"], ["momentum is 0.0", "on+msam"]),
        (["--weight-decay", "-1"], ["weight_decay is -1.0", "0 or more"]),
        (["--weight-decay", "inf"], ["weight_decay is inf"]),
        (["--label-smoothing", "1"], ["label_smoothing is 1.0", "below 1"]),
        (["--mixup", "-0.1"], ["mixup is -0.1", "0 or more"]),
        (["--mixup", "nan"], ["mixup is nan"]),
        (["--ema", "1"], ["ema is 1.0", "above 0 and below 1"]),
        (["--ema", "0"], ["ema is 0.0", "above 0 and below 1"]),
        (["--accumulate", "0"], ["accumulate is 0", "1 or more"]),
        (["--accumulate", "3"], ["accumulate is 3", "divisor of batch_size 128"]),
        (["--accumulate", "128"], ["accumulate is 128", "2 images or more"]),
        (["--accumulate", "16", "--train-size", "20"], ["accumulate is 16", "10 or less for 20 training images"]),
        (["--compile", "--disout", "0.1"], ["compile and disout 0.1", "one of them"]),
        (["--compile", "--flatness", "sam"], ["compile and flatness sam", "one of them"]),
        (["--amp", "tf32"], ["amp is 'tf32'", "off, bf16, fp16"]),
        (["--amp", "FP16"], ["amp is 'FP16'", "did you mean fp16"]),
        (["--model", "resnet21"], ["resnet21", "did you mean", "resnet20"]),
        (["--model", "MLP"], ["MLP", "did you mean mlp"]),
        (["--model", "xyzzy"], ["xyzzy", "expected one of", "vgg11_bn"]),
        (["--widths", "30,x"], ["widths", "30,x"]),
        (["--widths", "30,0"], ["widths", "0"]),
        (["--model", "lenet5", "--widths", "30"], ["widths of lenet5", "expected 4"]),
        (["--criterion", "magnitude"], ["criterion", "magnitude"]),
        (["--compensate", "maybe"], ["compensate", "maybe"]),
        (["--flatness", "yes"], ["flatness", "yes", "on, off, sam, msam, on+msam"]),
        (["--flatness", "msam", "--sam-every", "4"], ["sam_every is 4", "msam"]),
        (["--flatness-mode", "backward"], ["flatness_mode", "backward", "double_backward"]),
        (["--flatness-strength", "-1"], ["flatness_strength is -1"]),
        (["--flatness-strength", "nan"], ["flatness_strength is nan"]),
        (["--flatness-every", "0"], ["flatness_every is 0"]),
        (["--flatness-fade-below", "-0.1"], ["flatness_fade_below is -0.1"]),
        (["--optimum-shift", "on"], ["optimum_shift is 'on'"]),
        (["--disout", "1"], ["disout is 1"]),
        (["--disout", "nan"], ["disout is nan"]),
        (["--sam-radius", "0"], ["sam_radius is 0"]),
        (["--sam-every", "0"], ["sam_every", "0"]),
        (["--schedule", "step"], ["schedule", "step"]),
        (["--device", "gpu"], ["device", "gpu"]),
        (["--device", "cuda:99"], ["device cuda:99"]),
        (["--device", "cpu:1"], ["device", "cpu:1"]),
        (["--label-noise", "1.1"], ["label_noise", "1.1"]),
        (["--train-size", "0"], ["train_size"]),
        (["--train-size", "100000"], ["train_size", "100000", "1347"]),
        (["--image-size", "9"], ["image_size", "9", "8x8"]),
        (["--classes", "9"], ["label 9", "expected 0 to 8"]),
        (["--target-params", "0.001"], ["target_params", "17226", "at least"]),
        (["--exclude", "no_such_layer"], ["no_such_layer"]),
        (["--exclude", "1,3"], ["no layer can be pruned", "1", "3"]),
        (["--no-such-option"], ["--no-such-option"]),
        (["--epoch", "3"], ["--epoch", "--epochs"]),
        (["--resume", "--overwrite"], ["--resume", "--overwrite"]),
        (["--resume"], ["checkpoint.pt"]),
    ],
)
def test_option(flatprune, tmp_path, options, words):
    out = tmp_path / "out"
    refused(flatprune("run", "--out", out, *options), out, *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x_train": None}, ["x_train"]),
        ({"y_test": None}, ["y_test"]),
        (changed("y_train", 7, -1), ["y_train", "-1", "index 7"]),
        (changed("y_train", 7, 99), ["y_train", "99", "index 7"]),
        (changed("y_train", 7, 4), ["y_train", "label 4", "index 7"]),
        (changed("y_test", 5, 4), ["y_test", "label 4", "index 5", "0 to 3"]),
        (changed("y_train", 0, 2**40), ["y_train", "out of range"]),
        ({"y_train": ARRAYS["y_train"].astype(np.float32)}, ["y_train", "float32", "integers"]),
        ({"y_train": ARRAYS["y_train"][:, None]}, ["y_train", "(96, 1)"]),
        ({"y_train": ARRAYS["y_train"][:-1]}, ["y_train", "96", "95"]),
        ({"y_train": np.zeros(96, np.int64), "y_test": np.zeros(48, np.int64)}, ["y_train", "label 0"]),
        ({**FLOAT_IMAGES, **changed("x_train", (3, 0, 0, 0), np.nan, np.float32)}, ["x_train", "nan", "image 3"]),
        ({**FLOAT_IMAGES, **changed("x_test", (4, 1, 1, 0), np.inf, np.float32)}, ["x_test", "inf", "image 4"]),
        ({**FLOAT_IMAGES, "x_train": ARRAYS["x_train"] * 1e300}, ["x_train", "not finite in float32"]),
        ({"x_test": FLOAT_IMAGES["x_test"]}, ["x_test", "float32", "uint8"]),
        ({"x_train": ARRAYS["x_train"].astype(np.int32)}, ["x_train", "int32"]),
        ({"x_train": ARRAYS["x_train"].reshape(96, 64)}, ["x_train", "(96, 64)"]),
        ({"x_test": ARRAYS["x_test"][:, :7]}, ["x_test", "(7, 8, 1)", "(8, 8, 1)"]),
        ({"x_train": ARRAYS["x_train"].transpose(0, 3, 1, 2)}, ["x_train", "channels first"]),
        ({"x_train": ARRAYS["x_train"][:0], "y_train": ARRAYS["y_train"][:0]}, ["x_train", "empty"]),
        ({"x_test": ARRAYS["x_test"][:0], "y_test": ARRAYS["y_test"][:0]}, ["x_test", "empty"]),
        ({"x_train": np.zeros((96, 8, 8, 1), np.uint8)}, ["x_train", "same value"]),
        ({"x_train": np.array([None] * 96)}, ["cannot be read"]),
    ],
)
def test_arrays(flatprune, npz, tmp_path, changes, words):
    path, out = npz(**changes), tmp_path / "out"
    refused(flatprune("run", "--data", path, "--out", out), out, str(path), *words)


def test_no_such_file(flatprune, tmp_path):
    out = tmp_path / "out"
    refused(flatprune("run", "--data", tmp_path / "none.npz", "--out", out), out, "none.npz", "no such file")
    refused(flatprune("run", "--data", "cifar", "--out", out), out, "cifar", "'digits'")


def test_not_an_npz(flatprune, tmp_path, npz):
    out, path = tmp_path / "out", tmp_path / "data.npz"
    path.write_text("hello")
    refused(flatprune("run", "--data", path, "--out", out), out, "data.npz", "not an .npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    refused(flatprune("run", "--data", tmp_path / "one.npy", "--out", out), out, "one.npy", "not an .npz")
    refused(flatprune("run", "--data", tmp_path, "--out", out), out, str(tmp_path))
    whole = npz("cut.npz")
    whole.write_bytes(whole.read_bytes()[:3000])
    refused(flatprune("run", "--data", whole, "--out", out), out, "cut.npz")


@pytest.mark.parametrize("model", ["convnet", "lenet5", "vgg11_bn", "resnet20"])
def test_images_too_small_for_the_model(flatprune, npz, tmp_path, model):
    out = tmp_path / "out"
    outcome = flatprune("run", "--data", npz(shape=(6, 6, 1)), "--model", model, "--out", out)
    refused(outcome, out, model, "8x8", "6x6")


def test_out_is_a_file(flatprune, tmp_path):
    out = tmp_path / "file"
    out.write_text("mine")
    outcome = flatprune("run", "--out", out)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert str(out) in outcome.err
    assert out.read_text() == "mine"
    refused(flatprune("run", "--out", out / "below"), out / "below", str(out))


def test_eval_of_something_else(flatprune, tmp_path):
    for folder, word in ((tmp_path / "none", "no such folder"), (tmp_path, "model.pt")):
        outcome = flatprune("eval", folder)
        assert (outcome.code, outcome.err.count("\n")) == (2, 1)
        assert word in outcome.err
    (tmp_path / "model.pt").write_bytes(b"not a model")
    outcome = flatprune("eval", tmp_path)
    assert (outcome.code, outcome.err.count("\n")) == (2, 1)
    assert "model.pt: is damaged" in outcome.err
