import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import IterableDataset, Subset, random_split
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

from transferkit.data import PictureFiles, from_datasets, image_folder, labelled_folder, loader
from transferkit.exceptions import DataError, SettingError
from transferkit.preprocessing import Preprocessing
from transferkit.transforms import eval_transform

SMALL = Preprocessing(size=8, resize_size=8)
EVAL = eval_transform("imagenet", SMALL)


def make(root: Path, **counts: int) -> Path:
    """Pictures in class folders; ``__`` in a name stands for a slash."""
    for position, (name, count) in enumerate(counts.items()):
        folder = root / name.replace("__", "/")
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            noise = np.random.default_rng((position, index)).integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{index}.png")
    return root


def labelled_names(source: PictureFiles) -> set[tuple[str, int]]:
    return {(Path(picture.path).parent.name, picture.label) for picture in source.pictures}


# Folders


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_train_and_val_folders_are_used_as_they_are(tmp_path, val):
    make(tmp_path, train__dog=3, train__cat=2, **{f"{val}__cat": 1, f"{val}__dog": 2})
    data = image_folder(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.train_labels() == [0, 0, 1, 1, 1]
    assert (data.train_counts(), data.val_counts()) == ({"cat": 2, "dog": 3}, {"cat": 1, "dog": 2})
    assert labelled_names(data.val) == {("cat", 0), ("dog", 1)}
    assert data.test is None


def test_val_is_mapped_by_name_when_a_class_is_missing_there(tmp_path, caplog):
    make(tmp_path, train__a=1, train__b=1, train__c=1, val__a=1, val__c=1)
    with caplog.at_level(logging.WARNING, logger="transferkit"):
        data = image_folder(tmp_path)
    assert labelled_names(data.val) == {("a", 0), ("c", 2)}
    assert "val has no pictures of class 'b'" in caplog.text


def test_a_class_only_in_val_is_an_error_that_names_it(tmp_path):
    make(tmp_path, train__cats=1, train__dogs=1, val__cats=1, val__dog=1)
    message = "val has pictures of class 'dog', which is not among the classes 'cats', 'dogs'; .* mean 'dogs'"
    with pytest.raises(DataError, match=message):
        image_folder(tmp_path)


def test_test_pictures_stand_in_for_validation_only_without_val(tmp_path, caplog):
    make(tmp_path, train__a=1, train__b=1, test__a=2)
    with caplog.at_level(logging.INFO, logger="transferkit"):
        data = image_folder(tmp_path)
    assert (len(data.val), data.test) == (2, None)
    assert "has no folder val; test is used for validation" in caplog.text
    data = image_folder(make(tmp_path, val__b=1))
    assert (data.val_labels(), data.test.labels()) == ([1], [0, 0])


def test_a_test_folder_without_classes_is_no_part_of_the_data(tmp_path):
    make(tmp_path, train__a=5, train__b=5, test=3)
    data = image_folder(tmp_path)
    assert (len(data.train), len(data.val)) == (8, 2)


def test_val_without_train_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has 'val' but no train with a folder per class"):
        image_folder(make(tmp_path, val__a=1, val__b=1))


def test_a_class_may_be_called_train(tmp_path):
    assert image_folder(make(tmp_path, bus=2, train=2)).class_names == ("bus", "train")


def test_the_split_is_proportional_and_depends_on_the_seed_alone(tmp_path):
    make(tmp_path, a=20, b=10, c=5)
    data = image_folder(tmp_path)
    assert (data.train_counts(), data.val_counts()) == ({"a": 16, "b": 8, "c": 4}, {"a": 4, "b": 2, "c": 1})
    assert not {p.path for p in data.train.pictures} & {p.path for p in data.val.pictures}
    assert image_folder(tmp_path) == data
    assert image_folder(tmp_path, seed=1).val != data.val


@pytest.mark.parametrize("val_fraction", [0.01, 0.5, 0.99])
def test_every_class_of_two_or_more_is_on_both_sides_of_the_split(tmp_path, val_fraction):
    data = image_folder(make(tmp_path, a=2, b=3, c=9), val_fraction=val_fraction)
    assert min(*data.train_counts().values(), *data.val_counts().values()) >= 1


def test_a_single_picture_is_trained_on_and_told_about(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="transferkit"):
        data = image_folder(make(tmp_path, common=5, rare=1))
    assert (data.train_counts()["rare"], data.val_counts()["rare"]) == (1, 0)
    assert "class 'rare' has a single picture" in caplog.text
    (tmp_path / "all_rare").mkdir()
    with pytest.raises(DataError, match=r"no class in .* has two pictures"):
        image_folder(make(tmp_path / "all_rare", a=1, b=1))


def test_nested_pictures_count_and_hidden_or_other_files_do_not(tmp_path, caplog):
    make(tmp_path, a=2, a__deep__deeper=2, b=2, **{".cache": 2, "b__.thumbnails": 3})
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / ".DS_Store").touch()
    (tmp_path / "labels.csv").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "loose.png")
    with caplog.at_level(logging.INFO, logger="transferkit"):
        data = image_folder(tmp_path)
    assert len(data.train) + len(data.val) == 6
    assert "left out 2 file(s) that are no pictures" in caplog.text
    assert "notes.txt" in caplog.text
    assert "left out 1 picture(s) in no class folder" in caplog.text


def test_linked_class_folders_are_followed(tmp_path):
    make(tmp_path / "elsewhere", a=2, b=2)
    (tmp_path / "root").mkdir()
    for name in "ab":
        (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere" / name)
    assert image_folder(tmp_path / "root").class_names == ("a", "b")


def test_folders_that_cannot_be_used_are_explained(tmp_path):
    make(tmp_path / "pets", cat=1, dog=1)
    with pytest.raises(DataError, match=r"no file or folder .*pet; check the path — did you mean 'pets'"):
        image_folder(tmp_path / "pet")
    with pytest.raises(DataError, match=r"0\.png is a file; give the folder"):
        image_folder(tmp_path / "pets" / "cat" / "0.png")
    with pytest.raises(DataError, match=r"looked for one folder per class, such as .*, and found 0 .* 1 picture\(s\)"):
        image_folder(tmp_path / "pets" / "cat")
    with pytest.raises(DataError, match=r"only one class, 'pets', in .*; give the folder that holds"):
        image_folder(tmp_path)
    with pytest.raises(DataError, match=r"no pictures in class folder 'bird', 'fish' of"):
        image_folder(make(tmp_path / "pets", fish=0, bird=0))
    with pytest.raises(SettingError, match=r"val_fraction must be above 0 and below 1, got 1\.0"):
        image_folder(tmp_path, val_fraction=1.0)


def test_given_class_names_decide_the_labels(tmp_path):
    make(tmp_path, dog=2, cat=2)
    data = image_folder(tmp_path, class_names=["dog", "bird", "cat"])
    assert data.class_names == ("dog", "bird", "cat")
    assert labelled_names(data.train) == {("dog", 0), ("cat", 2)}
    with pytest.raises(DataError, match="class 'cat', which is not among the classes 'dog', 'bird'"):
        image_folder(tmp_path, class_names=["dog", "bird"])


@pytest.mark.parametrize("part", ["", "val", "validation", "test"])
def test_labelled_folder_maps_folders_onto_the_model_s_classes(tmp_path, part, caplog):
    make(tmp_path / part, dog=2, cat=1)
    if part:
        make(tmp_path / "train", cat=9, dog=9)
    with caplog.at_level(logging.WARNING, logger="transferkit"):
        source = labelled_folder(tmp_path, ["dog", "bird", "cat"])
    assert source.labels() == [0, 0, 2]
    assert labelled_names(source) == {("dog", 0), ("cat", 2)}
    assert "no pictures of class 'bird'" in caplog.text


def test_labelled_folder_refuses_what_the_model_does_not_know(tmp_path):
    with pytest.raises(DataError, match=r"class 'c0', .* and 2 more, which is not among the classes 'dog'"):
        labelled_folder(make(tmp_path, **{f"c{i}": 1 for i in range(10)}), ["dog"])
    with pytest.raises(DataError, match=r"no pictures in .*empty"):
        labelled_folder(make(tmp_path / "empty", dog=0), ["dog"])


# Data sets


def pairs(*labels, size=6):
    return [(Image.new("RGB", (size, size), (40 * i, 0, 0)), label) for i, label in enumerate(labels)]


def test_any_data_set_of_pairs_can_be_used():
    train = [
        (np.zeros((6, 6), dtype=np.uint8), np.int64(0)),
        (torch.zeros(1, 6, 6), torch.tensor(2)),
        (Image.new("L", (6, 6)), 1),
    ]
    data = from_datasets(train, pairs(1))
    assert data.class_names == ("0", "1", "2")
    assert (data.train_labels(), data.val_labels()) == ([0, 2, 1], [1])
    (images, labels), *_ = loader(data.train, EVAL, batch_size=3, train=False)
    assert (images.shape, images.dtype) == ((3, 3, 8, 8), torch.float32)
    assert (labels.tolist(), labels.dtype) == ([0, 2, 1], torch.int64)
    assert from_datasets(train, pairs(1), class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_torchvision_data_sets_bring_their_labels_and_transforms():
    fake = FakeData(size=4, image_size=(3, 8, 8), num_classes=3, transform=v2.PILToTensor())
    data = from_datasets(fake, fake, class_names="abc")
    assert data.train_labels() == [int(fake[i][1]) for i in range(4)]
    assert data.train[0][0].dtype == torch.uint8


def test_image_folders_keep_their_paths_and_are_mapped_by_name(tmp_path):
    make(tmp_path, train__a=2, train__b=1, train__c=1, val__b=1, val__c=2)
    data = from_datasets(ImageFolder(tmp_path / "train"), ImageFolder(tmp_path / "val"))
    assert data.class_names == ("a", "b", "c")
    assert labelled_names(data.val) == {("b", 1), ("c", 2)}
    assert data.val.name(0) == str(tmp_path / "val" / "b" / "0.png")
    with pytest.raises(DataError, match="the val data set has pictures of class 'a', which is not among"):
        from_datasets(ImageFolder(tmp_path / "val"), ImageFolder(tmp_path / "train"))


def test_an_image_folder_with_a_transform_of_its_own_keeps_it(tmp_path):
    folder = ImageFolder(make(tmp_path, a=2, b=2), transform=v2.Compose([v2.Resize((5, 7)), v2.ToImage()]))
    data = from_datasets(folder, folder)
    assert data.train[0][0].shape == (3, 5, 7)
    assert data.train.name(3) == str(tmp_path / "b" / "1.png")
    assert data.val_labels() == [0, 0, 1, 1]


def test_subsets_keep_classes_paths_and_labels(tmp_path):
    folder = ImageFolder(make(tmp_path, a=3, b=3))
    train, val = random_split(folder, [4, 2], generator=torch.Generator().manual_seed(0))
    data = from_datasets(train, Subset(val, [1]))
    assert data.class_names == ("a", "b")
    assert [picture.path for picture in data.train.pictures] == [folder.samples[index][0] for index in train.indices]
    assert data.val_labels() == [folder.targets[val.indices[1]]]


def test_labels_that_the_data_set_rewrites_are_read_from_its_pairs(tmp_path):
    folder = ImageFolder(make(tmp_path, a=1, b=1), target_transform=lambda label: 1 - label)
    data = from_datasets(folder, folder)
    assert data.train_labels() == [1, 0] == [data.train[index][1] for index in range(2)]


class Labelled(list):
    """A data set that lists its labels, and fails when a picture is asked for."""

    def __init__(self, targets):
        super().__init__([None] * len(targets))
        self.targets = targets


@pytest.mark.parametrize("targets", [[0, 1, 1], np.array([0, 1, 1]), torch.tensor([0, 1, 1])])
def test_listed_labels_need_no_picture(targets):
    assert from_datasets(Labelled(targets), Labelled(targets)).train_counts() == {"0": 1, "1": 2}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("train", "val", "names", "message"),
    [
        ([], pairs(0), None, "the train data set is empty"),
        (pairs(0, 1), Stream(), None, r"val is a Stream; it needs len\(\) and"),
        (pairs(0, 0), pairs(0), None, "only one class, '0', in the train data set"),
        (pairs(0, -1, 1), pairs(0), None, "the label of sample 1 of list is -1; it needs to be a whole number"),
        (pairs(0, 0.5), pairs(0), None, "the label of sample 1 of list is 0.5; it needs"),
        ([{"image": 1}], pairs(0), None, r"sample 0 of list is a dict; the data set needs to give \(image, label\)"),
        (Labelled([0, 1]), Labelled([0, 2]), None, "the label of sample 1 of Labelled is 2, and there are 2 classes"),
    ],
)
def test_data_sets_that_cannot_be_used_are_explained(train, val, names, message):
    with pytest.raises(DataError, match=message):
        from_datasets(train, val, class_names=names)


def test_class_names_of_another_count_than_the_classes_are_refused(tmp_path):
    folder = ImageFolder(make(tmp_path, a=1, b=1))
    with pytest.raises(DataError, match="class_names has 3 names, the train data set 2 classes"):
        from_datasets(folder, folder, class_names="xyz")


def test_a_normalised_tensor_is_refused_by_name():
    normalised = [(torch.full((3, 6, 6), -1.0), 0)]
    data = from_datasets(normalised, normalised, class_names=["a", "b"])
    with pytest.raises(DataError, match=r"sample 0 of list: .*leave normalisation to transferkit"):
        data.train[0]


def test_a_label_beyond_the_classes_is_refused_when_it_is_read():
    data = from_datasets(pairs(0, 1), pairs(2))
    with pytest.raises(DataError, match="the label of sample 0 of list is 2, and there are 2 classes"):
        data.val[0]


def test_labels_without_a_list_are_read_once():
    class Counted(list):
        reads = 0

        def __getitem__(self, index):
            self.reads += 1
            return super().__getitem__(index)

    counted = Counted(pairs(0, 1))
    data = from_datasets(counted, pairs(0), class_names="ab")
    assert data.train_labels() == data.train_labels() == [0, 1]
    assert counted.reads == 2
