"""What `--data` may name: files of images, tables, data sets on the disk, functions of one's own."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from flatprune import named
from flatprune.data import load_dataset, read_images
from flatprune.data.splits import held_out
from flatprune.errors import InputError, MissingPackageError

ROWS = "x1,label,x2\n" + "".join(f"{i % 7}.5,{'ab'[i % 2]},{i}\n" for i in range(20))


@pytest.fixture
def pictures(tmp_path):
    """Writes pictures of one grey level: pictures("train/cat", 3, level) -> the folder of all."""

    def write(place, count, level=0, size=(6, 6), mode="L"):
        folder = tmp_path / "pictures" / place
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            value = level if mode == "L" else (level, 0, 0)
            Image.new(mode, size, value).save(folder / f"{len(list(folder.iterdir()))}-{i}.png")
        return tmp_path / "pictures"

    return write


def csv(tmp_path, text):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    return str(path)


def refused(data, *words, **options):
    with pytest.raises(InputError) as error:
        read_images(str(data), **options)
    for word in words:
        assert word in str(error.value)


def test_folders_of_a_class_each(pictures):
    for part, count in (("train", 4), ("test", 2)):
        pictures(f"{part}/dog", count, 200)
        folder = pictures(f"{part}/cat", count, 50)
    images = read_images(str(folder))
    assert images.x_train.shape == (8, 6, 6, 1) and images.x_train.dtype == np.uint8
    assert images.class_names == ("cat", "dog") and images.classes == 2
    assert images.y_test.tolist() == [0, 0, 1, 1]
    assert images.x_test[:, 0, 0, 0].tolist() == [50, 50, 200, 200]


def test_a_fifth_of_each_class_is_held_out(pictures):
    pictures("cat", 10, 50)
    images = read_images(str(pictures("dog", 5, 200, mode="RGB")))
    assert images.x_train.shape == (12, 6, 6, 3)  # grey ones beside colour
    assert np.bincount(images.y_test).tolist() == [2, 1]
    assert images.x_train[images.y_train == 1].reshape(-1, 3).tolist() == [[200, 0, 0]] * 4 * 36


def test_held_out_parts():
    labels = np.array([0] * 50 + [1] * 2 + [2])
    (train, test), again = held_out(labels), held_out(labels)
    assert np.array_equal(train, again[0]) and sorted([*train, *test]) == list(range(53))
    assert np.bincount(labels[test], minlength=3).tolist() == [10, 1, 0]


def test_pictures_of_several_sizes(pictures):
    pictures("cat", 4)
    folder = pictures("dog", 2, 200, size=(8, 4))
    refused(folder, "dog", "is 8x4, most are 6x6", "--image-size")
    assert read_images(str(folder), image_size=4).x_train.shape[1:] == (4, 4, 1)
    assert load_dataset(str(folder), image_size=4).image_shape == (1, 4, 4)


def test_folders_that_cannot_be_used(pictures, tmp_path):
    folder = pictures("cat", 3)
    refused(folder, "holds 1 folders of images")
    (pictures("dog", 3) / "dog/broken.png").write_text("no image")
    refused(folder, "broken.png", "cannot be read as an image", "remove it")
    (folder / "dog/broken.png").unlink()
    (folder / "eel").mkdir()
    refused(folder, "eel", "holds no image")
    pictures("train/cat", 2)
    refused(folder, "has no folder test")
    pictures("train/dog", 2)
    pictures("test/fox", 1)
    pictures("test/cat", 1)
    refused(folder, "'fox'")
    Image.new("I;16", (6, 6)).save(folder / "train/cat/deep.png")
    (folder / "test/fox").rename(folder / "test/dog")
    refused(folder, "deep.png", "8 bits")


def test_rows_of_a_table(tmp_path):
    path = csv(tmp_path, ROWS)
    images, dataset = read_images(path), load_dataset(path)
    assert images.x_train.shape == (16, 1, 1, 2) and images.class_names == ("a", "b")
    assert dataset.image_shape == (2, 1, 1)
    assert dataset.x_train.mean((0, 2, 3)).abs().max() < 1e-5
    assert dataset.x_train.std((0, 2, 3), correction=0).sub(1.0).abs().max() < 1e-5
    index = images.x_test[:, 0, 0, 1].astype(int)
    assert images.y_test.tolist() == (index % 2).tolist()
    last = csv(tmp_path, "a;b\n" + "".join(f"{i};{i % 2 + 9}\n" for i in range(10)))
    assert read_images(last).class_names == ("9", "10")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["has no rows"]),
        ("1,2\n3,4\n", ["line 1 is no header"]),
        ("a,label\n1,0\n2\n", ["line 3 has 1 cells", "2 as in the header"]),
        ("a,label\n1,0\nx,1\n", ["line 3: a is 'x'", "a number"]),
        ("a,label\n1,0\nnan,1\n", ["line 3: a is 'nan'"]),
        ("a,label\n" + "1,0\n2,0.5\n" * 3, ["label is '0.5' in row 2"]),
        ("a,label\n" + "1,0\n2,\n" * 3, ["label is '' in row 2"]),
        ("a,label\n1,0\n2,1\n3,2\n", ["3 different values in 3 rows"]),
        ("a,b,label\n" + "1,7,0\n2,7,1\n" * 5, ["'b'", "same value"]),
        ('a,label\n1,"0\n', ["cannot be read as CSV"]),
    ],
)
def test_tables_that_cannot_be_used(tmp_path, text, words):
    refused(csv(tmp_path, text), "rows.csv", *words)


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_images.py").write_text(
        "import numpy as np\n"
        "x, y = np.arange(48, dtype=np.float32).reshape(12, 2, 2), np.arange(12) % 3\n"
        "def four(): return x, y, x, y\n"
        "def named(): return dict(x_train=x, y_train=y, x_test=x, y_test=y)\n"
        "def three(): return x, y, x\n"
    )
    refused("own_images:four", "a file names it", "--data own_images:four")
    assert "own_images" not in sys.modules
    named.allow("own_images:four", "own_images:named", "own_images:three", "own_images:for")
    for name in ("four", "named"):
        assert read_images(f"own_images:{name}").x_test.shape == (12, 2, 2, 1)
    refused("own_images:three", "gives tuple", "x_train, y_train, x_test, y_test")
    refused("own_images:for", "has no function for", "did you mean four")


def test_a_data_set_on_the_disk(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"img": [Image.new("L", (4, 4), 9 * i) for i in range(10)], "label": [i % 2 for i in range(10)]}
    table = datasets.table.InMemoryTable.from_pydict(features.encode_batch(rows), schema=features.arrow_schema)
    whole = datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="rows")
    whole.save_to_disk(str(tmp_path / "whole"))
    images = read_images(str(tmp_path / "whole"))
    assert images.x_train.shape == (8, 4, 4, 1) and images.class_names == ("no", "yes")
    datasets.DatasetDict({"train": whole, "test": whole.select([3])}).save_to_disk(str(tmp_path / "parts"))
    images = read_images(str(tmp_path / "parts"))
    assert len(images.x_train) == 10 and images.x_test.max() == 27 and images.y_test.tolist() == [1]
    datasets.DatasetDict({"train": whole}).save_to_disk(str(tmp_path / "train"))
    refused(tmp_path / "train", "expected test among them")
    whole.remove_columns("label").save_to_disk(str(tmp_path / "images"))
    refused(tmp_path / "images", "has the columns img", "image and label")


def test_what_a_data_set_on_the_disk_needs(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingPackageError, match=r"needs datasets, .* 'kfac-ext\[datasets\]'"):
        read_images(str(tmp_path))
