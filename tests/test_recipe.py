"""What makes two trainings the same, and what is resumed, reused or trained."""

import ast
import functools
import inspect
import json
import linecache
import os
import shutil

import nbformat
import pytest
import torch
from conftest import NOTEBOOK, ROOT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


# --- resume, reuse or train


def place(nb, folder, training=None, detector=None):
    """Checkpoints with just the entries that planning reads."""
    if training:
        run_id = training.get("run_id", "")
        facts = {"run_id": run_id, "start": training.get("start", "")}
        content = {"kind": "training", "epochs": 5, "facts": facts, "history": [], **training}
        nb.save_atomically(content, folder / "last.pth")
    if detector:
        content = {"kind": "detector", "history": [], **detector}
        nb.save_atomically(content, folder / "best_model.pth")


HALF, DONE = {"recipe": "r", "epoch": 3}, {"recipe": "r", "epoch": 5}
MINE = {"recipe": "r"}
OF_A_RUN = {"recipe": "r", "epoch": 3, "run_id": "a"}
OTHER = {"recipe": "other", "epoch": 3}
PLANS = [
    # mode, device, training, detector, run id -> plan
    ("auto", CPU, None, None, "", "train"),
    ("auto", CPU, None, MINE, "", "reuse"),
    ("auto", CUDA, None, MINE, "", "train"),
    ("auto", CPU, HALF, MINE, "", "resume"),
    ("auto", CUDA, HALF, None, "", "resume"),
    ("auto", CPU, DONE, MINE, "", "reuse"),
    ("auto", CPU, DONE, None, "", "resume"),  # killed before best_model.pth was written
    ("auto", CPU, OTHER, {"recipe": "other"}, "", "train"),
    ("reuse", CUDA, None, MINE, "", "reuse"),
    ("fresh", CPU, HALF, MINE, "", "train"),
    ("fresh", CPU, OF_A_RUN, None, "a", "resume"),
    ("fresh", CPU, OF_A_RUN, None, "b", "train"),
    ("fresh", CPU, {**OF_A_RUN, "recipe": "other"}, None, "a", "train"),
]


@pytest.mark.parametrize(("mode", "device", "training", "detector", "run_id", "plan"), PLANS)
def test_train_resume_or_reuse(nb, tmp_path, mode, device, training, detector, run_id, plan):
    place(nb, tmp_path, training, detector)
    got, content = nb.plan_training(mode, tmp_path, "r", device, run_id)
    assert got == plan
    assert (content is None) == (plan == "train")


@pytest.mark.parametrize(("mode", "device"), [("fresh", CPU), ("auto", CUDA)])
def test_a_good_detector_is_kept_beside_the_one_that_replaces_it(nb, tmp_path, mode, device):
    place(nb, tmp_path, None, MINE)
    assert nb.plan_training(mode, tmp_path, "r", device)[0] == "train"
    kept = tmp_path / "other_r_best_model.pth"
    assert kept.read_bytes() == (tmp_path / "best_model.pth").read_bytes()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_finished_training_whose_run_failed_later_is_not_lost(nb, tmp_path, device):
    """It never became best_model.pth; a detector that was put there after it is left alone."""
    place(nb, tmp_path, {**DONE, "history": [1]}, {**MINE, "history": [2]})
    os.utime(tmp_path / "best_model.pth", (1e9, 1e9))
    assert nb.plan_training("auto", tmp_path, "r", device)[0] == "resume"
    assert nb.plan_training("fresh", tmp_path, "r", device)[0] == "train"
    os.utime(tmp_path / "last.pth", (1e8, 1e8))
    restored = nb.plan_training("auto", tmp_path, "r", device)[0]
    assert restored == ("train" if device is CUDA else "reuse")


def test_reuse_of_nothing_is_refused(nb, tmp_path):
    with pytest.raises(nb.CheckpointError, match=r"best_model\.pth"):
        nb.plan_training("reuse", tmp_path, "r", CPU)


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(nb, tmp_path, capsys):
    place(nb, tmp_path, HALF)
    (tmp_path / "last.pth").rename(tmp_path / "previous.pth")
    (tmp_path / "last.pth").write_bytes((tmp_path / "previous.pth").read_bytes()[:200])
    plan, content = nb.plan_training("auto", tmp_path, "r", CPU)
    assert plan == "resume" and content["epoch"] == 3
    assert "last.pth" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["training", "detector"])
def test_what_began_with_other_weights_is_neither_resumed_nor_reused(nb, tmp_path, kind):
    """The fingerprint is compared where weights are at hand; a detector needs none to be reused."""
    content = {**(HALF if kind == "training" else MINE), "start": "scratch"}
    place(nb, tmp_path, **{kind: content})
    done = "resume" if kind == "training" else "reuse"
    assert nb.plan_training("auto", tmp_path, "r", CPU, start="0123456789abcdef") == ("train", None)
    if kind == "training":  # it was put aside
        place(nb, tmp_path, content)
    for start in ("scratch", ""):
        assert nb.plan_training("auto", tmp_path, "r", CPU, start=start)[0] == done


def test_weights_are_known_by_their_tensors(nb, vgg_weights, tmp_path):
    """The same tensors from another file, in another format, are the same; others are not."""
    shipped = torch.load(vgg_weights, weights_only=True)
    first = nb.fingerprint(nb.vgg16_features(vgg_weights))
    assert first == nb.fingerprint(dict(reversed(shipped.items())))
    torch.save({key: value.float() for key, value in shipped.items()}, tmp_path / "copy.pth")
    assert first == nb.fingerprint(nb.vgg16_features(tmp_path / "copy.pth"))
    shipped["features.28.bias"][0] += 1
    assert first != nb.fingerprint(shipped)


def test_another_recipe_destroys_nothing(nb, tmp_path, capsys):
    """Its detector and its unfinished run stay under another name, and that run is found again."""
    place(nb, tmp_path, {**HALF, "recipe": "old"}, {"recipe": "old"})
    with pytest.raises(nb.CheckpointError):
        nb.plan_training("reuse", tmp_path, "new", CPU)
    assert not list(tmp_path.glob("other_*"))  # nothing is trained
    assert nb.plan_training("auto", tmp_path, "new", CPU) == ("train", None)
    assert nb.plan_training("auto", tmp_path, "new", CPU) == ("train", None)  # as each cell does
    assert (tmp_path / "best_model.pth").is_file()  # until a better one takes its place
    place(nb, tmp_path, {"recipe": "new", "epoch": 1}, {"recipe": "new"})
    assert nb.load_checkpoint(tmp_path / "other_old_best_model.pth", "detector")["recipe"] == "old"
    assert capsys.readouterr().out.count("other_old_best_model.pth") == 1  # it is said once
    nb.plan_training("auto", tmp_path, "new", CPU)  # the same recipe: nothing to do
    assert not list(tmp_path.glob("other_new*"))
    plan, content = nb.plan_training("auto", tmp_path, "old", CPU)
    assert plan == "resume" and content["epoch"] == 3


def test_a_recipe_that_was_accepted_reuses_the_detector_of_these_weights_only(nb, tmp_path):
    state = {"w": torch.ones(2)}
    place(nb, tmp_path, None, {"recipe": "old", "model": state})
    accepted = {nb.fingerprint(state): ["new"], "another": ["newer"]}
    (tmp_path / "accepted_recipes.json").write_text(json.dumps(accepted))
    before = (tmp_path / "best_model.pth").read_bytes()
    for recipe in ("old", "new"):
        assert nb.plan_training("auto", tmp_path, recipe, CPU)[0] == "reuse"
    assert nb.plan_training("auto", tmp_path, "newer", CPU)[0] == "train"
    assert (tmp_path / "best_model.pth").read_bytes() == before


def test_the_committed_detector_is_reused_by_this_page(nb, bccd_root):
    """Its own recipe or an accepted one is that of the page on BCCD with the shipped labels."""
    root = nb.dataset_root(bccd_root)
    splits = {split: nb.SmearSplit(root, split) for split in ("train", "val")}
    labels = nb.read_complete_labels(ROOT / nb.COMPLETE_LABELS)
    labels, _ = nb.complete_labels_that_fit(labels, splits)
    recipe = nb.recipe_digest(vars(nb), list(splits.values()), labels)
    content = nb.load_checkpoint(ROOT / "checkpoints" / "best_model.pth", "detector")
    accepted = nb.accepted_recipes(nb.fingerprint(content["model"]), ROOT / "checkpoints")
    assert recipe in [content["recipe"], *accepted]


# --- the digest


@pytest.fixture
def digest_of(nb, drawn_bccd, monkeypatch):
    """The digest of a training on the drawn smears, some names of the notebook changed.

    Here all code cells are one source, so the syntax of a definition is looked up once.
    """
    monkeypatch.setattr(nb, "syntax_of", functools.cache(nb.syntax_of))
    root = nb.dataset_root(drawn_bccd)
    splits = [nb.SmearSplit(root, split) for split in ("train", "val")]
    return lambda **changed: nb.recipe_digest({**vars(nb), **changed}, splits, {})


def edited(nb, name, edit):
    """A function or class of the notebook, defined again from its edited source."""
    source = edit(inspect.getsource(getattr(nb, name)))
    file = f"<edited {name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    namespace = dict(vars(nb))
    exec(compile(source, file, "exec"), namespace)
    return namespace[name]


def reworded(source):
    """The same code without comments and with other docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        kinds = (ast.FunctionDef, ast.ClassDef)
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            node.body[0].value.value = "Other words."
    return ast.unparse(tree) + "\n# the end\n"


def changed(source):
    """The same code with one statement more in the body of its first function."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    functions[0].body.append(ast.parse("one = 1").body[0])
    return ast.unparse(tree) + "\n"


def configured():
    """The names of the configuration cell's constants."""
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    (cell,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    statements = ast.parse(cell.source).body
    return {node.targets[0].id for node in statements if isinstance(node, ast.Assign)}


# what a user may change without training again: places, this machine, detection, pictures, counting
FREE = """
BOOTSTRAP_SAMPLES CHECKPOINT_DIR COMPLETE_LABELS COUNT_OVERLAP DATASET_URL DATA_DIR DATA_NOTE
FINETUNE_FROM IMAGE_MEMORY_MB MAX_OVERLAP MIN_SCORE SAVE_EVERY
SHARED_FIELDS SHOW_SCORE TOP_K TRAINING VGG16_WEIGHTS VOTE_OVERLAP
""".split()


def test_every_constant_is_part_of_the_recipe_or_known_to_be_free(nb, digest_of):
    """FINETUNE_FROM, COMPLETE_LABELS and VGG16_WEIGHTS count by what is in the files."""
    shaping = configured() - set(FREE)
    shaping |= {"VARIANCES", "WORKING_SIZE", "VGG_MEAN", "IMAGE_SIZE", "FEATURE_MAPS"}
    assert shaping <= set(nb.TRAINING_CONSTANTS)
    first = digest_of()
    assert len(first) == 16 and first == digest_of()
    for name in nb.TRAINING_CONSTANTS:
        assert digest_of(**{name: [getattr(nb, name), "other"]}) != first, name
    assert first == digest_of(**{name: "other" for name in FREE if name != "FINETUNE_FROM"})


def test_code_counts_and_wording_does_not(nb, digest_of):
    first = digest_of()
    for definition in nb.TRAINING_CODE:
        name = definition.__name__
        assert first == digest_of(**{name: edited(nb, name, reworded)}), name
    for name in ("conv", "Run", "augment", "MultiBoxLoss", "SSD300", "train_epoch", "decay_at"):
        assert first != digest_of(**{name: edited(nb, name, changed)}), name
    for name in ("epoch_line", "save_run", "pick_precision", "draw_curves", "detect"):
        assert first == digest_of(**{name: edited(nb, name, changed)}), name


# what the training code uses and what cannot change the trained weights
HARMLESS = {
    "StudyError", "AnnotationError", "DatasetError", "CheckpointError", "WeightsError",  # words
    "check_size", "check_object", "check_depth", "read_voc_xml",  # raise or read
    "read_split", "read_text", "split_line_id",  # the ids count as data
    "load_detector", "load_checkpoint", "list_or_value", "fingerprint",  # files of weights
    "epoch_line", "say_how_long", "number_of", "minutes_left", "device_name",  # print
    "save_run", "peak_memory_gb", "memory_format", "parts_of_batch", "pick_precision",  # machine
}  # fmt: skip
FREE_IN_CODE = {"CLASS_NAMES", "DEVICE", "IMAGE_MEMORY_MB", "FINETUNE_FROM", "ORIENTATION"}


def names_used_by(definition):
    """All names that stand in the source of a function or class."""
    tree = ast.parse(inspect.getsource(inspect.unwrap(definition)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def test_the_list_of_training_code_lacks_nothing(nb):
    """Starting from the list, every name is followed to the notebook's own definitions."""
    listed = {definition.__name__ for definition in nb.TRAINING_CODE}
    code = set()
    constants = set()
    for definition in nb.TRAINING_CODE:
        for name in names_used_by(definition):
            value = getattr(nb, name, None)
            if callable(value) and getattr(value, "__module__", "") == nb.__name__:
                code.add(name)
            elif name.isupper() and len(name) > 1 and hasattr(nb, name):
                constants.add(name)
    assert code - listed - HARMLESS == set()
    assert constants - set(nb.TRAINING_CONSTANTS) - FREE_IN_CODE == set()
    assert len(listed) == len(nb.TRAINING_CODE)
    assert len(set(nb.TRAINING_CONSTANTS)) == len(nb.TRAINING_CONSTANTS)


def test_the_data_count_by_content_and_split(nb, tmp_path, drawn_bccd):
    root = shutil.copytree(drawn_bccd, tmp_path / "copy") / "BCCD"

    def digest(labels_by_id=None):
        splits = [nb.SmearSplit(root, split) for split in ("train", "val")]
        return nb.recipe_digest(vars(nb), splits, labels_by_id or {})

    first = digest()
    path = root / "Annotations" / "Smear_00000.xml"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))  # as git does on Windows
    assert first == digest()
    path.write_bytes(text.replace(b"<truncated>0", b"<truncated>1", 1))
    assert first != digest()
    path.write_bytes(text)
    cell = {"Smear_00000": (torch.tensor([[1.0, 1, 30, 30]]), torch.tensor([1]))}
    assert first != digest(cell)
    train_list = root / "ImageSets" / "Main" / "train.txt"
    val_list = root / "ImageSets" / "Main" / "val.txt"
    train, val = train_list.read_text().split(), val_list.read_text().split()
    # the last training image becomes the first of validation
    train_list.write_text("\n".join(train[:-1]))
    val_list.write_text("\n".join([train[-1], *val]))
    assert first != digest()


def test_a_detector_to_start_from_counts_by_its_weights(nb, digest_of, tmp_path):
    first, path = digest_of(), tmp_path / "first.pth"
    content = {"kind": "detector", "class_names": ["A"], "model": {"w": torch.zeros(2)}}
    torch.save(content, path)
    one = digest_of(FINETUNE_FROM=str(path))
    torch.save({**content, "metrics": {"map": 1}}, tmp_path / "other_name.pth")
    assert one != first and one == digest_of(FINETUNE_FROM=str(tmp_path / "other_name.pth"))
    torch.save({**content, "model": {"w": torch.ones(2)}}, path)
    assert one != digest_of(FINETUNE_FROM=str(path))


def syntax(nb, source):
    """What counts of some code, as text."""
    return json.dumps(nb.plain_syntax(ast.parse(source).body))


def test_plain_syntax_ignores_comments_docstrings_and_messages_only(nb):
    plain = syntax(nb, 'def f(a):\n    """Says this."""\n    # and that\n    return a + 1  # one\n')
    text = 'def f(a):\n    """Says something\n    else."""\n\n    return (a +\n        1)\n'
    assert plain == syntax(nb, text)
    assert plain != syntax(nb, 'def f(a):\n    """Says this."""\n    return a + 2\n')
    assert plain == syntax(nb, "def f(a):\n    return a + 1\n")  # a docstring may come and go
    assert syntax(nb, 'x = "# no comment"\n') != syntax(nb, 'x = "# no"\n')
    assert syntax(nb, "x = b'one'\n") != syntax(nb, "x = b'two'\n")
    assert syntax(nb, 'print("one")') == syntax(nb, 'print("two", 3)') != syntax(nb, "show(3)")
    assert syntax(nb, 'raise E("one")') == syntax(nb, 'raise E("two") from None')


def test_the_digest_does_not_depend_on_how_a_python_writes_code_back(nb):
    """Some versions unparse a lone generator with brackets of its own; other code is other code."""
    assert syntax(nb, "tuple((x for x in y))") == syntax(nb, "tuple(x for x in y)")
    assert syntax(nb, "tuple(x for x in y)") != syntax(nb, "tuple(x for x in z)")
    later = ast.parse("def f(a): return a").body
    earlier = ast.parse("def f(a): return a").body
    later[0].type_params = []  # as Python 3.12 parses it: with a list of type parameters
    earlier[0].type_params = None
    assert nb.plain_syntax(later) == nb.plain_syntax(earlier)


def test_a_class_counts_whole(nb, digest_of):
    """Also what is no method: attributes and bases."""
    more = edited(nb, "SmearSplit", lambda source: source + "\n    an_attribute = 1\n")
    assert digest_of() != digest_of(SmearSplit=more)
