"""Sets of pictures: each layout on disk, and a message that names file and line for all that is wrong."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
from PIL import Image
from wsss_models.data import open_dataset
from wsss_models.data.artefacts import FileError
from wsss_models.data.files import write_label
from wsss_models.data.masks import read_mask
from wsss_models.data.palette import voc_palette
from wsss_models.data.synth import Settings, write_set
from wsss_models.data.table import read_labels
from wsss_models.data.voc import CLASSES

RNG = np.random.default_rng(0)


def picture(path: Path, height: int = 8, width: int = 10) -> np.ndarray:
    values = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return values


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def annotation(root: Path, name: str, *objects: str) -> None:
    body = "\n".join(f"<object>\n<name>{o}</name>\n</object>" for o in objects)
    text(root / "Annotations" / f"{name}.xml", f"<annotation>\n{body}\n</annotation>\n")


@pytest.fixture
def voc(tmp_path):
    """Three pictures: a cat on a sofa, a person (two of them), and one with a damaged mask."""
    for name in ("a", "b", "c"):
        picture(tmp_path / "JPEGImages" / f"{name}.png")
    annotation(tmp_path, "a", "sofa", "cat")
    annotation(tmp_path, "b", "person", "person")
    annotation(tmp_path, "c", "dog")
    mask = np.zeros((8, 10), dtype=np.uint8)
    mask[2:4, 3:7], mask[4:6, 3:7], mask[6, 3:7] = 8, 18, 255
    write_label(tmp_path / "SegmentationClass" / "a.png", mask)
    text(tmp_path / "SegmentationClass" / "c.png", "no picture")
    text(tmp_path / "ImageSets" / "Segmentation" / "train.txt", "b\r\na\r\n")
    text(tmp_path / "ImageSets" / "Main" / "cat_train.txt", "a 1\nb -1\n")
    return tmp_path


# --- PASCAL VOC -------------------------------------------------------------------------------------------------------


def test_voc(voc):
    pictures = open_dataset(voc, "train")
    assert pictures.kind == "voc"
    assert pictures.classes == CLASSES
    assert pictures.ids == ("b", "a")
    assert pictures.image(1).shape == (8, 10, 3)
    assert pictures.image(1).dtype == np.uint8
    assert pictures.label(1).dtype == np.float32
    assert np.flatnonzero(pictures.label(1)).tolist() == [CLASSES.index("cat"), CLASSES.index("sofa")]
    assert pictures.class_ids(0) == [15]
    assert pictures.mask(0) is None
    assert not pictures.has_mask(0)
    assert np.unique(pictures.mask(1)).tolist() == [0, 8, 18, 255]
    assert np.array_equal(pictures.labels(), np.stack([pictures.label(0), pictures.label(1)]))
    assert open_dataset(voc).ids == ("a", "b", "c")
    assert "2 pictures, 20 classes" in repr(pictures)


def test_voc_subset_keeps_the_order_asked_for_and_pickles(voc):
    part = pickle.loads(pickle.dumps(open_dataset(voc).subset([2, 0])))
    assert part.ids == ("c", "a")
    assert part.class_ids(1) == [8, 18]
    assert part.index("a") == 1


def test_voc_lists_of_paths(voc):
    """AffinityNet's lists name paths."""
    listed = text(voc / "list.txt", "/JPEGImages/a.jpg /SegmentationClassAug/a.png\n\n/JPEGImages/c.jpg\n")
    assert open_dataset(voc, str(listed)).ids == ("a", "c")


def test_voc_masks_of_train_aug_are_the_augmented_ones(voc):
    write_label(voc / "SegmentationClassAug" / "a.png", np.full((8, 10), 3))
    text(voc / "ImageSets" / "Segmentation" / "train_aug.txt", "a\n")
    assert open_dataset(voc, "train_aug").mask(0).max() == 3
    assert open_dataset(voc, "train").mask(1).max() == 255
    assert open_dataset(voc, "train", masks="SegmentationClassAug").mask(1).max() == 3
    with pytest.raises(FileError, match="nowhere: no such folder of masks"):
        open_dataset(voc, masks="nowhere")


def test_voc_labels_from_a_table_and_from_masks(voc):
    table = text(voc / "table.txt", "a dog cat\nb 15 1\n")
    pictures = open_dataset(voc, "train", labels=table)
    assert pictures.class_ids(0) == [1, 15]
    assert pictures.class_ids(1) == [8, 12]
    with pytest.raises(FileError, match=r"table\.txt: no line for the picture 'c'"):
        open_dataset(voc, labels=table).class_ids(2)
    from_masks = open_dataset(voc, "train", labels="masks")
    assert from_masks.class_ids(1) == [8, 18]
    with pytest.raises(FileError, match=r"b\.png: no such mask, from which the label"):
        from_masks.class_ids(0)


def test_voc_with_classes_of_its_own(voc):
    text(voc / "classes.txt", "cat\nsofa\n")
    pictures = open_dataset(voc, "train")
    assert pictures.classes == ("cat", "sofa")
    assert pictures.label(1).tolist() == [1, 1]
    with pytest.raises(FileError, match=r"b\.xml: line 2: class must be one of cat, sofa, got 'person'"):
        pictures.label(0)
    with pytest.raises(FileError, match=r"a\.png: mask must hold 0\.\.2 and 255, got 8"):
        pictures.mask(1)
    assert open_dataset(voc, "train", classes=["sofa", "cat", "person"]).label(0).tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    "content, message",
    [
        ("<annotation><object></object></annotation>", "line 1: object 1 must have a name"),
        ("<annotation>\n<object>\n</annotation>", "line 3: no valid XML"),
        ("<annotation>\n\n<object><name>catt</name></object></annotation>", "line 3: class must be one of .*'catt'"),
        ('<!DOCTYPE x [<!ENTITY a "b">]><annotation/>', "annotation must be plain XML .*without a DOCTYPE"),
        ("", "line 1: no valid XML"),
    ],
)
def test_voc_annotations_that_are_refused(voc, content, message):
    text(voc / "Annotations" / "a.xml", content)
    with pytest.raises(FileError, match=r"a\.xml: " + message):
        open_dataset(voc).label(0)


def test_voc_files_that_are_missing_or_damaged(voc):
    pictures = open_dataset(voc)
    with pytest.raises(FileError, match=r"c\.png: no mask of a known lossless format"):
        pictures.mask(2)
    (voc / "JPEGImages" / "a.png").write_bytes(b"")
    with pytest.raises(FileError, match=r"a\.png: the file is empty"):
        pictures.image(0)
    (voc / "JPEGImages" / "a.png").unlink()
    with pytest.raises(FileError, match=r"a\.jpg: No such file"):
        pictures.image(0)
    (voc / "Annotations" / "b.xml").unlink()
    with pytest.raises(FileError, match=r"b\.xml: no such annotation"):
        pictures.label(1)
    with pytest.raises(FileError, match=r"ImageSets: split must be one of train, got 'vall'"):
        open_dataset(voc, "vall")


@pytest.mark.parametrize(
    "content, message",
    [
        ("a\nb\na\n", r"line 3: each id must appear once, got 'a' again \(line 1\)"),
        ("a\n../../etc/passwd\n", r"line 2: id must be the name of a file inside the folder"),
        ("a\n..\n", r"line 2: id must be"),
        ("a\n\nC:\\x\n", r"line 3: id must be"),
        ("\n \n", "must name at least one picture"),
        (b"\xff\xfe\x00", "must be text in UTF-8"),
    ],
)
def test_lists_that_are_refused(voc, content, message):
    path = voc / "ImageSets" / "Segmentation" / "bad.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=r"bad\.txt: " + message):
        open_dataset(voc, "bad")


@pytest.mark.parametrize(
    "content, message",
    [
        ("cat\n\nsofa\n", "line 2: must hold a class name"),
        ("cat\nsofa\ncat\n", "each class must be named once, got 'cat' 2 times"),
        ("", r"there must be 1\.\.254 classes, got 0"),
        ("".join(f"c{i}\n" for i in range(255)), r"there must be 1\.\.254 classes, got 255"),
    ],
)
def test_class_lists_that_are_refused(voc, content, message):
    text(voc / "classes.txt", content)
    with pytest.raises(FileError, match=r"classes\.txt: " + message):
        open_dataset(voc)


def test_a_symlink_out_of_the_folder_is_refused(voc, tmp_path_factory):
    secret = picture(tmp_path_factory.mktemp("other") / "x.png")
    assert secret.size
    (voc / "JPEGImages" / "a.png").unlink()
    (voc / "JPEGImages" / "a.png").symlink_to(next(tmp_path_factory.getbasetemp().glob("other*/x.png")))
    with pytest.raises(FileError, match="a symlink leads out of"):
        open_dataset(voc).image(0)


def test_folders_that_are_no_set(tmp_path):
    with pytest.raises(FileError, match=r"must hold JPEGImages .*labels\.csv"):
        open_dataset(tmp_path)
    with pytest.raises(FileError, match="no such folder"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "JPEGImages").mkdir()
    with pytest.raises(FileError, match="must hold pictures, got none"):
        open_dataset(tmp_path)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_in_every_form(tmp_path):
    ids = RNG.choice([0, 1, 15, 20, 255], (6, 7)).astype(np.uint8)
    write_label(tmp_path / "palette.png", ids)
    Image.fromarray(ids).save(tmp_path / "grey.png")
    Image.fromarray(voc_palette()[ids]).save(tmp_path / "colours.png")
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "wide.png")
    for name in ("palette", "grey", "colours", "wide"):
        assert np.array_equal(read_mask(tmp_path / f"{name}.png", num_classes=20), ids), name


def test_masks_that_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4, 3), 77, dtype=np.uint8)).save(tmp_path / "rgb.png")
    with pytest.raises(FileError, match=r"in colours of the VOC palette, got \(77, 77, 77\) at \(0, 0\)"):
        read_mask(tmp_path / "rgb.png")
    Image.fromarray(np.full((4, 4), 300, dtype=np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(FileError, match=r"one id in 0\.\.255"):
        read_mask(tmp_path / "wide.png")
    Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(tmp_path / "lossy.jpg")
    with pytest.raises(FileError, match="lossless"):
        read_mask(tmp_path / "lossy.jpg")
    whole = (tmp_path / "wide.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match=r"cut\.png"):
        read_mask(tmp_path / "cut.png")


# --- one's own folder -------------------------------------------------------------------------------------------------


def own(root: Path, table: str, *files: str) -> Path:
    for file in files:
        picture(root / file)
    text(root / "labels.csv", table)
    return root


def test_own_folder_with_names(tmp_path):
    table = "file,split,classes\nsub/a.png,train,road;old house\nb.jpg,val,\nc,train,road,tree\n"
    own(tmp_path, table, "images/sub/a.png", "images/b.jpg", "images/c.png")
    pictures = open_dataset(tmp_path)
    assert pictures.kind == "folder"
    assert pictures.ids == ("sub/a", "b", "c")
    assert pictures.classes == ("old house", "road", "tree")
    assert pictures.labels().sum(axis=1).tolist() == [2, 0, 2]
    assert all(pictures.image(i).shape == (8, 10, 3) for i in range(3))
    assert pictures.mask(0) is None
    assert open_dataset(tmp_path, "train").ids == ("sub/a", "c")
    assert open_dataset(tmp_path, "val").label(0).tolist() == [0, 0, 0]


def test_own_folder_with_a_column_for_each_class(tmp_path):
    own(tmp_path, "image,tumour,cyst\na.png,1,0\nb.png,0,0\nc.png,TRUE,1.0\n", "a.png", "b.png", "c.png")
    pictures = open_dataset(tmp_path)
    assert pictures.classes == ("tumour", "cyst")  # in the order of the columns
    assert pictures.labels().tolist() == [[1, 0], [0, 0], [1, 1]]


def test_own_folder_of_one_class(tmp_path):
    own(tmp_path, "file,crack\na.png,1\nb.png,\n", "a.png", "b.png")
    assert open_dataset(tmp_path).labels().tolist() == [[1], [0]]


def test_own_folder_with_ids_lists_and_masks(tmp_path):
    own(tmp_path, "file,label\na.png,2\nb.png,1;2\n", "a.png", "b.png")
    with pytest.raises(FileError, match=r"labels\.csv: holds ids of classes, whose names belong in classes\.txt"):
        open_dataset(tmp_path)
    text(tmp_path / "classes.txt", "cat\ndog\n")
    text(tmp_path / "test.txt", "b\n")
    write_label(tmp_path / "masks" / "b.png", np.full((8, 10), 2))
    pictures = open_dataset(tmp_path, "test")
    assert pictures.class_ids(0) == [1, 2]
    assert pictures.mask(0).max() == 2
    assert open_dataset(tmp_path, "test", labels="masks").class_ids(0) == [2]


@pytest.mark.parametrize(
    "table, message",
    [
        ("file,classes\na.png,cat\na.jpg,cat\n", r"line 3: each picture must appear once, got 'a' again \(line 2\)"),
        ("file,classes\na.png,cat;cat\n", "line 2: each class must be named once, got 'cat' twice"),
        ("file,cat,dog\na.png,1,0\nb.png,1\n", "line 3: must have 3 cells as the heading, got 2"),
        ("file,classes\n", "must name at least one picture"),
        ("", "must name at least one picture"),
        ('file,classes\na.png,"cat\n', "line 2: no valid CSV"),
        ("file,classes\n../../etc/a.png,cat\n", "line 2: id must be"),
        ("file,classes\n/etc/a.png,cat\n", "line 2: id must be"),
        ("file,classes\na.png,\n", "must name a class, got none"),
    ],
)
def test_tables_that_are_refused(tmp_path, table, message):
    with pytest.raises(FileError, match=r"labels\.csv: " + message):
        open_dataset(own(tmp_path, table))


@pytest.mark.parametrize(
    "cell, message",
    [
        ("bird", "line 3: class must be one of cat, dog, got 'bird'"),
        ("3", r"line 3: class id must be in 1\.\.2, got 3"),
        ("0", r"line 3: class id must be in 1\.\.2, got 0 \(0 is the background: add 1"),
    ],
)
def test_classes_that_the_list_lacks(tmp_path, cell, message):
    text(tmp_path / "classes.txt", "cat\ndog\n")
    pictures = open_dataset(own(tmp_path, f"file,classes\na.png,cat\nb.png,{cell}\n", "a.png"))
    assert pictures.class_ids(0) == [1]
    with pytest.raises(FileError, match=r"labels\.csv: " + message):
        pictures.class_ids(1)


def test_table_rows_keep_their_lines(tmp_path):
    table = read_labels(text(tmp_path / "t.csv", "file,classes\n\n\na.png,cat\n"))
    assert table.rows["a"].line == 4
    assert table.names() == ["cat"]
    with pytest.raises(FileError, match="no such file"):
        read_labels(tmp_path / "none.csv")


# --- damage -----------------------------------------------------------------------------------------------------------


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    kind = rng.integers(4)
    at = int(rng.integers(len(content) + 1))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + rng.bytes(int(rng.integers(1, 20))) + content[at:]
    if kind == 2:
        values = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            values[place] = rng.integers(256)
        return bytes(values)
    return content[:at] + content[int(rng.integers(at, len(content) + 1)) :]


def read_all(root: Path) -> None:
    try:
        pictures = open_dataset(root)
    except ValueError:
        return
    for i in range(len(pictures)):
        for read in (pictures.image, pictures.label, pictures.mask):
            with contextlib.suppress(ValueError):
                read(i)


@pytest.mark.parametrize("layout", ["voc", "own"])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_is_more_than_a_message(tmp_path, layout):
    """400 damaged files a layout: a ValueError that names the file, or nothing."""
    if layout == "voc":
        write_set(tmp_path / "s", Settings(2, classes=3, height=48, width=48))
    else:
        own(tmp_path, "file,split,classes\na.png,train,cat;dog\nb.png,val,\n", "a.png", "b.png")
        write_label(tmp_path / "masks" / "a.png", np.ones((8, 10), dtype=int))
    rng = np.random.default_rng(1)
    root = tmp_path / "s" if layout == "voc" else tmp_path
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for case in range(400):
        path = files[case % len(files)]
        content = path.read_bytes()
        path.write_bytes(damaged(content, rng))
        read_all(root)
        path.write_bytes(content)
